//! A checkpoint: its configuration, its tensors where they are stored, its tokenizer.

use std::path::Path;

use safetensors::Dtype;
use tinyserve_kernels::{DType, HostTensor};
use twox_hash::XxHash3_128;

use crate::files::Files;
use crate::json::Fields;
use crate::mmap::MappedFile;
use crate::tokenizer::token_text;
use crate::weights::{Content, Stored, WeightFiles};
use crate::{Architecture, ChatTemplate, ModelConfig, ModelError, Tokenizer};

/// Bytes of a tensor that its fingerprint reads at each of three places.
const SAMPLE_BYTES: usize = 4 << 10;
const HEAD: &str = "lm_head.weight";

/// A checkpoint in Hugging Face layout, opened but not read.
///
/// Weights stay in their files, which are mapped into memory, in the type they are stored in.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    files: Files,
    config: ModelConfig,
    weights: WeightFiles,
    dtype: DType,
}

/// One stored tensor, as an inventory lists it.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct TensorInfo<'a> {
    /// The name as its file spells it.
    pub name: &'a str,
    /// Element type as safetensors spells it.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: &'a [usize],
    /// Bytes in the file.
    pub bytes: usize,
    /// The file's name.
    pub file: &'a str,
    /// Whether the model learned it: masks and tables that older files carry are no parameters,
    /// nor is a head where the embedding serves as one.
    pub parameter: bool,
}

impl Checkpoint {
    /// Opens `model`: a folder, or the name of a built-in model.
    ///
    /// # Errors
    /// As [`Self::open`]; also when there is no built-in model of that name.
    pub fn load(model: &str) -> Result<Self, ModelError> {
        Self::from_files(Files::locate(model)?)
    }

