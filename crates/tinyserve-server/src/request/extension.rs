//! `"tinyserve": {…}`: what only this engine knows, under the names of its settings.

use std::collections::BTreeMap;

use tinyserve::{AttentionMode, GroupReduceName, ScorerName};

use super::body::Body;
use super::settings;
use crate::error::ApiError;

const FIELDS: &[&str] = &[
    "attention",
    "selection_ratio",
    "top_p_pages",
    "token_budget",
    "scorer",
    "group_reduce",
    "sink_pages",
    "recent_pages",
    "dense_layers",
    "sparse_min_context",
    "plugins",
    "session",
];

/// Settings of one request that replace the server's.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Extension {
    /// Whether the request has the object at all; its answer then tells what only this engine
    /// knows.
    pub(crate) is_given: bool,
    pub(crate) attention: Option<AttentionMode>,
    pub(crate) selection_ratio: Option<f64>,
    pub(crate) token_budget: Option<usize>,
    pub(crate) top_p_pages: Option<f64>,
    pub(crate) scorer: Option<ScorerName>,
    pub(crate) group_reduce: Option<GroupReduceName>,
    pub(crate) sink_pages: Option<usize>,
    pub(crate) recent_pages: Option<usize>,
    pub(crate) dense_layers: Option<usize>,
    pub(crate) sparse_min_context: Option<usize>,
    /// Plugins that the request switches on or off.
    pub(crate) plugins: BTreeMap<String, bool>,
    pub(crate) session: Option<String>,
}

impl Extension {
    /// Whether it asks for another selection of pages than the server's.
    pub(crate) fn selects(&self) -> bool {
        let alone = Self {
            is_given: self.is_given,
            plugins: self.plugins.clone(),
            session: self.session.clone(),
            ..Self::default()
        };
        *self != alone
    }

    pub(super) fn read(body: &Body<'_>) -> Result<Self, ApiError> {
        let Some(object) = body.object("tinyserve", FIELDS, "tinyserve.")? else {
            return Ok(Self::default());
        };
        // Nobody else reads this object: a name that is not known is a mistake.
        if let Some(name) = object.unknown().first() {
            let name = format!("tinyserve.{name}");
            let message = format!("{name} is not known, expected one of {}", FIELDS.join(", "));
            return Err(ApiError::field(name, message));
        }
        let share = "a number above 0 and at most 1";
        let extension = Self {
            is_given: true,
            attention: object.value("attention", "\"auto\", \"dense\" or \"sparse\"")?,
            selection_ratio: object
                .checked("selection_ratio", share, |ratio: &f64| *ratio > 0.0 && *ratio <= 1.0)?,
            top_p_pages: object
                .checked("top_p_pages", share, |share: &f64| *share > 0.0 && *share <= 1.0)?,
            token_budget: object.size("token_budget", 1, usize::MAX)?,
            scorer: object.value("scorer", "the name of a scorer, such as \"box\"")?,
            group_reduce: object.value("group_reduce", "\"max\" or \"softmax-vote\"")?,
            sink_pages: object.size("sink_pages", 0, usize::MAX)?,
            recent_pages: object.size("recent_pages", 0, usize::MAX)?,
            dense_layers: object.size("dense_layers", 0, usize::MAX)?,
            sparse_min_context: object.size("sparse_min_context", 0, usize::MAX)?,
            plugins: object
                .value("plugins", "an object of names of plugins and true or false")?
                .unwrap_or_default(),
            session: settings::name(&object, "session")?,
        };
        let budgets = ["selection_ratio", "token_budget", "top_p_pages"];
        let mut given = budgets.into_iter().filter(|name| object.has(name));
        if let (Some(first), Some(second)) = (given.next(), given.next()) {
            return Err(object.error(second, &format!("either it or {first}")));
        }
        Ok(extension)
    }
}
