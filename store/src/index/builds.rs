//! Builds in the index: their actions, the requests that are still of use, and what keys were made of.

use std::collections::HashSet;

use super::schema::{BUILDS, OF_ACTION, OF_BUILD, PARTS, REQUESTS, build_key, build_prefix};
use super::{Batch, Index, IndexError};
use crate::action::ActionKey;
use crate::builds::{BuildId, BuildRecord, KeptRequest, LoggedAction, Parts, Unit};
use crate::codec::decode;
use crate::digest::Digest;
use crate::view::ViewId;

/// Compiles of one unit whose parts are kept: enough for the branches and profiles one switches
/// between.
const PARTS_PER_UNIT: usize = 8;

impl Index {
    /// The builds of a view that are remembered, oldest first.
    pub fn builds(&self, view: ViewId) -> Result<Vec<(BuildId, BuildRecord)>, IndexError> {
        let prefix = build_prefix(view, OF_BUILD);
        let rows = self.scan(BUILDS, &prefix)?;
        rows.into_iter()
            .map(|(key, value)| {
                let number = key[prefix.len()..].try_into();
                let number = number.map_err(|_| IndexError::Key(BUILDS))?;
                Ok((BuildId(u64::from_be_bytes(number)), decode(&value)?))
            })
            .collect()
    }

    /// The actions of a build, in the order they ended.
    pub fn build_actions(
        &self,
        view: ViewId,
        build: BuildId,
    ) -> Result<Vec<LoggedAction>, IndexError> {
        let rows = self.scan(BUILDS, &build_key(view, OF_ACTION, build))?;
        rows.into_iter()
            .map(|(_, value)| Ok(decode(&value)?))
            .collect()
    }

    /// The compiles of a build that hit: all of them, if it is the last of its view.
    pub fn build_requests(
        &self,
        view: ViewId,
        build: BuildId,
    ) -> Result<Vec<KeptRequest>, IndexError> {
        let rows = self.scan(REQUESTS, &build_key(view, OF_ACTION, build))?;
        rows.into_iter()
            .map(|(_, value)| Ok(decode(&value)?))
            .collect()
    }

    /// The compiles of a view that hit and are remembered, oldest first.
    pub fn each_request(
        &self,
        view: ViewId,
        mut each: impl FnMut(KeptRequest),
    ) -> Result<(), IndexError> {
        self.each(REQUESTS, &build_prefix(view, OF_ACTION), |_, value| {
            // What cannot be read is as good as forgotten; those behind it are not.
            if let Ok(request) = decode(value) {
                each(request);
            }
            Ok(())
        })
    }

    /// What earlier keys of a unit were made of, oldest first.
    pub fn parts(&self, unit: &Unit) -> Result<Vec<Parts>, IndexError> {
        let rows = self.scan(PARTS, unit.digest().as_bytes())?;
        rows.into_iter()
            .map(|(_, value)| Ok(decode(&value)?))
            .collect()
    }
}

impl Batch<'_> {
    /// Stores a build.
    pub fn put_build(
        &mut self,
        view: ViewId,
        build: BuildId,
        record: &BuildRecord,
    ) -> Result<(), IndexError> {
        self.put(BUILDS, &build_key(view, OF_BUILD, build), record)
    }

    /// Adds an action to a build.
    pub fn put_build_action(
        &mut self,
        view: ViewId,
        build: BuildId,
        number: u32,
        action: &LoggedAction,
    ) -> Result<(), IndexError> {
        self.put(BUILDS, &action_key(view, build, number), action)
    }

    /// Adds a request to a build.
    pub fn put_build_request(
        &mut self,
        view: ViewId,
        build: BuildId,
        number: u32,
        request: &KeptRequest,
    ) -> Result<(), IndexError> {
        self.put(REQUESTS, &action_key(view, build, number), request)
    }

    /// Forgets the builds of a view that are older than this one.
    pub fn forget_builds_before(&mut self, view: ViewId, build: BuildId) {
        for of in [OF_BUILD, OF_ACTION] {
            self.forget(BUILDS, view, of, build);
        }
    }

    /// Forgets what the builds of a view asked for, but the last request for each of these results.
    pub fn forget_requests_but(
        &mut self,
        view: ViewId,
        wanted: &HashSet<ActionKey>,
    ) -> Result<(), IndexError> {
        let rows = self.index.scan(REQUESTS, &build_prefix(view, OF_ACTION))?;
        let mut kept = HashSet::new();
        for (row, value) in rows.iter().rev() {
            let key = decode::<KeptRequest>(value).map(|request| request.key);
            // One that cannot be read is of no use to anybody.
            if !key.is_ok_and(|key| wanted.contains(&key) && kept.insert(key)) {
                self.delete(REQUESTS, row);
            }
        }
        Ok(())
    }

    fn forget(&mut self, family: &'static str, view: ViewId, of: u8, before: BuildId) {
        let range = (build_prefix(view, of), build_key(view, of, before));
        self.delete_range(family, &range.0, &range.1);
    }

    /// Stores what a key of a unit was made of; the oldest beyond the limit goes.
    pub fn put_parts(&mut self, unit: &Unit, parts: &Parts) -> Result<(), IndexError> {
        let unit = unit.digest();
        let known = self.index.scan(PARTS, unit.as_bytes())?;
        let surplus = (known.len() + 1).saturating_sub(PARTS_PER_UNIT);
        for (key, _) in &known[..surplus] {
            self.delete(PARTS, key);
        }
        let key_digest = parts.key.map_or(Digest::of(b""), |key| key.0);
        let key = [
            unit.as_bytes().as_slice(),
            &parts.noted_ms.to_be_bytes(),
            key_digest.as_bytes(),
        ];
        self.put(PARTS, &key.concat(), parts)
    }
}

