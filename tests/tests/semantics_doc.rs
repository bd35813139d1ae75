//! `docs/semantics.md` names a test for every promise and every exception, and the tests exist.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use harness::{Must, toolchain};

/// The section whose lines are no promises.
const NOT_PROMISED: &str = "Not promised";

/// The list items of the page, each with the section it stands in, and what is in a section but in
/// no item.
fn items(page: &str) -> (Vec<(String, String)>, Vec<String>) {
    let mut section = String::new();
    let mut items: Vec<(String, String)> = Vec::new();
    let mut stray = Vec::new();
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            heading.clone_into(&mut section);
        } else if let Some(item) = line.strip_prefix("- ") {
            items.push((section.clone(), item.to_owned()));
        } else if let Some(rest) = line.strip_prefix("  ") {
            if let Some((_, item)) = items.last_mut() {
                item.push(' ');
                item.push_str(rest);
            }
        } else if !line.is_empty() && !section.is_empty() && section != NOT_PROMISED {
            stray.push(line.to_owned());
        }
    }
    (items, stray)
}

/// The tests an item names: `` `file::test` ``.
fn named(item: &str) -> Vec<(&str, &str)> {
    let word = |text: &str| {
        let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        !text.is_empty() && text.chars().all(letter)
    };
    item.split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|code| code.split_once("::"))
        .filter(|(file, test)| word(file) && word(test))
        .collect()
}

/// What is wrong with the page, given the source of each test file by name.
fn complaints(page: &str, sources: &BTreeMap<String, String>) -> Vec<String> {
    let (items, stray) = items(page);
    let mut complaints: Vec<_> = stray
        .iter()
        .map(|line| format!("neither heading nor list: {line}"))
        .collect();
    for (section, item) in &items {
        let tests = named(item);
        if tests.is_empty() && section != NOT_PROMISED {
            complaints.push(format!("{section}: names no test: {item}"));
        }
        for (file, test) in tests {
            // Attributes stand between `#[test]` and the function only where a test is left out.
            let exists = |source: &String| source.contains(&format!("#[test]\nfn {test}() {{"));
            let in_proptest =
                |source: &String| source.contains(&format!("#[test]\n    fn {test}("));
            let source = sources.get(file);
            if !source.is_some_and(|source| exists(source) || in_proptest(source)) {
                complaints.push(format!("{section}: there is no test {file}::{test}"));
            }
        }
    }
    complaints
}

fn sources() -> BTreeMap<String, String> {
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    for dir in ["tests/tests", "kachefs/tests"] {
        let dir = toolchain::workspace().join(dir);
        for entry in fs::read_dir(&dir).must(dir.display()) {
            let path = entry.must("readdir").path();
            let file = if path.is_dir() {
                path.join("main.rs")
            } else {
                path.clone()
            };
            let name = path
                .file_stem()
                .must("a name")
                .to_string_lossy()
                .into_owned();
            // Files of one name in both directories are about one thing.
            let source = fs::read_to_string(&file).must(file.display());
            sources.entry(name).or_default().push_str(&source);
        }
    }
    sources
}

#[test]
fn every_promise_has_a_test() {
    let path: &Path = &toolchain::workspace().join("docs/semantics.md");
    let page = fs::read_to_string(path).must(path.display());
    let found = complaints(&page, &sources());
    assert!(
        found.is_empty(),
        "{}:\n{}",
        path.display(),
        found.join("\n")
    );
    let count = items(&page)
        .0
        .iter()
        .map(|(_, item)| named(item).len())
        .sum::<usize>();
    assert!(
        count > 50,
        "the page names {count} tests: was it read right?"
    );
}

#[test]
fn what_is_missing_is_found() {
    let sources = BTreeMap::from([("one".to_owned(), "#[test]\nfn here() {\n}\n".to_owned())]);
    let page = "# Title\nIntroduction.\n\n## Names\n- Shown:\n  `one::here`.\n- Not shown.\n\
                - Gone: `one::there`, `two::here`.\nA promise outside of a list.\n\
                ## Not promised\nWhy.\n- That.\n";
    let found = complaints(page, &sources);
    assert_eq!(found.len(), 4, "{found:#?}");
    let ignored = BTreeMap::from([(
        "one".to_owned(),
        "#[test]\n#[ignore]\nfn here() {\n".to_owned(),
    )]);
    assert_eq!(
        complaints("## Names\n- Shown: `one::here`.\n", &ignored).len(),
        1
    );
}
