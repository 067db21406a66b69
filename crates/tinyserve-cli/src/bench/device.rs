//! What is measured.

use std::time::Instant;

use anyhow::Result;
use tinyserve::TinyServeError;
use tinyserve::kernels::{Backend, Cpu, Cuda, KernelError, SelectionTimes};

use super::bandwidth::read_bandwidth;

/// What a step took.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepSeconds {
    pub(super) step: f64,
    /// Laying it out on the host, where the step itself is another device's.
    pub(super) host: Option<f64>,
}

/// A backend, and what is known of its speed.
pub(super) trait Measurable: Backend {
    /// Its name.
    fn device(&self) -> String;

    /// Threads of the CPU that work.
    fn threads(&self) -> usize;

    /// Instruction set of the CPU, if it computes.
    fn path(&self) -> Option<&'static str>;

    /// Waits for what was asked for; tells what went wrong.
    fn finish(&self) -> Result<()>;

    /// Whose clock [`Self::time`] reads: the host's or the device's.
    fn clock(&self) -> &'static str;

    /// Runs a step, and what it took.
    fn time<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<(T, StepSeconds)>;

    /// Starts or stops timing how pages are chosen, where that can be timed.
    fn time_selection(&self, on: bool);

    /// What scoring and listing pages took since it was last asked, if that can be timed.
    fn take_selection_times(&self) -> Option<SelectionTimes>;

    /// Multiply-adds that it makes in a second, twice, where that can be measured.
    fn fma(&self) -> Option<f64>;

    /// Bytes that it reads in a second, once its own memory is given back.
    fn into_bandwidth(self) -> Result<f64>;
}

impl Measurable for Cpu {
    fn device(&self) -> String {
        "cpu".to_owned()
    }

    fn threads(&self) -> usize {
        Self::threads(self)
    }

    fn path(&self) -> Option<&'static str> {
        Some(Self::path(self).name())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn clock(&self) -> &'static str {
        "host"
    }

    fn time<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<(T, StepSeconds)> {
        let start = Instant::now();
        let done = step()?;
        Ok((done, StepSeconds { step: start.elapsed().as_secs_f64(), host: None }))
    }

    fn time_selection(&self, on: bool) {
        Self::time_selection(self, on);
    }

    fn take_selection_times(&self) -> Option<SelectionTimes> {
        Some(Self::take_selection_times(self))
    }

    fn fma(&self) -> Option<f64> {
        self.measure_fma()
    }

    fn into_bandwidth(self) -> Result<f64> {
        let threads = Self::threads(&self);
        drop(self);
        Ok(read_bandwidth(threads))
    }
}

impl Measurable for Cuda {
    fn device(&self) -> String {
        format!("cuda:{}", Self::device(self).ordinal)
    }

    fn threads(&self) -> usize {
        // The one that launches.
        1
    }

    fn path(&self) -> Option<&'static str> {
        None
    }

    fn finish(&self) -> Result<()> {
        Ok(self.synchronize().map_err(TinyServeError::from)?)
    }

    fn clock(&self) -> &'static str {
        "device"
    }

    fn time<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<(T, StepSeconds)> {
        /// Has `?` turn the device's errors into ours.
        struct Failed(anyhow::Error);

        impl From<KernelError> for Failed {
            fn from(error: KernelError) -> Self {
                Self(TinyServeError::from(error).into())
            }
        }

        let timed = self.time_step(|| step().map_err(Failed));
        let (done, time) = timed.map_err(|Failed(error)| error)?;
        let (step, host) = (time.device.as_secs_f64(), time.host.as_secs_f64());
        Ok((done, StepSeconds { step, host: Some(host) }))
    }

    fn time_selection(&self, _on: bool) {}

    fn take_selection_times(&self) -> Option<SelectionTimes> {
        None
    }

    fn fma(&self) -> Option<f64> {
        None
    }

    fn into_bandwidth(self) -> Result<f64> {
        Ok(self.copy_bandwidth().map_err(TinyServeError::from)?)
    }
}
