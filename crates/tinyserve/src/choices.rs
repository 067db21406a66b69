//! Settings that are one of a few names.

use serde::{Deserialize, Serialize};
use tinyserve_kernels::{DType, WeightFormat};
use tinyserve_kv::{EvictionPolicy, GroupReduce, KvError, KvFormat, Scorer};
use tinyserve_model::Checkpoint;
use tinyserve_plugins::EntropySignal;

use crate::TinyServeError;

/// When decode steps select pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionMode {
    /// From `sparse_min_context` tokens on (1024 unless set).
    #[default]
    Auto,
    /// Never: every step reads every page.
    Dense,
    /// At every length, unless `sparse_min_context` is set.
    Sparse,
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The CPU, until CUDA has been measured on GPUs.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by its number: `cuda` is `cuda:0`.
    Cuda(usize),
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            _ => {}
        }
        let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        let expected = "expected auto, cpu, cuda or cuda:N";
        number.map(Self::Cuda).ok_or_else(|| format!("device is {text:?}, {expected}"))
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        match device {
            Device::Auto => "auto".to_owned(),
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda(number) => format!("cuda:{number}"),
        }
    }
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// As the model's weights are.
    #[default]
    Auto,
    /// 32-bit float.
    #[serde(alias = "float32")]
    F32,
    /// 16-bit float.
    #[serde(alias = "float16")]
    F16,
    /// bfloat16.
    #[serde(alias = "bfloat16")]
    Bf16,
    /// Codes of 8 bits in full pages, `open_page_dtype` in the open one.
    Int8,
    /// Codes of 4 bits in full pages, `open_page_dtype` in the open one.
    Int4,
}

impl KvCacheDtype {
    /// The name as flags and configuration files spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// Whether full pages hold codes.
    #[must_use]
    pub fn is_quantised(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }

    /// The format for a model whose weights are `weights`.
    #[must_use]
    pub fn resolve(self, weights: DType) -> KvFormat {
        match (self, weights) {
            (Self::F32, _) | (Self::Auto, DType::F32) => KvFormat::F32,
            (Self::F16, _) | (Self::Auto, DType::F16) => KvFormat::F16,
            (Self::Bf16, _) | (Self::Auto, DType::Bf16) => KvFormat::Bf16,
            (Self::Int8, _) => KvFormat::Int8,
            (Self::Int4, _) => KvFormat::Int4,
        }
    }
}

/// How keys and values are stored until their page is full and becomes codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OpenPageDtype {
    /// 16-bit float.
    #[default]
    #[serde(alias = "float16")]
    F16,
    /// 32-bit float.
    #[serde(alias = "float32")]
    F32,
}

impl OpenPageDtype {
    /// The format.
    #[must_use]
    pub fn format(self) -> KvFormat {
        match self {
            Self::F16 => KvFormat::F16,
            Self::F32 => KvFormat::F32,
        }
    }
}

/// How weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// As they are stored.
    #[default]
    Auto,
    /// 32-bit float, which they must be stored in.
    #[serde(alias = "float32")]
    F32,
    /// 16-bit float, which they must be stored in.
    #[serde(alias = "float16")]
    F16,
    /// bfloat16, which they must be stored in.
    #[serde(alias = "bfloat16")]
    Bf16,
    /// Quantised while they are loaded to 8 bits, with a scale for every 32.
    Int8,
    /// Quantised while they are loaded to 4 bits, with a scale and a minimum for every 32; the
    /// embedding and the output head to 8.
    Int4,
}

impl Weights {
    /// What weights that are stored as `stored` are kept as, by name.
    #[must_use]
    pub fn name(self, stored: DType) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Auto | Self::F32 | Self::F16 | Self::Bf16 => stored.name(),
        }
    }

    /// The format for a model whose weights are stored as `stored`.
    ///
    /// # Errors
    /// When another float type than the stored one is asked for.
    pub fn resolve(self, stored: DType) -> Result<WeightFormat, TinyServeError> {
        let asked = match self {
            Self::Int8 => return Ok(WeightFormat::Int8),
            Self::Int4 => return Ok(WeightFormat::Int4),
            Self::Auto => return Ok(WeightFormat::Stored),
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::Bf16,
        };
        if asked == stored {
            return Ok(WeightFormat::Stored);
        }
        Err(TinyServeError::Setting {
            field: "weights",
            found: asked.to_string(),
            expected: format!("auto, {stored} (as this model's are stored), int8 or int4"),
        })
    }
}

