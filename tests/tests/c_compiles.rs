//! Objects of gcc and clang: found when all that made them is what it was, compiled otherwise.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use harness::{Cmd, Counters, Must, Outcome, Project, Sandbox};

const COMPILERS: [&str; 2] = ["gcc", "clang"];

/// A directory of sources beside a mounted target.
struct Case {
    sandbox: Sandbox,
    project: Project,
}

impl Case {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let project = Project::at(sandbox.make_dir("project"));
        project.write("a.c", "#include \"a.h\"\nint f(void) { return A; }\n");
        project.write("one/other.h", "");
        project.write("two/a.h", "#define A 7\n");
        sandbox.mount(project.target());
        fs::create_dir_all(project.target().join("out")).must("mkdir");
        Self { sandbox, project }
    }

    fn object(&self) -> PathBuf {
        self.project.path("target/out/a.o")
    }

    fn cc(&self, words: &str) -> Cmd {
        let wrapper = self.sandbox.bin_dir().join("kachefs-cc");
        self.sandbox
            .command(wrapper)
            .args(words.split_whitespace())
            .in_dir(&self.project)
    }

    /// Compiles `a.c` with `kachefs-cc`, after taking away what an earlier compile left.
    #[track_caller]
    fn compile_by(&self, cmd: Cmd) -> (Counters, Outcome) {
        let _ = fs::remove_file(self.object());
        let (seen, outcome) = self.sandbox.during(|| cmd.ok());
        assert!(self.object().is_file(), "no object\n{outcome}");
        (seen, outcome)
    }

    #[track_caller]
    fn compile(&self, compiler: &str, more: &str) -> Counters {
        let line = format!("{compiler} -O1 -Ione -Itwo {more} -c a.c -o target/out/a.o");
        self.compile_by(self.cc(&line)).0
    }

    #[track_caller]
    fn hits(&self, compiler: &str, more: &str) {
        let seen = self.compile(compiler, more);
        assert_eq!(
            (seen.cc_hits, seen.cc_misses),
            (1, 0),
            "{compiler} {more}: {seen:?}"
        );
    }

    #[track_caller]
    fn misses(&self, compiler: &str, more: &str) {
        let seen = self.compile(compiler, more);
        assert_eq!(
            (seen.cc_hits, seen.cc_misses),
            (0, 1),
            "{compiler} {more}: {seen:?}"
        );
        assert_eq!(seen.reason_names(), [""; 0], "{compiler} {more}: {seen:?}");
    }

    /// What the compiler makes of it without anybody in between.
    fn plain(&self, compiler: &str, more: &str) -> Vec<u8> {
        let plain = self.sandbox.path("plain.o");
        let line = format!("-O1 -Ione -Itwo {more} -c a.c -o {}", plain.display());
        let _ = self
            .sandbox
            .command(compiler)
            .args(line.split_whitespace())
            .in_dir(&self.project)
            .ok();
        fs::read(plain).must("plain.o")
    }
}

#[test]
fn a_hit_is_what_the_compiler_would_have_made() {
    let case = Case::new();
    for compiler in COMPILERS {
        for more in ["", "-g", "-fPIC -g -O2 -Wall"] {
            case.misses(compiler, more);
            case.hits(compiler, more);
            let object = fs::read(case.object()).must("a.o");
            assert!(object == case.plain(compiler, more), "{compiler} {more}");
            let mode = fs::metadata(case.object()).must("a.o").permissions().mode();
            assert_eq!(mode & 0o777, 0o644, "{compiler} {more}");
        }
    }
}

#[test]
fn a_changed_header() {
    let case = Case::new();
    for compiler in COMPILERS {
        case.project.write("two/a.h", "#define A 7\n");
        case.misses(compiler, "");
        case.project.write("two/a.h", "#define A 8\n");
        case.misses(compiler, "");
        assert!(fs::read(case.object()).must("a.o") == case.plain(compiler, ""));
        case.project.write("two/a.h", "#define A 7\n");
        case.hits(compiler, "");
        assert!(fs::read(case.object()).must("a.o") == case.plain(compiler, ""));
    }
}

