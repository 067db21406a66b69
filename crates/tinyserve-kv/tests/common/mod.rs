//! What the tests of stored pages share: shapes, and a widened view of a page.
#![allow(dead_code, reason = "each test binary uses its own part")]

mod numbers;

pub(crate) use numbers::Numbers;
use proptest::prelude::*;
use tinyserve_kv::half::f16;
use tinyserve_kv::{
    HostPages, KvElement, KvFormat, KvLayout, KvShape, PageId, with_element, with_elements,
};

/// Layouts of every format without codes, with odd head sizes and pages of 1 to 64 tokens.
pub(crate) fn layouts() -> impl Strategy<Value = KvLayout> {
    layouts_of(&KvFormat::FLOATS)
}

/// Layouts of `formats`, those of codes with open pages in f16 or in f32.
pub(crate) fn layouts_of(formats: &'static [KvFormat]) -> impl Strategy<Value = KvLayout> {
    let head_dims = prop_oneof![1usize..=20, Just(24usize), Just(33), Just(64)];
    let page_sizes = prop_oneof![1usize..=64, Just(1usize), Just(16)];
    let formats = (prop::sample::select(formats), any::<bool>());
    (1usize..=2, 1usize..=3, head_dims, page_sizes, formats).prop_map(
        |(layers, kv_heads, head_dim, page_size, (format, wide))| {
            let shape = KvShape { layers, kv_heads, head_dim, page_size, format };
            let layout = KvLayout::new(shape).unwrap();
            let wide = wide && format.is_quantised();
            if wide { layout.with_open_format(KvFormat::F32).unwrap() } else { layout }
        },
    )
}

/// `x` as pages of `layout` that are not full store it, widened.
pub(crate) fn stored(layout: &KvLayout, x: f32) -> f32 {
    let codes = layout.shape().format.is_quantised();
    let x = if codes { x.clamp(-65_504.0, 65_504.0) } else { x };
    with_element!(layout.open_format(), E => KvElement::to_f32(<E as KvElement>::from_f32(x)))
}

/// One head of one page, widened to f32.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Head {
    /// Keys `[page_size, head_dim]`.
    pub(crate) keys: Vec<f32>,
    /// Values `[page_size, head_dim]`.
    pub(crate) values: Vec<f32>,
    /// Channel-wise minimum of the box `[head_dim]`.
    pub(crate) min: Vec<f32>,
    /// Channel-wise maximum of the box `[head_dim]`.
    pub(crate) max: Vec<f32>,
}

/// Reads one head of one page.
pub(crate) fn read(pages: &HostPages, layer: usize, page: PageId, kv_head: usize) -> Head {
    with_elements!(pages.layout(), (E, O) => {
        let widen = |xs: &[O]| xs.iter().map(|&x| KvElement::to_f32(x)).collect();
        let (head, corners) =
            (pages.head::<O>(layer, page, kv_head), pages.page_box::<E>(layer, page, kv_head));
        Head {
            keys: (0..pages.layout().page_size())
                .flat_map(|token| head.key(token).map(KvElement::to_f32))
                .collect(),
            values: widen(head.values),
            min: corners.min().map(KvElement::to_f32).collect(),
            max: corners.max().map(KvElement::to_f32).collect(),
        }
    })
}

/// Reads one head of one sealed page of codes.
pub(crate) fn read_codes(pages: &HostPages, layer: usize, page: PageId, kv_head: usize) -> Head {
    let (dim, size) = (pages.layout().shape().head_dim, pages.layout().page_size());
    let (codes, corners) =
        (pages.code_page(layer, page, kv_head), pages.page_box::<f16>(layer, page, kv_head));
    let min: Vec<f32> = corners.min().map(KvElement::to_f32).collect();
    let max: Vec<f32> = corners.max().map(KvElement::to_f32).collect();
    let places = || (0..size).flat_map(|token| (0..dim).map(move |channel| (token, channel)));
    Head {
        keys: places().map(|(t, c)| codes.key(t, c, (min[c], max[c]))).collect(),
        values: places().map(|(t, c)| codes.value(t, c)).collect(),
        min,
        max,
    }
}
