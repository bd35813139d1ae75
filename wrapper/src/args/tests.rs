//! Table tests of the argument model: command lines of cargo 1.95, reasons, spellings, keys.

use super::*;

pub(super) const CWD: &str = "/home/ann/ws";

pub(super) fn owned(args: &[&str]) -> Vec<String> {
    args.iter().map(ToString::to_string).collect()
}

fn read(args: &[&str]) -> Result<Invocation, Uncacheable> {
    parse(&owned(args), Path::new(CWD))
}

pub(super) fn run(args: &[&str]) -> Invocation {
    read(args).unwrap_or_else(|reason| panic!("{reason}: {args:?}"))
}

/// A library as cargo's dev profile builds it; `~` stands for a space inside an argument.
pub(super) const LIB: &str = r#"--crate-name app --edition=2024 app/src/lib.rs --error-format=json
    --json=diagnostic-rendered-ansi,artifacts,future-incompat --diagnostic-width=187
    --crate-type lib --emit=dep-info,metadata,link -C embed-bitcode=no -C debuginfo=2
    --warn=clippy::pedantic --cfg feature="extra" --check-cfg cfg(docsrs,test)
    --check-cfg cfg(feature,~values("default",~"extra")) -C metadata=6b94c9289b05fa23
    -C extra-filename=-d368044520689d06 --out-dir /home/ann/ws/target/debug/deps
    -C incremental=/home/ann/ws/target/debug/incremental
    -L dependency=/home/ann/ws/target/debug/deps
    --extern cdy=/home/ann/ws/target/debug/deps/libcdy.rlib
    --extern mac=/home/ann/ws/target/debug/deps/libmac-04f22a132c39bb7d.so
    -L native=/usr/lib/foo -l m --cfg hey --check-cfg cfg(hey)"#;

pub(super) fn words(line: &str) -> Vec<String> {
    line.split_whitespace()
        .map(|word| word.replace('~', " "))
        .collect()
}

/// The shortest cacheable command line.
pub(super) const MINIMAL: &[&str] = &[
    "--crate-name=app",
    "src/lib.rs",
    "--error-format=json",
    "--json=artifacts",
    "--crate-type=lib",
    "--emit=dep-info,metadata,link",
    "--out-dir=target",
];

pub(super) fn minimal_and(more: &[&str]) -> Vec<String> {
    owned(&[MINIMAL, more].concat())
}

fn with(more: &[&str]) -> Result<Invocation, Uncacheable> {
    parse(&minimal_and(more), Path::new(CWD))
}

/// `MINIMAL` without the arguments that start with `prefix`.
fn without(prefix: &str) -> Result<Invocation, Uncacheable> {
    let args = MINIMAL.iter().filter(|arg| !arg.starts_with(prefix));
    read(&args.copied().collect::<Vec<_>>())
}

#[test]
fn library_in_the_dev_profile() {
    let deps = "/home/ann/ws/target/debug/deps";
    let external = |name: &str, file: &str| Extern {
        options: String::new(),
        name: name.to_owned(),
        path: Some(Path::new(deps).join(file)),
    };
    let search = |kind, path: &str| Search {
        kind,
        path: PathBuf::from(path),
    };
    let expected = Invocation {
        crate_name: "app".to_owned(),
        crate_types: vec![CrateType::Lib],
        test: false,
        source: PathBuf::from("app/src/lib.rs"),
        out_dir: PathBuf::from(deps),
        extra_filename: "-d368044520689d06".to_owned(),
        emit: Emit {
            dep_info: true,
            metadata: true,
            link: true,
        },
        externs: vec![
            external("cdy", "libcdy.rlib"),
            external("mac", "libmac-04f22a132c39bb7d.so"),
        ],
        searches: vec![
            search(SearchKind::Dependency, deps),
            search(SearchKind::Native, "/usr/lib/foo"),
        ],
        native_libs: owned(&["m"]),
        incremental: Some(PathBuf::from("/home/ann/ws/target/debug/incremental")),
        linker: None,
        linker_flavor: None,
        link_args: Vec::new(),
        target: None,
        sysroot: None,
        split_debuginfo: SplitDebuginfo::Off,
        native_cpu: false,
        input_files: Vec::new(),
        user_remaps: Vec::new(),
        json_artifacts: true,
        keyed: words(
            r#"--crate-name=app --edition=2024 app/src/lib.rs --error-format=json
            --json=diagnostic-rendered-ansi,artifacts,future-incompat --crate-type=lib
            --emit=dep-info,metadata,link -Cembed-bitcode=no -Cdebuginfo=2 -Wclippy::pedantic
            --cfg=feature="extra" --check-cfg=cfg(docsrs,test)
            --check-cfg=cfg(feature,~values("default",~"extra")) -Cmetadata=6b94c9289b05fa23
            -Cextra-filename=-d368044520689d06 -Cincremental --extern=cdy=libcdy.rlib
            --extern=mac=libmac-04f22a132c39bb7d.so -Lnative=/usr/lib/foo -lm --cfg=hey
            --check-cfg=cfg(hey)"#,
        ),
    };
    let found = parse(&words(LIB), Path::new(CWD)).expect("cacheable");
    assert_eq!(found, expected);
    assert_eq!(found.stem(), "app-d368044520689d06");
    assert!(
        found.is_output("libapp-d368044520689d06.rmeta") && found.is_output("app-d368044520689d06")
    );
    assert!(!found.is_output("libapp-d368044520689d06a.rmeta") && !found.is_output("libapp.rlib"));
    assert!(!found.is_linked() && !found.runs_linker() && !found.is_proc_macro());
}

