//! What is measured.

use anyhow::Result;
use tinyserve::TinyServeError;
use tinyserve::kernels::{Backend, Cpu, Cuda, SelectionTimes};

use super::bandwidth::read_bandwidth;

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
