//! One table of cases for every operation, and what a backend makes of them.
//!
//! A backend is held to [`crate::Cpu`] on [`crate::CpuPath::Scalar`], the plain reference. Each
//! case has its own tolerance, relative to the largest value of the reference's result; a result
//! that is not a number fails. `tinyserve doctor --self-test` prints the outcome.

mod attention;
mod dense;
mod input;
mod part;
mod rotated;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;

use crate::{Backend, Cpu, KernelError};
use part::Part;

/// What one case came to.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseOutcome {
    /// The operation, as [`Backend`] names it.
    pub op: &'static str,
    /// Shapes and settings.
    pub case: String,
    /// Largest difference to the reference, relative to the reference's largest value; NaN when
    /// the backend's result is not a number or has another length.
    pub max_error: f32,
    /// The largest difference that passes.
    pub tolerance: f32,
}

impl CaseOutcome {
    /// Whether the result is a number and within the tolerance.
    #[must_use]
    pub fn passed(&self) -> bool {
        // Written so that NaN fails.
        self.max_error <= self.tolerance
    }
}

impl fmt::Display for CaseOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, case, max_error, tolerance } = self;
        write!(f, "{op} {case}: error {max_error:e}, tolerance {tolerance:e}")
    }
}

/// For [`Cuda::use_fused_up_to`](crate::Cuda::use_fused_up_to), so that of the cases that select, small
/// ones are one launch and larger ones several.
pub const FUSED_UP_TO: usize = 120_000;

/// Runs every case on `backend`.
///
/// # Errors
/// When a backend refuses memory, weights or a selection that every backend has to accept.
pub fn run<B: Backend>(backend: &B) -> Result<Vec<CaseOutcome>, KernelError> {
    Table::new().run(backend)
}

/// The table, for backends that are run more than once: it keeps what the reference gave.
#[derive(Debug)]
pub struct Table {
    reference: Cpu,
    part: Part,
    /// By operation and case.
    dense: HashMap<String, Vec<f32>>,
    attention: HashMap<String, attention::Attended>,
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl Table {
    /// A table whose cases were not computed yet.
    #[must_use]
    pub fn new() -> Self {
        Self::part(0, 1)
    }

    /// The part with that number, from 0, of the `parts` that the table is cut into: every case is in
    /// one of them.
    ///
    /// # Panics
    /// When there is no such part.
    #[must_use]
    pub fn part(number: usize, parts: usize) -> Self {
        Self {
            reference: Cpu::reference(),
            part: Part::new(number, parts),
            dense: HashMap::new(),
            attention: HashMap::new(),
        }
    }

    /// Runs every case of the table, or of its part, on `backend`.
    ///
    /// # Errors
    /// As [`run`].
    pub fn run<B: Backend>(&mut self, backend: &B) -> Result<Vec<CaseOutcome>, KernelError> {
        let mut outcomes = Vec::new();
        self.part.begin();
        dense::run(backend, self, &mut outcomes)?;
        attention::run(backend, self, &mut outcomes)?;
        rotated::run(backend, &mut self.part, &mut outcomes)?;
        Ok(outcomes)
    }
}

/// What the reference gives for `case`, computed where it was not yet.
fn known<T>(
    all: &mut HashMap<String, T>,
    case: String,
    compute: impl FnOnce() -> Result<T, KernelError>,
) -> Result<&T, KernelError> {
    Ok(match all.entry(case) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(new) => new.insert(compute()?),
    })
}

/// Largest difference, relative to the largest value of `expected`.
fn max_error(found: &[f32], expected: &[f32]) -> f32 {
    if found.len() != expected.len() {
        return f32::NAN;
    }
    let scale = expected.iter().fold(f32::MIN_POSITIVE, |a, b| a.max(b.abs()));
    let mut worst = 0.0;
    for (&found, &expected) in found.iter().zip(expected) {
        let error = (found - expected).abs() / scale;
        // Not f32::max, which would drop a NaN.
        if error > worst || error.is_nan() {
            worst = error;
            if error.is_nan() {
                break;
            }
        }
    }
    worst
}

/// What `download` gives of a tensor.
fn values<B: Backend>(backend: &B, tensor: &B::Tensor) -> Vec<f32> {
    let mut out = Vec::new();
    backend.download(tensor, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_number_fails() {
        let outcome = |found: &[f32], expected: &[f32]| CaseOutcome {
            op: "op",
            case: String::new(),
            max_error: max_error(found, expected),
            tolerance: 1e-3,
        };
        assert!(outcome(&[1.0, 2.0], &[1.0, 2.001]).passed());
        assert!(!outcome(&[1.0, 2.0], &[1.0, 2.1]).passed());
        assert!(!outcome(&[f32::NAN, 2.0], &[1.0, 2.0]).passed());
        assert!(!outcome(&[1.0, f32::NAN], &[1.0, 2.0]).passed());
        assert!(!outcome(&[1.0, f32::INFINITY], &[1.0, 2.0]).passed());
        assert!(!outcome(&[1.0], &[1.0, 2.0]).passed());
    }
}
