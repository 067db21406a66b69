//! Loading kernels from the embedded PTX, and launching them on the device's one stream.

use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use super::device::message;
use super::error::CudaError;
use super::graph::{Graphs, Step, capture, undisturbed};
use super::queue::Queue;

macro_rules! modules {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../ptx/", $name, ".ptx")))),*]
    };
}

/// What `cargo xtask build-kernels` made of `kernels/`.
const MODULES: &[(&str, &str)] = modules!(
    "activate",
    "append_kv",
    "attend_bf16",
    "attend_f16",
    "attend_f32",
    "attend_int4",
    "attend_int8",
    "combine",
    "copy_page",
    "embed",
    "fused_decode_bf16",
    "fused_decode_f16",
    "fused_decode_f32",
    "fused_decode_int4",
    "fused_decode_int8",
    "gather_pages",
    "gemm",
    "gemv",
    "gemv_quantised",
    "move_tokens",
    "norm",
    "observe",
    "pack_pages",
    "project_bf16",
    "project_f16",
    "project_f32",
    "rotary",
    "rows",
    "score_moments",
    "score_pages",
    "seal_pages",
    "select_pages",
    "split_rows",
    "top_logits",
);

/// An argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Arg {
    /// An address on the device; 0 is null.
    Pointer(u64),
    /// A whole number.
    Whole(i32),
    /// A number.
    Number(f32),
    /// `ts::PageShape`: KV heads, channels, tokens of a page.
    Shape([i32; 3]),
}

impl Arg {
    /// A count, as kernels take it.
    pub(super) fn count(n: usize) -> Self {
        // What does not fit was refused when memory was asked for.
        Self::Whole(i32::try_from(n).unwrap_or(i32::MAX))
    }

    /// The address `bytes` behind it.
    pub(super) fn offset(self, bytes: usize) -> Self {
        match self {
            Self::Pointer(address) => Self::Pointer(address + bytes as u64),
            other => other,
        }
    }

    /// The address that it is.
    pub(super) fn address(self) -> u64 {
        match self {
            Self::Pointer(address) => address,
            _ => 0,
        }
    }

    /// The whole numbers that it is.
    fn sizes(&self) -> &[i32] {
        match self {
            Self::Pointer(_) | Self::Number(_) => &[],
            Self::Whole(whole) => std::slice::from_ref(whole),
            Self::Shape(shape) => shape,
        }
    }

    /// A flag, as kernels take it.
    pub(super) fn flag(flag: bool) -> Self {
        Self::Whole(i32::from(flag))
    }
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) grid: (u32, u32, u32),
    pub(super) block: (u32, u32, u32),
    /// Bytes of dynamic shared memory.
    pub(super) shared: u32,
}

impl Shape {
    /// `x` by `y` by `z` blocks of `threads` threads.
    pub(super) fn new((x, y, z): (usize, usize, usize), threads: u32) -> Self {
        let of = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Self { grid: (of(x), of(y), of(z)), block: (threads, 1, 1), shared: 0 }
    }
}

/// The stream, the kernels that were asked for so far, and the launches that wait.
#[derive(Debug, Clone)]
pub(super) struct Launcher(Arc<Stream>);

impl Deref for Launcher {
    type Target = Stream;

    fn deref(&self) -> &Stream {
        &self.0
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    loaded: Mutex<Loaded>,
    waiting: Mutex<Waiting>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Unloading code waits for what runs: the wait is here, where it ends nobody's capture. What
        // goes wrong in the stream was told, or nobody is left to ask.
        let _ = self.stream.synchronize();
        self.waiting().graphs = Graphs::default();
        let _guard = undisturbed();
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        loaded.kernels.clear();
        loaded.modules.clear();
    }
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    kernels: HashMap<&'static str, CudaFunction>,
}

