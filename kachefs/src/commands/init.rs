//! Sets `build.rustc-wrapper` in cargo's configuration on first use.
//!
//! Keeps the file's format and comments, changes nothing when a wrapper is configured already,
//! and says in one line what it did or what to do.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use toml_edit::{DocumentMut, Item, Table, value};

use crate::config_file::{parse, write};

/// Name of the wrapper's program.
pub(super) const WRAPPER: &str = "kachefs-rustc";

/// What cargo's configuration says about wrappers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Configured {
    /// No wrapper.
    Nothing,
    /// Ours.
    Kachefs,
    /// Another one.
    Other(String),
}

/// What is to be done so that cargo uses the wrapper: a file to write, and something to say.
#[derive(Debug, Default)]
pub(super) struct Setup {
    write: Option<(PathBuf, String)>,
    say: Option<String>,
}

impl Setup {
    /// Nothing to do.
    pub(super) fn nothing() -> Self {
        Self::default()
    }

    fn only_say(text: String) -> Self {
        Self {
            write: None,
            say: Some(text),
        }
    }

    /// Does it.
    pub(super) fn apply(self) -> Result<()> {
        if let Some((path, text)) = &self.write {
            write(path, text)?;
        }
        if let Some(text) = self.say {
            println!("{text}");
        }
        Ok(())
    }
}

/// How to make cargo use the wrapper for builds into `target`, unless it uses one already. Changes
/// nothing.
pub(super) fn plan(target: &Path) -> Result<Setup> {
    if let Some(wrapper) = env::var_os("RUSTC_WRAPPER").filter(|wrapper| !wrapper.is_empty()) {
        let wrapper = Path::new(&wrapper);
        if is_ours(wrapper) {
            return Ok(Setup::nothing());
        }
        return Ok(Setup::only_say(format!(
            "RUSTC_WRAPPER={} stands before cargo's configuration, which is left as it is; to use \
             kachefs, set RUSTC_WRAPPER={WRAPPER}",
            wrapper.display()
        )));
    }
    let path = config_path()?;
    let mut document = parse(&path)?;
    if let Some((project, other)) = projects_own(target, &path) {
        return Ok(Setup::only_say(foreign(&project, &other)));
    }
    match configured(&document) {
        Configured::Kachefs => Ok(Setup::nothing()),
        Configured::Other(other) => Ok(Setup::only_say(foreign(&path, &other))),
        Configured::Nothing => {
            let wrapper = wrapper_path()?;
            set(&mut document, &wrapper)
                .with_context(|| format!("{} is left as it is", path.display()))?;
            let say = format!(
                "set build.rustc-wrapper = \"{wrapper}\" in {}",
                path.display()
            );
            Ok(Setup {
                write: Some((path, document.to_string())),
                say: Some(say),
            })
        }
    }
}

fn foreign(path: &Path, other: &str) -> String {
    format!(
        "{} already uses the wrapper {other}: left as it is; to use kachefs, set \
         build.rustc-wrapper = \"{WRAPPER}\" there or RUSTC_WRAPPER={WRAPPER}",
        path.display()
    )
}

/// Another wrapper in a configuration file of the project, which goes before the user's (cargo book,
/// "Hierarchical structure"), and where it is.
pub(super) fn projects_own(target: &Path, users: &Path) -> Option<(PathBuf, String)> {
    let files = target.ancestors().skip(1).flat_map(|directory| {
        let directory = directory.join(".cargo");
        [directory.join("config.toml"), directory.join("config")]
    });
    for file in files.filter(|file| file != users && file.is_file()) {
        // One that does not parse is cargo's to complain of.
        match parse(&file).map(|document| configured(&document)) {
            Ok(Configured::Other(other)) => return Some((file, other)),
            Ok(Configured::Kachefs) => return None,
            Ok(Configured::Nothing) | Err(_) => {}
        }
    }
    None
}

/// The wrapper configured for the user.
pub(super) fn current() -> Result<Configured> {
    Ok(configured(&parse(&config_path()?)?))
}

/// The wrapper beside this program, as an absolute path: cargo need not find it in PATH.
pub(super) fn wrapper_path() -> Result<String> {
    let own = env::current_exe().context("cannot find the kachefs program")?;
    let wrapper = own.with_file_name(WRAPPER);
    if !wrapper.is_file() {
        return Err(anyhow!(
            "{} is missing; install both programs together",
            wrapper.display()
        ));
    }
    wrapper
        .into_os_string()
        .into_string()
        .map_err(|path| anyhow!("{} is not UTF-8", Path::new(&path).display()))
}

/// `$CARGO_HOME/config.toml`, or the old `config` where only that exists.
fn config_path() -> Result<PathBuf> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set; use --no-init")?;
    let (new, old) = (home.join("config.toml"), home.join("config"));
    Ok(if !new.exists() && old.is_file() {
        old
    } else {
        new
    })
}

fn is_ours(wrapper: &Path) -> bool {
    wrapper.file_name().is_some_and(|name| name == WRAPPER)
}

fn configured(document: &DocumentMut) -> Configured {
    let build = document.get("build").and_then(Item::as_table_like);
    let Some(wrapper) = build.and_then(|build| build.get("rustc-wrapper")) else {
        return Configured::Nothing;
    };
    match wrapper.as_str() {
        Some("") => Configured::Nothing,
        Some(wrapper) if is_ours(Path::new(wrapper)) => Configured::Kachefs,
        Some(other) => Configured::Other(other.to_owned()),
        // Not what we would write: whatever it means, it is not ours to change.
        None => Configured::Other(wrapper.to_string().trim().to_owned()),
    }
}

fn set(document: &mut DocumentMut, wrapper: &str) -> Result<()> {
    let build = document
        .entry("build")
        .or_insert_with(|| Item::Table(Table::new()));
    let build = build
        .as_table_like_mut()
        .context("`build` in cargo's configuration is no table")?;
    build.insert("rustc-wrapper", value(wrapper));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_set(text: &str) -> String {
        let mut document: DocumentMut = text.parse().expect("parses");
        assert_eq!(configured(&document), Configured::Nothing);
        set(&mut document, "/bin/kachefs-rustc").expect("sets");
        assert_eq!(configured(&document), Configured::Kachefs);
        document.to_string()
    }

    #[test]
    fn comments_and_order_stay() {
        let text = "# mine\n[net]\noffline = true # keep\n\n[build] # b\njobs = 2\n";
        assert_eq!(
            after_set(text),
            format!("{text}rustc-wrapper = \"/bin/kachefs-rustc\"\n")
        );
        assert_eq!(
            after_set(""),
            "[build]\nrustc-wrapper = \"/bin/kachefs-rustc\"\n"
        );
        assert!(after_set("build = { jobs = 2 }\n").contains("rustc-wrapper"));
    }

    #[test]
    fn another_wrapper_is_recognised() {
        let document: DocumentMut = "[build]\nrustc-wrapper = \"sccache\"\n"
            .parse()
            .expect("parses");
        assert_eq!(configured(&document), Configured::Other("sccache".into()));
    }
}
