//! The methods that choose pages, one file each, and the registry that names them.
//!
//! To add one, write a file with a [`PageScorer`] or an [`Evictor`], and add its line to
//! [`METHODS`] (and the `mod` that Rust wants beside it): every command that takes the name of a
//! method, its help, and every property test then has it.

mod boxes;
mod cuboid_mean;
mod h2o;
mod mean_std;
mod observe;
mod oracle;
mod oracle_mass;
mod random;
mod snapkv;
mod streaming;
mod summary;
mod two_boxes;
mod two_stage;

use std::fmt;
use std::sync::Arc;

use crate::{KvError, PageSelector, SelectInput, SelectionPolicy};

pub use boxes::score_box;
pub(crate) use mean_std::Moments;
pub use observe::{AttentionObserver, HeadAttention, PromptAttention, attention_weights};
pub(crate) use oracle_mass::log_sum_exp;
pub use summary::PageSummary;

/// Every method by name.
pub static METHODS: &[Method] = &[
    Method::Dense,
    Method::Score(Scorer(&boxes::Box)),
    Method::Score(Scorer(&mean_std::MeanStd)),
    Method::Score(Scorer(&cuboid_mean::CuboidMean)),
    Method::Score(Scorer(&two_boxes::TwoBoxes)),
    Method::Score(Scorer(&two_stage::TwoStage)),
    Method::Score(Scorer(&oracle::Oracle)),
    Method::Score(Scorer(&oracle_mass::OracleMass)),
    Method::Score(Scorer(&streaming::Streaming)),
    Method::Evict(&h2o::H2o),
    Method::Evict(&snapkv::SnapKv),
    Method::Score(Scorer(&random::Random)),
];

/// A way to decide which pages are read.
#[derive(Debug, Clone, Copy)]
pub enum Method {
    /// All of them.
    ///
    /// Summary: none; nothing is scored, and no budget is asked for.
    /// Every key takes part in one softmax over the whole sequence, so the result is exact, and a
    /// step reads all keys and values: its bytes and its time grow with the context.
    /// It is what the other methods are held against: their divergence is from its predictions,
    /// their recall is of its attention, and their bytes are a share of its bytes.
    /// Sources: attention over pages (PagedAttention, Kwon et al., SOSP 2023); the FullCache of the
    /// tables in H2O, Quest and TinyServe.
    Dense,
    /// At every step, those with the best scores.
    Score(Scorer),
    /// Those that are left: pages that were evicted never come back.
    Evict(&'static dyn Evictor),
}

impl Method {
    /// The name that flags and tables use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Score(scorer) => scorer.name(),
            Self::Evict(evictor) => evictor.name(),
        }
    }

    /// What it does, in one line.
    #[must_use]
    pub fn about(self) -> &'static str {
        match self {
            Self::Dense => "reads every page",
            Self::Score(scorer) => scorer.0.about(),
            Self::Evict(evictor) => evictor.about(),
        }
    }

    /// The names of those that `which` keeps, as a sentence lists them.
    pub fn names(which: impl Fn(Self) -> bool) -> String {
        let names = METHODS.iter().filter(|&&method| which(method)).map(|method| method.name());
        names.collect::<Vec<_>>().join(", ")
    }

    /// The method of that name.
    ///
    /// # Errors
    /// When there is none; the message lists the names.
    pub fn named(name: &str) -> Result<Self, KvError> {
        find(name, |_| true, "policy")
    }
}

fn find(name: &str, which: impl Fn(Method) -> bool, what: &'static str) -> Result<Method, KvError> {
    let mut methods = METHODS.iter().copied().filter(|&method| which(method));
    methods.find(|method| method.name() == name).ok_or_else(|| KvError::Invalid {
        what,
        found: name.to_owned(),
        expected: Method::names(which),
    })
}

/// Gives every page a score.
pub trait PageScorer: Send + Sync + fmt::Debug {
    /// The name that flags and tables use.
    fn name(&self) -> &'static str;

    /// What it does, in one line.
    fn about(&self) -> &'static str;

    /// Whether it calls [`SelectInput::keys`].
    fn needs_keys(&self) -> bool {
        true
    }

