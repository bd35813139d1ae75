//! What becomes of the search for libraries (`shim/search.rs`).

use std::ffi::OsStr;

use super::*;

/// Where the loader looks on every machine of these years (ld.so(8), "Hardware capabilities").
const FOR_ALL: &str = "glibc-hwcaps/x86-64-v2";

/// A shell that looks for libraries in three directories: with what rustc makes, with one of another's,
/// and with none.
fn searching(script: &str, dir: &Path) -> Command {
    let places = ["deps", "kept", "empty"].map(|name| dir.join(name));
    for place in &places {
        fs::create_dir_all(place).expect("mkdir");
    }
    fs::write(dir.join("deps/libmacros-0123456789abcdef.so"), "").expect("writes");
    fs::write(dir.join("kept/libplain.so"), "").expect("writes");
    let mut command = program("sh", &["-c", script], dir);
    let list = std::env::join_paths(places).expect("no colons");
    command.env(search::VARIABLE, list);
    command
}

#[test]
fn compilers_are_spared_the_search_for_their_libraries() {
    let dir = tree();
    fs::write(dir.path().join("main.c"), "int main(void) { return 0; }\n").expect("writes");
    let make = || searching("cc -c main.c", dir.path());
    let [seen, other] = [Shim::new, without].map(|shim| {
        let (status, observed, _) = observe(make(), shim);
        assert!(status.success());
        observed.paths
    });
    // `cc1` is loaded with some that no other program is.
    let is_of_cc1 = |path: &[u8]| path.windows(8).any(|part| part == b"libisl.s");
    let library = other
        .keys()
        .find(|path| is_of_cc1(path))
        .expect("is looked for");
    let library = library
        .rsplit(|byte| *byte == b'/')
        .next()
        .expect("has a name");
    let library = Path::new(OsStr::from_bytes(library));
    for directory in ["deps", "empty"] {
        let at = dir.path().join(directory);
        for name in [library, Path::new("glibc-hwcaps")] {
            let uses = seen.get(at.join(name).as_os_str().as_bytes());
            assert!(uses.is_some_and(|uses| uses.absent), "{directory}/{name:?}");
        }
        let searched = at.join(FOR_ALL).join(library);
        let searched = searched.as_os_str().as_bytes();
        assert!(other.contains_key(searched) && !seen.contains_key(searched));
    }
    // Nobody knows what may be loaded from there.
    let kept = dir.path().join("kept").join(FOR_ALL).join(library);
    assert!(seen.contains_key(kept.as_os_str().as_bytes()));
}

#[test]
fn who_is_spared_the_search_sees_the_environment_it_was_given() {
    let dir = tree();
    let code = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
extern char **environ;
int main(int argc, char **argv) {
    for (char **entry = environ; *entry; entry++)
        if (strstr(*entry, "LIBRARY_PATH") || strstr(*entry, "KACHEFS")) puts(*entry);
    printf("%s %s\n", argv[0], getenv("LD_LIBRARY_PATH"));
    FILE *file = fopen("/proc/self/environ", "r");
    static char text[1 << 16];
    size_t length = fread(text, 1, sizeof text, file);
    for (size_t at = 0; at < length; at += strlen(text + at) + 1)
        if (strstr(text + at, "LIBRARY_PATH")) puts(text + at);
    return 0;
}
"#;
    compiled(dir.path(), code, "show", &[]);
    fs::write(dir.path().join("main.c"), "").expect("writes");
    // It runs this in place of what it would run: with the environment it sees itself.
    let gcc = "gcc -wrapper $PWD/show -S main.c -o main.s";
    let said = |before: &str, is_spared: bool| {
        let script = format!("{before} {gcc}");
        let [(said, seen), (other, _)] = [Shim::new, without].map(|shim| {
            let (status, seen, said) = observe(searching(&script, dir.path()), shim);
            assert!(status.success());
            (said, seen)
        });
        assert_eq!(said, other);
        // Who is not spared looks below that.
        let looked = dir.path().join("empty/glibc-hwcaps");
        let has_looked = seen.paths.contains_key(looked.as_os_str().as_bytes());
        assert_eq!(has_looked, is_spared, "{before}");
        said
    };
    let once = said("", true);
    let here = dir.path().display();
    let entry = format!("LD_LIBRARY_PATH={here}/deps:{here}/kept:{here}/empty\n");
    assert_eq!(once.matches(&entry).count(), 2, "{once}");
    said("LD_LIBRARY_PATH=$PWD/empty", true);
    said("LD_LIBRARY_PATH=$PWD/empty::$PWD/deps", false);
    said("LD_LIBRARY_PATH=$PWD/empty:'$ORIGIN/deps'", false);
}

