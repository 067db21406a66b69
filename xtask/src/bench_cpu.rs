//! `cargo xtask bench-cpu`: every number of the CPU's table, as a page of docs/benchmarks.
//!
//! Runs the release binary as child processes. What is compared takes turns, round by round, so
//! that a slow minute of the machine slows both sides; figures are medians over all rounds.

mod child;
mod page;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::Value;

use child::{Peer, Ran, Tinyserve};
use page::{Page, number};

/// What to measure, and where to write it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Parts of the table [default: all].
    #[arg(long, value_enum, value_name = "PART,…", value_delimiter = ',')]
    only: Vec<Part>,
    /// Shapes of decode, prefill and depth, as `tinyserve bench --shape` names them, and embedded
    /// [default: all of the table].
    #[arg(long, value_name = "SHAPE,…", value_delimiter = ',')]
    shapes: Vec<String>,
    /// Rounds in which the children take turns.
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Threads [default: all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// The llama-bench of a build of llama.cpp: takes turns with ours, and ratios are printed.
    #[arg(long, value_name = "PATH", requires = "gguf")]
    llama_bench: Option<PathBuf>,
    /// Folder of its models: SHAPE-f16.gguf, SHAPE-q8_0.gguf, SHAPE-q4_0.gguf.
    #[arg(long, value_name = "DIR", requires = "llama_bench")]
    gguf: Option<PathBuf>,
    /// File to write [default: docs/benchmarks/DATE-bench-cpu.md].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Generation at depth 0
    Decode,
    /// A prompt of 512 tokens
    Prefill,
    /// One attention step alone
    Attention,
    /// Generation 16K tokens deep, dense beside sparse, with peak memory
    Depth,
}

const EMBEDDED: &str = "embedded";
/// Shapes and the weights that they are measured with.
const MODELS: [(&str, &[&str]); 5] = [
    ("gpt2-345m", &["f16", "int8"]),
    ("tinyllama-1.1b", &["f16", "int8"]),
    ("llama-15m", &["f16", "int8"]),
    ("gpt2-124m", &["f16", "int8"]),
    (EMBEDDED, &["auto"]),
];
/// Shape, weights, sequences.
const DEEP: [(&str, &str, u32); 4] = [
    ("gpt2-345m", "int8", 8),
    ("tinyllama-1.1b", "int8", 1),
    ("tinyllama-1.1b", "int4", 1),
    ("llama-15m", "f16", 1),
];

/// Measures, prints and writes the page.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let known = |shape: &String| MODELS.iter().any(|(name, _)| name == shape);
    if let Some(shape) = args.shapes.iter().find(|shape| !known(shape)) {
        let names = MODELS.map(|(name, _)| name).join(", ");
        bail!("--shapes names {shape}, expected some of {names}");
    }
    let started = Instant::now();
    let session =
        Session { tinyserve: Tinyserve::build(root, args.threads)?, peer: peer(args)?, args };
    let mut page = Page::new(root, args.peers())?;
    if args.wants(Part::Decode) {
        session.speeds(&mut page, "Decode at depth 0", ("-n", 32))?;
    }
    if args.wants(Part::Prefill) {
        session.speeds(&mut page, "Prefill of 512 tokens", ("-p", 512))?;
    }
    if args.wants(Part::Attention) {
        session.attention(&mut page)?;
    }
    if args.wants(Part::Depth) {
        session.depth(&mut page)?;
    }
    page.text(&format!("Measured in {:.0} s.", started.elapsed().as_secs_f64()));
    let out = match &args.out {
        Some(out) => out.clone(),
        None => root.join(format!("docs/benchmarks/{}-bench-cpu.md", page.date())),
    };
    fs::write(&out, page.finish()).with_context(|| format!("cannot write {}", out.display()))?;
    println!("{}: written in {:.0} s", out.display(), started.elapsed().as_secs_f64());
    Ok(())
}

fn peer(args: &Args) -> Result<Option<Peer>> {
    match (&args.llama_bench, &args.gguf) {
        (Some(program), Some(models)) if !program.is_file() || !models.is_dir() => bail!(
            "--llama-bench {} and --gguf {}: expected a program and a folder",
            program.display(),
            models.display()
        ),
        (Some(program), Some(models)) => {
            Ok(Some(Peer { program: program.clone(), models: models.clone() }))
        }
        _ => Ok(None),
    }
}

impl Args {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn wants_shape(&self, shape: &str) -> bool {
        self.shapes.is_empty() || self.shapes.iter().any(|wanted| wanted == shape)
    }

    fn peers(&self) -> bool {
        self.llama_bench.is_some()
    }
}

struct Session<'a> {
    tinyserve: Tinyserve,
    peer: Option<Peer>,
    args: &'a Args,
}