#[test]
fn a_changed_source() {
    let case = Case::new();
    for compiler in COMPILERS {
        case.misses(compiler, "");
        let before = case.project.read("a.c");
        case.project.write("a.c", &before.replace("A;", "A + 1;"));
        case.misses(compiler, "");
        case.project.write("a.c", &before);
        case.hits(compiler, "");
    }
}

#[test]
fn a_header_that_comes_before_another() {
    let case = Case::new();
    for compiler in COMPILERS {
        for first in ["a.h", "one/a.h"] {
            case.compile(compiler, first_flag(first));
            case.hits(compiler, first_flag(first));
            case.project.write(first, "#define A 9\n");
            case.misses(compiler, first_flag(first));
            assert!(fs::read(case.object()).must("a.o") == case.plain(compiler, ""));
            case.project.remove(first);
            case.hits(compiler, first_flag(first));
        }
    }
}

/// Keeps the cases apart.
fn first_flag(first: &str) -> &'static str {
    if first.contains('/') {
        "-DONE"
    } else {
        "-DHERE"
    }
}

#[test]
fn a_header_that_is_only_asked_for() {
    let case = Case::new();
    let source = "#if __has_include(\"maybe.h\")\nint f(void) { return 1; }\n\
        #else\nint f(void) { return 2; }\n#endif\n";
    case.project.write("a.c", source);
    for compiler in COMPILERS {
        case.misses(compiler, "");
        case.project.write("two/maybe.h", "");
        case.misses(compiler, "");
        case.project.remove("two/maybe.h");
        case.hits(compiler, "");
    }
}

#[test]
fn a_directory_of_headers_that_comes() {
    let case = Case::new();
    for compiler in COMPILERS {
        let line = format!("{compiler} -Inew -Itwo -c a.c -o target/out/a.o");
        let compile = || case.compile_by(case.cc(&line)).0;
        assert_eq!(compile().cc_misses, 1);
        assert_eq!(compile().cc_hits, 1);
        case.project.write("new/a.h", "#define A 1\n");
        assert_eq!(compile().cc_misses, 1, "{compiler}");
        fs::remove_dir_all(case.project.path("new")).must("remove");
        assert_eq!(compile().cc_hits, 1, "{compiler}");
    }
}

#[test]
fn a_directory_of_headers_behind_a_link() {
    let case = Case::new();
    case.project.write("three/a.h", "#define A 3\n");
    let link = case.project.path("current");
    for compiler in COMPILERS {
        let line = format!("{compiler} -Icurrent -c a.c -o target/out/a.o");
        let compile = |leads_to: &str| {
            let _ = fs::remove_file(&link);
            symlink(leads_to, &link).must("link");
            case.compile_by(case.cc(&line)).0
        };
        assert_eq!(compile("two").cc_misses, 1, "{compiler}");
        assert_eq!(compile("three").cc_misses, 1, "{compiler}");
        assert_eq!(compile("two").cc_hits, 1, "{compiler}");
    }
}

#[test]
fn bytes_the_assembler_includes() {
    let case = Case::new();
    let source = "__asm__(\".section .rodata\\n.incbin \\\"data\\\"\\n\");\n";
    case.project.write("a.c", source);
    for compiler in COMPILERS {
        case.project.write("data", "one");
        case.misses(compiler, "");
        case.project.write("data", "two");
        case.misses(compiler, "");
        case.project.write("data", "one");
        case.hits(compiler, "");
        assert!(fs::read(case.object()).must("a.o") == case.plain(compiler, ""));
    }
}

#[test]
fn arguments() {
    let case = Case::new();
    for compiler in COMPILERS {
        for more in [
            "", "-DX", "-DX=2", "-UX", "-O2", "-fPIC", "-w", "-g", "-Itwo/.",
        ] {
            case.misses(compiler, more);
            case.hits(compiler, more);
        }
    }
}

#[test]
fn environment() {
    let case = Case::new();
    case.project
        .write("a.c", "#include <found.h>\nint f(void) { return F; }\n");
    for (place, value) in [("east", 1), ("west", 2)] {
        case.project
            .write(&format!("{place}/found.h"), &format!("#define F {value}\n"));
    }
    for compiler in COMPILERS {
        let compile = |place: &str| {
            let line = format!("{compiler} -c a.c -o target/out/a.o");
            case.compile_by(case.cc(&line).env("CPATH", case.project.path(place)))
                .0
        };
        assert_eq!(compile("east").cc_misses, 1, "{compiler}");
        assert_eq!(compile("west").cc_misses, 1, "{compiler}");
        assert_eq!(compile("east").cc_hits, 1, "{compiler}");
    }
}