#[test]
fn what_has_come_since_is_loaded() {
    // All parts of binutils are loaded with it.
    let is_z = |name: &&str| name.contains("/libz.so.1");
    let maps = program("sh", &["-c", "ldd /usr/bin/as"], Path::new("/")).output();
    let maps = String::from_utf8(maps.expect("ldd runs").stdout).expect("text");
    let library = maps
        .split_whitespace()
        .find(is_z)
        .expect("as is loaded with zlib");
    for (script, place) in [
        (
            "as --version; cp ZLIB empty/; as --version",
            "empty/libz.so.1",
        ),
        // An empty entry is the working directory.
        (
            "cp ZLIB .; LD_LIBRARY_PATH=$PWD/empty: as --version",
            "libz.so.1",
        ),
    ] {
        let dir = tree();
        let script = script.replace("ZLIB", library);
        let (status, seen, _) = observe(searching(&script, dir.path()), Shim::new);
        assert!(status.success());
        let place = dir.path().join(place);
        let uses = seen.paths.get(place.as_os_str().as_bytes());
        let opened = uses.is_some_and(|uses| uses.accesses.contains(Access::Open));
        assert!(opened, "{script}: {uses:?}");
    }
}

#[test]
fn who_is_not_the_systems_own_is_not_spared() {
    let dir = tree();
    let flags = ["-shared", "-fPIC", "-Wl,-soname,libnumber-rust-1.so"];
    fs::create_dir_all(dir.path().join("deps")).expect("mkdir");
    let code = "int number(void) { return 7; }\n";
    compiled(dir.path(), code, "deps/libnumber-rust-1.so", &flags);
    let code = "int number(void);\nint main(void) { return number() - 7; }\n";
    compiled(
        dir.path(),
        code,
        "rust-objcopy",
        &["deps/libnumber-rust-1.so"],
    );
    let (status, _, _) = observe(searching("./rust-objcopy", dir.path()), Shim::new);
    assert!(status.success());
}

/// A program that prints a number it has from a library, and what it and its child see of the environment.
/// The library lies in `kept`.
fn numbered(dir: &Path) -> Command {
    let flags = ["-shared", "-fPIC", "-Wl,-soname,libnumber.so"];
    for (place, number) in [("kept", 7), ("other", 8)] {
        fs::create_dir_all(dir.join(place)).expect("mkdir");
        let code = format!("int number(void) {{ return {number}; }}\n");
        compiled(dir, &code, &format!("{place}/libnumber.so"), &flags);
    }
    let code = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int number(void);
int main(void) {
    static char text[1 << 16];
    FILE *file = fopen("/proc/self/environ", "r");
    size_t length = fread(text, 1, sizeof text, file);
    for (size_t at = 0; at < length; at += strlen(text + at) + 1)
        if (strstr(text + at, "PRELOAD")) puts(text + at);
    printf("%d %s\n", number(), getenv("LD_PRELOAD"));
    fflush(stdout);
    return system("export | grep PRELOAD; test -e seen-by-child");
}
"#;
    compiled(dir, code, "numbered", &["kept/libnumber.so"]);
    searching("unused", dir);
    let mut command = program("./numbered", &[], dir);
    let places = ["deps", "kept", "empty"].map(|name| dir.join(name));
    let list = std::env::join_paths(places).expect("no colons");
    command.env(search::VARIABLE, list);
    command
}

/// What the loader finds for it.
fn libraries(command: &mut Command) -> Vec<Vec<u8>> {
    let traced = command.env("LD_TRACE_LOADED_OBJECTS", "1").output();
    command.env_remove("LD_TRACE_LOADED_OBJECTS");
    let said = String::from_utf8(traced.expect("runs").stdout).expect("text");
    let paths = said.lines().filter_map(|line| {
        let (_, path) = line.split_once(" => ")?;
        Some(path.split(' ').next()?.as_bytes().to_vec())
    });
    paths.collect()
}

