//! What is told to the allocators of programs (`shim/start.rs`).

use super::*;

/// What a compiler's allocator is told here: to say at its end what it was told.
const TOLD: &str = "3,stats_print:true";

fn telling(command: Command) -> Program {
    Program {
        allocator: [words::ALLOCATOR_IS_TOLD, TOLD].concat().into_bytes(),
        ..Program::from(command)
    }
}

/// What a program, and one that it starts, sees of the variable.
fn seen(users: Option<&str>, shim: fn() -> Option<Shim>) -> String {
    let text = "echo \"own ${MALLOC_CONF-none}\"; env | grep MALLOC_CONF; \
                tr '\\0' '\\n' </proc/$$/environ | grep MALLOC_CONF; echo over";
    let mut command = Command::new("/bin/sh");
    command.args(["-c", text]).env_remove("MALLOC_CONF");
    command.envs(users.map(|users| ("MALLOC_CONF", users)));
    let (status, _, said) = observe(telling(command), shim);
    assert!(status.success());
    said
}

#[test]
fn nobody_gets_to_know() {
    for shim in [Shim::new, without] {
        assert_eq!(seen(None, shim), "own none\nover\n");
    }
}

#[test]
fn what_the_user_says_stays() {
    for users in ["narenas:3", "abort_conf:false", ""] {
        let expected = format!("own {users}\nMALLOC_CONF={users}\nMALLOC_CONF={users}\nover\n");
        assert_eq!(seen(Some(users), Shim::new), expected);
    }
}

/// It reads it before anybody can take it away.
#[test]
fn the_allocator_of_a_compiler_does() {
    let dir = tempfile::tempdir().expect("tempdir");
    let at = |name: &str| dir.path().join(name);
    let rustc = || {
        let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
        let sysroot = String::from_utf8(sysroot.expect("runs").stdout).expect("UTF-8");
        let mut command = Command::new(Path::new(sysroot.trim_end()).join("bin/rustc"));
        command.args(["said.rs", "-o", "said"]).current_dir(&dir);
        command.stderr(fs::File::create(at("stderr")).expect("creates"));
        command
    };
    let text = "fn main() { println!(\"{:?}\", option_env!(\"MALLOC_CONF\")); }\n";
    fs::write(at("said.rs"), text).expect("writes");
    let asked = || fs::read_to_string(at("stderr")).expect("reads");
    let told = rustc().env("MALLOC_CONF", "stats_print:true").status();
    assert!(told.expect("runs").success());
    if !asked().contains("jemalloc") {
        eprintln!("this rustc has another allocator");
        return;
    }
    let (status, _, _) = observe(telling(rustc()), Shim::new);
    assert!(
        status.success() && asked().contains("opt.narenas: 3\n"),
        "{}",
        asked()
    );
    let said = Command::new(at("said")).output().expect("runs").stdout;
    assert_eq!(said, b"None\n");
}
