//! `tinyserve doctor`: what this machine has and what is used of it.

use std::fs;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use tinyserve::kernels::CpuPath;

use crate::exit::Quiet;
use crate::self_test::{self, PathReport};
use crate::units::bytes;
use crate::{memory, output, values};

const CUDA: &str = "CUDA backend: not built into this version";

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Runs every kernel of every path (or of --cpu) against the reference; a failure is exit
    /// code 1.
    #[arg(long)]
    self_test: bool,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    /// Instruction set to look at instead of the best there is.
    #[arg(long, value_name = "PATH", env = "TINYSERVE_CPU", value_parser = values::cpu_path)]
    cpu: Option<CpuPath>,
}

/// Prints the report, and fails when the self-test does.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<()> {
    let machine = Machine::look(args.cpu);
    let paths = match (args.self_test, args.cpu) {
        (false, _) => Vec::new(),
        (true, Some(path)) => vec![path],
        (true, None) => machine.paths.clone(),
    };
    let tests = paths.into_iter().map(self_test::run).collect::<Result<Vec<_>>>()?;
    if args.json {
        let mut report = machine.json();
        if args.self_test {
            report["self_test"] = tests.iter().map(PathReport::json).collect();
        }
        output::json(&report)?;
    } else {
        let tests: String = tests.iter().map(PathReport::text).collect();
        output::text(&(machine.text() + &tests))?;
    }
    if tests.iter().all(PathReport::passed) { Ok(()) } else { Err(Quiet::CheckFailed.into()) }
}

struct Machine {
    cpu: Option<String>,
    features: Vec<(&'static str, bool)>,
    path: CpuPath,
    paths: Vec<CpuPath>,
    threads: usize,
}

impl Machine {
    fn look(path: Option<CpuPath>) -> Self {
        Self {
            cpu: cpu_model(),
            features: features(),
            path: path.unwrap_or_else(CpuPath::detect),
            paths: CpuPath::ALL.into_iter().filter(|path| path.is_available()).collect(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    fn found(&self) -> Vec<&'static str> {
        self.features.iter().filter(|(_, found)| *found).map(|(name, _)| *name).collect()
    }

    fn json(&self) -> Value {
        let names: Vec<_> = self.paths.iter().map(|path| path.name()).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "os": std::env::consts::OS,
            "arch": std::env::consts::ARCH,
            "cpu": {
                "model": self.cpu,
                "features": self.found(),
                "path": self.path.name(),
                "paths": names,
                "threads": self.threads,
            },
            "memory": { "total_bytes": memory::total(), "available_bytes": memory::available() },
            "gpus": [],
            "cuda": CUDA,
        })
    }

    fn text(&self) -> String {
        let known = |amount: Option<u64>| amount.map_or("unknown".to_owned(), bytes);
        let missing: Vec<_> =
            self.features.iter().filter(|(_, found)| !found).map(|(name, _)| *name).collect();
        let missing = match missing.as_slice() {
            [] => String::new(),
            missing => format!(" (not {})", missing.join(", ")),
        };
        let names: Vec<_> = self.paths.iter().map(|path| path.name()).collect();
        let usable = if self.path.is_available() { "" } else { ", which this processor lacks" };
        format!(
            "tinyserve  {} on {} {}\n\
             CPU        {}\n\
             features   {}{missing}\n\
             path       {}{usable} (available: {})\n\
             threads    {}\n\
             memory     {}, {} available\n\
             GPUs       {CUDA}\n",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::OS,
            std::env::consts::ARCH,
            self.cpu.as_deref().unwrap_or("unknown"),
            self.found().join(", "),
            self.path,
            names.join(", "),
            self.threads,
            known(memory::total()),
            known(memory::available()),
        )
    }
}

/// The processor's name, where the system has it in a file.
fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<(&'static str, bool)> {
    macro_rules! features {
        ($($name:tt),*) => { vec![$(($name, is_x86_feature_detected!($name))),*] };
    }
    features!(
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx512vnni",
        "avx512bf16"
    )
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<(&'static str, bool)> {
    macro_rules! features {
        ($($name:tt),*) => {
            vec![$(($name, std::arch::is_aarch64_feature_detected!($name))),*]
        };
    }
    features!("neon", "fp16", "dotprod", "bf16", "i8mm", "sve")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<(&'static str, bool)> {
    Vec::new()
}
