//! Gives flags their meaning: from the tokens of a command line to an `Invocation`.
//!
//! Flags are taken in order, so the first one that is not understood is the one reported; what must
//! be present is checked at the end. It decides nothing about `-C` options and linker arguments,
//! which have rooms of their own. Called by `parse` only.

use std::path::{Path, PathBuf};

use super::getopt::{self, Token};
use super::{
    CrateType, Emit, Extern, Invocation, Search, SearchKind, SplitDebuginfo, Uncacheable, absolute,
};
use super::{codegen, link};

/// Crates of the toolchain that may be named without a file.
const SYSROOT_CRATES: &[&str] = &["proc_macro", "std", "core", "alloc", "test"];

/// The state of reading one command line.
pub(super) struct Parser<'a> {
    pub(super) cwd: &'a Path,
    /// What has been understood; names and directories that must be given are empty until then.
    pub(super) run: Invocation,
    /// `-C rpath` is on.
    pub(super) rpath: bool,
    sources: Vec<String>,
    color: Option<String>,
    json_errors: bool,
}

/// Reads a whole command line.
pub(super) fn parse(argv: &[String], cwd: &Path) -> Result<Invocation, Uncacheable> {
    let tokens = getopt::tokens(argv)?;
    // cargo's probe is a query that also reads standard input, and the name should say query.
    if tokens.iter().any(is_query) {
        return Err(Uncacheable::NotACompile);
    }
    let mut parser = Parser::new(cwd);
    for token in tokens {
        match token {
            Token::Free(source) => parser.source(source)?,
            Token::Flag(name) => parser.flag(name)?,
            Token::Value(name, value) => parser.value(name, &value)?,
        }
    }
    parser.finish()
}

fn is_query(token: &Token) -> bool {
    match token {
        Token::Flag(name) => matches!(*name, "-h" | "-V"),
        Token::Value("--print" | "--explain", _) => true,
        Token::Value("-C" | "-A" | "-W" | "-D" | "-F" | "--force-warn" | "-Z", value) => {
            value == "help"
        }
        Token::Value(..) | Token::Free(_) => false,
    }
}

impl<'a> Parser<'a> {
    pub(super) fn new(cwd: &'a Path) -> Self {
        let run = Invocation {
            crate_name: String::new(),
            crate_types: Vec::new(),
            test: false,
            source: PathBuf::new(),
            out_dir: PathBuf::new(),
            extra_filename: String::new(),
            emit: Emit::default(),
            externs: Vec::new(),
            searches: Vec::new(),
            native_libs: Vec::new(),
            incremental: None,
            linker: None,
            linker_flavor: None,
            link_args: Vec::new(),
            target: None,
            sysroot: None,
            split_debuginfo: SplitDebuginfo::Off,
            native_cpu: false,
            input_files: Vec::new(),
            user_remaps: Vec::new(),
            json_artifacts: false,
            keyed: Vec::new(),
        };
        Self {
            cwd,
            run,
            rpath: false,
            sources: Vec::new(),
            color: None,
            json_errors: false,
        }
    }

