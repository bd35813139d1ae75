//! Property tests of the argument model: no panic, and what a key does and does not depend on.

use proptest::prelude::*;

use super::tests::{CWD, LIB, MINIMAL, minimal_and, owned, run, words};
use super::*;

/// Fragments that reach deep into the parser when they follow each other by chance.
fn fragment() -> impl Strategy<Value = String> {
    let known = proptest::sample::select([words(LIB), owned(MINIMAL)].concat());
    let names = proptest::sample::select(vec![
        "-C",
        "-L",
        "-l",
        "-A",
        "-o",
        "-Z",
        "-g",
        "-vV",
        "--",
        "-",
        "--test",
        "--extern",
        "--emit",
        "--target",
        "--json",
        "--color",
        "--codegen",
        "--cfg",
        "--print",
        "-Clink-args",
        "@",
        "=",
    ]);
    prop_oneof![
        4 => known,
        2 => names.prop_map(str::to_owned),
        1 => "-{0,2}[a-zA-Z]{0,3}[-=:,/é ]{0,2}[a-z]{0,4}",
        1 => "(-C|-L|--extern=|--emit=|-Cllvm-args=|--crate-type=)[-=:,@/a-z ]{0,6}",
        1 => any::<String>(),
    ]
}

proptest! {
    #[test]
    fn never_panics(argv in proptest::collection::vec(fragment(), 0..16), cwd in any::<String>()) {
        let _ = parse(&argv, Path::new(&cwd));
    }

    #[test]
    fn never_panics_after_a_good_start(more in proptest::collection::vec(fragment(), 0..6)) {
        let mut argv = minimal_and(&[]);
        argv.extend(more);
        if let Ok(found) = parse(&argv, Path::new(CWD)) {
            let _ = link_arg_paths(&found.link_args, Path::new(CWD));
            prop_assert!(found.emit.dep_info && found.json_artifacts);
        }
    }

    #[test]
    fn link_arg_paths_never_panics(args in proptest::collection::vec(any::<String>(), 0..4)) {
        let _ = link_arg_paths(&args, Path::new(CWD));
    }

    /// Where outputs go is no part of the key, wherever the flag stands and however it is spelled.
    #[test]
    fn out_dir_is_not_keyed(dir in "/?[a-z./ ]{0,11}[a-z]", place in 0usize..=6, attached: bool) {
        let mut argv: Vec<String> =
            owned(MINIMAL).into_iter().filter(|arg| !arg.starts_with("--out-dir")).collect();
        let flag = if attached {
            vec![format!("--out-dir={dir}")]
        } else {
            vec!["--out-dir".to_owned(), dir.clone()]
        };
        argv.splice(place..place, flag);
        let found = parse(&argv, Path::new(CWD)).expect("cacheable");
        prop_assert_eq!(found.out_dir, absolute(Path::new(CWD), &dir));
        prop_assert_eq!(found.keyed, run(MINIMAL).keyed);
    }

    /// A key is itself a command line that means the same key, so nothing in it is ambiguous.
    #[test]
    fn keyed_reads_back_as_itself(more in proptest::collection::vec(fragment(), 0..5)) {
        let mut argv = minimal_and(&[]);
        argv.extend(more);
        if let Ok(found) = parse(&argv, Path::new(CWD)) {
            let mut again = found.keyed.clone();
            for arg in again.iter_mut().filter(|arg| *arg == "-Cincremental") {
                arg.push_str("=x");
            }
            again.push("--out-dir=x".to_owned());
            let again = parse(&again, Path::new(CWD)).expect("still cacheable");
            prop_assert_eq!(again.keyed, found.keyed);
        }
    }
}
