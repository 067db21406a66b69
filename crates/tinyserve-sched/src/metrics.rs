//! Counters that the engine's thread writes and anybody reads: no lock, and nobody waits.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tinyserve_kernels::AttendStats;

/// [`Histogram::BOUNDS`].
const BOUNDS: [f64; 47] = [
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.025, 0.04, 0.05, 0.06, 0.075, 0.08,
    0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0,
    30.0, 40.0, 50.0, 60.0, 80.0, 120.0, 160.0, 240.0, 480.0, 640.0, 960.0, 1920.0, 2560.0, 5120.0,
    7680.0,
];

/// [`Histogram::TOKEN_BOUNDS`].
const TOKEN_BOUNDS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Durations in seconds, or numbers of tokens, counted by size.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// Upper bounds of the buckets: [`Self::BOUNDS`] or [`Self::TOKEN_BOUNDS`].
    pub bounds: &'static [f64],
    /// How many fell into each bucket and, last, beyond them.
    pub counts: Vec<u64>,
    /// Their sum.
    pub sum: f64,
}

impl Histogram {
    /// Bounds of durations, seconds: those of vLLM's histograms of latencies together, and finer
    /// ones below 10 ms.
    pub const BOUNDS: &'static [f64] = &BOUNDS;

    /// Bounds of numbers of tokens: vLLM's of the tokens of a step.
    pub const TOKEN_BOUNDS: &'static [f64] = &TOKEN_BOUNDS;

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their mean; `None` without any.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        let count = self.count();
        (count > 0).then(|| self.sum / count as f64)
    }

    /// What a share of `quantile` did not exceed, as well as buckets tell; `None` without any.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        let count = self.count();
        let rank = quantile.clamp(0.0, 1.0) * count as f64;
        let mut below = 0;
        for (bucket, &n) in self.counts.iter().enumerate() {
            if n > 0 && (below + n) as f64 >= rank {
                let low = if bucket == 0 { 0.0 } else { self.bounds[bucket - 1] };
                let high = self.bounds.get(bucket).copied().unwrap_or(low);
                let share = ((rank - below as f64) / n as f64).clamp(0.0, 1.0);
                return Some(low + share * (high - low));
            }
            below += n;
        }
        None
    }

    /// Adds another histogram's counts.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum += other.sum;
    }
}

/// A histogram of durations that is being written.
#[derive(Debug)]
pub(crate) struct HistogramCounters {
    counts: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Default for HistogramCounters {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)), nanoseconds: AtomicU64::new(0) }
    }
}

impl HistogramCounters {
    pub(crate) fn record(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BOUNDS.partition_point(|&bound| bound < seconds);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(duration.as_nanos() as u64, Ordering::Relaxed);
    }

    fn read(&self) -> Histogram {
        Histogram {
            bounds: &BOUNDS,
            counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: self.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9,
        }
    }
}

/// A histogram of numbers of tokens that is being written.
#[derive(Debug, Default)]
pub(crate) struct TokenCounters {
    counts: [AtomicU64; TOKEN_BOUNDS.len() + 1],
    sum: AtomicU64,
}

impl TokenCounters {
    pub(crate) fn record(&self, tokens: usize) {
        let bucket = TOKEN_BOUNDS.partition_point(|&bound| bound < tokens as f64);
        count(&self.counts[bucket], 1);
        count(&self.sum, tokens as u64);
    }

    fn read(&self) -> Histogram {
        Histogram {
            bounds: &TOKEN_BOUNDS,
            counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: self.sum.load(Ordering::Relaxed) as f64,
        }
    }
}

/// Pages of one layer, counted per sequence and KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerPages {
    /// Pages that were read.
    pub read: u64,
    /// Pages that dense attention would have read.
    pub total: u64,
}

/// The same while it is being written.
#[derive(Debug, Default)]
struct LayerCounters {
    read: AtomicU64,
    total: AtomicU64,
}

impl LayerCounters {
    fn read(&self) -> LayerPages {
        LayerPages {
            read: self.read.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        }
    }
}

