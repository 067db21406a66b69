//! `tinyserve bench`: how fast a model is.

mod latency;
mod report;
mod runner;
mod statistics;

pub(crate) use latency::{LatencyArgs, latency};
