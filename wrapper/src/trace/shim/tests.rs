use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::ExitStatus;

use super::*;
use crate::trace::watcher::Watcher;
use crate::trace::{Access, Observed, Scope, Unseen, Uses};

mod allocator;
mod pages;
mod searched;

fn without() -> Option<Shim> {
    None
}

fn observe(
    program: impl Into<Program>,
    shim: fn() -> Option<Shim>,
) -> (ExitStatus, Observed, String) {
    let mut program = program.into();
    let (mut stdout, theirs) = io::pipe().expect("pipe");
    program.command.stdout(theirs);
    let watcher = Watcher::start(program, Scope::default(), shim).expect("starts");
    let mut said = String::new();
    stdout.read_to_string(&mut said).expect("reads");
    let (status, observed) = watcher.finish().expect("ends");
    (status, observed, said)
}

fn uses(observed: &Observed, path: &Path) -> Uses {
    let uses = observed.paths.get(path.as_os_str().as_bytes());
    uses.copied().unwrap_or_default()
}

fn program(name: &str, arguments: &[&str], cwd: &Path) -> Command {
    let mut command = Command::new(name);
    command.args(arguments).current_dir(cwd);
    // Who runs tests may look for libraries elsewhere, which is told in other words.
    command.env_remove(search::VARIABLE);
    command
}

fn python(text: &str, cwd: &Path) -> Command {
    // Without caches of its own, which another run finds changed.
    program("/usr/bin/python3", &["-S", "-B", "-c", text], cwd)
}

/// Runs a program with the shim and without, and returns what was seen and said both times.
fn alike(make: impl Fn() -> Command) -> (Observed, String) {
    let (status, seen, said) = observe(make(), Shim::new);
    let (other_status, other, other_said) = observe(make(), without);
    assert_eq!((status, &said), (other_status, &other_said));
    let differs = |(path, uses): (&Vec<u8>, &Uses)| other.paths.get(path) != Some(uses);
    let odd: BTreeMap<_, _> = seen
        .paths
        .iter()
        .filter(|entry| differs(*entry))
        .map(|(path, uses)| (String::from_utf8_lossy(path), (uses, other.paths.get(path))))
        .collect();
    assert!(odd.is_empty(), "with and without: {odd:#?}");
    assert_eq!(seen.paths.len(), other.paths.len());
    assert_eq!(seen.unseen, other.unseen);
    (seen, said)
}

/// Files, directories, and links that lead to them, away, nowhere and round in a circle.
fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("tempdir");
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/b/c")).expect("mkdir");
    fs::create_dir(at("d")).expect("mkdir");
    for file in ["f", "a/f", "a/b/f", "a/b/c/f", "d/f"] {
        fs::write(at(file), "text").expect("writes");
    }
    for (target, link) in [
        ("f", "to-file"),
        ("a/b", "to-directory"),
        ("a/", "to-slash"),
        ("missing", "to-nothing"),
        ("round", "round"),
        ("../d", "a/up"),
        ("../../to-directory/c", "a/b/far"),
        ("to-file", "twice"),
        (".", "here"),
    ] {
        symlink(target, at(link)).expect("links");
    }
    let whole = at("a/b");
    symlink(whole, at("whole")).expect("links");
    dir
}

#[test]
fn it_is_there_and_calls_are_not_handed_over() {
    let dir = tree();
    let gate = format!("{:x}-", crate::trace::words::GATE);
    let text = format!("print(any(line.startswith('{gate}') for line in open('/proc/self/maps')))");
    let (_, _, said) = observe(python(&text, dir.path()), Shim::new);
    assert_eq!(said, "True\n", "the shim has no gate");
    let (_, _, said) = observe(python(&text, dir.path()), without);
    assert_eq!(said, "False\n");
}

#[test]
fn what_is_called_like_a_program_may_be_a_pipe() {
    let dir = tree();
    let text = "import os\nos.mkfifo('env', 0o755)\n\
                os.environ['PATH'] = os.getcwd() + ':/usr/bin:/bin'\n\
                pid = os.posix_spawnp('env', ['env', 'echo', 'ran'], os.environ)\n\
                print(os.waitpid(pid, 0)[1])";
    let (_, _, said) = observe(python(text, dir.path()), Shim::new);
    assert_eq!(said, "ran\n0\n");
}

