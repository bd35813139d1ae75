//! Facts with a signature, and who is believed.
//!
//! An envelope is a version byte, the bytes of the fact and any number of ed25519 signatures (RFC 8032).
//! What is signed is a digest of the fact's purpose, its subject and its bytes: a result that is true of
//! one action is not taken for that of another, nor a tree for a result.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::str::FromStr;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use store::{Digest, Hasher};

const VERSION: u8 = 1;

/// No fact has more signatures: each that names who is trusted costs as much as a build can wait.
const MOST_SIGNATURES: usize = 16;

/// What a secret key's file starts with.
const SECRET: &str = "kachefs-secret-key-1 ";

/// Permissions that others must not have on a secret key.
const OTHERS: u32 = 0o077;

/// What a signed fact is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// The result of an action.
    Action,
    /// The results of a build.
    Build,
    /// A published tree.
    Tree,
}

impl Purpose {
    fn context(self) -> &'static str {
        match self {
            Self::Action => "kachefs signed action",
            Self::Build => "kachefs signed build",
            Self::Tree => "kachefs signed tree",
        }
    }
}

/// Who signs: 32 bytes, 64 hexadecimal characters for people.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    fn has_signed(&self, message: &Digest, signature: &[u8]) -> bool {
        let signature = Signature::from_slice(signature).ok();
        let key = VerifyingKey::from_bytes(&self.0).ok();
        // Strictly: keys whose signatures fit many messages are refused.
        let verified = key.zip(signature);
        verified.is_some_and(|(key, signature)| {
            key.verify_strict(message.as_bytes(), &signature).is_ok()
        })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({}…)", &hex(&self.0)[..12])
    }
}

/// A text that is no public key.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a public key: {0:?} (64 hexadecimal characters, as `kachefs key list` shows them)")]
pub struct ParseKeyError(pub String);

impl FromStr for PublicKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let bytes = bytes_of(text).ok_or_else(|| ParseKeyError(text.to_owned()))?;
        VerifyingKey::from_bytes(&bytes)
            .ok()
            .filter(|key| !key.is_weak())
            .map(|_| Self(bytes))
            .ok_or_else(|| ParseKeyError(text.to_owned()))
    }
}

/// Whose facts are used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    /// Those of everybody who can write to the remote.
    Everybody,
    /// What one of these has signed.
    Only(Vec<PublicKey>),
}

impl Trust {
    /// The keys that are trusted; none where everybody is.
    pub fn keys(&self) -> &[PublicKey] {
        match self {
            Self::Everybody => &[],
            Self::Only(keys) => keys,
        }
    }
}

/// What signs. Never printed.
pub struct SecretKey(SigningKey);

impl SecretKey {
    /// A new key.
    pub fn generate() -> io::Result<Self> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        Ok(Self(SigningKey::from_bytes(&seed)))
    }

    /// Whom others have to trust.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// Writes the key to a new file that nobody else can read. [`io::ErrorKind::AlreadyExists`] where
    /// there is a file.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        writeln!(file, "{SECRET}{}", hex(self.0.as_bytes()))?;
        file.sync_all()
    }

    /// Reads a key. [`io::ErrorKind::PermissionDenied`] where others could, too.
    pub fn load(path: &Path) -> io::Result<Self> {
        if fs::metadata(path)?.permissions().mode() & OTHERS != 0 {
            let text = "others can read it: chmod 600";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let text = fs::read_to_string(path)?;
        let seed = text.trim_end().strip_prefix(SECRET).and_then(bytes_of);
        let seed =
            seed.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a secret key"))?;
        Ok(Self(SigningKey::from_bytes(&seed)))
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    fact: Vec<u8>,
    signatures: Vec<(PublicKey, Vec<u8>)>,
}

/// A fact that may be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opened {
    /// The bytes that were sealed.
    pub fact: Vec<u8>,
    /// Who of those that are trusted has signed it; `None` where nobody has to.
    pub signer: Option<PublicKey>,
}

/// Why a fact must not be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Untrusted {
    /// It is not an envelope, or one of a later kachefs.
    #[error("damaged, or of a later kachefs")]
    Damaged,
    /// Nobody has signed it.
    #[error("not signed")]
    Unsigned,
    /// Only others have signed it.
    #[error("signed by nobody who is trusted")]
    Stranger,
    /// Who is trusted has signed something else.
    #[error("the signature is not of this")]
    Forged,
}

/// Puts a fact about `subject` into an envelope, signed where there is a key.
pub fn seal(purpose: Purpose, subject: &[u8], fact: Vec<u8>, key: Option<&SecretKey>) -> Vec<u8> {
    let message = message(purpose, subject, &fact);
    let sign = |key: &SecretKey| {
        (
            key.public(),
            key.0.sign(message.as_bytes()).to_bytes().to_vec(),
        )
    };
    let signatures = key.map(sign).into_iter().collect();
    let envelope = Envelope { fact, signatures };
    // A vector has room for everything.
    postcard::to_extend(&envelope, vec![VERSION]).unwrap_or_default()
}

