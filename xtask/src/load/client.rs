//! One client: HTTP/1.1 over a connection that it keeps, as client libraries do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long an answer may stand still.
const PATIENCE: Duration = Duration::from_secs(120);

/// A client and the connection that its last request left behind.
pub(crate) struct Client<'a> {
    address: &'a str,
    connection: Option<BufReader<TcpStream>>,
}

/// What is told before the body of an answer.
struct Head {
    status: u16,
    /// Bytes of the body; `None` where it comes in chunks.
    length: Option<usize>,
    closes: bool,
}

impl<'a> Client<'a> {
    /// A client of the server at `address`, a host and a port.
    pub(crate) fn new(address: &'a str) -> Self {
        Self { address, connection: None }
    }

    /// Asks for a completion: the status and the tokens of the answer, or `None` when the client
    /// left before it was complete: after the share `leaves` of its tokens or, where nothing is
    /// streamed, of a fifth of a second.
    ///
    /// # Errors
    /// When the answer breaks off, or a stream tells an error.
    pub(crate) fn complete(
        &mut self,
        body: &Value,
        stream: bool,
        leaves: Option<f64>,
    ) -> Result<Option<(u16, u64)>> {
        // Whoever leaves closes the connection with it.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let text = body.to_string();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: load\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{text}",
            text.len()
        );
        connection.get_mut().write_all(request.as_bytes()).context("cannot ask")?;
        if let (Some(share), false) = (leaves, stream) {
            std::thread::sleep(Duration::from_secs_f64(share * 0.2));
            return Ok(None);
        }
        let head = head(&mut connection)?;
        let tokens = match head.length {
            Some(length) => {
                let mut json = vec![0; length];
                connection.read_exact(&mut json).context("an answer broke off")?;
                let json: Value = serde_json::from_slice(&json).context("an answer is no JSON")?;
                json["usage"]["completion_tokens"].as_u64().unwrap_or(0)
            }
            None => {
                let most = body["max_tokens"].as_u64().unwrap_or(0);
                let until = leaves.map(|share| (share * most as f64) as u64);
                let Some(events) = events(&mut connection, until)? else { return Ok(None) };
                events
            }
        };
        self.connection = Some(connection).filter(|_| !head.closes);
        Ok(Some((head.status, tokens)))
    }

    fn connect(&self) -> Result<BufReader<TcpStream>> {
        let connection = TcpStream::connect(self.address).context("cannot connect")?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        Ok(BufReader::new(connection))
    }
}

fn head(connection: &mut impl BufRead) -> Result<Head> {
    let mut line = String::new();
    connection.read_line(&mut line).context("no status")?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.with_context(|| format!("{line:?} is no status"))?;
    let mut head = Head { status, length: None, closes: false };
    loop {
        line.clear();
        connection.read_line(&mut line).context("the head of an answer broke off")?;
        let lower = line.trim().to_ascii_lowercase();
        match lower.split_once(':').map(|(name, value)| (name, value.trim())) {
            Some(("content-length", length)) => head.length = Some(length.parse()?),
            Some(("connection", "close")) => head.closes = true,
            Some(_) => {}
            None if lower.is_empty() => return Ok(head),
            None => bail!("{line:?} is no header"),
        }
    }
}

/// Counts the events of a stream up to its `[DONE]`; `None` when there have been `until` of them.
fn events(connection: &mut impl BufRead, until: Option<u64>) -> Result<Option<u64>> {
    let (mut count, mut done) = (0, false);
    let (mut line, mut text) = (String::new(), String::new());
    loop {
        line.clear();
        connection.read_line(&mut line).context("a stream broke off")?;
        let size = usize::from_str_radix(line.trim(), 16);
        let size = size.with_context(|| format!("{line:?} is no size of a chunk"))?;
        let mut chunk = vec![0; size + 2];
        connection.read_exact(&mut chunk).context("a stream broke off")?;
        if size == 0 {
            break;
        }
        text.push_str(std::str::from_utf8(&chunk[..size])?);
        let mut read = 0;
        while let Some((event, _)) = text[read..].split_once("\n\n") {
            if event.starts_with("data: {\"error\"") {
                bail!("a stream told {event}");
            }
            done |= event == "data: [DONE]";
            count += u64::from(event.starts_with("data: {"));
            read += event.len() + 2;
        }
        text.drain(..read);
        if until.is_some_and(|until| count >= until) {
            return Ok(None);
        }
    }
    if !done {
        bail!("a stream ended without [DONE]");
    }
    Ok(Some(count))
}