#[test]
fn tells_the_same_as_handing_over() {
    let dir = tree();
    let text = r"
import os
names = ['f', 'missing', 'a', 'a/f', 'a/missing', 'f/below', 'to-file', 'to-directory/f',
         'to-nothing', 'round', 'a/up/f', 'twice', './f', 'a/../f', 'a//b/f', '']
here = os.getcwd()
for base in ['', here + '/', here + '//']:
    for name in names:
        for ask in [os.stat, os.lstat, os.readlink, lambda p: os.access(p, os.R_OK),
                    lambda p: os.close(os.open(p, os.O_RDONLY))]:
            try:
                print(name, ask(base + name) is None)
            except OSError as error:
                print(name, error.errno)
os.chdir('a/b')
os.stat('f')
fd = os.open('c', os.O_RDONLY)
os.stat('f', dir_fd=fd)
os.fchdir(fd)
os.stat('f')
if os.fork() == 0:
    os.stat('../f')
    os._exit(0)
os.wait()
print(os.path.exists('made'))
open('made', 'w').close()
print(os.path.exists('made'))
os.rename('made', 'moved')
print(os.path.exists('made'), os.path.exists('moved'))
os.unlink('moved')
";
    let (seen, said) = alike(|| python(text, dir.path()));
    assert!(said.ends_with("False\nTrue\nFalse True\n"), "{said}");
    let uses = |name: &str| seen.paths[dir.path().join(name).as_os_str().as_bytes()];
    assert!(uses("a/b/c/made").absent);
    assert!(uses("a/b/f").accesses.contains(Access::Status));
}

#[test]
fn tells_the_same_of_compilers_and_shells() {
    let dir = tree();
    fs::write(dir.path().join("d/one.h"), "#include <stdio.h>\n").expect("writes");
    let code = "#include \"one.h\"\n#include \"stdlib.h\"\nint main(void) { return 0; }\n";
    fs::write(dir.path().join("main.c"), code).expect("writes");
    let check = "for i in a d missing; do [ -e $i/one.h ] && echo $i; done; \
                 gcc -fsyntax-only -Ia -Ito-directory -Id main.c && sh -c 'cat < d/f'; \
                 env true; make -f d/f 2>/dev/null; command -v nothing-called-so";
    let (seen, said) = alike(|| program("sh", &["-c", check], dir.path()));
    assert_eq!(said, "d\ntext");
    for name in ["a/one.h", "to-directory/one.h"] {
        let missed = dir.path().join(name);
        let uses = seen.paths[missed.as_os_str().as_bytes()];
        assert!(uses.absent, "{name}");
    }
}

#[test]
fn real_paths_are_the_c_librarys() {
    let dir = tree();
    let text = r"
import ctypes, os, random
ours, theirs = ctypes.CDLL(None, use_errno=True), ctypes.CDLL('libc.so.6', use_errno=True)
# The one that comes first, and the C library's own behind its version.
handle = ctypes.c_void_p.in_dll(ours, 'environ') and theirs._handle
find = theirs.dlsym
find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, use_errno=True)
first, real = kind(find(None, b'realpath')), kind(find(handle, b'realpath'))
assert ctypes.cast(first, ctypes.c_void_p).value != ctypes.cast(real, ctypes.c_void_p).value
def ask(function, path):
    buffer = ctypes.create_string_buffer(4096)
    ctypes.set_errno(0)
    found = function(path, ctypes.addressof(buffer))
    error = 0 if found else ctypes.get_errno()
    alone = function(path, None)
    alone = ctypes.string_at(alone) if alone else None
    return bool(found), error, buffer.value if found or error in (2, 20, 40) else None, alone
parts = [b'a', b'b', b'c', b'd', b'f', b'to-file', b'to-directory', b'to-slash', b'to-nothing',
         b'round', b'up', b'far', b'twice', b'here', b'whole', b'.', b'..', b'', b'missing']
here = os.getcwd().encode()
chance = random.Random(4)
count = [0, 0]
for _ in range(30000):
    path = b'/'.join(chance.choices(parts, k=chance.randint(1, 6)))
    path = chance.choice([b'', here + b'/', b'//' + here + b'/', b'../']) + path
    path += chance.choice([b'', b'', b'', b'/', b'/.', b'/..'])
    one, other = ask(first, path), ask(real, path)
    assert one == other, (path, one, other)
    count[one[0]] += 1
for path in [b'/', b'//', b'.', b'/..', b'/proc/self/exe', b'/proc/self/cwd/f', b'x' * 255, b'x' * 256,
             b'x/' * 3000, b'a/' * 2047 + b'f', b'./' * 2040 + b'f', b'./' * 2047 + b'f']:
    assert ask(first, path) == ask(real, path), path
