//! A selector of one's own: recent pages plus random ones, the baseline that any scorer must beat.

use tinyserve_kv::{PageSelector, SelectFields, SelectInput};

/// Reads the last `recent` pages and every other page with probability `share`.
struct RecentPlusRandom {
    recent: usize,
    share: f64,
    seed: u64,
}

impl PageSelector for RecentPlusRandom {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let pages = input.page_count();
        // A selector is shared between threads and has no state: the draw is a hash of the step,
        // which also makes a run repeatable.
        let step = [input.layer(), input.kv_head(), input.tokens()]
            .iter()
            .fold(self.seed, |hash, &x| mix(hash ^ x as u64));
        let drawn = |page: usize| (mix(step ^ page as u64) as f64) < self.share * u64::MAX as f64;
        // In ascending order, the page of the newest token included.
        selected.extend(
            (0..pages)
                .filter(|&page| page + self.recent.max(1) >= pages || drawn(page))
                .map(|page| page as u32),
        );
        true
    }
}

/// The finalizer of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn main() {
    let (tokens, page_size, head_dim) = (400, 16, 2);
    // This selector looks at no box and no query; one that does finds them in `input.min(page)`,
    // `input.max(page)` and `input.queries()`.
    let boxes = vec![0.0; 25 * 2 * head_dim];
    let fields = SelectFields {
        layer: 3,
        kv_head: 0,
        tokens,
        page_size,
        head_dim,
        scale: 1.0,
        queries: &[1.0, -1.0],
        boxes: &boxes,
        keys: None,
    };
    let mut selected = Vec::new();
    let selector = RecentPlusRandom { recent: 2, share: 0.3, seed: 42 };
    assert!(selector.select(&SelectInput::new(fields), &mut selected));
    assert!(selected.is_sorted() && selected.ends_with(&[23, 24]));
    println!("{} of 25 pages: {selected:?}", selected.len());
}

#[test]
fn it_runs() {
    main();
}
