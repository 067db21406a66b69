//! A LLaMA whose weights are set, not trained, so that it looks things up.
//!
//! In a text of fillers with planted pairs KEY VALUE it answers a KEY at the end with its VALUE, at
//! any distance up to 64K tokens: quality that dense attention has exactly and a page selection may
//! lose. Random weights cannot show that, and small trained models do not reach that far.
//!
//! How it works. The residual stream has five parts: a code of the token that keys are matched by,
//! the token's identity, a constant channel, the code of the previous token, and the answer's
//! identity. Layer 0 is a previous-token head: constant queries and keys whose rotary phases agree
//! at distance one, `score(Δ) = a² Σ_f cos(θ_f·(Δ − 1))`. Layer 1 is an induction head: it matches
//! the token's code with the previous token's, in rotary channels so slow that 64K positions turn
//! them by less than 0.3 rad (`rope_theta` is 1e12), and copies the identity of what follows. All
//! parts have norm one, so RMSNorm only scales; the feed-forward is zero; the output head is not
//! tied.
//!
//! The induction circuit is Olsson et al.'s ("In-context Learning and Induction Heads", 2022).

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tinyserve_kernels::DType;

use super::SyntheticNormal;
use crate::weights::Content;
use crate::{Checkpoint, ModelConfig, ModelError};

/// Tokens that are asked for.
const KEYS: usize = 64;
/// Tokens that are answers.
const VALUES: usize = 32;
/// Tokens that only fill.
const FILLERS: usize = 160;
/// For each key a token whose code is partly the key's: what a shared prefix does to real keys.
const NEAR_KEYS: usize = KEYS;
const VOCAB: usize = KEYS + VALUES + FILLERS + NEAR_KEYS;
/// Cosine between the codes of a key and its near key.
const NEARNESS: f32 = 0.6;

const HEAD_DIM: usize = 128;
const ROPE_THETA: f64 = 1e12;
/// Positions over which the slow channels turn by less than [`MOST_TURN`].
const FARTHEST: f64 = 65_536.0;
const MOST_TURN: f64 = 0.3;
const MAX_POSITIONS: usize = 131_072;
/// By how many nats a match scores above a mismatch.
const MATCH_NATS: f32 = 45.0;
/// Scale of the previous-token head's queries and keys.
const PREVIOUS: f64 = 22.0;

/// Channels of a code: slow rotary channels, of which there are 70.
const CODE: usize = 70;
/// Channels of an identity: one for each key and value, one for all others.
const IDENTITY: usize = KEYS + VALUES + 1;
// Where the parts of the residual stream begin.
const CODE_AT: usize = 0;
const IDENTITY_AT: usize = CODE_AT + CODE;
const CONSTANT: usize = IDENTITY_AT + IDENTITY;
const PREVIOUS_AT: usize = CONSTANT + 1;
const ANSWER_AT: usize = PREVIOUS_AT + CODE;
const HIDDEN: usize = (ANSWER_AT + IDENTITY).next_multiple_of(32);
const INTERMEDIATE: usize = 16;

/// How the codes lie, which page summaries live or die by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InductionGeometry {
    /// Each key has a channel of its own, as rare tokens have in real models.
    #[default]
    Outlier,
    /// Every token's code is a random direction: a box over 16 of them says little.
    Gaussian,
}

impl InductionGeometry {
    /// Every geometry.
    pub const ALL: [Self; 2] = [Self::Outlier, Self::Gaussian];

    /// The name in flags.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Outlier => "outlier",
            Self::Gaussian => "gaussian",
        }
    }
}

/// A model that copies: see the module's text in the source, and `cargo xtask induction-model`.
#[derive(Debug, Clone, Copy, Default)]
pub struct InductionModel {
    geometry: InductionGeometry,
}

/// Tokens that a look-up text is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LookupTokens {
    /// What is asked for.
    pub keys: Vec<u32>,
    /// Answers.
    pub values: Vec<u32>,
    /// What fills the rest.
    pub fillers: Vec<u32>,
    /// For each key, a token that is easily taken for it; may be empty.
    pub near_keys: Vec<u32>,
}

/// One tensor: its name, shape and values.
type Tensor = (String, Vec<usize>, Vec<f32>);

impl InductionModel {
    /// The model of a geometry; there is no seed, each has one set of weights.
    #[must_use]
    pub fn new(geometry: InductionGeometry) -> Self {
        Self { geometry }
    }

    /// The tokens that its texts are made of.
    #[must_use]
    pub fn tokens(&self) -> LookupTokens {
        let range = |first: usize, n: usize| (first as u32..(first + n) as u32).collect();
        LookupTokens {
            keys: range(0, KEYS),
            values: range(KEYS, VALUES),
            fillers: range(KEYS + VALUES, FILLERS),
            near_keys: range(KEYS + VALUES + FILLERS, NEAR_KEYS),
        }
    }

