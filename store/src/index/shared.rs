//! What the index knows of remotes: which blobs they hold, and which results they still lack.

use rocksdb::IteratorMode;

use super::schema::{KEPT, RECORDS, UPLOADS, kept_key};
use super::{Batch, Index, IndexError};
use crate::action::{InputRecord, InvocationDigest};
use crate::codec::decode;
use crate::digest::Digest;
use crate::shared::{Kept, Place, RemoteId, Upload};

/// Which upload: the later, the greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct UploadId(pub u64);

impl Index {
    /// Where a remote holds a blob, if it is known to.
    pub fn kept(&self, remote: RemoteId, digest: &Digest) -> Result<Option<Kept>, IndexError> {
        let kept: Option<Kept> = self.get(KEPT, &kept_key(remote, digest))?;
        Ok(kept.filter(|kept| kept.known_ms != Kept::LOST))
    }

    /// Where a remote held a blob that it has lost.
    pub fn lost(&self, remote: RemoteId, digest: &Digest) -> Result<Option<Place>, IndexError> {
        let kept: Option<Kept> = self.get(KEPT, &kept_key(remote, digest))?;
        let lost = kept.filter(|kept| kept.known_ms == Kept::LOST);
        Ok(lost.map(|kept| kept.place))
    }

    /// What is known of a blob that others say is there: not to be believed if it was not once.
    pub fn as_said(
        &self,
        remote: RemoteId,
        digest: &Digest,
        said: Kept,
    ) -> Result<Kept, IndexError> {
        let kept: Option<Kept> = self.get(KEPT, &kept_key(remote, digest))?;
        let was_lost = kept.is_some_and(|kept| {
            kept.place == said.place
                && (kept.known_ms == Kept::LOST || kept.seen_ms == Kept::DOUBTED)
        });
        let seen_ms = if was_lost {
            Kept::DOUBTED
        } else {
            said.seen_ms
        };
        Ok(Kept { seen_ms, ..said })
    }

    /// The oldest uploads that are still to be done, at most `most`.
    pub fn uploads(&self, most: usize) -> Result<Vec<(UploadId, Upload)>, IndexError> {
        let rows = self
            .db
            .iterator_cf(self.family(UPLOADS), IteratorMode::Start);
        rows.take(most)
            .map(|row| {
                let (key, value) = row.map_err(|source| self.db_error(source))?;
                Ok((upload_id(&key)?, decode(&value)?))
            })
            .collect()
    }

    /// How many uploads are still to be done.
    pub fn upload_count(&self) -> Result<u64, IndexError> {
        let mut count = 0;
        self.each(UPLOADS, &[], |_, _| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }

    /// The last upload that was noted.
    pub fn last_upload(&self) -> Result<Option<UploadId>, IndexError> {
        let mut rows = self.db.iterator_cf(self.family(UPLOADS), IteratorMode::End);
        let last = rows.next().transpose();
        let last = last.map_err(|source| self.db_error(source))?;
        last.map(|(key, _)| upload_id(&key)).transpose()
    }

    /// One input record of an invocation, by the digest [`record_digest`] gives.
    pub fn record(
        &self,
        invocation: &InvocationDigest,
        record: &Digest,
    ) -> Result<Option<InputRecord>, IndexError> {
        let key = [invocation.0.as_bytes().as_slice(), record.as_bytes()].concat();
        self.get(RECORDS, &key)
    }
}

/// What tells an input record from the others of its invocation.
pub fn record_digest(
    invocation: &InvocationDigest,
    record: &InputRecord,
) -> Result<Digest, IndexError> {
    let key = super::batch::record_key(invocation, record)?;
    let digest = key.get(invocation.0.as_bytes().len()..);
    digest
        .and_then(Digest::from_slice)
        .ok_or(IndexError::Key(RECORDS))
}

fn upload_id(key: &[u8]) -> Result<UploadId, IndexError> {
    let number = key.try_into().map_err(|_| IndexError::Key(UPLOADS))?;
    Ok(UploadId(u64::from_be_bytes(number)))
}

impl Batch<'_> {
    /// Notes that a remote holds a blob.
    pub fn put_kept(
        &mut self,
        remote: RemoteId,
        digest: &Digest,
        kept: &Kept,
    ) -> Result<(), IndexError> {
        self.put(KEPT, &kept_key(remote, digest), kept)
    }

