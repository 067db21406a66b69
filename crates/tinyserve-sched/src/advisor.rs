//! From what an engine measured to what might be changed.
//!
//! Each suggestion names a fact with its numbers, a setting, the direction in which to turn it, and
//! what that is expected to do. Nothing is turned here: whoever holds the settings decides.

use std::fmt;

use crate::{Limits, Stats};

/// A setting, as flags and configuration files spell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Knob {
    /// Share of the pages that a selecting step reads.
    SelectionRatio,
    /// Element type of keys and values; lower means fewer bits.
    KvCacheDtype,
    /// Tokens of one page.
    PageSize,
    /// Whether tokens with little attention are pruned; higher means on.
    EnableTokenPruning,
    /// Most sequences that run together.
    MaxNumSeqs,
    /// Most tokens of one step.
    MaxNumBatchedTokens,
}

impl Knob {
    /// The name as configuration files spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SelectionRatio => "selection_ratio",
            Self::KvCacheDtype => "kv_cache_dtype",
            Self::PageSize => "page_size",
            Self::EnableTokenPruning => "enable_token_pruning",
            Self::MaxNumSeqs => "max_num_seqs",
            Self::MaxNumBatchedTokens => "max_num_batched_tokens",
        }
    }
}

/// Which way to turn a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Turn {
    /// Up.
    Raise,
    /// Down.
    Lower,
}

/// One measured fact and what might be done about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Suggestion {
    /// What was measured.
    pub fact: String,
    /// The setting to turn.
    pub knob: Knob,
    /// Which way.
    pub turn: Turn,
    /// What that is expected to do.
    pub effect: &'static str,
}

impl fmt::Display for Suggestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let turn = match self.turn {
            Turn::Raise => "raise",
            Turn::Lower => "lower",
        };
        write!(f, "{}: {turn} {} ({})", self.fact, self.knob.name(), self.effect)
    }
}

/// What a user wants; nothing is asked of what is not set.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Targets {
    /// Milliseconds for each token after the first (TPOT).
    pub latency_ms: Option<f64>,
    /// Memory of weights and pages in use, in units of 10⁹ bytes.
    pub memory_gb: Option<f64>,
}

/// What advice rests on. [`Stats::measured`] fills it from an engine's counters.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measured {
    /// Mean milliseconds for each token after the first.
    pub latency_ms: Option<f64>,
    /// Weights and pages in use, in units of 10⁹ bytes.
    pub memory_gb: Option<f64>,
    /// Share of the cache's pages that are in use.
    pub kv_use: Option<f64>,
    /// Mean milliseconds from submission to the first step.
    pub queue_ms: Option<f64>,
    /// Mean milliseconds from submission to the first token.
    pub ttft_ms: Option<f64>,
    /// Median and 99th percentile of the milliseconds between two tokens.
    pub itl_ms: Option<(f64, f64)>,
    /// Preemptions for each request.
    pub preemptions: Option<f64>,
    /// Share of the attention mass that the selected pages held.
    pub recall: Option<f64>,
    /// Bytes that decode steps read, of those that dense ones would have read.
    pub read_share: Option<f64>,
}

/// Below this recall, answers suffer.
const LOW_RECALL: f64 = 0.9;
/// Above this recall, pages are read that nobody misses.
const HIGH_RECALL: f64 = 0.99;
/// Pages in use from which on there are few left.
const FULL: f64 = 0.9;
/// Preemptions for each request that are worth a word.
const MANY_PREEMPTIONS: f64 = 0.05;
/// How many times the median the slowest gaps between tokens may be.
const UNEVEN: f64 = 5.0;

impl Stats {
    /// What advice rests on.
    #[must_use]
    pub fn measured(&self, limits: &Limits) -> Measured {
        let ms = |seconds: Option<f64>| seconds.map(|seconds| seconds * 1e3);
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let pages = self.pages_used as f64 * limits.bytes_per_page as f64;
        Measured {
            latency_ms: ms(self.tpot.mean()),
            memory_gb: Some((limits.weight_bytes as f64 + pages) / 1e9),
            kv_use: share(self.pages_used, self.pages),
            queue_ms: ms(self.queue_time.mean()),
            ttft_ms: ms(self.ttft.mean()),
            itl_ms: ms(self.itl.quantile(0.5)).zip(ms(self.itl.quantile(0.99))),
            preemptions: share(self.preemptions, self.requests),
            recall: self.recall,
            read_share: share(self.bytes_read, self.bytes_dense),
        }
    }

