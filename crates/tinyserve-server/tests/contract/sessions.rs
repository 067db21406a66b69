//! Sessions: kept, told, deleted; saved to files of one folder, and restored from them.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tinyserve_server::ServerConfig;

use crate::server::{Running, endless, one_thread, quiet, read_until, start};

/// More than two pages of tokens.
const TALE: &str = "Once upon a time there was a little girl named Lily who loved to play outside. \
                    One day she saw a big dog in the park and wanted to be its friend.";

fn saving_in(folder: &Path) -> ServerConfig {
    ServerConfig { session_folder: Some(folder.to_owned()), ..quiet() }
}

/// A turn of the session: the text, and how many of its prompt's tokens were there already.
fn turn(server: &Running, session: &str, prompt: &str) -> (String, u64) {
    let body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0,
                      "cache_salt": session, "tinyserve": {"session": session}});
    let answer = server.post("/v1/completions", &body).ok();
    let text = answer["choices"][0]["text"].as_str().unwrap().to_owned();
    (text, answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap())
}

fn saved(server: &Running, session: &str) -> Value {
    server.post(&format!("/v1/sessions/{session}/save"), &json!({})).ok()
}

fn restored(server: &Running, session: &str) -> Value {
    server.post(&format!("/v1/sessions/{session}/restore"), &json!({})).ok()
}

#[test]
fn sessions_are_listed_told_and_deleted() {
    let server = start(quiet(), one_thread());
    let (text, cached) = turn(&server, "bob", TALE);
    assert_eq!(cached, 0);
    let (_, cached) = turn(&server, "bob", &format!("{TALE}{text}"));
    assert!(cached > 32, "{cached}");
    let header = json!({"prompt": "Once", "max_tokens": 2}).to_string();
    server.post_with("/v1/completions", header.as_bytes(), &[("x-session-id", "by header")]);
    server.post_with("/v1/completions", header.as_bytes(), &[("x-session-id", "by-header")]);
    let list = server.get("/v1/sessions").ok();
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|one| &one["id"]).collect();
    // A name in a header has no spaces.
    assert_eq!(ids, ["bob", "by-header"]);
    let bob = server.get("/v1/sessions/bob").ok();
    assert_eq!((&bob["object"], &bob["request_count"]), (&json!("session"), &json!(2)));
    assert!(bob["cached_pages"].as_u64().unwrap() >= 3, "{bob}");
    assert_eq!(server.delete("/v1/sessions/bob").ok()["deleted"], true);
    server.get("/v1/sessions/bob").error(404);
    server.delete("/v1/sessions/bob").error(404);
}

#[test]
fn a_session_outlives_its_server() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(saving_in(folder.path()), one_thread());
    let (text, _) = turn(&server, "bob", TALE);
    let next = format!("{TALE}{text}");
    let about = saved(&server, "bob");
    let tokens = about["saved_tokens"].as_u64().unwrap();
    assert!(tokens >= 32 && tokens.is_multiple_of(16), "{about}");
    let file = folder.path().join("bob.session");
    assert_eq!(about["bytes"], std::fs::metadata(&file).unwrap().len());
    assert_eq!(server.get("/v1/sessions").ok()["saved"], json!(["bob"]));
    let (expected, _) = turn(&server, "bob", &next);
    drop(server);

    let server = start(saving_in(folder.path()), one_thread());
    server.get("/v1/sessions/bob").error(404);
    let info = restored(&server, "bob");
    assert_eq!((&info["id"], &info["cached_tokens"]), (&json!("bob"), &json!(tokens)));
    let (text, cached) = turn(&server, "bob", &next);
    assert_eq!(text, expected);
    assert!((32..=tokens).contains(&cached), "{cached} of {tokens}");
    // Deleting a session deletes its file.
    server.delete("/v1/sessions/bob").ok();
    assert!(!file.exists());
    server.post("/v1/sessions/bob/restore", &json!({})).error(404);
}

