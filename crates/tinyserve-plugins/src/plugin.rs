//! The seam: what a plugin is asked, what it asks for, and what it answers.

use std::error::Error;

use crate::{FinishContext, PrefillContext, RequestContext, StepContext};

/// What a hook may fail with.
pub type HookError = Box<dyn Error + Send + Sync>;

/// What a hook answers; an error ends the request, and no other.
pub type HookResult = Result<Action, HookError>;

/// What a plugin wants done.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Action {
    /// Nothing.
    #[default]
    Continue,
    /// The request ends, without a further token; the text is its stop reason.
    Stop(String),
    /// Adds to the logits of tokens, before one is drawn: `(token, amount)`. Only in
    /// [`Plugin::on_step`].
    Bias(Vec<(u32, f32)>),
    /// Removes tokens from the cache: places in the cache, from 0 to [`StepContext::cached_tokens`],
    /// in any order. What is left keeps its positions. Not in [`Plugin::on_request`].
    Prune(Vec<u32>),
}

impl Action {
    /// Ends the request with this stop reason.
    #[must_use]
    pub fn stop(reason: impl Into<String>) -> Self {
        Self::Stop(reason.into())
    }
}

/// What a closure may return: an [`Action`], nothing, or a result of either.
pub trait IntoAction {
    /// The hook's answer.
    ///
    /// # Errors
    /// The error that the closure returned.
    fn into_action(self) -> HookResult;
}

impl IntoAction for Action {
    fn into_action(self) -> HookResult {
        Ok(self)
    }
}

impl IntoAction for () {
    fn into_action(self) -> HookResult {
        Ok(Action::Continue)
    }
}

impl<A: IntoAction, E: Into<HookError>> IntoAction for Result<A, E> {
    fn into_action(self) -> HookResult {
        self.map_err(Into::into).and_then(A::into_action)
    }
}

/// What a plugin needs to know of attention. What nobody needs is not computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Needs {
    /// The entropy of the attention weights, [`StepContext::attention_entropy`].
    pub attention_entropy: bool,
    /// The attention mass of each token, [`StepContext::attention_mass`].
    pub attention_mass: bool,
}

impl Needs {
    /// What either needs.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            attention_entropy: self.attention_entropy || other.attention_entropy,
            attention_mass: self.attention_mass || other.attention_mass,
        }
    }
}

/// Something that steers how requests decode.
///
/// One plugin serves all requests, at the same time when there are several engines: its hooks take
/// `&self`, and what it remembers of a request lies in the request's own state
/// ([`StepContext::state`]). Hooks run between steps on the engine's thread, so what they take is
/// added to every step. A hook that returns an error or panics ends its request with a sentence that
/// names the plugin; other requests go on.
pub trait Plugin: Send + Sync {
    /// What has to be computed for it.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// A request was admitted; nothing of it has been computed.
    ///
    /// # Errors
    /// Whatever makes going on pointless.
    fn on_request(&self, _context: &mut RequestContext<'_>) -> HookResult {
        Ok(Action::Continue)
    }

    /// A part of the prompt is in the cache.
    ///
    /// # Errors
    /// Whatever makes going on pointless.
    fn on_prefill(&self, _context: &mut PrefillContext<'_>) -> HookResult {
        Ok(Action::Continue)
    }

    /// Logits are there, and no token has been drawn from them.
    ///
    /// # Errors
    /// Whatever makes going on pointless.
    fn on_step(&self, _context: &mut StepContext<'_>) -> HookResult {
        Ok(Action::Continue)
    }

    /// The request has ended, for whatever reason. There is nothing left to act on.
    ///
    /// # Errors
    /// They are counted; the request's result stays as it is.
    fn on_finish(&self, _context: &mut FinishContext<'_>) -> Result<(), HookError> {
        Ok(())
    }
}
