//! Stored pages: what is appended is read back, nothing overlaps, copies are whole.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{Head, Numbers, layouts, layouts_of, read, stored};
use proptest::prelude::*;
use tinyserve_kv::half::{bf16, f16};
use tinyserve_kv::{
    GROUP_PAGES, HostPages, KvElement, KvFormat, KvLayout, KvShape, PageCopy, PageId, PagePool,
    PageTable, Slot, with_element,
};

fn all_pages(capacity: usize) -> Vec<PageId> {
    let mut pool = PagePool::new(capacity).unwrap();
    (0..capacity).map(|_| pool.allocate().unwrap()).collect()
}

/// Every head of every page of every layer.
fn snapshot(pages: &HostPages, ids: &[PageId]) -> Vec<Vec<Vec<Head>>> {
    let shape = pages.layout().shape();
    let heads = |layer, page| (0..shape.kv_heads).map(|h| read(pages, layer, page, h)).collect();
    ids.iter().map(|&page| (0..shape.layers).map(|layer| heads(layer, page)).collect()).collect()
}

/// The `n`-th finite number of a format; no two are the same bits.
fn distinct(format: KvFormat, n: usize) -> f32 {
    // 16-bit formats: positive finite patterns first, then the negative ones.
    let sixteen = |finite: usize| {
        assert!(n < 2 * finite, "the test needs more numbers than {format} has");
        (n % finite) as u16 | if n < finite { 0 } else { 0x8000 }
    };
    match format {
        KvFormat::F32 => f32::from_bits(n as u32 + 1),
        KvFormat::F16 => f16::from_bits(sixteen(0x7c00)).to_f32(),
        KvFormat::Bf16 => bf16::from_bits(sixteen(0x7f80)).to_f32(),
        other => panic!("{other} stores no element as it is"),
    }
}

