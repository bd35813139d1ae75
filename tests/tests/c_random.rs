//! C compiles among sources that change at random: whatever `kachefs-cc` leaves, the compiler itself
//! would have left, byte for byte, with the same words and the same status.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use harness::{Chance, Cmd, Must, Project, Sandbox};

const STEPS: usize = 80;

/// Where headers may lie, the source's own directory among them.
const DIRECTORIES: [&str; 5] = [".", "one", "two", "sys", "one/deep"];
const HEADERS: [&str; 4] = ["a.h", "b.h", "c.h", "deep/a.h"];

const SOURCE: &str = "#include \"a.h\"\n#include <b.h>\n#include \"deep/a.h\"\n\
    #if __has_include(\"c.h\")\n#include \"c.h\"\n#endif\n\
    #ifndef A\n#define A 0\n#endif\n\
    int f(void) { int unused; return A + sizeof(__FILE__); }\n";

struct World {
    sandbox: Sandbox,
    project: Project,
    chance: Chance,
    flags: Vec<&'static str>,
    cpath: Option<&'static str>,
}

impl World {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let project = Project::at(sandbox.make_dir("project"));
        project.write("a.c", SOURCE);
        sandbox.mount(project.target());
        let world = Self {
            sandbox,
            project,
            chance: Chance::new(),
            flags: Vec::new(),
            cpath: None,
        };
        world.restore();
        world
    }

    /// Brings back headers that compile.
    fn restore(&self) {
        let names = [
            "one", "two", "sys", "was", "aside", "a.h", "b.h", "c.h", "deep",
        ];
        for path in names.map(|name| self.project.path(name)) {
            if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(&path).must("remove");
            } else {
                let _ = fs::remove_file(&path);
            }
        }
        for directory in DIRECTORIES {
            fs::create_dir_all(self.project.path(directory)).must(directory);
        }
        self.project.write("sys/b.h", "#define B 1\n");
        self.project.write("two/a.h", "#define A 1\n");
        self.project.write("two/deep/a.h", "\n");
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        *self.chance.pick(from).must("there are some")
    }

    /// Changes one thing.
    fn change(&mut self) {
        let header = format!("{}/{}", self.pick(&DIRECTORIES), self.pick(&HEADERS));
        let path = self.project.path(&header);
        match self.chance.below(10) {
            0..=2 => {
                let text = [
                    "",
                    "#define A 1\n",
                    "#define A 2\n",
                    "#pragma once\n",
                    "#error no\n",
                ];
                let text = self.pick(&text);
                // Its directory may be a link to nowhere by now.
                let parent = path.parent().must("a parent");
                if fs::create_dir_all(parent).is_ok() {
                    let _ = fs::remove_dir(&path);
                    let _ = fs::remove_file(&path);
                    let _ = fs::write(&path, text);
                }
            }
            3..=4 => drop(fs::remove_file(&path)),
            5 => {
                // A directory gives way to another, or to a link to one.
                let (one, two) = (
                    self.pick(&["one", "two", "sys"]),
                    self.pick(&["two", "sys"]),
                );
                let (one, aside) = (self.project.path(one), self.project.path("aside"));
                if self.chance.percent(50) {
                    let _ = fs::rename(&one, &aside);
                    let _ = fs::rename(self.project.path(two), &one);
                    let _ = fs::rename(&aside, self.project.path(two));
                } else if fs::rename(&one, self.project.path("was")).is_ok() {
                    symlink(two, &one).must("link");
                } else if one.is_symlink() {
                    fs::remove_file(&one).must("remove");
                    let _ = fs::rename(self.project.path("was"), &one);
                }
            }
            6 => {
                let sets: [&[&str]; 6] = [
                    &[],
                    &["-g"],
                    &["-O2"],
                    &["-DA=5"],
                    &["-Wall"],
                    &["-MD", "-MF", "target/a.d"],
                ];
                self.flags = self.pick(&sets).to_vec();
            }
            7 => self.cpath = self.pick(&[None, Some("one"), Some("two"), Some("sys")]),
            8 => {
                let more = self.pick(&["", "\n", "int g;\n"]);
                self.project.write("a.c", &format!("{SOURCE}{more}"));
            }
            _ => drop(fs::create_dir(&path)),
        }
    }

    fn command(&self, cmd: Cmd, object: &PathBuf) -> Cmd {
        let cmd = cmd
            .args(["-Ione", "-Itwo", "-isystem", "sys"])
            .args(&self.flags);
        let cmd = cmd.args(["-c", "a.c", "-o"]).arg(object);
        let cmd = match self.cpath {
            Some(path) => cmd.env("CPATH", path),
            None => cmd,
        };
        cmd.in_dir(&self.project)
    }

    /// Compiles by itself and with `kachefs-cc`; the outcomes are the same. Whether they are objects.
    fn compare(&self, compiler: &str, step: usize) -> bool {
        let object = self.project.path("target/a.o");
        let depfile = self.project.path("target/a.d");
        let mut outcomes = Vec::new();
        for program in [&[compiler][..], &["kachefs-cc", compiler]] {
            let _ = fs::remove_file(&object);
            let _ = fs::remove_file(&depfile);
            let cmd = self.sandbox.command(program[0]).args(&program[1..]);
            let outcome = self.command(cmd, &object).run();
            let left = (fs::read(&object).ok(), fs::read(&depfile).ok());
            outcomes.push((outcome.status.code(), outcome.stdout, outcome.stderr, left));
        }
        let cached = outcomes.pop().must("two");
        let plain = outcomes.pop().must("two");
        assert_eq!(
            (plain.0, &plain.2),
            (cached.0, &cached.2),
            "{compiler}, step {step}"
        );
        assert!(plain == cached, "{compiler}, step {step}: another object");
        plain.0 == Some(0)
    }
}

#[test]
fn what_is_left_is_what_the_compiler_would_have_left() {
    let mut world = World::new();
    for step in 0..STEPS {
        world.change();
        let compiles = world.compare("gcc", step);
        let compiles = world.compare("clang", step) && compiles;
        if !compiles && world.chance.percent(50) {
            world.restore();
        }
        if world.chance.percent(20) {
            // Long enough for everything to have rested, so that more of it is remembered.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let seen = world.sandbox.counters();
    eprintln!("{} hits, {} misses", seen.cc_hits, seen.cc_misses);
    assert!(seen.cc_hits > 0 && seen.cc_misses > 0, "{seen:?}");
}
