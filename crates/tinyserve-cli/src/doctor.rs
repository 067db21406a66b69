//! `tinyserve doctor`: what this machine has and what is used of it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use tinyserve::kernels::conformance::Table;
use tinyserve::kernels::{CpuPath, CudaDevice, FusedRow, FusedTable, cublas_version};
use tinyserve::{Device, FusedTableFile, FusedTableRow};

use crate::exit::Quiet;
use crate::self_test::{self, PathReport};
use crate::units::bytes;
use crate::{memory, output, values};

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
    /// What the self-test runs on instead of every path of the CPU: cuda or cuda:N.
    #[arg(long, requires = "self_test", conflicts_with = "cpu", value_parser = values::device)]
    device: Option<Device>,
    /// File of --fused-table to show in place of the built-in table.
    #[arg(long, value_name = "FILE", env = "TINYSERVE_FUSED_TABLE")]
    fused_table: Option<PathBuf>,
}

/// Prints the report, and fails when the self-test does.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<()> {
    let fused = Fused::read(args.fused_table.as_deref())?;
    let machine = Machine::look(args.cpu, fused);
    let tests = match (args.self_test, args.cpu, args.device) {
        (false, ..) => Vec::new(),
        (true, _, Some(Device::Cuda(number))) => vec![self_test::run_cuda(number)?],
        (true, Some(path), _) => vec![self_test::run(&mut Table::new(), path)?],
        (true, None, _) => {
            let mut table = Table::new();
            let paths = machine.paths.iter();
            paths.map(|&path| self_test::run(&mut table, path)).collect::<Result<Vec<_>>>()?
        }
    };
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
    gpus: Result<Vec<CudaDevice>, String>,
    /// Its version; not looked for where no GPU can use it.
    cublas: Result<String, String>,
    fused: Fused,
}

/// Up to which size selection and attention are one launch.
enum Fused {
    BuiltIn,
    Measured { file: PathBuf, table: FusedTableFile },
}

impl Machine {
    fn look(path: Option<CpuPath>, fused: Fused) -> Self {
        let gpus = CudaDevice::all().map_err(|error| error.to_string());
        let cublas = match &gpus {
            Ok(_) => cublas_version().map_err(|error| error.to_string()),
            Err(reason) => Err(reason.clone()),
        };
        Self {
            cpu: cpu_model(),
            features: features(),
            path: path.unwrap_or_else(CpuPath::detect),
            paths: CpuPath::ALL.into_iter().filter(|path| path.is_available()).collect(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            gpus,
            cublas,
            fused,
        }
    }

    fn found(&self) -> Vec<&'static str> {
        self.features.iter().filter(|(_, found)| *found).map(|(name, _)| *name).collect()
    }

    fn json(&self) -> Value {
        let names: Vec<_> = self.paths.iter().map(|path| path.name()).collect();
        let rounding = self.paths.iter().filter(|path| path.rounds_inputs());
        let rounding: Vec<_> = rounding.map(|path| path.name()).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "os": std::env::consts::OS,
            "arch": std::env::consts::ARCH,
            "cpu": {
                "model": self.cpu,
                "features": self.found(),
                "path": self.path.name(),
                "paths": names,
                "rounding_paths": rounding,
                "threads": self.threads,
            },
            "memory": { "total_bytes": memory::total(), "available_bytes": memory::available() },
            "gpus": self.gpus.iter().flatten().map(gpu_json).collect::<Vec<_>>(),
            "fused_kernel": { "table": self.fused.rows(), "source": self.fused.source() },
            "cublas": { "version": self.cublas.as_ref().ok(), "missing": self.cublas.as_ref().err() },
            // Why there is none, or nothing.
            "cuda": self.gpus.as_ref().err(),
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
             rounding   {}\n\
             threads    {}\n\
             memory     {}, {} available\n\
             GPUs       {}\n",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::OS,
            std::env::consts::ARCH,
            self.cpu.as_deref().unwrap_or("unknown"),
            self.found().join(", "),
            self.path,
            names.join(", "),
            self.rounding_text(),
            self.threads,
            known(memory::total()),
            known(memory::available()),
            self.gpu_text(),
        )
    }
}

