//! `kachefs remote` and `kachefs key`, as a person or a script meets them.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::thread;

use harness::{Cmd, Must, Sandbox, Seaweed};
use serde_json::Value;

/// Who may do what at a server that asks for credentials.
const IDENTITIES: &str = r#"{ "identities": [
    { "name": "writer", "credentials": [{ "accessKey": "writer", "secretKey": "writers-secret" }],
      "actions": ["Admin", "Read", "Write", "List"] },
    { "name": "reader", "credentials": [{ "accessKey": "reader", "secretKey": "readers-secret" }],
      "actions": ["Read", "List"] } ] }"#;

fn json(command: Cmd) -> Value {
    let outcome = command.run();
    serde_json::from_str(&outcome.stdout).must(format!("JSON\n{outcome}"))
}

/// A command with credentials, and nothing else of AWS.
fn as_user(sandbox: &Sandbox, words: &str, user: &str) -> Cmd {
    sandbox
        .kachefs(words)
        .env("AWS_ACCESS_KEY_ID", user)
        .env("AWS_SECRET_ACCESS_KEY", format!("{user}s-secret"))
}

#[test]
fn a_remote_is_set_shown_and_forgotten() {
    let sandbox = Sandbox::new();
    assert!(
        sandbox
            .kachefs("remote status")
            .ok()
            .stdout
            .contains("no remote")
    );
    assert_eq!(
        json(sandbox.kachefs("remote status --json"))["remote"],
        Value::Null
    );
    let error = sandbox.kachefs("remote check").fails();
    assert!(error.one_line_error().contains("remote set"), "{error}");

    let own = sandbox
        .kachefs("key generate")
        .ok()
        .stdout
        .trim()
        .to_owned();
    let again = sandbox.kachefs("key generate").fails();
    assert!(again.one_line_error().contains("signing.key"), "{again}");
    let other = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";

    let endpoint = "http://127.0.0.1:1";
    let set = format!("remote set s3://bucket/a --endpoint {endpoint} --read-only --trust {other}");
    assert!(
        sandbox
            .kachefs(&set)
            .ok()
            .stdout
            .contains("s3://bucket/a at http://127.0.0.1:1")
    );
    let status = json(sandbox.kachefs("remote status --json"));
    assert_eq!(status["remote"], "s3://bucket/a at http://127.0.0.1:1");
    assert_eq!(status["read_only"], true);
    assert_eq!(status["trusted"], serde_json::json!([other]));
    assert_eq!(status["own_key"], own.as_str());

    sandbox.kachefs(&format!("key trust {own}")).ok();
    let keys = json(sandbox.kachefs("key list --json"));
    assert_eq!(keys["trusted"], serde_json::json!([other, own]));
    assert_eq!(keys["own"], own.as_str());
    sandbox.kachefs(&format!("key trust --remove {other}")).ok();
    let last = sandbox
        .kachefs(&format!("key trust --remove {own}"))
        .fails();
    assert!(last.one_line_error().contains("everybody"), "{last}");
    let unknown = sandbox
        .kachefs(&format!("key trust --remove {other}"))
        .fails();
    assert!(
        unknown.one_line_error().contains("not trusted"),
        "{unknown}"
    );
    let keys = json(sandbox.kachefs("key list --json"));
    assert_eq!(keys["trusted"], serde_json::json!([own]));

    // Another place, and the same people.
    let elsewhere = sandbox.path("elsewhere");
    fs::create_dir(&elsewhere).must("mkdir");
    let set = format!("remote set {}", elsewhere.display());
    let said = sandbox.kachefs(&set).ok();
    assert!(said.stdout.contains(&own), "{said}");
    let status = json(sandbox.kachefs("remote status --json"));
    assert_eq!(status["trusted"], serde_json::json!([own]));
    assert_eq!(status["read_only"], false);

    sandbox.kachefs("remote unset").ok();
    let said = sandbox.kachefs(&set).ok();
    assert!(said.stdout.contains("everybody"), "{said}");
    sandbox.kachefs("remote unset").ok();
    assert!(
        sandbox
            .kachefs("remote unset")
            .ok()
            .stdout
            .contains("no remote")
    );
}

#[test]
fn bad_input_changes_nothing() {
    let sandbox = Sandbox::new();
    let file = sandbox.store().join("kachefs.toml");
    let set = |directory: &Path| format!("remote set {}", directory.display());
    sandbox.kachefs(&set(&sandbox.make_dir("shared"))).ok();
    let before = fs::read_to_string(&file).must("read");
    let empty = sandbox.make_dir("empty");
    let odd = sandbox.make_dir("odd");
    fs::write(odd.join("v1"), "").must("write");
    for words in [
        // Nothing can be made there, by whoever runs this.
        "remote set /proc",
        &format!("{} --read-only", set(&empty)),
        &set(&odd),
        "remote set",
        "remote set ftp://x/y",
        "remote set s3://x",
        "remote set relative",
        "remote set /no/such/directory",
        "remote set s3://bucket --endpoint nowhere",
        "remote set s3://bucket --endpoint http://user:secret@host",
        "remote set s3://bucket --trust abc",
        "remote set /directory --region eu-central-1",
        "key trust",
        "key trust abc",
    ] {
        let failed = sandbox.kachefs(words).fails();
        assert!(!failed.one_line_error().contains("secret"), "{failed}");
        assert_eq!(fs::read_to_string(&file).must("read"), before, "{words}");
    }
    assert_eq!(fs::read_dir(&empty).must("list").count(), 0);
    fs::write(&file, "[remote]\nurl = \"/x\"\nreadonly = true\n").must("write");
    for words in ["remote status", "remote check", "key list"] {
        let error = sandbox.kachefs(words).fails();
        assert!(error.one_line_error().contains("readonly"), "{error}");
    }
}