print(min(count) > 3000)
";
    let (status, _, said) = observe(python(text, dir.path()), Shim::new);
    assert!(status.success(), "{said}");
    assert_eq!(said, "True\n");
}

#[test]
fn links_on_the_way_to_a_real_path_are_seen() {
    let dir = tree();
    // `realpath(3)` of the C library reads them within itself.
    let text = "import ctypes; ctypes.CDLL(None).realpath(b'to-directory/far/f', None)";
    let (seen, _) = alike(|| python(text, dir.path()));
    for link in ["to-directory", "a/b/far"] {
        let uses = seen.paths[dir.path().join(link).as_os_str().as_bytes()];
        assert!(uses.accesses.contains(Access::Link), "{link}");
    }
}

#[test]
fn more_than_the_memory_holds_is_seen() {
    let dir = tree();
    let text = "import os\nfor i in range(30000): os.path.exists('missing-' + 'x' * 90 + str(i))";
    let (status, seen, _) = observe(python(text, dir.path()), Shim::new);
    assert!(status.success());
    let missing = seen
        .paths
        .keys()
        .filter(|path| path.windows(9).any(|w| w == b"missing-x"));
    assert_eq!(missing.count(), 30_000);
}

#[test]
fn programs_see_the_environment_they_were_given() {
    let dir = tree();
    let show = "env | grep -a LD_PRELOAD; sh -c env | grep -a LD_PRELOAD; \
                env -i sh -c 'export | grep PRELOAD'; cat shown";
    fs::write(dir.path().join("shown"), "shown").expect("writes");
    let text = format!(
        "import os, subprocess\nprint('PRELOAD' in open('/proc/self/environ').read())\n\
         print(any('PRELOAD' in name for name in os.environ))\n\
         print(subprocess.run(['sh', '-c', {show:?}], capture_output=True))"
    );
    let make = |own: Option<&str>| {
        let mut command = python(&text, dir.path());
        command.env_remove(PRELOAD);
        if let Some(own) = own {
            command.env(PRELOAD, own);
        }
        command
    };
    let (_, said) = alike(|| make(None));
    assert!(said.starts_with("False\nFalse\n"), "{said}");
    assert!(said.contains("stdout=b'shown', stderr=b''"), "{said}");
    let own = "libm.so.6";
    let (_, said) = alike(|| make(Some(own)));
    assert!(said.contains(&format!("LD_PRELOAD={own}")), "{said}");
    let set = format!("LD_PRELOAD={own} sh -c 'env | grep LD_PRELOAD'");
    let (_, said) = alike(|| program("sh", &["-c", &set], dir.path()));
    assert_eq!(said, format!("LD_PRELOAD={own}\n"));
}

/// A program made of C.
fn made(dir: &Path, code: &str) {
    compiled(dir, code, "made", &[]);
}

/// What gcc makes of C with these flags.
fn compiled(dir: &Path, code: &str, name: &str, flags: &[&str]) {
    fs::write(dir.join("made.c"), code).expect("writes");
    let mut gcc = program("gcc", &["-pthread", "-o", name, "made.c"], dir);
    assert!(gcc.args(flags).status().expect("gcc runs").success());
}

#[test]
fn what_others_preload_is_asked() {
    let dir = tree();
    // As fakeroot(1) does: it says that all files are another user's.
    let code = "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <sys/stat.h>\n\
                int stat(const char *path, struct stat *s) {\n\
                int (*next)(const char *, struct stat *) = dlsym(RTLD_NEXT, \"stat\");\n\
                int result = next(path, s); s->st_uid = 4242; return result; }\n";
    fs::write(dir.path().join("fake.c"), code).expect("writes");
    let make = program(
        "gcc",
        &["-shared", "-fPIC", "-o", "fake.so", "fake.c"],
        dir.path(),
    )
    .status();
    assert!(make.expect("gcc runs").success());
    made(
        dir.path(),
        "#include <stdio.h>\n#include <sys/stat.h>\n\
         int main(void) { struct stat s; stat(\"f\", &s); printf(\"%d\", (int)s.st_uid); }\n",
    );
    let (_, said) = alike(|| {
        let mut command = program("./made", &[], dir.path());
        command.env(PRELOAD, dir.path().join("fake.so"));
        command
    });
    assert_eq!(said, "4242");
}

