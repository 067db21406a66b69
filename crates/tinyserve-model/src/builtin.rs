//! The model inside the binary: A. Karpathy's 260K parameters trained on TinyStories.

use bytes::Bytes;

/// Name of the built-in model, where a folder could stand too.
pub const BUILTIN_MODEL: &str = "builtin:stories260k";

/// Aligned to a cache line, as a mapped file is at least: no tensor has to be copied.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static WEIGHTS: &Aligned<[u8]> =
    &Aligned(*include_bytes!("../assets/stories260k/model.safetensors"));

/// The file `name` of the built-in model.
pub(crate) fn file(name: &str) -> Option<Bytes> {
    let bytes: &'static [u8] = match name {
        "chat_template.jinja" => include_bytes!("../assets/stories260k/chat_template.jinja"),
        "config.json" => include_bytes!("../assets/stories260k/config.json"),
        "generation_config.json" => include_bytes!("../assets/stories260k/generation_config.json"),
        "model.safetensors" => &WEIGHTS.0,
        "tokenizer.json" => include_bytes!("../assets/stories260k/tokenizer.json"),
        "tokenizer_config.json" => include_bytes!("../assets/stories260k/tokenizer_config.json"),
        _ => return None,
    };
    Some(Bytes::from_static(bytes))
}
