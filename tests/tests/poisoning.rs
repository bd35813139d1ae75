//! Somebody who can write to the remote, but has no key that is trusted, makes nobody use a byte of theirs.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::{Must, Project, Sandbox, processes, samples, tree};
use remote::signed::{self, Purpose, SecretKey};
use remote::{ObjectName, blob};
use store::action::{OutputContent, TreeContent};
use store::codec::{decode, encode};
use store::{ActionEntry, BuildManifest, Digest, Fact, InvocationDigest, Tree, TreeBody};

/// What the attacker would have everybody run.
const EVIL: &[u8] = b"#!/bin/sh\necho EVIL\n";

/// More memory than a daemon takes to refuse what unpacks to very much, in KiB.
const MUCH: u64 = 400 << 10;

/// A bucket that somebody honest has filled, as it was before anybody attacked it.
struct Honest {
    machine: Sandbox,
    project: Project,
    bucket: PathBuf,
    key: String,
}

impl Honest {
    fn new() -> Self {
        let machine = Sandbox::with_limit(Duration::from_mins(10));
        let bucket = machine.make_dir("bucket");
        let key = machine.kachefs("key generate").ok().stdout;
        set(&machine, &bucket, "");
        let project = samples::whole(machine.path("project"));
        machine.mount(project.target());
        machine.cargo(&project, "build").ok();
        machine.kachefs("push --wait").ok();
        let publish = machine.kachefs("publish --name app");
        publish.arg(project.target()).ok();
        Self {
            bucket,
            project,
            key: key.trim().to_owned(),
            machine,
        }
    }

    /// Has somebody who trusts only the honest one build from the bucket as an attacker left it.
    fn survives(&self, name: &str, attack: impl FnOnce(&Bucket)) {
        let reader = Sandbox::with_limit(Duration::from_mins(5));
        let bucket = Bucket(reader.path("bucket"));
        let copied = self.machine.command("cp").arg("-a");
        copied.arg(&self.bucket).arg(&bucket.0).ok();
        attack(&bucket);
        set(&reader, &bucket.0, &format!("--trust {}", self.key));
        let checkout = self.project.checkout(reader.path("checkout"));
        reader.mount(checkout.target());
        let program = checkout.program("app");
        // Whose bytes do not come does not start.
        let runs = || {
            reader
                .command("sh")
                .args(["-c", "exec \"$0\""])
                .arg(&program)
                .run()
        };
        let mut right = false;
        // What was swapped is found out when it is read, and made by the next build.
        for _ in 0..6 {
            let built = reader.cargo(&checkout, "build").run();
            if built.status.success() && program.exists() {
                let outcome = runs();
                assert!(!outcome.stdout.contains("EVIL"), "{name}: {outcome}");
                if outcome.status.success() {
                    assert_eq!(outcome.stdout, samples::WHOLE_OUTPUT, "{name}");
                    right = true;
                    break;
                }
            }
            std::thread::sleep(Duration::from_millis(1500));
        }
        assert!(right, "{name}: no build repairs it");
        self.reads_no_other_tree(name, &reader);
        let peak = processes::peak_memory(reader.daemon_pid());
        assert!(peak < MUCH, "{name}: {peak} KiB");
    }

    /// What the attacker forges is what would be used, were it believed.
    fn fools_who_believes_everybody(&self) {
        let reader = Sandbox::new();
        let bucket = Bucket(reader.path("bucket"));
        let copied = self.machine.command("cp").arg("-a");
        copied.arg(&self.bucket).arg(&bucket.0).ok();
        forge(&bucket, Seal::Unsigned);
        set(&reader, &bucket.0, "");
        let checkout = self.project.checkout(reader.path("checkout"));
        reader.mount(checkout.target());
        let built = reader.cargo(&checkout, "build").fails();
        assert!(built.stderr.contains("corrupt metadata"), "{built}");
        let there = reader.make_dir("farm");
        reader.kachefs("mount --read-only app").arg(&there).ok();
        assert_eq!(reader.output_of(there.join("debug/app")), "EVIL\n");
    }

