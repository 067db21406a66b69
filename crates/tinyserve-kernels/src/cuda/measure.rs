//! What a device can do at most, measured where it is used, and what it chose.

use std::time::{Duration, Instant};

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags};

use super::Cuda;
use super::attend;
use super::device::driver_error;
use super::memory::{Buffer, grown};
use crate::{Backend, KernelError};

/// Bytes of a copy: more than any device's cache holds.
const COPY_BYTES: usize = 1 << 30;
/// A copy takes no more than one of so many parts of what is free, twice.
const LEAST_FREE: usize = 16;
/// Copies that are timed.
const COPIES: usize = 9;
/// Caches that are written to clear one, which takes the device longer than the host needs to
/// launch a step.
const CACHES: usize = 4;

/// What a step took that was timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepTime {
    /// Laying it out on the host, until its launches were queued.
    pub host: Duration,
    /// From its first launch to the end of its last one, on the device.
    pub device: Duration,
}

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

    /// Runs `step`, whose launches are kept back, then launches them together between two events.
    ///
    /// The device's cache holds nothing of what the step reads. Where `step` itself waits for the
    /// device, as a selector on the host does, the device's time is that of all of it.
    ///
    /// # Errors
    /// Those of `step`, and when the device fails.
    pub fn time_step<T, E: From<KernelError>>(
        &self,
        step: impl FnOnce() -> Result<T, E>,
    ) -> Result<(T, StepTime), E> {
        let device = &self.launcher;
        let begin = || -> Result<_, KernelError> {
            self.clear_cache()?;
            self.synchronize()?;
            device.keep_back(true)?;
            Ok((device.flushes(), self.event()?))
        };
        let (flushes, began) = begin().map_err(E::from)?;
        let start = Instant::now();
        let done = step();
        let host = start.elapsed();
        let finish = || -> Result<_, KernelError> {
            self.check()?;
            if self.use_graphs {
                device.capture_waiting()?;
            }
            // The device is busy until all launches are there, so that it never waits for the host.
            self.clear_cache()?;
            let launched = self.event()?;
            let whole = device.flushes() == flushes;
            device.keep_back(false)?;
            let ended = self.event()?;
            self.synchronize()?;
            let first = if whole { &launched } else { &began };
            let took = first.elapsed_ms(&ended).map_err(driver_error("asking for a time"))?;
            Ok(StepTime { host, device: Duration::from_secs_f64(f64::from(took.max(0.0)) / 1e3) })
        };
        let time = finish();
        // The step's own sentence says more than what followed from it.
        let done = done?;
        Ok((done, time.map_err(E::from)?))
    }

    /// An event behind everything that was launched, which knows its time.
    fn event(&self) -> Result<CudaEvent, KernelError> {
        let event = self.launcher.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        Ok(event.map_err(driver_error("recording an event"))?)
    }

    /// Writes over the device's cache.
    fn clear_cache(&self) -> Result<(), KernelError> {
        let cache = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        let cache = self.launcher.context.attribute(cache);
        let cache = cache.map_err(driver_error("asking for the size of the cache"))?;
        let bytes = CACHES * usize::try_from(cache).unwrap_or(0);
        let mut state = self.state();
        let what = "clearing the device's cache";
        Ok(grown(&mut state.cold, &self.launcher, bytes, what)?.clear(&self.launcher)?)
    }

    /// Bytes that a copy within the device's memory reads and writes in a second, as its own events
    /// say: the median of several copies.
    ///
    /// # Errors
    /// When there is no memory for two buffers, or the device fails.
    pub fn copy_bandwidth(&self) -> Result<f64, KernelError> {
        let (free, _) =
            self.launcher.context.mem_get_info().map_err(driver_error("asking for the memory"))?;
        let bytes = COPY_BYTES.min(free / LEAST_FREE);
        let what = "a copy that is timed";
        let from = Buffer::zeroed(&self.launcher, bytes, what)?;
        let mut to = Buffer::zeroed(&self.launcher, bytes, what)?;
        let mut events = Vec::new();
        // The first one keeps the device busy until the others are there.
        for _ in 0..=COPIES {
            to.copy_from(&self.launcher, 0, &from)?;
            events.push(self.event()?);
        }
        self.synchronize()?;
        let mut times = Vec::new();
        for pair in events.windows(2) {
            let took = pair[0].elapsed_ms(&pair[1]).map_err(driver_error("asking for a time"))?;
            times.push(f64::from(took) / 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(2.0 * bytes as f64 / times[times.len() / 2])
    }
}