/// Takes the fact about `subject` out of an envelope, where it may be used.
pub fn open(
    purpose: Purpose,
    subject: &[u8],
    sealed: &[u8],
    trust: &Trust,
) -> Result<Opened, Untrusted> {
    let body = sealed.strip_prefix(&[VERSION]).ok_or(Untrusted::Damaged)?;
    let (envelope, rest) =
        postcard::take_from_bytes::<Envelope>(body).map_err(|_| Untrusted::Damaged)?;
    if !rest.is_empty() || envelope.signatures.len() > MOST_SIGNATURES {
        return Err(Untrusted::Damaged);
    }
    let Trust::Only(trusted) = trust else {
        return Ok(Opened {
            fact: envelope.fact,
            signer: None,
        });
    };
    if envelope.signatures.is_empty() {
        return Err(Untrusted::Unsigned);
    }
    let message = message(purpose, subject, &envelope.fact);
    let mut verdict = Untrusted::Stranger;
    for (key, signature) in &envelope.signatures {
        if !trusted.contains(key) {
            continue;
        }
        if key.has_signed(&message, signature) {
            return Ok(Opened {
                fact: envelope.fact,
                signer: Some(*key),
            });
        }
        verdict = Untrusted::Forged;
    }
    Err(verdict)
}

fn message(purpose: Purpose, subject: &[u8], fact: &[u8]) -> Digest {
    Hasher::new(purpose.context())
        .field(subject)
        .field(fact)
        .finish()
}

fn hex(bytes: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*bytes).to_hex().to_string()
}

fn bytes_of(text: &str) -> Option<[u8; 32]> {
    blake3::Hash::from_hex(text)
        .ok()
        .map(|bytes| *bytes.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SecretKey {
        SecretKey::generate().expect("random numbers")
    }

    fn only(keys: &[&SecretKey]) -> Trust {
        Trust::Only(keys.iter().map(|key| key.public()).collect())
    }

    #[test]
    fn who_is_trusted_is_believed() {
        let (ours, theirs) = (key(), key());
        let sealed = seal(Purpose::Action, b"key", b"fact".to_vec(), Some(&ours));
        let open = |sealed: &[u8], trust: &Trust| open(Purpose::Action, b"key", sealed, trust);
        let opened = open(&sealed, &only(&[&theirs, &ours])).expect("trusted");
        assert_eq!(
            (opened.fact.as_slice(), opened.signer),
            (&b"fact"[..], Some(ours.public()))
        );
        let signer = open(&sealed, &Trust::Everybody).map(|opened| opened.signer);
        assert_eq!(signer, Ok(None));
        for trust in [only(&[&theirs]), only(&[])] {
            assert_eq!(open(&sealed, &trust), Err(Untrusted::Stranger));
        }
        let unsigned = seal(Purpose::Action, b"key", b"fact".to_vec(), None);
        assert_eq!(open(&unsigned, &only(&[&ours])), Err(Untrusted::Unsigned));
    }

    #[test]
    fn a_signature_is_of_one_fact_about_one_subject() {
        let key = key();
        let trust = only(&[&key]);
        let sealed = seal(Purpose::Action, b"key", b"fact".to_vec(), Some(&key));
        for (purpose, subject) in [(Purpose::Action, b"yek"), (Purpose::Build, b"key")] {
            assert_eq!(
                open(purpose, subject, &sealed, &trust),
                Err(Untrusted::Forged)
            );
        }
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            let opened = open(Purpose::Action, b"key", &damaged, &trust);
            assert!(opened.is_err(), "byte {at}");
            assert!(open(Purpose::Action, b"key", &sealed[..at], &trust).is_err());
        }
    }

    /// Other machines read what is written today.
    #[test]
    fn the_layout_is_fixed() {
        let unsigned = seal(Purpose::Tree, b"x", b"fact".to_vec(), None);
        assert_eq!(unsigned, [&[1, 4][..], b"fact", &[0]].concat());
        let key = SecretKey(SigningKey::from_bytes(&[7; 32]));
        let sealed = seal(Purpose::Tree, b"x", b"fact".to_vec(), Some(&key));
        let (head, signature) = sealed.split_at(1 + 5 + 1 + 32 + 1);
        let public = key.public().0;
        assert_eq!(head, [&[1, 4][..], b"fact", &[1], &public, &[64]].concat());
        assert_eq!(
            Digest::of(signature).hex(),
            "138380e45c86dfce375d200f98715da4d8a30a2e04d9da344479a806efa9c2ff",
            "what is signed is another message"
        );
    }

    #[test]
    fn many_signatures_are_not_looked_at() {
        let ours = key();
        let forged = (ours.public(), vec![0; 64]);
        let open = |count| {
            let envelope = Envelope {
                fact: b"fact".to_vec(),
                signatures: vec![forged.clone(); count],
            };
            let sealed = postcard::to_extend(&envelope, vec![VERSION]).expect("encodes");
            open(Purpose::Action, b"key", &sealed, &only(&[&ours]))
        };
        assert_eq!(open(MOST_SIGNATURES), Err(Untrusted::Forged));
        assert_eq!(open(MOST_SIGNATURES + 1), Err(Untrusted::Damaged));
    }

    #[test]
    fn a_secret_key_is_kept_secret() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("key");
        let key = key();
        key.save(&path).expect("saves");
        assert_eq!(
            fs::metadata(&path).expect("is there").permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            SecretKey::load(&path).expect("loads").public(),
            key.public()
        );
        let error = key.save(&path).expect_err("another key is there");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod");
        let error = SecretKey::load(&path).err().expect("others can read it");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn public_keys_are_read_as_they_are_shown() {
        let public = key().public();
        assert_eq!(public.to_string().parse(), Ok(public));
        // The neutral element: every message has a signature that fits it.
        let weak = format!("01{}", "00".repeat(31));
        for text in ["", "x", &weak, &"f".repeat(63)] {
            assert!(text.parse::<PublicKey>().is_err(), "{text}");
        }
    }
}
