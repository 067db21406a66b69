//! The plugins of one request: hooks in their order, each in isolation.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use crate::context::Slot;
use crate::manager::Entry;
use crate::{
    Action, FinishContext, HookError, Needs, PluginFailure, PrefillContext, RequestContext,
    RequestInfo, StepContext,
};

/// Part of a prompt that a step computed.
#[derive(Debug)]
pub struct Prefilled<'a> {
    /// Positions of its tokens.
    pub computed: Range<usize>,
    /// Whether it is the first part: what was observed before is forgotten.
    pub first: bool,
    /// Whether it is the last part.
    pub last: bool,
    /// Tokens in the cache, pruned ones not counted.
    pub cached_tokens: usize,
    /// Attention mass of the step, `[cached_tokens]`, added up over layers, heads and its rows;
    /// asked for when [`RequestPlugins::needs`] says so.
    pub mass: Option<&'a [f32]>,
}

/// A step that yields logits.
#[derive(Debug)]
pub struct Step<'a> {
    /// Tokens that were generated so far.
    pub generated: &'a [u32],
    /// Tokens in the cache, pruned ones not counted.
    pub cached_tokens: usize,
    /// Logits `[vocab]` of the next token.
    pub logits: &'a mut [f32],
    /// Entropy in nats of the newest token's attention weights, `[layers, q_heads]`.
    pub attention_entropy: Option<&'a [f32]>,
    /// As [`Prefilled::mass`]. The last step of a prompt, which has both hooks, gives it once.
    pub mass: Option<&'a [f32]>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy)]
pub struct Finish<'a> {
    /// Tokens that were generated.
    pub generated: &'a [u32],
    /// `stop`, `length`, `cancelled` or `failed`.
    pub reason: &'a str,
}

/// What the plugins want done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// The request ends, without another token.
    pub stop: Option<Stop>,
    /// Places in the cache of the tokens to remove, ascending; tell [`RequestPlugins::pruned`] when
    /// they are gone. Empty when the request ends.
    pub prune: Vec<u32>,
}

/// Who ends a request, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// The plugin's name.
    pub plugin: String,
    /// The request's stop reason.
    pub reason: String,
}

/// What removing tokens came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pruned {
    /// Bytes of the sequence's pages before.
    pub bytes_before: u64,
    /// Bytes of its pages afterwards.
    pub bytes_after: u64,
}

/// A plugin and what a request has to do with it.
struct Part {
    entry: Arc<Entry>,
    /// Whether the request uses it, when it chooses for itself.
    choice: Option<bool>,
    /// Whether the step that was planned last uses it.
    planned: Option<bool>,
    slot: Slot,
    /// Places that it wants removed, until they are.
    pruning: Vec<u32>,
}

impl Part {
    /// Whether the request uses it now.
    fn is_wanted(&self) -> bool {
        self.choice.unwrap_or_else(|| self.entry.enabled.load(Relaxed))
    }

    fn is_on(&self) -> bool {
        self.planned.unwrap_or_else(|| self.is_wanted())
    }
}

/// The plugins of one request, and what they know of it.
pub struct RequestPlugins {
    request: RequestInfo,
    parts: Vec<Part>,
    /// Attention mass of each cached token; empty while nobody asks for it.
    mass: Vec<f32>,
}

impl std::fmt::Debug for RequestPlugins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestPlugins").field("request", &self.request.id).finish_non_exhaustive()
    }
}

impl RequestPlugins {
    pub(crate) fn new(request: RequestInfo, entries: Vec<Arc<Entry>>) -> Self {
        let parts = entries.into_iter().map(|entry| Part {
            entry,
            choice: None,
            planned: None,
            slot: Slot::default(),
            pruning: Vec::new(),
        });
        Self { request, parts: parts.collect(), mass: Vec::new() }
    }

    /// Who wants the tokens removed that the last verdict names.
    pub fn pruning(&self) -> impl Iterator<Item = &str> {
        let parts = self.parts.iter().filter(|part| !part.pruning.is_empty());
        parts.map(|part| part.entry.name.as_str())
    }

    /// Uses a plugin for this request or does not, whatever the engine does; `None` when there is
    /// none of this name.
    pub fn choose(&mut self, name: &str, enabled: bool) -> Option<()> {
        let part = self.parts.iter_mut().find(|part| part.entry.name == name)?;
        part.choice = Some(enabled);
        Some(())
    }

