//! The programs that measure: ours, and llama-bench.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::EMBEDDED;

/// Exit code of a command whose flags cannot be.
const BAD_USAGE: i32 = 2;

/// The release binary.
pub(super) struct Tinyserve {
    binary: PathBuf,
    threads: String,
}

/// How a child ended.
pub(super) enum Ran {
    Rows(Vec<Value>),
    /// This build has no such setting; its sentence.
    Refused(String),
}

impl Tinyserve {
    /// Builds it.
    pub(super) fn build(root: &Path, threads: Option<u32>) -> Result<Self> {
        let output = crate::cargo()
            .args(["build", "--release", "--package", "tinyserve-cli"])
            .args(["--message-format", "json-render-diagnostics"])
            .current_dir(root)
            .stderr(std::process::Stdio::inherit())
            .output()
            .context("cannot start cargo")?;
        if !output.status.success() {
            bail!("the release binary does not build");
        }
        let messages = String::from_utf8_lossy(&output.stdout);
        let mut executables = messages.lines().filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            Some(PathBuf::from(message["executable"].as_str()?))
        });
        let binary = executables.next_back().context("cargo names no executable")?;
        let threads = threads.map_or_else(
            || std::thread::available_parallelism().map_or(1, usize::from),
            |threads| threads as usize,
        );
        Ok(Self { binary, threads: threads.to_string() })
    }

    pub(super) fn threads(&self) -> &str {
        &self.threads
    }

    /// Rows of `bench latency` of a shape with its weights as `weights`.
    pub(super) fn latency(&self, shape: &str, weights: &str, test: &[&str]) -> Result<Ran> {
        let mut command = self.command("latency");
        match shape {
            EMBEDDED => command.arg("builtin:stories260k"),
            shape => command.args(["--shape", shape]),
        };
        // Shapes are stored as f16: what is not stored is asked for.
        if !["f16", "auto"].contains(&weights) {
            command.args(["--weights", weights]);
        }
        self.rows(command.args(test))
    }

    /// Rows of `bench attention`.
    pub(super) fn attention(&self, flags: &[&str]) -> Result<Vec<Value>> {
        match self.rows(self.command("attention").args(flags))? {
            Ran::Rows(rows) => Ok(rows),
            Ran::Refused(sentence) => bail!("{sentence}"),
        }
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(["bench", name, "-o", "json", "-t", &self.threads]);
        for (variable, _) in std::env::vars_os() {
            // A setting of whoever measures must not decide what is measured.
            if variable.to_string_lossy().starts_with("TINYSERVE_") {
                command.env_remove(variable);
            }
        }
        command
    }

    fn rows(&self, command: &mut Command) -> Result<Ran> {
        let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
        if output.status.code() == Some(BAD_USAGE) {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let sentence = stderr.lines().next().unwrap_or_default();
            return Ok(Ran::Refused(sentence.trim_start_matches("error: ").to_owned()));
        }
        Ok(Ran::Rows(rows(command, &output)?))
    }
}

/// llama.cpp's programs and a folder of its models.
pub(super) struct Peer {
    pub(super) llama_bench: PathBuf,
    /// Built from tools/llama-deep.
    pub(super) llama_deep: Option<PathBuf>,
    pub(super) models: PathBuf,
}

impl Peer {
    /// Speeds of the same test at depth 0.
    pub(super) fn speeds(
        &self,
        shape: &str,
        weights: &str,
        threads: &str,
        test: &[&str],
    ) -> Result<Vec<f64>> {
        self.faster(&self.llama_bench, (shape, weights, "f16"), threads, &[test, &JSON].concat())
    }

    /// Speeds of sequences that are `depth` tokens deep; none without the program for it.
    pub(super) fn deep(&self, deep: &super::Deep, threads: &str) -> Result<Vec<f64>> {
        let Some(program) = &self.llama_deep else { return Ok(Vec::new()) };
        let [sequences, depth] = [deep.sequences, deep.depth].map(|n| n.to_string());
        let test = ["-s", &sequences, "-d", &depth, "-n", super::DEEP_STEPS, "-r", "3"];
        self.faster(program, (deep.shape, deep.weights, deep.kv), threads, &test)
    }

    /// The faster of flash attention and the older path, which differ by a factor of two in
    /// either direction; nothing where the folder has no such model.
    fn faster(
        &self,
        program: &Path,
        (shape, weights, kv): (&str, &str, &str),
        threads: &str,
        test: &[&str],
    ) -> Result<Vec<f64>> {
        let model = self.models.join(format!("{shape}-{}.gguf", peers_type(weights)));
        if !model.is_file() {
            return Ok(Vec::new());
        }
        let kv = peers_type(kv);
        // Values that are quantised need flash attention there.
        let flash = if kv == "f16" { "0,1" } else { "1" };
        let mut command = Command::new(program);
        command.arg("-m").arg(model).args(["-t", threads, "-fa", flash, "-ctk", kv, "-ctv", kv]);
        let output =
            command.args(test).output().with_context(|| format!("cannot start {command:?}"))?;
        let rows = rows(&command, &output)?;
        let speeds = rows.iter().map(|row| super::samples(row).collect::<Vec<_>>());
        Ok(speeds.max_by(|a, b| total(a).total_cmp(&total(b))).unwrap_or_default())
    }
}

const JSON: [&str; 2] = ["-o", "json"];

fn total(speeds: &[f64]) -> f64 {
    speeds.iter().sum()
}

/// llama.cpp's word for a type of weights or of the cache.
fn peers_type(ours: &str) -> &str {
    match ours {
        "int8" => "q8_0",
        "int4" => "q4_0",
        "auto" => "f32",
        other => other,
    }
}

fn rows(command: &Command, output: &std::process::Output) -> Result<Vec<Value>> {
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed: {}", stderr.lines().last().unwrap_or_default());
    }
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{command:?} printed no array of rows"))
}
