//! Requests that arrive at given times, sent to an engine in this process, and what became of them.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::Serialize;
use tinyserve::TinyServeError;
use tinyserve::model::SamplingParams;
use tinyserve::sched::{AdmissionError, Engine, Event, EventStream, Request};

use super::statistics::{deviation, mean, quantile};

/// A request and when it arrives.
#[derive(Debug, Clone)]
pub(super) struct Arrival {
    /// From the start.
    pub(super) at: Duration,
    pub(super) prompt: Vec<u32>,
    /// Tokens that it generates, whatever they are.
    pub(super) tokens: usize,
    /// Tokens after which its caller loses interest, if it does.
    pub(super) leaves_after: Option<usize>,
}

/// What became of a request.
#[derive(Debug, Clone, Default)]
struct Answered {
    prompt: usize,
    cached: usize,
    tokens: usize,
    ttft: Duration,
    e2e: Duration,
    preemptions: u32,
}

/// What became of all.
#[derive(Debug, Default)]
pub(super) struct Load {
    answered: Vec<Answered>,
    /// Times between two tokens of a request, seconds.
    itl: Vec<f64>,
    failed: usize,
    aborted: usize,
    /// Requests that were not taken because too many waited.
    rejected: usize,
    duration: Duration,
    /// Until every request had its first token.
    prefilled: Duration,
    /// Tokens that came later.
    tokens_after: usize,
}

impl Load {
    /// Adds what became of other requests, which came later.
    pub(super) fn add(&mut self, other: Self) {
        self.answered.extend(other.answered);
        self.itl.extend(other.itl);
        self.failed += other.failed;
        self.aborted += other.aborted;
        self.rejected += other.rejected;
        self.duration += other.duration;
        self.prefilled += other.prefilled;
        self.tokens_after += other.tokens_after;
    }

    /// Prompt tokens per second until every request had its first token.
    pub(super) fn prefill_speed(&self) -> f64 {
        let prompts: usize = self.answered.iter().map(|one| one.prompt).sum();
        prompts as f64 / self.prefilled.as_secs_f64()
    }

    /// Generated tokens per second from then on.
    pub(super) fn decode_speed(&self) -> f64 {
        self.tokens_after as f64 / (self.duration - self.prefilled).as_secs_f64()
    }

    fn ended(&self) -> usize {
        self.answered.len() + self.failed + self.aborted + self.rejected
    }
}

/// A request that is not answered yet.
struct Open {
    stream: EventStream,
    sent: Instant,
    last: Option<Instant>,
    tokens: usize,
    leaves_after: Option<usize>,
    answered: Answered,
}

impl Open {
    /// Aborts it when its caller has seen enough.
    fn leave(&self) {
        if self.leaves_after == Some(self.tokens) {
            self.stream.abort();
        }
    }
}

