//! The bytes of a page pool on a device, laid out as in host memory.

use tinyserve_kv::{GROUP_PAGES, KvFormat, KvLayout, PageId};

use super::launch::{Arg, Launcher};
use super::memory::Buffer;
use super::open::OpenPages;
use crate::KernelError;

/// Most channels of a head: what a block of the attention kernel has registers for.
const MOST_HEAD_DIM: usize = 256;

/// Keys, values and boxes of a page pool, in a device's memory.
///
/// [`KvLayout`] says where each lies; the layers come one after the other.
#[derive(Debug)]
pub struct CudaPages {
    layout: KvLayout,
    capacity: usize,
    pages: Buffer,
    pub(super) boxes: Buffer,
    /// Pages without codes, where the format has codes.
    pub(super) open: Option<OpenPages>,
    element: Element,
}

impl CudaPages {
    pub(super) fn new(
        device: &Launcher,
        layout: KvLayout,
        capacity: usize,
    ) -> Result<Self, KernelError> {
        let shape = layout.shape();
        let element = Element::of(shape.format);
        if shape.head_dim > MOST_HEAD_DIM {
            return Err(KernelError::Invalid {
                what: "head_dim",
                found: shape.head_dim.to_string(),
                expected: format!("at most {MOST_HEAD_DIM} on a CUDA device"),
            });
        }
        if shape.format.is_quantised() && layout.open_format() != KvFormat::F16 {
            return Err(KernelError::Invalid {
                what: "open_page_dtype",
                found: layout.open_format().to_string(),
                expected: "f16 on a CUDA device, whose kernels read open pages in it".to_owned(),
            });
        }
        let bytes = |of_page: usize| {
            capacity
                .checked_next_multiple_of(GROUP_PAGES)
                .and_then(|pages| pages.checked_mul(of_page))
                .ok_or_else(|| KernelError::Invalid {
                    what: "KV pool",
                    found: format!("{capacity} pages"),
                    expected: "fewer pages: their bytes overflow".to_owned(),
                })
        };
        let what = format!("a KV cache of {capacity} pages");
        let of_boxes = layout.box_bytes_per_page();
        let pages = Buffer::zeroed(device, bytes(layout.bytes_per_page() - of_boxes)?, &what)?;
        let boxes = Buffer::zeroed(device, bytes(of_boxes)?, &what)?;
        let open = shape
            .format
            .is_quantised()
            .then(|| OpenPages::new(shape.layers * layout.open_page_bytes(), shape.page_size));
        Ok(Self { layout, capacity, pages, boxes, open, element })
    }

    /// The layout of each page.
    #[must_use]
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Pages that there is memory for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub(super) fn element(&self) -> Element {
        self.element
    }

    pub(super) fn shape(&self) -> Arg {
        let shape = self.layout.shape();
        // Sizes that do not fit have no memory.
        let of = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        Arg::Shape([of(shape.kv_heads), of(shape.head_dim), of(shape.page_size)])
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&self, layer: usize) -> Arg {
        Arg::Pointer(self.pages.at(layer * self.layer_bytes()))
    }

    /// Boxes of a layer.
    pub(super) fn layer_boxes(&self, layer: usize) -> Arg {
        Arg::Pointer(self.boxes.at(self.boxes_start(layer)))
    }

    /// Offset of the boxes of a layer, in bytes.
    pub(super) fn boxes_start(&self, layer: usize) -> usize {
        let pages = self.capacity.next_multiple_of(GROUP_PAGES);
        layer * pages * self.layout.box_elements() * self.layout.shape().format.element_bytes()
    }

    /// Where a layer lies in the slots of open pages; null where sealed pages hold no codes.
    pub(super) fn layer_open(&self, layer: usize) -> Arg {
        let bytes = self.layout.page_elements() * self.layout.shape().format.element_bytes();
        self.open.as_ref().map_or(Arg::Pointer(0), |open| open.arg(layer * bytes))
    }

    /// Heads of all layers: what lies between two slots of open pages.
    pub(super) fn heads(&self) -> Arg {
        Arg::count(self.layout.shape().layers * self.layout.shape().kv_heads)
    }

    /// Slot of the page at `index` of a sequence's; that of no page where none has one.
    pub(super) fn open_slot(&self, page: PageId) -> u32 {
        self.open.as_ref().and_then(|open| open.slot(page)).unwrap_or(u32::MAX)
    }

    /// Groups of pages in each layer.
    pub(super) fn groups(&self) -> usize {
        self.capacity.div_ceil(GROUP_PAGES)
    }

    /// Bytes of keys and values of a layer.
    fn layer_bytes(&self) -> usize {
        let pages = self.capacity.next_multiple_of(GROUP_PAGES);
        pages * self.layout.shape().kv_heads * self.layout.head_bytes()
    }

    /// Whether 16-byte loads divide the rows of keys and of values.
    pub(super) fn is_wide(&self) -> bool {
        is_wide(&self.layout)
    }
}

/// Whether 16-byte loads divide the rows of keys and of values: a page size that is a power of two,
/// and fills one, and a head_dim that is a multiple. Of codes, four words do.
pub(super) fn is_wide(layout: &KvLayout) -> bool {
    let shape = layout.shape();
    let quantised = shape.format.is_quantised();
    let elements = if quantised { 4 } else { 16 / shape.format.element_bytes() };
    shape.page_size.is_power_of_two()
        && shape.page_size >= elements
        && shape.head_dim.is_multiple_of(elements)
}

/// What keys and values are, of the formats that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    F16,
    Bf16,
    Int8,
    Int4,
}

impl Element {
    fn of(format: KvFormat) -> Self {
        match format {
            KvFormat::F32 => Self::F32,
            KvFormat::F16 => Self::F16,
            KvFormat::Bf16 => Self::Bf16,
            KvFormat::Int8 => Self::Int8,
            KvFormat::Int4 => Self::Int4,
        }
    }

    /// The kernel of a list that is for this element: f32, f16, bf16, int8, int4.
    pub(super) fn kernel(self, names: [&'static str; 5]) -> &'static str {
        names[self as usize]
    }

    /// The kernel of a list that is for the element of boxes: f32, f16, bf16.
    pub(super) fn of_boxes(self, names: [&'static str; 3]) -> &'static str {
        match self {
            Self::F32 => names[0],
            Self::F16 | Self::Int8 | Self::Int4 => names[1],
            Self::Bf16 => names[2],
        }
    }
}