/// What differs between units of one workspace: crate types, emit, `--test`, profile flags.
#[test]
fn units_of_a_workspace() {
    use CrateType::{Bin, Cdylib, Dylib, Lib, ProcMacro, Rlib, Staticlib};
    /// Which of `is_linked` and `runs_linker` hold.
    #[derive(Debug, Eq, PartialEq)]
    enum Link {
        None,
        Archiver,
        Linker,
    }
    let cases: &[(&str, &[CrateType], Link)] = &[
        // A proc macro in release, and as `cargo check` sees it in its own workspace.
        (
            "--crate-type proc-macro --emit=dep-info,link -C prefer-dynamic -C embed-bitcode=no
             -C debug-assertions=off -C strip=debuginfo --extern proc_macro",
            &[ProcMacro],
            Link::Linker,
        ),
        (
            "--crate-type proc-macro --emit=dep-info,metadata",
            &[ProcMacro],
            Link::None,
        ),
        // A build script.
        (
            "--crate-type bin --emit=dep-info,link -C embed-bitcode=no -C debug-assertions=off",
            &[Bin],
            Link::Linker,
        ),
        // A program in release, with an argument from its build script.
        (
            "--crate-type bin --emit=dep-info,link -C opt-level=3 -C lto=thin
             -C link-arg=-Wl,--as-needed",
            &[Bin],
            Link::Linker,
        ),
        (
            "--crate-type cdylib --crate-type rlib --crate-type staticlib --emit=dep-info,link",
            &[Cdylib, Rlib, Staticlib],
            Link::Linker,
        ),
        (
            "--crate-type lib,staticlib,lib --emit=dep-info,link",
            &[Lib, Staticlib],
            Link::Archiver,
        ),
        (
            "--crate-type dylib --emit=dep-info,metadata",
            &[Dylib],
            Link::None,
        ),
        // Test harnesses: built, of a proc macro, and checked.
        ("--emit=dep-info,link --test", &[Bin], Link::Linker),
        (
            "--emit=dep-info,link --test --crate-type=proc-macro",
            &[Bin],
            Link::Linker,
        ),
        ("--emit=dep-info,metadata --test", &[Bin], Link::None),
        ("--emit link --emit dep-info", &[Bin], Link::Linker),
    ];
    let common = "--crate-name x --edition=2024 src/x.rs --error-format=json
        --json=diagnostic-rendered-ansi,artifacts,future-incompat --out-dir target/debug/deps
        -L dependency=target/debug/deps";
    for (line, types, link) in cases {
        let argv = [words(common), words(line)].concat();
        let found =
            parse(&argv, Path::new(CWD)).unwrap_or_else(|reason| panic!("{reason}: {line}"));
        let linked = match (found.is_linked(), found.runs_linker()) {
            (true, true) => Link::Linker,
            (true, false) => Link::Archiver,
            (false, false) => Link::None,
            (false, true) => panic!("a linker without linking: {line}"),
        };
        assert_eq!(&linked, link, "{line}");
        assert_eq!(found.crate_types, *types, "{line}");
        assert_eq!(found.is_proc_macro(), *types == [ProcMacro], "{line}");
    }
}

