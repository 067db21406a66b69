//! A model's shape, read from `config.json` and checked once.

use tinyserve_kernels::Activation;

use crate::json::Fields;
use crate::{ModelError, RopeConfig};

// Far above any model there is, and low enough that no product of two of them overflows: a broken
// file is refused by its field's name and not by the allocator.
const MOST_VOCABULARY: usize = 1 << 24;
const MOST_CHANNELS: usize = 1 << 20;
const MOST_INTERMEDIATE: usize = 1 << 22;
const MOST_LAYERS: usize = 1 << 12;
const MOST_HEADS: usize = 1 << 12;
const MOST_HEAD_DIM: usize = 1 << 12;
pub(crate) const MOST_POSITIONS: usize = 1 << 28;

/// The families of models that the forward pass knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Learned positions, layer norm, a plain feed-forward.
    Gpt2,
    /// Rotary positions, RMS norm, a gated feed-forward, grouped heads.
    Llama,
}

impl Architecture {
    /// The name as `model_type` spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::Llama => "llama",
        }
    }

    fn from_fields(config: &Fields) -> Result<Self, ModelError> {
        let expected = "GPT2LMHeadModel, GPT2Model or LlamaForCausalLM (model_type gpt2 or llama)";
        let class = match config.get("architectures") {
            None => None,
            Some(list) => match list.get(0).and_then(|first| first.as_str()) {
                Some(class) => Some(class),
                // An empty list says as little as none.
                None if list.as_array().is_some_and(Vec::is_empty) => None,
                None => return Err(config.error("architectures", expected)),
            },
        };
        let (field, name) = match class {
            Some(class) => ("architectures", Some(class)),
            None => ("model_type", config.text("model_type")?),
        };
        match name {
            Some("GPT2LMHeadModel" | "GPT2Model" | "gpt2") => Ok(Self::Gpt2),
            Some("LlamaForCausalLM" | "llama") => Ok(Self::Llama),
            _ => Err(config.error(field, expected)),
        }
    }
}