/// Declares counters, their snapshot, and how snapshots are read and added up.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of an engine.
        #[derive(Debug, Default)]
        pub(crate) struct Metrics {
            $(pub(crate) $name: AtomicU64,)*
            pub(crate) queue_time: HistogramCounters,
            pub(crate) ttft: HistogramCounters,
            pub(crate) itl: HistogramCounters,
            pub(crate) tpot: HistogramCounters,
            pub(crate) e2e: HistogramCounters,
            pub(crate) step: HistogramCounters,
            pub(crate) step_tokens: TokenCounters,
            /// Requests that wait for their first step: callers count them when they submit.
            pub(crate) queued_requests: AtomicUsize,
            pub(crate) queued_tokens: AtomicUsize,
            recall_millionths: AtomicU64,
            /// Filled in by the first step that decodes.
            layers: OnceLock<Box<[LayerCounters]>>,
        }

        /// What an engine has done and holds: one look at its counters.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
            /// From submission to the first step, of each request.
            pub queue_time: Histogram,
            /// From submission to the first token (TTFT), of each request.
            pub ttft: Histogram,
            /// Between two tokens of a request (ITL).
            pub itl: Histogram,
            /// Mean time per token after the first (TPOT), of each finished request.
            pub tpot: Histogram,
            /// From submission to the end, of each finished request.
            pub e2e: Histogram,
            /// Of each step.
            pub step: Histogram,
            /// Tokens that each step computed, of prompts and of answers.
            pub step_tokens: Histogram,
            /// Requests that wait for their first step.
            pub queued_requests: u64,
            /// Their prompt tokens.
            pub queued_tokens: u64,
            /// Pages of each layer, in steps that only decode; empty before the first.
            pub layers: Vec<LayerPages>,
            /// Mean measured recall of page selection: the share of the dense attention mass that
            /// the selected pages held; `None` while no step that selects was measured.
            pub recall: Option<f64>,
        }

        impl Metrics {
            /// A look at the counters.
            pub(crate) fn read(&self) -> Stats {
                let count = self.recall_count.load(Ordering::Relaxed);
                let sum = self.recall_millionths.load(Ordering::Relaxed) as f64 / 1e6;
                Stats {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    queue_time: self.queue_time.read(),
                    ttft: self.ttft.read(),
                    itl: self.itl.read(),
                    tpot: self.tpot.read(),
                    e2e: self.e2e.read(),
                    step: self.step.read(),
                    step_tokens: self.step_tokens.read(),
                    queued_requests: self.queued_requests.load(Ordering::Relaxed) as u64,
                    queued_tokens: self.queued_tokens.load(Ordering::Relaxed) as u64,
                    layers: self.layers.get().map_or_else(Vec::new, |layers| {
                        layers.iter().map(LayerCounters::read).collect()
                    }),
                    recall: (count > 0).then(|| sum / count as f64),
                }
            }
        }

        impl Stats {
            /// Adds another engine's counters.
            pub fn add(&mut self, other: &Self) {
                let recalls = [(self.recall, self.recall_count), (other.recall, other.recall_count)];
                let sum: f64 = recalls.iter().map(|(mean, n)| mean.unwrap_or(0.0) * *n as f64).sum();
                $(self.$name += other.$name;)*
                self.recall = (self.recall_count > 0).then(|| sum / self.recall_count as f64);
                self.queue_time.add(&other.queue_time);
                self.ttft.add(&other.ttft);
                self.itl.add(&other.itl);
                self.tpot.add(&other.tpot);
                self.e2e.add(&other.e2e);
                self.step.add(&other.step);
                self.step_tokens.add(&other.step_tokens);
                self.queued_requests += other.queued_requests;
                self.queued_tokens += other.queued_tokens;
                let layers = self.layers.len().max(other.layers.len());
                self.layers.resize(layers, LayerPages::default());
                for (sum, more) in self.layers.iter_mut().zip(&other.layers) {
                    sum.read += more.read;
                    sum.total += more.total;
                }
            }
        }
    };
}

counters! {
    /// Requests that were taken.
    requests,
    /// Requests that were not taken because too many waited.
    rejected,
    /// Requests that a stop token, a stop text or a plugin ended.
    finished_stop,
    /// Requests that their token limit ended.
    finished_length,
    /// Requests that their callers ended.
    aborted,
    /// Requests that failed.
    failed,
    /// Prompt tokens of requests that started.
    prompt_tokens,
    /// Of those, tokens whose keys and values were in the cache already.
    cached_tokens,
    /// Tokens that were computed before a first token could be drawn, those computed again after a
    /// preemption included.
    prefill_tokens,
    /// Tokens that were generated.
    generation_tokens,
    /// Times that a request's pages were taken away.
    preemptions,
    /// Steps.
    steps,
    /// Times that the selection budget was moved to keep to a latency.
    budget_moves,
    /// Sequences that run now.
    running,
    /// Sequences that wait now, preempted ones included.
    waiting,
    /// Sessions that exist now.
    sessions,
    /// Sessions whose pages were taken away because memory was short.
    sessions_evicted,
    /// Sessions that were deleted because no request came for too long.
    sessions_expired,
    /// Pages of the cache.
    pages,
    /// Pages that running sequences and sessions hold now.
    pages_used,
    /// Pages that nobody uses and that are kept to be found again, until their room is needed.
    pages_idle,
    /// Prompts that were looked for among kept pages.
    prefix_lookups,
    /// Prompts that shared kept pages.
    prefix_hits,
    /// Tokens of kept pages that prompts shared.
    prefix_hit_tokens,
    /// Kept pages that were given up because a sequence needed room.
    prefix_evicted_for_room,
    /// Kept pages that were given up because as many were kept as may be.
    prefix_evicted_for_limit,
    /// Kept pages that were given up because somebody asked for it.
    prefix_evicted_by_clear,
    /// Pages that finished requests held at their ends, added up.
    finished_pages,
    /// Bytes that decode steps read in the cache.
    bytes_read,
    /// Bytes that dense decode steps would have read.
    bytes_dense,
    /// Attentions of a layer, over all sequences of a step.
    attention_calls,
    /// Of those, attentions that left pages out.
    sparse_operations,
    /// Of all, attentions whose time was taken.
    attention_calls_timed,
    /// What those took together, page selection included, nanoseconds.
    attention_nanoseconds,
    /// How many recalls were measured.
    recall_count,
    /// Pages that selections chose in steps that were compared with the one before.
    pages_compared,
    /// Of those, pages that the step before had chosen, too.
    pages_reused,
}

