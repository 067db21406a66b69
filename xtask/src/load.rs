//! `cargo xtask load`: many impatient clients against the binary, and what became of them.

mod client;
mod overhead;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};

pub(crate) use client::Client;

use crate::clients::Served;

/// What is asked of the server.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// The model that is served.
    #[arg(default_value = "builtin:stories260k")]
    model: String,
    /// Clients, each with a connection of its own.
    #[arg(long, default_value_t = 256)]
    connections: usize,
    /// How long they ask.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 32)]
    prompt_tokens: usize,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 64)]
    max_tokens: usize,
    /// Share of the requests whose client goes away at a random moment.
    #[arg(long, default_value_t = 0.1)]
    disconnect: f64,
    /// Share of the requests that are streamed.
    #[arg(long, default_value_t = 0.5)]
    stream: f64,
    /// Compare with the same load in process instead, in turns, and time scrapes of /metrics.
    #[arg(long)]
    overhead: bool,
    /// Requests of each turn of --overhead.
    #[arg(long, default_value_t = 2000)]
    requests: usize,
    /// Turns of --overhead.
    #[arg(long, default_value_t = 5, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    turns: usize,
    /// Flags of the server, such as "--max-num-seqs 32".
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    serve: String,
}

/// What the clients saw.
#[derive(Debug, Default)]
struct Seen {
    statuses: Mutex<BTreeMap<u16, u64>>,
    latencies: Mutex<Vec<Duration>>,
    tokens: AtomicU64,
    went_away: AtomicU64,
    broken: AtomicU64,
}

/// Runs the load and prints what happened; fails when something was answered with a 5xx, a page
/// leaked, memory grew, or an answer broke off.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    if args.overhead {
        return overhead::run(root, args);
    }
    let mut flags = vec![args.model.as_str()];
    flags.extend(args.serve.split_whitespace());
    let mut server = Served::start(root, &flags)?;
    let address = server.address.trim_start_matches("http://").to_owned();
    let (mut client, mut rng) = (Client::new(&address), ChaCha8Rng::seed_from_u64(0));
    ask(&mut client, args, &mut rng, &Seen::default());
    let before = stats(&address)?;
    let memory_before = memory(server.id())?;

    let (seen, over) = (Seen::default(), AtomicBool::new(false));
    let probes: Mutex<BTreeMap<&str, Vec<Duration>>> = Mutex::default();
    let mut memories = Vec::new();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..args.connections {
            let (seen, over, address) = (&seen, &over, address.as_str());
            scope.spawn(move || {
                let mut rng = ChaCha8Rng::seed_from_u64(client as u64 + 1);
                let mut client = Client::new(address);
                while !over.load(Ordering::Relaxed) {
                    ask(&mut client, args, &mut rng, seen);
                }
            });
        }
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for path in ["/metrics", "/health"] {
                    let start = Instant::now();
                    if get(&address, path).is_ok() {
                        let mut probes =
                            probes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        probes.entry(path).or_default().push(start.elapsed());
                    }
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        while start.elapsed() < Duration::from_secs(args.seconds) {
            std::thread::sleep(Duration::from_millis(500));
            memories.extend(memory(server.id()));
        }
        over.store(true, Ordering::Relaxed);
    });
    let took = start.elapsed().as_secs_f64();
    let after = idle(&address)?;

    let mut report = String::new();
    let statuses = seen.statuses.into_inner().unwrap_or_default();
    let answered: u64 = statuses.values().sum();
    let counted =
        |name: &str| after[name].as_u64().unwrap_or(0) - before[name].as_u64().unwrap_or(0);
    writeln!(
        report,
        "{} connections for {took:.1} s, {} prompt and {} answer tokens",
        args.connections, args.prompt_tokens, args.max_tokens
    )?;
    writeln!(
        report,
        "answered            {answered} ({:.1}/s), by status {statuses:?}",
        answered as f64 / took
    )?;
    writeln!(report, "went away           {}", seen.went_away.load(Ordering::Relaxed))?;
    writeln!(report, "broken off          {}", seen.broken.load(Ordering::Relaxed))?;
    writeln!(
        report,
        "tokens to clients   {:.0}/s",
        seen.tokens.load(Ordering::Relaxed) as f64 / took
    )?;
    writeln!(report, "tokens generated    {:.0}/s", counted("generated_tokens") as f64 / took)?;
    let mut latencies = seen.latencies.into_inner().unwrap_or_default();
    writeln!(report, "latency             {}", quantiles(&mut latencies))?;
    for (path, mut times) in probes.into_inner().unwrap_or_default() {
        writeln!(report, "{path:<19} {}", quantiles(&mut times))?;
    }
    let (first, last) = (memories.get(memories.len() / 4), memories.last());
    let mb = |bytes: Option<&u64>| bytes.map_or(0.0, |bytes| *bytes as f64 / 1e6);
    writeln!(
        report,
        "memory              {:.1} MB before, {:.1} MB after a quarter, {:.1} MB at the end",
        memory_before as f64 / 1e6,
        mb(first),
        mb(last)
    )?;
    writeln!(
        report,
        "pages in use        {} before, {} after",
        before["pages_used"], after["pages_used"]
    )?;
    print!("{report}");
    server.stop()?;

    let failed: u64 = statuses.iter().filter(|(status, _)| **status >= 500).map(|(_, n)| n).sum();
    if failed > 0 || seen.broken.load(Ordering::Relaxed) > 0 {
        bail!("{failed} answers were 5xx, {:?} broke off, expected none", seen.broken);
    }
    // What is kept to be found again fills up in the first quarter.
    if let (Some(&first), Some(&last)) = (first, last)
        && last > first + first / 10 + (8 << 20)
    {
        bail!("memory grows: {first} bytes after a quarter, {last} at the end");
    }
    if after["pages_used"] != before["pages_used"] {
        bail!("pages leaked");
    }
    Ok(())
}

