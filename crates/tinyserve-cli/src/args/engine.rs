//! What every command takes that makes an engine.

use anyhow::Result;
use clap::Args;
use tinyserve::{AttentionMode, TinyServeConfig};

use super::{ForwardArgs, MemoryArgs, SELECTION, SelectionArgs, Sources, attention_mode};

/// Model, device, pages and which of them are read.
#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    #[command(flatten)]
    pub(crate) forward: ForwardArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// When decode steps select pages: auto (from --sparse-min-context tokens on), dense (never)
    /// or sparse (always).
    #[arg(long, value_name = "MODE", env = "TINYSERVE_ATTENTION", help_heading = SELECTION,
          value_parser = attention_mode())]
    attention: Option<AttentionMode>,
    #[command(flatten)]
    selection: SelectionArgs,
}

impl EngineArgs {
    /// The settings, checked.
    pub(crate) fn config(&self, sources: Sources) -> Result<TinyServeConfig> {
        self.config_from(self.forward.model.config()?, sources)
    }

    /// As [`Self::config`], over the settings of a file that was read already.
    pub(crate) fn config_from(
        &self,
        mut file: TinyServeConfig,
        sources: Sources,
    ) -> Result<TinyServeConfig> {
        self.memory.apply(&mut file);
        self.forward.selecting_from(file, &self.selection, self.attention, sources)
    }
}
