//! The roots of an action, and texts freed of them.
//!
//! Two checkouts differ in a few directory paths. [`Roots`] replaces them in arguments,
//! environment values, dep-info and diagnostics by placeholders (`NUL letter NUL`, which no path
//! and no argument can hold), puts the paths of another checkout back in, and says which
//! `--remap-path-prefix` flags keep them out of the outputs. Pure text work: touches no disk.

use std::path::Path;

use memchr::memmem;
use store::scan::RootNeedles;
use store::{Root, RootSet};

use crate::environment::{self, Environment};

/// What rustc is told to write instead of the working directory: a debugger started in the
/// workspace finds the sources through it (proc(5)).
const REMAPPED_CWD: &str = "/proc/self/cwd";
/// What rustc is told to write instead of `$CARGO_HOME`.
const REMAPPED_CARGO_HOME: &str = "/cargo";
/// What rustc is told to write instead of the view's mountpoint.
const REMAPPED_VIEW: &str = "/proc/self/cwd/target";

/// Temporary directories that are everybody's.
const SYSTEM_TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];

/// The literal root paths of one action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// `(root, path)`, longest path first, so nested roots are recognised before what holds them.
    paths: Vec<(Root, String)>,
    plain: bool,
}

impl Roots {
    /// The roots of an action that runs in `cwd`. Trailing slashes do not matter; an empty or
    /// relative path is not a root and is left out.
    pub fn new(cwd: &str, cargo_home: &str, view: &str) -> Self {
        let mut paths: Vec<(Root, String)> = [
            (Root::View, view),
            (Root::CargoHome, cargo_home),
            (Root::Cwd, cwd),
        ]
        .into_iter()
        .map(|(root, path)| (root, path.trim_end_matches('/').to_owned()))
        .filter(|(_, path)| path.starts_with('/'))
        .collect();
        paths.sort_by_key(|(_, path)| std::cmp::Reverse(path.len()));
        let plain = paths.iter().all(|(_, path)| path.bytes().all(is_plain))
            && paths.len() == Root::OF_CHECKOUT.len();
        Self { paths, plain }
    }

    /// With the user's home and their `$TMPDIR`, where these are directories of their own. The system's
    /// temporary directory is named in every program.
    #[must_use]
    pub fn with_environment(mut self, environment: &Environment) -> Self {
        for (root, name) in [(Root::Home, &b"HOME"[..]), (Root::Temp, b"TMPDIR")] {
            let value = environment::value(environment, name).unwrap_or_default();
            let path = std::str::from_utf8(value).unwrap_or_default();
            let path = path.trim_end_matches('/');
            let is_own = path.starts_with('/')
                && path.bytes().all(is_plain)
                && !SYSTEM_TEMPORARY.contains(&path)
                && self.paths.iter().all(|(_, known)| known != path);
            if is_own {
                self.paths.push((root, path.to_owned()));
            }
        }
        self.paths
            .sort_by_key(|(_, path)| std::cmp::Reverse(path.len()));
        self
    }

    /// The path of `root`; empty when there is none.
    pub fn path(&self, root: Root) -> &str {
        self.paths
            .iter()
            .find(|(r, _)| *r == root)
            .map_or("", |(_, path)| path)
    }

    /// Whether all roots are made of characters that no text format escapes. Where they are not,
    /// a literal search could miss an escaped form, so results must count as bound to all roots.
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// Whether the action compiles an immutable package below `$CARGO_HOME`.
    pub fn in_cargo_home(&self) -> bool {
        let home = self.path(Root::CargoHome);
        let cwd = self.path(Root::Cwd);
        !home.is_empty()
            && cwd
                .strip_prefix(home)
                .is_some_and(|rest| rest.starts_with('/'))
    }

    /// `text` with the paths of the checkout replaced by their placeholders. Only whole path components
    /// count: `/a/ws2` does not hold the root `/a/ws`. Home and `$TMPDIR` stay: what a text says of
    /// them may have been said by a file, for everybody.
    pub fn template(&self, text: &[u8]) -> Vec<u8> {
        self.template_of(text, &Root::OF_CHECKOUT)
    }

