//! Rotary embedding: angles of a position, rotation of a head.

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
