//! `tinyserve serve` as a process: how it starts, and what it survives.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr};
use std::time::Duration;

use serde_json::{Value, json};

use crate::binary::{command, text, words};

/// More than two pages of tokens.
const TALE: &str = "Once upon a time there was a little girl named Lily who loved to play outside. \
                    One day she saw a big dog in the park and wanted to be its friend.";

/// A server on a free port; it is killed, as by `kill -9`, when this is dropped.
struct Served {
    child: Child,
    stderr: BufReader<ChildStderr>,
    address: String,
    /// What it said before it served.
    said: Vec<String>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.child.kill().expect("a process that can be killed");
        self.child.wait().expect("a process that has ended");
    }
}

impl Served {
    fn start(flags: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = command(&[&["serve", "--port", "0", "--threads", "1"], flags].concat());
        let mut child = command.envs(variables.iter().copied()).spawn().expect("the binary runs");
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut served = Self { child, stderr, address: String::new(), said: Vec::new() };
        while served.address.is_empty() {
            let mut line = String::new();
            let read = served.stderr.read_line(&mut line).expect("a line");
            assert!(read > 0, "it ended: {:?}", served.said);
            match line.trim_end().split_once(" on http://") {
                Some((_, address)) => address.clone_into(&mut served.address),
                None => served.said.push(line.trim_end().to_owned()),
            }
        }
        served
    }

    /// Status and JSON of an answer.
    fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let mut connection = TcpStream::connect(&self.address).expect("a connection");
        connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let body = body.to_string();
        write!(
            connection,
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.expect("a status"), serde_json::from_str(body).expect("JSON"))
    }

    /// The answer, if it is a 200.
    #[track_caller]
    fn ok(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, json) = self.ask(method, path, body);
        assert_eq!(status, 200, "{json}");
        json
    }

    /// A turn of a session: its text, and how many tokens were there already.
    fn turn(&self, session: &str, prompt: &str) -> (String, u64) {
        let body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0,
                          "cache_salt": session, "tinyserve": {"session": session}});
        let answer = self.ok("POST", "/v1/completions", &body);
        let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
        let text = answer["choices"][0]["text"].as_str().unwrap();
        (text.to_owned(), cached.as_u64().unwrap())
    }
}

/// Changes one byte of a file's last page.
fn damage(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let at = bytes.len() - 100;
    bytes[at] ^= 0x10;
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn saved_sessions_survive_a_kill() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("sessions");
    let server = Served::start(&["--session-folder", text(&folder)], &[]);
    let mut next = Vec::new();
    for session in ["bob", "eve"] {
        let (said, _) = server.turn(session, TALE);
        server.ok("POST", &format!("/v1/sessions/{session}/save"), &json!({}));
        next.push(format!("{TALE}{said} And then"));
    }
    // One that is not saved, and one that runs, when it is killed.
    server.turn("ann", TALE);
    let mut runs = TcpStream::connect(&server.address).unwrap();
    let endless = json!({"prompt": TALE, "max_tokens": 400, "ignore_eos": true, "stream": true});
    let body = endless.to_string();
    write!(
        runs,
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    runs.read_exact(&mut [0; 300]).unwrap();
    let (expected, cached) = server.turn("bob", &next[0]);
    assert!(cached >= 32);
    // Dropping kills it; what a killed process leaves half written is no session.
    drop(server);
    std::fs::write(folder.join("bob.session.partial"), "half").unwrap();
    damage(&folder.join("eve.session"));

    let variables =
        [("TINYSERVE_SESSION_FOLDER", text(&folder)), ("TINYSERVE_RESTORE_SESSIONS", "true")];
    let server = Served::start(&[], &variables);
    assert!(server.said.iter().any(|line| line == "restored 1 sessions"), "{:?}", server.said);
    let refused = server.said.iter().find(|line| line.starts_with("session eve is not restored"));
    let refused = refused.unwrap_or_else(|| panic!("{:?}", server.said));
    assert!(refused.contains("eve.session") && refused.contains("checksum"), "{refused}");
    let list = server.ok("GET", "/v1/sessions", &json!({}));
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "{list}");
    let (said, cached) = server.turn("bob", &next[0]);
    assert_eq!((said, cached >= 32), (expected, true), "{cached}");
    // It saves over what the killed one left.
    server.ok("POST", "/v1/sessions/bob/save", &json!({}));
    assert!(!folder.join("bob.session.partial").exists());
}