    /// A step of the request is planned: those that are on now are its plugins, with what they need.
    /// Who is switched on or off while it runs is so for the next one.
    pub fn plan(&mut self) {
        self.parts.iter_mut().for_each(|part| part.planned = Some(part.is_wanted()));
    }

    /// Whether no hook would run.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        !self.parts.iter().any(Part::is_on)
    }

    /// What the next step has to compute for them.
    #[must_use]
    pub fn needs(&self) -> Needs {
        let on = self.parts.iter().filter(|part| part.is_on());
        on.map(|part| part.entry.plugin.needs()).fold(Needs::default(), Needs::union)
    }

    /// The request was admitted.
    ///
    /// # Errors
    /// When a plugin fails; the request has to end.
    pub fn on_request(&mut self) -> Result<Verdict, PluginFailure> {
        let Self { request, parts, .. } = self;
        let mut verdict = Verdict::default();
        for part in parts.iter_mut().filter(|part| part.is_on()) {
            let Part { entry, slot, .. } = part;
            let stopped = entry.run("on_request", || {
                let action = entry.plugin.on_request(&mut RequestContext { request, slot })?;
                match action {
                    Action::Bias(_) => Err("there are no logits to bias yet".into()),
                    Action::Prune(_) => Err("there are no tokens to prune yet".into()),
                    action => Ok(stop_of(action)),
                }
            })?;
            if verdict.stops(entry, stopped) {
                break;
            }
        }
        Ok(verdict)
    }

    /// Part of the prompt is in the cache.
    ///
    /// # Errors
    /// When a plugin fails; the request has to end.
    pub fn on_prefill(&mut self, prefilled: &Prefilled<'_>) -> Result<Verdict, PluginFailure> {
        if prefilled.first {
            self.mass.clear();
        }
        self.observe(prefilled.mass, prefilled.cached_tokens);
        let Self { request, parts, mass } = self;
        let cached_tokens = prefilled.cached_tokens;
        let mut verdict = Verdict::default();
        for part in parts.iter_mut().filter(|part| part.is_on()) {
            let Part { entry, slot, pruning, .. } = part;
            pruning.clear();
            let mass = mass_for(entry, mass);
            let &Prefilled { first, last, .. } = prefilled;
            let computed = prefilled.computed.clone();
            let mut context =
                PrefillContext { request, slot, computed, first, last, cached_tokens, mass };
            let stopped =
                entry.run("on_prefill", || match entry.plugin.on_prefill(&mut context)? {
                    Action::Bias(_) => Err("logits are biased in on_step".into()),
                    Action::Prune(places) => prune(places, cached_tokens, pruning).map(|()| None),
                    action => Ok(stop_of(action)),
                })?;
            if verdict.stops(entry, stopped) {
                break;
            }
        }
        verdict.collect(parts, cached_tokens)
    }

    /// Logits are there.
    ///
    /// # Errors
    /// When a plugin fails; the request has to end.
    pub fn on_step(&mut self, step: Step<'_>) -> Result<Verdict, PluginFailure> {
        let Step { generated, cached_tokens, logits, attention_entropy, mass } = step;
        self.observe(mass, cached_tokens);
        let Self { request, parts, mass } = self;
        let mut verdict = Verdict::default();
        for part in parts.iter_mut().filter(|part| part.is_on()) {
            let Part { entry, slot, pruning, .. } = part;
            pruning.clear();
            let mut context = StepContext {
                request,
                slot,
                generated,
                cached_tokens,
                logits: &mut *logits,
                changed_logits: false,
                entropy: attention_entropy.filter(|_| entry.plugin.needs().attention_entropy),
                mass: mass_for(entry, mass),
            };
            let stopped = entry.run("on_step", || {
                let action = entry.plugin.on_step(&mut context)?;
                if context.changed_logits && context.logits.iter().any(|x| x.is_nan()) {
                    return Err("it left a logit that is not a number".into());
                }
                match action {
                    Action::Bias(biases) => bias(&biases, context.logits).map(|()| None),
                    Action::Prune(places) => prune(places, cached_tokens, pruning).map(|()| None),
                    action => Ok(stop_of(action)),
                }
            })?;
            if verdict.stops(entry, stopped) {
                break;
            }
        }
        verdict.collect(parts, cached_tokens)
    }

    /// The tokens that the last verdict named are gone, and with them these bytes.
    pub fn pruned(&mut self, verdict: &Verdict, pruned: Pruned) {
        let mut places = verdict.prune.iter().copied().peekable();
        let mut place = 0;
        self.mass.retain(|_| {
            let gone = places.next_if_eq(&place).is_some();
            place += 1;
            !gone
        });
        for part in &mut self.parts {
            let tokens = std::mem::take(&mut part.pruning).len();
            if tokens > 0 {
                let bytes = (pruned.bytes_before, pruned.bytes_after);
                part.entry.counters.pruned(tokens, bytes);
            }
        }
    }

    /// The request has ended. A plugin that fails here has its error counted, and nothing else.
    pub fn on_finish(&mut self, finish: Finish<'_>) {
        let Finish { generated, reason } = finish;
        let Self { request, parts, .. } = self;
        for part in parts.iter_mut().filter(|part| part.is_on()) {
            let Part { entry, slot, .. } = part;
            let mut context = FinishContext { request, slot, generated, reason };
            // The statistics tell of it, and the request's result stays as it is.
            let _ = entry.run("on_finish", || {
                entry.plugin.on_finish(&mut context)?;
                Ok(None)
            });
        }
    }

    /// Adds what a step observed.
    fn observe(&mut self, mass: Option<&[f32]>, cached_tokens: usize) {
        if mass.is_some() || !self.mass.is_empty() {
            self.mass.resize(cached_tokens, 0.0);
        }
        let Some(mass) = mass else { return };
        assert_eq!(mass.len(), cached_tokens, "mass of each cached token");
        for (sum, x) in self.mass.iter_mut().zip(mass) {
            *sum += x;
        }
    }
}

