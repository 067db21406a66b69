//! The one error type of the crate: every message is one sentence that names what, found, expected.

use thiserror::Error;

/// Why a checkpoint, a prompt or a setting is refused.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file or a folder is missing, or has another content than it must have.
    #[error("{file}: found {found}, expected {expected}")]
    File {
        /// The file or the folder.
        file: String,
        /// What was found.
        found: String,
        /// What was expected, in words.
        expected: String,
    },
    /// The operating system refused to read a file.
    #[error("{file} cannot be read: {reason}")]
    Read {
        /// The file.
        file: String,
        /// The operating system's words.
        reason: String,
    },
    /// The operating system refused to write a file.
    #[error("{file} cannot be written: {reason}")]
    Write {
        /// The file.
        file: String,
        /// The operating system's words.
        reason: String,
    },
    /// A field of a JSON file is missing or has a value that is not supported.
    #[error("{file}: {field} is {found}, expected {expected}")]
    Field {
        /// The file.
        file: String,
        /// The field, with a dot between an object and its field.
        field: String,
        /// The value that was found.
        found: String,
        /// The values that are supported, in words.
        expected: String,
    },
    /// A tensor is missing.
    #[error("{file} has no tensor {tensor} {expected}")]
    MissingTensor {
        /// The file or the folder.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// What else was looked for and what the tensor would be, in words.
        expected: String,
    },
    /// A tensor has an element type or a shape that the configuration does not lead to.
    #[error("{file}: tensor {tensor} has {found}, expected {expected}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor's name as the file spells it.
        tensor: String,
        /// Its element type or shape.
        found: String,
        /// The element types or the shape that would do.
        expected: String,
    },
    /// The weights are only there in a format that can run code when it is read.
    #[error(
        "{folder} has its weights only in {found}, expected model.safetensors: convert it once \
         with `python -c \"from transformers import AutoModelForCausalLM as M; \
         M.from_pretrained('{folder}').save_pretrained('{folder}', safe_serialization=True)\"`"
    )]
    OnlyPickle {
        /// The folder.
        folder: String,
        /// The file that was found.
        found: String,
    },
    /// The checkpoint has no tokenizer that can be used.
    #[error("{message}")]
    NoTokenizer {
        /// What was looked for and what was found, one sentence.
        message: String,
    },
    /// A chat template is broken, or refuses a conversation.
    #[error("the chat template {place}: {reason}")]
    ChatTemplate {
        /// Where the template is from.
        place: String,
        /// The reason, in words.
        reason: String,
    },
    /// The tokenizer failed on a text or on tokens.
    #[error("the tokenizer cannot {doing}: {reason}")]
    Tokenize {
        /// What it was asked for.
        doing: &'static str,
        /// The tokenizer's words.
        reason: String,
    },
    /// A setting is out of its range.
    #[error("{name} is {found}, expected {expected}")]
    Setting {
        /// The setting's name, as flags and configuration files spell it.
        name: &'static str,
        /// The value that was found.
        found: String,
        /// The values that are allowed, in words.
        expected: String,
    },
    /// The model computed a value that is not a number or not finite.
    #[error("{what} is not finite: the weights or the input are broken")]
    NotFinite {
        /// The value.
        what: &'static str,
    },
    /// A token is not in the vocabulary.
    #[error("token {token} is outside the vocabulary, expected 0 to {}", .vocab.saturating_sub(1))]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// There is nothing to continue.
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    /// A sequence is longer than the context.
    #[error("the prompt has {tokens} tokens, expected at most {limit}, the context length")]
    ContextOverflow {
        /// Tokens of the sequence.
        tokens: usize,
        /// The longest sequence that is allowed.
        limit: usize,
    },
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] tinyserve_kernels::KernelError),
    /// The KV cache refused an operation.
    #[error(transparent)]
    Kv(#[from] tinyserve_kv::KvError),
}
