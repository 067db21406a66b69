//! Errors of kernels and backends.

use thiserror::Error;

/// What a kernel or a backend refuses, with what was found and what was expected.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A tensor does not have the shape that the operation needs.
    #[error("{what}: shape {found:?}, expected {expected}")]
    Shape {
        /// The tensor or the operation, as its caller names it.
        what: String,
        /// The shape that was found.
        found: Vec<usize>,
        /// The shape that was expected, in words.
        expected: String,
    },
    /// A value or a setting is out of its range.
    #[error("{what} is {found}, expected {expected}")]
    Invalid {
        /// The value's name.
        what: &'static str,
        /// The value that was found.
        found: String,
        /// The values that are allowed, in words.
        expected: String,
    },
    /// A page selector returned a list that attention cannot read.
    #[error("page selector: {0}")]
    Selector(String),
    /// A CUDA device cannot be used, or failed.
    #[error(transparent)]
    Cuda(#[from] crate::CudaError),
    /// The KV cache refused an operation.
    #[error(transparent)]
    Kv(#[from] tinyserve_kv::KvError),
}