/// A model's shape, the same fields for every architecture.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// Channels inside the feed-forward.
    pub intermediate_size: usize,
    /// Longest context.
    pub max_positions: usize,
    /// The norms' ε.
    pub norm_epsilon: f32,
    /// The feed-forward's pointwise function.
    pub activation: Activation,
    /// Whether the token embedding is also the output head.
    pub tie_word_embeddings: bool,
    /// Whether the attention's projections have biases.
    pub attention_bias: bool,
    /// Whether the feed-forward's projections have biases.
    pub mlp_bias: bool,
    /// Rotary positions; `None` when positions are learned.
    pub rope: Option<RopeConfig>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// Parses `json`, the content of `file`.
    ///
    /// # Errors
    /// When a field is missing, out of its range or does not fit another, and when the
    /// architecture, the activation or the rope type is not supported; the field is named.
    pub fn from_json(file: &str, json: &[u8]) -> Result<Self, ModelError> {
        let config = Fields::parse(file, json)?;
        match Architecture::from_fields(&config)? {
            Architecture::Gpt2 => Self::gpt2(&config),
            Architecture::Llama => Self::llama(&config),
        }
    }

    /// Lets `generation_config.json` override the tokens that begin and end a text.
    pub(crate) fn apply_generation_config(
        &mut self,
        file: &str,
        json: &[u8],
    ) -> Result<(), ModelError> {
        let fields = Fields::parse(file, json)?;
        if let Some(bos) = first_token(&fields)? {
            self.bos = Some(bos);
        }
        if let Some(eos) = fields.tokens("eos_token_id")? {
            self.eos = eos;
        }
        Ok(())
    }

    fn gpt2(config: &Fields) -> Result<Self, ModelError> {
        for (name, supported) in [
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
        ] {
            if config.flag(name, supported)? != supported {
                return Err(config.error(name, supported.to_string()));
            }
        }
        let hidden_size = config.size("n_embd", MOST_CHANNELS)?;
        let heads = config.size("n_head", MOST_HEADS)?;
        if !hidden_size.is_multiple_of(heads) {
            let expected = format!("a divisor of n_embd, {hidden_size}");
            return Err(config.error("n_head", expected));
        }
        let inner = config.optional_size("n_inner", MOST_INTERMEDIATE)?;
        // The oldest files write the context under its older name only.
        let older = config.get("n_positions").is_none() && config.get("n_ctx").is_some();
        let positions = if older { "n_ctx" } else { "n_positions" };
        Ok(Self {
            architecture: Architecture::Gpt2,
            vocab_size: config.size("vocab_size", MOST_VOCABULARY)?,
            hidden_size,
            layers: config.size("n_layer", MOST_LAYERS)?,
            q_heads: heads,
            kv_heads: heads,
            head_dim: hidden_size / heads,
            intermediate_size: inner.unwrap_or(4 * hidden_size),
            max_positions: config.size(positions, MOST_POSITIONS)?,
            norm_epsilon: epsilon(config, "layer_norm_epsilon", 1e-5)?,
            activation: activation(config, "activation_function", "gelu_new")?,
            tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
            attention_bias: true,
            mlp_bias: true,
            rope: None,
            bos: first_token(config)?,
            eos: config.tokens("eos_token_id")?.unwrap_or_default(),
        })
    }

    fn llama(config: &Fields) -> Result<Self, ModelError> {
        let hidden_size = config.size("hidden_size", MOST_CHANNELS)?;
        let q_heads = config.size("num_attention_heads", MOST_HEADS)?;
        let kv_heads = config.optional_size("num_key_value_heads", MOST_HEADS)?;
        let kv_heads = kv_heads.unwrap_or(q_heads);
        if !q_heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads, {q_heads}");
            return Err(config.error("num_key_value_heads", expected));
        }
        let head_dim = match config.optional_size("head_dim", MOST_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(q_heads) => hidden_size / q_heads,
            None => {
                let expected =
                    format!("a divisor of hidden_size, {hidden_size}, where head_dim is missing");
                return Err(config.error("num_attention_heads", expected));
            }
        };
        if !head_dim.is_multiple_of(2) {
            let expected = format!(
                "an even number, because rotary positions turn pairs of channels \
                 (hidden_size / num_attention_heads is {head_dim})"
            );
            return Err(config.error("head_dim", expected));
        }
        Ok(Self {
            architecture: Architecture::Llama,
            vocab_size: config.size("vocab_size", MOST_VOCABULARY)?,
            hidden_size,
            layers: config.size("num_hidden_layers", MOST_LAYERS)?,
            q_heads,
            kv_heads,
            head_dim,
            intermediate_size: config.size("intermediate_size", MOST_INTERMEDIATE)?,
            max_positions: config.size("max_position_embeddings", MOST_POSITIONS)?,
            norm_epsilon: epsilon(config, "rms_norm_eps", 1e-6)?,
            activation: activation(config, "hidden_act", "silu")?,
            tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
            attention_bias: config.flag("attention_bias", false)?,
            mlp_bias: config.flag("mlp_bias", false)?,
            rope: Some(RopeConfig::from_fields(config)?),
            bos: first_token(config)?,
            eos: config.tokens("eos_token_id")?.unwrap_or_default(),
        })
    }
}

fn first_token(fields: &Fields) -> Result<Option<u32>, ModelError> {
    Ok(fields.tokens("bos_token_id")?.and_then(|ids| ids.first().copied()))
}

fn epsilon(config: &Fields, name: &str, default: f32) -> Result<f32, ModelError> {
    // The bounds hold after rounding to f32: an ε that rounds to 0 protects no division.
    let expected = "a number above 0 and below 1";
    let epsilon = config.number(name, expected, |x| x as f32 > 0.0 && x < 1.0)?;
    Ok(epsilon.map_or(default, |epsilon| epsilon as f32))
}

fn activation(config: &Fields, name: &str, default: &str) -> Result<Activation, ModelError> {
    match config.text(name)?.unwrap_or(default) {
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::Gelu),
        "relu" => Ok(Activation::Relu),
        "silu" | "swish" => Ok(Activation::Silu),
        _ => Err(config.error(name, "gelu_new, gelu_pytorch_tanh, gelu, relu, silu or swish")),
    }
}
