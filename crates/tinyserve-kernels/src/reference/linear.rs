//! `out = x·Wᵀ + b`, element by element.

use std::ops::Range;

use crate::{HostTensor, MatrixLayout};

/// Rows of an input and one matrix.
pub(crate) struct LinearRows<'a> {
    /// `[rows, inputs]`.
    pub(crate) x: &'a [f32],
    /// `[outputs, inputs]` or `[inputs, outputs]`.
    pub(crate) weight: &'a HostTensor,
    pub(crate) layout: MatrixLayout,
    /// `[outputs]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// Columns of `out` that are this matrix's.
    pub(crate) columns: Range<usize>,
    /// Columns of `out` in all.
    pub(crate) width: usize,
    /// Whether the result is added to what is there.
    pub(crate) add: bool,
}

/// Writes into `out` `[rows, width]`.
pub(crate) fn linear(rows: &LinearRows<'_>, out: &mut [f32]) {
    let outputs = rows.columns.len();
    let weight = rows.weight.to_f32(0..rows.weight.len());
    let inputs = weight.len() / outputs;
    for (x, out) in rows.x.chunks_exact(inputs).zip(out.chunks_exact_mut(rows.width)) {
        for (o, out) in out[rows.columns.clone()].iter_mut().enumerate() {
            let mut sum = 0.0;
            for (i, &x) in x.iter().enumerate() {
                let w = match rows.layout {
                    MatrixLayout::OutIn => weight[o * inputs + i],
                    MatrixLayout::InOut => weight[i * outputs + o],
                };
                sum += f64::from(w) * f64::from(x);
            }
            let y = (sum + rows.bias.map_or(0.0, |bias| f64::from(bias[o]))) as f32;
            *out = if rows.add { *out + y } else { y };
        }
    }
}
