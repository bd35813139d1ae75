//! Reads the dep-info file rustc writes: which outputs, from which sources, with which environment.
//!
//! rustc escapes nothing in file names but spaces, and in the names of outputs not even those, so
//! the rules alone are ambiguous. They are not read as make would: the list of sources is taken
//! from the lines at the end, one source each, and every rule must then end in exactly that list.
//! Whatever does not fit to the byte is an error. Called when a run is recorded; never touches
//! the disk.

use std::collections::HashSet;
use std::path::PathBuf;

/// What a dep-info file says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DepInfo {
    /// The targets of the rules, as written, the dep-info file among them.
    pub outputs: Vec<PathBuf>,
    /// Every file read, once, in the order of the file. As written: relative ones are relative to
    /// the directory rustc ran in.
    pub sources: Vec<PathBuf>,
    /// Environment variables the source asked for with their values, `None` if unset. One whose
    /// name holds `=`, which no variable's can, reads as if it had a value; it never has it.
    pub env: Vec<(String, Option<String>)>,
}

/// Why a dep-info file was not understood. The run it belongs to must not be recorded.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DepInfoError {
    /// It is not UTF-8, which rustc never writes.
    #[error("dep-info is not UTF-8")]
    NotUtf8,
    /// It holds a replacement character: rustc puts it for bytes of a file name that are not
    /// UTF-8, so the name is lost.
    #[error("dep-info has lost bytes of a file name in line {0:?}")]
    LossyName(String),
    /// It does not end with a line break, so it may be cut off.
    #[error("dep-info is cut off")]
    CutOff,
    /// It names no output.
    #[error("dep-info has no rule")]
    NoRule,
    /// It names no source.
    #[error("dep-info lists no sources")]
    NoSources,
    /// A rule does not depend on exactly the sources that are listed.
    #[error("dep-info rule does not match the sources listed: {0:?}")]
    RuleMismatch(String),
    /// A line in the list of sources is no source.
    #[error("dep-info line is not a source: {0:?}")]
    BadSource(String),
    /// A line among the environment variables is not one, or has an unknown escape.
    #[error("dep-info line is not an environment variable: {0:?}")]
    BadEnv(String),
    /// A comment of an unstable compiler flag, such as `# checksum:`.
    #[error("dep-info has an unknown comment: {0:?}")]
    UnknownComment(String),
}

const ENV_PREFIX: &str = "# env-dep:";

/// Reads a whole dep-info file.
pub fn parse(text: &[u8]) -> Result<DepInfo, DepInfoError> {
    let text = std::str::from_utf8(text).map_err(|_| DepInfoError::NotUtf8)?;
    let text = text.strip_suffix('\n').ok_or(DepInfoError::CutOff)?;
    let mut blocks: Vec<Vec<&str>> = text
        .split("\n\n")
        .map(|block| block.split('\n').collect())
        .collect();
    let env = match blocks.pop_if(|block| block[0].starts_with(ENV_PREFIX)) {
        Some(lines) => lines.into_iter().map(env_line).collect::<Result<_, _>>()?,
        None => Vec::new(),
    };
    let listed = blocks.pop().ok_or(DepInfoError::NoSources)?;
    let listed = listed
        .into_iter()
        .map(source_line)
        .collect::<Result<Vec<_>, _>>()?;
    let joined = format!(": {}", listed.join(" "));
    let outputs = blocks
        .iter()
        .map(|block| rule(block, &joined))
        .collect::<Result<Vec<_>, _>>()?;
    if outputs.is_empty() {
        return Err(DepInfoError::NoRule);
    }
    let mut seen = HashSet::new();
    let sources = listed.iter().filter(|name| seen.insert(**name));
    let sources = sources
        .map(|name| PathBuf::from(name.replace("\\ ", " ")))
        .collect();
    Ok(DepInfo {
        outputs,
        sources,
        env,
    })
}

/// The source a line names, still escaped.
fn source_line(line: &str) -> Result<&str, DepInfoError> {
    if line.starts_with("# ") {
        return Err(DepInfoError::UnknownComment(line.to_owned()));
    }
    refuse_lossy(line)?;
    let bad = || DepInfoError::BadSource(line.to_owned());
    let name = line
        .strip_suffix(':')
        .filter(|name| !name.is_empty())
        .ok_or_else(bad)?;
    // rustc escapes every space; one without its backslash is not from a name.
    let spaces = name.matches(' ').count();
    if spaces == name.matches("\\ ").count() {
        Ok(name)
    } else {
        Err(bad())
    }
}

fn rule(block: &[&str], joined: &str) -> Result<PathBuf, DepInfoError> {
    let mismatch = || DepInfoError::RuleMismatch(block.join("\n"));
    let [line] = block else {
        return Err(mismatch());
    };
    refuse_lossy(line)?;
    let output = line
        .strip_suffix(joined)
        .filter(|output| !output.is_empty());
    output.map(PathBuf::from).ok_or_else(mismatch)
}