    /// Notes that a remote has lost a blob which it held there.
    pub fn put_lost(
        &mut self,
        remote: RemoteId,
        digest: &Digest,
        held: &Kept,
    ) -> Result<(), IndexError> {
        let lost = Kept {
            seen_ms: 0,
            known_ms: Kept::LOST,
            ..*held
        };
        self.put_kept(remote, digest, &lost)
    }

    /// Notes that a remote does not hold a blob.
    pub fn delete_kept(&mut self, remote: RemoteId, digest: &Digest) {
        self.delete(KEPT, &kept_key(remote, digest));
    }

    /// Notes a result that is to be uploaded.
    pub fn put_upload(&mut self, id: UploadId, upload: &Upload) -> Result<(), IndexError> {
        self.put(UPLOADS, &id.0.to_be_bytes(), upload)
    }

    /// Notes that it need not be any more.
    pub fn delete_upload(&mut self, id: UploadId) {
        self.delete(UPLOADS, &id.0.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::ActionKey;

    #[test]
    fn uploads_are_done_in_the_order_they_were_noted() {
        let dir = tempfile::tempdir().expect("tempdir");
        let index = Index::open(&dir.path().join("index")).expect("opens");
        assert_eq!(index.last_upload().expect("reads"), None);
        let upload = |n: u64| Upload {
            remote: RemoteId::of("s3://one"),
            invocation: InvocationDigest(Digest::of(&n.to_be_bytes())),
            record: InputRecord {
                sources: Vec::new(),
                env: Vec::new(),
                observed: None,
                created_ms: n,
                loads: None,
            },
            keys: vec![ActionKey(Digest::of(b"k"))],
            secrets: Vec::new(),
            result: None,
        };
        for n in [300, 2, 70_000] {
            let mut batch = index.batch();
            batch.put_upload(UploadId(n), &upload(n)).expect("puts");
            batch.commit().expect("commits");
        }
        let first = index.uploads(2).expect("reads");
        assert_eq!(first, [2, 300].map(|n| (UploadId(n), upload(n))));
        assert_eq!(index.last_upload().expect("reads"), Some(UploadId(70_000)));
        let mut batch = index.batch();
        batch.delete_upload(UploadId(300));
        batch.commit().expect("commits");
        assert_eq!(index.upload_count().expect("reads"), 2);
    }

    #[test]
    fn what_one_remote_holds_another_does_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let index = Index::open(&dir.path().join("index")).expect("opens");
        let (one, other) = (RemoteId::of("s3://one"), RemoteId::of("s3://other"));
        let digest = Digest::of(b"b");
        let kept = Kept {
            size: 1,
            place: Place::Own,
            seen_ms: 5,
            known_ms: 7,
        };
        let mut batch = index.batch();
        batch.put_kept(one, &digest, &kept).expect("puts");
        batch.commit().expect("commits");
        assert_eq!(index.kept(one, &digest).expect("reads"), Some(kept));
        assert_eq!(index.kept(other, &digest).expect("reads"), None);
        assert_eq!(index.lost(one, &digest).expect("reads"), None);
        let mut batch = index.batch();
        batch.put_lost(one, &digest, &kept).expect("puts");
        batch.commit().expect("commits");
        assert_eq!(index.kept(one, &digest).expect("reads"), None);
        assert_eq!(index.lost(one, &digest).expect("reads"), Some(Place::Own));
        // Whoever says that it is there says it in vain, however often.
        for _ in 0..2 {
            let said = index.as_said(one, &digest, kept).expect("reads");
            assert_eq!((said.seen_ms, said.known_ms), (Kept::DOUBTED, 7));
            let mut batch = index.batch();
            batch.put_kept(one, &digest, &said).expect("puts");
            batch.commit().expect("commits");
            assert_eq!(index.kept(one, &digest).expect("reads"), Some(said));
            assert_eq!(index.lost(one, &digest).expect("reads"), None);
        }
        assert_eq!(index.as_said(other, &digest, kept).expect("reads"), kept);
    }
}
