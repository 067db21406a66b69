//! `tinyserve bench`: how fast a model is.

mod attention;
mod bandwidth;
mod latency;
mod report;
mod runner;
mod source;
mod statistics;
mod throughput;

pub(crate) use attention::{AttentionArgs, attention};
pub(crate) use latency::{Format, LatencyArgs, latency};
pub(crate) use throughput::{ThroughputArgs, throughput};