/// Wakes this thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Sends `arrivals`, in order, each at its time and no more than `most` at once, and waits for all.
pub(super) fn replay(
    engine: &Engine,
    arrivals: Vec<Arrival>,
    most: usize,
    mut progress: impl FnMut(usize, usize),
) -> Result<Load> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let total = arrivals.len();
    let mut arrivals: VecDeque<_> = arrivals.into();
    let (mut open, mut load) = (Vec::new(), Load::default());
    let start = Instant::now();
    let mut first_tokens = 0;
    while !(arrivals.is_empty() && open.is_empty()) {
        while open.len() < most
            && let Some(arrival) = arrivals.pop_front_if(|next| next.at <= start.elapsed())
        {
            match send(engine, arrival)? {
                Some(request) => open.push(request),
                None => load.rejected += 1,
            }
        }
        open.retain_mut(|request: &mut Open| {
            while let Poll::Ready(Some(event)) = request.stream.poll_next(&mut context) {
                match event {
                    Event::Token(_) => {
                        let now = Instant::now();
                        match request.last.replace(now) {
                            Some(last) => load.itl.push((now - last).as_secs_f64()),
                            None => {
                                request.answered.ttft = now - request.sent;
                                first_tokens += 1;
                                if first_tokens == total {
                                    load.prefilled = now - start;
                                }
                            }
                        }
                        let all_are_here = first_tokens == total && now - start > load.prefilled;
                        load.tokens_after += usize::from(all_are_here);
                        request.tokens += 1;
                        request.leave();
                    }
                    Event::Finished(finished) => {
                        let summary = &finished.summary;
                        request.answered.cached = summary.usage.cached_tokens;
                        request.answered.tokens = summary.usage.completion_tokens;
                        request.answered.e2e = request.sent.elapsed();
                        request.answered.preemptions = summary.timings.preemptions;
                        load.answered.push(std::mem::take(&mut request.answered));
                        return false;
                    }
                    Event::Failed(_) => {
                        load.failed += 1;
                        return false;
                    }
                    Event::Aborted(_) => {
                        load.aborted += 1;
                        return false;
                    }
                    _ => {}
                }
            }
            true
        });
        progress(load.ended(), total);
        match arrivals.front().filter(|_| open.len() < most) {
            Some(next) => {
                std::thread::park_timeout(next.at.saturating_sub(start.elapsed()));
            }
            None if open.is_empty() => {}
            None => std::thread::park(),
        }
    }
    load.duration = start.elapsed();
    if load.answered.is_empty() {
        return Err(anyhow!("none of the {total} requests was answered"));
    }
    Ok(load)
}

/// `None` when too many requests wait already.
fn send(engine: &Engine, arrival: Arrival) -> Result<Option<Open>> {
    let answered = Answered { prompt: arrival.prompt.len(), ..Answered::default() };
    let sent = Instant::now();
    let stream = engine.submit(Request {
        ignore_eos: true,
        ..Request::new(arrival.prompt).max_tokens(arrival.tokens).sampling(SamplingParams::greedy())
    });
    let stream = match stream {
        Err(AdmissionError::QueueFull { .. }) => return Ok(None),
        stream => stream.map_err(TinyServeError::from)?,
    };
    let leaves_after = arrival.leaves_after;
    let open = Open { stream, sent, last: None, tokens: 0, leaves_after, answered };
    open.leave();
    Ok(Some(open))
}

/// Times of one kind, milliseconds.
#[derive(Debug, Clone, Copy)]
struct Times {
    mean: f64,
    median: f64,
    std: f64,
    p99: f64,
}

impl Times {
    fn of(seconds: &[f64]) -> Self {
        let ms: Vec<_> = seconds.iter().map(|s| s * 1e3).collect();
        // Without a second token there is no time between tokens; vLLM says 0, too.
        let some = |value: f64| if value.is_nan() { 0.0 } else { value };
        Self {
            mean: some(mean(&ms)),
            median: some(quantile(&ms, 0.5)),
            std: deviation(&ms),
            p99: some(quantile(&ms, 0.99)),
        }
    }
}

/// The figures of a load, by the names of `vllm bench serve`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    pub(super) duration: f64,
    pub(super) completed: usize,
    pub(super) failed: usize,
    pub(super) aborted: usize,
    pub(super) rejected: usize,
    pub(super) total_input_tokens: usize,
    pub(super) total_cached_tokens: usize,
    pub(super) total_output_tokens: usize,
    pub(super) request_throughput: f64,
    pub(super) output_throughput: f64,
    pub(super) total_token_throughput: f64,
    mean_ttft_ms: f64,
    median_ttft_ms: f64,
    std_ttft_ms: f64,
    p99_ttft_ms: f64,
    mean_tpot_ms: f64,
    median_tpot_ms: f64,
    std_tpot_ms: f64,
    p99_tpot_ms: f64,
    mean_itl_ms: f64,
    median_itl_ms: f64,
    std_itl_ms: f64,
    p99_itl_ms: f64,
    preemptions: u32,
}