    fn source(&mut self, source: String) -> Result<(), Uncacheable> {
        if source == "-" {
            return Err(Uncacheable::StdinSource);
        }
        // Behind `--` a file may be called like a flag; in `keyed` the two would look alike.
        if source.starts_with('-') {
            return Err(Uncacheable::UnknownFlag(source));
        }
        self.run.keyed.push(source.clone());
        self.sources.push(source);
        Ok(())
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Result<(), Uncacheable> {
        match name {
            "--test" => self.run.test = true,
            "-g" | "-O" | "-v" => {}
            _ => return Err(Uncacheable::UnknownFlag(name.to_owned())),
        }
        self.run.keyed.push(name.to_owned());
        Ok(())
    }

    pub(super) fn value(&mut self, name: &'static str, value: &str) -> Result<(), Uncacheable> {
        let spelled = if name.starts_with("--") {
            format!("{name}={value}")
        } else if value.is_empty() {
            // rustc has no use for it, and attached it would take the next argument for its value.
            return Err(Uncacheable::UnknownFlag(name.to_owned()));
        } else {
            [name, value].concat()
        };
        let run = &mut self.run;
        match name {
            "-C" => return codegen::take(self, value),
            "-L" => return self.search(value),
            "--extern" => return self.external(value),
            // It only lets others be understood, each of which is looked at by itself.
            "-Z" if value == "unstable-options" => {}
            "-Z" | "--env-set" => return Err(Uncacheable::UnstableFlag(spelled)),
            "-o" => return Err(Uncacheable::NoOutDir),
            "--out-dir" => {
                if value.is_empty() {
                    return Err(Uncacheable::NoOutDir);
                }
                run.out_dir = absolute(self.cwd, value);
                return Ok(());
            }
            "--diagnostic-width" => return Ok(()),
            "--color" => {
                self.color = Some(spelled);
                return Ok(());
            }
            "--crate-name" => value.clone_into(&mut run.crate_name),
            "--crate-type" => self.crate_types(value)?,
            "--emit" => self.emit(value)?,
            "--json" => self.json(value)?,
            "--error-format" => self.json_errors = value == "json",
            "--target" => {
                if Path::new(value)
                    .extension()
                    .is_some_and(|extension| extension == "json")
                {
                    run.input_files.push(absolute(self.cwd, value));
                }
                run.target = Some(value.to_owned());
            }
            "--sysroot" => run.sysroot = Some(absolute(self.cwd, value)),
            "--remap-path-prefix" => run.user_remaps.push(value.to_owned()),
            "-l" => run.native_libs.push(value.to_owned()),
            // Lint levels, cfgs and the rest: the text says it all.
            "-A" | "-W" | "-D" | "-F" | "--force-warn" | "--cap-lints" | "--cfg"
            | "--check-cfg" | "--edition" | "--remap-path-scope" => {}
            _ => return Err(Uncacheable::UnknownFlag(spelled)),
        }
        self.run.keyed.push(spelled);
        Ok(())
    }

    fn search(&mut self, value: &str) -> Result<(), Uncacheable> {
        let (kind, word, path) = match value.split_once('=') {
            Some(("dependency", path)) => (SearchKind::Dependency, "dependency", path),
            Some(("crate", path)) => (SearchKind::Crate, "crate", path),
            Some(("native", path)) => (SearchKind::Native, "native", path),
            Some(("framework", path)) => (SearchKind::Framework, "framework", path),
            Some(("all", path)) => (SearchKind::All, "all", path),
            // Any other word before `=` belongs to the path.
            _ => (SearchKind::All, "all", value),
        };
        if path.is_empty() {
            return Err(Uncacheable::UnknownFlag(format!("-L{value}")));
        }
        if path.starts_with("@RUSTC_BUILTIN") {
            return Err(Uncacheable::UnstableFlag(format!("-L{value}")));
        }
        if kind != SearchKind::Dependency {
            self.run.keyed.push(format!("-L{word}={path}"));
        }
        self.run.searches.push(Search {
            kind,
            path: absolute(self.cwd, path),
        });
        Ok(())
    }

    fn external(&mut self, value: &str) -> Result<(), Uncacheable> {
        let (left, path) = match value.split_once('=') {
            Some((left, path)) => (left, Some(path)),
            None => (value, None),
        };
        let (options, name) = left.split_once(':').unwrap_or(("", left));
        let keyed = match path {
            Some("") => return Err(Uncacheable::UnknownFlag(format!("--extern={value}"))),
            Some(path) => {
                // The crate type is told by the file name; the content is keyed by its digest.
                let file = Path::new(path).file_name().and_then(|file| file.to_str());
                format!("--extern={left}={}", file.unwrap_or(path))
            }
            None if SYSROOT_CRATES.contains(&name) => format!("--extern={left}"),
            None => return Err(Uncacheable::ExternWithoutPath(name.to_owned())),
        };
        self.run.keyed.push(keyed);
        self.run.externs.push(Extern {
            options: options.to_owned(),
            name: name.to_owned(),
            path: path.map(|path| absolute(self.cwd, path)),
        });
        Ok(())
    }

    fn crate_types(&mut self, value: &str) -> Result<(), Uncacheable> {
        for word in value.split(',') {
            let kind = match word {
                "lib" => CrateType::Lib,
                "rlib" => CrateType::Rlib,
                "dylib" => CrateType::Dylib,
                "cdylib" => CrateType::Cdylib,
                "staticlib" => CrateType::Staticlib,
                "bin" => CrateType::Bin,
                "proc-macro" => CrateType::ProcMacro,
                _ => return Err(Uncacheable::UnknownFlag(format!("--crate-type={word}"))),
            };
            if !self.run.crate_types.contains(&kind) {
                self.run.crate_types.push(kind);
            }
        }
        Ok(())
    }

    fn emit(&mut self, value: &str) -> Result<(), Uncacheable> {
        for word in value.split(',') {
            match word {
                "dep-info" => self.run.emit.dep_info = true,
                "metadata" => self.run.emit.metadata = true,
                "link" => self.run.emit.link = true,
                _ if word.contains('=') => return Err(Uncacheable::NoOutDir),
                _ => return Err(Uncacheable::EmitKind(word.to_owned())),
            }
        }
        Ok(())
    }

    fn json(&mut self, value: &str) -> Result<(), Uncacheable> {
        for word in value.split(',') {
            match word {
                "artifacts" => self.run.json_artifacts = true,
                "diagnostic-short" | "diagnostic-rendered-ansi" | "future-incompat" => {}
                // `timings` reports the clock, and what is added later is not known.
                _ => return Err(Uncacheable::UnknownFlag(format!("--json={word}"))),
            }
        }
        Ok(())
    }

    /// Checks what must be there and what only the whole command line tells.
    fn finish(mut self) -> Result<Invocation, Uncacheable> {
        let mut sources = self.sources.into_iter();
        let source = sources.next().ok_or(Uncacheable::NotACompile)?;
        if sources.next().is_some() {
            return Err(Uncacheable::SeveralSources);
        }
        self.run.source = PathBuf::from(source);
        // The name becomes part of file names before rustc has had a chance to refuse it.
        let is_letter = |letter: char| letter == '_' || letter.is_alphanumeric();
        if self.run.crate_name.is_empty() || !self.run.crate_name.chars().all(is_letter) {
            return Err(Uncacheable::NoCrateName);
        }
        if self.run.out_dir.as_os_str().is_empty() {
            return Err(Uncacheable::NoOutDir);
        }
        if !self.run.emit.dep_info {
            return Err(Uncacheable::NoDepInfo);
        }
        if !self.run.json_artifacts {
            return Err(Uncacheable::NoArtifactNotifications);
        }
        if self.run.test || self.run.crate_types.is_empty() {
            self.run.crate_types = vec![CrateType::Bin];
        }
        if let Some(color) = self.color.filter(|_| !self.json_errors) {
            self.run.keyed.push(color);
        }
        if self.run.runs_linker() {
            link::check_link_args(&self.run.link_args)?;
            if self.rpath {
                return Err(Uncacheable::Rpath);
            }
            if let Some(target) = &self.run.target
                && !link::links_to_one_file(target)
            {
                return Err(Uncacheable::TargetOutputs(target.clone()));
            }
        }
        self.run.native_cpu |= link::asks_for_native_cpu(&self.run.link_args);
        Ok(self.run)
    }
}
