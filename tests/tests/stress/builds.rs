//! Builds of a small workspace whose sources change and change back. Every checkout has the same
//! sources but for some numbers, so views hit what other views compiled. After every build the
//! program must print what its sources say.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use harness::messages::Messages;
use harness::{Chance, Cmd, Must, Outcome, Package, Project, Sandbox};

use crate::World;
use crate::watchdog::{BUILD, COMMAND, Hand};

/// What the program prints, one number for each way a source comes into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sources([usize; 7]);

/// Values of each number: few, so that views meet.
const VALUES: usize = 3;

impl Sources {
    /// What the program prints.
    fn line(self) -> String {
        self.0.map(|number| number.to_string()).join(" ")
    }

    /// The files that hold the numbers, all but the last, which is an environment variable.
    fn files(self) -> [(&'static str, String); 6] {
        let [fact, private, generated, by_macro, own, included, _] = self.0;
        [
            (
                "crates/facts/src/lib.rs",
                format!("pub fn fact() -> u32 {{ {fact} }}\n"),
            ),
            (
                "crates/below/src/lib.rs",
                format!(
                    "pub fn both() -> String {{ format!(\"{{}} {{}}\", facts::fact(), private()) }}\n\
                     fn private() -> u32 {{ {private} }}\n"
                ),
            ),
            ("crates/generated/number.txt", format!("{generated}")),
            (
                "crates/macros/src/lib.rs",
                format!(
                    "#[proc_macro]\n\
                     pub fn number(_: proc_macro::TokenStream) -> proc_macro::TokenStream {{\n\
                         \"{by_macro}_u32\".parse().expect(\"a literal\")\n\
                     }}\n"
                ),
            ),
            (
                "crates/app/src/own.rs",
                format!("pub const OWN: u32 = {own};\n"),
            ),
            ("crates/app/src/included.txt", format!("{included}")),
        ]
    }
}

const GENERATED: &str = "use std::{env, fs, path::Path};\n\
     fn main() {\n\
         println!(\"cargo::rerun-if-changed=number.txt\");\n\
         let number = fs::read_to_string(\"number.txt\").expect(\"the number\");\n\
         let out = env::var(\"OUT_DIR\").expect(\"OUT_DIR\");\n\
         let code = format!(\"pub const GENERATED: u32 = {number};\");\n\
         fs::write(Path::new(&out).join(\"code.rs\"), code).expect(\"write\");\n\
     }\n";

const APP: &str = "mod own;\n\
     pub fn line() -> String {\n\
         format!(\"{} {} {} {} {} {}\", below::both(), generated::GENERATED, macros::number!(),\n\
             own::OWN, include_str!(\"included.txt\"), env!(\"STRESS_NUMBER\"))\n\
     }\n\
     #[cfg(test)]\n\
     mod tests {\n\
         #[test]\n\
         fn says() { println!(\"the line is {}.\", super::line()); }\n\
     }\n";

fn packages() -> Vec<Package> {
    vec![
        Package::new("facts").lib(""),
        Package::new("below").dep("facts").lib(""),
        Package::new("generated")
            .build_script(GENERATED)
            .lib("include!(concat!(env!(\"OUT_DIR\"), \"/code.rs\"));\n"),
        Package::new("macros").proc_macro(""),
        ["below", "generated", "macros"].iter().fold(
            Package::new("app")
                .lib(APP)
                .bin("fn main() { println!(\"{}\", app::line()); }\n"),
            |package, dependency| package.dep(dependency),
        ),
    ]
}

/// A project, its view, and what its sources say now.
pub struct Builder {
    index: usize,
    project: Project,
    sources: Sources,
    past: Vec<Sources>,
}

impl Builder {
    /// Writes the project of one view.
    pub fn new(sandbox: &Sandbox, index: usize) -> Self {
        let root = sandbox.path(&format!("project-{index}"));
        let builder = Self {
            index,
            project: Project::new(root, &packages()),
            sources: Sources([0; 7]),
            past: Vec::new(),
        };
        for (path, contents) in builder.sources.files() {
            builder.project.write(path, &contents);
        }
        builder
    }

    /// Which of all it is.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Where its view is mounted.
    pub fn target(&self) -> PathBuf {
        self.project.target()
    }

    /// Writes what has changed; what has not stays as old as it is.
    fn change_to(&mut self, sources: Sources) {
        for ((path, old), (_, new)) in self.sources.files().iter().zip(sources.files()) {
            if *old != new {
                self.project.write(path, &new);
            }
        }
        self.past.push(self.sources);
        self.sources = sources;
    }

    fn cargo(&self, world: &World, words: &str) -> Cmd {
        let number = self.sources.0[6].to_string();
        let cargo = world.sandbox.cargo(&self.project, words);
        cargo.env("STRESS_NUMBER", number)
    }

    /// Runs cargo to success, and notes what it compiled.
    #[track_caller]
    fn cargo_ok(&self, world: &World, hand: &Hand, words: &str) -> Messages {
        let all = format!("{words} --message-format=json");
        let built = hand.run(&format!("cargo {words}"), BUILD, self.cargo(world, &all));
        let built = built.success();
        assert!(
            !built.stderr.contains("kachefs:"),
            "the wrapper had something to say\n{built}"
        );
        world.did("cargo commands");
        let messages = Messages::of(&built);
        for _ in messages.stale() {
            world.did("units compiled or hit");
        }
        messages
    }