/// Launches that are kept back, so that those of a whole step can be replayed together.
#[derive(Debug, Default)]
struct Waiting {
    /// Whether launches are kept back at all.
    keeps: bool,
    queue: Queue,
    graphs: Graphs,
    flushes: u64,
    /// What went wrong where nobody could be told.
    failure: Option<CudaError>,
}

impl Launcher {
    pub(super) fn new(context: Arc<CudaContext>, stream: Arc<CudaStream>) -> Self {
        let (loaded, waiting) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Stream { context, stream, loaded, waiting }))
    }
}

impl Stream {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps launches back from now on, or launches what waits and everything after it at once.
    pub(super) fn keep_back(&self, keeps: bool) -> Result<(), CudaError> {
        if !keeps {
            self.flush()?;
        }
        self.waiting().keeps = keeps;
        Ok(())
    }

    /// Launches what waits, and after it, at once, whatever `work` launches: what goes to the stream
    /// past the queue, as a library's kernels do, is then in its place among them.
    pub(super) fn directly<T>(
        &self,
        work: impl FnOnce() -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        self.flush()?;
        let mut waiting = self.waiting();
        waiting.flushes += 1;
        let kept = std::mem::replace(&mut waiting.keeps, false);
        drop(waiting);
        let done = work();
        self.waiting().keeps = kept;
        done
    }

    /// Steps that were replayed as graphs.
    pub(super) fn replays(&self) -> u64 {
        self.waiting().graphs.replays()
    }

    /// Steps that were captured as graphs.
    pub(super) fn captures(&self) -> u64 {
        self.waiting().graphs.captures()
    }

    /// Launches what waits: as a graph, if the same launches came before.
    pub(super) fn flush(&self) -> Result<(), CudaError> {
        let mut waiting = self.waiting();
        let Waiting { queue, graphs, failure, flushes, .. } = &mut *waiting;
        if let Some(error) = failure.take() {
            queue.clear();
            return Err(error);
        }
        let done = match graphs.find(queue) {
            Step::Launch => self.submit_all(queue),
            Step::Replay(number) => graphs.replay(number),
            Step::Capture => match self.capture(queue, graphs) {
                Ok(Some(number)) => graphs.replay(number),
                Ok(None) => self.submit_all(queue),
                Err(error) => Err(error),
            },
        };
        *flushes += u64::from(queue.len() > 0);
        queue.clear();
        done
    }

    /// Times that launches which waited were launched.
    pub(super) fn flushes(&self) -> u64 {
        self.waiting().flushes
    }

    /// Captures what waits, if it is a step for a graph: to launch it then takes one call.
    pub(super) fn capture_waiting(&self) -> Result<(), CudaError> {
        let Waiting { queue, graphs, .. } = &mut *self.waiting();
        if graphs.has_to_capture(queue) { self.capture(queue, graphs).map(drop) } else { Ok(()) }
    }

    /// Captures `queue`, whose graph then has a number; none when the capture fails, of which
    /// nothing ran. Somebody else's call may have ended it; a kernel that fails does so when it is
    /// launched, too, and is named. The step is captured when it comes again twice.
    fn capture(&self, queue: &Queue, graphs: &mut Graphs) -> Result<Option<usize>, CudaError> {
        // Code is loaded before: that would end captures.
        queue.iter().try_for_each(|(kernel, ..)| self.kernel(kernel).map(drop))?;
        let graph = capture(&self.stream, || self.submit_all(queue));
        Ok(graph.ok().map(|graph| graphs.keep(queue, graph)))
    }

    fn submit_all(&self, queue: &Queue) -> Result<(), CudaError> {
        queue.iter().try_for_each(|(kernel, shape, args)| {
            // SAFETY: what was promised when it was queued still holds: whoever changes or frees
            // memory that a waiting launch takes launches it before.
            unsafe { self.submit(kernel, shape, args) }
        })
    }

    /// Before `bytes` on the device are written: launches what waits, if it takes one of them.
    pub(super) fn before_writing(&self, bytes: &Range<u64>) -> Result<(), CudaError> {
        if self.waiting().queue.reaches(bytes) { self.flush() } else { Ok(()) }
    }

