//! What a machine that has built nothing fetches for what it has to compile.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use harness::machines::number;
use harness::{Machines, Must, Package, Project, samples, tree};

#[test]
fn what_is_changed_is_compiled_with_what_is_fetched_for_it() {
    let (machines, checkout) = Machines::built(samples::whole);
    let cold = &machines.cold;
    cold.cargo(&checkout, "build").ok();
    checkout.write(
        "crates/app/src/main.rs",
        "fn main() { println!(\"new: {}\", app::line()); }\n",
    );
    let (seen, _) = cold.during(|| cold.cargo(&checkout, "build").ok());
    assert_eq!((seen.misses, seen.failed), (1, 0), "{seen:?}");
    let expected = format!("new: {}", samples::WHOLE_OUTPUT);
    let program = checkout.program("app");
    assert_eq!(cold.output_of(&program), expected);
    let faults = number(cold, "faults");
    assert!(faults > 0, "the linker reads the libraries");
}

/// What a compile loads, of all kinds: macros with helpers named like them, a crate without metadata beside its
/// code, an archive of a build script.
fn of_all_kinds(root: PathBuf) -> Project {
    let script = "use std::{env, path::Path, process::Command};\n\
         fn main() {\n\
             println!(\"cargo::rerun-if-changed=native.c\");\n\
             let out = env::var(\"OUT_DIR\").expect(\"OUT_DIR\");\n\
             let object = Path::new(&out).join(\"native.o\");\n\
             let library = Path::new(&out).join(\"libnative.a\");\n\
             let run = |command: &mut Command| assert!(command.status().expect(\"runs\").success());\n\
             run(Command::new(\"cc\").args([\"-pipe\", \"-c\", \"native.c\", \"-o\"]).arg(&object));\n\
             run(Command::new(\"ar\").arg(\"crs\").arg(&library).arg(&object));\n\
             println!(\"cargo::rustc-link-search=native={out}\");\n\
             println!(\"cargo::rustc-link-lib=static=native\");\n\
         }\n";
    let three = "use proc_macro::TokenStream;\n\
         #[proc_macro]\n\
         pub fn three(_: TokenStream) -> TokenStream { three_support::THREE.parse().expect(\"a number\") }\n";
    let packages = [
        Package::new("native")
            .file("native.c", "int four(void) { return 4; }\n")
            .build_script(script)
            .lib(
                "unsafe extern \"C\" { fn four() -> i32; }\n\
                  pub fn get() -> i32 { unsafe { four() } }\n",
            ),
        Package::new("three_support").lib("pub const THREE: &str = \"3\";\n"),
        Package::new("three").proc_macro(three).dep("three_support"),
        Package::new("uses_three")
            .lib("pub fn get() -> i32 { three::three!() }\n")
            .dep("three"),
        Package::new("both").lib_of(
            "\"lib\", \"cdylib\", \"staticlib\"",
            "pub fn get() -> i32 { 5 }\n",
        ),
        Package::new("deep").lib("pub fn get() -> i32 { 0 }\n"),
        Package::new("uses_both")
            .lib("pub fn get() -> i32 { both::get() + deep::get() }\n")
            .dep("both")
            .dep("deep"),
        ["native", "uses_three", "uses_both"]
            .iter()
            .fold(Package::new("top"), |package, name| package.dep(name))
            .lib("pub fn sum() -> i32 { native::get() + uses_three::get() + uses_both::get() }\n"),
        Package::new("app")
            .dep("top")
            .bin("fn main() { println!(\"{}\", top::sum()); }\n"),
    ];
    Project::new(root, &packages)
}

/// Who has a file mapped that does not come is killed: what rustc maps is here before it starts.
#[test]
fn nothing_that_rustc_maps_comes_while_it_runs() {
    let machines = Machines::new();
    let project = of_all_kinds(machines.warm.path("project"));
    machines.build(&project, "build");
    let cold = &machines.cold;
    machines.set(cold, "--prefetch off");
    let checkout = project.checkout(cold.path("somewhere/else"));
    let mount = cold.kachefs("mount").arg(checkout.target());
    mount.env("KACHEFS_LOG", "info,kachefs=debug").ok();
    let libraries = "build --workspace --exclude app";
    let (seen, _) = cold.during(|| cold.cargo(&checkout, libraries).ok());
    seen.assert_no_miss();
    let deps = tree::files(&checkout.target());
    let mapped: Vec<_> = deps
        .iter()
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            extension.is_some_and(|extension| ["rlib", "rmeta", "so", "a"].contains(&extension))
        })
        .map(|path| {
            (
                format!("#{}", fs::metadata(path).must("is there").ino()),
                path,
            )
        })
        .collect();
    for (edited, words) in [("native", libraries), ("top", libraries), ("app", "build")] {
        let source = ["lib", "main"].map(|name| format!("crates/{edited}/src/{name}.rs"));
        let source = source.iter().find(|name| checkout.path(name).exists());
        let source = source.must("a source");
        let text = checkout.read(source);
        checkout.write(source, &format!("{text}// changed\n"));
        cold.cargo(&checkout, words).ok();
    }
    assert_eq!(cold.output_of(checkout.program("app")), "12\n");
    // Nor does what nobody reads come.
    let archive = checkout.target().join("debug/libboth.a");
    let archive = fs::metadata(archive).must("an archive").len();
    assert!(archive > number(cold, "bytes_faulted"), "{archive}");
    let log = fs::read_to_string(cold.store().join("daemon.log")).must("a log");
    assert!(log.contains("fetching what it loads"), "{log}");
    let waits = log.lines().filter(|line| line.contains("a read waits"));
    let mut late = waits.filter_map(|line| {
        let is_it = |(ino, _): &&(String, &PathBuf)| line.contains(&format!("ino={ino} "));
        mapped.iter().find(is_it)
    });
    assert_eq!(late.next(), None, "{log}");
}
