//! Activations, element by element.

use crate::Activation;

/// The function of a feed-forward layer.
pub(crate) fn activate(activation: Activation, x: f32) -> f32 {
    let x = f64::from(x);
    let y = match activation {
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + libm::erf(x / std::f64::consts::SQRT_2)),
        Activation::Relu if x < 0.0 => 0.0,
        Activation::Relu => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
    };
    y as f32
}
