//! Pages of codes: what is sealed is read back within half a step, copies are whole, open pages are
//! kept apart and let go.

mod common;

use common::{Numbers, layouts_of, read, read_codes, stored};
use proptest::prelude::*;
use tinyserve_kv::{HostPages, KvFormat, KvLayout, KvShape, PageCopy, PagePool, PageTable, Slot};

const FORMATS: [KvFormat; 2] = [KvFormat::Int8, KvFormat::Int4];

proptest! {
    #[test]
    fn values_are_read_back_within_half_a_step(
        layout in layouts_of(&FORMATS),
        seed in any::<u64>(),
    ) {
        let shape = layout.shape();
        let codes = layout.codes().unwrap();
        let (mut numbers, mut pool) = (Numbers(seed), PagePool::new(1).unwrap());
        let mut pages = HostPages::new(layout, 1).unwrap();
        let page = pool.allocate().unwrap();
        let width = shape.kv_heads * shape.head_dim;
        let mut written = Vec::new();
        for offset in 0..shape.page_size {
            let (keys, values) = (numbers.numbers(width), numbers.numbers(width));
            pages.append(0, Slot { page, offset }, &keys, &values);
            written.push(values);
        }
        for kv_head in 0..shape.kv_heads {
            let head = read_codes(&pages, 0, page, kv_head);
            // It is still there as it was appended, until keys are appended again.
            let full = read(&pages, 0, page, kv_head);
            for (offset, values) in written.iter().enumerate() {
                let values = &values[kv_head * shape.head_dim..(kv_head + 1) * shape.head_dim];
                let at = offset * shape.head_dim;
                let rows = values.chunks(codes.group_channels());
                let mut channel = at;
                for values in rows {
                    let stored: Vec<f32> = values.iter().map(|&x| stored(&layout, x)).collect();
                    let lowest = stored.iter().copied().fold(f32::INFINITY, f32::min);
                    let highest = stored.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    // The minimum is rounded down to f16: by 1/1024, or by the smallest f16.
                    let wide = layout.open_format() == KvFormat::F32;
                    let below = if wide { lowest.abs() / 1024.0 + 6e-8 } else { 0.0 };
                    let step = (highest - lowest + below) / f32::from(codes.highest());
                    // The scale is rounded up likewise.
                    let slack = step / 1024.0 + 6e-8;
                    let largest = lowest.abs().max(highest.abs());
                    for &stored in &stored {
                        prop_assert_eq!(full.values[channel], stored);
                        let error = (head.values[channel] - stored).abs();
                        let bound = 0.5 * (step + slack) * 1.0001 + 4.0 * f32::EPSILON * largest;
                        prop_assert!(error <= bound, "{} for {}", head.values[channel], stored);
                        channel += 1;
                    }
                }
            }
        }
    }

    #[test]
    fn a_copy_is_whole_and_an_open_page_is_its_own(
        layout in layouts_of(&FORMATS),
        tokens in 1usize..100,
        seed in any::<u64>(),
    ) {
        let shape = layout.shape();
        let mut numbers = Numbers(seed);
        let width = shape.kv_heads * shape.head_dim;
        let capacity = 2 * layout.pages_for(tokens) + 2;
        let mut pages = HostPages::new(layout, capacity).unwrap();
        let mut pool = PagePool::new(capacity).unwrap();
        let mut table = PageTable::new(shape.page_size);
        prop_assert_eq!(table.extend(&mut pool, tokens).unwrap(), None);
        let mut append = |pages: &mut HostPages, slot: Slot| {
            let (keys, values) = (numbers.numbers(width), numbers.numbers(width));
            (0..shape.layers).for_each(|layer| pages.append(layer, slot, &keys, &values));
        };
        for token in 0..tokens {
            append(&mut pages, table.slot(token));
        }
        let open = tokens % shape.page_size;
        let last = *table.pages().last().unwrap();
        let bits = |head: common::Head| -> Vec<u32> {
            // Beyond its tokens an open page is garbage.
            let keys = head.keys.iter().take(open * shape.head_dim);
            keys.chain(&head.min).chain(&head.max).map(|x| x.to_bits()).collect()
        };
        let look = |pages: &HostPages, page| -> Vec<Vec<u32>> {
            let heads = (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h)));
            let look = |(layer, head)| match open {
                0 => {
                    let head = read_codes(pages, layer, page, head);
                    head.keys.iter().chain(&head.values).map(|x| x.to_bits()).collect()
                }
                _ => bits(read(pages, layer, page, head)),
            };
            heads.map(look).collect()
        };
        let before = look(&pages, last);
        let mut fork = table.fork(&mut pool);
        let copy = fork.extend(&mut pool, 1).unwrap();
        prop_assert_eq!(copy.is_some(), open > 0);
        let to = copy.map_or_else(|| pool.allocate().unwrap(), |copy: PageCopy| copy.to);
        pages.copy(PageCopy { from: last, to });
        prop_assert_eq!(look(&pages, to), before.clone());
        append(&mut pages, fork.slot(tokens));
        prop_assert_eq!(look(&pages, last), before);
        // What is kept of open pages is let go with them.
        fork.release(&mut pool);
        table.release(&mut pool);
        pages.forget_free(&pool);
        let kept = pages.open_bytes();
        let mut table = PageTable::new(shape.page_size);
        prop_assert_eq!(table.extend(&mut pool, 1).unwrap(), None);
        append(&mut pages, table.slot(0));
        prop_assert_eq!(pages.open_bytes(), kept);
    }
}

