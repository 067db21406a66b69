//! What tests of backends share.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod wrong;