/// A copy of gcc's driver and the programs it runs, in a directory of its own.
fn own_gcc(case: &Case) -> PathBuf {
    let tools = case.sandbox.make_dir("tools");
    let real = |program: &str| fs::canonicalize(program).must(program);
    fs::copy(real("/usr/bin/gcc"), tools.join("gcc")).must("gcc");
    let named = case.sandbox.command("gcc").arg("-print-prog-name=cc1").ok();
    fs::copy(named.stdout.trim_end(), tools.join("cc1")).must("cc1");
    fs::copy(real("/usr/bin/as"), tools.join("as")).must("as");
    tools
}

#[test]
fn a_compiler_that_is_replaced() {
    let case = Case::new();
    let tools = own_gcc(&case);
    let compile = || {
        let line = "-Itwo -c a.c -o target/out/a.o";
        let cmd = case.cc(&format!("{} {line}", tools.join("gcc").display()));
        case.compile_by(cmd.env("COMPILER_PATH", &tools)).0
    };
    assert_eq!(compile().cc_misses, 1);
    assert_eq!(compile().cc_hits, 1);
    // Bytes behind the end of a program change nothing but its content.
    for program in ["gcc", "cc1", "as"] {
        let path = tools.join(program);
        let mut bytes = fs::read(&path).must(program);
        bytes.push(0);
        fs::write(&path, bytes).must(program);
        let seen = compile();
        assert_eq!(
            (seen.cc_hits, seen.cc_misses),
            (0, 1),
            "{program}: {seen:?}"
        );
        assert_eq!(compile().cc_hits, 1, "{program}");
    }
}

#[test]
fn a_program_that_comes_first_in_the_search_path() {
    let case = Case::new();
    case.misses("gcc", "");
    case.hits("gcc", "");
    let first = case.sandbox.make_dir("first");
    // gcc leaves it to the search path which assembler it runs.
    let marker = case.sandbox.path("assembled");
    let script = format!(
        "#!/bin/sh\n: > {}\nexec /usr/bin/as \"$@\"\n",
        marker.display()
    );
    fs::write(first.join("as"), script).must("write");
    fs::set_permissions(first.join("as"), fs::Permissions::from_mode(0o755)).must("chmod");
    let path = std::env::join_paths([first, PathBuf::from("/usr/bin"), PathBuf::from("/bin")]);
    let line = "gcc -O1 -Ione -Itwo -c a.c -o target/out/a.o";
    let cmd = case.cc(line).env("PATH", path.must("a path"));
    let (seen, outcome) = case.compile_by(cmd);
    assert_eq!(seen.cc_hits, 0, "{seen:?}\n{outcome}");
    assert!(marker.exists(), "the first assembler runs\n{outcome}");
    assert_eq!(seen.reason_names(), ["cc-writes-elsewhere"], "{seen:?}");
}

#[test]
fn warnings_are_said_again() {
    let case = Case::new();
    case.project
        .write("a.c", "int f(void) { int unused; return 0; }\n");
    for compiler in COMPILERS {
        let line = format!("{compiler} -Wall -c a.c -o target/out/a.o");
        let (cold, first) = case.compile_by(case.cc(&line));
        let (warm, second) = case.compile_by(case.cc(&line));
        assert_eq!((cold.cc_misses, warm.cc_hits), (1, 1), "{compiler}");
        assert!(first.stderr.contains("unused"), "{first}");
        assert_eq!((first.stdout, first.stderr), (second.stdout, second.stderr));
    }
}

#[test]
fn failures_fail_each_time() {
    let case = Case::new();
    case.project.write("a.c", "int f(void) { return }\n");
    for compiler in COMPILERS {
        let line = format!("{compiler} -c a.c -o target/out/a.o");
        for _ in 0..2 {
            let (seen, failed) = case.sandbox.during(|| case.cc(&line).fails());
            assert!(failed.stderr.contains("expected"), "{failed}");
            assert_eq!(
                (seen.failed, seen.cc_hits, seen.cc_misses),
                (1, 0, 0),
                "{seen:?}"
            );
        }
    }
}

