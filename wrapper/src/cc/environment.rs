//! Which environment variables a C compiler's object depends on.
//!
//! gcc and clang, their assemblers and the loader say which variables they read ("ENVIRONMENT" in
//! gcc(1), as(1), ld.so(8); the sources of clang's driver). A compiler that is a script, and could
//! read any, is not cached.

use crate::environment::Environment;

/// Variables that are keyed by name.
const KEYED: &[&str] = &[
    "BUILD_PATH_PREFIX_MAP",
    "COLUMNS",
    "COMPILER_PATH",
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "C_INCLUDE_PATH",
    "CYGPATH",
    "GLIBC_TUNABLES",
    "HOME",
    "INCLUDE",
    "LANG",
    "LANGUAGE",
    "LIBRARY_PATH",
    "LOCPATH",
    "NLSPATH",
    "NO_COLOR",
    "OBJCPLUS_INCLUDE_PATH",
    "OBJC_INCLUDE_PATH",
    "PATH",
    "POSIXLY_CORRECT",
    "SDKROOT",
    "SOURCE_DATE_EPOCH",
    "SOURCE_PREFIX_MAP",
    "TERM",
    "ZERO_AR_DATE",
];

/// Lists of directories in which programs and libraries are looked for, which is seen. They get into no
/// object, and hold the target's path whenever cargo starts a program.
const SEARCHED: &[&str] = &["LD_LIBRARY_PATH", "PATH"];

/// Variables that are keyed by how they begin.
const KEYED_PREFIXES: &[&str] = &[
    "AS_",
    "CLANG_",
    "CLICOLOR",
    "COLLECT_",
    "GCC_",
    "GCONV_",
    "GOMP_",
    "LC_",
    "LD_",
    "LLVM_",
    "MALLOC_",
    "MACOSX_DEPLOYMENT_",
    "IPHONEOS_DEPLOYMENT_",
    "OUTPUT_",
    "RC_",
    "VS",
];

/// Variables by which a compiler is told to write more files, or to change its own arguments.
const REFUSED_PREFIXES: &[&str] = &[
    "CCC_",
    "CC_LOG_",
    "CC_PRINT_",
    "CINDEXTEST_",
    "DEPENDENCIES_OUTPUT",
    "GCC_COMPARE_DEBUG",
    "LIBCLANG_",
    "QA_OVERRIDE_GCC3_OPTIONS",
    "SUNPRO_DEPENDENCIES",
];

fn begins_with_any(name: &[u8], prefixes: &[&str]) -> bool {
    prefixes
        .iter()
        .any(|prefix| name.starts_with(prefix.as_bytes()))
}

/// The variables to key, sorted by name; without `PWD`, which means something only where it names the
/// working directory.
pub fn keyed(environment: &Environment) -> Vec<(&[u8], &[u8])> {
    let is_keyed = |name: &[u8]| {
        KEYED.iter().any(|keyed| keyed.as_bytes() == name) || begins_with_any(name, KEYED_PREFIXES)
    };
    let mut keyed: Vec<(&[u8], &[u8])> = environment
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()))
        .filter(|(name, _)| is_keyed(name))
        .collect();
    keyed.sort_unstable();
    keyed
}

/// Whether a variable's value may be keyed without the roots in it.
pub fn is_searched(name: &[u8]) -> bool {
    SEARCHED.iter().any(|searched| searched.as_bytes() == name)
}

/// Whether a compiler would not do just what its arguments say.
pub fn changes_the_run(environment: &Environment) -> bool {
    environment
        .iter()
        .any(|(name, _)| begins_with_any(name, REFUSED_PREFIXES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        let environment: Vec<_> = names
            .iter()
            .map(|name| (name.as_bytes().to_vec(), b"1".to_vec()))
            .collect();
        keyed(&environment)
            .into_iter()
            .map(|(name, _)| String::from_utf8_lossy(name).into_owned())
            .collect()
    }

    #[test]
    fn only_what_compilers_read() {
        let all = [
            "OUT_DIR",
            "LC_ALL",
            "CPATH",
            "PWD",
            "GCC_EXEC_PREFIX",
            "LD_PRELOAD",
            "PATH",
        ];
        let always = ["CPATH", "GCC_EXEC_PREFIX", "LC_ALL", "LD_PRELOAD", "PATH"];
        assert_eq!(names(&all), always);
    }

    #[test]
    fn those_that_make_more_files() {
        let with = |name: &str| changes_the_run(&[(name.as_bytes().to_vec(), b"x".to_vec())]);
        assert!(with("SUNPRO_DEPENDENCIES"));
        assert!(with("CCC_OVERRIDE_OPTIONS"));
        assert!(!with("CPATH"));
    }
}