    /// The tree is the published one, or there is none; a file of it has its bytes, or none.
    fn reads_no_other_tree(&self, name: &str, reader: &Sandbox) {
        let there = reader.make_dir("farm");
        let mount = reader.kachefs("mount --read-only app").arg(&there).run();
        if !mount.status.success() {
            assert!(!mount.stderr.contains("panicked"), "{name}: {mount}");
            return;
        }
        for path in tree::files(&there) {
            let original = self
                .project
                .target()
                .join(path.strip_prefix(&there).must("below"));
            match fs::read(&path) {
                Ok(bytes) => {
                    let expected = fs::read(&original).must(original.display());
                    assert!(bytes == expected, "{name}: {}", path.display());
                }
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}: {error}"),
            }
        }
    }
}

fn set(machine: &Sandbox, bucket: &Path, more: &str) {
    let set = format!("remote set {} --wait 2 {more}", bucket.display());
    machine.kachefs(&set).ok();
}

/// A bucket in the hands of an attacker.
struct Bucket(PathBuf);

impl Bucket {
    fn objects(&self, kind: &str) -> Vec<PathBuf> {
        let mut objects = tree::files(&self.0.join("v1").join(kind));
        objects.retain(|path| path.is_file());
        objects.sort();
        assert!(!objects.is_empty(), "{kind}");
        objects
    }

    fn replace(path: &Path, bytes: &[u8]) {
        fs::remove_file(path).must("remove");
        fs::write(path, bytes).must("write");
    }

    /// Each object takes the place of another of its kind.
    fn rotate(&self, kind: &str) {
        let objects = self.objects(kind);
        let contents: Vec<_> = objects
            .iter()
            .map(|path| fs::read(path).must("read"))
            .collect();
        for (index, path) in objects.iter().enumerate() {
            Self::replace(path, &contents[(index + 1) % contents.len()]);
        }
    }

    /// Puts the blob there that the attacker's results name.
    fn put_evil(&self) -> Digest {
        let digest = Digest::of(EVIL);
        let path = self.0.join(ObjectName::blob(&digest).as_str());
        fs::create_dir_all(path.parent().must("a parent")).must("make");
        let file = fs::File::create(path).must("make");
        assert_eq!(
            blob::pack(EVIL, EVIL.len() as u64, file).must("write"),
            digest
        );
        digest
    }
}

/// How an attacker makes a statement look as if somebody had signed it.
#[derive(Clone, Copy)]
enum Seal<'a> {
    Unsigned,
    With(&'a SecretKey),
    /// With the signatures of what it was before.
    AsBefore,
}

impl Seal<'_> {
    fn seal(self, purpose: Purpose, subject: &[u8], fact: Vec<u8>, before: &[u8]) -> Vec<u8> {
        match self {
            Self::Unsigned => signed::seal(purpose, subject, fact, None),
            Self::With(key) => signed::seal(purpose, subject, fact, Some(key)),
            Self::AsBefore => {
                let envelope: Envelope = postcard::from_bytes(&before[1..]).must("an envelope");
                let sealed = postcard::to_allocvec(&(fact, envelope.1)).must("encodes");
                [&before[..1], &sealed].concat()
            }
        }
    }
}

/// What is signed, and by whom.
type Envelope = (Vec<u8>, Vec<([u8; 32], Vec<u8>)>);

fn fact_of(envelope: &[u8]) -> Vec<u8> {
    let envelope: Envelope = postcard::from_bytes(&envelope[1..]).must("an envelope");
    envelope.0
}

fn unpack(bytes: &[u8]) -> Vec<u8> {
    zstd::decode_all(bytes).must("unpacks")
}

/// Packed as others pack it, with its length.
fn pack(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).must("packs")
}

/// Has every file of a result be the attacker's.
fn poison(fact: &mut Fact, evil: Digest) {
    fact.packed.clear();
    for (_, entry) in &mut fact.entries {
        match entry {
            ActionEntry::Result(result) => {
                for output in &mut result.outputs {
                    if let OutputContent::Blob { digest, size } = &mut output.content {
                        (*digest, *size) = (evil, EVIL.len() as u64);
                    }
                }
            }
            ActionEntry::Script(result) => {
                for entry in &mut result.tree {
                    if let TreeContent::Blob { digest, size } = &mut entry.content {
                        (*digest, *size) = (evil, EVIL.len() as u64);
                    }
                }
                result.stdout = b"cargo::rustc-env=EVIL=1\n".to_vec();
            }
            ActionEntry::PathBound(_) => {}
        }
    }
}