#[test]
fn saved_sessions_are_restored_at_the_start_and_damaged_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(saving_in(folder.path()), one_thread());
    for session in ["whole", "damaged"] {
        turn(&server, session, TALE);
        saved(&server, session);
    }
    drop(server);
    let damaged = folder.path().join("damaged.session");
    let mut bytes = std::fs::read(&damaged).unwrap();
    let last = bytes.len() - 20;
    bytes[last] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    std::fs::write(folder.path().join("short.session"), "TSSESSIO").unwrap();

    let config = ServerConfig { restore_sessions: true, ..saving_in(folder.path()) };
    let server = start(config, one_thread());
    let list = server.get("/v1/sessions").ok();
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "{list}");
    assert_eq!(list["data"][0]["id"], "whole");
    for (session, words) in [("damaged", "wrong checksum"), ("short", "8 bytes")] {
        let path = format!("/v1/sessions/{session}/restore");
        let error = server.post(&path, &json!({})).error(400);
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(words), "{message}");
        // The file by its name, and not where it is.
        assert!(message.starts_with(&format!("{session}.session")), "{message}");
    }
}

#[test]
fn no_name_reaches_another_folder() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("inside");
    let server = start(saving_in(&folder), one_thread());
    for (path, name) in [
        ("..%2Foutside", "../outside"),
        ("%2Ftmp%2Foutside", "/tmp/outside"),
        ("..", ".."),
        (".hidden", ".hidden"),
        ("a%5Cb", "a\\b"),
        ("a%20b", "a b"),
        ("%C3%A9", "é"),
    ] {
        let body = json!({"prompt": TALE, "max_tokens": 1, "tinyserve": {"session": name}});
        server.post("/v1/completions", &body).ok();
        for what in ["save", "restore"] {
            let answer = server.raw(
                format!(
                    "POST /v1/sessions/{path}/{what} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                )
                .as_bytes(),
            );
            assert!(answer.starts_with("HTTP/1.1 400 "), "{path}: {answer}");
            assert!(answer.contains("expected a name of"), "{answer}");
        }
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn what_cannot_be_saved_or_restored_is_told_why() {
    let without = start(quiet(), one_thread());
    turn(&without, "bob", TALE);
    for what in ["save", "restore"] {
        let error = without.post(&format!("/v1/sessions/bob/{what}"), &json!({})).error(400);
        assert!(error["message"].as_str().unwrap().contains("--session-folder"), "{error}");
    }
    assert_eq!(without.get("/v1/sessions").ok()["saved"], json!([]));

    let folder = tempfile::tempdir().unwrap();
    let config = ServerConfig { max_saved_sessions: 1, ..saving_in(folder.path()) };
    let server = start(config, one_thread());
    server.post("/v1/sessions/nobody/save", &json!({})).error(404);
    server.post("/v1/sessions/nobody/restore", &json!({})).error(404);
    server.post("/v1/sessions/bob/save", &json!({"file": "/etc/passwd"})).error(400);
    turn(&server, "bob", TALE);
    // While a request of it runs there is nothing to save, and nothing to replace.
    saved(&server, "bob");
    let mut body = endless(true);
    body["tinyserve"] = json!({"session": "bob"});
    let mut runs = server.open("/v1/completions", &body);
    read_until(&mut runs, "data: ");
    for what in ["save", "restore"] {
        server.post(&format!("/v1/sessions/bob/{what}"), &json!({})).error(409);
    }
    drop(runs);
    server.becomes_idle(Duration::from_secs(10));
    // No more files than are allowed; one that is there may be written again.
    turn(&server, "eve", TALE);
    let error = server.post("/v1/sessions/eve/save", &json!({})).error(409);
    assert!(error["message"].as_str().unwrap().contains("delete one"), "{error}");
    restored(&server, "bob");
    saved(&server, "bob");
}

#[test]
fn a_session_of_another_layout_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(saving_in(folder.path()), one_thread());
    turn(&server, "bob", TALE);
    saved(&server, "bob");
    drop(server);
    let mut engine = one_thread();
    engine.page_size = 8;
    let server = start(saving_in(folder.path()), engine);
    let error = server.post("/v1/sessions/bob/restore", &json!({})).error(400);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("bob.session: page_size is 16, expected 8"), "{message}");
}
