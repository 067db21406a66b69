//! Launching kernels on the device's one stream.

use std::ffi::c_void;
use std::ops::{Deref, Range};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, sys};

use super::code::{Code, Kernel};
use super::device::{CudaDevice, message};
use super::error::CudaError;
use super::graph::{Graphs, Step, capture, undisturbed};
use super::queue::Queue;

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

    /// Where its value lies, for the driver.
    fn value(&self) -> *mut c_void {
        let value: *const c_void = match self {
            Self::Pointer(pointer) => ptr::from_ref(pointer).cast(),
            Self::Whole(whole) => ptr::from_ref(whole).cast(),
            Self::Number(number) => ptr::from_ref(number).cast(),
            Self::Shape(shape) => ptr::from_ref(shape).cast(),
        };
        value.cast_mut()
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

/// A launch that may begin while the one before still runs.
const OVERLAP: sys::CUlaunchAttributeID =
    sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;

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

/// The stream, the kernels for it, and the launches that wait.
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
    code: Code,
    waiting: Mutex<Waiting>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Unloading code waits for what runs: the wait is here, where it ends nobody's capture. What
        // goes wrong in the stream was told, or nobody is left to ask.
        let _ = self.stream.synchronize();
        self.waiting().graphs = Graphs::default();
        let _guard = undisturbed();
        self.code.clear();
    }
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
    pub(super) fn new(
        context: Arc<CudaContext>,
        stream: Arc<CudaStream>,
        device: &CudaDevice,
    ) -> Self {
        let code = Code::new(context.clone(), device);
        Self(Arc::new(Stream { context, stream, code, waiting: Mutex::default() }))
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
        queue.iter().try_for_each(|(kernel, ..)| self.code.kernel(kernel).map(drop))?;
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
        let Kernel { function, overlaps } = self.code.kernel(kernel)?;
        let mut args: Vec<*mut c_void> = args.iter().map(Arg::value).collect();
        let mut attributes = [sys::CUlaunchAttribute {
            id: OVERLAP,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        }];
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0,
            gridDimY: grid.1,
            gridDimZ: grid.2,
            blockDimX: block.0,
            blockDimY: block.1,
            blockDimZ: block.2,
            sharedMemBytes: shared,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(overlaps),
        };
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the caller's promise; every pointer is to a value that outlives the call, which
        // copies them.
        let launched = unsafe {
            let function = function.cu_function();
            sys::cuLaunchKernelEx(&raw const config, function, args.as_mut_ptr(), ptr::null_mut())
        };
        launched.result().map_err(failed)
    }
}
