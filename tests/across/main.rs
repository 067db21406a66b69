//! Tests that need more than one crate, in one binary.

mod activations;
mod batch;
mod embedded;
mod golden;
mod prefixes;
mod pruning;
