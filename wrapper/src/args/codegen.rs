//! `-C` options: which ones the key covers as they are written, which name files, depend on this
//! machine or write more files than rustc announces.
//!
//! An allowlist of the options of rustc 1.95; an option that is not here makes a run uncacheable,
//! also when a newer rustc adds it. Called by the argument parser for every `-C`, in order.

use std::path::PathBuf;

use super::{SplitDebuginfo, Uncacheable, absolute, parser::Parser};

/// Options that change the output in a way their text says completely.
///
/// Among them `remark` prints remarks as diagnostics, which are replayed like all others (its
/// companion that writes files is `-Z`). `profile-generate` and `instrument-coverage` put the name
/// of a file into the program that is written when the program runs, not by rustc. `ar`,
/// `inline-threshold`, `no-stack-check` and `soft-float` are deprecated and cause warnings only.
const VERBATIM: &[&str] = &[
    "ar",
    "code-model",
    "codegen-units",
    "collapse-macro-debuginfo",
    "control-flow-guard",
    "debug-assertions",
    "debuginfo",
    "default-linker-libraries",
    "dwarf-version",
    "embed-bitcode",
    "force-frame-pointers",
    "force-unwind-tables",
    "inline-threshold",
    "instrument-coverage",
    "jump-tables",
    "link-dead-code",
    "link-self-contained",
    "linker-features",
    "lto",
    "metadata",
    "no-prepopulate-passes",
    "no-redzone",
    "no-stack-check",
    "no-vectorize-loops",
    "no-vectorize-slp",
    "opt-level",
    "overflow-checks",
    "panic",
    "prefer-dynamic",
    "profile-generate",
    "relocation-model",
    "relro-level",
    "remark",
    "soft-float",
    "strip",
    "symbol-mangling-version",
    "target-feature",
    "unsafe-allow-abi-mismatch",
];

/// LLVM arguments that neither read nor write a file nor print anything.
///
/// LLVM has thousands, and some load plugins, write statistics or name input files; these are the
/// ones in use.
const LLVM_ARGS: &[&str] = &[
    "align-all-blocks",
    "align-all-functions",
    "align-all-nofallthru-blocks",
    "enable-gvn-hoist",
    "enable-load-pre",
    "enable-loopinterchange",
    "enable-machine-outliner",
    "force-vector-interleave",
    "force-vector-width",
    "inline-threshold",
    "inlinehint-threshold",
    "max-inst-checked-for-throw-during-inlining",
    "sanitizer-coverage-inline-8bit-counters",
    "sanitizer-coverage-inline-bool-flag",
    "sanitizer-coverage-level",
    "sanitizer-coverage-pc-table",
    "sanitizer-coverage-prune-blocks",
    "sanitizer-coverage-stack-depth",
    "sanitizer-coverage-trace-compares",
    "sanitizer-coverage-trace-divs",
    "sanitizer-coverage-trace-geps",
    "sanitizer-coverage-trace-pc",
    "sanitizer-coverage-trace-pc-guard",
    "simplifycfg-branch-fold-threshold",
    "unroll-count",
    "unroll-max-count",
    "unroll-threshold",
    "vectorize-loops",
    "vectorize-slp",
    "x86-asm-syntax",
    "x86-branches-within-32B-boundaries",
];

/// LLVM passes that only transform the module. Others print it, draw its graphs into files
/// (`dot-cfg`) or write notes for gcov.
const PASSES: &[&str] = &["sancov-module"];

/// Takes in one `-C` option.
pub(super) fn take(parser: &mut Parser<'_>, text: &str) -> Result<(), Uncacheable> {
    let unknown = || Uncacheable::UnknownFlag(format!("-C{text}"));
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    // rustc takes `opt_level` for `opt-level`.
    let name = name.replace('_', "-");
    // `target-cpu=help` and the like print a list and build nothing.
    if value == Some("help") {
        return Err(Uncacheable::NotACompile);
    }
    let spelled = match value {
        Some(value) => format!("-C{name}={value}"),
        None => format!("-C{name}"),
    };
    let needed = || value.filter(|value| !value.is_empty()).ok_or_else(unknown);
    let run = &mut parser.run;
    match name.as_str() {
        "incremental" => {
            run.incremental = Some(absolute(parser.cwd, needed()?));
            // That there is one changes the partition into codegen units; where it is does not.
            run.keyed.push("-Cincremental".to_owned());
            return Ok(());
        }
        "extra-filename" => {
            let value = value.ok_or_else(unknown)?;
            if value.contains(['/', '\0']) {
                return Err(unknown());
            }
            value.clone_into(&mut run.extra_filename);
        }
        "linker" => run.linker = Some(PathBuf::from(needed()?)),
        "linker-flavor" => run.linker_flavor = Some(needed()?.to_owned()),
        "link-arg" => run.link_args.push(value.ok_or_else(unknown)?.to_owned()),
        "link-args" => run.link_args.extend(words(value).map(str::to_owned)),
        // Anything but a switch is the LTO plugin to load.
        "linker-plugin-lto" if switch(value).is_none() => {
            run.input_files.push(absolute(parser.cwd, needed()?));
        }
        "linker-plugin-lto" => {}
        "profile-use" => run.input_files.push(absolute(parser.cwd, needed()?)),
        "target-cpu" => run.native_cpu |= needed()? == "native",
        "rpath" => parser.rpath = switch(value) != Some(false),
        "save-temps" if switch(value) == Some(false) => {}
        "save-temps" => return Err(Uncacheable::SaveTemps),
        "split-debuginfo" => match value {
            Some("off") => run.split_debuginfo = SplitDebuginfo::Off,
            Some("packed") => run.split_debuginfo = SplitDebuginfo::Packed,
            Some("unpacked") => run.split_debuginfo = SplitDebuginfo::Unpacked,
            _ => return Err(unknown()),
        },
        "llvm-args" if words(value).all(is_known_llvm_arg) => {}
        "passes" if value == Some("list") => return Err(Uncacheable::NotACompile),
        "passes" if words(value).all(|pass| PASSES.contains(&pass)) => {}
        // `dlltool` is refused on purpose: it names a program that writes part of the output, and
        // does so only for windows-gnu.
        other if !VERBATIM.contains(&other) => return Err(unknown()),
        _ => {}
    }
    run.keyed.push(spelled);
    Ok(())
}

/// The parts of a value that is a list.
fn words(value: Option<&str>) -> impl Iterator<Item = &str> {
    value.unwrap_or_default().split_whitespace()
}

/// Reads a switch as rustc does; `None` if the value is no switch.
fn switch(value: Option<&str>) -> Option<bool> {
    match value {
        None | Some("y" | "yes" | "on" | "true") => Some(true),
        Some("n" | "no" | "off" | "false") => Some(false),
        Some(_) => None,
    }
}

fn is_known_llvm_arg(arg: &str) -> bool {
    let Some(name) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
        return false;
    };
    LLVM_ARGS.contains(&name.split('=').next().unwrap_or(name))
}
