//! `tinyserve eval`: what a page selection does to a model's answers.

mod kl;
mod needle;
mod options;
mod perplexity;
mod recall;
mod table;

pub(crate) use kl::{KlArgs, kl};
pub(crate) use needle::{NeedleArgs, needle};
pub(crate) use perplexity::{PerplexityArgs, perplexity};
pub(crate) use recall::{RecallArgs, recall};

pub(crate) use options::{Lab, TrialArgs, Watched, lab_error};