#[test]
fn probes_of_cargo_are_queries() {
    let probe = words("- --crate-name ___ --print=file-names --crate-type bin --print=cfg");
    for args in [words("-vV"), probe] {
        assert_eq!(
            parse(&args, Path::new(CWD)),
            Err(Uncacheable::NotACompile),
            "{args:?}"
        );
    }
}

#[test]
fn reasons() {
    use Uncacheable as U;
    let owned = str::to_owned;
    let flag = |text: &str| U::UnknownFlag(text.to_owned());
    let cases: &[(&[&str], U)] = &[
        (&["-V"], U::NotACompile),
        (&["--version"], U::NotACompile),
        (&["-h"], U::NotACompile),
        (&["--help"], U::NotACompile),
        (&["--explain", "E0308"], U::NotACompile),
        (&["--print=native-static-libs"], U::NotACompile),
        (&["-C", "help"], U::NotACompile),
        (&["-Whelp"], U::NotACompile),
        (&["-Z", "help"], U::NotACompile),
        (&["-Ctarget-cpu=help"], U::NotACompile),
        (&["-Cpasses=list"], U::NotACompile),
        (&["-"], U::StdinSource),
        (&["@args"], U::ResponseFile),
        (&["--frobnicate"], flag("--frobnicate")),
        (&["--crate-type=sdylib"], flag("--crate-type=sdylib")),
        (&["--json=timings"], flag("--json=timings")),
        (&["--json=unused-externs"], flag("--json=unused-externs")),
        (&["-Cfrobnicate=1"], flag("-Cfrobnicate=1")),
        (&["-C=opt-level=3"], flag("-C=opt-level=3")),
        (&["-Cllvm-args=-stats"], flag("-Cllvm-args=-stats")),
        (&["-Cllvm-args=-load=x.so"], flag("-Cllvm-args=-load=x.so")),
        (
            &["-Cllvm-args=inline-threshold=1"],
            flag("-Cllvm-args=inline-threshold=1"),
        ),
        (&["-Cpasses=dot-cfg"], flag("-Cpasses=dot-cfg")),
        (&["-Cdlltool=x"], flag("-Cdlltool=x")),
        (&["-Cincremental"], flag("-Cincremental")),
        (&["-Clinker="], flag("-Clinker=")),
        (&["-Cextra-filename=/../x"], flag("-Cextra-filename=/../x")),
        (&["-Csplit-debuginfo=odd"], flag("-Csplit-debuginfo=odd")),
        (&["-l", ""], flag("-l")),
        (&["-Lnative="], flag("-Lnative=")),
        (&["--extern=a="], flag("--extern=a=")),
        (&["--", "--odd.rs"], flag("--odd.rs")),
        (
            &["-Zunstable-options", "-Zbuild-std"],
            U::UnstableFlag(owned("-Zbuild-std")),
        ),
        (&["-Z", "threads=8"], U::UnstableFlag(owned("-Zthreads=8"))),
        (&["--env-set=A=b"], U::UnstableFlag(owned("--env-set=A=b"))),
        (
            &["-L@RUSTC_BUILTIN/x"],
            U::UnstableFlag(owned("-L@RUSTC_BUILTIN/x")),
        ),
        (&["-o", "out"], U::NoOutDir),
        (&["--emit=link=out"], U::NoOutDir),
        (&["--emit=asm"], U::EmitKind(owned("asm"))),
        (&["--emit=link,llvm-ir"], U::EmitKind(owned("llvm-ir"))),
        (&["--emit=llvm-bc"], U::EmitKind(owned("llvm-bc"))),
        (&["--emit=mir"], U::EmitKind(owned("mir"))),
        (&["--emit=obj"], U::EmitKind(owned("obj"))),
        (
            &["--emit=thin-link-bitcode"],
            U::EmitKind(owned("thin-link-bitcode")),
        ),
        (&["--extern", "serde"], U::ExternWithoutPath(owned("serde"))),
        (
            &["--extern=priv:serde"],
            U::ExternWithoutPath(owned("serde")),
        ),
        (&["-Csave-temps"], U::SaveTemps),
        (&["-C", "save_temps=yes"], U::SaveTemps),
        (&["other.rs"], U::SeveralSources),
        (&["--test", "-Crpath"], U::Rpath),
        (
            &["--test", "-Clink-arg=-Wl,-Map=m"],
            U::LinkerOutput(owned("-Wl,-Map=m")),
        ),
        (&["--test", "-Clink-arg=@more"], U::ResponseFile),
        (
            &["--test", "--target=x86_64-pc-windows-msvc"],
            U::TargetOutputs(owned("x86_64-pc-windows-msvc")),
        ),
    ];
    for (more, reason) in cases {
        assert_eq!(with(more), Err(reason.clone()), "{more:?}");
    }
    assert_eq!(read(&[]), Err(U::NotACompile));
    assert_eq!(without("src/"), Err(U::NotACompile));
    assert_eq!(without("--crate-name"), Err(U::NoCrateName));
    assert_eq!(without("--out-dir"), Err(U::NoOutDir));
    assert_eq!(without("--emit"), Err(U::NoDepInfo));
    assert_eq!(without("--json"), Err(U::NoArtifactNotifications));
    let hostile = MINIMAL
        .iter()
        .map(|arg| arg.replace("=app", "=../app"))
        .collect::<Vec<_>>();
    assert_eq!(parse(&hostile, Path::new(CWD)), Err(U::NoCrateName));
}

