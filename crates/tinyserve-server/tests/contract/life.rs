//! Loading, draining, dying: what a server says of itself, and what becomes of requests.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use serde_json::json;
use tinyserve::{TinyServe, TinyServeConfig};

use crate::server::{endless, one_at_a_time, one_thread, quiet, read_until, start, start_loading};

#[test]
fn a_server_answers_while_its_model_loads() {
    let (go, wait) = channel::<()>();
    let server = start_loading(quiet(), "builtin:stories260k", move || {
        let _ = wait.recv();
        TinyServe::builder().config(one_thread()).build()
    });
    let health = server.get("/health");
    assert_eq!(health.error(503)["message"], "loading");
    assert_eq!(health.header("retry-after"), Some("1"));
    server.post("/v1/completions", &json!({"prompt": "a"})).error(503);
    server.post("/tokenize", &json!({"prompt": "a"})).error(503);
    server.get("/v1/models").ok();
    assert_eq!(server.get("/metrics").status, 200);
    go.send(()).unwrap();
    while server.get("/health").status != 200 {
        std::thread::sleep(Duration::from_millis(2));
    }
    server.post("/v1/completions", &json!({"prompt": "a"})).ok();
}

#[test]
fn a_model_that_does_not_load_ends_the_server() {
    let server = start_loading(quiet(), "builtin:stories260k", || {
        let config = TinyServeConfig { model: "/nowhere".to_owned(), ..one_thread() };
        TinyServe::builder().config(config).build()
    });
    let error = server.ended().unwrap_err().to_string();
    assert!(error.contains("/nowhere"), "{error}");
}

#[test]
fn a_server_that_is_asked_to_stop_finishes_what_runs() {
    let server = start(quiet(), one_thread());
    let mut runs = server.open("/v1/completions", &endless(true));
    read_until(&mut runs, "data: ");
    server.stop();
    loop {
        let health = server.get("/health");
        if health.status == 503 {
            assert_eq!(health.error(503)["message"], "draining");
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let answer = server.post("/v1/completions", &json!({"prompt": "a"}));
    assert_eq!(answer.error(503)["code"], "unavailable");
    assert_eq!(answer.header("retry-after"), Some("1"));
    read_until(&mut runs, "data: [DONE]");
    server.ended().unwrap();
}

#[test]
fn draining_has_an_end() {
    let mut config = quiet();
    config.drain_timeout = 0.05;
    // Many long answers, one after the other.
    let server = start(config, one_at_a_time());
    let mut body = endless(true);
    body["n"] = 64.into();
    let mut runs = server.open("/v1/completions", &body);
    read_until(&mut runs, "data: ");
    let start = Instant::now();
    server.stop();
    let told = read_until(&mut runs, "data: {\"error\"");
    assert!(told.contains("unavailable"), "{told}");
    read_until(&mut runs, "data: [DONE]");
    server.ended().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10));
}
