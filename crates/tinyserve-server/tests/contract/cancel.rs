//! A client that goes away ends its own request, and nobody else's.

use std::io::Write;
use std::net::Shutdown;
use std::time::Duration;

use serde_json::{Value, json};

use crate::server::{Running, endless, one_at_a_time, quiet, read_until, start};

/// One sequence at a time, so that the second request waits.
fn one_by_one() -> Running {
    start(quiet(), one_at_a_time())
}

#[track_caller]
fn becomes(server: &Running, running: u64, waiting: u64) {
    for _ in 0..5000 {
        let stats = server.stats();
        if stats["running"] == running && stats["waiting"] == waiting {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("expected {running} running and {waiting} waiting: {}", server.stats());
}

/// Whether pages are held, or tokens drawn, now.
fn is_quiet(server: &Running) -> bool {
    let before = server.stats();
    std::thread::sleep(Duration::from_millis(20));
    let after = server.stats();
    before["generated_tokens"] == after["generated_tokens"]
}

/// A request that takes long, and its answer when nobody disturbs it.
fn victim() -> Value {
    json!({"prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": true})
}

#[test]
fn a_running_request_ends_with_its_connection() {
    let server = one_by_one();
    let expected = server.post("/v1/completions", &victim()).ok()["choices"].clone();
    let pages = server.stats()["pages_used"].clone();
    for stream in [true, false] {
        for half in [true, false] {
            let mut goes = server.open("/v1/completions", &endless(stream));
            if stream {
                read_until(&mut goes, "data: ");
            }
            becomes(&server, 1, 0);
            // Another one waits meanwhile, and is not harmed.
            let other = std::thread::scope(|scope| {
                let other = scope.spawn(|| server.post("/v1/completions", &victim()).ok());
                becomes(&server, 1, 1);
                match half {
                    // Whoever stops sending has gone away.
                    true => goes.get_ref().shutdown(Shutdown::Write).unwrap(),
                    false => goes.get_ref().shutdown(Shutdown::Both).unwrap(),
                }
                other.join().unwrap()
            });
            assert_eq!(other["choices"], expected);
            drop(goes);
            server.becomes_idle(Duration::from_secs(2));
            assert!(is_quiet(&server));
            assert_eq!(server.stats()["pages_used"], pages, "stream {stream}");
        }
    }
}

#[test]
fn a_waiting_request_ends_with_its_connection() {
    let server = one_by_one();
    let expected = server.post("/v1/completions", &victim()).ok()["choices"].clone();
    let before = server.stats();
    for stream in [true, false] {
        std::thread::scope(|scope| {
            let runs = scope.spawn(|| server.post("/v1/completions", &victim()).ok());
            becomes(&server, 1, 0);
            let waits = server.open("/v1/completions", &endless(stream));
            becomes(&server, 1, 1);
            drop(waits);
            becomes(&server, 1, 0);
            assert_eq!(runs.join().unwrap()["choices"], expected);
        });
        server.becomes_idle(Duration::from_secs(2));
    }
    let after = server.stats();
    let generated = |stats: &Value| stats["generated_tokens"].as_u64().unwrap();
    assert_eq!(generated(&after) - generated(&before), 800, "what waited never ran");
    assert_eq!(after["pages_used"], before["pages_used"]);
}

#[test]
fn all_choices_of_a_request_end_together() {
    let server = one_by_one();
    let mut body = endless(true);
    body["n"] = 4.into();
    let mut goes = server.open("/v1/completions", &body);
    read_until(&mut goes, "data: ");
    becomes(&server, 1, 3);
    drop(goes);
    server.becomes_idle(Duration::from_secs(2));
}

#[test]
fn a_body_that_never_comes_whole_starts_nothing() {
    let server = one_by_one();
    let mut stream = server.connect();
    stream
        .write_all(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{\"prompt\"",
        )
        .unwrap();
    stream.shutdown(Shutdown::Both).unwrap();
    assert!(is_quiet(&server));
    assert_eq!(server.stats()["generated_tokens"], 0);
}
