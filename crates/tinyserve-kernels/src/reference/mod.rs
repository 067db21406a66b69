//! The plain reference of every operation: obvious loops over f32 slices, sums in f64.
//!
//! It is what SIMD and device kernels are tested against, and it never gets faster. Appending to
//! pages, scoring boxes and choosing pages have their reference in `tinyserve-kv`.

mod activate;
mod attend;
mod embed;
mod linear;
mod norm;
mod quantised;
mod rotary;

pub(crate) use activate::activate;
pub(crate) use attend::{AttendRow, attend_row, observe_row, recall};
pub(crate) use embed::embed_row;
pub(crate) use linear::{LinearRows, linear};
pub(crate) use norm::norm_row;
pub(crate) use quantised::quantised_linear;
pub(crate) use rotary::{rotary_angles_row, rotate_head};