    /// Fills `scores` `[group, pages]`: what each query may gain from each page, in units of
    /// `q·k`. `budget` pages will be read.
    fn score(&self, input: &SelectInput<'_>, budget: usize, scores: &mut [f32]);

    /// What is kept of a full page, if that is all that its score takes: backends then score with
    /// kernels, and without the keys.
    fn summary(&self) -> Option<&dyn PageSummary> {
        None
    }

    /// Bytes that a kernel would read to score all pages for one KV head, from summaries that lie
    /// ready: a box for each page unless the method says otherwise.
    fn bytes_read(&self, cost: &ScoreCost) -> usize {
        cost.box_bytes()
    }
}

/// What scoring costs: see [`PageScorer::bytes_read`].
#[derive(Debug, Clone, Copy)]
pub struct ScoreCost {
    /// Tokens of the sequence.
    pub tokens: usize,
    /// Their pages.
    pub pages: usize,
    /// Pages that will be read.
    pub budget: usize,
    /// Tokens of one page.
    pub page_size: usize,
    /// Queries that share the KV head.
    pub queries: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// Bytes of one key.
    pub vector_bytes: usize,
}

impl ScoreCost {
    /// Bytes of a box for each page.
    ///
    /// The sign of a query says which corner it needs in each channel, so for a lone one a kernel
    /// reads half of every box.
    #[must_use]
    pub fn box_bytes(&self) -> usize {
        self.queries.min(2) * self.pages * self.vector_bytes
    }
}

/// Keeps the pages that attention was seen to use, for good.
pub trait Evictor: Send + Sync + fmt::Debug {
    /// The name that flags and tables use.
    fn name(&self) -> &'static str;

    /// What it does, in one line.
    fn about(&self) -> &'static str;

    /// A selector for one sequence whose prompt was attended to as `prompt` says.
    ///
    /// It remembers what it evicted, so it serves this sequence and no other.
    fn start(&self, policy: SelectionPolicy, prompt: Arc<PromptAttention>)
    -> Box<dyn PageSelector>;
}

/// What a page is scored by: one of the registered [`PageScorer`]s.
#[derive(Clone, Copy)]
pub struct Scorer(&'static dyn PageScorer);

impl Scorer {
    /// The upper bound of `q·k` over the page's bounding box: `Σ_d max(q_d·min_d, q_d·max_d)`
    /// (TinyServe, arXiv 2509.12211, equation 2; the same as Quest's).
    pub const BOX: Self = Self(&boxes::Box);

    /// The scorer of that name.
    ///
    /// # Errors
    /// When there is none; the message lists the names.
    pub fn named(name: &str) -> Result<Self, KvError> {
        match find(name, |method| matches!(method, Method::Score(_)), "scorer")? {
            Method::Score(scorer) => Ok(scorer),
            // The filter leaves scorers only.
            Method::Dense | Method::Evict(_) => Ok(Self::BOX),
        }
    }

    /// The name that flags and tables use.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// Whether scores take more than the boxes.
    #[must_use]
    pub fn needs_keys(self) -> bool {
        self.0.needs_keys()
    }

    /// As [`PageScorer::score`].
    pub fn score(self, input: &SelectInput<'_>, budget: usize, scores: &mut [f32]) {
        self.0.score(input, budget, scores);
    }

    /// As [`PageScorer::summary`].
    #[must_use]
    pub fn summary(self) -> Option<&'static dyn PageSummary> {
        self.0.summary()
    }

    /// As [`PageScorer::bytes_read`].
    #[must_use]
    pub fn bytes_read(self, cost: &ScoreCost) -> usize {
        self.0.bytes_read(cost)
    }
}

impl Default for Scorer {
    fn default() -> Self {
        Self::BOX
    }
}

impl fmt::Debug for Scorer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl PartialEq for Scorer {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Scorer {}

/// Calls `each` with every page's number and its keys `[tokens of the page, head_dim]`.
fn for_each_page(input: &SelectInput<'_>, mut each: impl FnMut(usize, &[f32])) {
    let mut keys = Vec::new();
    for page in 0..input.page_count() {
        input.keys(page, &mut keys);
        each(page, &keys);
    }
}

/// `Σ_d a_d·b_d`.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}
