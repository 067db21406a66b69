//! How fast this machine reads memory: what decoding is held to.

use std::thread;
use std::time::Instant;

/// Far above any cache.
const BYTES: usize = 512 << 20;
const PASSES: usize = 5;

/// Bytes per second that `threads` threads read together; the best of several passes, because
/// whatever else runs on the machine only ever takes some away.
pub(super) fn read_bandwidth(threads: usize) -> f64 {
    let words = vec![1_u64; BYTES / size_of::<u64>()];
    let share = words.len().div_ceil(threads);
    let pass = || {
        let start = Instant::now();
        let sum: u64 = thread::scope(|scope| {
            let readers: Vec<_> =
                words.chunks(share).map(|words| scope.spawn(move || sum(words))).collect();
            readers.into_iter().filter_map(|reader| reader.join().ok()).sum()
        });
        let seconds = start.elapsed().as_secs_f64();
        // The sum is looked at, so that no compiler leaves the reading out.
        assert_eq!(sum, words.len() as u64, "a thread read something else");
        BYTES as f64 / seconds
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}

/// Eight sums side by side, which the compiler turns into vector additions.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0_u64; 8];
    let (eights, rest) = words.as_chunks::<8>();
    for eight in eights {
        for (sum, word) in sums.iter_mut().zip(eight) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_counts() {
        let words: Vec<u64> = (0..1003).collect();
        assert_eq!(sum(&words), 1003 * 1002 / 2);
    }
}