#[test]
fn names_of_reasons_are_kebab_case_and_distinct() {
    let text = String::new;
    let all = [
        Uncacheable::NotACompile,
        Uncacheable::StdinSource,
        Uncacheable::ResponseFile,
        Uncacheable::UnknownFlag(text()),
        Uncacheable::UnstableFlag(text()),
        Uncacheable::NoCrateName,
        Uncacheable::NoOutDir,
        Uncacheable::NoDepInfo,
        Uncacheable::NoArtifactNotifications,
        Uncacheable::EmitKind(text()),
        Uncacheable::ExternWithoutPath(text()),
        Uncacheable::SplitDebuginfo,
        Uncacheable::SaveTemps,
        Uncacheable::SeveralSources,
        Uncacheable::Rpath,
        Uncacheable::LinkerOutput(text()),
        Uncacheable::TargetOutputs(text()),
        Uncacheable::WorkspaceWrapper,
        Uncacheable::InvalidUtf8,
    ];
    let names: std::collections::HashSet<_> = all.iter().map(Uncacheable::name).collect();
    assert_eq!(names.len(), all.len());
    for reason in all {
        // The name is the variant's own, so it cannot drift.
        let variant = format!("{reason:?}");
        let variant = variant.split('(').next().unwrap_or_default().to_lowercase();
        assert_eq!(reason.name().replace('-', ""), variant);
        let json = serde_json::to_string(&reason).expect("serialises");
        assert_eq!(
            serde_json::from_str::<Uncacheable>(&json).expect("reads back"),
            reason
        );
    }
}

/// Every `-C` option of rustc 1.95, so that leaving one out is a decision. See `rustc -C help`.
#[test]
fn every_codegen_option() {
    let plain = "code-model=small codegen-units=1 collapse-macro-debuginfo=yes ar=x \
        control-flow-guard=no debug-assertions=on debuginfo=1 default-linker-libraries \
        dwarf-version=5 embed-bitcode=no extra-filename=-x force-frame-pointers \
        force-unwind-tables=no incremental=/i inline-threshold=1 instrument-coverage \
        jump-tables=no link-arg=-s link-args=-s link-dead-code link-self-contained=yes linker=cc \
        linker-features=-lld linker-flavor=gcc linker-plugin-lto=yes \
        llvm-args=--inline-threshold=9 lto=fat metadata=1 no-prepopulate-passes no-redzone \
        no-stack-check no-vectorize-loops no-vectorize-slp opt-level=3 overflow-checks=on \
        panic=abort passes=sancov-module prefer-dynamic profile-generate=/p \
        profile-use=/p relocation-model=pic relro-level=full remark=all rpath save-temps=no \
        soft-float split-debuginfo=off split-debuginfo=packed split-debuginfo=unpacked strip=symbols symbol-mangling-version=v0 \
        target-cpu=znver4 target-feature=+avx2 unsafe-allow-abi-mismatch=x";
    for option in plain.split_whitespace() {
        let found = with(&["-C", option]).unwrap_or_else(|reason| panic!("{option}: {reason}"));
        let expected = if option.starts_with("incremental") {
            "-Cincremental".to_owned()
        } else {
            format!("-C{option}")
        };
        assert_eq!(found.keyed.last(), Some(&expected));
    }
}

