//! What a static archive holds, whatever rustc called the objects in it.
//!
//! With incremental compilation rustc puts a text made up anew by each run into the names of objects
//! (`a.1wm2.0dvm5fw.rcgu.o`), so that no two rlibs are the same. `kachefs verify` compares what they
//! hold instead: members in order, names without that text, and the symbols.

use store::{Digest, Hasher};

/// How an archive begins (ar(5)).
const MAGIC: &[u8] = b"!<arch>\n";
/// What stands before each member.
const HEADER: usize = 60;
/// How names of objects end.
const OBJECT: &[u8] = b".rcgu.o";

/// The digest of what an archive holds; `None` for what is none, or is not understood.
pub fn digest(bytes: &[u8]) -> Option<Digest> {
    let mut rest = bytes.strip_prefix(MAGIC)?;
    let mut names: &[u8] = &[];
    let mut hasher = Hasher::new("kachefs members of an archive");
    while !rest.is_empty() {
        let (header, after) = rest.split_at_checked(HEADER)?;
        let name = header[..16].trim_ascii_end();
        let size = std::str::from_utf8(header[48..58].trim_ascii_end()).ok()?;
        let (content, after) = after.split_at_checked(size.parse().ok()?)?;
        match name {
            b"//" => names = content,
            // Where members are, which follows from how long their names are; then the symbols.
            b"/" => drop(hasher.field(symbols(content)?)),
            _ => {
                let name = long_name(name, names).unwrap_or(name);
                hasher.field(&stable(name)).field(content);
            }
        }
        // Members begin at even places.
        rest = match after {
            [b'\n', after @ ..] if content.len() % 2 == 1 => after,
            after => after,
        };
    }
    Some(hasher.finish())
}

/// The names in a symbol table: a number, as many places, the names.
fn symbols(table: &[u8]) -> Option<&[u8]> {
    let (count, rest) = table.split_first_chunk()?;
    let places = usize::try_from(u32::from_be_bytes(*count))
        .ok()?
        .checked_mul(4)?;
    rest.get(places..)
}

/// A name that is longer than its field: `/17` stands for what is there in the table of names.
fn long_name<'a>(name: &[u8], names: &'a [u8]) -> Option<&'a [u8]> {
    let at = std::str::from_utf8(name.strip_prefix(b"/")?).ok()?;
    let name = names.get(at.parse().ok()?..)?;
    name.split(|byte| *byte == b'\n').next()
}

/// A name without what was made up: the part before the ending.
fn stable(name: &[u8]) -> Vec<u8> {
    let name = name.strip_suffix(b"/").unwrap_or(name);
    let made_up = |start: &[u8]| {
        let dot = start.iter().rposition(|byte| *byte == b'.')?;
        // A crate and its unit come before it.
        start[..dot].contains(&b'.').then_some(dot)
    };
    match name.strip_suffix(OBJECT) {
        Some(start) => match made_up(start) {
            Some(dot) => [&start[..dot], OBJECT].concat(),
            None => name.to_vec(),
        },
        None => name.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, content: &[u8]) -> Vec<u8> {
        let size = content.len();
        let header = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, 644);
        let mut bytes = header.into_bytes();
        bytes.extend_from_slice(content);
        if size % 2 == 1 {
            bytes.push(b'\n');
        }
        bytes
    }

    fn archive(made_up: &str, content: &[u8]) -> Vec<u8> {
        let names = format!("a.0081riakw7bwbjesc.{made_up}.rcgu.o/\n");
        let mut symbols = vec![
            0,
            0,
            0,
            1,
            0,
            0,
            0,
            u8::try_from(made_up.len()).expect("short"),
        ];
        symbols.extend_from_slice(b"name\0");
        let parts = [
            MAGIC.to_vec(),
            member("/", &symbols),
            member("//", names.as_bytes()),
            member("lib.rmeta/", b"odd"),
            member("/0", content),
        ];
        parts.concat()
    }

    #[test]
    fn made_up_names_do_not_matter() {
        let one = digest(&archive("0dvm5fw", b"object")).expect("an archive");
        assert_eq!(digest(&archive("06cluw4x", b"object")), Some(one));
        assert_ne!(digest(&archive("0dvm5fw", b"objecT")), Some(one));
    }

    #[test]
    fn what_is_no_archive_has_no_members() {
        for bytes in [&b""[..], b"\x7fELF", b"!<arch>\nshort", b"!<thin>\n"] {
            assert_eq!(digest(bytes), None);
        }
        let mut cut = archive("0dvm5fw", b"object");
        cut.truncate(cut.len() - 1);
        assert_eq!(digest(&cut), None);
    }

    #[test]
    fn only_objects_of_rustc_have_made_up_parts() {
        assert_eq!(stable(b"a.unit.made.rcgu.o/"), b"a.unit.rcgu.o");
        for name in [&b"a.rcgu.o"[..], b"a.unit.rcgu.o", b"lib.rmeta", b"x.y.z.o"] {
            assert_eq!(stable(name), name);
        }
    }
}
