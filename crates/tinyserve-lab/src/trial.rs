//! One method with one budget: what a test compares.

use std::sync::Arc;

use serde::Serialize;
use tinyserve_kernels::Attention;
use tinyserve_kv::{
    Budget, Method, PageSelector, PromptAttention, Reselect, Reselecting, SelectionPolicy,
};

/// A method and how it is set up.
#[derive(Debug, Clone, Copy)]
pub struct Trial {
    method: Method,
    policy: SelectionPolicy,
    reselect: Option<Reselect>,
}

/// The budget of a trial as the columns of a table.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Default)]
pub struct BudgetFields {
    /// Tokens that a step may read.
    pub token_budget: Option<usize>,
    /// Share of the pages that a step may read.
    pub selection_ratio: Option<f64>,
    /// Share of the estimated attention mass that a step reads.
    pub top_p_pages: Option<f64>,
}

impl Trial {
    /// `method` with the budget, the kept pages and the dense layers of `policy`.
    #[must_use]
    pub fn new(method: Method, policy: SelectionPolicy) -> Self {
        Self { method, policy, reselect: None }
    }

    /// Keeps a selection for some steps.
    #[must_use]
    pub fn reselect(mut self, when: Reselect) -> Self {
        self.reselect = Some(when);
        self
    }

    /// The method's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.method.name()
    }

    /// Whether it needs to know what the prompt attended to.
    #[must_use]
    pub fn evicts(&self) -> bool {
        matches!(self.method, Method::Evict(_))
    }

    /// The budget as columns; dense attention has none.
    #[must_use]
    pub fn budget(&self) -> BudgetFields {
        let mut fields = BudgetFields::default();
        match (self.method, self.policy.budget) {
            (Method::Dense, _) => {}
            (_, Budget::Tokens(tokens)) => fields.token_budget = Some(tokens),
            (_, Budget::Ratio(ratio)) => fields.selection_ratio = Some(ratio),
            (_, Budget::TopP(p)) => fields.top_p_pages = Some(p),
        }
        fields
    }

    /// What chooses the pages of one sequence after a prompt that was attended to as `prompt` says.
    #[must_use]
    pub fn start(&self, prompt: &Arc<PromptAttention>) -> Chooser {
        let chooser = match self.method {
            Method::Dense => return Chooser::Dense,
            Method::Score(scorer) => Chooser::Policy(SelectionPolicy { scorer, ..self.policy }),
            Method::Evict(evictor) => {
                Chooser::Selector(evictor.start(self.policy, Arc::clone(prompt)))
            }
        };
        match (self.reselect, chooser) {
            (None, chooser) => chooser,
            (Some(when), Chooser::Policy(policy)) => {
                Chooser::Selector(Box::new(Reselecting::new(policy, when)))
            }
            (Some(when), Chooser::Selector(inner)) => {
                Chooser::Selector(Box::new(Reselecting::new(inner, when)))
            }
            (Some(_), Chooser::Dense) => Chooser::Dense,
        }
    }
}

/// Chooses the pages of one sequence.
pub enum Chooser {
    /// All of them.
    Dense,
    /// By a policy, with kernels where there are some.
    Policy(SelectionPolicy),
    /// By something with a memory of its own.
    Selector(Box<dyn PageSelector>),
}

impl Chooser {
    /// As the model takes it.
    #[must_use]
    pub fn attention(&self) -> Attention<'_> {
        match self {
            Self::Dense => Attention::Dense,
            Self::Policy(policy) => Attention::Policy(policy),
            Self::Selector(selector) => Attention::Custom(selector.as_ref()),
        }
    }

    /// As a selector, to be watched; `None` when everything is read.
    #[must_use]
    pub fn selector(&self) -> Option<&dyn PageSelector> {
        match self {
            Self::Dense => None,
            Self::Policy(policy) => Some(policy),
            Self::Selector(selector) => Some(selector.as_ref()),
        }
    }
}

impl std::fmt::Debug for Chooser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dense => f.write_str("Dense"),
            Self::Policy(policy) => f.debug_tuple("Policy").field(policy).finish(),
            Self::Selector(_) => f.write_str("Selector"),
        }
    }
}
