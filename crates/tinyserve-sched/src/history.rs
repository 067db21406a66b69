//! How the tokens of a sequence were computed, so that they can be computed so again when its
//! pages are gone: which pages steps selected by what, and which tokens were pruned when.

use std::ops::Range;

use crate::AttentionChoice;
use crate::pruning::Prunings;

/// How the tokens of a sequence were computed.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    /// Positions whose tokens selecting steps computed, and which pages these read: ascending.
    selected: Vec<(Range<usize>, AttentionChoice)>,
    pub(crate) prunings: Prunings,
}

impl History {
    /// A history of tokens of which none was pruned.
    pub(crate) fn of_selected(selected: Vec<(Range<usize>, AttentionChoice)>) -> Self {
        Self { selected, prunings: Prunings::default() }
    }

    pub(crate) fn selected(&self) -> &[(Range<usize>, AttentionChoice)] {
        &self.selected
    }

    /// Writes down that the tokens at `positions`, which come after all that are written down, were
    /// computed by selecting so.
    pub(crate) fn select(&mut self, positions: Range<usize>, attention: &AttentionChoice) {
        if !positions.is_empty() {
            self.selected.push((positions, attention.clone()));
        }
    }

    /// The end of what is written down of selecting steps.
    pub(crate) fn select_end(&self) -> usize {
        self.selected.last().map_or(0, |(positions, _)| positions.end)
    }

    /// What selected for the token at `position`, if that is written down, and the position up to
    /// which the answer holds.
    pub(crate) fn selection_at(&self, position: usize) -> (Option<&AttentionChoice>, usize) {
        let index = self.selected.partition_point(|(positions, _)| positions.end <= position);
        match self.selected.get(index) {
            Some((positions, attention)) if positions.start <= position => {
                (Some(attention), positions.end)
            }
            Some((positions, _)) => (None, positions.start),
            None => (None, usize::MAX),
        }
    }

    /// Tokens from the first on, of which only the first `of` matter, that any request computes
    /// alike: reading all that comes before them. More than there are if all are.
    pub(crate) fn alike(&self, of: usize) -> usize {
        let selected = self.selected.first().map(|(positions, _)| positions.start);
        let unselected = selected.filter(|&start| start < of).unwrap_or(usize::MAX);
        let pruned = self.prunings.first().map(|pruning| pruning.computed);
        // Of the prunings, all matter or, where it is cut before the first pruned token, none.
        let unpruned = pruned.filter(|&computed| computed <= of).unwrap_or(usize::MAX);
        unselected.min(unpruned)
    }

    /// Forgets the tokens from `tokens` on, before which nothing was pruned.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.selected.retain_mut(|(positions, _)| {
            positions.end = positions.end.min(tokens);
            positions.start < positions.end
        });
        self.prunings = Prunings::default();
    }
}
