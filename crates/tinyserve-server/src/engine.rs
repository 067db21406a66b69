//! The engine as the server sees it: submissions go in, events of choices come out.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use serde::Serialize;
use tinyserve::model::{FinishReason, SamplingParams};
use tinyserve::{Prompt, StreamEvent, TinyServe, TinyServeError, TinyServeRequest};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::output::{ChoiceEvent, Ending, ScoredToken};
use crate::request::Settings;

/// One choice to be generated.
#[derive(Debug, Clone)]
pub(crate) struct Submission {
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: usize,
    /// How many alternatives are told with each token; `None` tells no probabilities.
    pub(crate) logprobs: Option<usize>,
    /// The same for the prompt's own tokens.
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) seed: Option<u64>,
    pub(crate) session: Option<String>,
    pub(crate) settings: Settings,
}

/// Requests that run and that wait.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Load {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
}

/// Totals since the start.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct EngineStats {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) pages_used: usize,
    pub(crate) pages_total: usize,
    pub(crate) generated_tokens: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_dense: u64,
    pub(crate) recall_sum: f64,
    pub(crate) recall_count: u64,
    pub(crate) layers: Vec<LayerStats>,
}

/// Totals of one layer.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct LayerStats {
    pub(crate) pages_read: u64,
    pub(crate) pages_total: u64,
}

struct Job {
    submission: Submission,
    index: usize,
    cancelled: Arc<AtomicBool>,
    events: UnboundedSender<(usize, ChoiceEvent)>,
}

/// One model that answers one choice after the other.
pub(crate) struct Engine {
    jobs: Mutex<Option<Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    shared: Arc<Shared>,
    most_waiting: usize,
}

#[derive(Default)]
struct Shared {
    dead: AtomicBool,
    running: AtomicUsize,
    waiting: AtomicUsize,
    generated: AtomicU64,
}

/// Requests under way; dropping it cancels what has not ended.
pub(crate) struct Running(Arc<AtomicBool>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Engine {
    pub(crate) fn new(engine: TinyServe, most_waiting: usize) -> Self {
        let (jobs, queue) = channel::<Job>();
        let shared = Arc::new(Shared::default());
        let inside = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            while let Ok(job) = queue.recv() {
                inside.waiting.fetch_sub(1, Ordering::AcqRel);
                inside.running.fetch_add(1, Ordering::AcqRel);
                run(&engine, &job, &inside);
                inside.running.fetch_sub(1, Ordering::AcqRel);
            }
            inside.dead.store(true, Ordering::Release);
        });
        Self {
            jobs: Mutex::new(Some(jobs)),
            thread: Mutex::new(Some(thread)),
            shared,
            most_waiting,
        }
    }

    pub(crate) fn is_alive(&self) -> bool {
        !self.shared.dead.load(Ordering::Acquire)
    }

    pub(crate) fn load(&self) -> Load {
        Load {
            running: self.shared.running.load(Ordering::Acquire),
            waiting: self.shared.waiting.load(Ordering::Acquire),
        }
    }

    pub(crate) fn stats(&self) -> EngineStats {
        let Load { running, waiting } = self.load();
        let generated_tokens = self.shared.generated.load(Ordering::Relaxed);
        EngineStats { running, waiting, generated_tokens, ..EngineStats::default() }
    }

    pub(crate) fn submit(
        &self,
        submissions: Vec<Submission>,
        _metrics: &Metrics,
    ) -> Result<(Running, UnboundedReceiver<(usize, ChoiceEvent)>), ApiError> {
        let count = submissions.len();
        let most = self.most_waiting;
        let admitted =
            self.shared.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, |waiting| {
                (waiting + count <= most.max(count)).then_some(waiting + count)
            });
        if admitted.is_err() {
            return Err(ApiError::overloaded(format!("{most} requests wait already, try again")));
        }
        let (events, receiver) = unbounded_channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(jobs) = &*jobs else { return Err(ApiError::unavailable("the engine stopped")) };
        for (index, submission) in submissions.into_iter().enumerate() {
            let job = Job {
                submission,
                index,
                cancelled: Arc::clone(&cancelled),
                events: events.clone(),
            };
            jobs.send(job).map_err(|_| ApiError::unavailable("the engine stopped"))?;
        }
        Ok((Running(cancelled), receiver))
    }

    pub(crate) fn shutdown(&self) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }
}

fn run(engine: &TinyServe, job: &Job, shared: &Shared) {
    let send = |event| {
        let _ = job.events.send((job.index, event));
    };
    if job.cancelled.load(Ordering::Acquire) {
        return;
    }
    let submission = &job.submission;
    let settings = &submission.settings;
    let request = TinyServeRequest {
        prompt: Prompt::Tokens(submission.prompt.clone()),
        max_tokens: submission.max_tokens.max(1),
        sampling: SamplingParams {
            temperature: settings.temperature,
            top_k: settings.top_k,
            top_p: settings.top_p,
            min_p: settings.min_p,
            repetition_penalty: settings.repetition_penalty,
            presence_penalty: settings.presence_penalty,
            frequency_penalty: settings.frequency_penalty,
            seed: submission.seed,
        },
        stop: settings.stop.clone(),
        ignore_eos: settings.ignore_eos,
        request_id: submission.id.clone(),
    };
    let mut rest = String::new();
    let served = engine.serve_stream(request, |event| {
        match event {
            StreamEvent::Prefill { done, total } if done == total => {
                send(ChoiceEvent::Prompt(Vec::new()))
            }
            StreamEvent::Prefill { .. } => {}
            StreamEvent::Token { id, logprob, text } => {
                shared.generated.fetch_add(1, Ordering::Relaxed);
                let token = ScoredToken { id, logprob: Some(logprob), top: vec![(id, logprob)] };
                if submission.max_tokens > 0 {
                    send(ChoiceEvent::Token { token, text });
                }
            }
            StreamEvent::Rest { text } => rest = text,
        }
        match job.cancelled.load(Ordering::Acquire) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    send(match served {
        Ok(response) => ChoiceEvent::End(Ending {
            text: rest,
            finish_reason: match response.finish_reason {
                FinishReason::Stop => "stop",
                _ => "length",
            },
            stop_reason: None,
            cached_tokens: 0,
            detail: None,
        }),
        Err(TinyServeError::Setting { field, found, expected }) => ChoiceEvent::Failed(
            ApiError::field(field, format!("{field} is {found}, expected {expected}")),
        ),
        Err(error) => ChoiceEvent::Failed(ApiError::internal(error.to_string())),
    });
}
