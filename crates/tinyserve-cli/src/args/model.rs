//! Which model, and a file with settings.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use tinyserve::TinyServeConfig;

use super::set;

/// Which model, and a file with settings.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A folder in Hugging Face layout, or builtin:stories260k (the default).
    #[arg(value_name = "MODEL", env = "TINYSERVE_MODEL")]
    model: Option<String>,
    /// A .toml or .json file with settings, spelt as the flags are with _ for -.
    #[arg(long, value_name = "FILE", env = "TINYSERVE_CONFIG", help_heading = "Settings")]
    config: Option<PathBuf>,
}

impl ModelArgs {
    /// The file with settings, if one is given.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// The settings of the file, or the defaults, with the model that is asked for.
    pub(crate) fn config(&self) -> Result<TinyServeConfig> {
        let config = match &self.config {
            Some(file) => TinyServeConfig::load(file)?,
            None => TinyServeConfig::default(),
        };
        Ok(self.applied(config))
    }

    /// `config` with the model that is asked for.
    pub(super) fn applied(&self, mut config: TinyServeConfig) -> TinyServeConfig {
        set(&mut config.model, self.model.clone());
        config
    }
}
