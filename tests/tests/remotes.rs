//! Remotes do what is relied on: a directory, and a bucket of a real S3 server.

use std::fs;
use std::future::Future;
use std::io::Cursor;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use harness::{Must, Sandbox, Seaweed};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use remote::blob::{self, FRAME, Header};
use remote::{
    Body, Kind, Limits, Location, ObjectName, Put, Remote, RemoteError, S3Location, Written, check,
};
use store::{Digest, InvocationDigest};

/// Runs what waits for remotes.
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().must("a runtime");
    runtime.block_on(work)
}

fn bucket(server: &Seaweed, name: &str) -> Location {
    Location::S3(S3Location {
        bucket: name.to_owned(),
        prefix: "some/prefix".to_owned(),
        endpoint: Some(server.endpoint()),
        region: Some("us-east-1".to_owned()),
        profile: None,
        anonymous: true,
    })
}

async fn open(location: &Location, limits: Limits) -> Arc<dyn Remote> {
    remote::open(location, limits).await.must("open")
}

fn text(text: &str) -> Body {
    Body::Bytes(Bytes::copy_from_slice(text.as_bytes()))
}

/// What every remote does.
async fn contract(remote: &dyn Remote) {
    let name = ObjectName::blob(&Digest::of(b"a"));
    let get = |range| remote.get(&name, range, 100);
    for range in [None, Some(0..5), Some(3..3)] {
        assert_eq!(get(range).await.must("get nothing"), None);
    }
    assert_eq!(remote.head(&name).await.must("head"), None);
    remote.delete(&name).await.must("delete nothing");

    let before = SystemTime::now();
    let put = remote.put(&name, text("0123456789"), Put::IfAbsent).await;
    assert_eq!(put.must("put"), Written::New);
    let put = remote.put(&name, text("other"), Put::IfAbsent).await;
    assert_eq!(put.must("put again"), Written::Existed);
    assert_eq!(get(None).await.must("get"), Some("0123456789".into()));
    for (range, found) in [
        (0..1, "0"),
        (3..6, "345"),
        (8..99, "89"),
        (4..4, ""),
        (10..20, ""),
        (99..100, ""),
        (0..10, "0123456789"),
    ] {
        let got = get(Some(range.clone())).await.must("get a range");
        assert_eq!(got, Some(Bytes::from(found)), "{range:?}");
    }
    let error = remote.get(&name, None, 9).await.err().must("too large");
    assert!(
        matches!(error, RemoteError::TooLarge { most: 9, .. }),
        "{error}"
    );

    let object = remote.head(&name).await.must("head").must("is there");
    assert_eq!((&object.name, object.size), (&name, 10));
    assert!(
        object.modified + Duration::from_secs(2) > before,
        "{object:?}"
    );

    let put = remote.put(&name, text("new"), Put::Replace).await;
    assert_eq!(put.must("replace"), Written::New);
    assert_eq!(get(None).await.must("get"), Some("new".into()));

    let names = [b"b", b"c", b"d", b"e"].map(|byte| ObjectName::blob(&Digest::of(byte)));
    for name in &names {
        remote.put(name, text("x"), Put::IfAbsent).await.must("put");
    }
    let action = ObjectName::action(&InvocationDigest(Digest::of(b"a")));
    remote
        .put(&action, text(""), Put::IfAbsent)
        .await
        .must("put an empty one");
    assert_eq!(
        remote.get(&action, None, 0).await.must("get"),
        Some(Bytes::new())
    );

    let mut sorted = [&names[..], std::slice::from_ref(&name)].concat();
    sorted.sort();
    let list = async |after| {
        let found = remote.list(Kind::Blobs, after).await.must("list");
        found
            .into_iter()
            .map(|object| object.name)
            .collect::<Vec<_>>()
    };
    assert_eq!(list(None).await, sorted);
    assert_eq!(list(Some(&sorted[1])).await, sorted[2..]);
    assert_eq!(list(sorted.last()).await, []);

    remote.delete(&name).await.must("delete");
    assert_eq!(get(None).await.must("get"), None);
    assert_eq!(list(None).await.len(), 4);
    let checked = check(remote, false).await.must("check");
    assert_eq!(checked.findings, [""; 0]);
    assert!(checked.write.is_some());
    assert_eq!(remote.list(Kind::Check, None).await.must("list"), []);
}

/// One of many who write the same object is told that it was the first.
async fn race(remote: Arc<dyn Remote>) {
    for round in 0..2_u8 {
        let name = ObjectName::pack(&Digest::of(&[round]));
        let writers = (0..4_u8).map(|writer| {
            let (remote, name) = (Arc::clone(&remote), name.clone());
            tokio::spawn(async move {
                let body = Body::Bytes(Bytes::from(vec![writer; 10_000]));
                remote.put(&name, body, Put::IfAbsent).await.must("put")
            })
        });
        let mut first = 0;
        for writer in writers.collect::<Vec<_>>() {
            first += u32::from(writer.await.must("joins") == Written::New);
        }
        // None where an answer got lost and the first was sent again.
        assert!(first <= 1, "round {round}: {first} were first");
        let bytes = remote
            .get(&name, None, 10_000)
            .await
            .must("get")
            .must("is there");
        assert!(
            bytes.len() == 10_000 && bytes.iter().all(|byte| *byte == bytes[0]),
            "torn"
        );
    }
}

