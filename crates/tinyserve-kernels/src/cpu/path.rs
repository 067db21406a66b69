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
    /// Pairs of 128-bit vectors with FMA: 64-bit Arm.
    Neon,
    /// 256-bit vectors with FMA and half-precision conversion.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

impl CpuPath {
    /// Every path, slowest first.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Portable, Self::Neon, Self::Avx2, Self::Avx512];

    /// Whether this processor can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar | Self::Portable => true,
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
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(not(target_arch = "aarch64"))]
            Self::Neon => false,
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// The paths that this processor can run, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|path| path.is_available())
    }

    /// The fastest path that this processor can run.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().last().unwrap_or(Self::Portable)
    }

    /// The name as flags spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
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
            expected: "scalar, portable, neon, avx2 or avx512".to_owned(),
        })
    }
}
