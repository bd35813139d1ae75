//! Which mode a request is served in: as its environment says, else the workspace, else the store.
//!
//! A file that does not say it clearly makes the request uncacheable: the person meant something.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;

use toml_edit::DocumentMut;
use wrapper::environment::{self, Environment};
use wrapper::mode::Mode;

use super::prepare::Refusal;

/// The name of a configuration file, in a workspace and in a store.
pub const FILE: &str = "kachefs.toml";

/// The mode of a request. Of the directories, the first with a file that names one decides.
pub(super) fn mode(environment: &Environment, directories: &[&Path]) -> Result<Mode, Refusal> {
    const UNCLEAR: Refusal = Refusal::Named("unknown-mode");
    if let Some(name) = environment::value(environment, Mode::VARIABLE.as_bytes())
        && !name.is_empty()
    {
        let name = std::str::from_utf8(name).map_err(|_| UNCLEAR)?;
        return Mode::named(name).ok_or(UNCLEAR);
    }
    for directory in directories {
        let text = match fs::read_to_string(directory.join(FILE)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(_) => return Err(UNCLEAR),
        };
        let document: DocumentMut = text.parse().map_err(|_| UNCLEAR)?;
        let Some(item) = document.get("mode") else {
            continue;
        };
        return item.as_str().and_then(Mode::named).ok_or(UNCLEAR);
    }
    Ok(Mode::default())
}

/// The directory a target lies in: where a workspace's configuration is.
pub(super) fn around(view: &str) -> &Path {
    let parent = Path::new(view).parent();
    parent.unwrap_or(Path::new(OsStr::new("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_says_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        for path in [&one, &two] {
            fs::create_dir(path).expect("mkdir");
        }
        let of = |environment: &Environment| mode(environment, &[&one, &two]).ok();
        assert_eq!(of(&[]), Some(Mode::Portable));
        fs::write(two.join(FILE), "mode = \"exact\"\n").expect("write");
        assert_eq!(of(&[]), Some(Mode::Exact));
        fs::write(one.join(FILE), "mode = \"portable\"\n").expect("write");
        assert_eq!(of(&[]), Some(Mode::Portable));
        let set = |value: &str| [(b"KACHEFS_MODE".to_vec(), value.as_bytes().to_vec())];
        assert_eq!(of(&set("exact")), Some(Mode::Exact));
        assert_eq!(of(&set("")), Some(Mode::Portable));
        assert_eq!(of(&set("other")), None);
        fs::write(one.join(FILE), "mode = 1\n").expect("write");
        assert_eq!(of(&[]), None);
        fs::write(one.join(FILE), "mode\n").expect("write");
        assert_eq!(of(&[]), None);
    }
}
