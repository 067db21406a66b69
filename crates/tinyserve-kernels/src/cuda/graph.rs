//! Steps that come again as one graph.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaGraph, CudaStream, sys};

use super::device::{driver_error, message};
use super::error::CudaError;
use super::queue::Queue;

/// Launches below which a graph saves nothing.
const LEAST: usize = 8;
/// Steps that are kept as graphs; the oldest goes first.
const MOST_GRAPHS: usize = 64;
/// Steps that are remembered to see whether they come again.
const MOST_SEEN: usize = 64;

/// Steps that were captured, and those that were seen once.
///
/// A step is its launches: kernels, their grids, and every argument. So one for each bucket of batch
/// sizes and of lengths, as long as no buffer moves.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    captured: Vec<(Queue, Graph)>,
    seen: Vec<Queue>,
    replays: u64,
    captures: u64,
}

/// What to do with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Launch its kernels one by one.
    Launch,
    /// Capture it, then replay it.
    Capture,
    /// Replay the graph of this number.
    Replay(usize),
}

/// A graph of the driver's.
struct Graph(CudaGraph);

// SAFETY: the handles may be used by any thread that the context is bound to, as every call of the
// bindings binds it; one thread uses them at a time, since they lie behind the launcher's lock.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

impl Graphs {
    /// Steps that were replayed.
    pub(super) fn replays(&self) -> u64 {
        self.replays
    }

    /// Steps that were captured.
    pub(super) fn captures(&self) -> u64 {
        self.captures
    }

    /// What to do with `step`, which counts as seen from now on.
    pub(super) fn find(&mut self, step: &Queue) -> Step {
        if step.len() < LEAST {
            return Step::Launch;
        }
        if let Some(at) = self.captured.iter().position(|(captured, _)| captured == step) {
            return Step::Replay(at);
        }
        if let Some(at) = self.seen.iter().position(|seen| seen == step) {
            self.seen.remove(at);
            return Step::Capture;
        }
        if self.seen.len() == MOST_SEEN {
            self.seen.remove(0);
        }
        self.seen.push(step.clone());
        Step::Launch
    }

    /// Whether `step` is one for a graph, and has none.
    pub(super) fn has_to_capture(&self, step: &Queue) -> bool {
        step.len() >= LEAST && !self.captured.iter().any(|(captured, _)| captured == step)
    }

    /// Keeps what was captured of `step`; its number.
    pub(super) fn keep(&mut self, step: &Queue, graph: CudaGraph) -> usize {
        if self.captured.len() == MOST_GRAPHS {
            self.captured.remove(0);
        }
        self.captures += 1;
        self.captured.push((step.clone(), Graph(graph)));
        self.captured.len() - 1
    }

    /// Launches a graph.
    pub(super) fn replay(&mut self, number: usize) -> Result<(), CudaError> {
        self.replays += 1;
        let (step, graph) = &self.captured[number];
        graph.0.launch().map_err(|error| {
            let name = |kernel: Option<&'static str>| kernel.unwrap_or_default().to_owned();
            let mut kernels = step.iter().map(|(kernel, ..)| kernel);
            CudaError::Step {
                launches: step.len(),
                first: name(kernels.next()),
                last: name(kernels.last()),
                message: message(error),
            }
        })
    }
}

/// While it is held, no capture of this process is under way: for calls that wait for all work on a
/// device, as loading code does, and so end the captures of every thread.
pub(super) fn undisturbed() -> MutexGuard<'static, ()> {
    static CAPTURES: Mutex<()> = Mutex::new(());
    CAPTURES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Captures what `launch` launches on `stream`; it loads no code.
pub(super) fn capture(
    stream: &Arc<CudaStream>,
    launch: impl FnOnce() -> Result<(), CudaError>,
) -> Result<CudaGraph, CudaError> {
    let _guard = undisturbed();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(driver_error("beginning a capture"))?;
    let launched = launch();
    // Ended in any case: the stream would take nothing else.
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    launched?;
    match graph.map_err(driver_error("ending a capture"))? {
        Some(graph) => Ok(graph),
        None => Err(CudaError::Driver {
            what: "ending a capture",
            message: "it holds nothing".to_owned(),
        }),
    }
}
