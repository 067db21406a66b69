//! The shapes on offer: their dimensions, tensors and configuration, as the hub spells them.

use std::str::FromStr;

use serde_json::{Value, json};

use super::values::{Fill, SyntheticTensor};
use crate::ModelError;

/// A model whose shape can be had with random weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SyntheticShape {
    /// `gpt2-124m`, GPT-2 small: 12 layers of 768, 12 heads, context 1024.
    Gpt2Small,
    /// `gpt2-345m`, GPT-2 medium: 24 layers of 1024, 16 heads, context 1024.
    Gpt2Medium,
    /// `llama-15m`, stories15M: 6 layers of 288, 6 heads, tied head, context 16384.
    LlamaStories,
    /// `tinyllama-1.1b`, TinyLlama: 22 layers of 2048, 32 query and 4 KV heads, context 2048.
    TinyLlamaChat,
    /// `tiny-gpt2`, for tests: 2 layers of 64, 4 heads, context 256.
    TinyGpt2,
    /// `tiny-llama`, for tests: 2 layers of 64, 4 query and 2 KV heads, context 256.
    TinyLlama,
}

impl SyntheticShape {
    /// Every shape.
    pub const ALL: [Self; 6] = [
        Self::Gpt2Small,
        Self::Gpt2Medium,
        Self::LlamaStories,
        Self::TinyLlamaChat,
        Self::TinyGpt2,
        Self::TinyLlama,
    ];

    /// The name as flags spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt2Small => "gpt2-124m",
            Self::Gpt2Medium => "gpt2-345m",
            Self::LlamaStories => "llama-15m",
            Self::TinyLlamaChat => "tinyllama-1.1b",
            Self::TinyGpt2 => "tiny-gpt2",
            Self::TinyLlama => "tiny-llama",
        }
    }
}

impl FromStr for SyntheticShape {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        Self::ALL.into_iter().find(|shape| shape.name() == text).ok_or_else(|| {
            let expected = Self::ALL.map(Self::name).join(", ");
            ModelError::Setting { name: "shape", found: text.to_owned(), expected }
        })
    }
}

/// The dimensions of a model, by family.
#[derive(Debug, Clone)]
pub(super) enum Shape {
    Gpt2(Gpt2),
    Llama(Llama),
}

/// GPT-2's dimensions: the MLP is four times as wide as the model, the head is tied.
#[derive(Debug, Clone)]
pub(super) struct Gpt2 {
    n_layers: usize,
    n_embd: usize,
    n_heads: usize,
    n_vocab: usize,
    n_positions: usize,
}

/// LLaMA's dimensions.
#[derive(Debug, Clone)]
pub(super) struct Llama {
    n_layers: usize,
    hidden: usize,
    n_heads: usize,
    n_kv_heads: usize,
    intermediate: usize,
    n_vocab: usize,
    n_positions: usize,
    tied: bool,
}

impl SyntheticShape {
    /// The dimensions, with `max_positions` instead of the shape's own context where given.
    pub(super) fn dimensions(self, max_positions: Option<usize>) -> Shape {
        let or = |own: usize| max_positions.unwrap_or(own);
        match self {
            Self::Gpt2Small => Shape::Gpt2(Gpt2 {
                n_layers: 12,
                n_embd: 768,
                n_heads: 12,
                n_vocab: 50257,
                n_positions: or(1024),
            }),
            Self::Gpt2Medium => Shape::Gpt2(Gpt2 {
                n_layers: 24,
                n_embd: 1024,
                n_heads: 16,
                n_vocab: 50257,
                n_positions: or(1024),
            }),
            Self::LlamaStories => Shape::Llama(Llama {
                n_layers: 6,
                hidden: 288,
                n_heads: 6,
                n_kv_heads: 6,
                intermediate: 768,
                n_vocab: 32000,
                n_positions: or(16384),
                tied: true,
            }),
            Self::TinyLlamaChat => Shape::Llama(Llama {
                n_layers: 22,
                hidden: 2048,
                n_heads: 32,
                n_kv_heads: 4,
                intermediate: 5632,
                n_vocab: 32000,
                n_positions: or(2048),
                tied: false,
            }),
            Self::TinyGpt2 => Shape::Gpt2(Gpt2 {
                n_layers: 2,
                n_embd: 64,
                n_heads: 4,
                n_vocab: 320,
                n_positions: or(256),
            }),
            Self::TinyLlama => Shape::Llama(Llama {
                n_layers: 2,
                hidden: 64,
                n_heads: 4,
                n_kv_heads: 2,
                intermediate: 172,
                n_vocab: 320,
                n_positions: or(256),
                tied: false,
            }),
        }
    }
}