#[test]
fn sigterm_ends_it_well_and_says_so() {
    let mut server = Served::start(&[], &[]);
    server.turn("bob", TALE);
    let id = server.child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let status = server.child.wait().unwrap();
    assert!(status.success(), "{status:?}");
    let mut rest = String::new();
    server.stderr.read_to_string(&mut rest).unwrap();
    assert!(rest.starts_with("stopping: 0 requests run") && rest.ends_with("stopped\n"), "{rest}");
}

#[test]
fn logs_tell_no_prompts_unless_asked() {
    let said = |flags: &[&str]| {
        let mut server = Served::start(flags, &[]);
        server.turn("bob", "A secret about Lily");
        let chat = json!({"messages": [{"role": "user", "content": "A secret about Tom"}], "max_tokens": 1});
        server.ok("POST", "/v1/chat/completions", &chat);
        let (status, _) =
            server.ask("POST", "/v1/completions", &json!({"prompt": "A secret", "n": 0}));
        assert_eq!(status, 400);
        let id = server.child.id().to_string();
        std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap();
        let mut rest = String::new();
        server.stderr.read_to_string(&mut rest).unwrap();
        rest
    };
    let debug = said(&["--log-level", "debug"]);
    assert!(debug.contains("POST /v1/completions 200") && debug.contains(" 400 "), "{debug}");
    assert!(!debug.contains("secret"), "{debug}");
    let asked = said(&["--log-prompts"]);
    assert!(asked.contains("A secret about Lily") && asked.contains("Tom"), "{asked}");
}

#[test]
fn settings_that_cannot_be_are_named_by_their_flags() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let no_folder = format!("serve --session-folder {}", text(file.path()));
    for (args, sentence) in [
        ("serve --restore-sessions", "--restore-sessions is true, expected session_folder"),
        (no_folder.as_str(), "expected a folder that can be read and written"),
        ("serve --write-timeout 0", "--write-timeout is 0"),
        ("serve --scheduling-policy lifo", "priority or fcfs"),
        ("serve --tensor-parallel-size 2", "--tensor-parallel-size is 2, expected 1"),
        ("serve --kv-cache-memory-bytes 1k --port 0", "--kv-cache-memory-bytes is 1024, expected"),
        ("serve --gpu-memory-utilization 1.5", "--memory-utilization is 1.5"),
        ("serve --gpu-memory-utilization 0.5 --target-memory-gb 1", "target_memory_gb"),
        ("serve --max-saved-sessions 0", "--max-saved-sessions is 0"),
        ("serve --dtype fp8", "auto, f32, f16, bf16"),
        ("serve --no-enable-prefix-caching=1", "no-enable-prefix-caching"),
    ] {
        let ran = words(args);
        assert_eq!(ran.code, Some(2), "{args}: {ran:?}");
        assert!(ran.stderr.contains(sentence), "{sentence:?} is not in {:?}", ran.stderr);
    }
}

#[test]
fn vllms_names_set_the_same_settings() {
    let flags = "--dtype float32 --max-model-len 256 --block-size 8 --gpu-memory-utilization 0.5 \
                 --kv-cache-memory-bytes 1M --no-enable-prefix-caching --max-num-seqs 3 \
                 --tensor-parallel-size 1 --scheduling-policy fcfs --seed 3 -v";
    let server = Served::start(&flags.split_whitespace().collect::<Vec<_>>(), &[]);
    let settings = server.said.iter().find_map(|line| line.strip_prefix("settings: "));
    let settings: Value = serde_json::from_str(settings.expect("settings")).unwrap();
    for (name, value) in [
        ("weights", json!("f32")),
        ("max_sequence_length", json!(256)),
        ("page_size", json!(8)),
        ("memory_utilization", json!(0.5)),
        ("kv_cache_memory_bytes", json!(1 << 20)),
        ("enable_prefix_caching", json!(false)),
        ("max_num_seqs", json!(3)),
    ] {
        assert_eq!(settings[name], value, "{name}");
    }
    let stats = server.ok("GET", "/tinyserve/stats", &json!({}));
    // As many pages as a mebibyte holds: 5 layers, 4 KV heads of 8, two sides and boxes, f32.
    let pages = stats["pages_total"].as_u64().unwrap();
    assert!((20..=103).contains(&pages), "{pages}");
}