/// A blob that is kept in frames, of which only some are fetched.
async fn frames(remote: &dyn Remote, sandbox: &Sandbox) {
    let mut bytes = vec![7; 5 * 256 * 1024 + 99];
    blake3::Hasher::new()
        .finalize_xof()
        .fill(&mut bytes[1_000_000..]);
    let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
    let mut object = Cursor::new(Vec::new());
    blob::pack(bytes.as_slice(), size, &mut object).must("pack");
    let path = sandbox.path("object");
    fs::write(&path, object.get_ref()).must("write");
    let name = ObjectName::blob(&digest);
    remote
        .put(&name, Body::File(path), Put::IfAbsent)
        .await
        .must("put a file");

    let whole = remote
        .get(&name, None, size * 2)
        .await
        .must("get")
        .must("is there");
    assert_eq!(
        blob::unpack(&whole, digest, size).as_deref(),
        Ok(bytes.as_slice())
    );

    let length = blob::Frames::of(size).must("small").header_len();
    let start = remote
        .get(&name, Some(0..length), length)
        .await
        .must("get")
        .must("is there");
    let header = Header::read(&start, digest, size).must("a header");
    let kept = header.kept(4..5);
    let frame = remote
        .get(&name, Some(kept), FRAME)
        .await
        .must("get")
        .must("is there");
    let unpacked = header.unpack(4, &frame).must("unpack");
    assert_eq!(unpacked, bytes[4 * 256 * 1024..5 * 256 * 1024]);
}

#[test]
fn a_directory_is_a_remote() {
    let sandbox = Sandbox::new();
    let root = sandbox.path("remote");
    let location = Location::Directory(root.clone());
    run(async {
        let remote = open(&location, Limits::default()).await;
        // Not mounted: nothing is put where it will be.
        let name = ObjectName::check(&Digest::of(b""));
        let error = remote.put(&name, text("x"), Put::Replace).await;
        assert!(
            error.as_ref().is_err_and(RemoteError::is_passing),
            "{error:?}"
        );
        assert!(!root.exists());
        fs::create_dir_all(root.join("v1")).must("mkdir");
        contract(&*remote).await;
        race(Arc::clone(&remote)).await;
        frames(&*remote, &sandbox).await;
        // Others read what we write.
        let objects = remote.list(Kind::Blobs, None).await.must("list");
        let mode = fs::metadata(root.join(objects[0].name.as_str())).must("stat");
        assert_eq!(mode.permissions().mode() & 0o444, 0o444);
        // What is no file is not opened: a link may lead anywhere, a pipe has no end.
        let victim = sandbox.path("victim");
        fs::write(&victim, "mine").must("write");
        let name = ObjectName::check(&Digest::of(b"link"));
        let place = root.join(name.as_str());
        symlink(&victim, &place).must("link");
        assert!(remote.get(&name, None, 100).await.is_err());
        let put = remote.put(&name, text("theirs"), Put::IfAbsent).await;
        assert_eq!(put.must("put"), Written::Existed);
        let put = remote.put(&name, text("theirs"), Put::Replace).await;
        assert_eq!(put.must("replace the link"), Written::New);
        assert_eq!(fs::read_to_string(&victim).must("read"), "mine");
        fs::remove_file(&place).must("remove");
        mkfifo(&place, Mode::S_IRWXU).must("mkfifo");
        assert!(remote.get(&name, None, 100).await.is_err());
        assert_eq!(remote.list(Kind::Check, None).await.must("list"), []);
        // What is not an object is not seen.
        let stray = root.join("v1/blobs/zz");
        fs::create_dir_all(&stray).must("mkdir");
        fs::write(stray.join(".part-123"), "").must("write");
        assert_eq!(remote.list(Kind::Blobs, None).await.must("list").len(), 5);
    });
}

