//! Writes small cargo workspaces. They have path dependencies only, so no network is needed.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Must, tree};

/// A cargo package to be written: a manifest and files.
#[derive(Clone, Debug)]
pub struct Package {
    name: String,
    lib: String,
    dependencies: Vec<String>,
    manifest: String,
    files: Vec<(String, String)>,
}

impl Package {
    /// A package without any target yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            lib: String::new(),
            dependencies: Vec::new(),
            manifest: String::new(),
            files: Vec::new(),
        }
    }

    /// Adds a library.
    #[must_use]
    pub fn lib(self, source: &str) -> Self {
        self.file("src/lib.rs", source)
    }

    /// Adds a library that is a proc macro.
    #[must_use]
    pub fn proc_macro(mut self, source: &str) -> Self {
        "proc-macro = true\n".clone_into(&mut self.lib);
        self.lib(source)
    }

    /// Adds a library of other crate types, such as `"cdylib", "staticlib"`.
    #[must_use]
    pub fn lib_of(mut self, crate_types: &str, source: &str) -> Self {
        self.lib = format!("crate-type = [{crate_types}]\n");
        self.lib(source)
    }

    /// Adds a binary of the package's name.
    #[must_use]
    pub fn bin(self, source: &str) -> Self {
        self.file("src/main.rs", source)
    }

    /// Adds a build script.
    #[must_use]
    pub fn build_script(self, source: &str) -> Self {
        self.file("build.rs", source)
    }

    /// Adds a dependency on another package of the workspace.
    #[must_use]
    pub fn dep(mut self, name: &str) -> Self {
        self.dependencies.push(name.to_owned());
        self
    }

    /// Adds text to the end of the manifest.
    #[must_use]
    pub fn manifest(mut self, text: &str) -> Self {
        self.manifest.push_str(text);
        self
    }

    /// Adds a file.
    #[must_use]
    pub fn file(mut self, path: &str, contents: &str) -> Self {
        self.files.push((path.to_owned(), contents.to_owned()));
        self
    }

    fn write(&self, dir: &Path) {
        let mut manifest = format!(
            "[package]\nname = \"{}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n",
            self.name
        );
        if !self.lib.is_empty() {
            let _ = writeln!(manifest, "[lib]\n{}", self.lib);
        }
        manifest.push_str("[dependencies]\n");
        for name in &self.dependencies {
            let _ = writeln!(manifest, "{name} = {{ path = \"../{name}\" }}");
        }
        let _ = write!(manifest, "\n{}", self.manifest);
        write_file(&dir.join("Cargo.toml"), &manifest);
        for (path, contents) in &self.files {
            write_file(&dir.join(path), contents);
        }
    }
}

/// A cargo workspace on the disk: packages in `crates/<name>`.
#[derive(Clone, Debug)]
pub struct Project {
    root: PathBuf,
}

impl Project {
    /// Writes a workspace of these packages to `root`.
    #[track_caller]
    pub fn new(root: impl Into<PathBuf>, packages: &[Package]) -> Self {
        let project = Self { root: root.into() };
        project.write(
            "Cargo.toml",
            "[workspace]\nresolver = \"3\"\nmembers = [\"crates/*\"]\n",
        );
        for package in packages {
            package.write(&project.path(&format!("crates/{}", package.name)));
        }
        project
    }

    /// A project that is already there.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory of the project.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below the project.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The target directory.
    pub fn target(&self) -> PathBuf {
        self.path("target")
    }

    /// A binary of the dev profile.
    pub fn program(&self, name: &str) -> PathBuf {
        self.root.join("target/debug").join(name)
    }

    /// Writes a file, making its parents.
    #[track_caller]
    pub fn write(&self, name: &str, contents: &str) {
        write_file(&self.path(name), contents);
    }

    /// Reads a file.
    #[track_caller]
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).must(name)
    }

    /// Removes a file.
    #[track_caller]
    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).must(name);
    }

    /// Replaces a piece of text in a file; the test fails if it is not there.
    #[track_caller]
    pub fn replace(&self, name: &str, from: &str, to: &str) {
        let text = self.read(name);
        assert!(text.contains(from), "{name} does not contain {from:?}");
        self.write(name, &text.replace(from, to));
    }

    /// Another checkout of this project, without its target directory.
    #[must_use]
    #[track_caller]
    pub fn checkout(&self, root: impl Into<PathBuf>) -> Self {
        let copy = Self { root: root.into() };
        tree::copy(&self.root, &copy.root, &["target"]);
        copy
    }
}

impl AsRef<Path> for Project {
    fn as_ref(&self) -> &Path {
        &self.root
    }
}

#[track_caller]
fn write_file(path: &Path, contents: &str) {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).must(parent.display());
    }
    fs::write(path, contents).must(path.display());
}
