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
    fn run<S: Simd>(self, _simd: S) {
        let Self { scores, budget, sink, recent, list } = self;
        let pages = scores.len();
        let sink = sink.min(pages);
        let recent = pages - recent.max(1).min(pages - sink);
        let wanted = budget.saturating_sub(sink + pages - recent).min(recent - sink);
        list.clear();
        list.extend(0..sink as u32);
        best(&scores[sink..recent], wanted, list);
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

/// Lists the `wanted` highest of `scores`, ties to the first, in ascending order; page 0 is the
/// one after those that `list` holds already.
#[inline(always)]
fn best(scores: &[f32], wanted: usize, list: &mut Vec<u32>) {
    let start = list.len();
    if wanted == 0 || wanted >= scores.len() {
        list.extend((start..start + wanted).map(|page| page as u32));
        return;
    }
    let at_least = |x: f32| scores.iter().map(|&score| u32::from(score >= x)).sum::<u32>() as usize;
    let lowest = scores.iter().fold(f32::INFINITY, |a, &b| if b < a { b } else { a });
    let highest = scores.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let ordered = |x: f32| i64::from(order(x.to_bits() as i32));
    // More than wanted are as high as the lower threshold, fewer are as high as the upper one:
    // none at first, so it begins after +0 when the highest is −0, which is as high.
    let (mut low, mut high) = (ordered(lowest), ordered(highest + 0.0) + 1);
    let mut above = 0;
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let count = at_least(threshold(middle));
        if count == wanted {
            (low, high, above) = (middle, middle, wanted);
        } else if count > wanted {
            low = middle;
        } else {
            (high, above) = (middle, count);
        }
    }
    let mut ties = wanted - above;
    let (low, high) = (threshold(low), threshold(high));
    // Every page is written, and stays if it is counted: nothing to mispredict.
    list.resize(start + wanted + 1, 0);
    let (out, mut n) = (&mut list[start..], 0);
    for (i, &score) in scores.iter().enumerate() {
        out[n] = (start + i) as u32;
        let sure = score >= high;
        let tie = !sure & (score >= low) & (ties > 0);
        ties -= usize::from(tie);
        n += usize::from(sure | tie);
    }
    list.truncate(start + wanted);
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