impl Entry {
    /// Runs a hook, counts it, and keeps what goes wrong in it from going further.
    fn run(
        &self,
        hook: &'static str,
        f: impl FnOnce() -> Result<Option<String>, HookError>,
    ) -> Result<Option<String>, PluginFailure> {
        let start = Instant::now();
        // What it may leave half-done is the state of its own request, which ends.
        let result = catch_unwind(AssertUnwindSafe(f));
        let result = match result {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(panic) => Err(format!("panicked: {}", panic_message(panic.as_ref()))),
        };
        self.counters.called(start.elapsed(), result.is_err());
        result.map_err(|message| PluginFailure { plugin: self.name.clone(), hook, message })
    }
}

impl Verdict {
    /// Notes that `entry` stops the request, if it gave a reason.
    fn stops(&mut self, entry: &Entry, reason: Option<String>) -> bool {
        let Some(reason) = reason else { return false };
        entry.counters.stopped();
        self.stop = Some(Stop { plugin: entry.name.clone(), reason });
        true
    }

    /// Puts the places of all plugins together.
    fn collect(mut self, parts: &mut [Part], cached_tokens: usize) -> Result<Self, PluginFailure> {
        if self.stop.is_some() {
            parts.iter_mut().for_each(|part| part.pruning.clear());
            return Ok(self);
        }
        for part in parts.iter().filter(|part| !part.pruning.is_empty()) {
            self.prune.extend_from_slice(&part.pruning);
            self.prune.sort_unstable();
            self.prune.dedup();
            if self.prune.len() == cached_tokens {
                return Err(PluginFailure {
                    plugin: part.entry.name.clone(),
                    hook: "pruning",
                    message: format!("it leaves none of the {cached_tokens} tokens in the cache"),
                });
            }
        }
        Ok(self)
    }
}

/// The mass, if the plugin asked for it and it was observed.
fn mass_for<'a>(entry: &Entry, mass: &'a [f32]) -> Option<&'a [f32]> {
    (entry.plugin.needs().attention_mass && !mass.is_empty()).then_some(mass)
}

fn stop_of(action: Action) -> Option<String> {
    match action {
        Action::Stop(reason) => Some(reason),
        _ => None,
    }
}

fn bias(biases: &[(u32, f32)], logits: &mut [f32]) -> Result<(), HookError> {
    let vocab = logits.len();
    for &(token, amount) in biases {
        let logit = logits.get_mut(token as usize);
        let logit = logit.ok_or_else(|| format!("it biases token {token} of {vocab}"))?;
        *logit += amount;
        if logit.is_nan() {
            return Err(format!("it biases token {token} by {amount}, to no number").into());
        }
    }
    Ok(())
}

fn prune(places: Vec<u32>, cached: usize, pruning: &mut Vec<u32>) -> Result<(), HookError> {
    *pruning = places;
    pruning.sort_unstable();
    pruning.dedup();
    match pruning.last() {
        Some(&last) if last as usize >= cached => {
            Err(format!("it prunes place {last} of {cached} cached tokens").into())
        }
        _ => Ok(()),
    }
}

/// What a panic was raised with.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a text")
}
