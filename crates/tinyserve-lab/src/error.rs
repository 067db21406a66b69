//! What can go wrong in a test.

use tinyserve_kernels::KernelError;
use tinyserve_kv::KvError;
use tinyserve_model::ModelError;

/// Why a test cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A setting that does not fit the model or the material.
    #[error("{what} is {found}, expected {expected}")]
    Setting {
        /// The setting's name.
        what: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        expected: String,
    },
    /// A file that is not what it should be.
    #[error("{file}: found {found}, expected {expected}")]
    File {
        /// The file.
        file: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
    /// A picture that could not be drawn.
    #[error("the picture cannot be drawn: {0}")]
    Plot(String),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The cache failed.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}
