//! How the command ends: exit codes, and errors as one line.

use std::fmt;
use std::process::ExitCode;

use anyhow::Error;
use tinyserve::TinyServeError;
use tinyserve::kernels::KernelError;
use tinyserve::kv::KvError;
use tinyserve::model::ModelError;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const INTERRUPTED: u8 = 130;

/// The user asked for something that cannot be: exit code 2.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The command ends here although nothing went wrong that a sentence would explain.
#[derive(Debug)]
pub(crate) enum Quiet {
    /// Whoever reads stdout has enough.
    ClosedPipe,
    /// Ctrl-C; what there was is printed.
    Interrupted,
    /// A check failed, and its report says so.
    CheckFailed,
}

impl fmt::Display for Quiet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for Quiet {}

/// A value that is out of its flag's range.
pub(crate) fn out_of_range(flag: &str, found: impl fmt::Display, expected: &str) -> Error {
    Usage(format!("{flag} is {found}, expected {expected}")).into()
}

/// Prints the error, if any, and tells the exit code.
pub(crate) fn code(result: Result<(), Error>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    match error.downcast_ref() {
        Some(Quiet::ClosedPipe) => return ExitCode::SUCCESS,
        Some(Quiet::Interrupted) => return INTERRUPTED.into(),
        Some(Quiet::CheckFailed) => return FAILED.into(),
        None => {}
    }
    let (sentence, code) = match setting(&error) {
        Some(sentence) => (sentence, USAGE),
        None if error.is::<Usage>() => (one_line(&error), USAGE),
        None => (one_line(&error), FAILED),
    };
    eprintln!("error: {sentence}");
    code.into()
}

/// The sentence of an error that is about a flag's value, with the flag's name.
fn setting(error: &Error) -> Option<String> {
    let error = error.chain().find_map(|cause| cause.downcast_ref::<TinyServeError>())?;
    let (name, found, expected) = match error {
        TinyServeError::Setting { field, found, expected } => (field, found, expected),
        TinyServeError::Model(ModelError::Setting { name, found, expected })
        | TinyServeError::Kv(KvError::Invalid { what: name, found, expected })
        | TinyServeError::Model(ModelError::Kv(KvError::Invalid { what: name, found, expected }))
        | TinyServeError::Kernel(KernelError::Invalid { what: name, found, expected }) => {
            (name, found, expected)
        }
        _ => return None,
    };
    Some(format!("{} is {found}, expected {expected}", flag(name)?))
}

/// The flag that sets `name`, if one does.
fn flag(name: &str) -> Option<String> {
    let flags = [
        "adaptive",
        "adaptive_max_budget",
        "adaptive_min_budget",
        "approximate_attention",
        "attention_chunk_size",
        "dense_layers",
        "device",
        "entropy_patience",
        "entropy_threshold",
        "frequency_penalty",
        "fused_table",
        "gpu_ids",
        "kv_cache_dtype",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_sequence_length",
        "memory_utilization",
        "weights_cache",
        "max_tokens",
        "min_p",
        "num_gpus",
        "open_page_dtype",
        "page_size",
        "presence_penalty",
        "pruning_ratio",
        "repetition_penalty",
        "scorer",
        "replicas",
        "selection_ratio",
        "tensor_parallel_size",
        "stride",
        "target_latency_ms",
        "temperature",
        "tensor_parallel_size",
        "threads",
        "token_budget",
        "top_p",
        "top_p_pages",
        "use_fused_kernel",
    ];
    match name {
        "cpu path" => Some("--cpu".to_owned()),
        _ => flags.contains(&name).then(|| format!("--{}", name.replace('_', "-"))),
    }
}

/// The error and its causes, each once, in one line.
fn one_line(error: &Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if line.ends_with(&cause) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&cause);
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_named_by_their_flags() {
        let error = TinyServeError::Setting {
            field: "page_size",
            found: "0".to_owned(),
            expected: "at least 1".to_owned(),
        };
        let sentence = setting(&Error::from(error)).unwrap();
        assert_eq!(sentence, "--page-size is 0, expected at least 1");
        let of_the_model = TinyServeError::Setting {
            field: "kv_heads",
            found: "0".to_owned(),
            expected: "at least 1".to_owned(),
        };
        assert_eq!(setting(&Error::from(of_the_model)), None);
    }

    #[test]
    fn causes_are_told_once_and_in_one_line() {
        let error = anyhow::anyhow!("no\nsuch file").context("a.toml").context("a: a.toml");
        assert_eq!(one_line(&error), "a: a.toml: no such file");
    }
}
