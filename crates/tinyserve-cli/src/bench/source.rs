//! What a benchmark runs on: a checkpoint, or a shape with random weights.

use anyhow::{Result, anyhow};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use tinyserve::kernels::DType;
use tinyserve::model::{Checkpoint, SyntheticModel, SyntheticShape};
use tinyserve::{RopeFrequencyDtype, TinyServeConfig};

use crate::{memory, units};

/// A shape in place of a model.
#[derive(Debug, Args)]
pub(super) struct ShapeArgs {
    /// Random weights of this shape, made in memory, in place of MODEL; the context is as long as
    /// the tests need.
    #[arg(long, conflicts_with = "model", value_parser = PossibleValuesParser::new(
        SyntheticShape::ALL.map(SyntheticShape::name)).try_map(|name| name.parse::<SyntheticShape>()))]
    shape: Option<SyntheticShape>,
    /// Element type of the shape's stored weights [default: f16].
    #[arg(long, requires = "shape", value_parser = dtype)]
    dtype: Option<DType>,
}

fn dtype(name: &str) -> Result<DType, &'static str> {
    let mut all = [DType::F32, DType::F16, DType::Bf16].into_iter();
    all.find(|dtype| dtype.name() == name).ok_or("expected f32, f16 or bf16")
}

/// A model that is not in memory yet.
pub(super) enum Source {
    Stored(Box<Checkpoint>),
    Synthetic(SyntheticModel, &'static str),
}

impl Source {
    pub(super) fn open(args: &ShapeArgs, config: &TinyServeConfig) -> Result<Self> {
        if let Some(shape) = args.shape {
            let model = SyntheticModel::new(shape, args.dtype.unwrap_or(DType::F16));
            return Ok(Self::Synthetic(model, shape.name()));
        }
        Ok(Self::Stored(Box::new(Checkpoint::load(&config.model)?)))
    }

    pub(super) fn name(&self, config: &TinyServeConfig) -> String {
        match self {
            Self::Stored(_) => config.model.clone(),
            Self::Synthetic(_, name) => (*name).to_owned(),
        }
    }

    pub(super) fn is_synthetic(&self) -> bool {
        matches!(self, Self::Synthetic(..))
    }

    /// Most tokens of a sequence; a shape has no limit of its own.
    pub(super) fn limit(&self, config: &TinyServeConfig) -> Result<usize> {
        Ok(match (self, config.max_sequence_length) {
            (Self::Stored(checkpoint), Some(_)) => {
                config.sequence_limit(checkpoint.config().max_positions)?
            }
            (Self::Stored(checkpoint), None) => checkpoint.config().max_positions,
            (Self::Synthetic(..), limit) => limit.unwrap_or(usize::MAX),
        })
    }

    /// The checkpoint, for `sequences` sequences of up to `longest` tokens.
    ///
    /// Refuses what the machine has no memory for, before anything is made.
    pub(super) fn checkpoint(
        self,
        config: &TinyServeConfig,
        (sequences, longest): (usize, usize),
    ) -> Result<Checkpoint> {
        let (shape, dtype, weights) = match &self {
            Self::Stored(checkpoint) => (checkpoint.config().clone(), checkpoint.dtype(), 0),
            Self::Synthetic(model, _) => {
                let (shape, dtype) =
                    (model.clone().at_least_positions(longest).config()?, model.dtype());
                let weights = shape.weight_bytes(dtype, config.load_options(dtype)?.format);
                (shape, dtype, weights)
            }
        };
        let layout = config.kv_layout(&shape, dtype)?;
        let pages = (layout.pages_for(longest) + 1).saturating_mul(sequences);
        let cache = layout.bytes_per_page().saturating_mul(pages);
        let needed = weights.saturating_add(cache as u64);
        if let Some(available) = memory::available().filter(|&available| needed > available) {
            let [needed, available] = [needed, available].map(units::bytes);
            return Err(anyhow!(
                "{sequences} sequences of {longest} tokens need {needed}, expected at most the \
                 {available} that this machine has available: ask for a smaller -d or -b"
            ));
        }
        let mut checkpoint = match self {
            Self::Stored(checkpoint) => *checkpoint,
            Self::Synthetic(model, _) => model.at_least_positions(longest).checkpoint()?,
        };
        if config.rope_frequency_dtype == RopeFrequencyDtype::Weights {
            checkpoint.round_rope_frequencies();
        }
        Ok(checkpoint)
    }
}