/// The directory of a mount point is there when nothing is mounted on it, and empty.
#[test]
fn a_directory_that_is_not_mounted_is_no_empty_remote() {
    let sandbox = Sandbox::new();
    let root = sandbox.make_dir("remote");
    let layout = root.join("v1");
    let elsewhere = sandbox.path("elsewhere");
    run(async {
        let remote = open(&Location::Directory(root.clone()), Limits::default()).await;
        let name = ObjectName::check(&Digest::of(b"x"));
        let refuses = async || {
            let errors = [
                remote.get(&name, None, 1).await.err(),
                remote.put(&name, text("x"), Put::Replace).await.err(),
                remote.put(&name, text("x"), Put::IfAbsent).await.err(),
                remote.head(&name).await.err(),
                remote.list(Kind::Check, None).await.err(),
                remote.delete(&name).await.err(),
                remote.unfinished(SystemTime::now(), true).await.err(),
                check(&*remote, false).await.err(),
                check(&*remote, true).await.err(),
            ];
            for (call, error) in errors.into_iter().enumerate() {
                let error = error.must(format!("call {call} fails"));
                assert!(error.is_passing(), "call {call}: {error}");
                let error = error.to_string();
                assert!(error.contains("mounted"), "call {call}: {error}");
            }
            let left = fs::read_dir(&root).must("list").count();
            assert_eq!(left, usize::from(layout.exists()), "nothing is made");
        };
        refuses().await;
        fs::create_dir(&layout).must("mkdir");
        let put = remote.put(&name, text("x"), Put::IfAbsent).await;
        assert_eq!(put.must("put"), Written::New);
        // It is unmounted and mounted again.
        fs::rename(&layout, &elsewhere).must("rename");
        refuses().await;
        // A file of that name is none.
        fs::write(&layout, "").must("write");
        refuses().await;
        fs::remove_file(&layout).must("remove");
        fs::rename(&elsewhere, &layout).must("rename");
        let got = remote.get(&name, None, 1).await.must("get");
        assert_eq!(got, Some("x".into()));
    });
}

#[test]
fn a_bucket_is_a_remote() {
    let sandbox = Sandbox::new();
    let server = Seaweed::start(&sandbox);
    server.make_bucket("bucket");
    run(async {
        let remote = open(&bucket(&server, "bucket"), Limits::default()).await;
        contract(&*remote).await;
        race(Arc::clone(&remote)).await;
        frames(&*remote, &sandbox).await;
        let other = open(&bucket(&server, "no-such-bucket"), Limits::default()).await;
        let error = other
            .get(&ObjectName::check(&Digest::of(b"")), None, 1)
            .await;
        let error = error.err().must("no bucket").to_string();
        assert!(
            error.contains("no-such-bucket") && error.contains("NoSuchBucket"),
            "{error}"
        );
    });
}

/// A listing has pages, and objects of others between ours.
#[test]
fn everything_is_listed() {
    const MANY: u32 = 2_100;
    let sandbox = Sandbox::new();
    let server = Seaweed::start(&sandbox);
    server.make_bucket("bucket");
    sandbox.make_dir("remote/v1");
    let directory = Location::Directory(sandbox.path("remote"));
    for location in [directory, bucket(&server, "bucket")] {
        run(async {
            let remote = open(&location, Limits::default()).await;
            let mut names: Vec<_> = (0..MANY)
                .map(|number| ObjectName::blob(&Digest::of(&number.to_le_bytes())))
                .collect();
            for names in names.chunks(64) {
                let puts = names.iter().map(|name| {
                    let (remote, name) = (Arc::clone(&remote), name.clone());
                    tokio::spawn(async move { remote.put(&name, text("x"), Put::Replace).await })
                });
                for put in puts.collect::<Vec<_>>() {
                    put.await.must("joins").must("put");
                }
            }
            names.sort();
            let mut listed = Vec::new();
            let mut pages = 0;
            loop {
                let page = remote.list(Kind::Blobs, listed.last()).await.must("list");
                if page.is_empty() {
                    break;
                }
                pages += 1;
                listed.extend(page.into_iter().map(|object| object.name));
            }
            assert_eq!(listed, names);
            assert!(pages > 1);
        });
    }
}

/// Nothing waits longer than it was told to.
#[test]
fn a_server_that_is_gone_is_told_in_time() {
    let limits = Limits {
        connect: Duration::from_secs(1),
        call: Duration::from_secs(1),
        tries: 2,
    };
    let sandbox = Sandbox::new();
    let server = Seaweed::start(&sandbox);
    server.make_bucket("bucket");
    let location = bucket(&server, "bucket");
    // Takes connections, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").must("listen");
    let port = silent.local_addr().must("an address").port();
    let Location::S3(mut hung) = location.clone() else {
        unreachable!("it is a bucket");
    };
    hung.endpoint = Some(format!("http://127.0.0.1:{port}"));
    drop(server);
    for location in [location, Location::S3(hung)] {
        run(async {
            let remote = open(&location, limits).await;
            let name = ObjectName::check(&Digest::of(b"x"));
            let began = Instant::now();
            let errors = [
                remote.get(&name, None, 1).await.err(),
                remote.put(&name, text("x"), Put::Replace).await.err(),
                remote.put(&name, text("x"), Put::IfAbsent).await.err(),
                remote.head(&name).await.err(),
                remote.list(Kind::Check, None).await.err(),
                remote.delete(&name).await.err(),
            ];
            let took = began.elapsed();
            for error in errors {
                let error = error.must("it is gone");
                assert!(error.is_passing(), "{error}");
                assert!(!error.to_string().contains('\n'), "{error}");
            }
            assert!(took < 6 * limits.call + Duration::from_secs(3), "{took:?}");
        });
    }
}
