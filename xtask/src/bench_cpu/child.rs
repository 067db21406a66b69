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

/// llama-bench and a folder of its models.
pub(super) struct Peer {
    pub(super) program: PathBuf,
    pub(super) models: PathBuf,
}

impl Peer {
    /// Rows of the same test; none where the folder has no such model.
    pub(super) fn rows(
        &self,
        shape: &str,
        weights: &str,
        threads: &str,
        test: &[&str],
    ) -> Result<Vec<Value>> {
        let kind = match weights {
            "int8" => "q8_0",
            "int4" => "q4_0",
            "auto" => "f32",
            other => other,
        };
        let model = self.models.join(format!("{shape}-{kind}.gguf"));
        if !model.is_file() {
            return Ok(Vec::new());
        }
        let mut command = Command::new(&self.program);
        command.arg("-m").arg(model).args(["-t", threads, "-fa", "1"]);
        command.args(["-ctk", "f16", "-ctv", "f16", "-o", "json"]).args(test);
        let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
        rows(&command, &output)
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
