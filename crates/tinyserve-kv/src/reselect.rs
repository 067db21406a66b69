//! Choosing less often than at every step: consecutive queries ask for nearly the same pages.
//!
//! Sources: LServe (Yang et al., MLSys 2025) re-selects every n steps; TokenSelect (arXiv
//! 2411.02886) while the cosine between queries stays high.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::{PageSelector, ScoreCost, SelectInput};

/// When a selection is made again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reselect {
    /// At every so many steps; 1 is every step.
    Every(usize),
    /// When the cosine between a query and that of the last selection falls below this.
    Below(f32),
}

/// A selector for one sequence that keeps a selection while `Reselect` allows it.
///
/// Pages that were opened since the selection are read, too.
#[derive(Debug)]
pub struct Reselecting<S> {
    inner: S,
    when: Reselect,
    heads: Mutex<HashMap<(usize, usize), Selection>>,
}

#[derive(Debug)]
struct Selection {
    list: Vec<u32>,
    /// Whether there was a list.
    listed: bool,
    pages: usize,
    queries: Vec<f32>,
    /// Steps that read it.
    age: usize,
}

impl<S: PageSelector> Reselecting<S> {
    /// Asks `inner` only when it has to.
    #[must_use]
    pub fn new(inner: S, when: Reselect) -> Self {
        Self { inner, when, heads: Mutex::default() }
    }
}

impl Reselect {
    fn holds(self, selection: &Selection, input: &SelectInput<'_>) -> bool {
        match self {
            Self::Every(steps) => selection.age < steps,
            Self::Below(similarity) => input
                .queries()
                .zip(selection.queries.chunks_exact(input.head_dim()))
                .all(|(now, then)| cosine(now, then) >= similarity),
        }
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

impl<S: PageSelector> PageSelector for Reselecting<S> {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let key = (input.layer(), input.kv_head());
        let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(selection) = heads.get_mut(&key)
            && self.when.holds(selection, input)
            && selection.pages <= input.page_count()
        {
            selection.age += 1;
            if selection.listed {
                selected.extend_from_slice(&selection.list);
                selected.extend(selection.pages as u32..input.page_count() as u32);
            }
            return selection.listed;
        }
        drop(heads);
        let listed = self.inner.select(input, selected);
        let selection = Selection {
            list: selected.clone(),
            listed,
            pages: input.page_count(),
            queries: input.queries().flatten().copied().collect(),
            age: 1,
        };
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).insert(key, selection);
        listed
    }

    fn needs_keys(&self) -> bool {
        self.inner.needs_keys()
    }

    fn bytes_read(&self, head: (usize, usize), cost: &ScoreCost) -> usize {
        let heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        match heads.get(&head) {
            // Nothing was scored.
            Some(selection) if selection.age > 1 => 0,
            _ => self.inner.bytes_read(head, cost),
        }
    }

    fn page_scores(&self, input: &SelectInput<'_>) -> Option<Vec<f32>> {
        self.inner.page_scores(input)
    }
}

impl PageSelector for Box<dyn PageSelector> {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        self.as_ref().select(input, selected)
    }

    fn needs_keys(&self) -> bool {
        self.as_ref().needs_keys()
    }

    fn bytes_read(&self, head: (usize, usize), cost: &ScoreCost) -> usize {
        self.as_ref().bytes_read(head, cost)
    }

    fn page_scores(&self, input: &SelectInput<'_>) -> Option<Vec<f32>> {
        self.as_ref().page_scores(input)
    }
}
