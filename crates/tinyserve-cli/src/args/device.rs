//! Where the model runs, and what its weights are kept as.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use tinyserve::kernels::{Cpu, CpuOptions, CpuPath};
use tinyserve::model::{CacheOutcome, Checkpoint};
use tinyserve::{Device, TinyServe, TinyServeBuilder, TinyServeConfig, TinyServeError, Weights};

use super::{set, set_some};
use crate::exit::out_of_range;
use crate::progress::Progress;
use crate::{plan, values};

/// How weights are kept.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Device")]
pub(crate) struct WeightsArgs {
    /// How weights are kept: auto (as stored), the stored type by name (f32, f16, bf16), or
    /// quantised while they are loaded: int8, or int4 (embedding, head and matrices of fewer than
    /// 128 inputs: int8).
    #[arg(long, value_name = "DTYPE", env = "TINYSERVE_WEIGHTS", value_parser = values::weights)]
    weights: Option<Weights>,
}

impl WeightsArgs {
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) {
        set(&mut config.weights, self.weights);
    }
}

/// Where the model runs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Device")]
pub(crate) struct DeviceArgs {
    /// auto (the CPU), cpu, cuda or cuda:N.
    #[arg(long, env = "TINYSERVE_DEVICE", value_parser = values::device)]
    device: Option<Device>,
    /// Threads of the CPU [default: all].
    #[arg(short, long, value_name = "N", env = "TINYSERVE_THREADS", value_parser = values::size)]
    threads: Option<usize>,
    /// Instruction set of the CPU: scalar (the reference, one thread), portable, neon, avx2 or avx512;
    /// or avx512-bf16 (on any processor portable-bf16), which rounds activations to bf16 in products
    /// of bf16 weights [default: the best there is that does not round].
    #[arg(long, value_name = "PATH", env = "TINYSERVE_CPU", value_parser = values::cpu_path)]
    cpu: Option<CpuPath>,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Folder in which weights that were quantised (int8, int4) are kept for the next start; a file
    /// that is broken or another model's is replaced.
    #[arg(long, value_name = "DIR", env = "TINYSERVE_WEIGHTS_CACHE")]
    weights_cache: Option<PathBuf>,
    /// Whether a CUDA device scores, selects and attends in one launch where it can [default: by
    /// size, see doctor].
    #[arg(long, value_name = "BOOL", env = "TINYSERVE_USE_FUSED_KERNEL",
          num_args = 0..=1, default_missing_value = "true")]
    use_fused_kernel: Option<bool>,
    /// File that says up to which size that is no slower; what it lacks for the device and the model
    /// is measured when they start, and written there.
    #[arg(long, value_name = "FILE", env = "TINYSERVE_FUSED_TABLE")]
    fused_table: Option<PathBuf>,
    /// Prints the settings, the device and the memory plan to stderr.
    #[arg(short, long, env = "TINYSERVE_VERBOSE", value_parser = clap::builder::BoolishValueParser::new())]
    verbose: bool,
}

impl DeviceArgs {
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) -> Result<()> {
        set(&mut config.device, self.device);
        set_some(&mut config.threads, self.threads);
        self.weights.apply(config);
        set_some(&mut config.weights_cache, self.weights_cache.clone());
        set_some(&mut config.use_fused_kernel, self.use_fused_kernel);
        set_some(&mut config.fused_table, self.fused_table.clone());
        match (self.cpu, config.threads) {
            (Some(CpuPath::Scalar), Some(threads)) if threads > 1 => {
                Err(out_of_range("--threads", threads, "1 with --cpu scalar"))
            }
            _ => Ok(()),
        }
    }

    /// The CPU backend that `config` and the flags ask for.
    pub(crate) fn backend(&self, config: &TinyServeConfig) -> Result<Cpu> {
        if !config.cuda_devices().is_empty() {
            let device = String::from(config.device);
            return Err(out_of_range("--device", device, "cpu for this command"));
        }
        let options = CpuOptions { threads: config.threads, path: self.cpu };
        Ok(Cpu::new(options).map_err(TinyServeError::from)?)
    }

    /// Loads the model of `config`, with a progress bar if that takes long.
    pub(crate) fn load(&self, config: TinyServeConfig) -> Result<TinyServe> {
        self.prepare(config, true).map_err(Into::into)
    }

    /// As [`Self::load`], with the facade's own error; moves of the selection budget are told only
    /// if `tells_moves`.
    pub(crate) fn prepare(
        &self,
        config: TinyServeConfig,
        tells_moves: bool,
    ) -> Result<TinyServe, TinyServeError> {
        self.build(TinyServe::builder().config(config), tells_moves)
    }

    /// As [`Self::load`], from a checkpoint that is open already.
    pub(crate) fn load_open(
        &self,
        config: TinyServeConfig,
        checkpoint: Checkpoint,
    ) -> Result<TinyServe> {
        Ok(self.build(TinyServe::builder().config(config).checkpoint(checkpoint), true)?)
    }

    fn build(
        &self,
        mut builder: TinyServeBuilder,
        tells_moves: bool,
    ) -> Result<TinyServe, TinyServeError> {
        let mut progress = Progress::new("loading");
        if let Some(path) = self.cpu {
            builder = builder.cpu_path(path);
        }
        if tells_moves {
            builder = builder.on_budget_move(|moved| {
                let engine = std::thread::current();
                eprintln!("{}: {moved}", engine.name().unwrap_or("engine"));
            });
        }
        let engine = builder.build_with_progress(|done, total| progress.update(done, total))?;
        progress.finish();
        self.tell_of_cache(engine.weights_cache());
        self.tell(engine.config(), engine.backend_name());
        if self.verbose {
            eprint!("{}", plan::lines(engine.memory()));
        }
        Ok(engine)
    }

    /// Prints what became of a cache of weights, if that is a warning or `--verbose` asks.
    pub(crate) fn tell_of_cache(&self, outcome: Option<&CacheOutcome>) {
        match outcome {
            Some(outcome) if outcome.is_warning() => eprintln!("warning: {outcome}"),
            Some(outcome) if self.verbose => eprintln!("{outcome}"),
            _ => {}
        }
    }

    /// With `--verbose`, prints what is in force.
    pub(crate) fn tell(&self, config: &TinyServeConfig, backend: &str) {
        if self.verbose {
            let json = serde_json::to_string(config).unwrap_or_default();
            eprintln!("settings: {json}");
            eprintln!("device: {backend}");
        }
    }
}