impl Shape {
    /// The longest context.
    pub(super) fn positions(&self) -> usize {
        match self {
            Self::Gpt2(shape) => shape.n_positions,
            Self::Llama(shape) => shape.n_positions,
        }
    }

    /// Every tensor of the checkpoint, with the hub's names and layouts.
    pub(super) fn tensors(&self) -> Vec<SyntheticTensor> {
        match self {
            Self::Gpt2(shape) => shape.tensors(),
            Self::Llama(shape) => shape.tensors(),
        }
    }

    /// config.json.
    pub(super) fn config(&self, torch_dtype: &str) -> Value {
        let (bos, eos) = self.bos_and_eos();
        match self {
            Self::Gpt2(shape) => json!({
                "architectures": ["GPT2LMHeadModel"],
                "model_type": "gpt2",
                "activation_function": "gelu_new",
                "bos_token_id": bos,
                "eos_token_id": eos,
                "initializer_range": 0.02,
                "layer_norm_epsilon": 1e-5,
                "n_ctx": shape.n_positions,
                "n_embd": shape.n_embd,
                "n_head": shape.n_heads,
                "n_inner": null,
                "n_layer": shape.n_layers,
                "n_positions": shape.n_positions,
                "scale_attn_weights": true,
                "tie_word_embeddings": true,
                "torch_dtype": torch_dtype,
                "vocab_size": shape.n_vocab,
            }),
            Self::Llama(shape) => json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "attention_bias": false,
                "bos_token_id": bos,
                "eos_token_id": eos,
                "head_dim": shape.head_dim(),
                "hidden_act": "silu",
                "hidden_size": shape.hidden,
                "initializer_range": 0.02,
                "intermediate_size": shape.intermediate,
                "max_position_embeddings": shape.n_positions,
                "mlp_bias": false,
                "num_attention_heads": shape.n_heads,
                "num_hidden_layers": shape.n_layers,
                "num_key_value_heads": shape.n_kv_heads,
                "rms_norm_eps": 1e-5,
                "rope_scaling": null,
                "rope_theta": 10000.0,
                "tie_word_embeddings": shape.tied,
                "torch_dtype": torch_dtype,
                "vocab_size": shape.n_vocab,
            }),
        }
    }

    /// Tokens that stand for no byte, with their ids.
    pub(super) fn special_tokens(&self) -> &'static [(u32, &'static str)] {
        match self {
            Self::Gpt2(_) => &[(256, "<|endoftext|>")],
            Self::Llama(_) => &[(0, "<unk>"), (1, "<s>"), (2, "</s>")],
        }
    }

    /// The id of byte 0; the other bytes follow.
    pub(super) fn first_byte_token(&self) -> u32 {
        match self {
            Self::Gpt2(_) => 0,
            Self::Llama(_) => 3,
        }
    }

    /// The ids that begin and end a text.
    pub(super) fn bos_and_eos(&self) -> (u32, u32) {
        match self {
            Self::Gpt2(_) => (256, 256),
            Self::Llama(_) => (1, 2),
        }
    }

    /// What the tokenizer adds around a text: LLaMA's begins with `<s>`.
    pub(super) fn post_processor(&self) -> Option<Value> {
        match self {
            Self::Gpt2(_) => None,
            Self::Llama(_) => Some(json!({
                "type": "TemplateProcessing",
                "single": [
                    { "SpecialToken": { "id": "<s>", "type_id": 0 } },
                    { "Sequence": { "id": "A", "type_id": 0 } },
                ],
                "pair": [
                    { "SpecialToken": { "id": "<s>", "type_id": 0 } },
                    { "Sequence": { "id": "A", "type_id": 0 } },
                    { "Sequence": { "id": "B", "type_id": 1 } },
                ],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
            })),
        }
    }
}