/// Has results, manifests and the tree name what is the attacker's.
fn forge(bucket: &Bucket, seal: Seal<'_>) {
    let evil = bucket.put_evil();
    for path in bucket.objects("actions") {
        let object = fs::read(&path).must("read");
        let sealed: Vec<Vec<u8>> = postcard::from_bytes(&unpack(&object)).must("results");
        let forged = sealed.iter().map(|envelope| {
            let mut fact: Fact = decode(&fact_of(envelope)).must("a fact");
            poison(&mut fact, evil);
            let InvocationDigest(subject) = fact.invocation;
            let bytes = encode(&fact).must("encodes");
            seal.seal(Purpose::Action, subject.as_bytes(), bytes, envelope)
        });
        let forged: Vec<_> = forged.collect();
        let object = pack(&postcard::to_allocvec(&forged).must("encodes"));
        Bucket::replace(&path, &object);
    }
    for path in bucket.objects("builds") {
        let envelope = fs::read(&path).must("read");
        let mut manifest: BuildManifest = decode(&unpack(&fact_of(&envelope))).must("a manifest");
        for fact in &mut manifest.facts {
            poison(fact, evil);
        }
        let subject: Digest = file_name(&path).parse().must("a fingerprint");
        let bytes = pack(&encode(&manifest).must("encodes"));
        let sealed = seal.seal(Purpose::Build, subject.as_bytes(), bytes, &envelope);
        Bucket::replace(&path, &sealed);
    }
    forge_trees(bucket, seal, |tree| {
        tree.packed.clear();
        for inode in &mut tree.inodes {
            if matches!(inode.body, TreeBody::Blob { .. }) {
                inode.body = TreeBody::Blob {
                    digest: evil,
                    size: EVIL.len() as u64,
                };
            }
        }
    });
}

fn forge_trees(bucket: &Bucket, seal: Seal<'_>, change: impl Fn(&mut Tree)) {
    for path in bucket.objects("trees") {
        let envelope = fs::read(&path).must("read");
        let mut tree: Tree = decode(&unpack(&fact_of(&envelope))).must("a tree");
        change(&mut tree);
        let bytes = pack(&encode(&tree).must("encodes"));
        let subject = file_name(&path);
        let sealed = seal.seal(Purpose::Tree, subject.as_bytes(), bytes, &envelope);
        Bucket::replace(&path, &sealed);
    }
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str());
    name.must("a name").to_owned()
}

#[test]
fn forged_statements_are_not_believed() {
    let honest = Honest::new();
    let stranger = SecretKey::generate().must("a key");
    honest.fools_who_believes_everybody();
    honest.survives("unsigned", |bucket| forge(bucket, Seal::Unsigned));
    honest.survives("a stranger's", |bucket| {
        forge(bucket, Seal::With(&stranger));
    });
    honest.survives("with old signatures", |bucket| {
        forge(bucket, Seal::AsBefore);
    });
}

#[test]
fn what_is_true_of_one_thing_is_not_believed_of_another() {
    let honest = Honest::new();
    honest.survives("results swapped", |bucket| {
        fs::remove_dir_all(bucket.0.join("v1/builds")).must("remove");
        bucket.rotate("actions");
    });
    honest.survives("blobs swapped", |bucket| {
        bucket.rotate("blobs");
        bucket.rotate("packs");
    });
    honest.survives("evil blobs", |bucket| {
        bucket.put_evil();
        let evil = bucket.0.join(ObjectName::blob(&Digest::of(EVIL)).as_str());
        let evil = fs::read(evil).must("read");
        for path in bucket.objects("blobs") {
            Bucket::replace(&path, &evil);
        }
    });
    honest.survives("a result as a manifest", |bucket| {
        let results = fs::read(&bucket.objects("actions")[0]).must("read");
        for path in bucket.objects("builds") {
            Bucket::replace(&path, &results);
        }
        let manifest = fs::read(&bucket.objects("builds")[0]).must("read");
        for path in bucket.objects("trees") {
            Bucket::replace(&path, &manifest);
        }
    });
}

