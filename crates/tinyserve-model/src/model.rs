//! A model's weights on a backend.

use std::cell::Cell;

use tinyserve_kernels::{
    Activation, Backend, Heads, HostTensor, LinearPart, LinearSpec, MatrixLayout, NormKind,
    WeightFormat,
};
use tinyserve_kv::{KvFormat, KvLayout, KvShape};

use crate::{Architecture, Checkpoint, ModelConfig, ModelError};

/// A norm's scale and shift.
#[derive(Debug)]
pub(crate) struct Norm<B: Backend> {
    pub(crate) weight: B::Vector,
    pub(crate) bias: Option<B::Vector>,
}

/// One transformer layer.
#[derive(Debug)]
pub(crate) struct Block<B: Backend> {
    pub(crate) attention_norm: Norm<B>,
    /// Query, key and value projections, side by side.
    pub(crate) qkv: B::Linear,
    pub(crate) attention_out: B::Linear,
    pub(crate) mlp_norm: Norm<B>,
    /// The first feed-forward projection; gate and up side by side when gated.
    pub(crate) mlp_in: B::Linear,
    pub(crate) mlp_out: B::Linear,
}

/// What differs between the architectures, as data that one forward pass reads.
#[derive(Debug, Clone)]
pub(crate) struct Structure {
    pub(crate) heads: Heads,
    pub(crate) norm: NormKind,
    pub(crate) norm_epsilon: f32,
    pub(crate) activation: Activation,
    pub(crate) gated: bool,
    pub(crate) attention_scale: f32,
    /// Empty when positions are learned.
    pub(crate) inverse_frequencies: Vec<f32>,
}

/// A loaded model: its weights, where its backend wants them.
#[derive(Debug)]
pub struct Model<B: Backend> {
    pub(crate) backend: B,
    pub(crate) config: ModelConfig,
    pub(crate) structure: Structure,
    pub(crate) token_embedding: B::Linear,
    pub(crate) position_embedding: Option<B::Linear>,
    pub(crate) blocks: Vec<Block<B>>,
    pub(crate) final_norm: Norm<B>,
    /// `None` when the token embedding serves as the output head.
    pub(crate) head: Option<B::Linear>,
    weight_bytes: usize,
}

impl<B: Backend> Model<B> {
    /// Loads a checkpoint's weights in their stored type; `progress` is told layers done and
    /// layers in all.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape or an element type that is not supported, or
    /// the backend has no memory for it.
    pub fn load(
        backend: B,
        checkpoint: &Checkpoint,
        progress: impl FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        Self::load_as(backend, checkpoint, WeightFormat::Stored, progress)
    }

    /// Loads a checkpoint's weights and quantises the matrices to `format`.
    ///
    /// The token embedding and the output head have eight bits at least: they are few of the
    /// weights and the most sensitive ones. Norms, biases and learned positions stay as they are.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_as(
        backend: B,
        checkpoint: &Checkpoint,
        format: WeightFormat,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let weights =
            Weights { checkpoint, backend: &backend, config: &config, format, bytes: Cell::new(0) };
        let outer = match format {
            WeightFormat::Int4 => WeightFormat::Int8,
            format => format,
        };
        // Quantised weights are copies, and so are matrices that a backend turns.
        let copies = format != WeightFormat::Stored || config.architecture == Architecture::Gpt2;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let names = Names::of(config.architecture);
        let token_embedding = weights.table(outer, names.token_embedding, vocab)?;
        let position_embedding = names
            .position_embedding
            .map(|name| weights.table(WeightFormat::Stored, name, config.max_positions))
            .transpose()?;
        let mut blocks = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            progress(layer, config.layers);
            blocks.push(match config.architecture {
                Architecture::Gpt2 => weights.gpt2_block(layer)?,
                Architecture::Llama => weights.llama_block(layer)?,
            });
            if copies {
                checkpoint.release_memory();
            }
        }
        let final_norm = weights.norm(names.final_norm)?;
        let head = (!config.tie_word_embeddings)
            .then(|| {
                let how = (MatrixLayout::OutIn, outer);
                weights.linear(how, hidden, &[("lm_head", vocab, false)])
            })
            .transpose()?;
        progress(config.layers, config.layers);
        let structure = Structure::of(&config);
        let weight_bytes = weights.bytes.get();
        Ok(Self {
            backend,
            config,
            structure,
            token_embedding,
            position_embedding,
            blocks,
            final_norm,
            head,
            weight_bytes,
        })
    }

    /// Bytes of the matrices and vectors as the backend keeps them.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Bytes of weights that every step reads: all but the tables of which it looks up rows.
    #[must_use]
    pub fn streamed_bytes(&self) -> usize {
        let tokens = self.head.is_some().then_some(&self.token_embedding);
        let tables = tokens.into_iter().chain(&self.position_embedding);
        self.weight_bytes - tables.map(|table| self.backend.linear_bytes(table)).sum::<usize>()
    }

    /// The device that the weights are on.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
}

impl ModelConfig {
    /// The layout of this model's KV pages.
    ///
    /// # Errors
    /// When the page size is 0 or too large.
    pub fn kv_layout(&self, page_size: usize, format: KvFormat) -> Result<KvLayout, ModelError> {
        Ok(KvLayout::new(KvShape {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            page_size,
            format,
        })?)
    }
}

