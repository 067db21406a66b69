//! Random tensors that exist only while they are written.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::{Dtype, View};

/// Standard deviation of the weights: what GPT-2 and LLaMA start their training with.
const DEVIATION: f32 = 0.02;

/// Values made at a time.
const CHUNK: usize = 4096;

/// A tensor of the checkpoint, without its values.
pub(crate) struct Tensor {
    name: String,
    shape: Vec<usize>,
    fill: Fill,
}

/// What a tensor is filled with.
#[derive(Clone, Copy)]
pub(crate) enum Fill {
    /// Weights: normal around zero.
    Normal,
    /// Biases.
    Zero,
    /// The scales of norms.
    One,
}

impl Tensor {
    pub(crate) fn new(name: String, shape: &[usize], fill: Fill) -> Self {
        Self { name, shape: shape.to_vec(), fill }
    }

    pub(crate) fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Writes `tensors` to a safetensors file, one after the other.
pub(crate) fn write(path: &Path, tensors: Vec<Tensor>, dtype: Dtype, seed: u64) -> Result<()> {
    let views = tensors.into_iter().map(|tensor| {
        let name = tensor.name.clone();
        (name, Unmade { tensor, dtype, seed })
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// A tensor whose bytes are made when the file asks for them.
struct Unmade {
    tensor: Tensor,
    dtype: Dtype,
    seed: u64,
}

impl View for Unmade {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        let mut normal = Normal::new(self.seed, &self.tensor.name);
        let mut values = [0.0; CHUNK];
        let mut halves = [0; CHUNK];
        let mut left = self.tensor.n_elements();
        while left > 0 {
            let n = left.min(CHUNK);
            left -= n;
            let values = &mut values[..n];
            match self.tensor.fill {
                Fill::Normal => values.fill_with(|| normal.next() * DEVIATION),
                Fill::Zero => values.fill(0.0),
                Fill::One => values.fill(1.0),
            }
            append(values, self.dtype, &mut halves[..n], &mut bytes);
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.n_elements() * self.dtype.bitsize() / 8
    }
}

/// Appends `values` to `bytes` as `dtype`, through `halves` of the same length.
fn append(values: &[f32], dtype: Dtype, halves: &mut [u16], bytes: &mut Vec<u8>) {
    use half::slice::HalfBitsSliceExt;
    match dtype {
        Dtype::F16 => halves.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values),
        Dtype::BF16 => halves.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(values),
        _ => return bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
    }
    bytes.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
}

/// Standard normal numbers, near enough for weights: a sum of four uniform ones, no tail beyond 3.5.
struct Normal {
    state: u64,
}

impl Normal {
    /// A stream of its own for each seed and tensor, so that the order of tensors decides nothing.
    fn new(seed: u64, name: &str) -> Self {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { state: mix(mix(seed) ^ hash) }
    }

    fn next(&mut self) -> f32 {
        /// Mean of the sum of four uniform numbers in 0..=65535.
        const MEAN: i32 = 131_070;
        /// One over that sum's standard deviation, 65536 / √3.
        const SCALE: f32 = 1.732_050_8 / 65536.0;
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bits = mix(self.state);
        let sum: i32 = (0..4).map(|part| i32::from((bits >> (16 * part)) as u16)).sum();
        (sum - MEAN) as f32 * SCALE
    }
}

/// SplitMix64's finaliser.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_nearly_normal() {
        let mut normal = Normal::new(3, "a");
        let n = 200_000;
        let (mut sum, mut squares, mut within) = (0.0, 0.0, 0);
        for _ in 0..n {
            let value = f64::from(normal.next());
            sum += value;
            squares += value * value;
            within += usize::from(value.abs() < 1.0);
        }
        let n = f64::from(n);
        assert!((sum / n).abs() < 0.01);
        assert!((squares / n - 1.0).abs() < 0.02);
        assert!((within as f64 / n - 0.6827).abs() < 0.02, "{}", within as f64 / n);
    }

    #[test]
    fn types_agree() {
        let bytes = |dtype| {
            let tensor = Tensor::new("a".into(), &[3, 5000], Fill::Normal);
            Unmade { tensor, dtype, seed: 1 }.data().into_owned()
        };
        let exact = bytes(Dtype::F32);
        let (exact, _) = exact.as_chunks::<4>();
        let halves = bytes(Dtype::F16);
        let brains = bytes(Dtype::BF16);
        assert_eq!((exact.len(), halves.len(), brains.len()), (15000, 30000, 30000));
        for (i, &value) in exact.iter().enumerate() {
            let value = f32::from_le_bytes(value);
            let pair = |bytes: &[u8]| [bytes[2 * i], bytes[2 * i + 1]];
            assert_eq!(f16::from_le_bytes(pair(&halves)), f16::from_f32(value));
            assert_eq!(bf16::from_le_bytes(pair(&brains)), bf16::from_f32(value));
        }
    }
}
