//! Flips one influence on a build between two states, and checks what the program prints.
//!
//! Used by every wrong-hit test: back and forth in one view, then in an emptied one.

use std::fs;
use std::time::Duration;

use crate::{Cmd, Counters, Must, Package, Project, Sandbox, processes};

/// One state of an influence: how to bring it about, and what the program then prints.
pub struct State<'a> {
    prepare: Box<dyn Fn() + 'a>,
    env: Vec<(&'a str, String)>,
    args: &'a str,
    output: &'a str,
}

impl<'a> State<'a> {
    /// A state in which the program prints `output`.
    pub fn printing(output: &'a str) -> Self {
        Self {
            prepare: Box::new(|| ()),
            env: Vec::new(),
            args: "",
            output,
        }
    }

    /// Brought about by `prepare`.
    #[must_use]
    pub fn after(mut self, prepare: impl Fn() + 'a) -> Self {
        self.prepare = Box::new(prepare);
        self
    }

    /// With a variable in cargo's environment.
    #[must_use]
    pub fn env(mut self, name: &'a str, value: impl Into<String>) -> Self {
        self.env.push((name, value.into()));
        self
    }

    /// With more arguments to `cargo build`.
    #[must_use]
    pub fn args(mut self, args: &'a str) -> Self {
        self.args = args;
        self
    }
}

/// Who notices the change.
#[derive(Clone, Copy, PartialEq)]
pub enum Noticed {
    /// cargo reruns the compiler by itself.
    ByCargo,
    /// cargo believes everything fresh: only the store can be wrong, in an emptied view.
    InAnEmptiedView,
}

/// One project in one mounted sandbox.
pub struct Case {
    /// Where everything happens.
    pub sandbox: Sandbox,
    /// What is built.
    pub project: Project,
    /// Whether a compiler that is no rustc kachefs knows may be refused instead of cached.
    pub may_refuse: bool,
}

impl Case {
    /// A mounted project of these packages; `app` is the program that is run.
    pub fn new(packages: &[Package]) -> Self {
        let sandbox = Sandbox::new();
        let project = Project::new(sandbox.path("project"), packages);
        sandbox.mount(project.target());
        Self {
            sandbox,
            project,
            may_refuse: false,
        }
    }

    /// `cargo build` in a state.
    pub fn cargo(&self, state: &State) -> Cmd {
        let env = state.env.iter().map(|(name, value)| (name, value));
        self.sandbox
            .cargo(&self.project, "build")
            .args(state.args.split_whitespace())
            .envs(env)
    }

    /// Brings the state about, builds, runs.
    #[track_caller]
    pub fn build(&self, state: &State, emptied: bool, when: &str) -> Counters {
        (state.prepare)();
        if emptied {
            self.sandbox.empty_view(self.project.target());
        }
        let (seen, built) = self.sandbox.during(|| self.cargo(state).ok());
        let output = self.sandbox.output_of(self.project.program("app"));
        assert_eq!(
            output.trim_end(),
            state.output,
            "{when}: a wrong hit: {seen:?}\n{built}"
        );
        seen
    }

    /// `cargo build` of a project that uses [`waiting_macro`].
    pub fn waiting_cargo(&self) -> Cmd {
        let sync = self.sandbox.make_dir("sync");
        self.sandbox
            .cargo(&self.project, "build")
            .env("TEST_SYNC", sync)
    }

    /// Runs [`Self::waiting_cargo`], with `meanwhile` between the beginning of a compile that uses
    /// the macro and its end.
    #[track_caller]
    pub fn build_meanwhile(&self, cargo: Cmd, meanwhile: impl Fn()) {
        let sync = self.sandbox.path("sync");
        fs::write(sync.join("hold"), "").must("write");
        let building = cargo.spawn();
        let reached = || sync.join("reached").exists();
        assert!(
            processes::wait_for(Duration::from_mins(2), reached),
            "the macro runs"
        );
        meanwhile();
        fs::remove_file(sync.join("hold")).must("remove");
        let _ = building.finish().success();
        self.sandbox.counters();
    }

    /// Goes from one state to the other and back, and again in an emptied view.
    #[track_caller]
    pub fn flip(&self, noticed: Noticed, one: &State, other: &State) {
        assert_ne!(one.output, other.output, "the test can tell them apart");
        let emptied = noticed == Noticed::InAnEmptiedView;
        let ran = |seen: &Counters| seen.misses + seen.uncacheable;
        let first = self.build(one, emptied, "at first");
        let stored = if self.may_refuse {
            ran(&first)
        } else {
            first.misses
        };
        assert!(stored > 0, "nothing is in the store yet: {first:?}");
        let changed = self.build(other, emptied, "after the change");
        assert!(
            ran(&changed) > 0,
            "the change compiles something: {changed:?}"
        );
        let back = self.build(one, emptied, "changed back");
        assert_eq!(back.misses, 0, "what comes back is in the store: {back:?}");
        let forth = self.build(other, emptied, "changed again");
        assert_eq!(
            forth.misses, 0,
            "what comes back is in the store: {forth:?}"
        );
        for (state, when) in [(one, "emptied"), (other, "emptied and changed")] {
            let seen = self.build(state, true, when);
            assert_eq!(seen.misses, 0, "{when}: {seen:?}");
        }
    }
}

/// A macro that becomes the empty string, once the directory `sync` of the sandbox does not hold
/// the file `hold` any more.
pub fn waiting_macro() -> Package {
    macro_package(
        "let sync = std::path::PathBuf::from(std::env::var(\"TEST_SYNC\").expect(\"set\"));\n\
         if sync.join(\"hold\").exists() {\n\
             std::fs::write(sync.join(\"reached\"), \"\").expect(\"write\");\n\
             while sync.join(\"hold\").exists() {\n\
                 std::thread::sleep(std::time::Duration::from_millis(5));\n\
             }\n\
         }\n\
         String::new()",
    )
}

/// A function-like macro that becomes the string literal its body computes.
pub fn macro_package(body: &str) -> Package {
    Package::new("looks").proc_macro(&format!(
        "use proc_macro::{{Literal, TokenStream, TokenTree}};\n\
         #[proc_macro]\n\
         pub fn look(_: TokenStream) -> TokenStream {{\n\
             let text: String = {{ {body} }};\n\
             TokenTree::from(Literal::string(&text)).into()\n\
         }}\n"
    ))
}

/// A program that prints what `looks::look!()` became.
pub fn macro_user() -> Package {
    Package::new("app")
        .dep("looks")
        .bin("fn main() { println!(\"{}\", looks::look!()); }\n")
}

/// A body for [`macro_package`] that lists a directory below the package that uses the macro.
pub fn lists(dir: &str) -> String {
    format!(
        "let root = std::env::var(\"CARGO_MANIFEST_DIR\").expect(\"set by cargo\");\n\
         let names = std::fs::read_dir(root + \"/{dir}\").expect(\"the directory\");\n\
         let mut names: Vec<_> = names.flatten().map(|name| name.file_name()).collect();\n\
         names.sort();\n\
         format!(\"{{names:?}}\")"
    )
}