proptest! {
    #[test]
    fn no_two_places_overlap(layout in layouts()) {
        let shape = layout.shape();
        let per_page = 2 * shape.layers * shape.kv_heads * layout.head_elements();
        let capacity = (60_000 / per_page).clamp(1, 3);
        let mut pages = HostPages::new(layout, capacity).unwrap();
        let ids = all_pages(capacity);
        let width = shape.kv_heads * shape.head_dim;
        let number = |place: usize| distinct(shape.format, place);
        let mut place = 0;
        let mut next = || {
            place += width;
            (place - width..place).map(number).collect::<Vec<f32>>()
        };
        for layer in 0..shape.layers {
            for &page in &ids {
                for offset in 0..shape.page_size {
                    let (keys, values) = (next(), next());
                    pages.append(layer, Slot { page, offset }, &keys, &values);
                }
            }
        }
        // The same walk again, now reading.
        let mut place = 0;
        let bits = |xs: &[f32]| xs.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        for layer in 0..shape.layers {
            for &page in &ids {
                let heads: Vec<Head> =
                    (0..shape.kv_heads).map(|h| read(&pages, layer, page, h)).collect();
                for offset in 0..shape.page_size {
                    let row = offset * shape.head_dim..(offset + 1) * shape.head_dim;
                    for rows in [|head: &Head| head.keys.clone(), |head: &Head| head.values.clone()]
                    {
                        for head in &heads {
                            let expected: Vec<f32> =
                                (place..place + shape.head_dim).map(number).collect();
                            prop_assert_eq!(bits(&rows(head)[row.clone()]), bits(&expected));
                            place += shape.head_dim;
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_appended_is_read_back_rounded(layout in layouts(), seed in any::<u64>()) {
        let shape = layout.shape();
        let (mut numbers, mut pool) = (Numbers(seed), PagePool::new(3).unwrap());
        let mut pages = HostPages::new(layout, 3).unwrap();
        let mut table = PageTable::new(shape.page_size);
        table.extend(&mut pool, 2 * shape.page_size + 1).unwrap();
        let width = shape.kv_heads * shape.head_dim;
        let mut written = Vec::new();
        for position in 0..table.len() {
            for layer in 0..shape.layers {
                let (keys, values) = (numbers.numbers(width), numbers.numbers(width));
                pages.append(layer, table.slot(position), &keys, &values);
                written.push((position, layer, keys, values));
            }
        }
        let rounded = |xs: &[f32]| -> Vec<f32> {
            xs.iter().map(|&x| stored(&layout, x)).collect()
        };
        for (position, layer, keys, values) in written {
            let slot = table.slot(position);
            for kv_head in 0..shape.kv_heads {
                let head = read(&pages, layer, slot.page, kv_head);
                let row = slot.offset * shape.head_dim..(slot.offset + 1) * shape.head_dim;
                let channels = kv_head * shape.head_dim..(kv_head + 1) * shape.head_dim;
                prop_assert_eq!(&head.keys[row.clone()], rounded(&keys[channels.clone()]));
                prop_assert_eq!(&head.values[row], rounded(&values[channels]));
            }
        }
        // The widened boxes are the stored ones, page after page.
        let mut boxes = vec![f32::NAN; 3];
        for layer in 0..shape.layers {
            for kv_head in 0..shape.kv_heads {
                pages.boxes_f32(layer, table.pages(), kv_head, &mut boxes);
                let corners = table.pages().iter().flat_map(|&page| {
                    let head = read(&pages, layer, page, kv_head);
                    [head.min, head.max]
                });
                prop_assert_eq!(&boxes, &corners.collect::<Vec<_>>().concat());
            }
        }
    }

    #[test]
    fn a_copy_is_whole_and_touches_nothing_else(
        layout in layouts(),
        from in 0usize..4,
        to in 0usize..4,
        seed in any::<u64>(),
    ) {
        let shape = layout.shape();
        let (mut numbers, ids) = (Numbers(seed), all_pages(4));
        let mut pages = HostPages::new(layout, 4).unwrap();
        let width = shape.kv_heads * shape.head_dim;
        for (&page, layer) in ids.iter().flat_map(|p| (0..shape.layers).map(move |l| (p, l))) {
            for offset in 0..shape.page_size {
                let (keys, values) = (numbers.numbers(width), numbers.numbers(width));
                pages.append(layer, Slot { page, offset }, &keys, &values);
            }
        }
        let mut expected = snapshot(&pages, &ids);
        expected[to] = expected[from].clone();
        pages.copy(PageCopy { from: ids[from], to: ids[to] });
        prop_assert_eq!(snapshot(&pages, &ids), expected);
    }

    #[test]
    fn sizes_add_up(
        layout in layouts_of(&KvFormat::ALL),
        capacity in 1usize..5,
        tokens in 0usize..1000,
    ) {
        let shape = layout.shape();
        let pages = HostPages::new(layout, capacity).unwrap();
        prop_assert_eq!(pages.capacity(), capacity);
        let whole_groups = capacity.next_multiple_of(GROUP_PAGES);
        prop_assert_eq!(pages.reserved_bytes(), whole_groups * layout.bytes_per_page());
        let boxes = shape.layers * layout.box_elements() * shape.format.element_bytes();
        let tokens_bytes = shape.page_size * layout.bytes_per_token();
        prop_assert_eq!(layout.box_bytes_per_page(), boxes);
        let whole_words = shape.format.code_bits().is_none_or(|bits| {
            let codes = 32 / bits;
            shape.page_size % codes == 0 && shape.head_dim % codes == 0
        });
        if whole_words {
            prop_assert_eq!(layout.bytes_per_page(), tokens_bytes + boxes);
        } else if shape.format.code_bits().is_none_or(|bits| shape.head_dim * bits % 8 == 0) {
            // Half a byte of a token's counts as a whole one, which a page does not fill.
            prop_assert!(layout.bytes_per_page() >= tokens_bytes + boxes);
        }
        let heads = 2 * shape.layers * shape.kv_heads;
        prop_assert_eq!(layout.bytes_per_token(), heads * layout.token_head_bytes());
        let n_pages = layout.pages_for(tokens);
        prop_assert!(n_pages * shape.page_size >= tokens);
        prop_assert!(n_pages == 0 || (n_pages - 1) * shape.page_size < tokens);
    }
}

#[test]
fn a_page_or_head_out_of_range_panics_and_never_reads_a_neighbour() {
    for format in KvFormat::FLOATS {
        // One element per head: padding and neighbours are within reach of a wrong offset.
        let shape = KvShape { layers: 2, kv_heads: 2, head_dim: 1, page_size: 1, format };
        let mut pages = HostPages::new(KvLayout::new(shape).unwrap(), 2).unwrap();
        let ids = all_pages(3);
        let mut panics = |what: &str, action: &mut dyn FnMut(&mut HostPages)| {
            let outcome = catch_unwind(AssertUnwindSafe(|| action(&mut pages)));
            assert!(outcome.is_err(), "{what} does not panic");
        };
        let slot = |page, offset| Slot { page, offset };
        with_element!(format, E => {
            panics("page", &mut |pages| _ = pages.head::<E>(0, ids[2], 0));
            panics("head", &mut |pages| _ = pages.head::<E>(0, ids[0], 2));
            panics("layer", &mut |pages| _ = pages.head::<E>(2, ids[0], 0));
            panics("box of a page", &mut |pages| _ = pages.page_box::<E>(0, ids[2], 0));
            panics("box of a head", &mut |pages| _ = pages.page_box::<E>(0, ids[0], 2));
        });
        panics("boxes", &mut |pages| pages.boxes_f32(0, &ids, 0, &mut Vec::new()));
        panics("append page", &mut |p| p.append(0, slot(ids[2], 0), &[1.0; 2], &[1.0; 2]));
        panics("append offset", &mut |p| p.append(0, slot(ids[0], 1), &[1.0; 2], &[1.0; 2]));
        panics("append keys", &mut |p| p.append(0, slot(ids[0], 0), &[1.0; 3], &[1.0; 3]));
        panics("append values", &mut |p| p.append(0, slot(ids[0], 0), &[1.0; 2], &[1.0]));
        panics("copy from", &mut |p| p.copy(PageCopy { from: ids[2], to: ids[0] }));
        panics("copy to", &mut |p| p.copy(PageCopy { from: ids[0], to: ids[2] }));
        if format != KvFormat::F32 {
            panics("element", &mut |pages| _ = pages.head::<f32>(0, ids[0], 0));
        }
    }
}

#[test]
fn printing_a_pool_does_not_print_its_bytes() {
    let shape =
        KvShape { layers: 1, kv_heads: 1, head_dim: 64, page_size: 64, format: KvFormat::F32 };
    let pages = HostPages::new(KvLayout::new(shape).unwrap(), 1000).unwrap();
    assert!(format!("{pages:?}").len() < 1000);
}

#[test]
fn sixteen_bit_formats_round_to_nearest_and_saturate() {
    fn check<E: KvElement>(largest: f32, unit: f32) {
        for x in [largest, largest * 0.999_999, largest * 1.000_01, f32::MAX] {
            let (up, down) = (E::from_f32(x).to_f32(), E::from_f32(-x).to_f32());
            assert!(up.is_finite() && up <= largest, "{x} is stored as {up}");
            assert_eq!(up, -down);
        }
        assert_eq!(E::from_f32(f32::MAX).to_f32(), largest);
        assert_eq!(E::from_f32(f32::INFINITY).to_f32(), f32::INFINITY);
        assert!(E::from_f32(f32::NAN).to_f32().is_nan());
        // Halfway goes to even, and anything beyond it up.
        assert_eq!(E::from_f32(1.0 + unit / 2.0).to_f32(), 1.0);
        assert_eq!(E::from_f32(1.0 + unit * 0.6).to_f32(), 1.0 + unit);
        assert_eq!(E::from_f32(1.0 + unit * 1.5).to_f32(), 1.0 + 2.0 * unit);
    }
    check::<f16>(65_504.0, 1.0 / 1024.0);
    check::<bf16>(bf16::MAX.to_f32(), 1.0 / 128.0);
    for bits in 0..=u16::MAX {
        let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
        if !half.is_nan() {
            assert_eq!(<f16 as KvElement>::from_f32(half.to_f32()).to_bits(), bits);
        }
        if !brain.is_nan() {
            assert_eq!(<bf16 as KvElement>::from_f32(brain.to_f32()).to_bits(), bits);
        }
    }
}