/// What the frequencies of the rotary embedding are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeFrequencyDtype {
    /// f32, as models are trained.
    #[default]
    F32,
    /// The element type of the weights, as casting a whole transformers model leaves them.
    Weights,
}

/// What a page is scored by: the name of a scorer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ScorerName(pub Scorer);

impl TryFrom<String> for ScorerName {
    type Error = KvError;

    fn try_from(name: String) -> Result<Self, KvError> {
        Scorer::named(&name).map(Self)
    }
}

impl From<ScorerName> for String {
    fn from(name: ScorerName) -> Self {
        name.0.name().to_owned()
    }
}

/// `off`, or the name of a scorer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ApproximateAttention(pub Option<Scorer>);

impl TryFrom<String> for ApproximateAttention {
    type Error = KvError;

    fn try_from(name: String) -> Result<Self, KvError> {
        if name == "off" {
            return Ok(Self(None));
        }
        Scorer::named(&name).map(|scorer| Self(Some(scorer))).map_err(|error| match error {
            KvError::Invalid { found, expected, .. } => KvError::Invalid {
                what: "approximate_attention",
                found,
                expected: format!("off, {expected}"),
            },
            error => error,
        })
    }
}

impl From<ApproximateAttention> for String {
    fn from(name: ApproximateAttention) -> Self {
        name.0.map_or("off", |scorer| scorer.name()).to_owned()
    }
}

/// Whose entropy ends a request early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntropySignalName {
    /// That of the attention weights.
    #[default]
    Attention,
    /// That of the next token's distribution.
    NextToken,
}

impl From<EntropySignalName> for EntropySignal {
    fn from(name: EntropySignalName) -> Self {
        match name {
            EntropySignalName::Attention => Self::Attention,
            EntropySignalName::NextToken => Self::NextToken,
        }
    }
}

/// How the scores of the query heads that share a KV head become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupReduceName {
    /// The largest.
    #[default]
    Max,
    /// Each query's scores become shares by a softmax over the pages, which are added up.
    SoftmaxVote,
}

impl From<GroupReduceName> for GroupReduce {
    fn from(name: GroupReduceName) -> Self {
        match name {
            GroupReduceName::Max => Self::Max,
            GroupReduceName::SoftmaxVote => Self::SoftmaxVote,
        }
    }
}

/// Which kept pages are given up first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EvictionName {
    /// Those that were used least recently.
    #[default]
    Lru,
    /// Those that are both old and cheap to compute again.
    Cost,
}

impl EvictionName {
    /// The policy for the model of `checkpoint`.
    #[must_use]
    pub fn resolve(self, checkpoint: &Checkpoint) -> EvictionPolicy {
        match self {
            Self::Lru => EvictionPolicy::Lru,
            Self::Cost => {
                // A token takes two operations for each parameter, and to attend to a token of
                // context takes four for each channel of a query.
                let config = checkpoint.config();
                let of_context = 2 * config.layers * config.q_heads * config.head_dim;
                let dense_tokens = (checkpoint.parameters() / of_context.max(1)) as u64;
                EvictionPolicy::RecomputeCost { dense_tokens }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names_and_numbers() {
        let of = |text: &str| Device::try_from(text.to_owned());
        assert_eq!(of("cuda"), Ok(Device::Cuda(0)));
        for device in [Device::Auto, Device::Cpu, Device::Cuda(3)] {
            assert_eq!(of(&String::from(device)), Ok(device));
        }
        for wrong in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert!(of(wrong).unwrap_err().contains("cuda:N"), "{wrong}");
        }
    }
}
