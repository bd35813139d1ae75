//! What rustc's allocator is told, and that nobody gets to know.

use harness::{Must, Package, Project, Sandbox};

/// A macro that says what it sees of the variable, by itself and as the kernel shows it, and how many bytes of
/// variables were taken out of what the kernel shows.
const LOOKS: &str = "use proc_macro::TokenStream;\n\
     #[proc_macro] pub fn seen(_: TokenStream) -> TokenStream {\n\
     let environment = std::fs::read(\"/proc/self/environ\").unwrap();\n\
     let gaps = environment.split(|byte| *byte != 0).map(|gap| gap.len().saturating_sub(1)).sum::<usize>();\n\
     let is_shown = environment.windows(11).any(|window| window == b\"MALLOC_CONF\");\n\
     format!(\"\\\"{:?} {is_shown} {gaps}\\\"\", std::env::var_os(\"MALLOC_CONF\").is_some()).parse().unwrap() }\n";

const SAYS: &str =
    "fn main() { println!(\"{:?} {}\", option_env!(\"MALLOC_CONF\"), macros::seen!()); }\n";

/// What it says, with that number last.
fn built(variables: &[(&str, &str)]) -> (String, usize) {
    let sandbox = Sandbox::new();
    let macros = Package::new("macros").proc_macro(LOOKS);
    let app = Package::new("app").dep("macros").bin(SAYS);
    let project = Project::new(sandbox.path("project"), &[macros, app]);
    sandbox.mount(project.target());
    let cargo = sandbox.cargo(&project, "build");
    let cargo = variables
        .iter()
        .fold(cargo, |cargo, (name, value)| cargo.env(name, value));
    let _ = cargo.ok();
    let said = sandbox.output_of(project.program("app"));
    let (seen, gaps) = said.trim_end().rsplit_once(' ').must("two parts");
    (seen.to_owned(), gaps.parse().must("a number"))
}

#[test]
fn compilers_are_told_and_do_not_show_it() {
    let (seen, taken_out) = built(&[]);
    assert_eq!(seen, "None false false");
    let unshimmed = built(&[("KACHEFS_UNSHIMMED", "1")]);
    assert_eq!(unshimmed, (seen, 0));
    // What the user tells it counts, and is nobody's to take.
    let (seen, less) = built(&[("MALLOC_CONF", "narenas:3")]);
    assert_eq!(seen, "Some(\"narenas:3\") true true");
    // The other variable has the number of a process in it, and memory may lie ready in large pieces.
    let told = "MALLOC_CONF=abort_conf:false,narenas:2".len();
    assert!(taken_out + 8 >= less + told, "{taken_out} {less}");
}
