//! Errors of the facade.

use std::path::PathBuf;

use thiserror::Error;
use tinyserve_kernels::KernelError;
use tinyserve_kv::KvError;
use tinyserve_model::ModelError;
use tinyserve_plugins::PluginError;
use tinyserve_sched::{AdmissionError, Failure};

/// Why TinyServe refused or failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TinyServeError {
    /// A setting is out of its range.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// The field, as the configuration spells it.
        field: &'static str,
        /// The value that was found.
        found: String,
        /// The values that are allowed, in words.
        expected: String,
    },
    /// A configuration file could not be read or written.
    #[error("{}: {source}", path.display())]
    ConfigIo {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A configuration file does not say what a configuration says.
    #[error("{}: {message}", path.display())]
    ConfigFormat {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        message: String,
    },
    /// The model or its checkpoint.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The backend.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The cache.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// A plugin could not be registered or switched.
    #[error(transparent)]
    Plugin(PluginError),
    /// The scheduler does not take the request.
    #[error(transparent)]
    Admission(AdmissionError),
    /// The request failed; no other is affected.
    #[error(transparent)]
    Failed(#[from] Failure),
}

impl From<PluginError> for TinyServeError {
    fn from(error: PluginError) -> Self {
        match error {
            PluginError::Invalid { what, found, expected } => {
                Self::Setting { field: what, found, expected }
            }
            error => Self::Plugin(error),
        }
    }
}

impl From<AdmissionError> for TinyServeError {
    fn from(error: AdmissionError) -> Self {
        match error {
            AdmissionError::Setting { name, found, expected } => {
                Self::Setting { field: name, found, expected }
            }
            error => Self::Admission(error),
        }
    }
}
