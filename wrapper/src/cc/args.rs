//! The arguments of gcc and clang: what of them is cached, and what their object depends on.
//!
//! An allowlist, as for rustc: one source compiled to one object, by flags that are known to change
//! nothing but the object and what is read for it. What is read, the watch sees; so this is about what
//! is written, and about what changes the object without being read. Pure: touches no disk.

use super::reason::Reason;

/// One source compiled to one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compile {
    /// The source, as it was given.
    pub source: String,
    /// The object, as it was given.
    pub object: String,
    /// The file that lists what was included, if one is written.
    pub depfile: Option<String>,
    /// Whether debug information, with the working directory in it, is asked for.
    pub debug: bool,
    /// Arguments in order, all but where the outputs go.
    pub keyed: Vec<String>,
}

/// What a source is called that a compiler need not be told the language of. Headers would become
/// precompiled ones.
const SOURCES: &[&str] = &[
    "c", "cc", "cp", "cpp", "cxx", "c++", "C", "CPP", "s", "S", "sx",
];

/// Flags that stand alone.
const FLAGS: &[&str] = &[
    "-ansi",
    "-g",
    "-g0",
    "-g1",
    "-g2",
    "-g3",
    "-gcolumn-info",
    "-gdwarf",
    "-gdwarf-2",
    "-gdwarf-3",
    "-gdwarf-4",
    "-gdwarf-5",
    "-ggdb",
    "-ggdb0",
    "-ggdb1",
    "-ggdb2",
    "-ggdb3",
    "-gline-tables-only",
    "-gno-column-info",
    "-gno-strict-dwarf",
    "-gstrict-dwarf",
    "-no-canonical-prefixes",
    "-nostdinc",
    "-nostdinc++",
    "-O",
    "-O0",
    "-O1",
    "-O2",
    "-O3",
    "-Ofast",
    "-Og",
    "-Os",
    "-Oz",
    "-pedantic",
    "-pedantic-errors",
    "-pipe",
    "-pthread",
    "-trigraphs",
    "-undef",
    "-w",
    // Which section says that the stack need not be executable.
    "-Wa,--noexecstack",
];

/// Flags with a value, attached or as the next argument.
const JOINED_OR_NEXT: &[&str] = &["-D", "-I", "-U"];

/// Flags whose value is the next argument.
const NEXT: &[&str] = &[
    "-idirafter",
    "-imacros",
    "-include",
    "-iquote",
    "-isysroot",
    "-isystem",
    "--param",
    "--sysroot",
    "-target",
];

/// Flags whose value follows at once.
const JOINED: &[&str] = &[
    "--param=",
    "-std=",
    "--std=",
    "-stdlib=",
    "--sysroot=",
    "--target=",
    "-isystem",
    "-iquote",
    "-idirafter",
];

/// `-f…` and `-fno-…` that change code, names or diagnostics, and write nothing.
const FEATURES: &[&str] = &[
    "aligned-new",
    "align-functions",
    "align-loops",
    "asynchronous-unwind-tables",
    "blocks",
    "builtin",
    "char8_t",
    "color-diagnostics",
    "common",
    "data-sections",
    "delete-null-pointer-checks",
    "diagnostics-color",
    "exceptions",
    "fast-math",
    "finite-math-only",
    "freestanding",
    "function-sections",
    "gnu89-inline",
    "hosted",
    "ident",
    "inline",
    "inline-functions",
    "jump-tables",
    "lifetime-dse",
    "math-errno",
    "merge-all-constants",
    "merge-constants",
    "ms-extensions",
    "omit-frame-pointer",
    "openmp",
    "openmp-simd",
    "optimize-sibling-calls",
    "permissive",
    "PIC",
    "pic",
    "PIE",
    "pie",
    "plt",
    "rtti",
    "semantic-interposition",
    "short-enums",
    "signed-char",
    "signed-zeros",
    "sized-deallocation",
    "slp-vectorize",
    "stack-check",
    "stack-clash-protection",
    "stack-protector",
    "stack-protector-all",
    "stack-protector-strong",
    "strict-aliasing",
    "strict-overflow",
    "threadsafe-statics",
    "trapping-math",
    "tree-vectorize",
    "unroll-loops",
    "unsigned-char",
    "unwind-tables",
    "vectorize",
    "visibility-inlines-hidden",
    "wrapv",
    "zero-initialized-in-bss",
];

/// `-f…=value` of the same kind.
const FEATURES_WITH_VALUE: &[&str] = &[
    "cf-protection",
    "constexpr-depth",
    "debug-prefix-map",
    "diagnostics-color",
    "excess-precision",
    "file-prefix-map",
    "fp-contract",
    "macro-prefix-map",
    "max-errors",
    "message-length",
    "random-seed",
    "template-depth",
    "tls-model",
    "visibility",
];