#[test]
fn the_list_of_headers_is_the_same_on_a_hit() {
    let case = Case::new();
    let depfile = case.project.path("target/out/a.d");
    for compiler in COMPILERS {
        let flags = "-MD -MP -MF target/out/a.d";
        case.misses(compiler, flags);
        let first = fs::read_to_string(&depfile).must("a.d");
        assert!(
            first.contains("target/out/a.o") && first.contains("two/a.h"),
            "{first}"
        );
        fs::remove_file(&depfile).must("a.d");
        case.hits(compiler, flags);
        assert_eq!(fs::read_to_string(&depfile).must("a.d"), first);
        fs::remove_file(&depfile).must("a.d");
        case.hits(compiler, flags);
    }
}

#[test]
fn dates_are_not_cached() {
    let case = Case::new();
    for compiler in COMPILERS {
        for name in ["__DATE__", "__TIME__", "__TIMESTAMP__"] {
            case.project
                .write("two/a.h", &format!("#define A sizeof({name})\n"));
            for _ in 0..2 {
                let seen = case.compile(compiler, "");
                assert_eq!(seen.cc_hits, 0, "{compiler} {name}: {seen:?}");
                assert_eq!(seen.reason_names(), ["cc-date"], "{compiler} {name}");
            }
            case.project.write("two/a.h", "#define A sizeof(WHEN)\n");
            for _ in 0..2 {
                let seen = case.compile(compiler, &format!("-DWHEN={name}"));
                assert_eq!(seen.cc_hits, 0, "{compiler} -D {name}: {seen:?}");
                assert_eq!(seen.reason_names(), ["cc-date"], "{compiler} -D {name}");
            }
        }
    }
}

#[test]
fn what_is_not_cached_runs_and_says_why() {
    let case = Case::new();
    let out = case.project.target().join("out");
    for (line, made, reason) in [
        (
            "gcc -Itwo -c a.c -o elsewhere.o",
            "elsewhere.o",
            "cc-output-outside-view",
        ),
        (
            "gcc -Itwo -E a.c -o target/out/a.i",
            "target/out/a.i",
            "cc-preprocess",
        ),
        (
            "gcc -Itwo -S a.c -o target/out/a.s",
            "target/out/a.s",
            "cc-assembly",
        ),
        (
            "gcc -Itwo -shared a.c -o target/out/a.so",
            "target/out/a.so",
            "cc-link",
        ),
        (
            "gcc -Itwo -x c -c a.c -o target/out/a.o",
            "target/out/a.o",
            "cc-language-flag",
        ),
        (
            "gcc -Itwo -flto -c a.c -o target/out/l.o",
            "target/out/l.o",
            "cc-unknown-flag",
        ),
        (
            "gcc -Itwo --coverage -c a.c -o target/out/c.o",
            "target/out/c.gcno",
            "cc-profile",
        ),
        (
            "clang -Itwo -save-temps=obj -c a.c -o target/out/t.o",
            "target/out/t.o",
            "cc-save-temps",
        ),
        (
            "./cc-script -Itwo -c a.c -o target/out/s.o",
            "target/out/s.o",
            "cc-unknown-compiler",
        ),
    ] {
        let script = case.project.path("cc-script");
        fs::write(&script, "#!/bin/sh\nexec gcc \"$@\"\n").must("write");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).must("chmod");
        for _ in 0..2 {
            let _ = fs::remove_file(case.project.path(made));
            let run = || case.cc(line).env("OUT_DIR", &out).ok();
            let (seen, _) = case.sandbox.during(run);
            assert_eq!((seen.cc_hits, seen.cc_misses), (0, 0), "{line}: {seen:?}");
            assert_eq!(seen.reason_names(), [reason], "{line}");
            assert!(case.project.path(made).exists(), "{line}");
        }
    }
}

#[test]
fn without_a_view_it_is_the_compiler() {
    let sandbox = Sandbox::new();
    let dir = sandbox.make_dir("plain");
    fs::write(dir.join("a.c"), "int a;\n").must("write");
    let wrapper = sandbox.bin_dir().join("kachefs-cc");
    let run = |words: &str| {
        let cmd = sandbox.command(&wrapper).args(words.split_whitespace());
        cmd.in_dir(&dir).run()
    };
    assert!(run("gcc -c a.c -o a.o").status.success());
    assert!(dir.join("a.o").is_file());
    assert_eq!(run("gcc -c missing.c -o b.o").status.code(), Some(1));
    assert_eq!(run("no-such-compiler -c a.c").status.code(), Some(127));
}

