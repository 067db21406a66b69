//! Norms, row by row.

use crate::NormKind;

/// Normalises one row `[hidden]`.
pub(crate) fn norm_row(
    kind: NormKind,
    epsilon: f32,
    x: &[f32],
    (weight, bias): (&[f32], Option<&[f32]>),
    out: &mut [f32],
) {
    let n = x.len() as f64;
    let mean = match kind {
        NormKind::Layer => x.iter().map(|&x| f64::from(x)).sum::<f64>() / n,
        NormKind::Rms => 0.0,
    };
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    let scale = (variance + f64::from(epsilon)).sqrt().recip();
    for (i, (out, &x)) in out.iter_mut().zip(x).enumerate() {
        let y = (f64::from(x) - mean) * scale * f64::from(weight[i]);
        *out = (y + bias.map_or(0.0, |bias| f64::from(bias[i]))) as f32;
    }
}