#[test]
fn what_unpacks_to_very_much_does_no_harm() {
    let honest = Honest::new();
    let bomb = zstd::encode_all(std::io::repeat(0).take(2 << 30), 1).must("packs");
    assert!(bomb.len() < 1 << 20, "{}", bomb.len());
    honest.survives("bombs", |bucket| {
        for kind in ["actions", "builds", "trees", "blobs", "packs"] {
            for path in bucket.objects(kind) {
                Bucket::replace(&path, &bomb);
            }
        }
    });
    honest.survives("bombs in envelopes and frames", |bucket| {
        for path in bucket.objects("builds") {
            let subject: Digest = file_name(&path).parse().must("a fingerprint");
            let sealed = signed::seal(Purpose::Build, subject.as_bytes(), bomb.clone(), None);
            Bucket::replace(&path, &sealed);
        }
        for path in bucket.objects("blobs") {
            // The frames, but not what they are said to be.
            let mut object = fs::read(&path).must("read");
            let at = object.len().min(200);
            object.truncate(at);
            object.extend(&bomb);
            Bucket::replace(&path, &object);
        }
    });
}

#[test]
fn nothing_is_read_or_written_outside() {
    let honest = Honest::new();
    let outside = honest.machine.path("outside");
    fs::write(&outside, EVIL).must("write");
    honest.survives("links instead of objects", |bucket| {
        for kind in ["actions", "builds", "trees", "blobs", "packs"] {
            for path in bucket.objects(kind) {
                fs::remove_file(&path).must("remove");
                std::os::unix::fs::symlink(&outside, &path).must("link");
            }
        }
    });
    // Somebody who believes everybody is told of names that lead out of the tree.
    for (name, path) in [
        ("dots", "../evil"),
        ("absolute", "/tmp/kachefs-evil"),
        ("below a link", "link/evil"),
        ("in the middle", "debug/../../evil"),
    ] {
        let reader = Sandbox::new();
        let bucket = Bucket(reader.path("bucket"));
        let copied = reader.command("cp").arg("-a");
        copied.arg(&honest.bucket).arg(&bucket.0).ok();
        forge_trees(&bucket, Seal::Unsigned, |tree| {
            let file = tree
                .inodes
                .iter()
                .position(|inode| matches!(inode.body, TreeBody::Blob { .. }));
            let file = u32::try_from(file.must("a file")).must("small");
            if path.starts_with("link/") {
                let mut link = tree.inodes[0].clone();
                link.body = TreeBody::Link(b"/".to_vec());
                tree.names.push((
                    b"link".to_vec(),
                    u32::try_from(tree.inodes.len()).must("small"),
                ));
                tree.inodes.push(link);
            }
            tree.names.push((path.as_bytes().to_vec(), file));
        });
        set(&reader, &bucket.0, "");
        let there = reader.make_dir("a/farm");
        let mount = reader.kachefs("mount --read-only app").arg(&there).fails();
        assert!(
            mount.one_line_error().contains("damaged"),
            "{name}: {mount}"
        );
        assert!(
            !reader.path("evil").exists() && !reader.path("a/evil").exists(),
            "{name}"
        );
    }
}

#[test]
fn older_statements_are_as_true_as_they_were() {
    let honest = Honest::new();
    let old = honest.machine.path("old");
    let copied = honest.machine.command("cp").arg("-a");
    copied.arg(&honest.bucket).arg(&old).ok();
    let main = "fn main() { println!(\"newer {}\", app::line()); }\n";
    honest.project.write("crates/app/src/main.rs", main);
    honest.machine.cargo(&honest.project, "build").ok();
    honest.machine.kachefs("push --wait").ok();
    let reader = Sandbox::new();
    let bucket = reader.path("bucket");
    reader
        .command("cp")
        .arg("-a")
        .arg(&honest.bucket)
        .arg(&bucket)
        .ok();
    for kind in ["actions", "builds"] {
        fs::remove_dir_all(bucket.join("v1").join(kind)).must("remove");
        let before = old.join("v1").join(kind);
        reader
            .command("cp")
            .arg("-a")
            .arg(before)
            .arg(bucket.join("v1"))
            .ok();
    }
    set(&reader, &bucket, &format!("--trust {}", honest.key));
    let checkout = honest.project.checkout(reader.path("checkout"));
    reader.mount(checkout.target());
    let (seen, _) = reader.during(|| reader.cargo(&checkout, "build").ok());
    assert!(seen.hits > 0 && seen.misses > 0, "{seen:?}");
    let expected = format!("newer {}", samples::WHOLE_OUTPUT);
    assert_eq!(reader.output_of(checkout.program("app")), expected);
}