    /// A path, or the value of a variable, with every root replaced.
    pub fn template_place(&self, text: &[u8]) -> Vec<u8> {
        self.template_of(text, &Root::ALL)
    }

    fn template_of(&self, text: &[u8], roots: &[Root]) -> Vec<u8> {
        let pairs: Vec<(&[u8], Vec<u8>)> = self
            .paths
            .iter()
            .filter(|(root, _)| roots.contains(root))
            .map(|(root, path)| (path.as_bytes(), placeholder(*root).to_vec()))
            .collect();
        replace_paths(text, &pairs)
    }

    /// Whether there is a path for every root a template holds.
    pub fn knows(&self, template: &[u8]) -> bool {
        let mut held = template.windows(3).filter_map(root_of);
        held.all(|root| !self.path(root).is_empty())
    }

    /// The text `template` stands for in this checkout.
    pub fn render(&self, template: &[u8]) -> Vec<u8> {
        let mut text = Vec::with_capacity(template.len() + 256);
        let mut rest = template;
        while let Some(at) = rest.iter().position(|b| *b == 0) {
            text.extend_from_slice(&rest[..at]);
            if let Some(root) = rest.get(at..at + 3).and_then(root_of) {
                text.extend_from_slice(self.path(root).as_bytes());
                rest = &rest[at + 3..];
            } else {
                text.push(0);
                rest = &rest[at + 1..];
            }
        }
        text.extend_from_slice(rest);
        text
    }

    /// The roots whose literal path is still in `text`.
    pub fn held_in(&self, text: &[u8]) -> RootSet {
        let mut held = RootSet::default();
        for (root, path) in &self.paths {
            if memmem::find(text, path.as_bytes()).is_some() {
                held.insert(*root);
            }
        }
        held
    }

    /// A search for the literal paths in outputs.
    pub fn needles(&self) -> RootNeedles {
        RootNeedles::new(&self.paths)
    }

    /// The same; whoever holds the path that `stood_in` for one in the view counts as holding that one.
    pub fn needles_and(&self, stood_in: &Path) -> RootNeedles {
        let stood_in = (Root::View, stood_in.to_string_lossy().into_owned());
        RootNeedles::new(&[self.paths.as_slice(), &[stood_in]].concat())
    }

    /// `(from, to)` pairs for `--remap-path-prefix`, shortest first: rustc lets the last matching
    /// one win, so the most specific does.
    pub fn remaps(&self) -> Vec<(&str, &'static str)> {
        self.paths
            .iter()
            .rev()
            .filter(|(root, _)| *root != Root::Cwd || !self.in_cargo_home())
            .filter_map(|(root, path)| Some((path.as_str(), remapped(*root)?)))
            .collect()
    }

    /// Puts the real paths back where remapping reached a diagnostic meant for people and
    /// editors.
    pub fn unremap(text: &[u8], remaps: &[(String, String)]) -> Vec<u8> {
        let mut pairs: Vec<(&[u8], Vec<u8>)> = remaps
            .iter()
            .map(|(from, to)| (to.as_bytes(), from.clone().into_bytes()))
            .collect();
        pairs.sort_by_key(|(to, _)| std::cmp::Reverse(to.len()));
        replace_paths(text, &pairs)
    }
}

fn remapped(root: Root) -> Option<&'static str> {
    match root {
        Root::Cwd => Some(REMAPPED_CWD),
        Root::CargoHome => Some(REMAPPED_CARGO_HOME),
        Root::View => Some(REMAPPED_VIEW),
        Root::Home | Root::Temp => None,
    }
}

/// A template as people see it: relative to the working directory, below `target` or `$CARGO_HOME`.
pub fn shown(template: &[u8]) -> Vec<u8> {
    const SHOWN: [(Root, &[u8]); 5] = [
        (Root::Cwd, b""),
        (Root::CargoHome, b"$CARGO_HOME"),
        (Root::View, b"target"),
        (Root::Home, b"~"),
        (Root::Temp, b"$TMPDIR"),
    ];
    let mut text = template.to_vec();
    for (root, shown) in SHOWN {
        let placeholder = placeholder(root);
        while let Some(at) = text.windows(3).position(|window| window == placeholder) {
            // What lies in the working directory is shown without it.
            let slash = shown.is_empty() && text.get(at + 3) == Some(&b'/');
            text.splice(at..at + 3 + usize::from(slash), shown.iter().copied());
        }
    }
    text
}

