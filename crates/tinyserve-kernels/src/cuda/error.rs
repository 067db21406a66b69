//! What can go wrong on a device, as sentences that say what to do.

use thiserror::Error;

/// Why a CUDA device cannot be used, or what failed on it.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver library.
    #[error(
        "no CUDA driver: libcuda was not found; install NVIDIA's driver, or run on the CPU with \
         --device cpu"
    )]
    NoDriver,
    /// The driver finds no GPU.
    #[error(
        "no CUDA device: the driver finds no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or \
         run on the CPU with --device cpu"
    )]
    NoDevice,
    /// The driver is older than the kernels.
    #[error("the CUDA driver is for CUDA {have}, expected {need} or later: update NVIDIA's driver")]
    DriverTooOld {
        /// Newest CUDA version that the driver knows.
        have: CudaVersion,
        /// The oldest that we support.
        need: CudaVersion,
    },
    /// There is no device of that number.
    #[error("cuda:{asked} does not exist: expected cuda:0 to cuda:{}", count - 1)]
    NoSuchDevice {
        /// The number that was asked for.
        asked: usize,
        /// Devices that there are; at least one.
        count: usize,
    },
    /// The device lacks what the kernels need.
    #[error(
        "cuda:{ordinal} ({name}) has compute capability {}.{}, expected 8.0 (A100, RTX 30) or later",
        capability.0, capability.1
    )]
    DeviceTooOld {
        /// The device's number.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Major and minor number.
        capability: (i32, i32),
    },
    /// There is no cuBLAS.
    #[error(
        "cuBLAS was not found: our own kernels multiply prompts; for cuBLAS, put libcublas.so of CUDA 12 \
         where the system looks for libraries"
    )]
    NoCublas,
    /// The device has no memory left.
    #[error(
        "cuda: no memory for {what}: {asked} bytes asked for, {free} free; lower \
         --max-sequence-length, choose a smaller --kv-cache-dtype or --weights, or free the GPU"
    )]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Bytes that were asked for.
        asked: usize,
        /// Bytes that were free.
        free: usize,
    },
    /// A kernel did not run.
    #[error(
        "cuda: kernel {kernel} failed in a grid of {grid:?} blocks of {block:?}, with sizes {sizes:?}: \
         {message}"
    )]
    Launch {
        /// The kernel.
        kernel: String,
        /// Blocks.
        grid: (u32, u32, u32),
        /// Threads of a block.
        block: (u32, u32, u32),
        /// The whole numbers among its arguments, in the order of its source.
        sizes: Vec<i32>,
        /// What the driver says.
        message: String,
    },
    /// A step that is replayed as a graph did not run; the driver does not say which kernel failed.
    #[error("cuda: a step of {launches} kernels, from {first} to {last}, failed: {message}")]
    Step {
        /// Launches of the step.
        launches: usize,
        /// The first kernel.
        first: String,
        /// The last one.
        last: String,
        /// What the driver says.
        message: String,
    },
    /// The driver refused a call.
    #[error("cuda: {what} failed: {message}")]
    Driver {
        /// The call, in words.
        what: &'static str,
        /// What the driver says.
        message: String,
    },
}

/// A version of CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion {
    /// Before the dot.
    pub major: u32,
    /// Behind the dot.
    pub minor: u32,
}

impl CudaVersion {
    /// As drivers number it: 12040 is 12.4.
    pub(super) fn from_driver(number: i32) -> Self {
        let number = number.unsigned_abs();
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl std::fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
