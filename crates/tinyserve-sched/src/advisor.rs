//! What the counters suggest to change.

use crate::Stats;

/// A measured fact, what to change because of it, and what to expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suggestion {
    /// What was measured, with its numbers.
    pub fact: String,
    /// The setting to change, as flags and files spell it.
    pub knob: &'static str,
    /// How to change it.
    pub change: &'static str,
    /// What that does.
    pub effect: &'static str,
}

/// Share of the pages above which the cache is called full.
const FULL: f64 = 0.9;
/// Recall below which selection leaves out too much.
const LOW_RECALL: f64 = 0.9;
/// Recall above which selection could leave out more.
const HIGH_RECALL: f64 = 0.99;

impl Stats {
    /// What these counters suggest to change; nothing when nothing stands out.
    #[must_use]
    pub fn suggestions(&self) -> Vec<Suggestion> {
        let mut all = Vec::new();
        let mut suggest = |fact, knob, change, effect| {
            all.push(Suggestion { fact, knob, change, effect });
        };
        if self.preemptions * 100 > self.requests {
            suggest(
                format!("{} preemptions in {} requests", self.preemptions, self.requests),
                "max_num_seqs",
                "lower it, or give more memory (target_memory_gb)",
                "fewer requests lose their pages and are computed twice",
            );
        }
        if self.sessions_evicted > 0 {
            suggest(
                format!("{} sessions lost their pages to others", self.sessions_evicted),
                "target_memory_gb",
                "raise it, or store keys and values in fewer bits (kv_cache_dtype)",
                "follow-up requests compute only what is new",
            );
        }
        let used = self.pages_used as f64 / self.pages.max(1) as f64;
        if used > FULL {
            suggest(
                format!("{} of {} pages are in use", self.pages_used, self.pages),
                "kv_cache_dtype",
                "fewer bits",
                "more tokens in the same memory, and fewer bytes to read",
            );
        }
        let queued = self.queue_time.mean().unwrap_or(0.0);
        let first = self.ttft.mean().unwrap_or(0.0);
        if queued > 0.5 * first && first > 0.0 && used < 0.7 {
            suggest(
                format!("requests wait {queued:.3} s of the {first:.3} s to their first token"),
                "max_num_seqs",
                "raise it: pages are left",
                "shorter queues, at somewhat more time per token",
            );
        }
        if self.rejected > 0 {
            suggest(
                format!("{} requests were turned away", self.rejected),
                "max_num_queued_reqs",
                "raise it, or add replicas",
                "bursts wait instead of being refused",
            );
        }
        if let Some(recall) = self.recall.filter(|&recall| recall < LOW_RECALL) {
            suggest(
                format!("selected pages hold {recall:.3} of the attention"),
                "selection_ratio",
                "raise it, or token_budget",
                "answers nearer to dense attention, for more bytes read",
            );
        }
        let read = self.bytes_read as f64 / self.bytes_dense.max(1) as f64;
        if let Some(recall) = self.recall.filter(|&recall| recall > HIGH_RECALL && read > 0.2) {
            suggest(
                format!(
                    "selected pages hold {recall:.3} of the attention in {read:.2} of the bytes"
                ),
                "selection_ratio",
                "lower it, or token_budget",
                "fewer bytes read per token, which decode is bound by in long contexts",
            );
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tinyserve_kernels::AttendStats;

    use crate::metrics::{Metrics, count, gauge};

    #[test]
    fn nothing_stands_out_at_rest() {
        assert!(Metrics::default().read().suggestions().is_empty());
    }

    #[test]
    fn each_fact_names_its_knob() {
        type Set = fn(&Metrics);
        let cases: [(Set, &str, &str); 7] = [
            (|m| count(&m.preemptions, 3), "max_num_seqs", "3 preemptions"),
            (|m| count(&m.sessions_evicted, 2), "target_memory_gb", "2 sessions"),
            (
                |m| {
                    gauge(&m.pages, 100);
                    gauge(&m.pages_used, 95);
                },
                "kv_cache_dtype",
                "95 of 100",
            ),
            (
                |m| {
                    m.queue_time.record(Duration::from_secs(3));
                    m.ttft.record(Duration::from_secs(4));
                },
                "max_num_seqs",
                "3.000 s of the 4.000 s",
            ),
            (|m| count(&m.rejected, 1), "max_num_queued_reqs", "1 requests"),
            (|m| read(m, 0.8), "selection_ratio", "0.800"),
            (|m| read(m, 0.995), "selection_ratio", "0.30 of the bytes"),
        ];
        for (set, knob, fact) in cases {
            let metrics = Metrics::default();
            set(&metrics);
            let found = metrics.read().suggestions();
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].knob == knob && found[0].fact.contains(fact), "{found:?}");
        }
    }

    fn read(metrics: &Metrics, recall: f64) {
        metrics.read_by_decode(&AttendStats {
            bytes_read: 30,
            bytes_dense: 100,
            recall_sum: recall,
            recall_count: 1,
            ..AttendStats::default()
        });
    }
}