    /// What `config.json` says of it.
    #[must_use]
    pub fn config_json(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": false,
            "torch_dtype": "float32",
        })
    }

    /// The model in memory, as a checkpoint without files and without a tokenizer.
    ///
    /// # Errors
    /// None that a test of this crate would not have found.
    pub fn checkpoint(&self) -> Result<Checkpoint, ModelError> {
        let config = self.config_json().to_string();
        let config = ModelConfig::from_json("induction", config.as_bytes())?;
        let tensors = self.tensors().into_iter().map(|(name, shape, values)| {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name, shape, Content::Held { bytes: Bytes::from(bytes), map: None })
        });
        Ok(Checkpoint::in_memory("induction", config, DType::F32, tensors))
    }

    /// The checkpoint's files, by name: `config.json`, `model.safetensors`, `tokenizer.json`, and
    /// `lookup.json`, which names the tokens that a look-up text is made of.
    ///
    /// # Errors
    /// None that a test of this crate would not have found.
    pub fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, ModelError> {
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .tensors()
            .into_iter()
            .map(|(name, shape, values)| {
                (name, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
            })
            .collect();
        let broken = |error: safetensors::SafeTensorError| ModelError::File {
            file: "model.safetensors".to_owned(),
            found: error.to_string(),
            expected: "tensors that can be written".to_owned(),
        };
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(broken)?;
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let weights = safetensors::serialize(views, Some(metadata)).map_err(broken)?;
        let LookupTokens { keys, values, fillers, near_keys } = self.tokens();
        let lookup = json!({
            "keys": keys, "values": values, "fillers": fillers, "near_keys": near_keys,
        });
        let text = |json: &Value| format!("{json:#}\n").into_bytes();
        Ok(vec![
            ("config.json", text(&self.config_json())),
            ("model.safetensors", weights),
            ("tokenizer.json", text(&self.tokenizer_json())),
            ("lookup.json", text(&lookup)),
        ])
    }

    /// Writes the checkpoint's files into `folder`, which exists.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), ModelError> {
        for (name, bytes) in self.files()? {
            let path = folder.join(name);
            std::fs::write(&path, bytes).map_err(|error| ModelError::File {
                file: path.display().to_string(),
                found: error.to_string(),
                expected: "a file that can be written".to_owned(),
            })?;
        }
        Ok(())
    }

    /// One word for each token: `k07` is a key, `v03` a value, `f012` a filler, `n07` is near `k07`.
    fn tokenizer_json(&self) -> Value {
        let tokens = self.tokens();
        let kinds = [
            ("k", tokens.keys),
            ("v", tokens.values),
            ("f", tokens.fillers),
            ("n", tokens.near_keys),
        ];
        let mut vocabulary = serde_json::Map::new();
        for (letter, ids) in kinds {
            for (i, id) in ids.into_iter().enumerate() {
                let name =
                    if letter == "f" { format!("f{i:03}") } else { format!("{letter}{i:02}") };
                vocabulary.insert(name, json!(id));
            }
        }
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "f000"},
        })
    }

    /// The code of each token `[VOCAB, CODE]`, each of norm one.
    fn codes(&self) -> Vec<[f32; CODE]> {
        let mut codes = vec![[0.0; CODE]; VOCAB];
        let mut random = SyntheticNormal::new(0, "induction codes");
        for (token, code) in codes.iter_mut().enumerate() {
            match self.geometry {
                InductionGeometry::Gaussian => code.fill_with(|| random.sample()),
                InductionGeometry::Outlier if token < KEYS => code[token] = 1.0,
                InductionGeometry::Outlier => code[OTHERS] = 1.0,
            }
            normalise(code);
        }
        for key in 0..KEYS {
            let of_the_key = codes[key];
            let near = &mut codes[KEYS + VALUES + FILLERS + key];
            if self.geometry == InductionGeometry::Outlier {
                *near = [0.0; CODE];
                near[NEAR] = 1.0;
            } else {
                // What a random direction has of the key's is taken out, for the cosine to be exact.
                let shared: f32 = near.iter().zip(&of_the_key).map(|(a, b)| a * b).sum();
                near.iter_mut().zip(&of_the_key).for_each(|(n, k)| *n -= shared * k);
                normalise(near);
            }
            let rest = (1.0 - NEARNESS * NEARNESS).sqrt();
            near.iter_mut().zip(&of_the_key).for_each(|(n, k)| *n = rest * *n + NEARNESS * k);
        }
        codes
    }

    fn tensors(&self) -> Vec<Tensor> {
        let half = HEAD_DIM / 2;
        // Radians per position of the rotary pair (f, f + half).
        let turn = |f: usize| ROPE_THETA.powf(-(f as f64) / half as f64);
        // What RMSNorm multiplies a channel by: three parts of norm one before layer 0, then four.
        let (norm0, norm1) = ((HIDDEN as f32 / 3.0).sqrt(), (HIDDEN as f32 / 4.0).sqrt());

        let mut embedding = Matrix::zeros(VOCAB, HIDDEN);
        let mut head = Matrix::zeros(VOCAB, HIDDEN);
        for (token, code) in self.codes().iter().enumerate() {
            let identity = token.min(KEYS + VALUES);
            for (channel, &x) in code.iter().enumerate() {
                embedding.set(token, CODE_AT + channel, x);
            }
            embedding.set(token, IDENTITY_AT + identity, 1.0);
            embedding.set(token, CONSTANT, 1.0);
            if identity < KEYS + VALUES {
                head.set(token, ANSWER_AT + identity, 1.0);
            }
        }

        let [mut q0, mut k0, mut v0, mut q1, mut k1, mut v1] =
            [(); 6].map(|()| Matrix::zeros(HEAD_DIM, HIDDEN));
        let [mut o0, mut o1] = [(); 2].map(|()| Matrix::zeros(HIDDEN, HEAD_DIM));
        for f in 0..half {
            let scale = PREVIOUS / f64::from(norm0);
            q0.set(f, CONSTANT, (scale * turn(f).cos()) as f32);
            q0.set(half + f, CONSTANT, (-scale * turn(f).sin()) as f32);
            k0.set(f, CONSTANT, scale as f32);
        }
        for c in 0..CODE {
            v0.set(c, CODE_AT + c, 1.0 / norm0);
            o0.set(PREVIOUS_AT + c, c, 1.0);
        }
        let slow = (0..half).filter(|&f| turn(f) * FARTHEST < MOST_TURN);
        let channels: Vec<usize> = slow.flat_map(|f| [f, half + f]).collect();
        let scale = (MATCH_NATS * (HEAD_DIM as f32).sqrt()).sqrt() / norm1;
        for (c, &channel) in channels.iter().enumerate().take(CODE) {
            // What all fillers share must match nothing.
            if self.geometry == InductionGeometry::Outlier && c == OTHERS {
                continue;
            }
            q1.set(channel, CODE_AT + c, scale);
            k1.set(channel, PREVIOUS_AT + c, scale);
        }
        for c in 0..IDENTITY {
            v1.set(c, IDENTITY_AT + c, 1.0 / norm1);
            o1.set(ANSWER_AT + c, c, 1.0);
        }

        let ones = |name: String| (name, vec![HIDDEN], vec![1.0; HIDDEN]);
        let mut tensors = vec![
            embedding.named("model.embed_tokens.weight".to_owned()),
            head.named("lm_head.weight".to_owned()),
            ones("model.norm.weight".to_owned()),
        ];
        for (layer, parts) in [[q0, k0, v0, o0], [q1, k1, v1, o1]].into_iter().enumerate() {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            for (part, matrix) in ["q_proj", "k_proj", "v_proj", "o_proj"].into_iter().zip(parts) {
                tensors.push(matrix.named(name(&format!("self_attn.{part}"))));
            }
            let (wide, narrow) = ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE));
            for (part, (rows, columns)) in
                [("gate_proj", wide), ("up_proj", wide), ("down_proj", narrow)]
            {
                tensors.push(Matrix::zeros(rows, columns).named(name(&format!("mlp.{part}"))));
            }
            tensors.push(ones(name("input_layernorm")));
            tensors.push(ones(name("post_attention_layernorm")));
        }
        tensors
    }
}

/// The channel that near keys have beside their key's, with [`InductionGeometry::Outlier`].
const NEAR: usize = KEYS;
/// The channel of all tokens that are no keys, with [`InductionGeometry::Outlier`].
const OTHERS: usize = KEYS + 1;

fn normalise(code: &mut [f32]) {
    let norm = code.iter().map(|x| x * x).sum::<f32>().sqrt();
    code.iter_mut().for_each(|x| *x /= norm);
}

/// A matrix `[rows, columns]`.
struct Matrix {
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { columns, values: vec![0.0; rows * columns] }
    }

    fn set(&mut self, row: usize, column: usize, value: f32) {
        self.values[row * self.columns + column] = value;
    }

    fn named(self, name: String) -> Tensor {
        (name, vec![self.values.len() / self.columns, self.columns], self.values)
    }
}
