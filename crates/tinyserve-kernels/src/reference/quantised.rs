//! `out = x·Wᵀ + b` over quantised weights, one group after the other.

use crate::cpu::{GROUP, Packed, RowGroup};

/// Writes into `out` `[rows, outputs]`, or adds to it; `x` is `[rows, inputs]`.
pub(crate) fn quantised_linear(x: &[f32], packed: &Packed, add: bool, out: &mut [f32]) {
    let rows = x.chunks_exact(packed.inputs).zip(out.chunks_exact_mut(packed.outputs));
    for (x, out) in rows {
        let groups: Vec<RowGroup> = x
            .chunks(GROUP)
            .map(|x| {
                let mut padded = [0.0; GROUP];
                padded[..x.len()].copy_from_slice(x);
                RowGroup::of(&padded)
            })
            .collect();
        for (output, out) in out.iter_mut().enumerate() {
            let mut sum = f64::from(packed.bias[output]);
            for (group, x) in groups.iter().enumerate() {
                let (codes, scale, minimum) = packed.group(output, group);
                let products = codes.iter().zip(&x.codes).map(|(&w, &x)| w * i32::from(x));
                let products: i32 = products.sum();
                sum += f64::from(products) * f64::from(scale) * f64::from(x.scale);
                sum += f64::from(minimum) * f64::from(x.sum);
            }
            let y = sum as f32;
            *out = if add { *out + y } else { y };
        }
    }
}
