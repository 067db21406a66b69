//! Norms, activations and rotary embedding, row by row.

use crate::{Activation, NormKind};

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

/// The function of a feed-forward layer.
pub(crate) fn activate(activation: Activation, x: f32) -> f32 {
    let x = f64::from(x);
    let y = match activation {
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + libm::erf(x / std::f64::consts::SQRT_2)),
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
    };
    y as f32
}

/// Cosines, then sines, of one position's angles: `[head_dim]`.
///
/// The angle is the f32 product of position and frequency, as transformers computes it; over long
/// contexts its rounding shows in the last digits.
pub(crate) fn rotary_angles_row(position: u32, inverse_frequencies: &[f32], out: &mut [f32]) {
    let (cos, sin) = out.split_at_mut(inverse_frequencies.len());
    for (i, &frequency) in inverse_frequencies.iter().enumerate() {
        let angle = f64::from(position as f32 * frequency);
        cos[i] = angle.cos() as f32;
        sin[i] = angle.sin() as f32;
    }
}

/// Rotates one head `[head_dim]` in place, channel `i` with channel `i + head_dim / 2`.
pub(crate) fn rotate_head(angles: &[f32], head: &mut [f32]) {
    let half = head.len() / 2;
    let (cos, sin) = angles.split_at(half);
    let (low, high) = head.split_at_mut(half);
    for i in 0..half {
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}