#[test]
fn odd_calls_are_told_and_answered_alike() {
    let dir = tree();
    let text = r"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def say(what):
    print(what, ctypes.get_errno())
buffer = ctypes.create_string_buffer(b'to-file', 100)
say(libc.readlink(buffer, buffer, 100))
print(buffer.value)
buffer = ctypes.create_string_buffer(100)
say(libc.readlink(b'missing', buffer, 0))
say(libc.readlink(b'f', buffer, 0))
say(libc.readlink(b'missing', buffer, ctypes.c_size_t(1 << 31)))
say(libc.access(8, 0))
say(libc.access(None, 0))
for flags in [0x4000000, 0x100]:
    say(libc.fstatat(-100, b'missing', buffer, flags))
say(libc.open(b'f', os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC) > 0)
say(libc.open(b'to-file', os.O_RDONLY | os.O_NOFOLLOW))
os.mkdir('gone')
os.chdir('gone')
os.rmdir('../gone')
say(libc.access(b'below', 0))
os.chdir('/')
for path in [b'proc/self/fd/2/below', b'proc/self/cwd/missing', b'proc/cpuinfo', b'dev/null', b'missing']:
    say(libc.access(path, 0))
";
    alike(|| python(text, dir.path()));
    let lists = dir.path().join("lists");
    fs::write(&lists, "").expect("writes");
    let (_, said) = alike(|| program("bash", &["-c", "ldd /bin/sh | sed 's/ (.*//'"], dir.path()));
    assert!(!said.contains("/proc/"), "{said}");
}

#[test]
fn programs_with_functions_of_these_names_keep_them() {
    let dir = tree();
    let code = r#"
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
char *realpath(const char *path, char *resolved) {
    (void)resolved;
    return canonicalize_file_name(path);
}
int execve(const char *path, char *const *arguments, char *const *environment) {
    (void)environment;
    return execv(path, arguments);
}
int main(void) {
    char *arguments[] = {"sh", "-c", "echo run", NULL};
    puts(realpath("to-file", NULL) ? "resolved" : "not");
    fflush(stdout);
    return execve("/bin/sh", arguments, environ);
}
"#;
    made(dir.path(), code);
    let (_, said) = alike(|| program("./made", &[], dir.path()));
    assert_eq!(said, "resolved\nrun\n");
}

#[test]
fn static_programs_do_not_get_it() {
    let dir = tree();
    let code = "#include <stdio.h>\n#include <stdlib.h>\n\
                int main(void) { puts(getenv(\"LD_PRELOAD\") ? \"set\" : \"not\"); }\n";
    fs::write(dir.path().join("made.c"), code).expect("writes");
    let made = program("gcc", &["-static", "-o", "cc", "made.c"], dir.path()).status();
    assert!(made.expect("gcc runs").success());
    let (_, said) = alike(|| program("./cc", &[], dir.path()));
    assert_eq!(said, "not\n");
    let (_, said) = alike(|| program("sh", &["-c", "./cc"], dir.path()));
    assert_eq!(said, "not\n");
}

#[test]
fn threads_with_small_stacks_may_ask() {
    let dir = tree();
    let code = r#"
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
static char memory[16384] __attribute__((aligned(4096)));
static void *ask(void *nothing) {
    struct stat status;
    char *path = realpath("to-directory/far/f", NULL);
    return stat("a/f", &status) == 0 ? path : nothing;
}
int main(void) {
    pthread_attr_t attributes;
    pthread_t thread;
    void *path;
    pthread_attr_init(&attributes);
    pthread_attr_setstack(&attributes, memory, sizeof memory);
    pthread_create(&thread, &attributes, ask, NULL);
    pthread_join(thread, &path);
    puts(path ? "resolved" : "not");
}
"#;
    made(dir.path(), code);
    let (_, said) = alike(|| program("./made", &[], dir.path()));
    assert_eq!(said, "resolved\n");
}

