//! From a checkpoint's tensors to a model's weights on a backend.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;

use tinyserve_kernels::{
    Backend, HostTensor, LinearImage, LinearPart, LinearSpec, MatrixLayout, WeightFormat,
};

use crate::model::{Block, Norm, Structure};
use crate::weights_cache::WeightsCache;
use crate::{Architecture, Checkpoint, Model, ModelConfig, ModelError};

/// How a model's weights are kept.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// What the matrices are quantised to, if at all.
    ///
    /// The token embedding and the output head have eight bits at least: they are few of the
    /// weights and the most sensitive ones. So have matrices of fewer than 128 inputs: where they
    /// are that narrow, a whole model lies in the processor's caches, fewer bits make no step
    /// faster, and few weights share a rounding error. Norms, biases and learned positions stay as
    /// they are.
    pub format: WeightFormat,
    /// Folder in which quantised weights are kept from one start to the next.
    pub cache: Option<PathBuf>,
}

impl From<WeightFormat> for LoadOptions {
    fn from(format: WeightFormat) -> Self {
        Self { format, cache: None }
    }
}

/// Inputs from which on a matrix inside the layers is not narrow.
const WIDE_INPUTS: usize = 128;

/// What a matrix of `inputs` inside the layers is quantised to, where the model is to `format`.
pub(crate) fn matrix_format(format: WeightFormat, inputs: usize) -> WeightFormat {
    match format {
        WeightFormat::Int4 if inputs < WIDE_INPUTS => WeightFormat::Int8,
        format => format,
    }
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
    /// # Errors
    /// As [`Self::load`].
    pub fn load_as(
        backend: B,
        checkpoint: &Checkpoint,
        format: WeightFormat,
        progress: impl FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        Self::load_with(backend, checkpoint, &format.into(), progress)
    }

    /// Loads a checkpoint's weights and quantises them, or takes them from a cache.
    ///
    /// A cache that is not this checkpoint's is not used but replaced; [`Self::weights_cache`]
    /// tells why, as it does when the cache cannot be written, which is no error.
    ///
    /// # Errors
    /// As [`Self::load`]; also when a cache is asked for and `format` is none that is cached, or
    /// the backend makes no images of its weights.
    pub fn load_with(
        backend: B,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let format = options.format;
        let cache = options
            .cache
            .as_ref()
            .map(|folder| WeightsCache::open(folder, checkpoint, format, backend.image_layout()));
        let weights = Weights {
            checkpoint,
            copies: format != WeightFormat::Stored || config.architecture == Architecture::Gpt2,
            backend: &backend,
            config: &config,
            format,
            bytes: Cell::new(0),
            cache: cache.transpose()?,
            images: RefCell::default(),
        };
        let outer = match format {
            WeightFormat::Int4 => WeightFormat::Int8,
            format => format,
        };
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let names = Names::of(config.architecture);
        let token_embedding = weights.table(outer, names.token_embedding, vocab)?;
        let position_embedding = names
            .position_embedding
            .map(|name| weights.table(WeightFormat::Stored, name, config.max_positions))
            .transpose()?;
        let head = (!config.tie_word_embeddings)
            .then(|| {
                let how = (MatrixLayout::OutIn, outer);
                weights.linear(how, hidden, &[("lm_head", vocab, false)])
            })
            .transpose()?;
        let mut blocks = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            progress(layer, config.layers);
            blocks.push(match config.architecture {
                Architecture::Gpt2 => weights.gpt2_block(layer)?,
                Architecture::Llama => weights.llama_block(layer)?,
            });
        }
        let final_norm = weights.norm(names.final_norm)?;
        progress(config.layers, config.layers);
        let structure = Structure::of(&config);
        let weight_bytes = weights.bytes.get();
        let (cache, images) = (weights.cache, weights.images.into_inner());
        let weights_cache = cache.map(|cache| cache.close(images));
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
            weights_cache,
        })
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
    /// Whether the backend keeps copies: quantised weights, and matrices that it turns.
    copies: bool,
    backend: &'a B,
    config: &'a ModelConfig,
    /// Of the matrices inside the layers that are not narrow.
    format: WeightFormat,
    /// Bytes loaded so far.
    bytes: Cell<usize>,
    cache: Option<WeightsCache>,
    /// What was quantised for want of a cached image, by the names of its tensors.
    images: RefCell<Vec<(String, LinearImage)>>,
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
        let linear = match self.cache.as_ref().filter(|_| format != WeightFormat::Stored) {
            None => self.load_linear((layout, format), inputs, parts)?,
            Some(cache) => {
                let names: Vec<_> = parts.iter().map(|(name, ..)| *name).collect();
                let name = names.join(" ");
                let outputs = parts.iter().map(|(_, outputs, _)| outputs).sum();
                if let Some(image) = cache.image(&name, (format, inputs, outputs)) {
                    self.backend.load_linear_image(image)?
                } else {
                    let linear = self.load_linear((layout, format), inputs, parts)?;
                    let image = self.backend.linear_image(&linear);
                    self.images.borrow_mut().extend(image.map(|image| (name, image)));
                    linear
                }
            }
        };
        self.bytes.update(|bytes| bytes + self.backend.linear_bytes(&linear));
        if self.copies {
            self.checkpoint.release_memory();
        }
        Ok(linear)
    }

    fn load_linear(
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
        Ok(self.backend.load_linear(LinearSpec { parts, layout, format })?)
    }

    fn gpt2_block(&self, layer: usize) -> Result<Block<B>, ModelError> {
        let (hidden, wide) = (self.config.hidden_size, self.config.intermediate_size);
        let linear = |name: &str, inputs, outputs| {
            let name = format!("h.{layer}.{name}");
            let how = (MatrixLayout::InOut, matrix_format(self.format, inputs));
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
            let how = (MatrixLayout::OutIn, matrix_format(self.format, inputs));
            self.linear(how, inputs, &parts)
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
