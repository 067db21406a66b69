//! What a hook sees of its request.

use std::any::Any;
use std::ops::Range;

/// What a request is, from its admission to its end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RequestInfo {
    /// The request's name.
    pub id: String,
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Tokens of one page of the cache.
    pub page_size: usize,
}

/// What one plugin remembers of one request.
#[derive(Default)]
pub(crate) struct Slot(Option<Box<dyn Any + Send>>);

impl Slot {
    fn state<T: Default + Send + 'static>(&mut self) -> &mut T {
        if !self.0.as_ref().is_some_and(|state| state.is::<T>()) {
            self.0 = Some(Box::new(T::default()));
        }
        let state = self.0.as_mut().and_then(|state| state.downcast_mut());
        state.expect("it was just made sure that there is one of this type")
    }
}

macro_rules! request_and_state {
    ($context:ident) => {
        impl $context<'_> {
            /// The request's name.
            #[must_use]
            pub fn request_id(&self) -> &str {
                &self.request.id
            }

            /// Tokens of the prompt.
            #[must_use]
            pub fn prompt(&self) -> &[u32] {
                &self.request.prompt
            }

            /// Most tokens to generate.
            #[must_use]
            pub fn max_tokens(&self) -> usize {
                self.request.max_tokens
            }

            /// Tokens of one page of the cache.
            #[must_use]
            pub fn page_size(&self) -> usize {
                self.request.page_size
            }

            /// What this plugin remembers of this request: `T::default()` at first, and again when
            /// it asks for another type.
            pub fn state<T: Default + Send + 'static>(&mut self) -> &mut T {
                self.slot.state()
            }
        }
    };
}

/// What [`crate::Plugin::on_request`] sees.
pub struct RequestContext<'a> {
    pub(crate) request: &'a RequestInfo,
    pub(crate) slot: &'a mut Slot,
}

request_and_state!(RequestContext);

/// What [`crate::Plugin::on_prefill`] sees.
pub struct PrefillContext<'a> {
    pub(crate) request: &'a RequestInfo,
    pub(crate) slot: &'a mut Slot,
    pub(crate) computed: Range<usize>,
    pub(crate) first: bool,
    pub(crate) last: bool,
    pub(crate) cached_tokens: usize,
    pub(crate) mass: Option<&'a [f32]>,
}

request_and_state!(PrefillContext);

impl PrefillContext<'_> {
    /// Positions of the tokens that this step computed. What lies before them was computed by
    /// earlier steps, or was in the cache already.
    #[must_use]
    pub fn computed(&self) -> Range<usize> {
        self.computed.clone()
    }

    /// Whether this is the first part: what was observed before is forgotten. A request that was
    /// preempted computes what it had computed without its plugins, and goes on with them.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.first
    }

    /// Whether the whole prompt is in the cache.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.last
    }

    /// Tokens in the cache, pruned ones not counted.
    #[must_use]
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// As [`StepContext::attention_mass`].
    #[must_use]
    pub fn attention_mass(&self) -> Option<&[f32]> {
        self.mass
    }
}

/// What [`crate::Plugin::on_step`] sees.
pub struct StepContext<'a> {
    pub(crate) request: &'a RequestInfo,
    pub(crate) slot: &'a mut Slot,
    pub(crate) generated: &'a [u32],
    pub(crate) cached_tokens: usize,
    pub(crate) logits: &'a mut [f32],
    pub(crate) changed_logits: bool,
    pub(crate) entropy: Option<&'a [f32]>,
    pub(crate) mass: Option<&'a [f32]>,
}

request_and_state!(StepContext);

impl StepContext<'_> {
    /// Tokens that were generated so far; the next one is drawn from [`Self::logits`].
    #[must_use]
    pub fn generated(&self) -> &[u32] {
        self.generated
    }

    /// Position of the next token in the text: pruned tokens are counted.
    #[must_use]
    pub fn position(&self) -> usize {
        self.request.prompt.len() + self.generated.len()
    }

    /// Tokens in the cache, pruned ones not counted.
    #[must_use]
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Logits `[vocab]` of the next token, as the model and the plugins before this one left them.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        self.logits
    }

    /// The same, to be changed: what is left in them is what the sampler draws from.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        self.changed_logits = true;
        self.logits
    }

    /// Entropy in nats of the attention weights of the newest token, `[layers, q_heads]`, over the
    /// tokens that were read. `None` unless the plugin needs it.
    #[must_use]
    pub fn attention_entropy(&self) -> Option<&[f32]> {
        self.entropy
    }

    /// Attention mass of each cached token, `[cached_tokens]`: its weights, added up over layers,
    /// heads and all rows since the request began to be observed. `None` unless the plugin needs it.
    #[must_use]
    pub fn attention_mass(&self) -> Option<&[f32]> {
        self.mass
    }
}

/// What [`crate::Plugin::on_finish`] sees.
pub struct FinishContext<'a> {
    pub(crate) request: &'a RequestInfo,
    pub(crate) slot: &'a mut Slot,
    pub(crate) generated: &'a [u32],
    pub(crate) reason: &'a str,
}

request_and_state!(FinishContext);

impl FinishContext<'_> {
    /// Tokens that were generated.
    #[must_use]
    pub fn generated(&self) -> &[u32] {
        self.generated
    }

    /// Why the request ended: `stop`, `length`, `cancelled` or `failed`.
    #[must_use]
    pub fn reason(&self) -> &str {
        self.reason
    }
}