/// Speeds of one case over the rounds.
#[derive(Default)]
struct Speeds {
    ours: Vec<f64>,
    peers: Vec<f64>,
    /// The last row, for what is not a speed.
    row: Option<Value>,
    /// Why there are no speeds.
    refused: Option<String>,
}

impl Session<'_> {
    /// Prefill or decode of every shape with each kind of weights.
    fn speeds(&self, page: &mut Page, title: &str, (flag, tokens): (&str, u32)) -> Result<()> {
        let mut cases: Vec<_> = MODELS
            .iter()
            .filter(|(shape, _)| self.args.wants_shape(shape))
            .flat_map(|(shape, all)| {
                all.iter().map(|&weights| (*shape, weights, Speeds::default()))
            })
            .collect();
        let other = if flag == "-p" { "-n" } else { "-p" };
        let tokens = tokens.to_string();
        for round in 0..self.args.rounds {
            for (shape, weights, speeds) in &mut cases {
                eprintln!("{title}, round {}: {shape} {weights}", round + 1);
                // The embedded model's context is 512 tokens; it has room for either.
                let test = [flag, &tokens, other, "0", "-r", "3"];
                self.take(speeds, (shape, weights), &test)?;
            }
        }
        page.heading(title);
        page.table_of_speeds(cases.iter().map(|(shape, weights, s)| {
            let label = format!("{shape} {}", if *weights == "auto" { "f32" } else { *weights });
            (label, s.row.as_ref(), s.refused.as_deref(), s.ours.as_slice(), s.peers.as_slice())
        }));
        Ok(())
    }

    /// One child of ours and one of the peer's.
    fn take(
        &self,
        speeds: &mut Speeds,
        (shape, weights): (&str, &str),
        test: &[&str],
    ) -> Result<()> {
        match self.tinyserve.latency(shape, weights, test)? {
            Ran::Rows(rows) => {
                for row in &rows {
                    speeds.ours.extend(samples(row));
                }
                speeds.row = rows.into_iter().last();
            }
            Ran::Refused(sentence) => speeds.refused = Some(sentence),
        }
        if let Some(peer) = &self.peer {
            let threads = self.tinyserve.threads();
            let rows = peer.rows(shape, weights, threads, test)?;
            speeds.peers.extend(rows.iter().flat_map(samples));
        }
        Ok(())
    }

    fn attention(&self, page: &mut Page) -> Result<()> {
        page.heading("One attention step alone");
        page.text("Head dimension 64, f16, 32,768 tokens, pages of 16; modes take turns.");
        let mut rows = Vec::new();
        for (q_heads, kv_heads) in [("32", "4"), ("16", "16")] {
            eprintln!("attention: {q_heads} query heads, {kv_heads} KV heads");
            let flags = ["--q-heads", q_heads, "--kv-heads", kv_heads, "-r", "15"];
            rows.extend(self.tinyserve.attention(&flags)?);
        }
        page.table_of_attention(&rows);
        Ok(())
    }

    fn depth(&self, page: &mut Page) -> Result<()> {
        page.heading("16,384 tokens deep");
        page.text(
            "Synthetic keys and values, f16; dense and a tenth of the pages take turns in one \
             process, the ratio is of medians. KV is what the whole cache would take.",
        );
        let mut rows = Vec::new();
        for (shape, weights, batch) in DEEP.into_iter().filter(|it| self.args.wants_shape(it.0)) {
            eprintln!("depth: {shape} {weights}, {batch} sequences");
            let batch = batch.to_string();
            let test = ["-p", "0", "-n", "8", "-d", "16384", "-r", "5"];
            let ours = [
                &test[..],
                &["-b", &batch, "--kv-cache-dtype", "f16", "--attention", "dense,sparse"],
                &["--selection-ratio", "0.1"],
            ]
            .concat();
            let label = format!("{shape} {weights} x{batch}");
            let ran = self.tinyserve.latency(shape, weights, &ours)?;
            // llama-bench has no batch of sequences.
            let peers = match &self.peer {
                Some(peer) if batch == "1" => {
                    peer.rows(shape, weights, self.tinyserve.threads(), &test)?
                }
                _ => Vec::new(),
            };
            rows.push((label, ran, peers.iter().flat_map(samples).collect::<Vec<_>>()));
        }
        page.table_of_depth(&rows);
        Ok(())
    }
}

/// Speeds of the runs of a row.
fn samples(row: &Value) -> Vec<f64> {
    match row["samples_ts"].as_array() {
        Some(samples) => samples.iter().filter_map(Value::as_f64).collect(),
        None => number(row, "avg_ts").into_iter().collect(),
    }
}