fn refuse_lossy(line: &str) -> Result<(), DepInfoError> {
    if line.contains(char::REPLACEMENT_CHARACTER) {
        return Err(DepInfoError::LossyName(line.to_owned()));
    }
    Ok(())
}

fn env_line(line: &str) -> Result<(String, Option<String>), DepInfoError> {
    let bad = || DepInfoError::BadEnv(line.to_owned());
    let rest = line.strip_prefix(ENV_PREFIX).ok_or_else(bad)?;
    let (name, value) = match rest.split_once('=') {
        Some((name, value)) => (name, Some(unescape(value).ok_or_else(bad)?)),
        None => (rest, None),
    };
    let name = unescape(name)
        .filter(|name| !name.is_empty())
        .ok_or_else(bad)?;
    Ok((name, value))
}

fn unescape(text: &str) -> Option<String> {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(letter) = chars.next() {
        plain.push(match letter {
            '\\' => match chars.next()? {
                'n' => '\n',
                'r' => '\r',
                '\\' => '\\',
                _ => return None,
            },
            letter => letter,
        });
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Written by rustc 1.95 for a crate with odd module names, `include_str!`, `include!`,
    /// `env!` and `option_env!`; a directory and the output directory have a space in their name.
    const ODD_NAMES: &str = "\
out dir/a.d: a.rs sp\\ ace/b\\ c.rs h#x.rs d$x:y.rs back\\slash.rs back\\\\ sp.rs tail\\ \
tab\tx.rs sp\\ ace/data:\\ x.txt inc.rs

out dir/liba.rmeta: a.rs sp\\ ace/b\\ c.rs h#x.rs d$x:y.rs back\\slash.rs back\\\\ sp.rs tail\\ \
tab\tx.rs sp\\ ace/data:\\ x.txt inc.rs

a.rs:
sp\\ ace/b\\ c.rs:
h#x.rs:
d$x:y.rs:
back\\slash.rs:
back\\\\ sp.rs:
tail\\:
tab\tx.rs:
sp\\ ace/data:\\ x.txt:
inc.rs:

# env-dep:EMPTY=
# env-dep:NOPE
# env-dep:WEIRD=a\\nb\\\\c\\rd=#e \u{fc}
";

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn odd_names() {
        let info = parse(ODD_NAMES.as_bytes()).expect("written by rustc");
        assert_eq!(info.outputs, paths(&["out dir/a.d", "out dir/liba.rmeta"]));
        let sources = [
            "a.rs",
            "sp ace/b c.rs",
            "h#x.rs",
            "d$x:y.rs",
            "back\\slash.rs",
            "back\\ sp.rs",
            "tail\\",
            "tab\tx.rs",
            "sp ace/data: x.txt",
            "inc.rs",
        ];
        assert_eq!(info.sources, paths(&sources));
        let env = [
            ("EMPTY".to_owned(), Some(String::new())),
            ("NOPE".to_owned(), None),
            ("WEIRD".to_owned(), Some("a\nb\\c\rd=#e ü".to_owned())),
        ];
        assert_eq!(info.env, env);
    }

    #[test]
    fn without_environment() {
        let text = "/t/deps/serde-0123.d: /src/lib.rs\n\n/src/lib.rs:\n";
        let info = parse(text.as_bytes()).expect("written by rustc");
        assert_eq!(info.outputs, paths(&["/t/deps/serde-0123.d"]));
        assert_eq!(info.sources, paths(&["/src/lib.rs"]));
        assert_eq!(info.env, []);
    }

    #[test]
    fn an_output_may_look_like_a_rule() {
        let text = "o: dir/a.d: a.rs\n\na.rs:\n";
        let info = parse(text.as_bytes()).expect("written by rustc");
        assert_eq!(info.outputs, paths(&["o: dir/a.d"]));
    }

    #[test]
    fn a_source_listed_twice_is_one_source() {
        let info = parse(b"a.d: a.rs b.rs a.rs\n\na.rs:\nb.rs:\na.rs:\n").expect("well formed");
        assert_eq!(info.sources, paths(&["a.rs", "b.rs"]));
    }

    #[test]
    fn refused() {
        use DepInfoError as E;
        let owned = str::to_owned;
        let cases: &[(&[u8], E)] = &[
            (b"", E::CutOff),
            (b"a.d: a.rs\n\na.rs:", E::CutOff),
            (b"a.d: a\xff.rs\n\na\xff.rs:\n", E::NotUtf8),
            (
                "a.d: a\u{fffd}\n\na\u{fffd}:\n".as_bytes(),
                E::LossyName(owned("a\u{fffd}:")),
            ),
            (
                "a\u{fffd}.d: a\n\na:\n".as_bytes(),
                E::LossyName(owned("a\u{fffd}.d: a")),
            ),
            (b"\n", E::BadSource(owned(""))),
            (b"a.rs:\n", E::NoRule),
            (b"# env-dep:A\n", E::NoSources),
            (b"a.d: a.rs\n", E::BadSource(owned("a.d: a.rs"))),
            (b"a.d: a.rs\n\n:\n", E::BadSource(owned(":"))),
            (b"a.d: a.rs\n\nb.rs:\n", E::RuleMismatch(owned("a.d: a.rs"))),
            (b": a.rs\n\na.rs:\n", E::RuleMismatch(owned(": a.rs"))),
            (
                b"a.d: a.rs b.rs\n\na.rs:\n",
                E::RuleMismatch(owned("a.d: a.rs b.rs")),
            ),
            (b"a.d: a b.rs\n\na b.rs:\n", E::BadSource(owned("a b.rs:"))),
            // A source whose name has a line break, as rustc writes it.
            (
                b"n.d: n.rs new\nline.rs\n\nn.rs:\nnew\nline.rs:\n",
                E::BadSource(owned("new")),
            ),
            (
                b"a.d: x:\ny\n\nx:\ny:\n",
                E::RuleMismatch(owned("a.d: x:\ny")),
            ),
            (
                b"n.d: n.rs\n\nn.rs:\n# checksum:blake3=c486 file_len:30 n.rs\n",
                E::UnknownComment(owned("# checksum:blake3=c486 file_len:30 n.rs")),
            ),
            (
                b"a.d: a\n\na:\n\n# env-dep:A=\\t\n",
                E::BadEnv(owned("# env-dep:A=\\t")),
            ),
            (
                b"a.d: a\n\na:\n\n# env-dep:A=\\\n",
                E::BadEnv(owned("# env-dep:A=\\")),
            ),
            (
                b"a.d: a\n\na:\n\n# env-dep:\n",
                E::BadEnv(owned("# env-dep:")),
            ),
            (b"a.d: a\n\na:\n\n# env-dep:A\nB\n", E::BadEnv(owned("B"))),
            (b"a.d: a\n\na:\n\n# env-dep:A\n\n", E::BadEnv(owned(""))),
        ];
        for (text, error) in cases {
            let shown = String::from_utf8_lossy(text);
            assert_eq!(parse(text), Err(error.clone()), "{shown:?}");
        }
    }

    /// A dep-info file as rustc writes it.
    fn render(info: &DepInfo) -> String {
        let name = |path: &PathBuf| path.display().to_string().replace(' ', "\\ ");
        let sources: Vec<String> = info.sources.iter().map(name).collect();
        let joined = sources.join(" ");
        let mut text = String::new();
        for output in &info.outputs {
            text.extend([&output.display().to_string(), ": ", &joined, "\n\n"]);
        }
        for source in &sources {
            text.extend([source, ":\n"]);
        }
        if !info.env.is_empty() {
            text.push('\n');
        }
        let escape = |text: &str| {
            text.replace('\\', "\\\\")
                .replace('\n', "\\n")
                .replace('\r', "\\r")
        };
        for (name, value) in &info.env {
            text.extend([ENV_PREFIX, &escape(name)]);
            if let Some(value) = value {
                text.extend(["=", &escape(value)]);
            }
            text.push('\n');
        }
        text
    }

    fn dep_info(name: &'static str) -> impl Strategy<Value = DepInfo> {
        let env = ("[^=]{1,8}", proptest::option::of("[\\\\nr \n\r=#a]{0,12}"));
        (
            proptest::collection::vec(name.prop_map(PathBuf::from), 1..4),
            proptest::collection::hash_set(name.prop_map(PathBuf::from), 1..6),
            proptest::collection::vec(env, 0..4),
        )
            .prop_map(|(outputs, sources, env)| DepInfo {
                outputs,
                sources: sources.into_iter().collect(),
                env,
            })
    }

    proptest! {
        #[test]
        fn never_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn never_panics_on_near_misses(text in "([a: \\\\\n#]|# env-dep:|: a|a:\n){0,40}") {
            let _ = parse(text.as_bytes());
        }

        #[test]
        fn reads_back_what_rustc_writes(info in dep_info("[a: \\\\#$%\t\r/.]{1,10}")) {
            prop_assert_eq!(parse(render(&info).as_bytes()), Ok(info));
        }

        /// Names with line breaks cannot be told apart in general: never read wrongly.
        #[test]
        fn line_breaks_in_sources_are_refused(info in dep_info("[a:\n\\\\ ]{1,6}")) {
            if let Ok(read) = parse(render(&info).as_bytes()) {
                prop_assert_eq!(read, info);
            }
        }
    }
}
