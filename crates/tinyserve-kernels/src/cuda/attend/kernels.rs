//! The kernels of attention, for each format: f32, f16, bf16, int8, int4.

/// Kernels that score pages by moments.
pub(super) const SCORE_MOMENTS: [&str; 5] = [
    "score_moments_f32",
    "score_moments_f16",
    "score_moments_bf16",
    "score_moments_int8",
    "score_moments_int4",
];
/// The attention kernels by format, for one query, up to four, up to eight, and for shapes that wide
/// loads do not divide.
pub(super) const ATTEND_1: [&str; 5] =
    ["attend_f32_1", "attend_f16_1", "attend_bf16_1", "attend_int8_1", "attend_int4_1"];
pub(super) const ATTEND_4: [&str; 5] =
    ["attend_f32_4", "attend_f16_4", "attend_bf16_4", "attend_int8_4", "attend_int4_4"];
pub(super) const ATTEND_8: [&str; 5] =
    ["attend_f32_8", "attend_f16_8", "attend_bf16_8", "attend_int8_8", "attend_int4_8"];
pub(super) const ATTEND_ANY: [&str; 5] =
    ["attend_f32_any", "attend_f16_any", "attend_bf16_any", "attend_int8_any", "attend_int4_any"];

/// The kernels that score, select and attend, for one query, up to four, up to eight.
pub(super) const FUSED_1: [&str; 5] = [
    "fused_decode_f32_1",
    "fused_decode_f16_1",
    "fused_decode_bf16_1",
    "fused_decode_int8_1",
    "fused_decode_int4_1",
];
pub(super) const FUSED_4: [&str; 5] = [
    "fused_decode_f32_4",
    "fused_decode_f16_4",
    "fused_decode_bf16_4",
    "fused_decode_int8_4",
    "fused_decode_int4_4",
];
pub(super) const FUSED_8: [&str; 5] = [
    "fused_decode_f32_8",
    "fused_decode_f16_8",
    "fused_decode_bf16_8",
    "fused_decode_int8_8",
    "fused_decode_int4_8",
];