    /// The first build, with the sources everybody has: all views at once.
    pub fn build_first(&mut self, world: &World, hand: &Hand) {
        self.build_and_run(world, hand);
        let again = self.cargo_ok(world, hand, "build");
        again.assert_all_fresh();
    }

    /// Builds; the program must print what the sources say.
    #[track_caller]
    pub fn build_and_run(&self, world: &World, hand: &Hand) {
        self.cargo_ok(world, hand, "build");
        self.assert_says(world, hand, "target/debug/app");
    }

    #[track_caller]
    fn assert_says(&self, world: &World, hand: &Hand, program: &str) {
        let program = self.project.path(program);
        let said = hand.run("the program", COMMAND, world.sandbox.command(program));
        let said = said.success();
        assert_eq!(
            said.stdout.trim_end(),
            self.sources.line(),
            "a wrong hit in view {}: {self:?}",
            self.index
        );
        world.did("programs run");
    }

    /// Changes sources and builds until the time is over.
    pub fn play(&mut self, world: &World, hand: &Hand, chance: &mut Chance) {
        while !world.is_over() {
            self.happen(world, hand, chance);
            self.build(world, hand, chance);
        }
    }

    /// Something that makes the next build do something.
    fn happen(&mut self, world: &World, hand: &Hand, chance: &mut Chance) {
        match chance.below(100) {
            0..45 => {
                let mut sources = self.sources;
                for _ in 0..=chance.below(2) {
                    let number = chance.below(sources.0.len());
                    sources.0[number] = chance.below(VALUES);
                }
                self.change_to(sources);
            }
            45..60 if !self.past.is_empty() => {
                let sources = *chance.pick(&self.past).must("a past");
                self.change_to(sources);
            }
            60..76 => {
                let target = self.target();
                hand.during("empty the view", COMMAND, || {
                    world.sandbox.empty_view(&target);
                });
                world.did("views emptied");
            }
            76..84 => {
                let clean = self.cargo(world, "clean");
                let _ = hand.run("cargo clean", COMMAND, clean).success();
                assert!(!world.sandbox.is_mounted(&self.target()), "cleaned");
                world.did("targets cleaned");
            }
            84..92 => self.fail_to_build(world, hand),
            _ => self.die_in_the_middle(world, hand, chance),
        }
    }

    /// A mistake: cargo says so, and the next build does not remember it.
    fn fail_to_build(&self, world: &World, hand: &Hand) {
        let path = "crates/below/src/lib.rs";
        let right = self.project.read(path);
        self.project
            .write(path, &format!("{right}fn wrong() -> u32 {{ \"text\" }}\n"));
        let failed = hand.run("a build that fails", BUILD, self.cargo(world, "build"));
        assert!(
            failed.clone().failure().stderr.contains("E0308"),
            "{failed}"
        );
        self.project.write(path, &right);
        world.did("builds that failed as they should");
    }

    /// A build that is killed can be finished by the next.
    fn die_in_the_middle(&self, world: &World, hand: &Hand, chance: &mut Chance) {
        let source = self.project.path("crates/facts/src/lib.rs");
        let text = fs::read(&source).must("read");
        fs::write(&source, text).must("write");
        let build = self.cargo(world, "build").spawn();
        thread::sleep(Duration::from_millis(chance.number() % 1500));
        hand.during("kill a build", COMMAND, || drop(build));
        world.did("builds killed");
    }

    /// One of the ways to build, and what it must give.
    fn build(&self, world: &World, hand: &Hand, chance: &mut Chance) {
        let words = match chance.below(100) {
            0..60 => "build",
            60..75 => "check",
            75..88 => "test --no-run",
            _ => "build --release",
        };
        let messages = self.cargo_ok(world, hand, words);
        assert!(world.sandbox.is_mounted(&self.target()), "it came back");
        match words {
            "build" => self.assert_says(world, hand, "target/debug/app"),
            "build --release" => self.assert_says(world, hand, "target/release/app"),
            "check" => {}
            _ => self.assert_test_says(world, hand, &messages),
        }
        if chance.percent(25) {
            self.cargo_ok(world, hand, words).assert_all_fresh();
            world.did("builds that had nothing to do");
        }
    }

    #[track_caller]
    fn assert_test_says(&self, world: &World, hand: &Hand, messages: &Messages) {
        let expected = format!("the line is {}.", self.sources.line());
        let says = |program: PathBuf| {
            let command = world.sandbox.command(program);
            let ran = hand.run("a test", COMMAND, command.arg("--nocapture"));
            let ran: Outcome = ran.success();
            ran.stdout.contains(&expected)
        };
        let programs = messages.programs();
        let tests = programs.into_iter().filter(|program| {
            let name = program.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with("app-")
        });
        let saying = tests.map(says).filter(|says| *says).count();
        assert_eq!(saying, 1, "a wrong hit in view {}: {self:?}", self.index);
        world.did("programs run");
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let last = &self.past[self.past.len().saturating_sub(5)..];
        write!(f, "{:?}, before that {last:?}", self.sources)
    }
}