impl Gpt2 {
    /// Linear weights are stored as Conv1D stores them: `[in, out]`.
    fn tensors(&self) -> Vec<SyntheticTensor> {
        let n_embd = self.n_embd;
        let mut all = vec![
            SyntheticTensor::new("wte.weight".into(), &[self.n_vocab, n_embd], Fill::Normal),
            SyntheticTensor::new("wpe.weight".into(), &[self.n_positions, n_embd], Fill::Normal),
        ];
        for layer in 0..self.n_layers {
            for norm in ["ln_1", "ln_2"] {
                all.extend(layer_norm(&format!("h.{layer}.{norm}"), n_embd));
            }
            for (linear, n_in, n_out) in [
                ("attn.c_attn", n_embd, 3 * n_embd),
                ("attn.c_proj", n_embd, n_embd),
                ("mlp.c_fc", n_embd, 4 * n_embd),
                ("mlp.c_proj", 4 * n_embd, n_embd),
            ] {
                let name = format!("h.{layer}.{linear}");
                all.push(SyntheticTensor::new(
                    format!("{name}.weight"),
                    &[n_in, n_out],
                    Fill::Normal,
                ));
                all.push(SyntheticTensor::new(format!("{name}.bias"), &[n_out], Fill::Zero));
            }
        }
        all.extend(layer_norm("ln_f", n_embd));
        all
    }
}

fn layer_norm(name: &str, n_embd: usize) -> [SyntheticTensor; 2] {
    [
        SyntheticTensor::new(format!("{name}.weight"), &[n_embd], Fill::One),
        SyntheticTensor::new(format!("{name}.bias"), &[n_embd], Fill::Zero),
    ]
}

impl Llama {
    fn head_dim(&self) -> usize {
        self.hidden / self.n_heads
    }

    /// Linear weights are stored as `[out, in]`.
    fn tensors(&self) -> Vec<SyntheticTensor> {
        let hidden = self.hidden;
        let kv = self.n_kv_heads * self.head_dim();
        let mut all = vec![SyntheticTensor::new(
            "model.embed_tokens.weight".into(),
            &[self.n_vocab, hidden],
            Fill::Normal,
        )];
        for layer in 0..self.n_layers {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                let name = format!("model.layers.{layer}.{norm}.weight");
                all.push(SyntheticTensor::new(name, &[hidden], Fill::One));
            }
            for (linear, n_out, n_in) in [
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", self.intermediate, hidden),
                ("mlp.up_proj", self.intermediate, hidden),
                ("mlp.down_proj", hidden, self.intermediate),
            ] {
                let name = format!("model.layers.{layer}.{linear}.weight");
                all.push(SyntheticTensor::new(name, &[n_out, n_in], Fill::Normal));
            }
        }
        all.push(SyntheticTensor::new("model.norm.weight".into(), &[hidden], Fill::One));
        if !self.tied {
            let shape = [self.n_vocab, hidden];
            all.push(SyntheticTensor::new("lm_head.weight".into(), &shape, Fill::Normal));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published parameter counts of the models whose shapes these are.
    #[test]
    fn shapes_have_their_published_size() {
        for (name, n_parameters) in [
            (SyntheticShape::Gpt2Small, 124_439_808),
            (SyntheticShape::Gpt2Medium, 354_823_168),
            (SyntheticShape::LlamaStories, 15_191_712),
            (SyntheticShape::TinyLlamaChat, 1_100_048_384),
        ] {
            let tensors = name.dimensions(None).tensors();
            let n: usize = tensors.iter().map(SyntheticTensor::elements).sum();
            assert_eq!(n, n_parameters);
        }
    }

    #[test]
    fn a_longer_context_needs_positions_in_gpt2_only() {
        let count = |name: SyntheticShape, positions| -> usize {
            name.dimensions(positions).tensors().iter().map(SyntheticTensor::elements).sum()
        };
        let gpt2 = SyntheticShape::Gpt2Small;
        assert_eq!(count(gpt2, Some(8192)) - count(gpt2, None), (8192 - 1024) * 768);
        let llama = SyntheticShape::LlamaStories;
        assert_eq!(count(llama, Some(256)), count(llama, None));
    }
    #[test]
    fn names_lead_back_to_their_shapes() {
        for shape in SyntheticShape::ALL {
            assert_eq!(shape.name().parse(), Ok(shape));
        }
        let refused = "gpt5".parse::<SyntheticShape>().unwrap_err().to_string();
        assert!(refused.contains("gpt5") && refused.contains("gpt2-124m"), "{refused}");
    }
}
