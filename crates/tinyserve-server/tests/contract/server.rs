//! A server on a free port, and clients of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tinyserve::{TinyServe, TinyServeConfig, TinyServeError};
use tinyserve_server::{LogLevel, Server, ServerConfig, ServerError, Stopper, with_bounded_queue};

/// A server that stops when it is dropped.
pub(crate) struct Running {
    pub(crate) address: String,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
    agent: ureq::Agent,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: ureq::http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Its JSON, if it is a 200.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }

    /// Its error object, if it has this status.
    #[track_caller]
    pub(crate) fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let mut json = self.json();
        let error = json["error"].take();
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 4), "{self:?}");
        assert!(error["type"].is_string() && error["code"].is_string(), "{self:?}");
        assert!(error.get("param").is_some(), "{self:?}");
        error
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// An engine on one thread, so that tests beside each other do not wait for each other's threads.
pub(crate) fn one_thread() -> TinyServeConfig {
    TinyServeConfig { threads: Some(1), ..TinyServeConfig::default() }
}

/// An engine that runs one sequence at a time, so that the second one waits.
pub(crate) fn one_at_a_time() -> TinyServeConfig {
    TinyServeConfig { max_num_seqs: 1, ..one_thread() }
}

/// Settings for tests.
pub(crate) fn quiet() -> ServerConfig {
    ServerConfig { port: 0, log_level: LogLevel::Off, ..ServerConfig::default() }
}

/// A server of the built-in model that many tests ask.
pub(crate) fn shared() -> &'static Running {
    static SERVER: OnceLock<Running> = OnceLock::new();
    SERVER.get_or_init(|| start(quiet(), one_thread()))
}

/// A server of its own.
pub(crate) fn start(config: ServerConfig, engine: TinyServeConfig) -> Running {
    let model = engine.model.clone();
    let engine = with_bounded_queue(engine);
    let running =
        start_loading(config, &model, move || TinyServe::builder().config(engine).build());
    let deadline = Instant::now() + Duration::from_secs(60);
    while running.get("/health").status != 200 {
        assert!(Instant::now() < deadline, "the server does not become ready");
        std::thread::sleep(Duration::from_millis(5));
    }
    running
}

/// A server that is still loading when this returns.
pub(crate) fn start_loading(
    config: ServerConfig,
    model: &str,
    load: impl FnOnce() -> Result<TinyServe, TinyServeError> + Send + 'static,
) -> Running {
    let server = Server::bind(config).expect("a free port");
    let (address, stopper) = (server.address(), server.stopper());
    let model = model.to_owned();
    let thread = std::thread::spawn(move || server.run(&model, load));
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(120)))
        .max_idle_connections(64)
        .build()
        .into();
    Running { address, stopper, thread: Some(thread), agent }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopper.stop();
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Running {
    /// Asks it to stop; it drains.
    pub(crate) fn stop(&self) {
        self.stopper.stop();
    }

    /// Waits until it has stopped.
    pub(crate) fn ended(mut self) -> Result<(), ServerError> {
        self.thread.take().expect("a thread").join().expect("no panic")
    }

    fn answer(result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
        let mut response = result.expect("an answer");
        let text = response.body_mut().with_config().limit(1 << 30).read_to_string();
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            text: text.expect("a body in UTF-8"),
        }
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.get_with(path, &[])
    }

    pub(crate) fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let request = self.agent.get(format!("{}{path}", self.address));
        let request =
            headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        Self::answer(request.call())
    }

    pub(crate) fn delete(&self, path: &str) -> Answer {
        Self::answer(self.agent.delete(format!("{}{path}", self.address)).call())
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_with(path, body.to_string().as_bytes(), &[("content-type", "application/json")])
    }

    pub(crate) fn post_with(&self, path: &str, body: &[u8], headers: &[(&str, &str)]) -> Answer {
        let request = self.agent.post(format!("{}{path}", self.address));
        let request =
            headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        Self::answer(request.send(body))
    }

    /// The events of a stream, without `data: `; the last is `[DONE]`.
    #[track_caller]
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.header("content-type"), Some("text/event-stream"));
        events(&answer.text)
    }

    /// The chunks of a stream that ends well.
    #[track_caller]
    pub(crate) fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut events = self.stream(path, body);
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }

    /// What the page at `/` draws.
    pub(crate) fn stats(&self) -> Value {
        self.get("/tinyserve/stats").ok()
    }

    /// Waits until nothing runs and nothing waits.
    #[track_caller]
    pub(crate) fn becomes_idle(&self, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            let stats = self.stats();
            if stats["running"] == 0 && stats["waiting"] == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "still busy: {stats}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A connection of one's own.
    pub(crate) fn connect(&self) -> TcpStream {
        let stream =
            TcpStream::connect(self.address.trim_start_matches("http://")).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Sends `bytes` and reads until the server closes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // A server that refuses early may close before it has read everything.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Sends a request and returns its connection with whatever comes back.
    pub(crate) fn open(&self, path: &str, body: &Value) -> BufReader<TcpStream> {
        let mut stream = self.connect();
        stream.write_all(&request(path, &body.to_string())).unwrap();
        BufReader::new(stream)
    }
}

/// A request as bytes.
pub(crate) fn request(path: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Reads lines until one begins with `start`.
pub(crate) fn read_until(reader: &mut impl BufRead, start: &str) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert!(reader.read_line(&mut line).expect("a line") > 0, "no line begins with {start}");
        if line.starts_with(start) {
            return line;
        }
    }
}

/// The data of the events in a stream's text; comments are left out.
#[track_caller]
pub(crate) fn events(text: &str) -> Vec<String> {
    assert!(text.ends_with("\n\n"), "{text:?}");
    let events =
        text.trim_end_matches("\n\n").split("\n\n").filter(|event| !event.starts_with(':'));
    events.map(|event| event.strip_prefix("data: ").expect("data").to_owned()).collect()
}

/// A request that keeps the engine busy until somebody ends it.
pub(crate) fn endless(stream: bool) -> Value {
    json!({"prompt": "Once", "max_tokens": 500, "ignore_eos": true, "stream": stream, "temperature": 0})
}