#[test]
fn who_is_given_its_libraries_need_not_look_for_them() {
    let dir = tree();
    let make = || {
        let mut command = numbered(dir.path());
        let libraries = libraries(&mut command);
        assert!(libraries.len() > 1, "{libraries:?}");
        Program {
            libraries,
            ..Program::from(command)
        }
    };
    let [given, searched, without] = [
        observe(make(), Shim::new),
        observe(make().command, Shim::new),
        observe(make(), without),
    ];
    assert_eq!(given.2, "7 (null)\n");
    assert_eq!((given.0, &given.2), (searched.0, &searched.2));
    assert_eq!((given.0, &given.2), (without.0, &without.2));
    let (given, searched) = (given.1, searched.1);
    assert_eq!(given.unseen, BTreeSet::new());
    let at = |name: &str| dir.path().join(name);
    let opened = uses(&given, &at("kept/libnumber.so")).accesses;
    assert!(opened.contains(Access::Open));
    let is_absent = |seen: &Observed, name: &str| {
        let uses = uses(seen, &at(name));
        assert!(uses.absent, "{name}: {uses:?}");
    };
    // It says what it would have looked for.
    for name in ["deps/libnumber.so", "deps/libc.so.6", "kept/libc.so.6"] {
        is_absent(&given, name);
        is_absent(&searched, name);
    }
    for directory in ["deps", "kept", "empty"] {
        is_absent(&given, &format!("{directory}/glibc-hwcaps"));
    }
    // What its child does is seen as well.
    is_absent(&given, "seen-by-child");
    let looked = at("deps").join(FOR_ALL).join("libnumber.so");
    let looked = looked.as_os_str().as_bytes();
    assert!(searched.paths.contains_key(looked) && !given.paths.contains_key(looked));
}

#[test]
fn who_is_given_others_than_it_would_find_runs_with_those_it_finds() {
    let dir = tree();
    let mut command = numbered(dir.path());
    let libraries = libraries(&mut command);
    fs::copy(
        dir.path().join("other/libnumber.so"),
        dir.path().join("deps/libnumber.so"),
    )
    .expect("copies");
    let (_, seen, said) = observe(
        Program {
            libraries,
            ..Program::from(command)
        },
        Shim::new,
    );
    assert_eq!(said, "8 (null)\n");
    let opened = uses(&seen, &dir.path().join("deps/libnumber.so")).accesses;
    assert!(opened.contains(Access::Open));
}

#[test]
fn who_is_given_its_libraries_has_them_in_their_order() {
    let dir = tree();
    fs::create_dir(dir.path().join("kept")).expect("mkdir");
    // All three say a number, and the first one needs the last.
    for (name, number, needs) in [("last", 3, ""), ("first", 1, "-llast"), ("second", 2, "")] {
        let code = format!("int number(void) {{ return {number}; }}\n");
        let soname = format!("-Wl,-soname,lib{name}.so");
        let flags = [
            "-shared",
            "-fPIC",
            "-Lkept",
            "-Wl,--no-as-needed",
            &soname,
            needs,
        ];
        let flags: Vec<&str> = flags.into_iter().filter(|flag| !flag.is_empty()).collect();
        compiled(dir.path(), &code, &format!("kept/lib{name}.so"), &flags);
    }
    let code = "#define _GNU_SOURCE\n#include <link.h>\n#include <stdio.h>\n#include <string.h>\n\
                int number(void);\n\
                int show(struct dl_phdr_info *at, size_t size, void *data) {\n\
                    if (at->dlpi_name[0] == '/' && !strstr(at->dlpi_name, \"/proc/\")) puts(at->dlpi_name);\n\
                    return 0;\n\
                }\n\
                int main(void) { printf(\"%d\\n\", number()); return dl_iterate_phdr(show, 0); }\n";
    let flags = ["-Lkept", "-Wl,--no-as-needed", "-lfirst", "-lsecond"];
    compiled(dir.path(), code, "ordered", &flags);
    let make = || {
        let mut command = program("./ordered", &[], dir.path());
        command.env(search::VARIABLE, dir.path().join("kept"));
        let libraries = libraries(&mut command);
        assert_eq!(libraries.len(), 4, "{libraries:?}");
        Program {
            libraries,
            ..Program::from(command)
        }
    };
    // The loader itself comes last, or where it is asked for.
    let said = |program: Program, shim| {
        let (status, _, said) = observe(program, shim);
        assert!(status.success());
        let lines = said.lines().filter(|line| !line.contains("/ld-linux"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let given = said(make(), Shim::new);
    assert_eq!(given[0], "1");
    assert_eq!(given.len(), 5);
    assert_eq!(given, said(make(), without));
}
