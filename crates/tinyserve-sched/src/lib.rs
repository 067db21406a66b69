#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adaptive;
mod advisor;
mod api;
mod channel;
mod clock;
mod config;
mod engine;
mod history;
mod intake;
mod metrics;
mod pruning;
mod runner;
mod scheduler;
mod sequence;
mod session;
mod text;
mod worker;

pub use adaptive::{Adaptive, BudgetMove};
pub use advisor::Suggestion;
pub use api::{
    AdmissionError, AttentionChoice, Event, Failure, FailureKind, FinishReason, Finished, KvUse,
    PromptToken, Request, RequestId, StopReason, Summary, Timings, Token, Usage,
};
pub use channel::{EventStream, Reply};
pub use clock::Clock;
pub use config::{EngineConfig, OnStart};
pub use engine::Engine;
pub use intake::{Intake, Limits, Submission};
pub use metrics::{Histogram, LayerPages, Stats};
pub use runner::{ModelRunner, Runner, RunnerShape};
pub use scheduler::{MOST_SCORED_TOKENS, Scheduler};
pub use session::SessionInfo;
pub use worker::EngineState;
