//! Splits a rustc command line into flags with canonical names, their values, and free arguments.
//!
//! Follows the rules of rustc's own option parser: bundled short flags, values attached or in the
//! next argument, `--` ending the flags. It knows the flags rustc 1.95 has and never guesses at
//! others; what a flag means is decided by the parser above it, its only caller.

use super::Uncacheable;

/// One element of a command line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Token {
    /// A flag without a value, by its canonical name.
    Flag(&'static str),
    /// A flag with its value.
    Value(&'static str, String),
    /// An argument that is not a flag.
    Free(String),
}

struct Known {
    /// How the flag is spelled in a key: the short form if there is one.
    name: &'static str,
    /// The long form without dashes, empty if there is none.
    long: &'static str,
    takes_value: bool,
    /// rustc refuses a second one.
    once: bool,
}

impl Known {
    fn short(&self) -> Option<char> {
        let mut chars = self.name.chars().skip(1);
        chars
            .next()
            .filter(|first| *first != '-' && chars.next().is_none())
    }
}

const fn flag(name: &'static str, long: &'static str) -> Known {
    Known {
        name,
        long,
        takes_value: false,
        once: false,
    }
}

const fn flag_once(name: &'static str, long: &'static str) -> Known {
    Known {
        name,
        long,
        takes_value: false,
        once: true,
    }
}

const fn many(name: &'static str, long: &'static str) -> Known {
    Known {
        name,
        long,
        takes_value: true,
        once: false,
    }
}

const fn once(name: &'static str, long: &'static str) -> Known {
    Known {
        name,
        long,
        takes_value: true,
        once: true,
    }
}

const KNOWN: &[Known] = &[
    flag("-h", "help"),
    flag("-V", "version"),
    flag_once("-v", "verbose"),
    flag("-g", ""),
    flag("-O", ""),
    flag_once("--test", "test"),
    once("-o", ""),
    many("-L", ""),
    many("-l", ""),
    many("-A", "allow"),
    many("-W", "warn"),
    many("-D", "deny"),
    many("-F", "forbid"),
    many("-C", "codegen"),
    many("-Z", ""),
    many("--force-warn", "force-warn"),
    many("--cap-lints", "cap-lints"),
    many("--cfg", "cfg"),
    many("--check-cfg", "check-cfg"),
    many("--crate-type", "crate-type"),
    once("--crate-name", "crate-name"),
    once("--edition", "edition"),
    many("--emit", "emit"),
    many("--print", "print"),
    once("--out-dir", "out-dir"),
    once("--explain", "explain"),
    once("--target", "target"),
    many("--extern", "extern"),
    once("--sysroot", "sysroot"),
    once("--error-format", "error-format"),
    many("--json", "json"),
    once("--color", "color"),
    once("--diagnostic-width", "diagnostic-width"),
    many("--remap-path-prefix", "remap-path-prefix"),
    once("--remap-path-scope", "remap-path-scope"),
    many("--env-set", "env-set"),
];

/// Splits `argv`, which excludes the compiler itself.
pub(super) fn tokens(argv: &[String]) -> Result<Vec<Token>, Uncacheable> {
    // rustc replaces every such argument by the file's lines before it looks at anything else, so
    // what looks like the value of a flag is a response file too.
    if argv.iter().any(|arg| arg.starts_with('@')) {
        return Err(Uncacheable::ResponseFile);
    }
    let mut found = Vec::with_capacity(argv.len());
    let mut rest = argv.iter();
    let mut flags_ended = false;
    while let Some(arg) = rest.next() {
        if flags_ended || arg == "-" || !arg.starts_with('-') {
            found.push(Token::Free(arg.clone()));
        } else if arg == "--" {
            flags_ended = true;
        } else if let Some(long) = arg.strip_prefix("--") {
            found.push(long_flag(arg, long, &mut rest)?);
        } else {
            short_flags(arg, &mut rest, &mut found)?;
        }
    }
    refuse_repeated(&found)?;
    Ok(found)
}

fn long_flag<'a>(
    arg: &str,
    long: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<Token, Uncacheable> {
    let unknown = || Uncacheable::UnknownFlag(arg.to_owned());
    let (name, attached) = match long.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (long, None),
    };
    let known = KNOWN
        .iter()
        .find(|known| !name.is_empty() && known.long == name);
    let known = known.ok_or_else(unknown)?;
    match (known.takes_value, attached) {
        (false, None) => Ok(Token::Flag(known.name)),
        (false, Some(_)) => Err(unknown()),
        (true, Some(value)) => Ok(Token::Value(known.name, value)),
        (true, None) => {
            let value = rest.next().ok_or_else(unknown)?;
            Ok(Token::Value(known.name, value.clone()))
        }
    }
}

