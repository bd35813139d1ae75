//! What a crate does with `env!("OUT_DIR")`.
//!
//! Nearly always it names a file to include, and the file's content is in the key. Where its text
//! is put to another use (its length, its hash, a comparison), the output depends on the path and
//! need not hold it.

/// How a text uses `OUT_DIR` at compile time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// As the beginning of an included file's path.
    pub includes: bool,
    /// In a way that is not understood.
    pub other: bool,
}

impl Uses {
    /// Adds those of another text of the same crate.
    pub fn extend(&mut self, other: Self) {
        self.includes |= other.includes;
        self.other |= other.other;
    }
}

const NAME: &[u8] = b"OUT_DIR";

/// The uses in one source text. Comments on lines of their own do not count, nor does
/// `std::env::var("OUT_DIR")`, which asks when the program runs.
pub fn uses(text: &[u8]) -> Uses {
    let mut uses = Uses::default();
    let mut from = 0;
    while let Some(found) = text[from..].windows(NAME.len()).position(|at| at == NAME) {
        let (start, end) = (from + found, from + found + NAME.len());
        let (before, after) = (&text[..start], &text[end..]);
        from = end;
        let line = before
            .rsplit(|byte| *byte == b'\n')
            .next()
            .unwrap_or_default();
        if line.trim_ascii_start().starts_with(b"//") {
            continue;
        }
        let Some(before) = before
            .strip_suffix(b"\"")
            .filter(|_| after.starts_with(b"\""))
        else {
            uses.other = true;
            continue;
        };
        if is_included(before) {
            uses.includes = true;
        } else if !["var", "var_os"]
            .iter()
            .any(|name| call(before, name, "").is_some())
        {
            uses.other = true;
        }
    }
    uses
}

/// Whether a text ends with `include!(concat!(env!(`, or `include_str!`, or `include_bytes!`.
fn is_included(before: &[u8]) -> bool {
    call(before, "env", "!")
        .and_then(|before| call(before, "concat", "!"))
        .is_some_and(|before| {
            ["include", "include_str", "include_bytes"]
                .iter()
                .any(|name| call(before, name, "!").is_some())
        })
}

/// What stands before the beginning of a call that ends `text`, without the path of the name.
fn call<'a>(text: &'a [u8], name: &str, mark: &str) -> Option<&'a [u8]> {
    let text = text.trim_ascii_end().strip_suffix(b"(")?;
    let text = text.trim_ascii_end().strip_suffix(mark.as_bytes())?;
    let text = text.trim_ascii_end().strip_suffix(name.as_bytes())?;
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    if text.last().is_some_and(is_name) {
        return None;
    }
    let path = text
        .iter()
        .rposition(|byte| !is_name(byte) && *byte != b':')
        .map_or(0, |at| at + 1);
    Some(if text.ends_with(b"::") {
        &text[..path]
    } else {
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> (bool, bool) {
        let uses = uses(text.as_bytes());
        (uses.includes, uses.other)
    }

    #[test]
    fn files_are_included() {
        for text in [
            "include!(concat!(env!(\"OUT_DIR\"), \"/code.rs\"));",
            "static A: &[u8] = include_bytes!( concat!(\n  env!(\"OUT_DIR\"),\n \"/a\"));",
            "mod x { ::core::include!(::std::concat!(::std::env!(\"OUT_DIR\"), \"/x.rs\")); }",
            "let a = std::include_str!(concat!(env!(\"OUT_DIR\"), \"/x\"));",
        ] {
            assert_eq!(of(text), (true, false), "{text}");
        }
    }

    #[test]
    fn what_asks_when_it_runs_or_says_nothing() {
        for text in [
            "let out = env::var(\"OUT_DIR\").unwrap();",
            "let out = std::env::var_os( \"OUT_DIR\" );",
            "    // `OUT_DIR` is set by cargo\n//! env!(\"OUT_DIR\")",
            "",
        ] {
            assert_eq!(of(text), (false, false), "{text}");
        }
    }

    #[test]
    fn every_other_use_is_one() {
        for text in [
            "const N: usize = env!(\"OUT_DIR\").len();",
            "const N: Option<&str> = option_env!(\"OUT_DIR\");",
            "concat!(env!(\"OUT_DIR\"), \"/x\")",
            "my_include!(concat!(env!(\"OUT_DIR\"), \"/x\"))",
            "include!(my::env!(\"OUT_DIR\"))",
            "env!(stringify!(OUT_DIR))",
            "read!(\"$OUT_DIR/x\")",
            "env!(\"MY_OUT_DIR\")",
            "include_str!(concat!(x!(env!(\"OUT_DIR\")), \"/x\"))",
        ] {
            assert_eq!(of(text), (false, true), "{text}");
        }
    }

    #[test]
    fn both_are_seen() {
        let text = "include!(concat!(env!(\"OUT_DIR\"), \"/a\")); const N: usize = env!(\"OUT_DIR\").len();";
        assert_eq!(of(text), (true, true));
    }
}