/// What tells a directory from one that is not mounted is made when it is set, and then by nobody.
#[test]
fn a_directory_is_made_a_remote_when_it_is_set() {
    let sandbox = Sandbox::new();
    let directory = sandbox.make_dir("shared");
    let layout = directory.join("v1");
    let set = format!("remote set {}", directory.display());
    let reads = format!("{set} --read-only");
    let early = sandbox.kachefs(&reads).fails();
    let said = early.one_line_error();
    assert!(
        said.contains("mounted") && said.contains("without --read-only"),
        "{early}"
    );
    assert_eq!(
        json(sandbox.kachefs("remote status --json"))["remote"],
        Value::Null
    );

    let new = sandbox.kachefs(&set).ok();
    assert!(layout.is_dir() && new.stdout.contains("new"), "{new}");
    let known = sandbox.kachefs(&set).ok();
    assert!(!known.stdout.contains("new"), "{known}");
    sandbox.kachefs(&reads).ok();
    sandbox.kachefs("remote check").ok();
    sandbox.kachefs(&set).ok();

    let elsewhere = sandbox.path("elsewhere");
    fs::rename(&layout, &elsewhere).must("rename");
    for words in ["remote check", "remote gc --dry-run", &reads] {
        let failed = sandbox.kachefs(words).fails();
        assert!(failed.one_line_error().contains("mounted"), "{failed}");
        assert!(!layout.exists(), "{words}");
    }
    fs::rename(&elsewhere, &layout).must("rename");
    sandbox.kachefs("remote check").ok();
}

#[test]
fn a_check_says_whether_it_works() {
    let sandbox = Sandbox::new();
    let directory = sandbox.path("shared");
    fs::create_dir(&directory).must("mkdir");
    sandbox
        .kachefs(&format!("remote set {}", directory.display()))
        .ok();
    let verdict = json(sandbox.kachefs("remote check --json"));
    assert_eq!(verdict["ok"], true, "{verdict}");
    assert!(verdict["write_ms"].as_f64().must("a number") > 0.0);
    let left = fs::read_dir(directory.join("v1/check"))
        .must("list")
        .count();
    assert_eq!(left, 0, "a check leaves nothing");

    let identities = sandbox.path("identities.json");
    fs::write(&identities, IDENTITIES).must("write");
    let config = format!("-s3.config={}", identities.display());
    let server = Seaweed::start_with(&sandbox, &[&config]);
    let endpoint = server.endpoint();
    let make = "remote check --json";
    let set = |more: &str| {
        let words = format!("remote set s3://bucket/p --endpoint {endpoint} --region eu-x {more}");
        sandbox.kachefs(&words).ok();
    };
    set("");
    let absent = as_user(&sandbox, "remote check", "writer").fails();
    assert!(absent.one_line_error().contains("NoSuchBucket"), "{absent}");
    server.make_bucket("bucket");
    let verdict = json(as_user(&sandbox, make, "writer"));
    assert_eq!(verdict["ok"], true, "{verdict}");

    let refused = as_user(&sandbox, "remote check", "reader").fails();
    assert!(
        refused.one_line_error().contains("AccessDenied"),
        "{refused}"
    );
    set("--read-only");
    let verdict = json(as_user(&sandbox, make, "reader"));
    assert_eq!(
        (&verdict["ok"], &verdict["write_ms"]),
        (&true.into(), &Value::Null),
        "{verdict}"
    );

    let stranger = as_user(&sandbox, "remote check", "stranger").fails();
    assert!(
        stranger.one_line_error().contains("refuses access"),
        "{stranger}"
    );
    let nobody = sandbox
        .kachefs("remote check")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .fails();
    assert!(nobody.one_line_error().contains("credentials"), "{nobody}");
    // A profile is who it says, whoever the environment is.
    let config = sandbox.path("home").join(".aws");
    fs::create_dir_all(&config).must("mkdir");
    let profile = "[reads]\naws_access_key_id = reader\naws_secret_access_key = readers-secret\n";
    fs::write(config.join("credentials"), profile).must("write");
    set("--profile reads");
    let reader = as_user(&sandbox, "remote check", "writer").fails();
    assert!(reader.one_line_error().contains("AccessDenied"), "{reader}");
    // Some web server.
    let web = TcpListener::bind("127.0.0.1:0").must("listen");
    let port = web.local_addr().must("an address").port();
    let answer = "HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\nConnection: close\r\n\r\nnope\n";
    thread::spawn(move || {
        for stream in web.incoming() {
            let _ = stream.and_then(|mut stream| {
                let _ = stream.read(&mut [0; 4096])?;
                stream.write_all(answer.as_bytes())
            });
        }
    });
    let words = format!("remote set s3://bucket --endpoint http://127.0.0.1:{port} --anonymous");
    sandbox.kachefs(&format!("{words} --read-only")).ok();
    let other = sandbox.kachefs("remote check").fails();
    assert!(other.one_line_error().contains("404"), "{other}");
    set("");
    drop(server);
    let gone = as_user(&sandbox, "remote check", "writer").fails();
    assert!(
        gone.one_line_error().contains("cannot be reached"),
        "{gone}"
    );
    for secret in ["writers-secret", "readers-secret"] {
        for outcome in [&absent, &refused, &stranger, &nobody, &gone] {
            assert!(!outcome.said().contains(secret), "{outcome}");
        }
    }
}
