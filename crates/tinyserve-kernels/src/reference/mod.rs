//! The plain reference of every operation: obvious loops over f32 slices, sums in f64.
//!
//! It is what SIMD and device kernels are tested against, and it never gets faster.

mod attend;
mod linear;
mod pointwise;

pub(crate) use attend::{AttendRow, attend_row, recall};
pub(crate) use linear::{LinearRows, linear};
pub(crate) use pointwise::{activate, norm_row, rotary_angles_row, rotate_head};