#[test]
fn options_with_a_field_of_their_own() {
    let field = |more: &[&str]| with(more).unwrap_or_else(|reason| panic!("{more:?}: {reason}"));
    let path = |text: &str| PathBuf::from(text);
    assert_eq!(
        field(&["-Clinker=/usr/bin/clang"]).linker,
        Some(path("/usr/bin/clang"))
    );
    assert_eq!(field(&["-Clinker=a", "-Clinker=b"]).linker, Some(path("b")));
    assert_eq!(
        field(&["-Clinker_flavor=ld"]).linker_flavor.as_deref(),
        Some("ld")
    );
    assert_eq!(
        field(&["--sysroot", "sys"]).sysroot,
        Some(path("/home/ann/ws/sys"))
    );
    assert_eq!(
        field(&["-Cincremental=./i/"]).incremental,
        Some(path("/home/ann/ws/i"))
    );
    assert_eq!(field(&[]).out_dir, path("/home/ann/ws/target"));
    assert!(field(&["-Ctarget-cpu=native"]).native_cpu);
    assert!(field(&["-Clink-arg=-march=native"]).native_cpu);
    assert!(!field(&["-Ctarget-cpu=x86-64-v3"]).native_cpu);
    let found = field(&[
        "-Clink-args= -s  -static",
        "-Clink-arg=-fuse-ld=lld",
        "-Clink-arg=a b",
    ]);
    assert_eq!(found.link_args, ["-s", "-static", "-fuse-ld=lld", "a b"]);
    assert_eq!(found.fuse_ld(), Some("lld"));
    let found = field(&["--remap-path-prefix", "/a=/b", "--remap-path-prefix=/c=/d"]);
    assert_eq!(found.user_remaps, ["/a=/b", "/c=/d"]);
    let found = field(&["-lstatic:+whole-archive=z", "-l", "m"]);
    assert_eq!(found.native_libs, ["static:+whole-archive=z", "m"]);
    let found = field(&["--target=specs/x.json", "-Cprofile-use=p.profdata"]);
    assert_eq!(
        found.input_files,
        [
            path("/home/ann/ws/specs/x.json"),
            path("/home/ann/ws/p.profdata")
        ]
    );
    assert_eq!(found.target.as_deref(), Some("specs/x.json"));
    let found = field(&["-Clinker-plugin-lto=/p/LLVMgold.so"]);
    assert_eq!(found.input_files, [path("/p/LLVMgold.so")]);
    let found = field(&["--extern=priv,noprelude:a=d/liba.rmeta"]);
    let expected = Extern {
        options: "priv,noprelude".to_owned(),
        name: "a".to_owned(),
        path: Some(path("/home/ann/ws/d/liba.rmeta")),
    };
    assert_eq!(found.externs, [expected]);
    assert_eq!(
        found.keyed.last().map(String::as_str),
        Some("--extern=priv,noprelude:a=liba.rmeta")
    );
}

