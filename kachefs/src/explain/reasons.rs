//! What is not cached, in one sentence for each named reason.
//!
//! The names are those `kachefs stats` counts; a test looks that none of the service's has no sentence.

/// The reason of this name, in words.
pub fn sentence(reason: &str) -> &'static str {
    of_paths(reason)
        .or_else(|| of_tools(reason))
        .or_else(|| of_runs(reason))
        .unwrap_or("it is not known to be safe to cache")
}

fn of_paths(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "extern-being-written" => "a dependency is still being written",
        "extern-missing" => "a dependency given with --extern is not there",
        "named-input-unreadable" => "a file or directory that an argument names cannot be read",
        "no-manifest-dir" => "the package's directory is not known (no CARGO_MANIFEST_DIR)",
        "no-out-dir" => "the build script has no OUT_DIR",
        "out-dir-elsewhere" => "OUT_DIR does not lie in the mounted target directory",
        "out-dir-gone" => "the output directory was removed meanwhile",
        "out-dir-in-use" => {
            "OUT_DIR holds files of an earlier run, which may get into what this one makes"
        }
        "out-dir-mismatch" => {
            "the output directory is not where the mounted target directory has it"
        }
        "out-dir-unreadable" => "OUT_DIR cannot be read",
        "package-too-large" => {
            "its package, which a proc macro may read, has more than 20,000 files or 1 GiB"
        }
        "package-unreadable" => "its package, which a proc macro may read, cannot be read",
        "script-unreadable" => "the build script cannot be read",
        "view-not-mounted" => "the target directory is not mounted any more",
        "other-namespace" => {
            "the compiler sees other files than the daemon (a container, or a private /tmp)"
        }
        _ => return None,
    })
}

fn of_tools(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "invalid-utf8" => "an argument or a path is not valid UTF-8",
        "linker-flavor" => "-C linker-flavor without -C linker lets rustc choose the linker",
        "linker-output" => "a variable makes the linker write files that nobody announces",
        "linker-script" => {
            "a linker script, or a thin archive, can name files that nobody looks at"
        }
        "linker-search" => "the linker is told to search elsewhere (-B, --sysroot or -specs)",
        "not-a-compile" => "it is no compile",
        "unknown-compiler" => "the compiler cannot be identified",
        "unknown-linker" => "the linker cannot be identified",
        "unknown-processor" => "the processor cannot be identified (target-cpu=native)",
        "cargo-fix" => "the compiler is run to change sources (cargo fix)",
        "target-path" => "RUST_TARGET_PATH may lead to another description of the target",
        "unknown-mode" => "KACHEFS_MODE or a kachefs.toml asks for a mode that does not exist",
        "workspace-wrapper" => "a workspace wrapper other than clippy's runs the compiler",
        _ => return None,
    })
}

fn of_runs(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "reads-terminal-variable" => {
            "it reads a variable of the terminal or the session, which is not in the key"
        }
        "outputs-not-placed" => "what it made could not be given its names in the view",
        "reads-arguments" => "it may have asked the kernel how the compiler was called",
        "not-watched" => "its proc macros could not be watched",
        "writes-elsewhere" => "it changes something outside its output directory",
        "network" => "it talks to another process or machine",
        "process-left-behind" => "it leaves a process behind",
        "changes-mounts" => "it changes mounts",
        "unwatchable-calls" => "it makes system calls that cannot be watched",
        "unreadable-process" => "a process it started cannot be watched",
        "unwatched" => "build scripts cannot be watched here",
        "out-dir-too-large" => "it leaves more than 20,000 names in OUT_DIR",
        "out-dir-special" => {
            "it leaves something in OUT_DIR that is neither file, directory nor link"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Every `Named("…")` in the sources of the service.
    fn names_in(directory: &Path, names: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                names_in(&path, names);
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a source");
            let found = text.split("Named(\"").skip(1);
            names.extend(found.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
        }
    }

    #[test]
    fn every_named_reason_has_a_sentence() {
        let mut names = BTreeSet::new();
        let service = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/service");
        names_in(&service, &mut names);
        assert!(names.len() > 20, "{names:?}");
        let unknown = sentence("no such reason");
        let without: Vec<_> = names
            .iter()
            // Objects of C compilers are in no log of builds.
            .filter(|name| !name.starts_with("cc-") && sentence(name) == unknown)
            .collect();
        assert!(without.is_empty(), "{without:?}");
    }
}
