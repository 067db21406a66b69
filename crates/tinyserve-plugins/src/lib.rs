#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod context;
mod entropy_exit;
mod error;
mod manager;
mod plugin;
mod request;
mod stats;
mod token_pruning;

pub use context::{FinishContext, PrefillContext, RequestContext, RequestInfo, StepContext};
pub use entropy_exit::{EntropyExit, EntropySignal};
pub use error::{PluginError, PluginFailure};
pub use manager::PluginManager;
pub use plugin::{Action, HookError, HookResult, IntoAction, Needs, Plugin};
pub use request::{Finish, Prefilled, Pruned, RequestPlugins, Step, Stop, Verdict};
pub use stats::PluginStats;
pub use token_pruning::TokenPruning;
