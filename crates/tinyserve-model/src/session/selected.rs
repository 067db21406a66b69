//! Which tokens of a session selecting steps computed, as its file says it.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tinyserve_kv::{Budget, GroupReduce, KvError, Scorer, SelectionPolicy};

/// Tokens of a session that selecting steps computed: whoever computes them again has to select so
/// again, or they come out otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct SelectedTokens {
    /// Their positions; not empty.
    pub positions: Range<usize>,
    /// What chose the pages that they read; `None` for a selector of the caller, which no file
    /// holds.
    pub policy: Option<SelectionPolicy>,
}

/// [`SelectedTokens`] in a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stored {
    start: usize,
    end: usize,
    policy: Option<StoredPolicy>,
}

/// A [`SelectionPolicy`] in a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredPolicy {
    scorer: String,
    budget: StoredBudget,
    sink_pages: usize,
    recent_pages: usize,
    dense_layers: usize,
    min_context: usize,
    group_reduce: StoredReduce,
}

/// A [`Budget`] in a header. Shares are the shortest digits that lead back to them, as text: what
/// reads numbers of JSON may be off by the last bit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredBudget {
    SelectionRatio(String),
    TokenBudget(usize),
    TopPPages(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredReduce {
    Max,
    SoftmaxVote,
}

impl Stored {
    pub(super) fn new(selected: &SelectedTokens) -> Self {
        let Range { start, end } = selected.positions;
        let policy = selected.policy.map(|policy| StoredPolicy {
            scorer: policy.scorer.name().to_owned(),
            budget: match policy.budget {
                Budget::Ratio(share) => StoredBudget::SelectionRatio(share.to_string()),
                Budget::Tokens(tokens) => StoredBudget::TokenBudget(tokens),
                Budget::TopP(share) => StoredBudget::TopPPages(share.to_string()),
            },
            sink_pages: policy.sink_pages,
            recent_pages: policy.recent_pages,
            dense_layers: policy.dense_layers,
            min_context: policy.min_context,
            group_reduce: match policy.group_reduce {
                GroupReduce::Max => StoredReduce::Max,
                GroupReduce::SoftmaxVote => StoredReduce::SoftmaxVote,
            },
        });
        Self { start, end, policy }
    }

    /// What it says, if its positions follow `after` and are among `tokens`.
    ///
    /// # Errors
    /// The field, what was found and what was expected.
    pub(super) fn read(&self, after: usize, tokens: usize) -> Result<SelectedTokens, Refused> {
        let positions = self.start..self.end;
        if self.start < after || positions.is_empty() || self.end > tokens {
            return Err(Refused {
                field: "positions",
                found: format!("{positions:?}"),
                expected: format!("some from {after} on, up to {tokens} at most"),
            });
        }
        let policy = self.policy.as_ref().map(StoredPolicy::read).transpose()?;
        Ok(SelectedTokens { positions, policy })
    }
}

impl StoredPolicy {
    fn read(&self) -> Result<SelectionPolicy, Refused> {
        let invalid = |error| match error {
            KvError::Invalid { what, found, expected } => Refused { field: what, found, expected },
            error => Refused {
                field: "policy",
                found: error.to_string(),
                expected: "a selection policy".to_owned(),
            },
        };
        let share = |field, text: &String| {
            text.parse().map_err(|_| Refused {
                field,
                found: format!("{text:?}"),
                expected: "a number".to_owned(),
            })
        };
        let policy = SelectionPolicy {
            scorer: Scorer::named(&self.scorer).map_err(invalid)?,
            budget: match &self.budget {
                StoredBudget::SelectionRatio(text) => {
                    Budget::Ratio(share("selection_ratio", text)?)
                }
                StoredBudget::TokenBudget(tokens) => Budget::Tokens(*tokens),
                StoredBudget::TopPPages(text) => Budget::TopP(share("top_p_pages", text)?),
            },
            sink_pages: self.sink_pages,
            recent_pages: self.recent_pages,
            dense_layers: self.dense_layers,
            min_context: self.min_context,
            group_reduce: match self.group_reduce {
                StoredReduce::Max => GroupReduce::Max,
                StoredReduce::SoftmaxVote => GroupReduce::SoftmaxVote,
            },
        };
        policy.check().map_err(invalid)?;
        Ok(policy)
    }
}

/// A field that is refused.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) field: &'static str,
    pub(super) found: String,
    pub(super) expected: String,
}
