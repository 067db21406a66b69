//! Element formats of cached keys and values.

use std::fmt;
use std::str::FromStr;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::KvError;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float: values beyond ±65,504 saturate.
    F16,
    /// bfloat16: the upper half of a 32-bit float.
    Bf16,
    /// Sealed pages in codes of 8 bits, the open page in f16 or f32.
    ///
    /// The range of a channel's keys is the page's box; each token's value has a range of its own.
    Int8,
    /// Sealed pages in codes of 4 bits, the open page in f16 or f32.
    ///
    /// As [`Self::Int8`], with a range for every 64 channels of a token's value.
    Int4,
}

impl KvFormat {
    /// Every format, widest first.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Int8, Self::Int4];

    /// The formats that store each element as a float.
    pub const FLOATS: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one element of a box: the type that [`crate::with_element!`] names.
    #[must_use]
    pub fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 | Self::Int8 | Self::Int4 => 2,
        }
    }

    /// Bits of one code of a sealed page; `None` when pages hold floats, sealed or not.
    #[must_use]
    pub fn code_bits(self) -> Option<usize> {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => None,
            Self::Int8 => Some(8),
            Self::Int4 => Some(4),
        }
    }

    /// Whether a page is turned into codes when it is sealed, and cannot be appended to again.
    #[must_use]
    pub fn is_quantised(self) -> bool {
        self.code_bits().is_some()
    }

    /// The name as flags and configuration files spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvFormat {
    type Err = KvError;

    fn from_str(s: &str) -> Result<Self, KvError> {
        match s {
            "f32" | "float32" => Ok(Self::F32),
            "f16" | "float16" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            other => Err(KvError::Invalid {
                what: "kv_cache_dtype",
                found: format!("{other:?}"),
                expected: "f32, f16, bf16, int8 or int4".to_owned(),
            }),
        }
    }
}

/// An element type that boxes, open pages and, without codes, sealed pages hold.
pub trait KvElement: bytemuck::Pod + PartialOrd + Send + Sync {
    /// The format that stores sealed pages in this type, too.
    const FORMAT: KvFormat;

    /// Whether boxes of `format` hold this type.
    #[must_use]
    fn is_element_of(format: KvFormat) -> bool {
        format == Self::FORMAT || format.is_quantised() && Self::FORMAT == KvFormat::F16
    }

    /// The stored value nearest to `x`; finite input stays finite.
    fn from_f32(x: f32) -> Self;

    /// The stored value, exactly.
    fn to_f32(self) -> f32;

    /// [`Self::from_f32`] of each element of `x`, with the processor's instructions for it.
    ///
    /// # Panics
    /// When the slices have different lengths.
    fn store(x: &[f32], out: &mut [Self]);

    /// [`Self::store`] for an open page that is to become codes: ranges of codes are in f16, so that
    /// what is beyond ±65,504 saturates in every type.
    ///
    /// # Panics
    /// As [`Self::store`].
    fn store_open(x: &[f32], out: &mut [Self]) {
        Self::store(x, out);
    }

    /// The lowest stored value that is not below `x`; finite input stays finite, NaN is NaN.
    fn at_least(x: f32) -> Self;

    /// The highest stored value that is not above `x`; finite input stays finite, NaN is NaN.
    fn at_most(x: f32) -> Self;
}

/// Elements that are rounded at a time, on the stack.
const ROUNDED: usize = 64;

/// Calls `round` with pieces of `x`, finite numbers clamped to `±largest`.
#[inline]
fn saturated<E>(x: &[f32], out: &mut [E], largest: f32, round: impl Fn(&[f32], &mut [E])) {
    assert_eq!(x.len(), out.len(), "elements to store");
    let mut buffer = [0.0; ROUNDED];
    for (x, out) in x.chunks(ROUNDED).zip(out.chunks_mut(ROUNDED)) {
        let buffer = &mut buffer[..x.len()];
        for (y, &x) in buffer.iter_mut().zip(x) {
            *y = if x.is_finite() { x.clamp(-largest, largest) } else { x };
        }
        round(buffer, out);
    }
}

/// What larger numbers saturate to.
const F16_MAX: f32 = 65_504.0;
/// What larger numbers saturate to, once it is rounded.
const BF16_MAX: f32 = 3.389e38;

