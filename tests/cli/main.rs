//! The binary `tinyserve` from end to end: what it prints, where, and how it ends.
#![forbid(unsafe_code)]

mod analyze;
mod bad_files;
mod bad_usage;
mod bench;
mod binary;
mod chat;
mod cuda;
mod eval;
mod interrupt;
mod open_pages;
mod options;
mod reports;
mod run;
mod serve;
mod weights_cache;
