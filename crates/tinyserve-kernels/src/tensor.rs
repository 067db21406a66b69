//! A tensor as it lies in a checkpoint: bytes, element type, shape.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::KernelError;

/// Element type of stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16: the upper half of a 32-bit float.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name as checkpoints and flags spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A named, immutable, row-major tensor in host memory, used in its stored type.
///
/// Cloning shares the bytes. The bytes usually belong to a memory-mapped file. They are always
/// aligned to the element: a tensor that a file stores misaligned is copied once, by itself.
#[derive(Clone)]
pub struct HostTensor {
    name: Arc<str>,
    bytes: Bytes,
    dtype: DType,
    shape: Vec<usize>,
}

impl HostTensor {
    /// Wraps `bytes` as a tensor of `shape`.
    ///
    /// # Errors
    /// When the length of `bytes` is not what `dtype` and `shape` need.
    pub fn new(
        name: &str,
        bytes: Bytes,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Self, KernelError> {
        let needed = shape
            .iter()
            .try_fold(dtype.size(), |size, &dim| size.checked_mul(dim))
            .filter(|&needed| needed == bytes.len());
        if needed.is_none() {
            return Err(KernelError::Shape {
                what: format!("tensor {name:?}"),
                found: shape.to_vec(),
                expected: format!("a shape that fills its {} bytes of {dtype}", bytes.len()),
            });
        }
        let bytes = if bytes.as_ptr().align_offset(dtype.size()) == 0 {
            bytes
        } else {
            aligned_copy(&bytes)
        };
        Ok(Self { name: name.into(), bytes, dtype, shape: shape.to_vec() })
    }

    /// A tensor that owns `values`, stored as f32.
    ///
    /// # Errors
    /// When `values` does not fill `shape`.
    pub fn from_f32(name: &str, values: Vec<f32>, shape: &[usize]) -> Result<Self, KernelError> {
        Self::new(name, Bytes::from_owner(Owned(values)), DType::F32, shape)
    }

    /// The tensor's name in its checkpoint.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stored element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Row-major shape.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The stored bytes, little-endian, aligned to the element.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Elements `range` of the flattened tensor, widened to f32.
    ///
    /// # Panics
    /// When `range` reaches past the tensor.
    #[must_use]
    pub fn to_f32(&self, range: Range<usize>) -> Vec<f32> {
        match self.dtype {
            DType::F32 => bytemuck::cast_slice::<u8, f32>(&self.bytes)[range].to_vec(),
            DType::F16 => bytemuck::cast_slice::<u8, half::f16>(&self.bytes)[range]
                .iter()
                .map(|x| x.to_f32())
                .collect(),
            DType::Bf16 => bytemuck::cast_slice::<u8, half::bf16>(&self.bytes)[range]
                .iter()
                .map(|x| x.to_f32())
                .collect(),
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether the tensor has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostTensor({:?} {} {:?})", self.name, self.dtype, self.shape)
    }
}

struct Owned<T>(Vec<T>);

impl<T: bytemuck::Pod> AsRef<[u8]> for Owned<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn aligned_copy(bytes: &Bytes) -> Bytes {
    let mut words = vec![0u32; bytes.len().div_ceil(4)];
    bytemuck::cast_slice_mut::<u32, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
    Bytes::from_owner(Owned(words)).slice(..bytes.len())
}
