//! What clients may rely on, asked over a bound socket.
#![forbid(unsafe_code)]

mod cancel;
mod chat;
mod completions;
mod errors;
mod generated;
mod life;
mod limits;
mod logprobs;
mod models;
mod monitor;
mod prefixes;
mod server;
mod sessions;
mod streams;