#[test]
fn a_sealed_page_is_not_appended_to() {
    for format in FORMATS {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 3, page_size: 4, format };
        let layout = KvLayout::new(shape).unwrap();
        let mut pages = HostPages::new(layout, 1).unwrap();
        let page = PagePool::new(1).unwrap().allocate().unwrap();
        for offset in 0..4 {
            pages.append(0, Slot { page, offset }, &[1.0; 3], &[1.0; 3]);
        }
        let appended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pages.append(0, Slot { page, offset: 2 }, &[1.0; 3], &[1.0; 3]);
        }));
        assert!(appended.is_err());
        // So a sequence is cut at its border, and an open page where one likes.
        assert_eq!([layout.cut(8, 6), layout.cut(7, 6), layout.cut(8, 4)], [4, 6, 4]);
        let floats = KvShape { format: KvFormat::F16, ..shape };
        assert_eq!(KvLayout::new(floats).unwrap().cut(8, 6), 6);
    }
}

#[test]
fn words_hold_neighbours_and_halves_of_bytes_the_first_four_first() {
    let shape =
        KvShape { layers: 1, kv_heads: 1, head_dim: 8, page_size: 2, format: KvFormat::Int4 };
    let layout = KvLayout::new(shape).unwrap();
    let mut pages = HostPages::new(layout, 1).unwrap();
    let page = PagePool::new(1).unwrap().allocate().unwrap();
    // Channel c of the second key is at its box's upper end, of the first at its lower, but for
    // channel 5, which is the other way round.
    for offset in 0..2 {
        let key: Vec<f32> =
            (0..8).map(|c| if (c == 5) == (offset == 0) { 1.0 } else { 0.0 }).collect();
        pages.append(0, Slot { page, offset }, &key, &[0.0; 8]);
    }
    let bytes = pages.code_page(0, page, 0).bytes();
    assert_eq!(bytes[..8], [0x00, 0xf0, 0x00, 0x00, 0xff, 0x0f, 0xff, 0xff]);
}

#[test]
fn a_box_of_keys_in_f32_is_rounded_outwards_and_codes_count_from_it() {
    let shape =
        KvShape { layers: 1, kv_heads: 1, head_dim: 1, page_size: 2, format: KvFormat::Int8 };
    let layout = KvLayout::new(shape).unwrap().with_open_format(KvFormat::F32).unwrap();
    assert_eq!((layout.open_page_bytes(), layout.open_format()), (16, KvFormat::F32));
    let mut pages = HostPages::new(layout, 1).unwrap();
    let page = PagePool::new(1).unwrap().allocate().unwrap();
    // Neighbours of 1/3 and of 2049 in f16 are 1/4096 and 2 apart.
    let keys = [1.0 / 3.0, 2049.0];
    let (below, above) = (1365.0 / 4096.0, 2050.0);
    for (offset, key) in keys.into_iter().enumerate() {
        pages.append(0, Slot { page, offset }, &[key], &[key]);
    }
    let (open, sealed) = (read(&pages, 0, page, 0), read_codes(&pages, 0, page, 0));
    assert_eq!((open.keys, open.values), (keys.to_vec(), keys.to_vec()));
    assert_eq!((&sealed.min, &sealed.max), (&vec![below], &vec![above]));
    // 2049 is a little nearer to the highest code than to the one before.
    assert_eq!(sealed.keys, [below, above]);
    // A value that is the only one of its token has all its digits in its minimum and its scale.
    assert_eq!(sealed.values.iter().map(|x| x.round()).collect::<Vec<_>>(), [0.0, 2049.0]);
}

#[test]
fn open_pages_in_f32_are_for_codes() {
    let shape =
        KvShape { layers: 1, kv_heads: 1, head_dim: 1, page_size: 2, format: KvFormat::F16 };
    let refused = |format, open| {
        let layout = KvLayout::new(KvShape { format, ..shape }).unwrap();
        layout.with_open_format(open).unwrap_err().to_string()
    };
    assert_eq!(
        refused(KvFormat::F16, KvFormat::F32),
        "open_page_dtype is f32 with kv_cache_dtype f16, expected kv_cache_dtype int8 or int4: \
         other pages stay as they are"
    );
    let other = "open_page_dtype is bf16, expected f16 or f32";
    assert_eq!(refused(KvFormat::Int4, KvFormat::Bf16), other);
}