/// A number from 0 to 1.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    f64::from(rng.next_u32()) / f64::from(u32::MAX)
}

/// One request, to its end or until the client loses interest.
fn ask(client: &mut Client<'_>, args: &Args, rng: &mut ChaCha8Rng, seen: &Seen) {
    let stream = uniform(rng) < args.stream;
    let leaves = (uniform(rng) < args.disconnect).then(|| uniform(rng));
    let prompt: Vec<u32> = (0..args.prompt_tokens).map(|_| 3 + rng.next_u32() % 250).collect();
    let body = json!({
        "prompt": prompt, "max_tokens": args.max_tokens, "ignore_eos": true, "stream": stream, "temperature": 1.0,
    });
    let start = Instant::now();
    match client.complete(&body, stream, leaves) {
        Ok(Some((status, tokens))) => {
            *seen
                .statuses
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .entry(status)
                .or_default() += 1;
            if status == 200 {
                seen.tokens.fetch_add(tokens, Ordering::Relaxed);
                seen.latencies
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .push(start.elapsed());
            } else {
                // As the answer asks for: not at once.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(None) => drop(seen.went_away.fetch_add(1, Ordering::Relaxed)),
        Err(error) => {
            eprintln!("{error:#}");
            seen.broken.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn get(address: &str, path: &str) -> Result<String> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(connection, "GET {path} HTTP/1.1\r\nhost: load\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    if !head.starts_with("HTTP/1.1 200 ") {
        bail!("{path} is answered with {head}");
    }
    Ok(body.to_owned())
}

fn stats(address: &str) -> Result<Value> {
    Ok(serde_json::from_str(&get(address, "/tinyserve/stats")?)?)
}

/// The statistics once nothing runs.
fn idle(address: &str) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let stats = stats(address)?;
        if stats["running"] == 0 && stats["waiting"] == 0 {
            return Ok(stats);
        }
        if Instant::now() > deadline {
            bail!("requests still run: {stats}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes of a process that are in memory.
fn memory(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kilobytes * 1024)
}

fn quantiles(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |share: f64| {
        times.get(((times.len().max(1) - 1) as f64 * share) as usize).copied().unwrap_or_default()
    };
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    format!(
        "p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms, {} times",
        ms(at(0.5)),
        ms(at(0.99)),
        ms(at(1.0)),
        times.len()
    )
}
