//! The likeliest tokens of rows of logits, and what makes probabilities of them.

use crate::Backend;

/// Most tokens of a row that [`Backend::top_logits`] finds.
pub const MOST_TOP_LOGITS: usize = 128;

/// Finds the likeliest tokens of some rows of logits.
#[derive(Debug)]
pub struct TopLogitsArgs<'a, B: Backend> {
    /// `[rows, vocab]`.
    pub logits: &'a B::Tensor,
    /// Which rows, in this order.
    pub rows: &'a [u32],
    /// Tokens of each row, 1 to [`MOST_TOP_LOGITS`]; a smaller vocabulary has fewer.
    pub k: usize,
    /// What was found, in place of what is there.
    pub out: &'a mut TopLogits,
}

/// The likeliest tokens of rows of logits. Reused from step to step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TopLogits {
    /// Tokens of a row.
    k: usize,
    /// `[rows, k]`.
    tokens: Vec<(u32, f32)>,
    /// `[rows]`.
    log_sum_exp: Vec<f64>,
}

/// The likeliest tokens of one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TopRow<'a> {
    /// Tokens and their logits, the largest first; of equal ones the lower token comes first.
    pub tokens: &'a [(u32, f32)],
    /// `ln Σ exp(logit)` over the whole vocabulary. NaN when a logit is, or when the largest is
    /// not finite: then there are no probabilities.
    pub log_sum_exp: f64,
}

impl TopLogits {
    /// Rows that were looked at.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.log_sum_exp.len()
    }

    /// What was found in row `row` of those that were asked for.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn row(&self, row: usize) -> TopRow<'_> {
        let tokens = &self.tokens[row * self.k..(row + 1) * self.k];
        TopRow { tokens, log_sum_exp: self.log_sum_exp[row] }
    }

    /// Forgets every row; from now on each has `k` tokens, or as many as the vocabulary.
    ///
    /// # Panics
    /// When `k` is 0 or above [`MOST_TOP_LOGITS`].
    pub fn begin(&mut self, k: usize, vocab: usize) {
        assert!((1..=MOST_TOP_LOGITS).contains(&k), "{k} tokens of a row");
        self.k = k.min(vocab);
        self.tokens.clear();
        self.log_sum_exp.clear();
    }

    /// Adds what a device found in a row: as many tokens as [`Self::begin`] said.
    pub(crate) fn push(&mut self, tokens: impl Iterator<Item = (u32, f32)>, log_sum_exp: f64) {
        self.tokens.extend(tokens.take(self.k));
        self.log_sum_exp.push(log_sum_exp);
        assert_eq!(self.tokens.len(), self.rows() * self.k, "tokens of a row");
    }

    /// Finds the likeliest tokens of `logits` `[vocab]`, on the host.
    pub fn push_row(&mut self, logits: &[f32]) {
        let start = self.tokens.len();
        for (id, &logit) in (0..).zip(logits) {
            let found = &self.tokens[start..];
            if found.len() == self.k {
                // Of equal ones the first stays.
                if !found.last().is_some_and(|&(_, least)| logit > least) {
                    continue;
                }
                self.tokens.pop();
            }
            let at = self.tokens[start..].partition_point(|&(_, larger)| larger >= logit);
            self.tokens.insert(start + at, (id, logit));
        }
        self.log_sum_exp.push(log_sum_exp(logits));
    }
}

/// `ln Σ exp(logit)`; NaN when a logit is, or when the largest is not finite.
#[must_use]
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !peak.is_finite() {
        return f64::NAN;
    }
    let sum: f64 = logits.iter().map(|&x| f64::from(x - peak).exp()).sum();
    f64::from(peak) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn top(k: usize, logits: &[f32]) -> (Vec<u32>, f64) {
        let mut top = TopLogits::default();
        top.begin(k, logits.len());
        top.push_row(logits);
        let row = top.row(0);
        (row.tokens.iter().map(|&(id, _)| id).collect(), row.log_sum_exp)
    }

    #[test]
    fn the_largest_come_first_and_of_equal_ones_the_lower() {
        let logits = [1.0, 3.0, -0.0, 3.0, 0.0, 2.0];
        assert_eq!(top(1, &logits).0, [1]);
        assert_eq!(top(5, &logits).0, [1, 3, 5, 0, 2], "-0 and 0 are equal");
        assert_eq!(top(99, &logits).0, [1, 3, 5, 0, 2, 4]);
    }

    #[test]
    fn what_has_no_probabilities_says_so() {
        let ln = |logits: &[f32]| top(1, logits).1;
        assert!((ln(&[0.0, 0.0]) - 2f64.ln()).abs() < 1e-12);
        for broken in [
            [f32::NAN, 1.0],
            [1.0, f32::NAN],
            [f32::INFINITY, 1.0],
            [f32::NEG_INFINITY, f32::NEG_INFINITY],
        ] {
            assert!(ln(&broken).is_nan(), "{broken:?}");
        }
        assert_eq!(ln(&[f32::NEG_INFINITY, 1.0]), 1.0);
    }
}
