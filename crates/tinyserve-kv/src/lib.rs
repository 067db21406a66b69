#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod append;
mod codes;
mod compact;
mod error;
mod format;
mod layout;
mod memory;
mod open;
mod pages;
mod policy;
mod pool;
mod prefix;
mod select;
mod selector;
mod table;

pub use append::NewToken;
pub use codes::{CodeLayout, CodePage};
pub use error::KvError;
pub use format::{KvElement, KvFormat};
pub use layout::{GROUP_PAGES, KvLayout, KvShape, MAX_PAGE_SIZE};
pub use pages::{HeadPage, HostPages, PageBox};
pub use policy::{Budget, GroupReduce, Scorer, SelectionPolicy};
pub use pool::{PageId, PagePool};
pub use prefix::{
    EvictionCause, EvictionPolicy, PageHash, Prefix, PrefixIndex, PrefixOptions, PrefixStats,
};
pub use select::{attention_mass, score_box, select_pages};
pub use selector::{PageSelector, SelectFields, SelectInput};
pub use table::{PageCopy, PageTable, Slot, TokenMove};

#[doc(hidden)]
pub use half;