impl Structure {
    fn of(config: &ModelConfig) -> Self {
        let (norm, gated) = match config.architecture {
            Architecture::Gpt2 => (NormKind::Layer, false),
            Architecture::Llama => (NormKind::Rms, true),
        };
        Self {
            heads: Heads {
                q_heads: config.q_heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
            },
            norm,
            norm_epsilon: config.norm_epsilon,
            activation: config.activation,
            gated,
            attention_scale: (config.head_dim as f32).sqrt().recip(),
            inverse_frequencies: config
                .rope
                .as_ref()
                .map(|rope| rope.inverse_frequencies(config.head_dim))
                .unwrap_or_default(),
        }
    }
}

/// Names of the tensors outside the layers, without a repository's prefix.
struct Names {
    token_embedding: &'static str,
    position_embedding: Option<&'static str>,
    final_norm: &'static str,
}

impl Names {
    fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Gpt2 => {
                Self { token_embedding: "wte", position_embedding: Some("wpe"), final_norm: "ln_f" }
            }
            Architecture::Llama => Self {
                token_embedding: "embed_tokens",
                position_embedding: None,
                final_norm: "norm",
            },
        }
    }
}

/// Reads tensors by name and hands them to the backend.
struct Weights<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    backend: &'a B,
    config: &'a ModelConfig,
    /// Of the matrices inside the layers.
    format: WeightFormat,
    /// Bytes loaded so far.
    bytes: Cell<usize>,
}

impl<B: Backend> Weights<'_, B> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        self.checkpoint.tensor(name, shape)
    }

    /// An embedding table `[rows, hidden]`.
    fn table(
        &self,
        format: WeightFormat,
        name: &str,
        rows: usize,
    ) -> Result<B::Linear, ModelError> {
        let how = (MatrixLayout::OutIn, format);
        self.linear(how, self.config.hidden_size, &[(name, rows, false)])
    }

    fn norm(&self, name: &str) -> Result<Norm<B>, ModelError> {
        let vector = |suffix: &str| {
            let tensor = self.tensor(&format!("{name}.{suffix}"), &[self.config.hidden_size])?;
            self.bytes.update(|bytes| bytes + 4 * tensor.len());
            Ok::<_, ModelError>(self.backend.load_vector(&tensor)?)
        };
        let bias = match self.config.architecture {
            Architecture::Gpt2 => Some(vector("bias")?),
            Architecture::Llama => None,
        };
        Ok(Norm { weight: vector("weight")?, bias })
    }

    /// Parts `(name, outputs, has a bias)` over one input of width `inputs`.
    fn linear(
        &self,
        (layout, format): (MatrixLayout, WeightFormat),
        inputs: usize,
        parts: &[(&str, usize, bool)],
    ) -> Result<B::Linear, ModelError> {
        let parts = parts
            .iter()
            .map(|&(name, outputs, has_bias)| {
                let shape = match layout {
                    MatrixLayout::OutIn => [outputs, inputs],
                    MatrixLayout::InOut => [inputs, outputs],
                };
                Ok(LinearPart {
                    weight: self.tensor(&format!("{name}.weight"), &shape)?,
                    bias: has_bias
                        .then(|| self.tensor(&format!("{name}.bias"), &[outputs]))
                        .transpose()?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        let linear = self.backend.load_linear(LinearSpec { parts, layout, format })?;
        self.bytes.update(|bytes| bytes + self.backend.linear_bytes(&linear));
        Ok(linear)
    }

    fn gpt2_block(&self, layer: usize) -> Result<Block<B>, ModelError> {
        let (hidden, wide) = (self.config.hidden_size, self.config.intermediate_size);
        let linear = |name: &str, inputs, outputs| {
            let name = format!("h.{layer}.{name}");
            let how = (MatrixLayout::InOut, self.format);
            self.linear(how, inputs, &[(&name, outputs, true)])
        };
        Ok(Block {
            attention_norm: self.norm(&format!("h.{layer}.ln_1"))?,
            qkv: linear("attn.c_attn", hidden, 3 * hidden)?,
            attention_out: linear("attn.c_proj", hidden, hidden)?,
            mlp_norm: self.norm(&format!("h.{layer}.ln_2"))?,
            mlp_in: linear("mlp.c_fc", hidden, wide)?,
            mlp_out: linear("mlp.c_proj", wide, hidden)?,
        })
    }

    fn llama_block(&self, layer: usize) -> Result<Block<B>, ModelError> {
        let config = self.config;
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
        let linear = |inputs, parts: &[(&str, usize)], has_bias| {
            let names: Vec<_> =
                parts.iter().map(|(name, _)| format!("layers.{layer}.{name}")).collect();
            let parts: Vec<_> = names
                .iter()
                .zip(parts)
                .map(|(name, &(_, outputs))| (name.as_str(), outputs, has_bias))
                .collect();
            self.linear((MatrixLayout::OutIn, self.format), inputs, &parts)
        };
        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        let gate_up = [("mlp.gate_proj", wide), ("mlp.up_proj", wide)];
        Ok(Block {
            attention_norm: self.norm(&format!("layers.{layer}.input_layernorm"))?,
            qkv: linear(hidden, &qkv, config.attention_bias)?,
            attention_out: linear(q, &[("self_attn.o_proj", hidden)], config.attention_bias)?,
            mlp_norm: self.norm(&format!("layers.{layer}.post_attention_layernorm"))?,
            mlp_in: linear(hidden, &gate_up, config.mlp_bias)?,
            mlp_out: linear(wide, &[("mlp.down_proj", hidden)], config.mlp_bias)?,
        })
    }
}
