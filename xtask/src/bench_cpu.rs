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
use page::Page;

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
    /// Built from tools/llama-deep against the same llama.cpp: takes turns in the rows deep in the
    /// context, which llama-bench needs a quarter of an hour for.
    #[arg(long, value_name = "PATH", requires = "llama_bench")]
    llama_deep: Option<PathBuf>,
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
    /// Generation 8K and 16K tokens deep, dense beside sparse, with peak memory
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
/// Sequences that are this deep in their context.
struct Deep {
    shape: &'static str,
    weights: &'static str,
    kv: &'static str,
    sequences: u32,
    depth: u32,
    /// Tokens of a page.
    page: u32,
}

/// Tokens that each sequence generates in a run deep in the context.
const DEEP_STEPS: &str = "8";

const fn deep(shape: &'static str, weights: &'static str, kv: &'static str) -> Deep {
    Deep { shape, weights, kv, sequences: 1, depth: 16_384, page: 16 }
}

const DEEP: [Deep; 8] = [
    Deep { sequences: 8, ..deep("gpt2-345m", "int8", "f16") },
    deep("tinyllama-1.1b", "int8", "f16"),
    deep("tinyllama-1.1b", "int8", "int8"),
    deep("tinyllama-1.1b", "int4", "f16"),
    deep("llama-15m", "f16", "f16"),
    deep("llama-15m", "f16", "int8"),
    Deep { depth: 8_192, ..deep("gpt2-124m", "f16", "int8") },
    // Codes bring their box along, of which larger pages have less.
    Deep { depth: 8_192, page: 64, ..deep("gpt2-124m", "f16", "int8") },
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
        (Some(llama_bench), Some(models)) => {
            let llama_deep = args.llama_deep.clone();
            if let Some(program) = llama_deep.as_ref().filter(|program| !program.is_file()) {
                bail!("--llama-deep {}: expected a program", program.display());
            }
            let (llama_bench, models) = (llama_bench.clone(), models.clone());
            Ok(Some(Peer { llama_bench, llama_deep, models }))
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
            speeds.peers.extend(peer.speeds(shape, weights, threads, test)?);
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
        page.heading("Deep in the context");
        page.text(
            "Synthetic keys and values; dense and a tenth of the pages take turns in one process, \
             and so do the peer's processes with ours. KV is what the whole cache would take. The \
             peer's cache has the same type: f16, or q8_0 for int8.",
        );
        let mut rows: Vec<_> = DEEP
            .iter()
            .filter(|deep| self.args.wants_shape(deep.shape))
            .map(|deep| (deep, DeepRows::default()))
            .collect();
        for round in 0..self.args.rounds {
            for (deep, found) in &mut rows {
                eprintln!("depth, round {}: {}", round + 1, deep.label());
                let numbers = [deep.sequences, deep.depth, deep.page].map(|n| n.to_string());
                let [sequences, depth, page] = &numbers;
                let test: [&[&str]; 3] = [
                    &["-p", "0", "-n", DEEP_STEPS, "-d", depth, "-r", "3", "-b", sequences],
                    &[
                        "--kv-cache-dtype",
                        deep.kv,
                        "--page-size",
                        page,
                        "--attention",
                        "dense,sparse",
                    ],
                    &["--selection-ratio", "0.1"],
                ];
                let test = test.concat();
                match self.tinyserve.latency(deep.shape, deep.weights, &test)? {
                    Ran::Rows(rows) => found.add(rows),
                    Ran::Refused(sentence) => found.refused = Some(sentence),
                }
                if let Some(peer) = &self.peer {
                    match peer.deep(deep, self.tinyserve.threads()) {
                        Ok(speeds) => found.peers.extend(speeds),
                        Err(error) => {
                            // Of some head sizes llama.cpp quantises no cache.
                            eprintln!("{error:#}");
                            found.refused = Some("llama.cpp does not run it".to_owned());
                        }
                    }
                }
            }
        }
        page.table_of_depth(rows.iter().map(|(deep, rows)| (deep.label(), rows)));
        Ok(())
    }
}

impl Deep {
    fn label(&self) -> String {
        let Self { shape, weights, kv, sequences, depth, page } = self;
        format!("{shape} {weights}, {kv} KV in pages of {page}, {sequences} × {}K", depth / 1024)
    }
}

/// What the rounds gave for one line deep in the context.
#[derive(Default)]
struct DeepRows {
    /// The last row of each kind of attention, with the speeds of all rounds.
    ours: Vec<(Value, Vec<f64>)>,
    peers: Vec<f64>,
    refused: Option<String>,
}

impl DeepRows {
    fn add(&mut self, rows: Vec<Value>) {
        for row in rows {
            let mut speeds: Vec<_> = samples(&row).collect();
            match self.ours.iter_mut().find(|(old, _)| old["attention"] == row["attention"]) {
                Some((old, all)) => {
                    all.append(&mut speeds);
                    *old = row;
                }
                None => self.ours.push((row, speeds)),
            }
        }
    }
}

/// Speeds of the runs of a row.
fn samples(row: &Value) -> impl Iterator<Item = f64> {
    row["samples_ts"].as_array().into_iter().flatten().filter_map(Value::as_f64)
}
