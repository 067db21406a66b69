//! The best pages without sorting: bisection on the score, then one pass that lists them.

use crate::cpu::simd::{Kernel, Simd};

/// What [`tinyserve_kv::select_pages`] does, for scores without NaN.
pub(super) struct Best<'a> {
    /// `[pages]`.
    pub(super) scores: &'a [f32],
    /// Pages to list, always-kept ones included.
    pub(super) budget: usize,
    /// First pages that are always kept.
    pub(super) sink: usize,
    /// Last pages that are always kept; at least one is.
    pub(super) recent: usize,
    pub(super) list: &'a mut Vec<u32>,
}

impl Kernel for Best<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { scores, budget, sink, recent, list } = self;
        let pages = scores.len();
        let sink = sink.min(pages);
        let recent = pages - recent.max(1).min(pages - sink);
        let wanted = budget.saturating_sub(sink + pages - recent).min(recent - sink);
        list.clear();
        list.extend(0..sink as u32);
        best(simd, &scores[sink..recent], wanted, list);
        list.extend(recent as u32..pages as u32);
    }
}

/// A whole number for each float, in the same order; −0 comes right before +0. Its own inverse.
#[inline(always)]
fn order(bits: i32) -> i32 {
    bits ^ ((bits >> 31) & i32::MAX)
}

#[inline(always)]
fn threshold(ordered: i64) -> f32 {
    f32::from_bits(order(ordered as i32) as u32)
}

/// A bit for each of a vector's scores, or of what is left of one, that is at least `threshold`.
#[inline(always)]
fn mask<S: Simd>(simd: S, scores: &[f32], threshold: S::V) -> u32 {
    if scores.len() == S::LANES {
        return simd.at_least(simd.load(scores), threshold);
    }
    simd.at_least(simd.load_tail(scores), threshold) & ((1 << scores.len()) - 1)
}

/// The lowest and the highest of `scores`, of which there is one at least.
#[inline(always)]
fn extremes<S: Simd>(simd: S, scores: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = (simd.splat(scores[0]), simd.splat(scores[0]));
    let vectors = scores.chunks_exact(S::LANES);
    let rest = vectors.remainder();
    for scores in vectors {
        let scores = simd.load(scores);
        (low, high) = (simd.min(scores, low), simd.max(scores, high));
    }
    let mut lowest = -simd.highest(simd.sub(simd.splat(0.0), low));
    let mut highest = simd.highest(high);
    for &score in rest {
        lowest = if score < lowest { score } else { lowest };
        highest = if score > highest { score } else { highest };
    }
    (lowest, highest)
}

/// Lists the `wanted` highest of `scores`, ties to the first, in ascending order; page 0 is the
/// one after those that `list` holds already.
#[inline(always)]
fn best<S: Simd>(simd: S, scores: &[f32], wanted: usize, list: &mut Vec<u32>) {
    let start = list.len();
    if wanted == 0 || wanted >= scores.len() {
        list.extend((start..start + wanted).map(|page| page as u32));
        return;
    }
    let (lowest, highest) = extremes(simd, scores);
    let ordered = |x: f32| i64::from(order(x.to_bits() as i32));
    // More than wanted are as high as the lower threshold, fewer are as high as the upper one:
    // none at first, so it begins after +0 when the highest is −0, which is as high. And −0 is as
    // low as the lowest when that is +0.
    let (mut low, mut high) = (ordered(lowest + 0.0), ordered(highest + 0.0) + 1);
    let mut above = 0;
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let at_least = simd.splat(threshold(middle));
        let mut count = 0;
        for scores in scores.chunks(S::LANES) {
            count += mask(simd, scores, at_least).count_ones();
        }
        let count = count as usize;
        if count == wanted {
            (low, high, above) = (middle, middle, wanted);
        } else if count > wanted {
            low = middle;
        } else {
            (high, above) = (middle, count);
        }
    }
    let mut ties = wanted - above;
    let (low, high) = (simd.splat(threshold(low)), simd.splat(threshold(high)));
    list.reserve(wanted);
    for (i, scores) in scores.chunks(S::LANES).enumerate() {
        let mut chosen = mask(simd, scores, high);
        let mut tie = mask(simd, scores, low) & !chosen;
        while ties > 0 && tie != 0 {
            chosen |= tie & tie.wrapping_neg();
            tie &= tie - 1;
            ties -= 1;
        }
        let first = start + i * S::LANES;
        while chosen != 0 {
            list.push(first as u32 + chosen.trailing_zeros());
            chosen &= chosen - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tinyserve_kv::select_pages;

    use super::*;
    use crate::cpu::path::CpuPath;
    use crate::cpu::simd::dispatch;

    fn scores() -> impl Strategy<Value = Vec<f32>> {
        let score = prop_oneof![
            6 => (-4i8..4).prop_map(f32::from),
            4 => -1e3f32..1e3,
            1 => prop::sample::select(vec![
                0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45, -1e-45,
            ]),
        ];
        let alike = prop::sample::select(vec![0.0f32, -0.0, f32::INFINITY, f32::NEG_INFINITY, 7.0]);
        prop_oneof![
            prop::collection::vec(score, 0..200),
            (alike, 0usize..100).prop_map(|(x, n)| vec![x; n]),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1024))]

        #[test]
        fn the_list_is_the_references(
            scores in scores(),
            budget in 0usize..210,
            sink in 0usize..6,
            recent in 0usize..6,
        ) {
            let mut expected = Vec::new();
            select_pages(&scores, budget, sink, recent, &mut expected);
            for path in CpuPath::available().filter(|&path| path != CpuPath::Scalar) {
                // What was in the list before does not matter.
                let mut list = vec![9; 3];
                let best = Best { scores: &scores, budget, sink, recent, list: &mut list };
                dispatch(path, best);
                prop_assert_eq!(&list, &expected, "{}", path);
            }
        }
    }
}