#[test]
fn another_checkout_has_its_own_paths() {
    let sandbox = Sandbox::new();
    let source = "const char *f(void) { return __FILE__; }\n";
    let wrapper = sandbox.bin_dir().join("kachefs-cc");
    for (name, plain_hits) in [("first", 0), ("second", 1)] {
        let project = Project::at(sandbox.make_dir(name));
        project.write("Cargo.toml", "[workspace]\n");
        project.write("a.c", source);
        sandbox.mount(project.target());
        let compile = |source: &Path, more: &str| {
            let object = project.path("target/a.o");
            let cmd = sandbox.command(&wrapper).args(["gcc", "-c"]).arg(source);
            let cmd = cmd.args(more.split_whitespace()).arg("-o").arg(&object);
            let (seen, _) = sandbox.during(|| cmd.in_dir(&project).ok());
            (seen.cc_hits, fs::read(object).must("a.o"))
        };
        let holds = |bytes: &[u8], path: &Path| {
            let path = path.as_os_str().as_encoded_bytes();
            bytes.windows(path.len()).any(|part| part == path)
        };
        let (hits, object) = compile(Path::new("a.c"), "");
        assert_eq!(hits, plain_hits, "{name}");
        assert!(!holds(&object, project.root()), "{name}");
        for (source, more) in [(project.path("a.c"), ""), (PathBuf::from("a.c"), "-g")] {
            let (hits, object) = compile(&source, more);
            assert_eq!(hits, 0, "{name} {more}");
            assert!(holds(&object, project.root()), "{name} {more}");
        }
    }
}

#[test]
fn a_precompiled_header_that_comes() {
    let case = Case::new();
    case.misses("gcc", "");
    case.hits("gcc", "");
    // gcc prefers it, whatever the header itself says by now.
    let two = case.project.path("two");
    let other = case.project.path("other.h");
    fs::write(&other, "#define A 8\n").must("write");
    let make = case.sandbox.command("gcc").args(["-O1", "-x", "c-header"]);
    let _ = make.arg(&other).arg("-o").arg(two.join("a.h.gch")).ok();
    // It holds the names of dates, whether they are used or not.
    let seen = case.compile("gcc", "");
    assert_eq!(seen.cc_hits, 0, "{seen:?}");
    assert_eq!(seen.reason_names(), ["cc-date"], "{seen:?}");
    assert!(fs::read(case.object()).must("a.o") == case.plain("gcc", ""));
    fs::remove_file(two.join("a.h.gch")).must("remove");
    case.hits("gcc", "");
}

#[test]
fn the_same_object_is_recorded_once() {
    let case = Case::new();
    let blobs = || case.sandbox.counters().blobs;
    for value in [7, 8, 9, 7, 8, 9] {
        case.project
            .write("two/a.h", &format!("#define A {value}\n"));
        case.compile("gcc", "");
    }
    let three = blobs();
    for value in [7, 8, 9] {
        case.project
            .write("two/a.h", &format!("#define A {value}\n"));
        case.hits("gcc", "");
    }
    assert_eq!(blobs(), three);
}

#[test]
fn what_cannot_be_watched_is_not_cached() {
    let case = Case::new();
    let line = "gcc -Itwo -c a.c -o target/out/a.o";
    for _ in 0..2 {
        let cmd = case.cc(line).env("KACHEFS_UNWATCHED", "1");
        let (seen, _) = case.compile_by(cmd);
        assert_eq!((seen.cc_hits, seen.cc_misses), (0, 1), "{seen:?}");
        assert_eq!(seen.reason_names(), ["cc-unwatched"], "{seen:?}");
    }
}

