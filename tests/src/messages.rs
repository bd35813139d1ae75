//! Reads what cargo prints with `--message-format=json`.

use std::path::PathBuf;

use serde_json::Value;

use crate::{Must, Outcome};

/// The messages on stdout of one cargo command run with `--message-format=json`.
pub struct Messages(Vec<Value>);

impl Messages {
    /// Parses the messages; a line that is not JSON fails the test.
    #[track_caller]
    pub fn of(outcome: &Outcome) -> Self {
        let lines = outcome.stdout.lines();
        Self(
            lines
                .map(|line| serde_json::from_str(line).must("a JSON message"))
                .collect(),
        )
    }

    fn with_reason(&self, reason: &str) -> impl Iterator<Item = &Value> {
        self.0
            .iter()
            .filter(move |message| message["reason"] == reason)
    }

    /// How many units cargo compiled or would have had to: one artifact message each.
    pub fn units(&self) -> u64 {
        self.with_reason("compiler-artifact").count() as u64
    }

    /// The names of the targets cargo did not find fresh.
    pub fn stale(&self) -> Vec<String> {
        self.with_reason("compiler-artifact")
            .filter(|message| message["fresh"] != true)
            .map(|message| message["target"]["name"].to_string())
            .collect()
    }

    /// The programs cargo has made or found fresh, those of tests too.
    pub fn programs(&self) -> Vec<PathBuf> {
        self.with_reason("compiler-artifact")
            .filter_map(|message| message["executable"].as_str())
            .map(PathBuf::from)
            .collect()
    }

    /// The compiler's diagnostics, rendered, sorted.
    pub fn diagnostics(&self) -> Vec<String> {
        let mut all: Vec<_> = self
            .with_reason("compiler-message")
            .map(|message| message["message"].to_string())
            .collect();
        all.sort();
        all
    }

    /// The test fails unless cargo saw at least one unit, and all of them fresh.
    #[track_caller]
    pub fn assert_all_fresh(&self) {
        assert!(self.units() > 0, "cargo reported no artifact at all");
        assert_eq!(
            self.stale(),
            Vec::<String>::new(),
            "a no-op build compiles nothing"
        );
    }
}