#[test]
fn who_cannot_load_it_starts_without() {
    let dir = tree();
    // Another user, who may not open what is ours; a process that is left behind.
    let text = r"
import os, subprocess, time
if os.getuid() == 0:
    os.chmod('.', 0o755)
    run = subprocess.run(['/bin/sh', '-c', 'id -u'], user=65534, capture_output=True)
    assert run.stdout == b'65534\n' and run.stderr == b'', run
";
    let (status, _, said) = observe(python(text, dir.path()), Shim::new);
    assert!(status.success(), "{said}");
    let late = "exec 2>said; (sleep 1; sh -c 'sh -c true'; echo done > late) >/dev/null &";
    let (status, _, _) = observe(program("sh", &["-c", late], dir.path()), Shim::new);
    assert!(status.success());
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !dir.path().join("late").exists() {
        assert!(std::time::Instant::now() < deadline, "it does not end");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(
        fs::read_to_string(dir.path().join("said")).expect("reads"),
        ""
    );
}

/// What a program says that begins a part, does this, and ends it.
fn part(before: &str, inside: &str, dir: &Path) -> Observed {
    let text = format!(
        "import os, subprocess, time\n{before}\nfd = os.memfd_create('part')\n\
         os.path.exists('/proc/self/kachefs-part/begin')\n{inside}\n\
         os.path.exists(f'/proc/self/kachefs-part/end/{{fd}}')\nos.lseek(fd, 0, 0)\n\
         print(os.read(fd, 1 << 20).hex(), flush=True)\nos._exit(0)\n"
    );
    let (status, _, said) = observe(python(&text, dir), Shim::new);
    assert!(status.success());
    let said = said.trim().as_bytes().chunks(2);
    let byte = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).expect("digits");
        u8::from_str_radix(digits, 16).expect("a byte")
    };
    let said: Vec<u8> = said.map(byte).collect();
    postcard::from_bytes(&said).expect("an observation")
}

#[test]
fn a_part_learns_of_those_it_forked_and_left() {
    let dir = tree();
    let inside = "if os.fork() == 0:\n    os.path.exists('a/f')\n    time.sleep(1)\n    \
                  os.path.exists('b/f')\n    os._exit(0)\ntime.sleep(0.3)";
    let observed = part("", inside, dir.path());
    let read = observed.paths.keys().any(|path| path.ends_with(b"/a/f"));
    assert!(read, "{observed:?}");
    assert_eq!(observed.unseen, BTreeSet::from([Unseen::ProcessLeft]));
    let inside = inside.replace("time.sleep(0.3)", "os.wait()");
    assert_eq!(part("", &inside, dir.path()).unseen, BTreeSet::new());
}

#[test]
fn who_dies_while_it_writes_leaves_no_part_too_small() {
    let dir = tree();
    let code = r#"
#include <pthread.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>
static void *ask(void *number) {
    char name[64];
    struct stat status;
    for (int count = 0;; count++) {
        snprintf(name, sizeof name, "missing-%p-%d", number, count);
        stat(name, &status);
    }
}
int main(void) {
    pthread_t thread;
    for (long number = 0; number < 4; number++) {
        pthread_create(&thread, NULL, ask, (void *)number);
    }
    usleep(5000);
    _exit(0);
}
"#;
    made(dir.path(), code);
    fs::rename(dir.path().join("made"), dir.path().join("cc")).expect("renames");
    let before = "for _ in range(30): subprocess.run(['./cc'])";
    let inside = "for number in range(10): os.path.exists(f'in-part-{number}')\n\
                  subprocess.run(['sh', '-c', '[ -e in-part-of-child ]'])";
    let observed = part(before, inside, dir.path());
    let seen = observed
        .paths
        .keys()
        .filter(|path| path.windows(7).any(|part| part == b"in-part"));
    let seen = seen.count();
    let whole = seen == 11 || observed.unseen.contains(&Unseen::Memory);
    assert!(whole, "{seen} of 11, {:?}", observed.unseen);
}

#[test]
fn programs_it_might_disturb_do_not_get_it() {
    let dir = tree();
    let code =
        "#include <stdio.h>\nint main(void) { puts(fopen(\"f\", \"r\") ? \"read\" : \"\"); }\n";
    fs::write(dir.path().join("main.c"), code).expect("writes");
    // Its library refuses to start when another comes first.
    for flags in ["-fsanitize=address", "-static"] {
        let check = format!("gcc {flags} -o main main.c && ASAN_OPTIONS=detect_leaks=0 ./main");
        let (status, seen, said) = observe(program("sh", &["-c", &check], dir.path()), Shim::new);
        assert!(status.success(), "{flags}");
        assert_eq!(said, "read\n", "{flags}");
        let read = seen.paths[dir.path().join("f").as_os_str().as_bytes()];
        assert!(read.accesses.contains(Access::Open), "{flags}");
    }
}

#[test]
fn what_a_killed_program_asked_is_seen() {
    let dir = tree();
    let text = r"
import os, threading
def ask(number):
    count = 0
    while True:
        os.path.exists(f'missing-{number}-{count}')
        count += 1
for number in range(3):
    threading.Thread(target=ask, args=(number,), daemon=True).start()
import time
time.sleep(0.3)
os.kill(os.getpid(), 9)
";
    let (status, seen, _) = observe(python(text, dir.path()), Shim::new);
    assert!(!status.success());
    assert!(seen.paths.len() > 1000, "{}", seen.paths.len());
}