/// What stands for a root in templates.
pub fn placeholder(root: Root) -> [u8; 3] {
    [0, letter(root), 0]
}

fn letter(root: Root) -> u8 {
    match root {
        Root::Cwd => b'C',
        Root::CargoHome => b'H',
        Root::View => b'V',
        Root::Home => b'U',
        Root::Temp => b'T',
    }
}

fn root_of(bytes: &[u8]) -> Option<Root> {
    Root::ALL
        .into_iter()
        .find(|root| bytes == placeholder(*root))
}

/// Whether neither make syntax, JSON nor a shell writes a path in another form.
pub(crate) fn is_plain_path(path: &[u8]) -> bool {
    path.iter().copied().all(is_plain)
}

/// Characters that neither make syntax, JSON nor a shell writes in another form.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"/._-+@,=~".contains(&byte)
}

/// Whether a path could go on with this byte, so that a match next to it is not a whole path.
fn continues_component(byte: Option<&u8>) -> bool {
    byte.is_some_and(|b| b.is_ascii_alphanumeric() || b"._-+@~".contains(b) || !b.is_ascii())
}

fn replace_paths(text: &[u8], pairs: &[(&[u8], Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        // Every path begins with a slash; most bytes are copied by this one comparison.
        let starts_path = text[at] == b'/'
            && !(at > 0 && (continues_component(text.get(at - 1)) || text[at - 1] == b'/'));
        let found = starts_path
            .then(|| {
                pairs.iter().find(|(from, _)| {
                    text[at..].starts_with(from) && !continues_component(text.get(at + from.len()))
                })
            })
            .flatten();
        if let Some((from, to)) = found {
            out.extend_from_slice(to);
            at += from.len();
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ann() -> Roots {
        Roots::new("/home/ann/ws", "/home/ann/.cargo", "/home/ann/ws/target")
    }

    fn bob() -> Roots {
        Roots::new("/b", "/srv/cargo", "/b/target")
    }

    #[test]
    fn longest_root_wins_and_components_are_whole() {
        let text = b"-L/home/ann/ws/target/x:/home/ann/ws:/home/ann/ws2 /x/home/ann/ws";
        assert_eq!(
            ann().template(text),
            // `-L/…`: what precedes a path may be a letter of a flag, so that one stays literal.
            b"-L/home/ann/ws/target/x:\0C\0:/home/ann/ws2 /x/home/ann/ws"
        );
        assert_eq!(
            ann().template(b"native=/home/ann/ws/target/a"),
            b"native=\0V\0/a"
        );
    }

    #[test]
    fn another_checkout_gets_its_own_paths() {
        let text = b"/home/ann/ws/target/debug/deps/a.d: src/lib.rs /home/ann/.cargo/r.rs\n";
        assert_eq!(
            bob().render(&ann().template(text)),
            b"/b/target/debug/deps/a.d: src/lib.rs /srv/cargo/r.rs\n"
        );
        assert!(ann().held_in(&ann().template(text)).is_empty());
        assert!(ann().held_in(b"x/home/ann/ws2").contains(Root::Cwd));
    }

    #[test]
    fn remaps_go_from_general_to_special() {
        assert_eq!(
            ann().remaps(),
            [
                ("/home/ann/ws", "/proc/self/cwd"),
                ("/home/ann/.cargo", "/cargo"),
                ("/home/ann/ws/target", "/proc/self/cwd/target"),
            ]
        );
        let registry = Roots::new("/home/ann/.cargo/registry/x-1", "/home/ann/.cargo", "/t");
        assert!(registry.in_cargo_home());
        assert_eq!(registry.remaps().len(), 2);
    }

    #[test]
    fn diagnostics_show_real_paths() {
        let remaps: Vec<(String, String)> = ann()
            .remaps()
            .iter()
            .map(|(f, t)| ((*f).to_owned(), (*t).to_owned()))
            .collect();
        let text = b"--> /proc/self/cwd/target/debug/build/x/out/g.rs:1 see https://h.org/cargo/x";
        assert_eq!(
            Roots::unremap(text, &remaps),
            b"--> /home/ann/ws/target/debug/build/x/out/g.rs:1 see https://h.org/cargo/x"
        );
    }

    #[test]
    fn odd_paths_are_not_plain() {
        assert!(ann().is_plain());
        assert!(!Roots::new("/home/ann smith/ws", "/c", "/t").is_plain());
        assert!(!Roots::new("/home/änn/ws", "/c", "/t").is_plain());
        assert!(!Roots::new("/", "/c", "/t").is_plain());
    }

    #[test]
    fn homes_differ_and_temporary_directories_do() {
        let environment = |home: &str, temporary: &str| {
            [("HOME", home), ("TMPDIR", temporary)]
                .map(|(name, value)| (name.into(), value.into()))
                .to_vec()
        };
        let ann = ann().with_environment(&environment("/home/ann", "/scratch/ann/"));
        let bob = bob().with_environment(&environment("/home/bob", "/scratch/bob"));
        let text = b"/home/ann/.rustup/x /home/ann/ws/y /scratch/ann /home/anna";
        assert_eq!(
            ann.template(text),
            b"/home/ann/.rustup/x \0C\0/y /scratch/ann /home/anna"
        );
        let template = ann.template_place(text);
        assert_eq!(template, b"\0U\0/.rustup/x \0C\0/y \0T\0 /home/anna");
        assert!(bob.knows(&template));
        assert!(!Roots::new("/b", "/c", "/t").knows(&template));
        let there = b"/home/bob/.rustup/x /b/y /scratch/bob /home/anna";
        assert_eq!(bob.render(&template), there);
        assert_eq!(ann.remaps().len(), 3);
        assert!(ann.held_in(b"=/home/ann/x").contains(Root::Home));
        let common = Roots::new("/a", "/c", "/t").with_environment(&environment("/a", "/tmp"));
        assert_eq!(common.path(Root::Home), "", "the workspace goes first");
        assert_eq!(common.path(Root::Temp), "");
        assert!(common.is_plain());
    }

    proptest! {
        #[test]
        fn rendering_undoes_templating(parts in prop::collection::vec(
            prop::sample::select(vec!["/home/ann/ws", "/target", "/home/ann", "/.cargo", "x", " ", ":", "\"", "2"]), 0..12)) {
            let text = parts.concat().into_bytes();
            prop_assert_eq!(ann().render(&ann().template(&text)), text);
        }

        #[test]
        fn texts_and_outputs_are_searched_alike(parts in prop::collection::vec(
            prop::sample::select(vec!["/home/ann/ws", "/target", "/home/ann", "/.cargo", "/tmp/ann", "x", "/"]), 0..12)) {
            let environment = [("HOME", "/home/ann"), ("TMPDIR", "/tmp/ann/")]
                .map(|(name, value)| (name.into(), value.into()));
            let roots = ann().with_environment(&environment);
            let text = parts.concat().into_bytes();
            let needles = roots.needles();
            let mut scanner = needles.scanner();
            scanner.feed(&text);
            prop_assert_eq!(roots.held_in(&text), scanner.finish());
        }
    }

    #[test]
    fn what_stood_in_for_the_view_counts_as_it() {
        let needles = ann().needles_and(Path::new("/store/aside/x1"));
        let found = |text: &[u8]| {
            let mut scanner = needles.scanner();
            scanner.feed(text);
            scanner.finish()
        };
        assert!(found(b"in /store/aside/x1/libx.rlib").contains(Root::View));
        assert!(found(b"in /store/aside/x2/libx.rlib").is_empty());
        assert!(found(b"in /home/ann/ws/src").contains(Root::Cwd));
    }

    #[test]
    fn templates_are_shown_without_roots() {
        let text = |template: &[u8]| String::from_utf8(shown(template)).expect("text");
        assert_eq!(text(b"\0C\0/src/lib.rs"), "src/lib.rs");
        assert_eq!(text(b"-L\0V\0/x:\0H\0/y"), "-Ltarget/x:$CARGO_HOME/y");
        assert_eq!(text(b"/usr/lib"), "/usr/lib");
    }
}