impl Machine {
    /// What choosing a path that rounds does.
    fn rounding_text(&self) -> String {
        let rounding = self.paths.iter().filter(|path| path.rounds_inputs());
        let names: Vec<_> = rounding.map(|path| path.name()).collect();
        format!(
            "activations to bf16 in products of bf16 weights, as llama.cpp has it, only where asked \
             for by TINYSERVE_CPU or --cpu: {}",
            names.join(", ")
        )
    }

    fn gpu_text(&self) -> String {
        let gpus = match &self.gpus {
            Err(reason) => return reason.clone(),
            Ok(gpus) => gpus,
        };
        let line = |gpu: &CudaDevice| {
            let CudaDevice { ordinal, name, capability: (major, minor), driver, .. } = gpu;
            let [memory, free] = [gpu.memory, gpu.free].map(|amount| bytes(amount as u64));
            let usable = match &gpu.unusable {
                Some(error) => format!("; {error}"),
                None => String::new(),
            };
            let overlap = if gpu.overlaps_launches() { ", launches overlap" } else { "" };
            format!(
                "cuda:{ordinal} {name}, compute capability {major}.{minor}, {memory}, {free} free, \
                 driver for CUDA {driver}{overlap}{usable}"
            )
        };
        let fused = format!(
            "selection and attention are one launch where a KV head's boxes, and its keys and values \
             beyond 512 tokens, have no more bytes than {}; --use-fused-kernel decides otherwise",
            self.fused.text(),
        );
        let products = match &self.cublas {
            Ok(version) => format!("cuBLAS {version} multiplies prompts"),
            Err(reason) => reason.clone(),
        };
        gpus.iter().map(line).chain([fused, products]).collect::<Vec<_>>().join("\n           ")
    }
}

impl Fused {
    /// The table of `file`, if one is named.
    fn read(file: Option<&Path>) -> Result<Self> {
        let Some(file) = file else { return Ok(Self::BuiltIn) };
        let table = FusedTableFile::read(file)?;
        Ok(Self::Measured { file: file.to_owned(), table })
    }

    fn source(&self) -> String {
        match self {
            Self::BuiltIn => FusedTable::DEFAULT.source.to_owned(),
            Self::Measured { file, .. } => format!(
                "measured, in {}; a start with a device and a shape that are not there measures them",
                file.display()
            ),
        }
    }

    fn rows(&self) -> Vec<Value> {
        let built_in =
            |row: &FusedRow| json!({ "kv_heads": row.kv_heads, "most_bytes": row.most_bytes });
        let measured = |row: &FusedTableRow| {
            let mut object = json!(row);
            object["most_bytes"] = row.most_bytes().into();
            object
        };
        match self {
            Self::BuiltIn => FusedTable::DEFAULT.rows.iter().map(built_in).collect(),
            Self::Measured { table, .. } => table.rows().iter().map(measured).collect(),
        }
    }

    /// The rows and their source, as the end of a sentence.
    fn text(&self) -> String {
        let built_in =
            |row: &FusedRow| format!("{}: {}", row.kv_heads, bytes(row.most_bytes as u64));
        let measured = |row: &FusedTableRow| {
            let FusedTableRow { device, kv_cache_dtype, page_size, .. } = row;
            let FusedTableRow { q_heads, kv_heads, head_dim, .. } = row;
            format!(
                "{} on {device} with {q_heads} query and {kv_heads} KV heads of {head_dim}, \
                 {kv_cache_dtype} pages of {page_size}",
                bytes(row.most_bytes() as u64),
            )
        };
        let rows: Vec<_> = match self {
            Self::BuiltIn => FusedTable::DEFAULT.rows.iter().map(built_in).collect(),
            Self::Measured { table, .. } => table.rows().iter().map(measured).collect(),
        };
        let of = match self {
            Self::BuiltIn => "by KV heads, ",
            Self::Measured { .. } if rows.is_empty() => "nobody knows yet",
            Self::Measured { .. } => "",
        };
        format!("{of}{} ({})", rows.join(", "), self.source())
    }
}

fn gpu_json(gpu: &CudaDevice) -> Value {
    let (major, minor) = gpu.capability;
    json!({
        "device": format!("cuda:{}", gpu.ordinal),
        "name": gpu.name,
        "compute_capability": format!("{major}.{minor}"),
        "total_bytes": gpu.memory,
        "free_bytes": gpu.free,
        "driver": gpu.driver.to_string(),
        "overlaps_launches": gpu.overlaps_launches(),
        "unusable": gpu.unusable.as_ref().map(ToString::to_string),
    })
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
