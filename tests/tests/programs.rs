//! Programs people run below `target/`: what they do there ends as it does on the disk.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::Must;
use harness::side_by_side::{Log, same};

/// Whether a program is there; says so where not.
fn have(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

/// Runs a shell script in the directory and notes what it says.
fn shell(dir: &Path, log: &mut Log, script: &str) {
    let output = Command::new("sh")
        .arg("-euc")
        .arg(script)
        .current_dir(dir)
        .env("HOME", dir)
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_AUTHOR_DATE", "2020-01-01T00:00:00Z")
        .env("GIT_COMMITTER_DATE", "2020-01-01T00:00:00Z")
        .output()
        .must("sh");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let seen = (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    );
    log.note(script, seen);
}

#[test]
fn git_keeps_a_repository() {
    if !have("git") {
        return;
    }
    same(|dir, log| {
        let git = "git -c user.name=n -c user.email=e@example.org -c init.defaultBranch=main";
        shell(dir, log, &format!("mkdir repo && cd repo && {git} init -q"));
        fs::create_dir(dir.join("repo/src")).must("mkdir");
        for index in 0..100 {
            fs::write(
                dir.join(format!("repo/src/f{index}.rs")),
                format!("fn f{index}() {{}}\n"),
            )
            .must("write");
        }
        shell(
            dir,
            log,
            &format!("cd repo && {git} add . && {git} commit -qm one"),
        );
        shell(
            dir,
            log,
            "cd repo && sed -i s/fn/pub\\ fn/ src/f1*.rs && chmod +x src/f2.rs",
        );
        shell(
            dir,
            log,
            &format!("cd repo && {git} status --short && {git} commit -qam two"),
        );
        shell(
            dir,
            log,
            &format!("cd repo && {git} checkout -q HEAD~1 && {git} checkout -q main"),
        );
        shell(
            dir,
            log,
            &format!(
                "cd repo && {git} clone -q . ../clone && {git} worktree add -q ../tree HEAD~1"
            ),
        );
        shell(
            dir,
            log,
            &format!("cd repo && {git} gc -q && {git} fsck --strict 2>&1"),
        );
        shell(
            dir,
            log,
            &format!("cd clone && {git} rev-parse HEAD && {git} status --short"),
        );
        // Names and bytes with times in them differ from run to run.
        fs::remove_dir_all(dir.join("repo/.git")).must("remove");
        fs::remove_dir_all(dir.join("clone/.git")).must("remove");
        fs::remove_file(dir.join("tree/.git")).must("remove");
        log.all(dir);
    });
}

#[test]
fn sqlite_keeps_a_database() {
    if !have("python3") {
        return;
    }
    same(|dir, log| {
        for mode in ["delete", "truncate", "persist", "wal"] {
            let script = format!(
                "import sqlite3\n\
                 db = sqlite3.connect('{mode}.db')\n\
                 other = sqlite3.connect('{mode}.db')\n\
                 print(db.execute('pragma journal_mode={mode}').fetchone())\n\
                 db.execute('create table t (id integer primary key, body blob)')\n\
                 for round in range(20):\n    \
                     with db:\n        \
                         db.executemany('insert into t (body) values (?)',\n            \
                             [(bytes([round]) * 3000,) for _ in range(20)])\n    \
                     print(other.execute('select count(*), sum(length(body)) from t').fetchone())\n\
                 with db:\n    \
                     db.execute('delete from t where id % 3 = 0')\n\
                 db.execute('vacuum')\n\
                 print(other.execute('pragma integrity_check').fetchone())\n\
                 print(other.execute('select count(*) from t').fetchone())\n"
            );
            fs::write(dir.join("script.py"), script).must("write");
            shell(dir, log, "python3 script.py");
        }
        shell(dir, log, "ls; rm *.db*");
    });
}

#[test]
fn rsync_copies_everything() {
    if !have("rsync") {
        return;
    }
    same(|dir, log| {
        shell(
            dir,
            log,
            "mkdir -p from/sub && echo a > from/a && ln from/a from/sub/b",
        );
        shell(
            dir,
            log,
            "ln -s ../a from/sub/link && truncate -s 5M from/sparse && chmod 640 from/a",
        );
        shell(
            dir,
            log,
            "rsync -aHS from/ to && rsync -aHSni --delete from/ to",
        );
        shell(
            dir,
            log,
            "echo more >> from/a && rsync -aHS --inplace from/ to && cat to/sub/b",
        );
        shell(
            dir,
            log,
            "rsync -aHS --delete from/sub/ to/ && find to | sort && rm from/sparse",
        );
    });
}

#[test]
fn debuggers_and_loaders_map_what_they_read() {
    // Program and libraries in the view: the loader maps them private and writes its relocations
    // there; a debugger maps the same file once more.
    same(|dir, log| {
        shell(
            dir,
            log,
            "cp /bin/ls ls && for lib in $(ldd /bin/ls | sed -n 's/.*=> \\([^ ]*\\) .*/\\1/p'); do cp $lib .; done",
        );
        shell(
            dir,
            log,
            "LD_LIBRARY_PATH=. ./ls --version | head -1 && cmp ls /bin/ls",
        );
        shell(dir, log, "rm ls *.so*");
    });
}