fn short_flags<'a>(
    arg: &str,
    rest: &mut impl Iterator<Item = &'a String>,
    found: &mut Vec<Token>,
) -> Result<(), Uncacheable> {
    let unknown = || Uncacheable::UnknownFlag(arg.to_owned());
    let mut chars = arg.chars();
    chars.next();
    while let Some(letter) = chars.next() {
        let known = KNOWN.iter().find(|known| known.short() == Some(letter));
        let known = known.ok_or_else(unknown)?;
        if !known.takes_value {
            found.push(Token::Flag(known.name));
            continue;
        }
        let attached = chars.as_str();
        let value = if attached.is_empty() {
            rest.next().ok_or_else(unknown)?.clone()
        } else {
            attached.to_owned()
        };
        found.push(Token::Value(known.name, value));
        break;
    }
    Ok(())
}

fn refuse_repeated(found: &[Token]) -> Result<(), Uncacheable> {
    for known in KNOWN.iter().filter(|known| known.once) {
        let times = found.iter().filter(|token| match token {
            Token::Flag(name) | Token::Value(name, _) => *name == known.name,
            Token::Free(_) => false,
        });
        if times.count() > 1 {
            return Err(Uncacheable::UnknownFlag(known.name.to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(args: &[&str]) -> Result<Vec<Token>, Uncacheable> {
        tokens(&args.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    fn value(name: &'static str, value: &str) -> Token {
        Token::Value(name, value.to_owned())
    }

    #[test]
    fn spellings_of_one_flag() {
        let expected = Ok(vec![value("-C", "opt-level=3")]);
        for args in [
            &["-C", "opt-level=3"][..],
            &["-Copt-level=3"],
            &["--codegen", "opt-level=3"],
            &["--codegen=opt-level=3"],
        ] {
            assert_eq!(split(args), expected, "{args:?}");
        }
    }

    #[test]
    fn short_flags_bundle() {
        let expected = vec![Token::Flag("-v"), Token::Flag("-V")];
        assert_eq!(split(&["-vV"]), Ok(expected));
        let expected = vec![Token::Flag("-g"), Token::Flag("-O"), value("-L", "dir")];
        assert_eq!(split(&["-gOL", "dir"]), Ok(expected.clone()));
        assert_eq!(split(&["-gOLdir"]), Ok(expected));
    }

    #[test]
    fn a_value_may_look_like_a_flag() {
        assert_eq!(
            split(&["--cfg", "--test"]),
            Ok(vec![value("--cfg", "--test")])
        );
    }

    #[test]
    fn double_dash_ends_the_flags() {
        let expected = vec![Token::Flag("-g"), Token::Free("-O".to_owned())];
        assert_eq!(split(&["-g", "--", "-O"]), Ok(expected));
        assert_eq!(split(&["-"]), Ok(vec![Token::Free("-".to_owned())]));
    }

    #[test]
    fn refused() {
        let cases: &[(&[&str], &str)] = &[
            (&["--frobnicate"], "--frobnicate"),
            (&["--frobnicate=1"], "--frobnicate=1"),
            (&["--C", "opt-level=3"], "--C"),
            (&["--=x"], "--=x"),
            (&["--test=yes"], "--test=yes"),
            (&["--cfg"], "--cfg"),
            (&["-C"], "-C"),
            (&["-q"], "-q"),
            (&["-gé"], "-gé"),
            (&["---"], "---"),
            (&["--test", "--test"], "--test"),
            (&["--crate-name=a", "--crate-name", "b"], "--crate-name"),
        ];
        for (args, flag) in cases {
            assert_eq!(
                split(args),
                Err(Uncacheable::UnknownFlag((*flag).to_owned())),
                "{args:?}"
            );
        }
        assert_eq!(
            split(&["--out-dir", "@file"]),
            Err(Uncacheable::ResponseFile)
        );
        assert_eq!(split(&["--", "@file"]), Err(Uncacheable::ResponseFile));
    }
}
