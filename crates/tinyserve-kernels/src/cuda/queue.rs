//! Launches of a step that are kept back until something is asked for.

use std::ops::Range;

use super::launch::{Arg, Shape};

/// Launches in order, with their arguments.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Queue {
    launches: Vec<(&'static str, Shape, Range<usize>)>,
    args: Vec<Arg>,
}

impl Queue {
    pub(super) fn push(&mut self, kernel: &'static str, shape: Shape, args: &[Arg]) {
        let start = self.args.len();
        self.args.extend_from_slice(args);
        self.launches.push((kernel, shape, start..self.args.len()));
    }

    pub(super) fn len(&self) -> usize {
        self.launches.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, Shape, &[Arg])> {
        self.launches
            .iter()
            .map(|(kernel, shape, args)| (*kernel, *shape, &self.args[args.clone()]))
    }

    pub(super) fn clear(&mut self) {
        self.launches.clear();
        self.args.clear();
    }

    /// Whether a launch takes an address in `bytes`.
    pub(super) fn reaches(&self, bytes: &Range<u64>) -> bool {
        self.args.iter().any(|arg| matches!(arg, Arg::Pointer(at) if bytes.contains(at)))
    }
}