/// What flags that are not cached begin with, and why they are not. The first that fits counts.
const REFUSED: &[(&str, Reason)] = &[
    ("@", Reason::ResponseFile),
    ("-save-temps", Reason::SaveTemps),
    ("--save-temps", Reason::SaveTemps),
    ("-gsplit-dwarf", Reason::SplitDwarf),
    ("-fprofile", Reason::Profile),
    ("-fno-profile", Reason::Profile),
    ("-fauto-profile", Reason::Profile),
    ("-fbranch-probabilities", Reason::Profile),
    ("-ftest-coverage", Reason::Profile),
    ("-fcoverage", Reason::Profile),
    ("--coverage", Reason::Profile),
    ("-fplugin", Reason::Plugin),
    ("-fpass-plugin", Reason::Plugin),
    ("-fmodule", Reason::Modules),
    ("-fimplicit-module", Reason::Modules),
    ("-include-pch", Reason::PrecompiledHeader),
    ("-emit-pch", Reason::PrecompiledHeader),
    ("-fpch", Reason::PrecompiledHeader),
    ("--version", Reason::Query),
    ("--help", Reason::Query),
    ("-dump", Reason::Query),
    ("-print", Reason::Query),
    ("--print", Reason::Query),
    ("-###", Reason::Query),
];

/// Reads the arguments that follow the compiler's own name.
pub fn parse(arguments: &[String]) -> Result<Compile, Reason> {
    let mut parser = Parser::default();
    // What the compiler is to do at all is the name of the reason, whatever else is asked of it.
    let is = |flag: &str| arguments.iter().any(|argument| argument == flag);
    for (flag, reason) in [
        ("-v", Reason::Query),
        ("-E", Reason::Preprocess),
        ("-M", Reason::Preprocess),
        ("-MM", Reason::Preprocess),
        ("-S", Reason::Assembly),
        ("-fsyntax-only", Reason::Preprocess),
    ] {
        if is(flag) {
            return Err(reason);
        }
    }
    let named = [Reason::ResponseFile, Reason::Query];
    let first = arguments.iter().find_map(|argument| refused(argument));
    if let Some(reason) = first.filter(|reason| named.contains(reason)) {
        return Err(reason);
    }
    if !is("-c") {
        return Err(Reason::Link);
    }
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        parser.take(argument, &mut rest)?;
    }
    parser.finish()
}

fn refused(argument: &str) -> Option<Reason> {
    let mut fits = REFUSED
        .iter()
        .filter(|(start, _)| argument.starts_with(start));
    fits.next().map(|(_, reason)| *reason)
}

#[derive(Default)]
struct Parser {
    source: Option<String>,
    object: Option<String>,
    writes_depfile: bool,
    depfile: Option<String>,
    targets: bool,
    debug: bool,
    keyed: Vec<String>,
}

impl Parser {
    fn take<'a>(
        &mut self,
        argument: &'a str,
        rest: &mut impl Iterator<Item = &'a String>,
    ) -> Result<(), Reason> {
        if let Some(reason) = refused(argument) {
            return Err(reason);
        }
        if !argument.starts_with('-') || argument == "-" {
            return self.take_source(argument);
        }
        if argument == "-c" {
            return Ok(());
        }
        if argument.starts_with("-x") {
            return Err(Reason::Language);
        }
        if let Some(attached) = argument.strip_prefix("-o") {
            let object = value(attached, rest)?;
            return once(&mut self.object, object);
        }
        if argument.starts_with("-M") {
            return self.take_depfile(argument, rest);
        }
        if FLAGS.contains(&argument) {
            self.debug |= argument.starts_with("-g");
        } else if let Some(flag) = JOINED_OR_NEXT
            .iter()
            .find(|flag| argument.starts_with(**flag))
        {
            // In one piece, however it was given.
            let value = value(&argument[flag.len()..], rest)?;
            self.keyed.push(format!("{flag}{value}"));
            return Ok(());
        } else if NEXT.contains(&argument) {
            self.keyed.push(argument.to_owned());
            self.keyed.push(value("", rest)?);
            return Ok(());
        } else if !is_understood(argument) {
            return Err(Reason::UnknownFlag);
        }
        self.keyed.push(argument.to_owned());
        Ok(())
    }

    fn take_source(&mut self, argument: &str) -> Result<(), Reason> {
        let name = argument.rsplit('/').next().unwrap_or(argument);
        let is_source = name
            .rsplit_once('.')
            .is_some_and(|(stem, ending)| !stem.is_empty() && SOURCES.contains(&ending));
        if argument == "-" || is_no_file(argument) {
            return Err(Reason::Stdin);
        }
        if self.source.is_some() {
            return Err(Reason::SeveralSources);
        }
        if !is_source {
            return Err(Reason::OtherSource);
        }
        self.source = Some(argument.to_owned());
        self.keyed.push(argument.to_owned());
        Ok(())
    }

    fn take_depfile<'a>(
        &mut self,
        argument: &str,
        rest: &mut impl Iterator<Item = &'a String>,
    ) -> Result<(), Reason> {
        match argument {
            "-MD" | "-MMD" => self.writes_depfile = true,
            "-MP" => {}
            "-MF" => return once(&mut self.depfile, value("", rest)?),
            "-MT" | "-MQ" => {
                self.targets = true;
                self.keyed.push(argument.to_owned());
                self.keyed.push(value("", rest)?);
                return Ok(());
            }
            _ => return Err(Reason::DepfileFlags),
        }
        self.keyed.push(argument.to_owned());
        Ok(())
    }

    fn finish(mut self) -> Result<Compile, Reason> {
        let source = self.source.ok_or(Reason::NoSource)?;
        let object = self.object.ok_or(Reason::NoObject)?;
        // One without the other means names that the compiler chooses, or nothing.
        if self.writes_depfile != self.depfile.is_some() || (self.targets && !self.writes_depfile) {
            return Err(Reason::DepfileFlags);
        }
        if self.depfile.is_some() {
            // It names the object.
            self.keyed.push(format!("-o{object}"));
        }
        Ok(Compile {
            source,
            object,
            depfile: self.depfile,
            debug: self.debug,
            keyed: self.keyed,
        })
    }
}

