//! Files in TOML that people write as well: read with errors of one line, written whole.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use toml_edit::{DocumentMut, TomlError};

/// What a file says; nothing where there is none.
pub fn parse(path: &Path) -> Result<DocumentMut> {
    read(path)?
        .parse()
        .map_err(|error: TomlError| anyhow!("{} does not parse: {}", path.display(), line(&error)))
}

/// What is wrong, without the excerpt that takes several lines.
fn line(error: &TomlError) -> String {
    error.message().lines().collect::<Vec<_>>().join(", ")
}

fn read(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => result.with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Writes beside and renames: a crash leaves the old file or the new one.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    // A link (dotfiles kept elsewhere) stays a link.
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let parent = real.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(context)?;
    // A name of its own: two first mounts may be here at once.
    let mut temporary = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(parent)
        .with_context(context)?;
    temporary.write_all(text.as_bytes()).with_context(context)?;
    if let Ok(meta) = fs::metadata(&real) {
        fs::set_permissions(temporary.path(), meta.permissions()).with_context(context)?;
    }
    temporary.persist(&real).map(drop).with_context(context)
}