    /// What its counters suggest, without a target: the most telling fact first.
    #[must_use]
    pub fn suggestions(&self, limits: &Limits) -> Vec<Suggestion> {
        self.measured(limits).suggestions(&Targets::default())
    }
}

impl Measured {
    /// What to turn so that targets are met and nothing is wasted: the most telling fact first,
    /// and each setting at most once.
    #[must_use]
    pub fn suggestions(&self, targets: &Targets) -> Vec<Suggestion> {
        let mut advice = Advice::default();
        self.mind_recall(&mut advice);
        self.mind_memory(targets, &mut advice);
        self.mind_latency(targets, &mut advice);
        self.mind_queues(&mut advice);
        advice.0
    }

    /// Quality comes first: what else is suggested does not lower a recall that is low already.
    fn mind_recall(&self, advice: &mut Advice) {
        let Some(recall) = self.recall.filter(|&recall| recall < LOW_RECALL) else { return };
        advice.add(
            format!("the selected pages hold {:.1} % of the attention mass", 100.0 * recall),
            (Knob::SelectionRatio, Turn::Raise),
            "more pages are read, and less attention is missed",
        );
    }

    fn mind_memory(&self, targets: &Targets, advice: &mut Advice) {
        let over = self.memory_gb.zip(targets.memory_gb).filter(|(found, target)| found > target);
        if let Some((found, target)) = over {
            let fact =
                format!("weights and pages take {found:.2} GB, the target is {target:.2} GB");
            advice.save_pages(&fact);
        }
        let many = self.preemptions.filter(|&each| each > MANY_PREEMPTIONS);
        if let Some(each) = many {
            let fact = format!("pages ran out: {:.0} preemptions in 100 requests", 100.0 * each);
            advice.save_pages(&fact);
            let effect = "fewer sequences share the pages, and none is computed twice";
            advice.add(fact, (Knob::MaxNumSeqs, Turn::Lower), effect);
        }
    }

    fn mind_latency(&self, targets: &Targets, advice: &mut Advice) {
        let over = self.latency_ms.zip(targets.latency_ms).filter(|(found, target)| found > target);
        match over {
            Some((found, target)) => {
                let fact = format!("a token takes {found:.1} ms, the target is {target:.1} ms");
                advice.add(
                    fact.clone(),
                    (Knob::SelectionRatio, Turn::Lower),
                    "a step reads fewer pages; recall may fall",
                );
                advice.add(
                    fact.clone(),
                    (Knob::KvCacheDtype, Turn::Lower),
                    "a step reads fewer bytes for each page",
                );
                advice.add(
                    fact,
                    (Knob::PageSize, Turn::Raise),
                    "there are fewer boxes to score; selection is coarser",
                );
            }
            None => {
                let idle = self.recall.zip(self.read_share);
                if let Some((recall, read)) = idle.filter(|(recall, _)| *recall > HIGH_RECALL) {
                    let fact = format!(
                        "the selected pages hold {:.1} % of the attention mass with {:.0} % of \
                         the bytes",
                        100.0 * recall,
                        100.0 * read
                    );
                    let effect = "fewer pages are read, and hardly any attention is missed";
                    advice.add(fact, (Knob::SelectionRatio, Turn::Lower), effect);
                }
            }
        }
    }

    fn mind_queues(&self, advice: &mut Advice) {
        let waits = self.queue_ms.zip(self.ttft_ms).filter(|(queue, ttft)| *queue > ttft / 2.0);
        if let Some((queue, ttft)) = waits {
            let fact =
                format!("requests wait {queue:.0} of the {ttft:.0} ms until their first token");
            if self.kv_use.is_some_and(|used| used >= FULL) {
                advice.save_pages(&fact);
            } else {
                let effect = "more sequences run together; each token may take longer";
                advice.add(fact, (Knob::MaxNumSeqs, Turn::Raise), effect);
            }
        }
        let uneven = self.itl_ms.filter(|(median, slow)| *slow > UNEVEN * median);
        if let Some((median, slow)) = uneven {
            let fact = format!(
                "one token in a hundred comes {slow:.0} ms after the one before, the median is \
                 {median:.0} ms"
            );
            let effect = "prompts come in smaller chunks between the tokens of others";
            advice.add(fact, (Knob::MaxNumBatchedTokens, Turn::Lower), effect);
        }
    }
}

/// Suggestions, each setting at most once: the first fact about it is the most telling.
#[derive(Default)]
struct Advice(Vec<Suggestion>);

