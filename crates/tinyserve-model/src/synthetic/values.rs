//! Random tensors: which element has which value, in any order and on any thread.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use tinyserve_kernels::DType;

/// Standard deviation of the weights: what GPT-2 and LLaMA start their training with.
const DEVIATION: f32 = 0.02;

/// Values made at a time.
const CHUNK: usize = 4096;

/// A tensor of a synthetic model, without its values.
#[derive(Debug, Clone)]
pub struct SyntheticTensor {
    name: String,
    shape: Vec<usize>,
    fill: Fill,
}

/// What a tensor is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    /// Weights: normal around zero.
    Normal,
    /// Biases.
    Zero,
    /// The scales of norms.
    One,
}

impl SyntheticTensor {
    pub(super) fn new(name: String, shape: &[usize], fill: Fill) -> Self {
        Self { name, shape: shape.to_vec(), fill }
    }

    /// The name as the hub spells it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Row-major shape.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values of `seed` as `dtype`, little-endian.
    #[must_use]
    pub fn bytes(&self, dtype: DType, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.elements() * dtype.size()];
        self.write(dtype, seed, &mut bytes);
        bytes
    }

    /// Fills `bytes` with the values of `seed`, on every core.
    pub(super) fn write(&self, dtype: DType, seed: u64, bytes: &mut [u8]) {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = self.elements().div_ceil(threads).next_multiple_of(CHUNK);
        std::thread::scope(|scope| {
            for (i, bytes) in bytes.chunks_mut(share * dtype.size()).enumerate() {
                scope.spawn(move || self.write_from(i * share, dtype, seed, bytes));
            }
        });
    }

    fn write_from(&self, first: usize, dtype: DType, seed: u64, bytes: &mut [u8]) {
        let mut normal = SyntheticNormal::new(seed, &self.name);
        normal.skip(first);
        let mut values = [0.0; CHUNK];
        let mut halves = [0; CHUNK];
        for bytes in bytes.chunks_mut(CHUNK * dtype.size()) {
            let n = bytes.len() / dtype.size();
            let values = &mut values[..n];
            match self.fill {
                Fill::Normal => values.fill_with(|| normal.sample() * DEVIATION),
                Fill::Zero => values.fill(0.0),
                Fill::One => values.fill(1.0),
            }
            encode(values, dtype, &mut halves[..n], bytes);
        }
    }
}

/// Writes `values` to `bytes` as `dtype`, through `halves` of the same length.
fn encode(values: &[f32], dtype: DType, halves: &mut [u16], bytes: &mut [u8]) {
    match dtype {
        DType::F16 => halves.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values),
        DType::Bf16 => halves.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(values),
        DType::F32 => {
            for (value, bytes) in values.iter().zip(bytes.chunks_exact_mut(4)) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            return;
        }
    }
    for (half, bytes) in halves.iter().zip(bytes.chunks_exact_mut(2)) {
        bytes.copy_from_slice(&half.to_le_bytes());
    }
}

/// Standard normal numbers, near enough for benchmarks: a sum of four uniform ones, no tail beyond
/// 3.5. The same seed and name give the same numbers on every machine.
#[derive(Debug, Clone)]
pub struct SyntheticNormal {
    state: u64,
}

/// What SplitMix64 adds to its state for each number.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl SyntheticNormal {
    /// A stream of its own for each seed and name, so that the order of tensors decides nothing.
    #[must_use]
    pub fn new(seed: u64, name: &str) -> Self {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { state: mix(mix(seed) ^ hash) }
    }

    /// Leaves `n` numbers out.
    fn skip(&mut self, n: usize) {
        self.state = self.state.wrapping_add(STEP.wrapping_mul(n as u64));
    }

    /// The next number.
    pub fn sample(&mut self) -> f32 {
        /// Mean of the sum of four uniform numbers in 0..=65535.
        const MEAN: i32 = 131_070;
        /// One over that sum's standard deviation, 65536 / √3.
        const SCALE: f32 = 1.732_050_8 / 65536.0;
        self.state = self.state.wrapping_add(STEP);
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
        let mut normal = SyntheticNormal::new(3, "a");
        let n = 200_000;
        let (mut sum, mut squares, mut within) = (0.0, 0.0, 0);
        for _ in 0..n {
            let value = f64::from(normal.sample());
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
        let tensor = SyntheticTensor::new("a".into(), &[3, 5000], Fill::Normal);
        let exact = tensor.bytes(DType::F32, 1);
        let (exact, _) = exact.as_chunks::<4>();
        let halves = tensor.bytes(DType::F16, 1);
        let brains = tensor.bytes(DType::Bf16, 1);
        assert_eq!((exact.len(), halves.len(), brains.len()), (15000, 30000, 30000));
        for (i, &value) in exact.iter().enumerate() {
            let value = f32::from_le_bytes(value);
            let pair = |bytes: &[u8]| [bytes[2 * i], bytes[2 * i + 1]];
            assert_eq!(f16::from_le_bytes(pair(&halves)), f16::from_f32(value));
            assert_eq!(bf16::from_le_bytes(pair(&brains)), bf16::from_f32(value));
        }
    }

    #[test]
    fn threads_change_nothing() {
        let tensor = SyntheticTensor::new("a".into(), &[5 * CHUNK + 7], Fill::Normal);
        let mut alone = vec![0; tensor.elements() * 2];
        tensor.write_from(0, DType::F16, 9, &mut alone);
        assert_eq!(tensor.bytes(DType::F16, 9), alone);
    }
}