fn value<'a>(
    attached: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<String, Reason> {
    let value = if attached.is_empty() {
        rest.next().ok_or(Reason::UnknownFlag)?.as_str()
    } else {
        attached
    };
    // gcc takes the arguments out of such a file wherever it is named.
    if value.starts_with('@') {
        return Err(Reason::ResponseFile);
    }
    // What these hold, nobody can look at again.
    if value == "-" || is_no_file(value) {
        return Err(Reason::Stdin);
    }
    Ok(value.to_owned())
}

fn is_no_file(path: &str) -> bool {
    ["/dev/", "/proc/", "/sys/"]
        .iter()
        .any(|start| path.starts_with(start))
}

fn once(place: &mut Option<String>, value: String) -> Result<(), Reason> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Reason::UnknownFlag),
    }
}

fn is_understood(argument: &str) -> bool {
    let joined = |start: &str| {
        argument
            .strip_prefix(start)
            .is_some_and(|value| !value.is_empty() && !value.starts_with('@'))
    };
    if JOINED.iter().any(|start| joined(start)) {
        return true;
    }
    if let Some(feature) = argument.strip_prefix("-f") {
        return is_feature(feature);
    }
    if let Some(warning) = argument.strip_prefix("-W") {
        return is_word(warning);
    }
    argument.strip_prefix("-m").is_some_and(is_machine)
}

fn is_feature(feature: &str) -> bool {
    if let Some((name, _)) = feature.split_once('=') {
        return FEATURES_WITH_VALUE.contains(&name) || (is_aligned(name) && is_word(feature));
    }
    let name = feature.strip_prefix("no-").unwrap_or(feature);
    FEATURES.contains(&name)
        || name
            .strip_prefix("builtin-")
            .is_some_and(|function| !function.is_empty() && is_word(function))
}

fn is_aligned(name: &str) -> bool {
    [
        "align-functions",
        "align-loops",
        "aligned-new",
        "strict-overflow",
    ]
    .contains(&name)
}

/// A warning's name: not `-Wa,…`, `-Wl,…` and `-Wp,…`, which are other programs' arguments.
fn is_word(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=+".contains(&byte);
    text.bytes().all(fits)
}

