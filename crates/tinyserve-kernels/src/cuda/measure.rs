//! What a device can do at most, measured where it is used, and what it chose.

use std::time::Instant;

use super::Cuda;
use super::attend;
use super::device::driver_error;
use super::memory::Buffer;
use crate::{Backend, KernelError};

/// Bytes of a copy: more than any device's cache holds.
const COPY_BYTES: usize = 256 << 20;
/// Copies; the fastest counts.
const COPIES: usize = 5;

impl Cuda {
    /// Waits for everything that was asked for.
    ///
    /// # Errors
    /// The first thing that went wrong since it was last asked.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        self.launcher.flush()?;
        let waited = self.launcher.stream.synchronize();
        waited.map_err(driver_error("waiting for the device"))?;
        self.check()
    }

    /// Steps that were replayed as a graph of the driver's, because their launches came before.
    #[must_use]
    pub fn replayed_steps(&self) -> u64 {
        self.launcher.replays()
    }

    /// Steps that were captured as graphs: one for each bucket of batch sizes and lengths that came
    /// more than once.
    #[must_use]
    pub fn captured_steps(&self) -> u64 {
        self.launcher.captures()
    }

    /// The page lists of the last call of attention: those of each row that selects, in the order of
    /// rows and KV heads. It waits for them.
    ///
    /// # Errors
    /// When the device fails.
    pub fn page_lists(&self) -> Result<Vec<Vec<u32>>, KernelError> {
        attend::page_lists(self)
    }

    /// Bytes that a copy within the device's memory reads and writes in a second.
    ///
    /// # Errors
    /// When there is no memory for two buffers, or the device fails.
    pub fn copy_bandwidth(&self) -> Result<f64, KernelError> {
        // No more than a quarter of what is free each.
        let (free, _) =
            self.launcher.context.mem_get_info().map_err(driver_error("asking for the memory"))?;
        let bytes = COPY_BYTES.min(free / 4);
        let what = "a copy that is timed";
        let from = Buffer::zeroed(&self.launcher, bytes, what)?;
        let mut to = Buffer::zeroed(&self.launcher, bytes, what)?;
        let mut fastest = f64::INFINITY;
        for _ in 0..COPIES {
            self.synchronize()?;
            let start = Instant::now();
            to.copy_from(&self.launcher, 0, &from)?;
            self.synchronize()?;
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        Ok(2.0 * bytes as f64 / fastest)
    }
}
