//! Finds literal root paths in a stream of bytes.
//!
//! An output that holds the path of the checkout it was compiled in must not be served to another
//! checkout. The scanner sees every chunk that is hashed anyway, and finds a needle also where it
//! lies across two chunks. It never decides what a finding means.

use aho_corasick::AhoCorasick;

use crate::action::{Root, RootSet};

/// Searches a stream for several roots at once; made per file, fed chunk by chunk.
pub struct RootScanner<'a> {
    needles: &'a RootNeedles,
    /// The last `longest - 1` bytes of what came before.
    tail: Vec<u8>,
    found: RootSet,
}

/// The compiled search for the roots of one action.
pub struct RootNeedles {
    automaton: Option<AhoCorasick>,
    roots: Vec<Root>,
    longest: usize,
}

impl RootNeedles {
    /// A search for every `(root, path)`. A path shorter than two bytes (`/`) would be found in
    /// anything, and is: it counts as present in every non-empty file.
    pub fn new(roots: &[(Root, String)]) -> Self {
        let (roots, patterns): (Vec<Root>, Vec<&str>) = roots
            .iter()
            .filter(|(_, path)| !path.is_empty())
            .map(|(root, path)| (*root, path.as_str()))
            .unzip();
        let longest = patterns.iter().map(|p| p.len()).max().unwrap_or(0);
        // Construction fails only beyond 2^31 states; then nothing may be called path-free, which
        // `automaton: None` with roots left in place expresses.
        let automaton = AhoCorasick::new(&patterns).ok();
        Self {
            automaton,
            roots,
            longest,
        }
    }

    /// A scanner for one file.
    pub fn scanner(&self) -> RootScanner<'_> {
        RootScanner {
            needles: self,
            tail: Vec::new(),
            found: RootSet::default(),
        }
    }
}

impl RootScanner<'_> {
    /// Looks at the next chunk of the stream.
    pub fn feed(&mut self, chunk: &[u8]) {
        let needles = self.needles;
        let Some(automaton) = &needles.automaton else {
            for root in &needles.roots {
                self.found.insert(*root);
            }
            return;
        };
        if needles.roots.is_empty() || chunk.is_empty() {
            return;
        }
        let keep = needles.longest - 1;
        // The border: old tail plus the first `keep` bytes of the chunk.
        self.tail.extend_from_slice(&chunk[..keep.min(chunk.len())]);
        let border = std::mem::take(&mut self.tail);
        self.search(automaton, &border);
        self.search(automaton, chunk);
        self.tail = if chunk.len() >= keep {
            chunk[chunk.len() - keep..].to_vec()
        } else {
            border[border.len().saturating_sub(keep)..].to_vec()
        };
    }

    fn search(&mut self, automaton: &AhoCorasick, haystack: &[u8]) {
        for found in automaton.find_overlapping_iter(haystack) {
            self.found
                .insert(self.needles.roots[found.pattern().as_usize()]);
        }
    }

    /// The roots found in everything fed so far.
    pub fn finish(self) -> RootSet {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn roots() -> RootNeedles {
        RootNeedles::new(&[
            (Root::Cwd, "/home/ann/ws".into()),
            (Root::View, "/home/ann/ws/target".into()),
            (Root::CargoHome, "/home/ann/.cargo".into()),
        ])
    }

    #[test]
    fn nested_roots_are_both_found() {
        let needles = roots();
        let mut scanner = needles.scanner();
        scanner.feed(b"xx/home/ann/ws/target/debug");
        let found = scanner.finish();
        assert!(found.contains(Root::Cwd) && found.contains(Root::View));
        assert!(!found.contains(Root::CargoHome));
    }

    proptest! {
        #[test]
        fn chunking_does_not_matter(cuts in prop::collection::vec(1_usize..9, 0..40), at in 0_usize..60) {
            let mut bytes = [b'/'; 80];
            let needle = b"/home/ann/.cargo";
            bytes[at..at + needle.len()].copy_from_slice(needle);
            let needles = roots();
            let mut scanner = needles.scanner();
            let mut rest = &bytes[..];
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                scanner.feed(head);
                rest = tail;
            }
            scanner.feed(rest);
            let found = scanner.finish();
            prop_assert!(found.contains(Root::CargoHome));
            prop_assert!(!found.contains(Root::Cwd));
        }
    }
}
