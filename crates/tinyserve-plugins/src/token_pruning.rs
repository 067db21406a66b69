//! Removes the tokens that attention has looked at least (H2O, arXiv 2306.14048).

use crate::{Action, HookResult, Needs, Plugin, PluginError, PrefillContext, StepContext};

/// Keeps a sequence's cache small by removing tokens with little accumulated attention.
///
/// It prunes when the prompt is in the cache, and again whenever the cache has grown back to the
/// size at which it pruned last; so the cache of a long answer stays as large as its prompt's, or as
/// `min_tokens / (1 − ratio)` tokens. It does not prune what would free no page. Every layer and
/// head loses the same tokens, those with the least attention added up over all of them, because
/// they share one page table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenPruning {
    /// Share of the cached tokens that one pruning removes at most, 0 to 1; 0 never prunes.
    pub ratio: f64,
    /// Tokens that always stay in the cache.
    pub min_tokens: usize,
    /// First tokens that are never removed: evicting attention sinks collapses generation.
    pub sink_tokens: usize,
    /// Last tokens that are never removed; the newest never is.
    pub recent_tokens: usize,
}

impl Default for TokenPruning {
    fn default() -> Self {
        Self { ratio: 0.1, min_tokens: 100, sink_tokens: 16, recent_tokens: 32 }
    }
}

/// Cached tokens from which on the next pruning is due.
#[derive(Default)]
struct Due(usize);

impl TokenPruning {
    /// The name that it is registered by.
    pub const NAME: &'static str = "token_pruning";

    /// The plugin, if its settings are in their ranges.
    ///
    /// # Errors
    /// [`PluginError::Invalid`] naming the first setting that is not.
    pub fn check(self) -> Result<Self, PluginError> {
        if !(0.0..=1.0).contains(&self.ratio) {
            return Err(PluginError::invalid("pruning_ratio", self.ratio, "0 to 1"));
        }
        Ok(self)
    }

    /// Places in the cache of the tokens to remove, ascending: those with the least `mass`, the
    /// older one of two with the same. Empty when that would free no page.
    #[must_use]
    pub fn choose(&self, mass: &[f32], page_size: usize) -> Vec<u32> {
        let cached = mass.len();
        // 0.29 of 100 tokens is 29, although the product is 28.999….
        let share = (self.ratio * cached as f64 * (1.0 + 2.0 * f64::EPSILON)) as usize;
        let end = cached.saturating_sub(self.recent_tokens.max(1));
        let start = self.sink_tokens.min(end);
        let removed = share.min(cached.saturating_sub(self.min_tokens)).min(end - start);
        if cached.div_ceil(page_size) == (cached - removed).div_ceil(page_size) {
            return Vec::new();
        }
        let mut places: Vec<u32> = (start as u32..end as u32).collect();
        // The sum is total: what is not a number comes last, and stays.
        let by_mass =
            |&a: &u32, &b: &u32| mass[a as usize].total_cmp(&mass[b as usize]).then(a.cmp(&b));
        if removed < places.len() {
            places.select_nth_unstable_by(removed, by_mass);
            places.truncate(removed);
        }
        places.sort_unstable();
        places
    }

    fn act(
        &self,
        (cached, page_size): (usize, usize),
        mass: Option<&[f32]>,
        due: usize,
    ) -> Result<(Action, usize), &'static str> {
        if self.ratio == 0.0 || cached < due {
            return Ok((Action::Continue, due));
        }
        let mass = mass.ok_or("the step did not tell the mass of its attention")?;
        let places = self.choose(mass, page_size);
        if places.is_empty() {
            return Ok((Action::Continue, due));
        }
        Ok((Action::Prune(places), cached))
    }
}

impl Plugin for TokenPruning {
    fn needs(&self) -> Needs {
        Needs { attention_mass: self.ratio > 0.0, ..Needs::default() }
    }

    fn on_prefill(&self, context: &mut PrefillContext<'_>) -> HookResult {
        if context.is_first() {
            *context.state() = Due(0);
        }
        if !context.is_last() {
            return Ok(Action::Continue);
        }
        let Due(due) = *context.state();
        let sizes = (context.cached_tokens(), context.page_size());
        let (action, due) = self.act(sizes, context.attention_mass(), due)?;
        *context.state() = Due(due);
        Ok(action)
    }

    fn on_step(&self, context: &mut StepContext<'_>) -> HookResult {
        let Due(due) = *context.state();
        let sizes = (context.cached_tokens(), context.page_size());
        let (action, due) = self.act(sizes, context.attention_mass(), due)?;
        *context.state() = Due(due);
        Ok(action)
    }
}
