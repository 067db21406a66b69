//! What every command takes that computes something.

use anyhow::Result;
use clap::Args;
use tinyserve::kernels::{Cpu, Cuda};
use tinyserve::{AttentionMode, Device, RopeFrequencyDtype, TinyServeConfig};

use super::{DeviceArgs, LayoutArgs, ModelArgs, SelectionArgs, Sources, set};
use crate::values;

/// Said once of a selection that no kernel makes.
const NO_KERNELS: &str = "this selection has no kernels on this device and is slow; --scorer box, \
                          --group-reduce max and a fixed budget have some";

/// Everything that a forward pass over whole pages depends on.
#[derive(Debug, Args)]
pub(crate) struct ForwardArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    #[command(flatten)]
    layout: LayoutArgs,
    /// Most prompt tokens of one prefill step [default: 256].
    #[arg(long, value_name = "TOKENS", env = "TINYSERVE_ATTENTION_CHUNK_SIZE",
          value_parser = values::size)]
    attention_chunk_size: Option<usize>,
    /// Rounding of rotary frequencies: f32, or weights (as casting a whole model leaves them).
    #[arg(long, value_name = "DTYPE", env = "TINYSERVE_ROPE_FREQUENCY_DTYPE", help_heading = "Device",
          value_parser = |text: &str| values::name::<RopeFrequencyDtype>(text, "f32 or weights"))]
    rope_frequency_dtype: Option<RopeFrequencyDtype>,
}

impl ForwardArgs {
    /// Settings whose values still have to be checked.
    fn unchecked(&self) -> Result<TinyServeConfig> {
        self.applied(self.model.config()?)
    }

    fn applied(&self, mut config: TinyServeConfig) -> Result<TinyServeConfig> {
        self.device.apply(&mut config)?;
        self.layout.apply(&mut config);
        set(&mut config.attention_chunk_size, self.attention_chunk_size);
        set(&mut config.rope_frequency_dtype, self.rope_frequency_dtype);
        Ok(config)
    }

    /// The settings of a command that selects no pages.
    pub(crate) fn config(&self) -> Result<TinyServeConfig> {
        let config = self.unchecked()?;
        config.check()?;
        Ok(config)
    }

    /// The settings of a command that selects pages; `attention` is checked with them.
    pub(crate) fn selecting(
        &self,
        selection: &SelectionArgs,
        attention: Option<AttentionMode>,
        sources: Sources,
    ) -> Result<TinyServeConfig> {
        self.selecting_from(self.model.config()?, selection, attention, sources)
    }

    /// As [`Self::selecting`], over the settings of a file that was read already.
    pub(crate) fn selecting_from(
        &self,
        file: TinyServeConfig,
        selection: &SelectionArgs,
        attention: Option<AttentionMode>,
        sources: Sources,
    ) -> Result<TinyServeConfig> {
        let mut config = self.applied(self.model.applied(file))?;
        set(&mut config.attention, attention);
        selection.apply(&mut config, sources)?;
        config.check()?;
        let policy = config.selection_policy();
        let has_kernels = match config.device {
            Device::Cuda(_) => Cuda::has_kernels(&policy),
            Device::Auto | Device::Cpu => Cpu::has_kernels(&policy),
        };
        if config.attention != AttentionMode::Dense && !has_kernels {
            eprintln!("note: {NO_KERNELS}");
        }
        Ok(config)
    }
}
