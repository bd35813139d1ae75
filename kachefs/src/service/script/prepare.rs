//! From a request to everything the key of a build script's run needs, short of what it reads.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use store::{Ino, InvocationDigest, Kind, ViewId};
use wrapper::environment;
use wrapper::key::ScriptInvocation;
use wrapper::mode::Mode;
use wrapper::protocol::ScriptRequest;
use wrapper::roots::Roots;
use wrapper::trace::Scope;

use super::super::Service;
use super::super::machine::processor;
use super::super::mode;
use super::super::observed::Site;
use super::super::prepare::{Refusal, cargo_home, in_view, scope_around, text};
use super::super::toolchain;
use super::super::unit_dirs::UnitDirs;
use crate::fs::{Caller, View};
use crate::lazy::secrets::Secrets;

/// Files that say that a directory is a workspace's root, or a package's.
const MANIFESTS: [&str; 2] = [LOCK, "Cargo.toml"];

/// What cargo writes at a workspace's root before it runs anything.
const LOCK: &str = "Cargo.lock";

/// A run before it is known what it reads.
pub struct Prepared {
    /// The package, for people.
    pub(in crate::service) package: String,
    /// The view its `OUT_DIR` lies in.
    pub(in crate::service) view: Arc<View>,
    /// `OUT_DIR`.
    pub(in crate::service) out_dir: Ino,
    /// Literal paths.
    pub(in crate::service) roots: Roots,
    /// What is known of the run before anything it reads is looked at.
    pub(in crate::service) facts: ScriptInvocation,
    /// Where input records are found.
    pub(in crate::service) digest: InvocationDigest,
    /// Its environment.
    pub(in crate::service) environment: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory: the package's.
    pub(in crate::service) cwd: PathBuf,
    /// How far the result travels.
    pub(in crate::service) mode: Mode,
    /// Who asks.
    pub(in crate::service) caller: Caller,
    /// The process that started it: cargo.
    pub(in crate::service) parent: u32,
    /// What must not leave this machine, where something may; `None` where that is not known.
    pub(in crate::service) secrets: Option<Secrets>,
    /// What it need not be watched at.
    pub(in crate::service) scope: Scope,
}

impl Prepared {
    /// Where it runs.
    pub(super) fn site<'a>(&'a self, service: &'a Service) -> Site<'a> {
        Site {
            service,
            view: &self.view,
            roots: &self.roots,
            cwd: &self.cwd,
            environment: &self.environment,
        }
    }

    /// Whether nothing is in its `OUT_DIR` yet.
    pub(super) fn starts_empty(&self) -> bool {
        self.view
            .list(self.out_dir, 0, 1)
            .is_ok_and(|rows| rows.is_empty())
    }
}

