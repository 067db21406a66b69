//! Which of the CPU's instruction sets the kernels use.

use std::fmt;
use std::str::FromStr;

use crate::KernelError;

/// An implementation of the CPU kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuPath {
    /// The plain reference that every other path is tested against; one thread.
    Scalar,
    /// Vectors that any processor's compiler can map to its registers.
    Portable,
    /// [`Self::Portable`] with the products of [`Self::Avx512Bf16`]: what rounding does to a model
    /// can be seen on any processor.
    PortableBf16,
    /// Pairs of 128-bit vectors with FMA: 64-bit Arm.
    Neon,
    /// 256-bit vectors with FMA and half-precision conversion.
    Avx2,
    /// 512-bit vectors.
    Avx512,
    /// [`Self::Avx512`], and products of two bf16 at a time with bf16 weights, for which what they
    /// are multiplied by is rounded to bf16.
    Avx512Bf16,
}

impl CpuPath {
    /// Every path, slowest first.
    pub const ALL: [Self; 7] = [
        Self::Scalar,
        Self::Portable,
        Self::PortableBf16,
        Self::Neon,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
    ];

    /// The names of all, as a sentence lists them.
    pub const NAMES: &'static str =
        "scalar, portable, portable-bf16, neon, avx2, avx512 or avx512-bf16";

    /// Whether this processor can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar | Self::Portable | Self::PortableBf16 => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(not(target_arch = "aarch64"))]
            Self::Neon => false,
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 => false,
        }
    }

    /// The paths that this processor can run, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|path| path.is_available())
    }

    /// The fastest path that this processor can run, of those that round nothing.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().filter(|path| !path.rounds_inputs()).last().unwrap_or(Self::Portable)
    }

    /// Whether products of bf16 weights round their inputs to bf16, as llama.cpp does: such a path
    /// is only taken when it is asked for.
    #[must_use]
    pub fn rounds_inputs(self) -> bool {
        matches!(self, Self::PortableBf16 | Self::Avx512Bf16)
    }

    /// The name as flags spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Portable => "portable",
            Self::PortableBf16 => "portable-bf16",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
        }
    }

    pub(crate) fn check(self) -> Result<Self, KernelError> {
        if self.is_available() {
            return Ok(self);
        }
        let available: Vec<_> = Self::available().map(Self::name).collect();
        Err(KernelError::Invalid {
            what: "cpu path",
            found: format!("{self}, which this processor does not have"),
            expected: available.join(", "),
        })
    }
}

impl fmt::Display for CpuPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CpuPath {
    type Err = KernelError;

    fn from_str(s: &str) -> Result<Self, KernelError> {
        Self::ALL.into_iter().find(|path| path.name() == s).ok_or_else(|| KernelError::Invalid {
            what: "cpu path",
            found: format!("{s:?}"),
            expected: Self::NAMES.to_owned(),
        })
    }
}