fn action_key(view: ViewId, build: BuildId, number: u32) -> Vec<u8> {
    let build = build_key(view, OF_ACTION, build);
    [&build[..], &number.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::RootSet;
    use crate::builds::LoggedEnd;

    fn index() -> (tempfile::TempDir, Index) {
        let dir = tempfile::tempdir().expect("tempdir");
        let index = Index::open(&dir.path().join("index")).expect("opens");
        (dir, index)
    }

    fn unit() -> Unit {
        Unit {
            package: "p".into(),
            crate_name: "c".into(),
            kind: "lib".into(),
        }
    }

    fn action(asked_ms: u64) -> LoggedAction {
        LoggedAction {
            unit: unit(),
            version: String::new(),
            asked_ms,
            answer_us: 1,
            end: LoggedEnd::Failed { ran_ms: 1 },
        }
    }

    #[test]
    fn builds_are_kept_apart() {
        let (_dir, index) = index();
        let record = BuildRecord {
            pid: 1,
            started: None,
            asked_ms: 1,
        };
        let mut batch = index.batch();
        for (view, build) in [(1, 1), (1, 2), (256, 1)] {
            let (view, build) = (ViewId(view), BuildId(build));
            batch.put_build(view, build, &record).expect("puts");
            for number in [0, 300] {
                let action = action(u64::from(number) + build.0);
                batch
                    .put_build_action(view, build, number, &action)
                    .expect("puts");
            }
        }
        batch.commit().expect("commits");
        let ids = |view| -> Vec<_> {
            let builds = index.builds(ViewId(view)).expect("reads");
            builds.into_iter().map(|(id, _)| id.0).collect()
        };
        assert_eq!((ids(1), ids(256)), (vec![1, 2], vec![1]));
        let actions = index.build_actions(ViewId(1), BuildId(2)).expect("reads");
        assert_eq!(actions, [action(2), action(302)]);
        let mut batch = index.batch();
        batch.forget_builds_before(ViewId(1), BuildId(2));
        batch.commit().expect("commits");
        assert_eq!((ids(1), ids(256)), (vec![2], vec![1]));
        let left = |build| {
            index
                .build_actions(ViewId(1), BuildId(build))
                .expect("reads")
                .len()
        };
        assert_eq!((left(1), left(2)), (0, 2));
    }

    #[test]
    fn the_last_request_for_what_is_wanted_stays() {
        let (_dir, index) = index();
        let key = |text: &[u8]| ActionKey(Digest::of(text));
        let mut batch = index.batch();
        let asked: [(u32, u64, &[u8]); 5] = [
            (1, 1, b"both"),
            (1, 1, b"unwanted"),
            (1, 1, b"old"),
            (1, 2, b"both"),
            (2, 1, b"both"),
        ];
        for (number, (view, build, text)) in (0..).zip(asked) {
            let request = KeptRequest {
                unit: unit(),
                version: String::new(),
                key: key(text),
                out_dir: (view, build),
                argv: Vec::new(),
                environment: Vec::new(),
                cwd: Vec::new(),
                umask: 0,
            };
            batch
                .put_build_request(ViewId(view), BuildId(build), number, &request)
                .expect("puts");
        }
        batch.commit().expect("commits");
        let mut batch = index.batch();
        let wanted = HashSet::from([key(b"both"), key(b"old")]);
        batch
            .forget_requests_but(ViewId(1), &wanted)
            .expect("reads");
        batch.commit().expect("commits");
        let of = |view| {
            let mut left = Vec::new();
            let each = |request: KeptRequest| left.push((request.key, request.out_dir.1));
            index.each_request(ViewId(view), each).expect("reads");
            left
        };
        assert_eq!(of(1), [(key(b"old"), 1), (key(b"both"), 2)]);
        assert_eq!(of(2), [(key(b"both"), 1)]);
    }

    #[test]
    fn oldest_parts_go_first() {
        let (_dir, index) = index();
        for noted_ms in 0..12_u8 {
            let parts = Parts {
                key: Some(ActionKey(Digest::of(&[noted_ms]))),
                version: String::new(),
                noted_ms: noted_ms.into(),
                bound: RootSet::default(),
                roots: Default::default(),
                list: Vec::new(),
                left_out: 0,
            };
            let mut batch = index.batch();
            batch.put_parts(&unit(), &parts).expect("puts");
            batch.commit().expect("commits");
        }
        let kept = index.parts(&unit()).expect("reads");
        let kept: Vec<_> = kept.iter().map(|parts| parts.noted_ms).collect();
        assert_eq!(kept, (4..12).collect::<Vec<_>>());
    }
}
