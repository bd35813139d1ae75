//! Reads `ar` archives, as rlibs are, to compare what two runs of rustc put into them.

use std::hash::{DefaultHasher, Hash, Hasher};

const MAGIC: &[u8] = b"!<arch>\n";
const HEADER: usize = 60;

/// A hash of the members of an archive, in order: their names, without the part that names the run
/// of the compiler, and their bytes. `None` if it is no archive.
pub fn digest(archive: &[u8]) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    let mut rest = archive.strip_prefix(MAGIC)?;
    let mut long_names: &[u8] = &[];
    while !rest.is_empty() {
        let (header, after) = rest.split_at_checked(HEADER)?;
        let size: usize = text(header.get(48..58)?)?.parse().ok()?;
        let bytes = after.get(..size)?;
        // Members begin at even offsets.
        rest = after.get(size + size % 2..).unwrap_or_default();
        match text(header.get(..16)?)? {
            // The symbol table follows from the members, and its offsets from their names.
            "/" | "/SYM64/" => {}
            "//" => long_names = bytes,
            name => {
                let name = match name.strip_prefix('/') {
                    Some(offset) => {
                        let long = long_names.get(offset.parse::<usize>().ok()?..)?;
                        text(long.split(|&byte| byte == b'\n').next()?)?
                    }
                    None => name,
                };
                without_run(name.trim_end_matches('/')).hash(&mut hasher);
                bytes.hash(&mut hasher);
            }
        }
    }
    Some(hasher.finish())
}

fn text(bytes: &[u8]) -> Option<&str> {
    Some(str::from_utf8(bytes).ok()?.trim_end())
}

/// `crate-hash.unit.run.rcgu.o` without `run`.
fn without_run(name: &str) -> String {
    match name.split('.').collect::<Vec<_>>()[..] {
        [krate, unit, _run, "rcgu", "o"] => format!("{krate}.{unit}.rcgu.o"),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive as rustc writes it: long names in a table of their own.
    fn archive(members: &[(&str, &str)]) -> Vec<u8> {
        let mut names = String::new();
        let mut body = Vec::new();
        let member = |name: &str, bytes: &str| {
            let padding = if bytes.len() % 2 == 1 { "\n" } else { "" };
            let header = format!("{name:<16}{:<32}{:<10}`\n", 0, bytes.len());
            format!("{header}{bytes}{padding}").into_bytes()
        };
        for (name, bytes) in members {
            body.extend(member(&format!("/{}", names.len()), bytes));
            names.extend([name, "/\n"]);
        }
        [MAGIC, &member("/", "table"), &member("//", &names), &body].concat()
    }

    #[test]
    fn names_of_the_run_do_not_count_and_all_else_does() {
        let digest = |members: &[(&str, &str)]| digest(&archive(members)).expect("an archive");
        let one = digest(&[("lib.rmeta", "meta"), ("a-1.unit.run1.rcgu.o", "object")]);
        assert_eq!(
            one,
            digest(&[("lib.rmeta", "meta"), ("a-1.unit.another.rcgu.o", "object")])
        );
        assert_ne!(
            one,
            digest(&[("lib.rmeta", "meta"), ("a-1.unit.run1.rcgu.o", "objecT")])
        );
        assert_ne!(
            one,
            digest(&[("lib.rmeta", "mete"), ("a-1.unit.run1.rcgu.o", "object")])
        );
        assert_ne!(
            one,
            digest(&[("lib.rmeta", "meta"), ("a-1.other.run1.rcgu.o", "object")])
        );
        assert_ne!(one, digest(&[("lib.rmeta", "meta")]));
    }

    #[test]
    fn what_is_no_archive_has_no_digest() {
        assert_eq!(digest(b"\x7fELF"), None);
        assert_eq!(digest(b"!<arch>\nshort"), None);
    }
}