    /// Before `bytes` on the device are freed, as [`Self::before_writing`]; what goes wrong is told
    /// by the next one who asks.
    pub(super) fn before_freeing(&self, bytes: &Range<u64>) {
        if let Err(error) = self.before_writing(bytes) {
            self.waiting().failure = Some(error);
        }
    }

    /// Launches `kernel`, or queues it; nothing is waited for.
    ///
    /// # Safety
    /// The arguments are those of the kernel in `kernels/`, in its order, and every pointer is to
    /// device memory of the size that the kernel's comment states for these numbers.
    pub(super) unsafe fn launch(
        &self,
        kernel: &'static str,
        shape: Shape,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let grid = shape.grid;
        // An empty grid is an error to the driver, and nothing to do for us.
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        let mut waiting = self.waiting();
        if waiting.keeps {
            waiting.queue.push(kernel, shape, args);
            return Ok(());
        }
        drop(waiting);
        // SAFETY: the caller's promise.
        unsafe { self.submit(kernel, shape, args) }
    }

    /// Gives a launch to the driver.
    ///
    /// # Safety
    /// As [`Self::launch`].
    unsafe fn submit(
        &self,
        kernel: &'static str,
        Shape { grid, block, shared }: Shape,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let failed = |error| CudaError::Launch {
            kernel: kernel.to_owned(),
            grid,
            block,
            sizes: args.iter().flat_map(Arg::sizes).copied().collect(),
            message: message(error),
        };
        let function = self.kernel(kernel)?;
        let mut launch = self.stream.launch_builder(&function);
        for arg in args {
            match arg {
                Arg::Pointer(pointer) => launch.arg(pointer),
                Arg::Whole(whole) => launch.arg(whole),
                Arg::Number(number) => launch.arg(number),
                Arg::Shape(shape) => launch.arg(shape),
            };
        }
        let config = LaunchConfig { grid_dim: grid, block_dim: block, shared_mem_bytes: shared };
        // SAFETY: the caller's promise.
        unsafe { launch.launch(config) }.map(drop).map_err(failed)
    }

    /// A kernel by its name; its module is loaded, and compiled for the device, when first used.
    fn kernel(&self, name: &'static str) -> Result<CudaFunction, CudaError> {
        let loaded = || self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded().kernels.get(name) {
            return Ok(kernel.clone());
        }
        let _guard = undisturbed();
        let mut loaded = loaded();
        let Loaded { modules, kernels } = &mut *loaded;
        let failed = |message| CudaError::Driver {
            what: "loading a kernel",
            message: format!("{name}: {message}"),
        };
        let entry = format!(".entry {name}(");
        let Some((module, ptx)) = MODULES.iter().find(|(_, ptx)| ptx.contains(&entry)) else {
            return Err(failed("no such kernel in this binary".to_owned()));
        };
        let module = match modules.get(module) {
            Some(module) => module.clone(),
            None => {
                let fresh = self.context.load_module(Ptx::from_src(*ptx));
                let fresh = fresh.map_err(|error| failed(message(error)))?;
                modules.insert(module, fresh.clone());
                fresh
            }
        };
        let kernel = module.load_function(name).map_err(|error| failed(message(error)))?;
        kernels.insert(name, kernel.clone());
        Ok(kernel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_is_embedded_and_every_kernel_is_in_one() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/ptx");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let names: Vec<String> = MODULES.iter().map(|(name, _)| format!("{name}.ptx")).collect();
        assert_eq!(files, names);
        let mut entries: Vec<&str> = MODULES
            .iter()
            .flat_map(|(_, ptx)| ptx.split(".entry ").skip(1))
            .filter_map(|rest| rest.split('(').next())
            .collect();
        let all = entries.len();
        entries.sort_unstable();
        entries.dedup();
        assert_eq!(entries.len(), all, "two kernels have one name");
    }
}