impl Metrics {
    /// The engine died: what was open has failed, and nothing is held any more.
    pub(crate) fn lose_everything(&self) {
        let ended = [&self.finished_stop, &self.finished_length, &self.aborted, &self.failed];
        let ended: u64 = ended.iter().map(|counter| counter.load(Ordering::Relaxed)).sum();
        count(&self.failed, self.requests.load(Ordering::Relaxed).saturating_sub(ended));
        for held in [&self.running, &self.waiting, &self.sessions] {
            gauge(held, 0);
        }
        for pages in [&self.pages, &self.pages_used, &self.pages_idle] {
            gauge(pages, 0);
        }
    }

    pub(crate) fn read_in_layers(&self, layers: &[AttendStats]) {
        let counters = self.layers.get_or_init(|| {
            layers.iter().map(|_| LayerCounters::default()).collect::<Vec<_>>().into()
        });
        for (counters, stats) in counters.iter().zip(layers) {
            count(&counters.read, stats.pages_read);
            count(&counters.total, stats.pages_total);
        }
    }

    /// Attention was computed in `layers`, in `time` together.
    pub(crate) fn attended(&self, layers: &[AttendStats], time: Option<Duration>) {
        let calls = layers.len() as u64;
        let sparse = layers.iter().filter(|stats| stats.pages_read < stats.pages_total).count();
        count(&self.attention_calls, calls);
        count(&self.sparse_operations, sparse as u64);
        if let Some(time) = time {
            count(&self.attention_calls_timed, calls);
            count(&self.attention_nanoseconds, time.as_nanos() as u64);
        }
    }

    pub(crate) fn read_by_decode(&self, stats: &AttendStats) {
        count(&self.bytes_read, stats.bytes_read);
        count(&self.bytes_dense, stats.bytes_dense);
        count(&self.recall_count, stats.recall_count);
        count(&self.recall_millionths, (stats.recall_sum * 1e6) as u64);
    }
}

impl Stats {
    /// Mean time of an attention of a layer; `None` while none was timed.
    #[must_use]
    pub fn attention_time(&self) -> Option<Duration> {
        let total = Duration::from_nanos(self.attention_nanoseconds);
        let calls = self.attention_calls_timed;
        (calls > 0).then(|| total.div_f64(calls as f64))
    }

    /// Reuse of page selection: the share of a step's pages that the step before had chosen, too;
    /// `None` while nothing was compared.
    #[must_use]
    pub fn reuse(&self) -> Option<f64> {
        let compared = self.pages_compared;
        (compared > 0).then(|| self.pages_reused as f64 / compared as f64)
    }
}

/// Adds to a counter.
pub(crate) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Sets a gauge.
pub(crate) fn gauge(gauge: &AtomicU64, n: usize) {
    gauge.store(n as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_ascend() {
        assert!(BOUNDS.is_sorted_by(|a, b| a < b));
        assert!(TOKEN_BOUNDS.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn quantiles_lie_in_their_buckets() {
        let counters = HistogramCounters::default();
        for ms in [1, 3, 3, 30] {
            counters.record(Duration::from_millis(ms));
        }
        let histogram = counters.read();
        assert_eq!(histogram.count(), 4);
        assert!((histogram.sum - 0.037).abs() < 1e-9);
        let median = histogram.quantile(0.5).unwrap();
        assert!((0.002..=0.005).contains(&median), "{median}");
        let last = histogram.quantile(1.0).unwrap();
        assert!((0.025..=0.04).contains(&last), "{last}");
        assert_eq!(HistogramCounters::default().read().quantile(0.5), None);
    }

    #[test]
    fn tokens_are_counted_up_to_their_bounds() {
        let counters = TokenCounters::default();
        [1, 8, 9, 20_000].into_iter().for_each(|tokens| counters.record(tokens));
        let histogram = counters.read();
        assert_eq!(histogram.counts[..3], [1, 1, 1]);
        assert_eq!(histogram.counts.last(), Some(&1));
        assert_eq!(histogram.mean(), Some(20_018.0 / 4.0));
    }

    #[test]
    fn snapshots_add_up() {
        let (one, other) = (Metrics::default(), Metrics::default());
        count(&one.requests, 2);
        count(&other.requests, 3);
        let recall =
            |sum, n| AttendStats { recall_sum: sum, recall_count: n, ..AttendStats::default() };
        one.read_by_decode(&recall(0.5, 1));
        other.read_by_decode(&recall(3.0, 3));
        let mut sum = one.read();
        sum.add(&other.read());
        assert_eq!(sum.requests, 5);
        assert!((sum.recall.unwrap() - 0.875).abs() < 1e-6);
    }
}
