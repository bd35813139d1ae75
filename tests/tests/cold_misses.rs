//! What a machine that has built nothing fetches for what it has to compile.

use std::fs;
use std::path::PathBuf;

use harness::machines::{DEBUG_LOG, number, read_late};
use harness::{Machines, Must, Package, Project, Sandbox, samples};

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
    assert_nothing_comes_late(|_, _| {});
}

/// The same where nobody knows what such a compile loads.
#[test]
fn nothing_that_rustc_may_map_comes_while_it_runs() {
    assert_nothing_comes_late(ask_anew);
}

/// Has a package's crates compiled with arguments that none was compiled with before.
fn ask_anew(checkout: &Project, package: &str) {
    let manifest = format!("crates/{package}/Cargo.toml");
    let text = checkout.read(&manifest);
    checkout.write(&manifest, &format!("{text}[features]\nnew = []\n"));
}

fn assert_nothing_comes_late(also_change: impl Fn(&Project, &str)) {
    let machines = Machines::new();
    let project = of_all_kinds(machines.warm.path("project"));
    machines.build(&project, "build");
    let cold = &machines.cold;
    machines.set(cold, "--prefetch off");
    let checkout = project.checkout(cold.path("somewhere/else"));
    let mount = cold.kachefs("mount").arg(checkout.target());
    mount.env("KACHEFS_LOG", DEBUG_LOG).ok();
    let libraries = "build --workspace --exclude app";
    let (seen, _) = cold.during(|| cold.cargo(&checkout, libraries).ok());
    seen.assert_no_miss();
    for (edited, words) in [("native", libraries), ("top", libraries), ("app", "build")] {
        let source = ["lib", "main"].map(|name| format!("crates/{edited}/src/{name}.rs"));
        let source = source.iter().find(|name| checkout.path(name).exists());
        let source = source.must("a source");
        let text = checkout.read(source);
        checkout.write(source, &format!("{text}// changed\n"));
        also_change(&checkout, edited);
        cold.cargo(&checkout, words).ok();
    }
    assert_eq!(cold.output_of(checkout.program("app")), "12\n");
    // Nor does what nobody reads come.
    let archive = checkout.target().join("debug/libboth.a");
    let archive = fs::metadata(archive).must("an archive").len();
    assert!(archive > number(cold, "bytes_faulted"), "{archive}");
    let log = fs::read_to_string(cold.store().join("daemon.log")).must("a log");
    assert!(log.contains("fetching what it loads"), "{log}");
    let none: Vec<PathBuf> = Vec::new();
    assert_eq!(read_late(cold, &checkout.target()), none, "{log}");
}

/// A machine that has built nothing, without prefetch, and a checkout of [`samples::something_unused`] on it, which
/// another has built.
fn something_unused() -> (Machines, Project) {
    let machines = Machines::new();
    let project = samples::something_unused(machines.warm.path("project"));
    machines.build(&project, "build");
    machines.set(&machines.cold, "--prefetch off");
    let checkout = machines.checkout(&project);
    (machines, checkout)
}

/// Builds it with another program, the one thing that is compiled. Returns what that printed.
fn built_with(cold: &Sandbox, checkout: &Project, program: &str) -> String {
    checkout.write("crates/app/src/main.rs", program);
    let (seen, _) = cold.during(|| cold.cargo(checkout, "build").ok());
    assert_eq!((seen.misses, seen.failed), (1, 0), "{seen:?}");
    cold.output_of(checkout.program("app"))
}

#[test]
fn what_the_last_compile_did_not_load_is_not_fetched() {
    let (machines, checkout) = something_unused();
    let cold = &machines.cold;
    // The first build of this machine, which has no outputs of that program.
    let edited = "fn main() { println!(\"edited: {}\", used::value()); }\n";
    assert_eq!(built_with(cold, &checkout, edited), "edited: 1\n");
    let fetched = number(cold, "bytes_faulted");
    assert!(fetched > 0 && fetched < samples::UNUSED, "{fetched}");
    // What it had no use for comes when it has.
    let printed = built_with(cold, &checkout, samples::USES_BOTH);
    assert_eq!(printed, samples::BOTH_OUTPUT);
    assert!(number(cold, "bytes_faulted") > samples::UNUSED);
}

#[test]
fn where_nobody_knows_all_comes_that_may_be_loaded() {
    let (machines, checkout) = something_unused();
    let cold = &machines.cold;
    ask_anew(&checkout, "app");
    cold.cargo(&checkout, "build").ok();
    assert!(number(cold, "bytes_faulted") > samples::UNUSED);
}
