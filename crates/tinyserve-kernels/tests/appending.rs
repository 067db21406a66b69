//! What every path writes into pages is what the reference writes: keys, values, boxes, codes.

mod common;

use common::{Cache, LAYER, Numbers, backends, shapes};
use proptest::prelude::*;
use tinyserve_kernels::Cpu;
use tinyserve_kv::{KvElement, PageId, with_elements};

/// Everything that the pages of a sequence of `tokens` tokens hold: codes, and as numbers, of which
/// the two zeros are equal, boxes, ranges of codes, and keys and values of what holds no codes.
fn written(cache: &Cache, tokens: usize) -> (Vec<u8>, Vec<f32>) {
    let (layout, shape) = (cache.pages.layout(), cache.pages.layout().shape());
    let (mut bytes, mut numbers) = (Vec::new(), Vec::new());
    for (index, &page) in cache.tables[0].pages().iter().enumerate() {
        let held = (tokens - index * layout.page_size()).min(layout.page_size());
        let codes = layout.codes().filter(|_| held == layout.page_size());
        for kv_head in 0..shape.kv_heads {
            numbers.extend(corners(cache, page, kv_head));
            if let Some(codes) = codes {
                let page = cache.pages.code_page(LAYER, page, kv_head);
                bytes.extend_from_slice(&page.bytes()[..codes.values().end]);
                let ranges = page.scales().iter().chain(page.minima());
                numbers.extend(ranges.map(|x| x.to_f32()));
                continue;
            }
            with_elements!(layout, (_E, O) => {
                let head = cache.pages.head::<O>(LAYER, page, kv_head);
                let keys = (0..held).flat_map(|offset| head.key(offset));
                let values = head.values[..held * shape.head_dim].iter().copied();
                numbers.extend(keys.chain(values).map(KvElement::to_f32));
            });
        }
    }
    (bytes, numbers)
}

fn corners(cache: &Cache, page: PageId, kv_head: usize) -> Vec<f32> {
    with_elements!(cache.pages.layout(), (E, _O) => {
        let corners = cache.pages.page_box::<E>(LAYER, page, kv_head);
        corners.min().chain(corners.max()).map(KvElement::to_f32).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn paths_write_what_the_reference_writes(
        (heads, layout) in shapes(),
        chunks in prop::collection::vec(prop_oneof![Just(1usize), 2usize..30], 1..5),
        seed in any::<u64>(),
    ) {
        let (mut numbers, width) = (Numbers(seed), heads.qkv_width());
        let tokens: usize = chunks.iter().sum();
        // Where rounding goes wrong: below the smallest f16, around 1, beyond the largest.
        let scales = [1e-9, 6e-8, 1.0, 1.0, 1.0, 300.0, 65_504.0, 1e6];
        let scale = |numbers: &mut Numbers| scales[numbers.bits() as usize % scales.len()];
        let qkv: Vec<f32> =
            (0..tokens * width).map(|_| scale(&mut numbers) * numbers.number()).collect();
        let write = |cpu: &Cpu| {
            let mut cache = Cache::new(heads, layout, &[tokens]);
            let mut first = 0;
            for &chunk in &chunks {
                cache.append(cpu, 0, first, &qkv[first * width..(first + chunk) * width]);
                first += chunk;
            }
            written(&cache, tokens)
        };
        let expected = write(&Cpu::reference());
        prop_assert!(expected.1.iter().all(|x| x.is_finite()));
        for cpu in backends(2) {
            let found = write(&cpu);
            prop_assert_eq!(&found.0, &expected.0, "codes of {}", cpu.path());
            prop_assert_eq!(&found.1, &expected.1, "{}", cpu.path());
        }
    }
}
