//! `out = x·Wᵀ + b`, one stored row of weights after the other.

use std::ops::Range;

use crate::{HostTensor, MatrixLayout};

/// Rows of an input and one matrix.
pub(crate) struct LinearRows<'a> {
    /// `[rows, inputs]`.
    pub(crate) x: &'a [f32],
    pub(crate) inputs: usize,
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
    let (inputs, outputs) = (rows.inputs, rows.columns.len());
    let mut sums = vec![0.0f64; rows.x.len() / inputs * outputs];
    let each_row = || rows.x.chunks_exact(inputs);
    match rows.layout {
        MatrixLayout::OutIn => {
            for o in 0..outputs {
                let weights = rows.weight.to_f32(o * inputs..(o + 1) * inputs);
                for (row, x) in each_row().enumerate() {
                    let products =
                        x.iter().zip(&weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
                    sums[row * outputs + o] = products.sum();
                }
            }
        }
        MatrixLayout::InOut => {
            for i in 0..inputs {
                let weights = rows.weight.to_f32(i * outputs..(i + 1) * outputs);
                for (row, x) in each_row().enumerate() {
                    for (o, &w) in weights.iter().enumerate() {
                        sums[row * outputs + o] += f64::from(x[i]) * f64::from(w);
                    }
                }
            }
        }
    }
    for (sums, out) in sums.chunks_exact(outputs).zip(out.chunks_exact_mut(rows.width)) {
        for (o, (&sum, out)) in sums.iter().zip(&mut out[rows.columns.clone()]).enumerate() {
            let y = (sum + rows.bias.map_or(0.0, |bias| f64::from(bias[o]))) as f32;
            *out = if rows.add { *out + y } else { y };
        }
    }
}