impl Figures {
    pub(super) fn of(load: &Load) -> Self {
        let answered = &load.answered;
        let seconds = load.duration.as_secs_f64();
        let sum = |of: fn(&Answered) -> usize| answered.iter().map(of).sum::<usize>();
        let ttft: Vec<_> = answered.iter().map(|one| one.ttft.as_secs_f64()).collect();
        let tpot = answered
            .iter()
            .filter(|one| one.tokens > 1)
            .map(|one| (one.e2e.saturating_sub(one.ttft)).as_secs_f64() / (one.tokens - 1) as f64);
        let tpot: Vec<_> = tpot.collect();
        let (ttft, tpot, itl) = (Times::of(&ttft), Times::of(&tpot), Times::of(&load.itl));
        let (input, output) = (sum(|one| one.prompt), sum(|one| one.tokens));
        Self {
            duration: seconds,
            completed: answered.len(),
            failed: load.failed,
            aborted: load.aborted,
            rejected: load.rejected,
            total_input_tokens: input,
            total_cached_tokens: sum(|one| one.cached),
            total_output_tokens: output,
            request_throughput: answered.len() as f64 / seconds,
            output_throughput: output as f64 / seconds,
            total_token_throughput: (input + output) as f64 / seconds,
            mean_ttft_ms: ttft.mean,
            median_ttft_ms: ttft.median,
            std_ttft_ms: ttft.std,
            p99_ttft_ms: ttft.p99,
            mean_tpot_ms: tpot.mean,
            median_tpot_ms: tpot.median,
            std_tpot_ms: tpot.std,
            p99_tpot_ms: tpot.p99,
            mean_itl_ms: itl.mean,
            median_itl_ms: itl.median,
            std_itl_ms: itl.std,
            p99_itl_ms: itl.p99,
            preemptions: answered.iter().map(|one| one.preemptions).sum(),
        }
    }

    /// vLLM's block of lines, with `more` lines at the end of its first part.
    pub(super) fn block(&self, more: &[(&str, String)]) -> String {
        let mut text = format!("{:=^50}\n", " Serving Benchmark Result ");
        let counts = |value: usize| value.to_string();
        let figures = |value: f64| format!("{value:.2}");
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<40} {value:<10}");
        };
        line("Successful requests:", counts(self.completed));
        line("Failed requests:", counts(self.failed));
        for (name, requests) in
            [("Aborted requests:", self.aborted), ("Rejected requests:", self.rejected)]
        {
            if requests > 0 {
                line(name, counts(requests));
            }
        }
        line("Benchmark duration (s):", figures(self.duration));
        line("Total input tokens:", counts(self.total_input_tokens));
        line("Total cached tokens:", counts(self.total_cached_tokens));
        line("Total generated tokens:", counts(self.total_output_tokens));
        line("Preemptions:", counts(self.preemptions as usize));
        line("Request throughput (req/s):", figures(self.request_throughput));
        line("Output token throughput (tok/s):", figures(self.output_throughput));
        line("Total Token throughput (tok/s):", figures(self.total_token_throughput));
        more.iter().for_each(|(name, value)| line(name, value.clone()));
        let parts = [
            (
                "Time to First Token",
                "TTFT",
                [self.mean_ttft_ms, self.median_ttft_ms, self.p99_ttft_ms],
            ),
            (
                "Time per Output Token (excl. 1st token)",
                "TPOT",
                [self.mean_tpot_ms, self.median_tpot_ms, self.p99_tpot_ms],
            ),
            ("Inter-token Latency", "ITL", [self.mean_itl_ms, self.median_itl_ms, self.p99_itl_ms]),
        ];
        for (title, short, values) in parts {
            let _ = writeln!(text, "{title:-^50}");
            for (which, value) in ["Mean", "Median", "P99"].into_iter().zip(values) {
                let name = format!("{which} {short} (ms):");
                let _ = writeln!(text, "{name:<40} {value:<10.2}");
            }
        }
        let _ = writeln!(text, "{:=^50}", "");
        text
    }
}