    /// Opens the folder of a checkpoint.
    ///
    /// # Errors
    /// When the folder, its `config.json` or its weights are missing, cannot be read, are broken
    /// or describe a model that is not supported; the message names the file and the field.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        Self::from_files(Files::folder(folder)?)
    }

    /// Opens the model inside the binary.
    ///
    /// # Errors
    /// None that a test of this crate would not have found.
    pub fn builtin() -> Result<Self, ModelError> {
        Self::from_files(Files::Builtin)
    }

    /// A checkpoint of `tensors` (name, shape, content), all of type `dtype`, without files.
    pub(crate) fn in_memory(
        name: &str,
        config: ModelConfig,
        dtype: DType,
        tensors: impl Iterator<Item = (String, Vec<usize>, Content)>,
    ) -> Self {
        let weights = WeightFiles::in_memory(name, dtype, tensors);
        Self { files: Files::None(name.to_owned()), config, weights, dtype }
    }

    fn from_files(files: Files) -> Result<Self, ModelError> {
        let json = files.read("config.json")?.ok_or_else(|| ModelError::File {
            file: files.path("config.json"),
            found: "no such file".to_owned(),
            expected: "the model's configuration: a checkpoint in Hugging Face layout has one"
                .to_owned(),
        })?;
        let mut config = ModelConfig::from_json(&files.path("config.json"), &json)?;
        if let Some(json) = files.read("generation_config.json")? {
            config.apply_generation_config(&files.path("generation_config.json"), &json)?;
        }
        let weights = WeightFiles::open(&files)?;
        // Replaced by the embedding's own type just below.
        let mut checkpoint = Self { files, config, weights, dtype: DType::F32 };
        let (_, stored) = checkpoint.find(checkpoint.embedding())?;
        checkpoint.dtype = checkpoint.check_dtype(checkpoint.embedding(), stored)?;
        checkpoint.complete_special_tokens()?;
        Ok(checkpoint)
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Rounds the frequencies of the rotary embedding to the element type of the weights.
    ///
    /// Casting a whole transformers model (`model.half()`, `model.to(torch.bfloat16)`) casts its
    /// frequency buffer too, and casting it back leaves the rounded values there. Models are
    /// trained, and `from_pretrained` loads them, with f32 frequencies: rounded ones drift by
    /// whole turns over a few thousand positions. This reproduces results of a model that was cast.
    pub fn round_rope_frequencies(&mut self) {
        let dtype = self.dtype();
        if let Some(rope) = &mut self.config.rope {
            rope.frequency_dtype = dtype;
        }
    }

    /// Element type of the token embedding, which stands for the whole model's.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of the parameters as they are stored.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.tensors().filter(|tensor| tensor.parameter).map(|tensor| tensor.bytes).sum()
    }

    /// Number of parameters; one that serves twice counts once.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let parameters = self.tensors().filter(|tensor| tensor.parameter);
        parameters.map(|tensor| tensor.shape.iter().product::<usize>()).sum()
    }

    /// Every stored tensor, by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.weights.tensors.iter().map(|(name, stored)| TensorInfo {
            name,
            dtype: stored.dtype,
            shape: &stored.shape,
            bytes: stored.range.len(),
            file: &self.weights.files[stored.file].name,
            parameter: self.is_parameter(name),
        })
    }

    /// Every weight file: its name and its bytes.
    pub fn weight_files(&self) -> impl ExactSizeIterator<Item = (&str, usize)> {
        self.weights.files.iter().map(|file| (file.name.as_str(), file.len()))
    }

    pub(crate) fn files(&self) -> &Files {
        &self.files
    }

    pub(crate) fn weights(&self) -> &WeightFiles {
        &self.weights
    }

    /// A hash of what the model computes with: its configuration, and of each tensor the name, type,
    /// shape and a sample of its bytes.
    ///
    /// The first, middle and last 4 KiB of each tensor are read, not gigabytes: two checkpoints
    /// differ somewhere in them unless somebody made an exception of these bytes.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hasher = XxHash3_128::new();
        hasher.write(format!("{:?}", self.config).as_bytes());
        for (name, stored) in &self.weights.tensors {
            if !self.is_parameter(name) {
                continue;
            }
            hasher.write(format!("{name} {:?} {:?}", stored.dtype, stored.shape).as_bytes());
            let bytes = self.weights.bytes(stored);
            let sample = SAMPLE_BYTES.min(bytes.len());
            for start in [0, (bytes.len() - sample) / 2, bytes.len() - sample] {
                hasher.write(&bytes[start..start + sample]);
            }
        }
        format!("{:032x}", hasher.finish_128())
    }

    /// Takes what was read of the weight files out of this process's memory: a backend that keeps
    /// weights in another form has no use for it. Tensors stay valid, and are read again.
    pub(crate) fn release_memory(&self) {
        self.weights.files.iter().filter_map(|file| file.map()).for_each(MappedFile::release);
    }

    /// The tensor `name`, which must have `shape`; its bytes are shared with its file, or made
    /// where the checkpoint has none.
    ///
    /// `name` has no `transformer.` or `model.` in front: some repositories write it, some do not.
    ///
    /// # Errors
    /// When there is no such tensor, it has another shape, or its elements are not f32, f16 or
    /// bf16.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor, ModelError> {
        let (name, stored) = self.find(name)?;
        let dtype = self.check_dtype(name, stored)?;
        if stored.shape != shape {
            return Err(ModelError::Tensor {
                file: self.weights.files[stored.file].path.clone(),
                tensor: name.to_owned(),
                found: format!("shape {:?}", stored.shape),
                expected: format!("{shape:?}, as config.json says"),
            });
        }
        Ok(HostTensor::new(name, self.weights.bytes(stored), dtype, shape)?)
    }

    /// The checkpoint's tokenizer.
    ///
    /// # Errors
    /// [`ModelError::NoTokenizer`] when there is none or it cannot be used.
    pub fn tokenizer(&self) -> Result<Tokenizer, ModelError> {
        Tokenizer::from_files(&self.files)
    }

    /// The checkpoint's chat template; `None` when it has none.
    ///
    /// # Errors
    /// When a file cannot be read or is no template.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ModelError> {
        let eos = self.config.eos.first().copied();
        ChatTemplate::from_files(&self.files, (self.config.bos, eos))
    }

    /// The texts of the checkpoint's special tokens by the names that chat templates use, such as
    /// `bos_token`.
    ///
    /// # Errors
    /// When a file cannot be read or names a token in another way than as a text.
    pub fn special_tokens(&self) -> Result<Vec<(&'static str, String)>, ModelError> {
        let eos = self.config.eos.first().copied();
        crate::chat_template::special_tokens(&self.files, self.config.bos, eos)
    }

    fn embedding(&self) -> &'static str {
        match self.config.architecture {
            Architecture::Gpt2 => "wte.weight",
            Architecture::Llama => "embed_tokens.weight",
        }
    }

    fn prefix(&self) -> &'static str {
        match self.config.architecture {
            Architecture::Gpt2 => "transformer.",
            Architecture::Llama => "model.",
        }
    }

    /// The stored name and the place of the tensor `name`.
    fn find(&self, name: &str) -> Result<(&str, &Stored), ModelError> {
        let tensors = &self.weights.tensors;
        let prefixed = format!("{}{name}", self.prefix());
        let found = tensors.get_key_value(name).or_else(|| tensors.get_key_value(&prefixed));
        if let Some((name, stored)) = found {
            return Ok((name, stored));
        }
        let expected = if name == HEAD {
            "and config.json does not say that the embedding is tied (tie_word_embeddings true)"
                .to_owned()
        } else {
            format!("or {prefixed}, which the model that config.json describes needs")
        };
        let file = match self.weights.files.as_slice() {
            [file] => file.path.clone(),
            _ => self.files.path("model.safetensors.index.json"),
        };
        Err(ModelError::MissingTensor { file, tensor: name.to_owned(), expected })
    }

    fn check_dtype(&self, name: &str, stored: &Stored) -> Result<DType, ModelError> {
        stored.weight_dtype().ok_or_else(|| ModelError::Tensor {
            file: self.weights.files[stored.file].path.clone(),
            tensor: name.to_owned(),
            found: format!("element type {}", stored.dtype),
            expected: "F32, F16 or BF16".to_owned(),
        })
    }

    fn is_parameter(&self, name: &str) -> bool {
        // Causal masks of GPT-2 repositories and rotary tables of old LLaMA ones.
        let buffer = name.ends_with(".attn.bias")
            || name.ends_with(".attn.masked_bias")
            || name.ends_with(".rotary_emb.inv_freq");
        let second_head = name == HEAD && self.config.tie_word_embeddings;
        !buffer && !second_head
    }

    /// Looks the texts in `tokenizer_config.json` up where no file gave an id.
    fn complete_special_tokens(&mut self) -> Result<(), ModelError> {
        if self.config.bos.is_some() && !self.config.eos.is_empty() {
            return Ok(());
        }
        let name = "tokenizer_config.json";
        let Some(json) = self.files.read(name)? else { return Ok(()) };
        let fields = Fields::parse(&self.files.path(name), &json)?;
        let (bos, eos) = (token_text(&fields, "bos_token")?, token_text(&fields, "eos_token")?);
        if bos.is_none() && eos.is_none() {
            return Ok(());
        }
        // Without a usable tokenizer a checkpoint still serves token ids; whoever needs text
        // hears of it from `tokenizer`.
        let Ok(tokenizer) = self.tokenizer() else { return Ok(()) };
        let id = |text: Option<String>| text.and_then(|text| tokenizer.token_to_id(&text));
        self.config.bos = self.config.bos.or(id(bos));
        if self.config.eos.is_empty() {
            self.config.eos.extend(id(eos));
        }
        Ok(())
    }
}
