//! Sizes that launches are made for, so that steps of nearly the same size are one graph.

/// Rows up to which steps are filled up: prompts that are longer do not come again.
pub(super) const MOST_ROWS: usize = 64;

/// Rows, runs or tiles that launches for `n` of them are made for: 1, 2, 4, 8 and so on. What fills
/// them up has no effect, or one that nobody reads.
pub(super) fn bucket(n: usize) -> usize {
    if n == 0 || n > MOST_ROWS { n } else { n.next_power_of_two() }
}

/// `values`, filled up to a bucket.
pub(super) fn filled<T: Copy>(values: &[T], filling: T) -> Vec<T> {
    let mut all = Vec::with_capacity(bucket(values.len()));
    all.extend_from_slice(values);
    all.resize(bucket(values.len()), filling);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_up_to_the_largest() {
        let all = [0, 1, 2, 3, 4, 5, 9, 33, 64, 65, 100].map(bucket);
        assert_eq!(all, [0, 1, 2, 4, 4, 8, 16, 64, 64, 65, 100]);
        assert_eq!(filled(&[7, 8, 9], 0), [7, 8, 9, 0]);
    }
}
