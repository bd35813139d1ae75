//! Questions to compilers are answered from memory, and only as the compiler would.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use harness::{Cmd, Must, Package, Project, Sandbox, toolchain};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// A toolchain that shows when its compiler is run.
struct Shown {
    bin: PathBuf,
    /// Hears when the compiler is opened, which is when it is run: nobody else knows its name.
    opened: Inotify,
}

impl Shown {
    fn new(sandbox: &Sandbox) -> Self {
        let root = sandbox.path("toolchain");
        toolchain::copy_to(&root);
        let bin = root.join("bin");
        // No link: others may run the one it is a copy of.
        fs::copy(bin.join("rustc"), bin.join("rustc-itself")).must("copy");
        let opened = Inotify::init(InitFlags::IN_NONBLOCK).must("inotify");
        let compiler = bin.join("rustc-itself");
        let watch = opened.add_watch(&compiler, AddWatchFlags::IN_OPEN);
        watch.must("watch the compiler");
        let shown = Self { bin, opened };
        shown.stand_in(sandbox, "");
        shown
    }

    /// Puts a program in the compiler's place that runs it with one more `cfg`, if it is given one.
    fn stand_in(&self, sandbox: &Sandbox, cfg: &str) {
        let source = sandbox.path("rustc.rs");
        let text = format!(
            "use std::{{env, os::unix::process::CommandExt, process::Command}};\n\
             fn main() {{\n\
                 let mut words: Vec<_> = env::args_os().skip(1).collect();\n\
                 if words.len() > 1 && {cfg:?} != \"\" {{\n\
                     words.extend([\"--cfg\".into(), {cfg:?}.into()]);\n\
                 }}\n\
                 panic!(\"{{}}\", Command::new({:?}).args(words).exec());\n\
             }}\n",
            self.bin.join("rustc-itself").to_str().must("text"),
        );
        fs::write(&source, text).must("write");
        let next = self.bin.join("next");
        let compiler = self.bin.join("rustc-itself");
        let made = Command::new(compiler)
            .arg(source)
            .arg("-o")
            .arg(&next)
            .status();
        assert!(made.must("compile").success());
        fs::rename(next, self.bin.join("rustc")).must("rename");
        self.runs();
    }

    fn build(&self, sandbox: &Sandbox, project: &Project) -> Cmd {
        let path = format!("{}:/usr/bin:/bin", self.bin.display());
        sandbox.cargo(project, "build").env("PATH", path)
    }

    /// How often the compiler was run since the last time.
    fn runs(&self) -> usize {
        match self.opened.read_events() {
            Ok(events) => events.len() + self.runs(),
            Err(Errno::EAGAIN) => 0,
            Err(error) => panic!("inotify: {error}"),
        }
    }
}

/// A library and a program that prints a `cfg` of the target's that its build script was told.
fn packages() -> [Package; 2] {
    let script = "fn main() {\n\
        println!(\"cargo:rustc-env=TOLD={:?}\", std::env::var(\"CARGO_CFG_FLAVOUR\").ok());\n\
        println!(\"cargo:rerun-if-env-changed=CARGO_CFG_FLAVOUR\");\n\
    }\n";
    let base = Package::new("base").lib("pub fn seven() -> u32 { 7 }\n");
    let main = "fn main() { println!(\"{} {}\", base::seven(), env!(\"TOLD\")); }\n";
    [
        base,
        Package::new("app")
            .bin(main)
            .build_script(script)
            .dep("base"),
    ]
}

#[test]
fn where_all_hits_no_compiler_is_run() {
    let sandbox = Sandbox::new();
    let shown = Shown::new(&sandbox);
    let project = Project::new(sandbox.path("one"), &packages());
    sandbox.mount(project.target());
    // The daemon, too, opens what a compile has opened: when it records it.
    let _ = sandbox.during(|| shown.build(&sandbox, &project).ok());
    assert!(shown.runs() > 0);

    let other = project.checkout(sandbox.path("two"));
    sandbox.mount(other.target());
    let (seen, _) = sandbox.during(|| shown.build(&sandbox, &other).ok());
    seen.assert_all_hit(3);
    assert_eq!(shown.runs(), 0);
    assert_eq!(sandbox.output_of(other.program("app")).trim(), "7 None");
}

#[test]
fn another_compiler_and_other_flags_are_asked() {
    let sandbox = Sandbox::new();
    let shown = Shown::new(&sandbox);
    let project = Project::new(sandbox.path("project"), &packages());
    sandbox.mount(project.target());
    let said = |flags: &str| {
        sandbox.empty_view(project.target());
        let build = shown.build(&sandbox, &project);
        let _ = build.env("RUSTFLAGS", flags).ok();
        sandbox.output_of(project.program("app")).trim().to_owned()
    };
    assert_eq!(said(""), "7 None");
    assert_eq!(said("--cfg flavour=\"sweet\""), "7 Some(\"sweet\")");
    assert!(shown.runs() > 0);
    assert_eq!(said(""), "7 None");

    // Another compiler at the same place, with the same version.
    shown.stand_in(&sandbox, "flavour=\"sour\"");
    assert_eq!(said(""), "7 Some(\"sour\")");
}

/// Asks about a crate whose source comes from standard input.
fn ask(sandbox: &Sandbox, input: Stdio) -> Output {
    let mut command = Command::new(sandbox.wrapper());
    command
        .env("KACHEFS_STORE", sandbox.store())
        .arg(toolchain::sysroot().join("bin/rustc"));
    command.args(["-", "--crate-name", "___", "--print=crate-name"]);
    command.stdin(input).output().must("ask")
}

#[test]
fn a_source_on_standard_input_is_read() {
    let sandbox = Sandbox::new();
    let project = Project::new(sandbox.path("project"), &packages());
    sandbox.mount(project.target());
    let source = sandbox.path("source.rs");
    fs::write(&source, "#![crate_name = \"inside\"]\n").must("write");
    let input = |path: &Path| Stdio::from(File::open(path).must("open"));
    for _ in 0..2 {
        let said = ask(&sandbox, Stdio::null());
        assert!(said.status.success() && said.stdout == b"___\n", "{said:?}");
    }
    // The name in the source and the one that is asked with differ.
    let said = ask(&sandbox, input(&source));
    assert!(!said.status.success(), "{said:?}");
}