impl Advice {
    fn add(&mut self, fact: String, (knob, turn): (Knob, Turn), effect: &'static str) {
        if self.0.iter().all(|suggestion| suggestion.knob != knob) {
            self.0.push(Suggestion { fact, knob, turn, effect });
        }
    }

    fn save_pages(&mut self, fact: &str) {
        let fewer_bits = "keys and values take fewer bytes, and a step reads fewer";
        self.add(fact.to_owned(), (Knob::KvCacheDtype, Turn::Lower), fewer_bits);
        let pruned = "long answers give pages back; what is pruned is not read again";
        self.add(fact.to_owned(), (Knob::EnableTokenPruning, Turn::Raise), pruned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Targets = Targets { latency_ms: None, memory_gb: None };

    fn turns(measured: Measured, targets: Targets) -> Vec<(Knob, Turn)> {
        let all = measured.suggestions(&targets);
        all.iter().map(|suggestion| (suggestion.knob, suggestion.turn)).collect()
    }

    #[test]
    fn an_engine_that_is_well_is_left_alone() {
        let well = Measured {
            latency_ms: Some(20.0),
            memory_gb: Some(2.0),
            kv_use: Some(0.5),
            queue_ms: Some(1.0),
            ttft_ms: Some(100.0),
            itl_ms: Some((20.0, 40.0)),
            preemptions: Some(0.0),
            recall: Some(0.95),
            read_share: Some(0.4),
        };
        let targets = Targets { latency_ms: Some(50.0), memory_gb: Some(4.0) };
        assert_eq!(turns(well, targets), []);
        assert_eq!(turns(Measured::default(), targets), [], "nothing was measured yet");
    }

    #[test]
    fn pressure_turns_settings_the_right_way() {
        let slow = Measured { latency_ms: Some(80.0), ..Measured::default() };
        let fast = Targets { latency_ms: Some(50.0), ..NOTHING };
        let expected = [
            (Knob::SelectionRatio, Turn::Lower),
            (Knob::KvCacheDtype, Turn::Lower),
            (Knob::PageSize, Turn::Raise),
        ];
        assert_eq!(turns(slow, fast), expected);
        // Where recall is low already, speed is looked for elsewhere.
        let blind = Measured { recall: Some(0.7), ..slow };
        assert_eq!(turns(blind, fast)[0], (Knob::SelectionRatio, Turn::Raise));
        assert_eq!(turns(blind, fast).len(), 3, "each setting is turned once");
        let big = Measured { memory_gb: Some(6.0), ..Measured::default() };
        let small = Targets { memory_gb: Some(4.0), ..NOTHING };
        let expected = [(Knob::KvCacheDtype, Turn::Lower), (Knob::EnableTokenPruning, Turn::Raise)];
        assert_eq!(turns(big, small), expected);
        let short = Measured { preemptions: Some(0.2), ..Measured::default() };
        assert_eq!(turns(short, NOTHING).last(), Some(&(Knob::MaxNumSeqs, Turn::Lower)));
    }

    #[test]
    fn queues_are_met_with_room_where_there_is_some() {
        let waits = Measured {
            queue_ms: Some(900.0),
            ttft_ms: Some(1000.0),
            kv_use: Some(0.3),
            ..Measured::default()
        };
        assert_eq!(turns(waits, NOTHING), [(Knob::MaxNumSeqs, Turn::Raise)]);
        let full = Measured { kv_use: Some(0.97), ..waits };
        assert_eq!(turns(full, NOTHING)[0], (Knob::KvCacheDtype, Turn::Lower));
        let uneven = Measured { itl_ms: Some((10.0, 90.0)), ..Measured::default() };
        assert_eq!(turns(uneven, NOTHING), [(Knob::MaxNumBatchedTokens, Turn::Lower)]);
        let lavish = Measured { recall: Some(0.999), read_share: Some(0.5), ..Measured::default() };
        assert_eq!(turns(lavish, NOTHING), [(Knob::SelectionRatio, Turn::Lower)]);
    }

    #[test]
    fn a_suggestion_is_a_sentence_with_its_numbers() {
        let measured = Measured { recall: Some(0.715), ..Measured::default() };
        let sentence = measured.suggestions(&NOTHING)[0].to_string();
        assert_eq!(
            sentence,
            "the selected pages hold 71.5 % of the attention mass: raise selection_ratio (more \
             pages are read, and less attention is missed)"
        );
    }
}
