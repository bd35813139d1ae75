/* The floor that a build of hits is measured against (scripts/bench): a rustc wrapper that looks up a
 * hash of the command line, links what it recorded into place, and checks nothing at all. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char *at(const char *directory, const char *name)
{
    char *path;
    return asprintf(&path, "%s/%s", directory, name) < 0 ? NULL : path;
}

static void replay(const char *path)
{
    struct stat about;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    char *text;
    if (file < 0 || fstat(file, &about) < 0 || !(text = malloc(about.st_size + 1)))
        exit(121);
    ssize_t length = read(file, text, about.st_size);
    if (length < 0 || write(STDERR_FILENO, text, length) != length)
        exit(122);
}

/* Links the files of `from` whose names hold `part` to the same names in `to`. */
static void link_all(const char *from, const char *part, const char *to)
{
    DIR *directory = opendir(from);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        if (entry->d_type != DT_REG || !strstr(entry->d_name, part) || !strcmp(entry->d_name, "stderr"))
            continue;
        unlink(at(to, entry->d_name));
        if (link(at(from, entry->d_name), at(to, entry->d_name)) < 0)
            exit(123);
    }
}

int main(int argc, char **argv)
{
    const char *store = getenv("FLOOR_STORE"), *out = NULL, *extra = NULL;
    uint64_t hash = 14695981039346656037u;
    for (int i = 1; i < argc; i++) {
        for (const char *c = argv[i]; *c; c++)
            hash = (hash ^ (unsigned char)*c) * 1099511628211u;
        if (!strcmp(argv[i], "--out-dir"))
            out = argv[i + 1];
        if (!strncmp(argv[i], "extra-filename=", 15))
            extra = argv[i] + 15;
    }
    if (argc < 2 || !store || !out || !extra) {
        if (argc > 1)
            execvp(argv[1], argv + 1);
        return 127;
    }
    char key[64];
    snprintf(key, sizeof key, "%016llx", (unsigned long long)hash);
    char *recorded = at(store, key);
    if (access(recorded, F_OK) == 0) {
        link_all(recorded, "", out);
        replay(at(recorded, "stderr"));
        return 0;
    }
    snprintf(key, sizeof key, "new-%d", (int)getpid());
    char *fresh = at(store, key);
    if (mkdir(fresh, 0755) < 0)
        return 124;
    pid_t child = fork();
    if (child == 0) {
        int file = open(at(fresh, "stderr"), O_CREAT | O_WRONLY, 0644);
        dup2(file, STDERR_FILENO);
        execvp(argv[1], argv + 1);
        return 127;
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) < 0)
        return 125;
    replay(at(fresh, "stderr"));
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        return 1;
    link_all(out, extra, fresh);
    return rename(fresh, recorded) < 0 ? 126 : 0;
}