impl KvElement for f32 {
    const FORMAT: KvFormat = KvFormat::F32;

    #[inline]
    fn from_f32(x: f32) -> Self {
        x
    }

    #[inline]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline]
    fn store(x: &[f32], out: &mut [Self]) {
        out.copy_from_slice(x);
    }

    #[inline]
    fn store_open(x: &[f32], out: &mut [Self]) {
        saturated(x, out, F16_MAX, |x, out| out.copy_from_slice(x));
    }

    #[inline]
    fn at_least(x: f32) -> Self {
        x
    }

    #[inline]
    fn at_most(x: f32) -> Self {
        x
    }
}

impl KvElement for f16 {
    const FORMAT: KvFormat = KvFormat::F16;

    #[inline]
    fn from_f32(x: f32) -> Self {
        // An infinite key would turn whole rows of attention into NaN: saturate instead.
        Self::from_f32(if x.is_finite() { x.clamp(-F16_MAX, F16_MAX) } else { x })
    }

    #[inline]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline]
    fn store(x: &[f32], out: &mut [Self]) {
        saturated(x, out, F16_MAX, |x, out| out.convert_from_f32_slice(x));
    }

    #[inline]
    fn at_least(x: f32) -> Self {
        let near = <Self as KvElement>::from_f32(x);
        let higher = f16::to_f32(near) < x.min(F16_MAX);
        Self::from_bits(raised(near.to_bits(), higher))
    }

    #[inline]
    fn at_most(x: f32) -> Self {
        -Self::at_least(-x)
    }
}

impl KvElement for bf16 {
    const FORMAT: KvFormat = KvFormat::Bf16;

    #[inline]
    fn from_f32(x: f32) -> Self {
        Self::from_f32(if x.is_finite() { x.clamp(-BF16_MAX, BF16_MAX) } else { x })
    }

    #[inline]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    #[inline]
    fn store(x: &[f32], out: &mut [Self]) {
        saturated(x, out, BF16_MAX, |x, out| out.convert_from_f32_slice(x));
    }

    #[inline]
    fn at_least(x: f32) -> Self {
        let near = <Self as KvElement>::from_f32(x);
        let higher = bf16::to_f32(near) < x.min(BF16_MAX);
        Self::from_bits(raised(near.to_bits(), higher))
    }

    #[inline]
    fn at_most(x: f32) -> Self {
        -Self::at_least(-x)
    }
}

/// The bits of the next higher float of 16 bits, or the same ones.
fn raised(bits: u16, higher: bool) -> u16 {
    let negative = bits >> 15 == 1;
    match (higher, negative) {
        (false, _) => bits,
        (true, true) => bits - 1,
        (true, false) => bits + 1,
    }
}

/// Runs generic code for the element type of a [`KvFormat`] that is known only at run time: that of
/// its boxes, and of its pages where they hold no codes.
///
/// `with_element!(format, E => expression)` evaluates `expression` with `E` bound to the type.
#[macro_export]
macro_rules! with_element {
    ($format:expr, $element:ident => $body:expr) => {
        match $format {
            $crate::KvFormat::F32 => {
                type $element = f32;
                $body
            }
            $crate::KvFormat::F16 | $crate::KvFormat::Int8 | $crate::KvFormat::Int4 => {
                type $element = $crate::half::f16;
                $body
            }
            $crate::KvFormat::Bf16 => {
                type $element = $crate::half::bf16;
                $body
            }
        }
    };
}

/// Runs generic code for the element types of boxes and of pages without codes, which only
/// a [`crate::KvLayout`] says at run time.
///
/// `with_elements!(layout, (E, O) => expression)` evaluates `expression` with `E` bound to the type
/// of boxes and `O` to that of open pages: the same, but for open pages in f32 that become codes.
#[macro_export]
macro_rules! with_elements {
    ($layout:expr, ($boxes:ident, $open:ident) => $body:expr) => {
        match ($layout.shape().format, $layout.open_format()) {
            ($crate::KvFormat::Int8 | $crate::KvFormat::Int4, $crate::KvFormat::F32) => {
                type $boxes = $crate::half::f16;
                type $open = f32;
                $body
            }
            (format, _) => $crate::with_element!(format, $boxes => {
                type $open = $boxes;
                $body
            }),
        }
    };
}
