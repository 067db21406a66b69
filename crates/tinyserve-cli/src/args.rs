//! Flags that several commands share, and how they become settings.
//!
//! Each command flattens the groups whose settings change what it does, so that none is accepted
//! and ignored. A flag comes before its environment variable, that before the configuration file.

mod cache;
mod device;
mod engine;
mod forward;
mod model;
mod plugins;
mod schedule;
mod selection;

pub(crate) use cache::{LayoutArgs, MemoryArgs};
pub(crate) use device::{DeviceArgs, WeightsArgs};
pub(crate) use engine::EngineArgs;
pub(crate) use forward::ForwardArgs;
pub(crate) use model::ModelArgs;
pub(crate) use plugins::PluginArgs;
pub(crate) use schedule::{QueueArgs, ScheduleArgs};
pub(crate) use selection::{AdaptiveArgs, SELECTION, SelectionArgs, Sources, attention_mode};

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn set_some<T>(field: &mut Option<T>, value: Option<T>) {
    if value.is_some() {
        *field = value;
    }
}
