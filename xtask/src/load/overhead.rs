//! What HTTP costs: the same load through the server and in process, in turns.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::{Args, Client, get, quantiles};
use crate::clients::Served;

/// Scrapes whose times are told.
const SCRAPES: usize = 1000;

/// How the clients want their answers.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    /// Whether the request with this number is streamed.
    streams: fn(usize) -> bool,
}

const WAYS: [Way; 3] = [
    Way { name: "whole answers", streams: |_| false },
    Way { name: "half of each", streams: |number| number % 2 == 1 },
    Way { name: "streams", streams: |_| true },
];

/// Runs the load in turns, and prints each turn's tokens per second and the ratios of the medians.
pub(super) fn run(root: &Path, args: &Args) -> Result<()> {
    // As many pages as the benchmark has: the caches of the processor hold more of fewer.
    let longest = (args.prompt_tokens + args.max_tokens).to_string();
    let mut flags = vec![args.model.as_str(), "--max-sequence-length", &longest];
    flags.extend(args.serve.split_whitespace());
    let mut server = Served::start(root, &flags)?;
    let address = server.address.trim_start_matches("http://").to_owned();
    println!(
        "{} requests of {} prompt and {} answer tokens, {} at once, {} turns; prompt and answer tokens per second",
        args.requests, args.prompt_tokens, args.max_tokens, args.connections, args.turns
    );
    let mut process = Vec::new();
    let mut ways = WAYS.map(|way| (way, Vec::new()));
    // One of each that does not count: pages of memory, caches, the allocator.
    for turn in 0..=args.turns {
        let note = |name: &str, all: &mut Vec<f64>, measured: f64| {
            if turn > 0 {
                println!("turn {turn}  {name:<14} {measured:>9.0} tok/s");
                all.push(measured);
            }
        };
        note("in process", &mut process, in_process(root, args)?);
        for (number, (way, all)) in ways.iter_mut().enumerate() {
            // Other prompts every time: what is cached is not computed.
            let first = (turn * WAYS.len() + number) * args.requests;
            note(way.name, all, through_http(&address, args, way.streams, first)?);
        }
    }
    let process = median(process);
    println!("{:<28} {process:.0} tok/s", "in process");
    for (way, all) in ways {
        println!("{:<28} {:.3}", format!("{} / in process", way.name), median(all) / process);
    }
    println!("a scrape of /metrics         {}", scrapes(&address)?);
    server.stop()
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Tokens per second of `tinyserve bench serve`.
fn in_process(root: &Path, args: &Args) -> Result<f64> {
    let number = |n: usize| n.to_string();
    let output = Command::new(root.join("target/release/tinyserve"))
        .args(["bench", "serve", "--json", &args.model])
        .args(["-p", &number(args.prompt_tokens), "-n", &number(args.max_tokens)])
        .args(["--num-prompts", &number(args.requests)])
        .args(["--max-concurrency", &number(args.connections)])
        .args(args.serve.split_whitespace())
        .output()
        .context("cannot start the benchmark")?;
    if !output.status.success() {
        bail!("bench serve says {}", String::from_utf8_lossy(&output.stderr));
    }
    let figures: Value = serde_json::from_slice(&output.stdout).context("bench serve's JSON")?;
    figures["total_token_throughput"].as_f64().context("total_token_throughput")
}

/// Tokens per second of `args.connections` clients, whose prompts are drawn with the seeds from
/// `first` on.
fn through_http(
    address: &str,
    args: &Args,
    streams: fn(usize) -> bool,
    first: usize,
) -> Result<f64> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let tokens = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..args.connections {
            scope.spawn(|| {
                let mut client = Client::new(address);
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= args.requests {
                        return;
                    }
                    let stream = streams(number);
                    let mut rng = ChaCha8Rng::seed_from_u64((first + number) as u64);
                    let prompt: Vec<u32> =
                        (0..args.prompt_tokens).map(|_| 3 + rng.next_u32() % 250).collect();
                    let body = json!({
                        "prompt": prompt, "max_tokens": args.max_tokens, "ignore_eos": true,
                        "stream": stream, "temperature": 0,
                        "stream_options": stream.then(|| json!({"include_usage": true})),
                    });
                    match client.complete(&body, stream, None) {
                        Ok(Some((200, _))) => {
                            tokens
                                .fetch_add(args.prompt_tokens + args.max_tokens, Ordering::Relaxed);
                        }
                        other => {
                            let mut failed =
                                failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                            failed.get_or_insert(format!("{other:?}"));
                            return;
                        }
                    }
                }
            });
        }
    });
    let took = start.elapsed().as_secs_f64();
    match failed.into_inner() {
        Ok(None) => Ok(tokens.into_inner() as f64 / took),
        failed => bail!("a request was answered with {failed:?}"),
    }
}

/// How long scrapes take, one after the other, connecting included.
fn scrapes(address: &str) -> Result<String> {
    let mut times = Vec::with_capacity(SCRAPES);
    for _ in 0..SCRAPES {
        let start = Instant::now();
        get(address, "/metrics")?;
        times.push(start.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(quantiles(&mut times))
}
