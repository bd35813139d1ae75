//! Whose home it is does not matter to what does not hold its path, and matters to what does.

use harness::{Cmd, Package, Project, Sandbox, samples};

/// A cargo command of a user with this home.
fn of_user(sandbox: &Sandbox, project: &Project, user: &str) -> Cmd {
    let home = sandbox.make_dir(&format!("{user}/home"));
    let temporary = sandbox.make_dir(&format!("{user}/tmp"));
    sandbox
        .cargo(project, "build")
        .env("HOME", home)
        .env("TMPDIR", temporary)
}

/// Builds a project for one user, and a checkout of it for another.
fn build_for_two(sandbox: &Sandbox, project: &Project) -> (harness::Counters, Project) {
    sandbox.mount(project.target());
    of_user(sandbox, project, "users/ann").ok();
    let checkout = project.checkout(sandbox.path("checkouts/of-bob"));
    sandbox.mount(checkout.target());
    let build = || of_user(sandbox, &checkout, "users/robert").ok();
    let (seen, _) = sandbox.during(build);
    (seen, checkout)
}

#[test]
fn what_does_not_hold_it_hits() {
    let sandbox = Sandbox::new();
    let project = samples::whole(sandbox.path("project"));
    let (seen, checkout) = build_for_two(&sandbox, &project);
    seen.assert_no_miss();
    assert_eq!(seen.script_misses, 0, "{seen:?}");
    assert_eq!(
        sandbox.output_of(checkout.program("app")),
        samples::WHOLE_OUTPUT
    );
}

#[test]
fn what_holds_it_is_each_users_own() {
    let sandbox = Sandbox::new();
    let macros = Package::new("macros").proc_macro(
        "use proc_macro::TokenStream;\n\
         #[proc_macro]\n\
         pub fn home(_: TokenStream) -> TokenStream {\n\
             format!(\"{:?}\", std::env::var(\"HOME\").unwrap()).parse().unwrap()\n\
         }\n\
         #[proc_macro]\n\
         pub fn temporary(_: TokenStream) -> TokenStream {\n\
             format!(\"{:?}\", std::env::temp_dir()).parse().unwrap()\n\
         }\n",
    );
    let app = Package::new("app")
        .dep("macros")
        .build_script(
            "fn main() { println!(\"cargo::rustc-env=SAID={}\", std::env::var(\"HOME\").unwrap()); }\n",
        )
        .bin(
            "fn main() {\n\
                 println!(\"{} {}\", macros::home!(), macros::temporary!());\n\
                 println!(\"{} {:?}\", env!(\"SAID\"), option_env!(\"HOME\"));\n\
             }\n",
        );
    let project = Project::new(sandbox.path("project"), &[macros, app]);
    let (_, checkout) = build_for_two(&sandbox, &project);
    for (project, user) in [(&project, "users/ann"), (&checkout, "users/robert")] {
        let home = sandbox.path(user).join("home").display().to_string();
        let temporary = sandbox.path(user).join("tmp").display().to_string();
        let said = sandbox.output_of(project.program("app"));
        let expected = format!("{home} {temporary}\n{home} Some({home:?})\n");
        assert_eq!(said, expected, "of {user}");
    }
}
