#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod append;
mod codes;
mod compact;
mod error;
mod format;
mod heads;
mod keys;
mod layout;
mod memory;
mod methods;
mod open;
mod pages;
mod policy;
mod pool;
mod prefix;
mod reselect;
mod select;
mod selector;
mod summaries;
mod table;
mod top_p;
mod transfer;

pub use append::{LayerMut, NewToken};
pub use codes::{CodeLayout, CodePage};
pub use error::KvError;
pub use format::{KvElement, KvFormat};
pub use heads::{CodePages, HeadPage, HeadPages};
pub use keys::{HostKeys, PageKeys};
pub use layout::{GROUP_PAGES, KvLayout, KvShape, MAX_PAGE_SIZE};
pub use methods::{
    AttentionObserver, Evictor, HeadAttention, METHODS, Method, PageScorer, PageSummary,
    PromptAttention, ScoreCost, Scorer, attention_weights, score_box,
};
pub use open::OpenPlaces;
pub use pages::{HostPages, PageBox};
pub use policy::{Budget, GroupReduce, SelectionPolicy};
pub use pool::{PageId, PagePool};
pub use prefix::{
    EvictionCause, EvictionPolicy, PageHash, Prefix, PrefixIndex, PrefixOptions, PrefixStats,
};
pub use reselect::{Reselect, Reselecting};
pub use select::{attention_mass, select_pages};
pub use selector::{PageSelector, SelectFields, SelectInput};
pub use summaries::GroupSummaries;
pub use table::{PageCopy, PageTable, Slot, TokenMove};

#[doc(hidden)]
pub use half;
