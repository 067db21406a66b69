//! Rows in bf16, for products of pairs.

use half::bf16;

use super::super::columns::Columns;
use super::super::simd::{PairKernel, PairSimd, dispatch_pairs};
use super::super::tensor::CpuTensor;
use super::super::{Cpu, SERIAL_ELEMENTS};

/// The rows of `x`, rounded; `buffer` grows, and is kept.
pub(super) fn rounded<'a>(cpu: &Cpu, x: &CpuTensor, buffer: &'a mut Vec<bf16>) -> &'a [bf16] {
    let (path, x, columns, rows) = (cpu.path(), x.values(), x.columns(), x.rows());
    if buffer.len() < x.len() {
        buffer.resize(x.len(), bf16::ZERO);
    }
    let out = &mut buffer[..x.len()];
    if cpu.threads() == 1 || x.len() < SERIAL_ELEMENTS {
        dispatch_pairs(path, Round { x, out: &mut *out });
        return out;
    }
    let at_once = rows.div_ceil(4 * cpu.threads());
    let rows_of = Columns::new(&mut *out, columns);
    cpu.pool.run(rows.div_ceil(at_once), &|_, i| {
        let rows = i * at_once..((i + 1) * at_once).min(rows);
        let x = &x[rows.start * columns..rows.end * columns];
        // SAFETY: each item has rows of its own.
        dispatch_pairs(path, Round { x, out: unsafe { rows_of.rows(rows) } });
    });
    out
}

struct Round<'a> {
    x: &'a [f32],
    out: &'a mut [bf16],
}

impl PairKernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: PairSimd>(self, simd: S) {
        for (x, out) in self.x.chunks(S::LANES).zip(self.out.chunks_mut(S::LANES)) {
            simd.store_rounded_up_to(simd.load_up_to(x), out);
        }
    }
}
