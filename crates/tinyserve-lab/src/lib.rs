#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod needle;
mod plot;
mod probe;
mod recall;
mod report;
mod run;
mod task;
mod text;
mod trace;
mod trial;
mod watch;

pub use error::LabError;
pub use needle::{DepthCell, NeedleRow, NeedleTest, needle};
pub use plot::{Axes, Line, heat_maps, lines};
pub use probe::Probe;
pub use recall::{RecallRow, RecallTest, recall};
pub use report::report;
pub use run::{TracedRun, traced};
pub use task::{Document, LookupTask, NeedleTask, PasskeyTask, Question};
pub use text::{TextRow, TextTest, text};
pub use trace::{TRACE_VERSION, Trace, TraceHeader, TraceStep};
pub use trial::{BudgetFields, Chooser, Trial};
pub use watch::{Seen, Watch};

/// Told what is being done, how much of it is done and how much there is; returns whether to go
/// on. When it says no, a test returns what it has until then.
pub type Control<'a> = dyn FnMut(&'static str, usize, usize) -> bool + 'a;
