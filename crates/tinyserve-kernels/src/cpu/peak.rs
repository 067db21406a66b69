//! How fast the processor multiplies and adds: what kernels are held to.

use std::hint::black_box;
use std::time::Instant;

use super::Cpu;
use super::path::CpuPath;
use super::simd::{Kernel, Simd, dispatch};

/// Sums side by side: more than a processor starts before the first is done.
const CHAINS: usize = 12;
const ROUNDS: usize = 1 << 14;
/// Pieces per thread, so that a thread that is late leaves its share to the others.
const PIECES: usize = 32;
const PASSES: usize = 5;

impl Cpu {
    /// Floating-point operations per second of f32 multiply-adds in registers, on all threads with
    /// the instruction set in use, a multiply-add counting as two; the best of several passes.
    /// `None` of the scalar reference.
    #[must_use]
    pub fn measure_fma(&self) -> Option<f64> {
        if self.path == CpuPath::Scalar {
            return None;
        }
        let pieces = PIECES * self.threads();
        let lanes = dispatch(self.path, Lanes);
        let operations = (2 * CHAINS * lanes * ROUNDS * pieces) as f64;
        let pass = || {
            let start = Instant::now();
            self.pool.run(pieces, &|_, _| {
                black_box(dispatch(self.path, Chains));
            });
            operations / start.elapsed().as_secs_f64()
        };
        Some((0..PASSES).map(|_| pass()).fold(0.0, f64::max))
    }
}

struct Lanes;

impl Kernel for Lanes {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::LANES
    }
}

struct Chains;

impl Kernel for Chains {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        // Unknown to the compiler, and converging to 1: neither folded nor ever denormal.
        let (a, b) = (simd.splat(black_box(0.5)), simd.splat(black_box(0.5)));
        let mut sums = [simd.splat(black_box(0.0)); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.mul_add(*sum, a, b);
            }
        }
        simd.sums(&sums).iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CpuOptions;

    #[test]
    fn every_chain_does_its_work() {
        for path in CpuPath::available().skip(1) {
            let lanes = dispatch(path, Lanes) as f32;
            assert_eq!(dispatch(path, Chains), CHAINS as f32 * lanes, "{path}");
            let cpu = Cpu::new(CpuOptions { threads: Some(1), path: Some(path) }).unwrap();
            assert!(cpu.measure_fma().unwrap() > 1e6, "{path}");
        }
        assert_eq!(Cpu::reference().measure_fma(), None);
    }
}