#[test]
fn a_header_that_changes_while_the_compiler_runs() {
    let case = Case::new();
    let header = case.project.path("two/a.h");
    // A compiler that takes long enough to change what it has read.
    let source = "#include \"a.h\"\n#define X(n) X2(n##0) X2(n##1) X2(n##2) X2(n##3)\n\
        #define X2(n) X3(n##0) X3(n##1) X3(n##2) X3(n##3)\n\
        #define X3(n) X4(n##0) X4(n##1) X4(n##2) X4(n##3)\n\
        #define X4(n) int f##n(int a) { for (int i = 0; i < a; i++) a += i * A; return a; }\n\
        X(0) X(1) X(2) X(3)\n";
    case.project.write("a.c", source);
    let line = "gcc -O2 -Itwo -c a.c -o target/out/a.o";
    let compiling = case.cc(line).spawn();
    let started = std::time::Instant::now();
    while !compiler_runs(case.project.root()) && started.elapsed().as_secs() < 20 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    fs::write(&header, "#define A 8\n").must("write");
    let _ = compiling.finish().success();
    let (seen, _) = case.compile_by(case.cc(line));
    assert_eq!(seen.cc_hits, 0, "{seen:?}");
}

/// Whether a `cc1` runs in this directory.
fn compiler_runs(directory: &Path) -> bool {
    let processes = fs::read_dir("/proc").must("/proc").flatten();
    let mut here = processes.filter(|process| {
        let named = fs::read_to_string(process.path().join("comm"));
        let cwd = fs::read_link(process.path().join("cwd"));
        named.is_ok_and(|name| name.trim_end() == "cc1") && cwd.is_ok_and(|cwd| cwd == directory)
    });
    here.next().is_some()
}

#[test]
fn other_languages() {
    let case = Case::new();
    case.project.write("two/b.h", "#define B 1\n");
    let cxx =
        "#include <string>\n#include \"b.h\"\nstd::string f() { return std::string(B, 'x'); }\n";
    case.project.write("a.cpp", cxx);
    case.project
        .write("a.S", "#include \"b.h\"\n.globl f\nf: .long B\n");
    for (compiler, source) in [
        ("g++", "a.cpp"),
        ("clang++", "a.cpp"),
        ("c++", "a.cpp"),
        ("gcc", "a.S"),
        ("clang", "a.S"),
    ] {
        let line = format!("{compiler} -g -Itwo -c {source} -o target/out/a.o");
        let compile = || {
            let seen = case.compile_by(case.cc(&line)).0;
            let object = fs::read(case.object()).must("a.o");
            ((seen.cc_hits, seen.cc_misses), object)
        };
        let (cold, made) = compile();
        assert_eq!(cold, (0, 1), "{line}");
        let (warm, bound) = compile();
        assert_eq!(warm, (1, 0), "{line}");
        assert!(made == bound, "{line}");
        case.project.write("two/b.h", "#define B 2\n");
        let (changed, other) = compile();
        assert_eq!(changed, (0, 1), "{line}");
        assert!(made != other, "{line}");
        case.project.write("two/b.h", "#define B 1\n");
    }
}

#[test]
fn a_directory_that_becomes_another_name_of_one() {
    let case = Case::new();
    let twice = "#define A 1\n#define A 2\n";
    case.project.write("a.c", "#include <a.h>\n");
    let sys = case.project.path("sys");
    for (compiler, one) in [
        ("gcc", "two"),
        ("clang", "two"),
        ("gcc", "."),
        ("clang", "."),
    ] {
        let header = case.project.path(one).join("a.h");
        fs::write(&header, twice).must("write");
        let _ = fs::remove_file(&sys);
        fs::create_dir_all(&sys).must("mkdir");
        let flags = format!("-I{one} -isystem sys -c a.c -o");
        let line = format!("{compiler} {flags} target/out/a.o");
        let (_, apart) = case.compile_by(case.cc(&line));
        assert!(apart.stderr.contains("redefined"), "{apart}");
        // The same files by the same names, but compilers look into each directory once, and say less
        // of what is the system's.
        fs::remove_dir(&sys).must("remove");
        symlink(one, &sys).must("link");
        let plain = case.sandbox.command(compiler).args(flags.split(' '));
        let plain = plain
            .arg(case.sandbox.path("plain.o"))
            .in_dir(&case.project);
        let (_, together) = case.compile_by(case.cc(&line));
        assert_eq!(together.stderr, plain.ok().stderr, "{compiler} {one}");
        fs::remove_file(&header).must("remove");
    }
}
