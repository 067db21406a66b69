//! What is bounded: the queue, bodies, headers, times, connections.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::json;
use tinyserve::TinyServeConfig;

use crate::server::{endless, one_at_a_time, quiet, read_until, request, shared, start};

#[test]
fn a_full_queue_is_told_at_once_and_when_to_come_back() {
    let engine = TinyServeConfig { max_num_queued_reqs: Some(2), ..one_at_a_time() };
    let server = start(quiet(), engine);
    let mut runs = server.open("/v1/completions", &endless(true));
    read_until(&mut runs, "data: ");
    let waiting: Vec<_> = (0..2).map(|_| server.open("/v1/completions", &endless(true))).collect();
    while server.stats()["waiting"] != 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    for stream in [true, false] {
        let answer = server.post("/v1/completions", &endless(stream));
        let error = answer.error(429);
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("rate_limit_error"), &json!("server_overloaded"))
        );
        assert_eq!(answer.header("retry-after"), Some("1"));
    }
    // Nothing of a request that does not fit as a whole stays behind.
    drop(waiting);
    while server.stats()["waiting"] != 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut three = endless(false);
    three["n"] = 3.into();
    server.post("/v1/completions", &three).error(429);
    assert_eq!(server.stats()["waiting"], 0);
    let metrics = server.get("/metrics").text;
    assert!(
        metrics
            .lines()
            .any(|line| line.starts_with("vllm:admission_rejections_total{")
                && !line.ends_with(" 0")),
        "{metrics}"
    );
}

#[test]
fn waiting_prompt_tokens_are_bounded_too() {
    let engine = TinyServeConfig { max_num_queued_tokens: Some(150), ..one_at_a_time() };
    let server = start(quiet(), engine);
    let mut runs = server.open("/v1/completions", &endless(true));
    read_until(&mut runs, "data: ");
    let long = json!({"prompt": vec![5; 100], "max_tokens": 400, "ignore_eos": true});
    let _waits = server.open("/v1/completions", &long);
    while server.stats()["waiting"] != 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
    server.post("/v1/completions", &long).error(429);
    let _fits = server.open("/v1/completions", &endless(true));
    while server.stats()["waiting"] != 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn large_bodies_are_refused_and_large_prompts_are_not() {
    let mut config = quiet();
    config.max_request_bytes = 10_000;
    let server = start(config, one_at_a_time());
    let body = |bytes: usize| json!({"prompt": "a", "max_tokens": 1, "user": "u".repeat(bytes)});
    server.post("/v1/completions", &body(9_900)).ok();
    assert_eq!(
        server.post("/v1/completions", &body(10_001)).error(413)["code"],
        "request_too_large"
    );
    for path in ["/tokenize", "/detokenize", "/v1/chat/completions"] {
        server.post(path, &body(20_000)).error(413);
    }
    // Of unknown length.
    let chunk = "x".repeat(11_000);
    let chunked = format!(
        "POST /tokenize HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n{:x}\r\n{chunk}\r\n0\r\n\r\n",
        chunk.len()
    );
    assert!(server.raw(chunked.as_bytes()).starts_with("HTTP/1.1 413 "));
    let long = json!({"prompt": "word ".repeat(200_000)});
    assert!(shared().post("/tokenize", &long).ok()["count"].as_u64().unwrap() > 200_000);
}

#[test]
fn too_many_prompts_and_headers_are_refused() {
    let many = vec!["a"; 1025];
    assert_eq!(
        shared().post("/v1/completions", &json!({"prompt": many})).error(400)["param"],
        "prompt"
    );
    let headers: String = (0..200).map(|i| format!("x-{i}: a\r\n")).collect();
    let answer =
        shared().raw(format!("GET /health HTTP/1.1\r\nhost: a\r\n{headers}\r\n").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let long =
        format!("GET /health HTTP/1.1\r\nhost: a\r\nx-long: {}\r\n\r\n", "a".repeat(1_000_000));
    // It may close before it was sent everything.
    let answer = shared().raw(long.as_bytes());
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let id = "i".repeat(300);
    let answer = shared().get_with("/health", &[("x-request-id", &id)]);
    assert_ne!(answer.header("x-request-id"), Some(id.as_str()));
}

#[test]
fn whoever_sends_slowly_holds_nobody_up() {
    let mut config = quiet();
    (config.header_timeout, config.body_timeout) = (0.3, 0.3);
    let server = start(config, one_at_a_time());
    let mut slow: Vec<_> = (0..200).map(|_| server.connect()).collect();
    for stream in &mut slow {
        stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: ").unwrap();
    }
    let mut bodies: Vec<_> = (0..50).map(|_| server.connect()).collect();
    for stream in &mut bodies {
        stream
            .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{")
            .unwrap();
    }
    let start = Instant::now();
    server.post("/v1/completions", &json!({"prompt": "Once", "max_tokens": 2})).ok();
    assert!(start.elapsed() < Duration::from_secs(10));
    for stream in &mut slow {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("the server closes");
    }
    for stream in &mut bodies {
        let mut rest = vec![0; 12];
        stream.read_exact(&mut rest).unwrap();
        assert_eq!(rest, b"HTTP/1.1 408");
    }
}

#[test]
fn whoever_does_not_read_is_left() {
    let mut config = quiet();
    config.write_timeout = 0.3;
    let server = start(config, one_at_a_time());
    // Megabytes of probabilities, more than sockets hold, and then nobody reads.
    let mut body = endless(true);
    (body["n"], body["logprobs"]) = (64.into(), 20.into());
    let mut deaf = server.open("/v1/completions", &body);
    read_until(&mut deaf, "data: ");
    // The one that waits for its place gets it long before the other would be done.
    server.post("/v1/completions", &json!({"prompt": "Once", "max_tokens": 2})).ok();
    server.becomes_idle(Duration::from_secs(30));
    let mut rest = Vec::new();
    // The connection is cut, in the middle of whatever it was.
    let _ = deaf.read_to_end(&mut rest);
    assert!(!rest.ends_with(b"[DONE]\n\n\r\n0\r\n\r\n") && !rest.is_empty());
}

#[test]
fn connections_beyond_the_limit_wait_for_a_place() {
    let mut config = quiet();
    config.max_connections = 2;
    let server = start(config, one_at_a_time());
    let get = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let mut held: Vec<_> = (0..2).map(|_| server.connect()).collect();
    std::thread::sleep(Duration::from_millis(50));
    let mut third = server.connect();
    third.write_all(get).unwrap();
    third.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(third.read(&mut [0]).is_err(), "there is no place yet");
    held.clear();
    third.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = String::new();
    third.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn what_is_no_http_is_refused_and_the_server_lives_on() {
    for bytes in [
        &b"hello\r\n\r\n"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET  HTTP/1.1\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let answer = shared().raw(bytes);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
    shared().get("/health").ok();
}

#[test]
fn requests_follow_each_other_on_one_connection() {
    let mut stream = shared().connect();
    let body = json!({"prompt": "a", "max_tokens": 1}).to_string();
    for _ in 0..3 {
        stream.write_all(&request("/v1/completions", &body)).unwrap();
        let mut reader = std::io::BufReader::new(stream.try_clone().unwrap());
        assert!(read_until(&mut reader, "HTTP/1.1 ").contains("200"));
        let length = read_until(&mut reader, "content-length: ");
        let length: usize = length.trim().rsplit(' ').next().unwrap().parse().unwrap();
        read_until(&mut reader, "\r\n");
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        serde_json::from_slice::<serde_json::Value>(&body).unwrap();
    }
}