/// Everything about a run but what it reads.
pub(super) fn prepare(
    service: &Service,
    request: &ScriptRequest,
    caller: Caller,
) -> Result<Prepared, Refusal> {
    let view = service
        .mounts
        .view(ViewId(request.token.0))
        .ok_or(Refusal::Named("view-not-mounted"))?;
    let variable = |name: &[u8]| environment::value(&request.environment, name);
    let cwd = PathBuf::from(text(&request.cwd)?);
    let view_path = view_root(&request.directory, Ino(request.token.1), &view)?;
    let home = cargo_home(&request.environment)?;
    let workspace = workspace_root(Path::new(view_path), &cwd, Path::new(&home));
    let roots = Roots::new(text(workspace.as_os_str().as_bytes())?, &home, view_path)
        .with_environment(&request.environment);

    let out_dir = variable(b"OUT_DIR").ok_or(Refusal::Named("no-out-dir"))?;
    let inside = Path::new(text(out_dir)?)
        .strip_prefix(view_path)
        .map_err(|_| Refusal::Named("out-dir-elsewhere"))?;
    let node = view
        .resolve(inside.as_os_str().as_bytes())
        .map_err(|_| Refusal::Named("out-dir-gone"))?;
    if node.kind != Kind::Dir {
        return Err(Refusal::Named("out-dir-gone"));
    }

    // Cargo tells which compiler it uses; scripts ask it what it can do, or have it compile.
    let compiler = variable(b"RUSTC").ok_or(Refusal::Named("unknown-compiler"))?;
    let around = mode::around(view_path);
    let configured = [around, workspace.as_path(), service.storage.dir.root()];
    let mode = mode::mode(&request.environment, &configured)?;
    let unit_dirs = UnitDirs::of(&roots, &request.environment);
    let asking = toolchain::Caller {
        environment: &request.environment,
        cwd: &cwd,
        // What cargo builds is lent to nobody: who uses it is seen to.
        in_view: &|path| in_view(service, &roots, path) || unit_dirs.is_profiles(path),
    };
    let target = variable(b"TARGET").and_then(|target| std::str::from_utf8(target).ok());
    let compiler = service
        .toolchains
        .compiler(Path::new(text(compiler)?), None, target, &asking)
        .map_err(|_| Refusal::Named("unknown-compiler"))?;

    let script = view
        .child(Ino(request.token.1), &request.script)
        .and_then(|node| view.content_digest(&node))
        .map_err(|_| Refusal::Named("script-unreadable"))?;
    let facts = ScriptInvocation {
        script,
        compiler: compiler.digest,
        processor: processor()?,
        arguments: templates(&roots, &request.arguments),
        cwd: roots.template(&request.cwd),
        environment: environment::keyed_for_script(&request.environment)
            .into_iter()
            .map(|(name, value)| (name, unit_dirs.keyed(name, value)))
            .map(|(name, value)| (name.to_vec(), roots.template_place(&value)))
            .collect(),
        umask: request.umask,
        mode,
    };
    let mut scope = scope_around(&compiler, &roots);
    scope.own.push(out_dir.to_vec());
    // What C compilers it starts ask of us.
    let socket = service.storage.dir.socket();
    scope
        .unnoted
        .push(wrapper::cc::unnoted_socket(socket.as_os_str().as_bytes()));
    let package = variable(b"CARGO_PKG_NAME").unwrap_or_default();
    Ok(Prepared {
        package: String::from_utf8_lossy(package).into_owned(),
        out_dir: node.ino,
        digest: facts.digest(),
        facts,
        environment: request.environment.clone(),
        caller,
        parent: request.parent,
        secrets: service.secrets_of(request.parent),
        scope,
        view,
        roots,
        cwd,
        mode,
    })
}

fn templates(roots: &Roots, texts: &[Vec<u8>]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| roots.template(text)).collect()
}

/// The mountpoint as cargo spells it: a directory's path without its path in the view.
pub(in crate::service) fn view_root<'a>(
    directory: &'a [u8],
    ino: Ino,
    view: &View,
) -> Result<&'a str, Refusal> {
    let relative = view
        .path_of(ino)
        .map_err(|_| Refusal::Named("out-dir-gone"))?;
    let root = directory
        .strip_suffix(relative.as_slice())
        .and_then(|root| match relative.as_slice() {
            b"" => Some(root),
            _ => root.strip_suffix(b"/"),
        })
        .ok_or(Refusal::Named("out-dir-mismatch"))?;
    text(root)
}

/// The workspace a script belongs to: what its target lies in, if that is a workspace and the script
/// belongs to it or to one of its dependencies; else what holds its package and cargo's lock file; else
/// its package.
pub(in crate::service) fn workspace_root(view: &Path, cwd: &Path, cargo_home: &Path) -> PathBuf {
    let is_dependency = cargo_home.is_absolute() && cwd.starts_with(cargo_home);
    let around = view.parent().filter(|parent| {
        let belongs = cwd.starts_with(parent) || is_dependency;
        belongs && MANIFESTS.iter().any(|name| parent.join(name).is_file())
    });
    let locked = || {
        let mut above = cwd.ancestors().take_while(|_| !is_dependency);
        above.find(|above| above.join(LOCK).is_file())
    };
    around.or_else(locked).unwrap_or(cwd).to_owned()
}
