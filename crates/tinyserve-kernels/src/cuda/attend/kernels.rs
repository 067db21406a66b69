//! The kernels of attention, for each format: f32, f16, bf16, int8, int4.

use super::plan::MOST_QUERIES;
use crate::cuda::pages::Element;

/// Kernels that score pages by moments.
pub(super) const SCORE_MOMENTS: [&str; 5] = [
    "score_moments_f32",
    "score_moments_f16",
    "score_moments_bf16",
    "score_moments_int8",
    "score_moments_int4",
];
/// The attention kernel for pages of `element`s with heads of `head_dim` channels, which wide loads
/// divide or not, and how many queries of a tile share a pass, where a tile has `most_queries`.
pub(super) fn attend_kernel(
    element: Element,
    wide: bool,
    head_dim: usize,
    most_queries: usize,
) -> (&'static str, usize) {
    if !wide {
        let names = [
            "attend_f32_any",
            "attend_f16_any",
            "attend_bf16_any",
            "attend_int8_any",
            "attend_int4_any",
        ];
        return (element.kernel(names), 4);
    }
    let [one, four, eight] = match (element, head_dim) {
        (Element::F32, _) => ["attend_f32_1", "attend_f32_4", "attend_f32_8"],
        (Element::Int8, _) => ["attend_int8_1", "attend_int8_4", "attend_int8_8"],
        (Element::Int4, _) => ["attend_int4_1", "attend_int4_4", "attend_int4_8"],
        // On tensor cores, where eight queries cost what one does.
        (Element::F16, 64) => return ("attend_f16_64", MOST_QUERIES),
        (Element::F16, 128) => return ("attend_f16_128", MOST_QUERIES),
        (Element::F16, _) => return ("attend_f16_8", MOST_QUERIES),
        (Element::Bf16, 64) => return ("attend_bf16_64", MOST_QUERIES),
        (Element::Bf16, 128) => return ("attend_bf16_128", MOST_QUERIES),
        (Element::Bf16, _) => return ("attend_bf16_8", MOST_QUERIES),
    };
    match most_queries {
        1 => (one, 1),
        2..=4 => (four, 4),
        _ => (eight, MOST_QUERIES),
    }
}

/// The kernel that scores, selects and attends, for `group` queries of a KV head.
pub(super) fn fused_kernel(element: Element, head_dim: usize, group: usize) -> &'static str {
    let [one, four, eight] = match (element, head_dim) {
        (Element::F32, _) => ["fused_decode_f32_1", "fused_decode_f32_4", "fused_decode_f32_8"],
        (Element::Int8, _) => ["fused_decode_int8_1", "fused_decode_int8_4", "fused_decode_int8_8"],
        (Element::Int4, _) => ["fused_decode_int4_1", "fused_decode_int4_4", "fused_decode_int4_8"],
        (Element::F16, 64) => return "fused_decode_f16_64",
        (Element::F16, 128) => return "fused_decode_f16_128",
        (Element::F16, _) => return "fused_decode_f16_8",
        (Element::Bf16, 64) => return "fused_decode_bf16_64",
        (Element::Bf16, 128) => return "fused_decode_bf16_128",
        (Element::Bf16, _) => return "fused_decode_bf16_8",
    };
    match group {
        1 => one,
        2..=4 => four,
        _ => eight,
    }
}
