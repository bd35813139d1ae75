//! Which environment variables an action depends on.
//!
//! rustc reports what `env!` and `option_env!` read; those are keyed by value. What rustc and the
//! linker read for themselves is keyed always. A proc macro can read any variable and rustc never
//! learns of it, so for units with proc macros in their graph the rule is *keyed or absent*:
//! every variable is either part of the key or taken away from the compiler. The jobserver alone is
//! neither.

use std::os::unix::ffi::OsStringExt;

/// One environment: names and values as the process got them.
pub type Environment = [(Vec<u8>, Vec<u8>)];

/// Variables rustc, LLVM or the linker driver read themselves (rustc: `rustc_interface`,
/// `rustc_session`; gcc(1) "ENVIRONMENT"; ld(1) "ENVIRONMENT"; clang's driver).
const READ_BY_TOOLS: &[&str] = &[
    "CCC_ADD_ARGS",
    "CCC_OVERRIDE_OPTIONS",
    "COLLECT_NO_DEMANGLE",
    "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
    "GNUTARGET",
    "LDEMULATION",
    "LD_AUDIT",
    "LD_PRELOAD",
    "LD_RUN_PATH",
    "LIBRARY_PATH",
    "MACOSX_DEPLOYMENT_TARGET",
    "RUST_TARGET_PATH",
    "SOURCE_DATE_EPOCH",
];

/// Prefixes of variables that steer rustc (`RUSTC_BOOTSTRAP`, `RUSTC_FORCE_…`) and linkers
/// (`LLD_VERSION` gets into what is linked).
const TOOLS_PREFIXES: &[&str] = &["LLD_", "MOLD_", "RUSTC_", "WILD_"];

/// Variables that make linkers write files besides the output.
const MAKING_LINKERS_WRITE: &[&str] = &["LLD_REPRODUCE", "MOLD_REPRO"];

/// `RUSTC_…` variables that only cargo reads.
const FOR_CARGO: &[&str] = &["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"];

/// The jobserver, whose value is a pair of descriptors: another one in each build, and the compiler
/// needs it.
const UNKEYED: &[&str] = &["CARGO_MAKEFLAGS", "MAKEFLAGS", "MFLAGS"];

/// How many jobs a build script may run at a time.
const JOBS: &str = "NUM_JOBS";

/// The terminal, the session and where its shell stands: taken away from compilers that run
/// proc macros.
const SCRUBBED: &[&str] = &[
    "ATUIN_SESSION",
    "COLORTERM",
    "COLUMNS",
    "DBUS_SESSION_BUS_ADDRESS",
    "DESKTOP_STARTUP_ID",
    "DISPLAY",
    "GPG_TTY",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LINES",
    "LS_COLORS",
    "MOTD_SHOWN",
    "OLDPWD",
    "PROMPT_COMMAND",
    "PS1",
    "PWD",
    "RUST_RECURSION_COUNT",
    "SHLVL",
    "SSH_AGENT_PID",
    "SSH_AUTH_SOCK",
    "SSH_CLIENT",
    "SSH_CONNECTION",
    "SSH_TTY",
    "STARSHIP_SESSION_KEY",
    "STARSHIP_SHELL",
    "STY",
    "TERM",
    "TERMCAP",
    "TERMINATOR_UUID",
    "TERM_PROGRAM",
    "TERM_PROGRAM_VERSION",
    "TERM_SESSION_ID",
    "TILIX_ID",
    "TMUX",
    "TMUX_PANE",
    "WAYLAND_DISPLAY",
    "WINDOWID",
    "WT_PROFILE_ID",
    "WT_SESSION",
    "XAUTHORITY",
    "XDG_ACTIVATION_TOKEN",
    "XDG_SESSION_CLASS",
    "XDG_SESSION_DESKTOP",
    "XDG_SESSION_ID",
    "XDG_SESSION_TYPE",
    "_",
];

/// The same, by prefix.
const SCRUBBED_PREFIXES: &[&str] = &[
    "ALACRITTY_",
    "GHOSTTY_",
    "GNOME_TERMINAL_",
    "ITERM_",
    "KACHEFS_",
    "KITTY_",
    "KONSOLE_",
    "VSCODE_",
    "VTE_",
    "WEZTERM_",
    "ZELLIJ",
];

fn is_any(name: &[u8], names: &[&str]) -> bool {
    names.iter().any(|n| n.as_bytes() == name)
}

