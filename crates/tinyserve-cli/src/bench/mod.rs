//! `tinyserve bench`: how fast a model is.

mod attention;
mod bandwidth;
mod conversation;
mod device;
mod latency;
mod load;
mod memory;
mod report;
mod runner;
mod serve;
mod session;
mod source;
mod statistics;
mod throughput;
mod trace;

pub(crate) use attention::{AttentionArgs, attention, bandwidths, typical};
pub(crate) use conversation::{ConversationArgs, conversation};
pub(crate) use latency::{Format, LatencyArgs, latency};
pub(crate) use memory::{MemoryArgs, memory};
pub(crate) use serve::{ServeArgs, serve};
pub(crate) use session::{SessionArgs, session};
pub(crate) use throughput::{ThroughputArgs, throughput};