/// What a processor is told of: instructions, conventions, models. `native` is whatever processor this
/// is, and some of these flags belong to the optimizer or the linker.
fn is_machine(machine: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=+.".contains(&byte);
    let other = ["llvm", "linker", "record", "relax-all", "pass", "mcu"];
    !machine.is_empty()
        && machine.bytes().all(fits)
        && !machine.ends_with("native")
        && !other.iter().any(|start| machine.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Compile, Reason> {
        let arguments: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&arguments)
    }

    #[test]
    fn what_the_cc_crate_asks_for() {
        let line = "-O3 -ffunction-sections -fdata-sections -fPIC -gdwarf-4 \
            -fno-omit-frame-pointer -m64 -march=x86-64-v3 -I include -Wall -Wextra -DX=1 \
            -o /t/debug/build/a-1/out/9f-foo.o -c src/foo.c";
        let compile = read(line).expect("cached");
        assert_eq!(compile.source, "src/foo.c");
        assert_eq!(compile.object, "/t/debug/build/a-1/out/9f-foo.o");
        assert!(compile.debug);
        assert_eq!(compile.depfile, None);
        let elsewhere = read(&line.replace("/t/", "/u/")).expect("cached");
        assert_eq!(compile.keyed, elsewhere.keyed);
    }

    #[test]
    fn spellings_of_one_flag() {
        let one = read("-c a.c -oa.o -D X -I inc").expect("cached");
        let other = read("-c a.c -o a.o -DX -Iinc").expect("cached");
        assert_eq!(one, other);
    }

    #[test]
    fn a_depfile_names_the_object() {
        let compile = read("-MD -MF b/a.d -MT x -c a.c -o b/a.o").expect("cached");
        assert_eq!(compile.depfile.as_deref(), Some("b/a.d"));
        let elsewhere = read("-MD -MF c/a.d -MT x -c a.c -o c/a.o").expect("cached");
        assert_ne!(compile.keyed, elsewhere.keyed);
    }

    #[test]
    fn every_flag_that_matters_is_keyed() {
        let base = read("-c a.c -o a.o").expect("cached").keyed;
        for flag in [
            "-DX",
            "-UX",
            "-Ix",
            "-O2",
            "-g",
            "-fPIC",
            "-fno-builtin-memcpy",
            "-m32",
            "-Wall",
            "-w",
            "-include x.h",
            "-isystem x",
            "-std=c11",
            "--sysroot=/x",
            "-Wa,--noexecstack",
            "-fvisibility=hidden",
            "-ffile-prefix-map=/a=b",
            "-march=armv8-a+crypto",
        ] {
            let with = read(&format!("-c a.c -o a.o {flag}")).expect(flag);
            assert_ne!(with.keyed, base, "{flag}");
        }
    }

    #[test]
    fn refused() {
        for (line, reason) in [
            ("a.o b.o -o x", Reason::Link),
            ("-c a.o -o x", Reason::OtherSource),
            ("a.c -o x", Reason::Link),
            ("-c a.c b.c -o x", Reason::SeveralSources),
            ("-c a.c", Reason::NoObject),
            ("-c -o a.o", Reason::NoSource),
            ("-c a.h -o a.h.gch", Reason::OtherSource),
            ("-c a.i -o a.o", Reason::OtherSource),
            ("-c - -o a.o", Reason::Stdin),
            ("-c a.c -o a.o -include /dev/stdin", Reason::Stdin),
            ("-c /proc/self/fd/0.c -o a.o", Reason::Stdin),
            ("-E a.c", Reason::Preprocess),
            ("-S a.c -o a.s", Reason::Assembly),
            ("-x c -c a.c -o a.o", Reason::Language),
            ("@args", Reason::ResponseFile),
            ("-c a.c -o @args", Reason::ResponseFile),
            ("-c a.c -o a.o -I@x", Reason::ResponseFile),
            ("-c a.c -o a.o -save-temps=obj", Reason::SaveTemps),
            ("-c a.c -o a.o -gsplit-dwarf", Reason::SplitDwarf),
            ("-c a.c -o a.o -fprofile-generate", Reason::Profile),
            ("-c a.c -o a.o --coverage", Reason::Profile),
            ("-c a.c -o a.o -fplugin=x.so", Reason::Plugin),
            ("-c a.c -o a.o -fmodules", Reason::Modules),
            ("-c a.c -o a.o -MD", Reason::DepfileFlags),
            ("-c a.c -o a.o -MF x.d", Reason::DepfileFlags),
            ("-c a.c -o a.o -MMD -MFx.d", Reason::DepfileFlags),
            ("-c a.c -o a.o -MG", Reason::DepfileFlags),
            ("-c a.c -o a.o -MJ x", Reason::DepfileFlags),
            ("--version", Reason::Query),
            ("-v -c a.c -o a.o", Reason::Query),
        ] {
            assert_eq!(read(line), Err(reason), "{line}");
        }
    }

    #[test]
    fn unknown_flags() {
        for flag in [
            "-march=native",
            "-mtune=native",
            "-mllvm -x",
            "-Wa,-alh=x",
            "-Wp,-MD,x",
            "-Wl,x",
            "-Xclang -load",
            "-fdump-tree-all",
            "-fstack-usage",
            "-flto",
            "-frecord-gcc-switches",
            "-specs=x",
            "-wrapper x",
            "-B x",
            "-fsanitize=address",
            "-frobnicate",
            "-Q",
            "-H",
            "-ftime-trace",
            "-fcallgraph-info",
            "-dD",
            "-o b.o",
            "-gz",
            "--",
            "-fverbose-asm",
            "-fbuiltin-",
            "-fopt-info=x",
            "-fmax-errors",
            "-D",
            "-Rpass=x",
            "-L.",
            "-lz",
        ] {
            let line = format!("-c a.c -o a.o {flag}");
            assert_eq!(read(&line), Err(Reason::UnknownFlag), "{flag}");
        }
    }
}
