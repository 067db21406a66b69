//! Values of flags: sizes with suffixes, and names of which some are refused by name.

use serde::de::DeserializeOwned;
use serde_json::Value;
use tinyserve::kernels::CpuPath;
use tinyserve::kv::{KvError, Method, Scorer};
use tinyserve::{
    ApproximateAttention, Device, GroupReduceName, KvCacheDtype, OpenPageDtype, ScorerName, Weights,
};

/// A number of tokens: `512`, `4k` (4096), `1M`.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let expected = "expected a whole number, with k, m or g (1024, 1024², 1024³) if you like";
    let (digits, shift) = match text.char_indices().next_back() {
        Some((end, 'k' | 'K')) => (&text[..end], 10),
        Some((end, 'm' | 'M')) => (&text[..end], 20),
        Some((end, 'g' | 'G')) => (&text[..end], 30),
        _ => (text, 0),
    };
    let number: usize = digits.parse().map_err(|_| expected.to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the number is too large".to_owned())
}

/// `auto`, `cpu`, `cuda` or `cuda:N`.
pub(crate) fn device(text: &str) -> Result<Device, String> {
    name(text, "auto, cpu, cuda or cuda:N")
}

/// `auto`, a float type, `int8` or `int4`.
pub(crate) fn kv_cache_dtype(text: &str) -> Result<KvCacheDtype, String> {
    name(text, "auto, f32, f16, bf16, int8 or int4")
}

/// `f16` or `f32`.
pub(crate) fn open_page_dtype(text: &str) -> Result<OpenPageDtype, String> {
    name(text, "f16 or f32")
}

/// The name of a scorer.
pub(crate) fn scorer(text: &str) -> Result<ScorerName, String> {
    ScorerName::try_from(text.to_owned()).map_err(|error| match error {
        KvError::Invalid { expected, .. } => format!("expected one of {expected}"),
        error => error.to_string(),
    })
}

/// What `--scorer` says about itself: the registry names what there is.
pub(crate) fn scorer_help() -> String {
    let fast = |scorer: Scorer| scorer == Scorer::BOX || scorer.summary().is_some();
    let [fast, slow] = [true, false].map(|is| {
        Method::names(|method| matches!(method, Method::Score(scorer) if fast(scorer) == is))
    });
    format!("What a page is scored by: {fast} have kernels on the CPU; {slow} are slow")
}

/// What `--policies` says about itself.
pub(crate) fn methods_help() -> String {
    format!("Methods to compare: {}", Method::names(|_| true))
}

/// `off`, or the name of a scorer.
pub(crate) fn approximate_attention(text: &str) -> Result<ApproximateAttention, String> {
    ApproximateAttention::try_from(text.to_owned()).map_err(|error| match error {
        KvError::Invalid { expected, .. } => format!("expected one of {expected}"),
        error => error.to_string(),
    })
}

/// The name of a method.
pub(crate) fn method(text: &str) -> Result<Method, String> {
    Method::named(text).map_err(|error| match error {
        KvError::Invalid { expected, .. } => format!("expected some of {expected}"),
        error => error.to_string(),
    })
}

/// `max` or `softmax-vote`.
pub(crate) fn group_reduce(text: &str) -> Result<GroupReduceName, String> {
    name(text, "max or softmax-vote")
}

/// `auto`, a float type by our name or vLLM's, `int8` or `int4`.
pub(crate) fn weights(text: &str) -> Result<Weights, String> {
    let ours = match text {
        "float" | "float32" => "f32",
        "half" | "float16" => "f16",
        "bfloat16" => "bf16",
        text => text,
    };
    name(ours, "auto, f32, f16, bf16, int8 or int4")
}

/// An instruction set of the CPU.
pub(crate) fn cpu_path(text: &str) -> Result<CpuPath, String> {
    text.parse().map_err(|_| format!("expected {}", CpuPath::NAMES))
}

/// A name as configuration files spell it.
pub(crate) fn name<T: DeserializeOwned>(text: &str, expected: &str) -> Result<T, String> {
    serde_json::from_value(Value::from(text)).map_err(|_| format!("expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_suffixes() {
        for (text, expected) in
            [("0", 0), ("512", 512), ("4k", 4096), ("4K", 4096), ("2m", 2 << 20), ("1G", 1 << 30)]
        {
            assert_eq!(size(text), Ok(expected));
        }
        for text in ["", "k", "-1", "1.5k", "4kk", "4 k", "x", "4é", "99999999999g"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_that_come_later_are_refused_by_name() {
        assert_eq!(kv_cache_dtype("bf16"), Ok(KvCacheDtype::Bf16));
        assert_eq!(device("cuda:1"), Ok(Device::Cuda(1)));
        assert!(device("tpu").unwrap_err().contains("auto, cpu, cuda"));
        assert_eq!(kv_cache_dtype("int8"), Ok(KvCacheDtype::Int8));
        assert!(kv_cache_dtype("fp8").unwrap_err().contains("int8 or int4"));
        assert_eq!(scorer("mean-std").map(String::from), Ok("mean-std".to_owned()));
        assert!(scorer("bocks").unwrap_err().contains("cuboid-mean"));
        assert!(scorer("h2o").is_err());
        assert_eq!(weights("int8"), Ok(Weights::Int8));
        assert_eq!(weights("bfloat16"), Ok(Weights::Bf16));
        assert!(weights("int3").unwrap_err().contains("int8 or int4"));
        assert!(cpu_path("sse").is_err());
    }
}
