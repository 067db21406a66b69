//! What the engine counts, in Prometheus's words.

use std::fmt::{self, Error};
use std::sync::OnceLock;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use tinyserve::plugins::PluginStats;
use tinyserve::sched::{Histogram, Stats};

use super::buckets;

/// Where a scrape looks: empty until the engine is there.
#[derive(Default)]
pub(crate) struct Source(pub(crate) OnceLock<Box<dyn Fn() -> EngineView + Send + Sync>>);

/// One look at the engines, which share model, settings and plugins.
pub(crate) struct EngineView {
    /// What each of them counts.
    pub(crate) engines: Vec<Stats>,
    pub(crate) plugins: Vec<PluginStats>,
    pub(crate) page_size: usize,
    pub(crate) page_bytes: usize,
    pub(crate) cache_dtype: &'static str,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Source")
    }
}

impl Collector for Source {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        match self.0.get() {
            Some(look) => {
                let view = look();
                Page { encoder, engines: &view.engines }.write(&view)
            }
            None => Ok(()),
        }
    }
}

type Labels = Vec<(&'static str, String)>;

struct Page<'a, 'e> {
    encoder: DescriptorEncoder<'a>,
    engines: &'e [Stats],
}

impl Page<'_, '_> {
    fn write(&mut self, view: &EngineView) -> Result<(), Error> {
        self.gauge("vllm:num_requests_running", "Sequences that run now", |stats| {
            stats.running as f64
        })?;
        self.gauge("vllm:num_requests_waiting", "Sequences that wait now", |stats| {
            stats.waiting as f64
        })?;
        self.gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the cache's pages that are held, 0 to 1",
            |stats| stats.pages_used as f64 / stats.pages.max(1) as f64,
        )?;
        self.labelled(
            ("vllm:cache_config_info", "How the cache is laid out", MetricType::Gauge),
            |stats| {
                let labels = vec![
                    ("block_size", view.page_size.to_string()),
                    ("num_gpu_blocks", stats.pages.to_string()),
                    ("cache_dtype", view.cache_dtype.to_owned()),
                    ("bytes_per_block", view.page_bytes.to_string()),
                ];
                vec![(labels, 1)]
            },
        )?;
        self.counter("vllm:prompt_tokens", "Prompt tokens of requests that started", |stats| {
            stats.prompt_tokens
        })?;
        self.counter("vllm:generation_tokens", "Tokens that were generated", |stats| {
            stats.generation_tokens
        })?;
        self.counter(
            "vllm:num_preemptions",
            "Times that a sequence's pages were taken away",
            |stats| stats.preemptions,
        )?;
        self.counter(
            "vllm:prefix_cache_queries",
            "Prompt tokens that were looked for in the cache",
            |stats| stats.prompt_tokens,
        )?;
        self.counter("vllm:prefix_cache_hits", "Prompt tokens that were in the cache", |stats| {
            stats.cached_tokens
        })?;
        let by = |label, value: &str| vec![(label, value.to_owned())];
        self.labelled(
            ("vllm:request_success", "Choices by how they ended", MetricType::Counter),
            |stats| {
                vec![
                    (by("finished_reason", "stop"), stats.finished_stop),
                    (by("finished_reason", "length"), stats.finished_length),
                    (by("finished_reason", "abort"), stats.aborted),
                    (by("finished_reason", "error"), stats.failed),
                ]
            },
        )?;
        self.labelled(
            ("vllm:admission_rejections", "Choices that were not taken", MetricType::Counter),
            |stats| vec![(by("reason", "queue_full"), stats.rejected)],
        )?;
        type Timed = fn(&Stats) -> &Histogram;
        let histograms: [(&str, &str, Timed, &[f64]); 7] = [
            (
                "vllm:time_to_first_token_seconds",
                "From submission to the first token",
                |stats| &stats.ttft,
                buckets::TTFT,
            ),
            (
                "vllm:inter_token_latency_seconds",
                "Between two tokens of a sequence",
                |stats| &stats.itl,
                buckets::TOKEN,
            ),
            (
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first",
                |stats| &stats.tpot,
                buckets::TOKEN,
            ),
            (
                "vllm:e2e_request_latency_seconds",
                "From submission to the end",
                |stats| &stats.e2e,
                buckets::LATENCY,
            ),
            (
                "vllm:request_queue_time_seconds",
                "From submission to the first step",
                |stats| &stats.queue_time,
                buckets::LATENCY,
            ),
            (
                "vllm:iteration_tokens_total",
                "Tokens that a step computed, of prompts and of answers",
                |stats| &stats.step_tokens,
                Histogram::TOKEN_BOUNDS,
            ),
            ("tinyserve:step_seconds", "Time of a step", |stats| &stats.step, buckets::TOKEN),
        ];
        for (name, help, histogram, bounds) in histograms {
            self.histogram(name, help, histogram, bounds)?;
        }
        self.own()?;
        self.plugins(&view.plugins)
    }

    /// What only this engine knows.
    fn own(&mut self) -> Result<(), Error> {
        self.gauge("tinyserve:pages", "Pages of the cache", |stats| stats.pages as f64)?;
        self.gauge("tinyserve:pages_used", "Pages that are held", |stats| stats.pages_used as f64)?;
        self.gauge("tinyserve:sessions", "Sessions that exist now", |stats| stats.sessions as f64)?;
        self.counter(
            "tinyserve:sessions_evicted",
            "Sessions whose pages were taken away",
            |stats| stats.sessions_evicted,
        )?;
        self.counter(
            "tinyserve:sessions_expired",
            "Sessions that nobody used for too long",
            |stats| stats.sessions_expired,
        )?;
        self.counter(
            "tinyserve:prefix_lookups",
            "Prompts that were looked for among kept pages",
            |stats| stats.prefix_lookups,
        )?;
        self.counter("tinyserve:prefix_hits", "Prompts that shared kept pages", |stats| {
            stats.prefix_hits
        })?;
        let cause = |cause: &str, pages| (vec![("cause", cause.to_owned())], pages);
        self.labelled(
            ("tinyserve:prefix_evicted_pages", "Kept pages given up", MetricType::Counter),
            |stats| {
                vec![
                    cause("room", stats.prefix_evicted_for_room),
                    cause("limit", stats.prefix_evicted_for_limit),
                    cause("clear", stats.prefix_evicted_by_clear),
                ]
            },
        )?;
        self.counter("tinyserve:steps", "Steps", |stats| stats.steps)?;
        self.counter(
            "tinyserve:prefill_tokens",
            "Tokens that were computed for prompts",
            |stats| stats.prefill_tokens,
        )?;
        self.counter(
            "tinyserve:cache_bytes_read",
            "Bytes that decode steps read in the cache",
            |stats| stats.bytes_read,
        )?;
        self.counter(
            "tinyserve:cache_bytes_dense",
            "Bytes that dense decode steps would have read",
            |stats| stats.bytes_dense,
        )?;
        self.measured(
            "tinyserve:selection_recall",
            "Mean measured recall of page selection, 0 to 1",
            |stats| stats.recall,
        )?;
        self.measured(
            "tinyserve:selection_reuse",
            "Share of selected pages that the step before had selected, too, 0 to 1",
            Stats::reuse,
        )?;
        self.counter(
            "tinyserve:budget_moves",
            "Times that the selection budget was moved to keep to a latency",
            |stats| stats.budget_moves,
        )?;
        Ok(())
    }

    /// What each plugin did, in all engines together.
    fn plugins(&mut self, plugins: &[PluginStats]) -> Result<(), Error> {
        let of_each = |count: fn(&PluginStats) -> u64| {
            let series =
                |plugin: &PluginStats| (vec![("plugin", plugin.name.clone())], count(plugin));
            plugins.iter().map(series).collect::<Vec<_>>()
        };
        for (name, help, series) in [
            (
                "tinyserve:early_exits",
                "Requests that a plugin stopped",
                of_each(|plugin| plugin.early_exit_count),
            ),
            (
                "tinyserve:pruned_tokens",
                "Tokens that a plugin had removed from the cache",
                of_each(|plugin| plugin.pruned_tokens),
            ),
            (
                "tinyserve:plugin_errors",
                "Hooks of a plugin that failed",
                of_each(|plugin| plugin.errors),
            ),
        ] {
            let kind = MetricType::Counter;
            let mut encoder = self.encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, value) in &series {
                encoder.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(value, None)?;
            }
        }
        Ok(())
    }

    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        value: impl Fn(&Stats) -> f64,
    ) -> Result<(), Error> {
        self.measured(name, help, |stats| Some(value(stats)))
    }

    /// A gauge of those engines that know its value.
    fn measured(
        &mut self,
        name: &str,
        help: &str,
        value: impl Fn(&Stats) -> Option<f64>,
    ) -> Result<(), Error> {
        let values: Vec<_> = self.engines.iter().map(value).collect();
        if values.iter().all(Option::is_none) {
            return Ok(());
        }
        let mut encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (engine, value) in values.into_iter().enumerate() {
            if let Some(value) = value {
                encoder.encode_family(&[engine_label(engine)])?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }

    fn counter(
        &mut self,
        name: &str,
        help: &str,
        value: impl Fn(&Stats) -> u64,
    ) -> Result<(), Error> {
        self.labelled((name, help, MetricType::Counter), |stats| vec![(Vec::new(), value(stats))])
    }

    fn labelled(
        &mut self,
        (name, help, kind): (&str, &str, MetricType),
        series: impl Fn(&Stats) -> Vec<(Labels, u64)>,
    ) -> Result<(), Error> {
        let is_counter = matches!(kind, MetricType::Counter);
        let mut encoder = self.encoder.encode_descriptor(name, help, None, kind)?;
        for (engine, stats) in self.engines.iter().enumerate() {
            for (mut labels, value) in series(stats) {
                labels.insert(0, engine_label(engine));
                let mut encoder = encoder.encode_family(&labels)?;
                if is_counter {
                    encoder.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
                } else {
                    encoder.encode_gauge(&(value as f64))?;
                }
            }
        }
        Ok(())
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        histogram: impl Fn(&Stats) -> &Histogram,
        bounds: &[f64],
    ) -> Result<(), Error> {
        let mut encoder =
            self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (engine, stats) in self.engines.iter().enumerate() {
            let histogram = histogram(stats);
            encoder.encode_family(&[engine_label(engine)])?.encode_histogram::<NoLabelSet>(
                histogram.sum,
                histogram.count(),
                &coarser(histogram, bounds),
                None,
            )?;
        }
        Ok(())
    }
}

/// What vLLM calls a copy of the model.
pub(super) fn engine_label(engine: usize) -> (&'static str, String) {
    ("engine", engine.to_string())
}

/// The counts of `histogram` in the buckets that `bounds` end; each of them is a bound of the
/// engine's too, or counts go to the next that is.
fn coarser(histogram: &Histogram, bounds: &[f64]) -> Vec<(f64, u64)> {
    let mut buckets: Vec<(f64, u64)> =
        bounds.iter().copied().chain([f64::INFINITY]).map(|bound| (bound, 0)).collect();
    let upper = histogram.bounds.iter().copied().chain([f64::INFINITY]);
    for (upper, count) in upper.zip(&histogram.counts) {
        let bucket = buckets.iter_mut().find(|(bound, _)| *bound >= upper);
        if let Some((_, sum)) = bucket {
            *sum += count;
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_is_one_of_the_engines() {
        for bounds in [buckets::TTFT, buckets::TOKEN, buckets::LATENCY] {
            assert!(bounds.is_sorted());
            for bound in bounds {
                assert!(Histogram::BOUNDS.contains(bound), "{bound}");
            }
        }
    }

    #[test]
    fn nothing_is_lost_between_buckets() {
        let counts: Vec<u64> = (0..=Histogram::BOUNDS.len() as u64).collect();
        let histogram = Histogram { bounds: Histogram::BOUNDS, counts: counts.clone(), sum: 1.0 };
        let coarse = coarser(&histogram, buckets::LATENCY);
        assert_eq!(coarse.iter().map(|(_, n)| n).sum::<u64>(), counts.iter().sum::<u64>());
        // Up to 1 s: everything whose bound is at most that.
        let up_to =
            |limit: f64| coarse.iter().filter(|(b, _)| *b <= limit).map(|(_, n)| n).sum::<u64>();
        let bounds = Histogram::BOUNDS.iter().zip(&counts);
        assert_eq!(up_to(1.0), bounds.filter(|(b, _)| **b <= 1.0).map(|(_, n)| n).sum::<u64>());
    }
}