#[test]
fn spellings_of_one_argument_are_keyed_alike() {
    let cases: &[(&[&[&str]], Option<&str>)] = &[
        (
            &[
                &["-C", "opt-level=3"],
                &["-Copt-level=3"],
                &["-C", "opt_level=3"],
                &["--codegen", "opt-level=3"],
                &["--codegen=opt_level=3"],
            ],
            Some("-Copt-level=3"),
        ),
        (
            &[&["-A", "x"], &["-Ax"], &["--allow", "x"], &["--allow=x"]],
            Some("-Ax"),
        ),
        (&[&["-W", "x"], &["--warn=x"]], Some("-Wx")),
        (&[&["-D", "x"], &["--deny=x"]], Some("-Dx")),
        (&[&["-F", "x"], &["--forbid=x"]], Some("-Fx")),
        (
            &[&["--force-warn", "x"], &["--force-warn=x"]],
            Some("--force-warn=x"),
        ),
        (
            &[&["--cap-lints", "warn"], &["--cap-lints=warn"]],
            Some("--cap-lints=warn"),
        ),
        (
            &[&["--cfg", "a=\"b\""], &["--cfg=a=\"b\""]],
            Some("--cfg=a=\"b\""),
        ),
        (
            &[&["-L", "/x"], &["-L/x"], &["-Lall=/x"], &["-L", "all=/x"]],
            Some("-Lall=/x"),
        ),
        (
            &[&["-L", "odd=/x"], &["-Lall=odd=/x"]],
            Some("-Lall=odd=/x"),
        ),
        (&[&["-L", "crate=/x"], &["-Lcrate=/x"]], Some("-Lcrate=/x")),
        (
            &[&["-L", "framework=/x"], &["-Lframework=/x"]],
            Some("-Lframework=/x"),
        ),
        (&[&["-l", "static=z"], &["-lstatic=z"]], Some("-lstatic=z")),
        (&[&["-v"], &["--verbose"]], Some("-v")),
        (&[&["-g"]], Some("-g")),
        (&[&["-O"]], Some("-O")),
        (
            &[
                &["--extern", "a=/x/liba.rlib"],
                &["--extern=a=/y/liba.rlib"],
            ],
            Some("--extern=a=liba.rlib"),
        ),
        (
            &[&["--extern", "proc_macro"], &["--extern=proc_macro"]],
            Some("--extern=proc_macro"),
        ),
        (
            &[&["-C", "incremental=/a"], &["-Cincremental=/b"]],
            Some("-Cincremental"),
        ),
        (
            &[&["--target", "wasm32-wasip1"]],
            Some("--target=wasm32-wasip1"),
        ),
        (
            &[&["--remap-path-scope", "all"]],
            Some("--remap-path-scope=all"),
        ),
        // Left out altogether.
        (
            &[
                &[],
                &["--diagnostic-width=80"],
                &["--color", "always"],
                &["-Ldependency=/x"],
                &["-L", "dependency=/y"],
            ],
            None,
        ),
    ];
    let bare = with(&[]).expect("cacheable").keyed;
    for (spellings, keyed) in cases {
        let expected: Vec<String> = bare
            .iter()
            .cloned()
            .chain(keyed.map(str::to_owned))
            .collect();
        for more in *spellings {
            let found = with(more).unwrap_or_else(|reason| panic!("{more:?}: {reason}"));
            assert_eq!(found.keyed, expected, "{more:?}");
        }
    }
}

#[test]
fn color_is_keyed_unless_errors_are_json() {
    let mut args: Vec<&str> = MINIMAL.to_vec();
    args.retain(|arg| *arg != "--error-format=json");
    args.push("--color=always");
    assert_eq!(
        run(&args).keyed.last().map(String::as_str),
        Some("--color=always")
    );
}

#[test]
fn different_arguments_are_keyed_apart() {
    let all: &[&[&str]] = &[
        &[],
        &["-g"],
        &["-O"],
        &["-v"],
        &["--test"],
        &["-Copt-level=3"],
        &["-Copt-level=2"],
        &["-Copt-level=2", "-Copt-level=3"],
        &["-Copt-level=3", "-Copt-level=2"],
        &["-Cincremental=x"],
        &["-Lx"],
        &["-Lnative=x"],
        &["-lx"],
        &["-Ax"],
        &["-Wx"],
        &["--cfg=x"],
        &["--cfg=x", "--cfg=y"],
        &["--cfg=y", "--cfg=x"],
        &["--check-cfg=x"],
        &["--extern=x=libx.rlib"],
        &["--extern=x=libx.rmeta"],
        &["--extern=y=libx.rlib"],
        &["--extern=priv:x=libx.rlib"],
        &["--edition=2021"],
        &["--sysroot=x"],
        &["--cap-lints=allow"],
        &["--remap-path-prefix=a=b"],
        &["-Clink-arg=a"],
        &["-Ctarget-cpu=native"],
    ];
    let mut seen = std::collections::HashMap::new();
    for more in all {
        let keyed = with(more)
            .unwrap_or_else(|reason| panic!("{more:?}: {reason}"))
            .keyed;
        if let Some(other) = seen.insert(keyed, more) {
            panic!("{more:?} and {other:?} have one key");
        }
    }
}

/// What concerns linking alone does not refuse a library.
#[test]
fn linker_rules_hold_for_linked_outputs_only() {
    for more in [
        &["-Clink-arg=-Wl,-Map=m"][..],
        &["-Clink-arg=@more"],
        &["-Crpath=yes"],
        &["--target=x86_64-pc-windows-msvc"],
    ] {
        assert!(with(more).is_ok(), "{more:?}");
    }
    assert!(with(&["--test", "-Crpath=no"]).is_ok());
    assert!(with(&["--test", "--target=aarch64-unknown-linux-musl"]).is_ok());
}
