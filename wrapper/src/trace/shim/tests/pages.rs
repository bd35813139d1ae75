//! What memory programs get (`shim/pages.rs`).

use super::*;

/// Maps memory as compilers do, and says of each piece whether it is to be of large pages.
const MAPS: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
static int is_large(void *piece) {
    FILE *file = fopen("/proc/self/smaps", "r");
    static char line[4096];
    uintptr_t from, to;
    int is_here = 0, is_large = 0;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2) is_here = from <= (uintptr_t)piece && (uintptr_t)piece < to;
        else if (is_here && !strncmp(line, "VmFlags:", 8)) is_large = strstr(line, " hg") != NULL;
    }
    fclose(file);
    return is_large;
}
static void show(const char *what, size_t length, int protection, int flags) {
    char *piece = mmap(NULL, length, protection, flags | MAP_ANONYMOUS, -1, 0);
    if (piece == MAP_FAILED) { puts("failed"); return; }
    if (protection & PROT_WRITE) memset(piece, 1, length < (1 << 22) ? length : 1 << 22);
    printf("%s %d\n", what, is_large(piece));
}
int main(void) {
    int both = PROT_READ | PROT_WRITE;
    show("piece", 4 << 20, both, MAP_PRIVATE);
    show("small", 64 << 10, both, MAP_PRIVATE);
    show("reserved", 4 << 20, both, MAP_PRIVATE | MAP_NORESERVE);
    show("shared", 4 << 20, both, MAP_SHARED);
    show("stack", 4 << 20, both, MAP_PRIVATE | MAP_STACK);
    show("code", 4 << 20, both | PROT_EXEC, MAP_PRIVATE);
    show("more", 61 << 20, both, MAP_PRIVATE);
    show("rest", 60 << 20, both, MAP_PRIVATE);
    show("again", 4 << 20, both, MAP_PRIVATE);
    void *none = mmap(NULL, 0, both, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    printf("%d\n", none == MAP_FAILED && errno == EINVAL);
    FILE *file = tmpfile();
    char text[8192] = {[4096] = 'x'};
    fwrite(text, 1, sizeof text, file);
    fflush(file);
    char *second = mmap64(NULL, 4096, PROT_READ, MAP_PRIVATE, fileno(file), 4096);
    printf("%d\n", second != MAP_FAILED && *second == 'x');
    return 0;
}
"#;

#[test]
fn compilers_of_c_get_large_pages() {
    if !Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        eprintln!("this kernel has no large pages");
        return;
    }
    let dir = tree();
    let mut said = ["cc1", "cc1plus", "cc", "made"].map(|name| {
        compiled(dir.path(), MAPS, name, &[]);
        let (status, _, said) = observe(program(&format!("./{name}"), &[], dir.path()), Shim::new);
        assert!(status.success());
        said
    });
    let large = |said: &str| {
        let lines = said.lines().filter_map(|line| line.strip_suffix(" 1"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    for said in &mut said {
        assert!(said.ends_with("again 0\n1\n1\n"), "{said}");
    }
    assert_eq!(
        said.map(|said| large(&said)),
        [vec!["piece", "rest"], vec!["piece", "rest"], vec![], vec![]]
    );
}
