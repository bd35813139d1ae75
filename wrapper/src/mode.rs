//! How far results travel: between checkouts, or only to where every path is the same.
//!
//! Part of the invocation digest, so the two never share a result. Decided by the daemon, from the
//! request's environment and from configuration files.

/// What a compiler is told besides what cargo tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Paths are remapped, and results are shared between checkouts.
    #[default]
    Portable,
    /// Nothing is added: outputs are what plain cargo makes, and hit where all roots are the same.
    Exact,
}

impl Mode {
    /// The variable that chooses one, before any file does.
    pub const VARIABLE: &str = "KACHEFS_MODE";

    /// The mode of this name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "portable" => Some(Self::Portable),
            "exact" => Some(Self::Exact),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Mode::named("exact"), Some(Mode::Exact));
        assert_eq!(Mode::named("portable"), Some(Mode::default()));
        assert_eq!(Mode::named("Exact"), None);
    }
}