fn is_scrubbed(name: &[u8]) -> bool {
    is_any(name, SCRUBBED)
        || is_any(name, FOR_CARGO)
        || SCRUBBED_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix.as_bytes()))
}

/// The variables to key for every action besides those rustc reports, sorted by name.
/// With `proc_macro`, everything that [`scrubbed`] does not take away.
pub fn keyed(environment: &Environment, proc_macro: bool) -> Vec<(&[u8], &[u8])> {
    let mut keyed: Vec<(&[u8], &[u8])> = environment
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()))
        .filter(|(name, _)| {
            if is_any(name, UNKEYED) || is_scrubbed(name) {
                false
            } else {
                proc_macro
                    || is_any(name, READ_BY_TOOLS)
                    || TOOLS_PREFIXES
                        .iter()
                        .any(|prefix| name.starts_with(prefix.as_bytes()))
            }
        })
        .collect();
    keyed.sort_unstable();
    keyed
}

/// The variables to key for a run of a build script, sorted by name: all but the jobserver, the
/// number of jobs, the terminal, and who wraps compilers. Nothing is taken away from a script: what it
/// runs may need a key agent, say, and talking to one is seen.
pub fn keyed_for_script(environment: &Environment) -> Vec<(&[u8], &[u8])> {
    let mut keyed: Vec<(&[u8], &[u8])> = environment
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()))
        .filter(|(name, _)| {
            !is_any(name, UNKEYED) && !is_scrubbed(name) && *name != JOBS.as_bytes()
        })
        .collect();
    keyed.sort_unstable();
    keyed
}

/// Whether a variable names the jobserver.
pub fn is_jobserver(name: &[u8]) -> bool {
    is_any(name, UNKEYED)
}

/// Whether a linker would write files nobody announces.
pub fn makes_linkers_write(environment: &Environment) -> bool {
    environment
        .iter()
        .any(|(name, _)| is_any(name, MAKING_LINKERS_WRITE))
}

/// The variables a compiler that runs proc macros must not see.
pub fn scrubbed(environment: &Environment) -> Vec<Vec<u8>> {
    environment
        .iter()
        .map(|(name, _)| name.clone())
        .filter(|name| is_scrubbed(name))
        .collect()
}

/// The whole environment of this process.
pub fn own() -> Vec<(Vec<u8>, Vec<u8>)> {
    std::env::vars_os()
        .map(|(name, value)| (name.into_vec(), value.into_vec()))
        .collect()
}

/// The value of one variable.
pub fn value<'a>(environment: &'a Environment, name: &[u8]) -> Option<&'a [u8]> {
    environment
        .iter()
        .find(|(n, _)| n == name)
        .map(|(_, value)| value.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(names: &[&str]) -> Vec<(Vec<u8>, Vec<u8>)> {
        names
            .iter()
            .map(|n| (n.as_bytes().to_vec(), b"1".to_vec()))
            .collect()
    }

    #[test]
    fn keyed_or_absent() {
        let names = [
            "A",
            "DATABASE_URL",
            "TERM",
            "RUSTC_BOOTSTRAP",
            "SSH_TTY",
            "CARGO_MAKEFLAGS",
            "RUSTC_WRAPPER",
            "KACHEFS_STORE",
            "PATH",
        ];
        let environment = environment(&names);
        let keyed: Vec<_> = keyed(&environment, true)
            .into_iter()
            .map(|(n, _)| n)
            .collect();
        let absent = scrubbed(&environment);
        for name in names {
            let in_key = keyed.contains(&name.as_bytes());
            let gone = absent.iter().any(|n| n == name.as_bytes());
            assert!(in_key != gone || name == "CARGO_MAKEFLAGS", "{name}");
        }
        assert!(keyed.is_sorted());
    }

    #[test]
    fn without_proc_macros_only_what_tools_read() {
        let environment = environment(&[
            "A",
            "CCC_OVERRIDE_OPTIONS",
            "RUSTC_BOOTSTRAP",
            "LIBRARY_PATH",
            "RUSTC_WRAPPER",
        ]);
        let keyed: Vec<_> = keyed(&environment, false)
            .into_iter()
            .map(|(n, _)| n)
            .collect();
        assert_eq!(
            keyed,
            [
                &b"CCC_OVERRIDE_OPTIONS"[..],
                b"LIBRARY_PATH",
                b"RUSTC_BOOTSTRAP"
            ]
        );
    }
}
