//! As root, what a compiler writes goes to the disk without passing through the daemon.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use harness::disk::Disk;
use harness::{Must, Package, Project, Running, Sandbox, processes, samples, toolchain};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::Mode;
use nix::unistd::{geteuid, mkfifo};

/// How large the launcher is.
fn launcher() -> u64 {
    let launcher = toolchain::bin_dir().join("kachefs-rustc");
    launcher.metadata().must("the launcher").len()
}

#[test]
fn a_miss_is_written_past_the_daemon() {
    if !geteuid().is_root() {
        println!("skipped: passthrough needs root");
        return;
    }
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    sandbox.mount(project.target());
    let daemon = sandbox.daemon_pid();
    let before = processes::counter(daemon, "wchar");
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    // The first build script brings the launcher into the store, and reads it from there to run.
    let passed = (processes::counter(daemon, "wchar") - before).saturating_sub(2 * launcher());
    assert!(seen.bytes_ingested > 10 << 20, "{seen:?}");
    assert!(
        passed < seen.bytes_ingested / 2,
        "{passed} bytes went through the daemon, of {} made",
        seen.bytes_ingested
    );
    let again = sandbox.cargo(&project, "build --message-format=json").ok();
    harness::messages::Messages::of(&again).assert_all_fresh();
}

/// Objects and archives of C compilers in build scripts, too.
#[test]
fn what_a_build_script_assembles_is_written_past_the_daemon() {
    if !geteuid().is_root() {
        println!("skipped: passthrough needs root");
        return;
    }
    let script = "use std::process::Command;\n\
        fn main() {\n    let out = std::env::var(\"OUT_DIR\").unwrap();\n    \
        std::fs::create_dir(format!(\"{out}/objects\")).unwrap();\n    \
        let run = |program: &str, args: &[&str]| {\n        \
        let ended = Command::new(program).args(args).current_dir(&out).status();\n        \
        assert!(ended.unwrap().success());\n    };\n    \
        for (name, first) in [(\"a\", 1), (\"b\", 2)] {\n        \
        let text = format!(\"char {name}[4 << 20] = {{ {first} }};\\n\");\n        \
        std::fs::write(format!(\"{out}/{name}.c\"), text).unwrap();\n        \
        let object = format!(\"objects/{name}.o\");\n        \
        run(\"cc\", &[\"-c\", &format!(\"{name}.c\"), \"-o\", &object]);\n        \
        // The second time it reads what is there, and writes it anew.\n        \
        run(\"ar\", &[\"cqD\", \"libab.a\", &object]);\n    }\n    \
        run(\"ar\", &[\"sD\", \"libab.a\"]);\n    \
        println!(\"cargo::rustc-link-search=native={out}\");\n    \
        println!(\"cargo::rustc-link-lib=static=ab\");\n}\n";
    let main = "unsafe extern \"C\" { static a: [u8; 4 << 20]; static b: [u8; 4 << 20]; }\n\
        fn main() { unsafe { println!(\"{} {}\", a[0], b[0]) } }\n";
    let sandbox = Sandbox::new();
    let package = Package::new("app").build_script(script).bin(main);
    let project = Project::new(sandbox.path("project"), &[package]);
    sandbox.mount(project.target());
    let daemon = sandbox.daemon_pid();
    let before = processes::counter(daemon, "wchar");
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    let passed = (processes::counter(daemon, "wchar") - before).saturating_sub(2 * launcher());
    assert_eq!(seen.script_misses, 1, "{seen:?}");
    // 8 MiB of objects, and 20 of archives twice: `ar` makes each anew, and copies it over what is there
    // already, which nobody creates. What is read goes through, too.
    assert!(passed < 36 << 20, "{passed} bytes went through the daemon");
    assert_eq!(sandbox.output_of(project.program("app")), "1 2\n");

    sandbox.empty_view(project.target());
    let (seen, _) = sandbox.during(|| sandbox.cargo(&project, "build").ok());
    seen.assert_no_miss();
    assert_eq!(seen.script_hits, 1, "{seen:?}");
    assert_eq!(sandbox.output_of(project.program("app")), "1 2\n");
}

/// A build in which a compiler runs, and what it waits for to be told to.
struct Compiling {
    project: Project,
    build: Running,
    awaited: File,
}

impl Compiling {
    fn start(sandbox: &Sandbox) -> Self {
        let package = Package::new("slow").lib("pub const TEXT: &str = include_str!(\"fifo\");\n");
        let project = Project::new(sandbox.path("project"), &[package]);
        let fifo = project.path("crates/slow/src/fifo");
        mkfifo(&fifo, Mode::S_IRWXU).must("mkfifo");
        sandbox.mount(project.target());
        let build = sandbox.cargo(&project, "build").spawn();
        // Opens as soon as the compiler reads, and waits.
        let mut awaited = None;
        let reads = || {
            let mut options = OpenOptions::new();
            options.write(true).custom_flags(nix::libc::O_NONBLOCK);
            awaited = options.open(&fifo).ok();
            awaited.is_some()
        };
        assert!(processes::wait_for(Duration::from_mins(1), reads));
        Self {
            project,
            build,
            awaited: awaited.must("the compiler reads"),
        }
    }

    fn end(mut self) {
        self.awaited.write_all(b"text").must("write");
        drop(self.awaited);
        let _ = self.build.finish().success();
    }
}

#[test]
fn what_a_compiler_has_written_can_be_opened() {
    let sandbox = Sandbox::new();
    let compiling = Compiling::start(&sandbox);
    let path = compiling.project.path("target/debug/deps/written");
    let mut written = File::create_new(&path).must("create");
    written.write_all(b"bytes").must("write");
    // Linux 6.18.44 refuses, others do not; either way that ends with the writer.
    match fs::read(&path) {
        Ok(bytes) => assert_eq!(bytes, b"bytes"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}"),
    }
    drop(written);
    assert_eq!(fs::read(&path).must("read what is written"), b"bytes");
    compiling.end();
    assert_eq!(fs::read(&path).must("read"), b"bytes");
}

/// Archivers make a temporary file of every archive they change: the disk is full soon of what is
/// removed and not let go of.
#[test]
fn what_a_compiler_removes_leaves_the_disk() {
    const LARGE: u64 = 256 << 20;
    let sandbox = Sandbox::new();
    let Some(disk) = Disk::new(&sandbox, "ext4") else {
        return;
    };
    let compiling = Compiling::start(&sandbox);
    let path = compiling.project.path("target/debug/deps/temporary");
    let before = disk.free();
    let file = File::create_new(&path).must("create");
    let size = i64::try_from(LARGE).must("fits");
    fallocate(&file, FallocateFlags::empty(), 0, size).must("fallocate");
    assert!(disk.free() + LARGE / 2 < before, "it has blocks");
    drop(file);
    fs::remove_file(&path).must("remove");
    let is_free = || before < disk.free() + LARGE / 2;
    assert!(processes::wait_for(Duration::from_secs(20), is_free));
    compiling.end();
}
