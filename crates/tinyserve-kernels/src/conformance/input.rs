//! Inputs that are the same on every machine.

use half::{bf16, f16};

use bytes::Bytes;

use crate::{DType, HostTensor, KernelError};

/// A stream of numbers in −1 to 1, from a seed (splitmix64).
#[derive(Clone)]
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        // 24 bits fill an f32 exactly.
        (x >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    pub(super) fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }

    /// A tensor of `shape`, stored as `dtype`.
    pub(super) fn tensor(
        &mut self,
        dtype: DType,
        shape: &[usize],
    ) -> Result<HostTensor, KernelError> {
        let values = self.take(shape.iter().product());
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            DType::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        HostTensor::new("conformance case", Bytes::from(bytes), dtype, shape)
    }
}
