//! Whether what a compiler did with a reduced environment is what cargo asked for.
//!
//! Decided by the daemon; by the thin client itself when its daemon is gone.

use crate::depinfo;
use crate::protocol::Verdict;

/// What a failed rustc says of a variable that is not there.
const UNDEFINED: &[u8] = b"not defined at compile time";

/// What a failed rustc says when a macro gave up, perhaps for want of a variable it looked for while it
/// ran.
const PANICKED: [&[u8]; 3] = [
    b"proc macro panicked",
    b"proc-macro derive panicked",
    b"custom attribute panicked",
];

/// Whether the compiler looked, by `env!` or `option_env!`, for a variable of those `removed` from
/// its environment, or may have failed because a macro did. `dep_info` reads what it wrote about a run
/// that succeeded.
pub fn verdict(
    success: bool,
    stderr: &[u8],
    removed: &[Vec<u8>],
    dep_info: impl FnOnce() -> Option<Vec<u8>>,
) -> Verdict {
    if removed.is_empty() {
        return Verdict::Stands;
    }
    let holds = |needle: &[u8]| stderr.windows(needle.len()).any(|part| part == needle);
    let looked = if success {
        dep_info()
            .and_then(|text| depinfo::parse(&text).ok())
            .is_some_and(|info| {
                info.env
                    .iter()
                    .any(|(name, _)| removed.iter().any(|removed| removed == name.as_bytes()))
            })
    } else {
        holds(UNDEFINED) && removed.iter().any(|name| holds(name))
            || PANICKED.iter().any(|said| holds(said))
    };
    if looked {
        Verdict::Redo
    } else {
        Verdict::Stands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_removed_and_looked_for_counts() {
        let info = |name: &str| Some(format!("a: b\n\nb:\n\n# env-dep:{name}=x\n").into_bytes());
        let removed = [b"TERM".to_vec()];
        let ran = |name: &str| verdict(true, b"", &removed, || info(name));
        assert_eq!(ran("TERM"), Verdict::Redo);
        assert_eq!(ran("OTHER"), Verdict::Stands);
        assert_eq!(verdict(true, b"", &[], || info("TERM")), Verdict::Stands);
        assert_eq!(verdict(true, b"", &removed, || None), Verdict::Stands);
        let failed = |stderr: &[u8]| verdict(false, stderr, &removed, || None);
        let said = b"environment variable `TERM` not defined at compile time";
        assert_eq!(failed(said), Verdict::Redo);
        assert_eq!(failed(b"error: proc macro panicked"), Verdict::Redo);
        assert_eq!(failed(b"TERM is mistyped"), Verdict::Stands);
        assert_eq!(failed(b"`X` not defined at compile time"), Verdict::Stands);
    }
}
