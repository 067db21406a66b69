//! The shape of a paged cache, and the only offset arithmetic over it.

use std::ops::Range;

use crate::{CodeLayout, KvError, KvFormat};

/// The shape of a cache, as a model and its user state it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Transformer layers.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// Tokens of one page.
    pub page_size: usize,
    /// How keys and values are stored.
    pub format: KvFormat,
}

/// A checked [`KvShape`] with the offsets and sizes that follow from it.
///
/// One page holds `page_size` tokens of every layer. In one layer, [`GROUP_PAGES`] neighbouring
/// pages form a group, `[groups][kv_heads][GROUP_PAGES][keys [head_dim, page_size], values
/// [page_size, head_dim]]`, so attention of one head over neighbours reads one contiguous run.
/// Keys lie channel by channel: the scores of neighbouring tokens are then summed up side by side,
/// and a vector of keys serves a whole group of queries.
///
/// The boxes lie apart, `[groups][kv_heads][head_dim][2 (max, min)][GROUP_PAGES]`, so scoring reads
/// nothing else, scores neighbouring pages side by side, and can leave out the rows that a query's
/// signs make irrelevant.
///
/// Where the format has codes, a page's place holds them ([`CodeLayout`]) from the moment it is
/// full, its box is in f16, and the open page lies elsewhere, in f16, too, or in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    shape: KvShape,
    open: KvFormat,
}

/// Pages that lie together, as their index in the pool has it: one row of boxes of 16-bit elements
/// is then two cache lines, and the pool's record of free pages one word.
pub const GROUP_PAGES: usize = 64;

/// Largest page: beyond it a page is a context, and selection has nothing to choose from.
pub const MAX_PAGE_SIZE: usize = 4096;

impl KvLayout {
    /// Checks `shape`.
    ///
    /// # Errors
    /// When a size is zero, the page is larger than [`MAX_PAGE_SIZE`], or a page's size overflows.
    pub fn new(shape: KvShape) -> Result<Self, KvError> {
        let sizes = [
            ("layers", shape.layers),
            ("kv_heads", shape.kv_heads),
            ("head_dim", shape.head_dim),
            ("page_size", shape.page_size),
        ];
        for (what, size) in sizes {
            if size == 0 {
                return Err(KvError::Invalid {
                    what,
                    found: "0".to_owned(),
                    expected: "at least 1".to_owned(),
                });
            }
        }
        if shape.page_size > MAX_PAGE_SIZE {
            return Err(KvError::Invalid {
                what: "page_size",
                found: shape.page_size.to_string(),
                expected: format!("1 to {MAX_PAGE_SIZE} tokens"),
            });
        }
        // Words of codes may be filled up to four times what they hold.
        let most = if shape.format.is_quantised() { 16 } else { 4 * shape.format.element_bytes() };
        let bytes = sizes
            .iter()
            .try_fold(most, |n, (_, size)| n.checked_mul(*size))
            .filter(|bytes| isize::try_from(*bytes).is_ok());
        if bytes.is_none() {
            return Err(KvError::Invalid {
                what: "page bytes",
                found: "more than this machine can address".to_owned(),
                expected: "a smaller layers × kv_heads × head_dim × page_size".to_owned(),
            });
        }
        let open = if shape.format.is_quantised() { KvFormat::F16 } else { shape.format };
        Ok(Self { shape, open })
    }

    /// The layout with open pages in `open`, which is f16 or f32.
    ///
    /// # Errors
    /// When pages hold no codes, or `open` is another format.
    pub fn with_open_format(self, open: KvFormat) -> Result<Self, KvError> {
        let invalid = |found, expected: &str| KvError::Invalid {
            what: "open_page_dtype",
            found,
            expected: expected.to_owned(),
        };
        let format = self.shape.format;
        if !format.is_quantised() {
            let found = format!("{open} with kv_cache_dtype {format}");
            return Err(invalid(
                found,
                "kv_cache_dtype int8 or int4: other pages stay as they are",
            ));
        }
        if !matches!(open, KvFormat::F16 | KvFormat::F32) {
            return Err(invalid(open.to_string(), "f16 or f32"));
        }
        Ok(Self { open, ..self })
    }

    /// The shape that was checked.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The format of pages that are not full: where the format has no codes, that of all pages.
    #[must_use]
    pub fn open_format(&self) -> KvFormat {
        self.open
    }

    /// Bytes of one page without codes in one layer, keys and values of all heads.
    #[must_use]
    pub fn open_page_bytes(&self) -> usize {
        self.page_elements() * self.open.element_bytes()
    }

    /// Tokens of one page.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.shape.page_size
    }

    /// Pages that `tokens` tokens need.
    #[must_use]
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.shape.page_size)
    }

    /// Tokens that are left when a sequence of `length` tokens is cut to `tokens`: a page that holds
    /// codes cannot be opened again, so what it held is to be computed again.
    #[must_use]
    pub fn cut(&self, length: usize, tokens: usize) -> usize {
        let size = self.shape.page_size;
        let sealed = (tokens / size + 1).saturating_mul(size) <= length;
        if self.shape.format.is_quantised() && sealed { tokens - tokens % size } else { tokens }
    }

    /// Elements of the keys (or the values) of one head in one page without codes:
    /// `page_size × head_dim`.
    #[must_use]
    pub fn head_elements(&self) -> usize {
        self.shape.page_size * self.shape.head_dim
    }

    /// Elements of one page without codes in one layer, keys and values of all heads.
    #[must_use]
    pub fn page_elements(&self) -> usize {
        2 * self.shape.kv_heads * self.head_elements()
    }

    /// Elements of the boxes of one page in one layer: min and max of all heads.
    #[must_use]
    pub fn box_elements(&self) -> usize {
        2 * self.shape.kv_heads * self.shape.head_dim
    }

    /// Offset, in elements, of head `kv_head` of page `page` in a layer's pages without codes; its
    /// keys start there.
    #[must_use]
    pub fn head_offset(&self, page: usize, kv_head: usize) -> usize {
        2 * self.head_index(page, kv_head) * self.head_elements()
    }

    /// How many heads of pages lie before it in its layer.
    fn head_index(&self, page: usize, kv_head: usize) -> usize {
        let run = page / GROUP_PAGES * self.shape.kv_heads + kv_head;
        run * GROUP_PAGES + page % GROUP_PAGES
    }

    /// How the codes of one head of a sealed page lie, where the format has codes.
    #[must_use]
    pub fn codes(&self) -> Option<CodeLayout> {
        let KvShape { head_dim, page_size, format, .. } = self.shape;
        format.code_bits().map(|bits| CodeLayout::new(bits, head_dim, page_size))
    }

    /// Bytes of one head of one page, keys and values.
    #[must_use]
    pub fn head_bytes(&self) -> usize {
        match self.codes() {
            Some(codes) => codes.bytes(),
            None => 2 * self.head_elements() * self.shape.format.element_bytes(),
        }
    }

    /// Where head `kv_head` of page `page` lies in a layer's pages, in bytes.
    #[must_use]
    pub fn head_range(&self, page: usize, kv_head: usize) -> Range<usize> {
        let (index, bytes) = (self.head_index(page, kv_head), self.head_bytes());
        index * bytes..(index + 1) * bytes
    }

    /// Offset, in elements, of the boxes of head `kv_head` of a group in a layer's boxes.
    #[must_use]
    pub fn box_offset(&self, group: usize, kv_head: usize) -> usize {
        (group * self.shape.kv_heads + kv_head) * self.group_box_elements()
    }

    /// Elements of the boxes of one head of a group of pages.
    #[must_use]
    pub fn group_box_elements(&self) -> usize {
        2 * self.shape.head_dim * GROUP_PAGES
    }

    /// Bytes of keys and values that one token of a sealed page holds in all layers, scales
    /// included.
    #[must_use]
    pub fn bytes_per_token(&self) -> usize {
        2 * self.shape.layers * self.token_head_bytes() * self.shape.kv_heads
    }

    /// Half the bytes of one token of a sealed page in one head of one layer: those of its key, or
    /// of its value, but that a value's scale and minimum count half for each.
    #[must_use]
    pub fn token_head_bytes(&self) -> usize {
        match self.codes() {
            Some(codes) => (self.shape.head_dim * codes.bits()).div_ceil(8) + 2 * codes.groups(),
            None => self.shape.head_dim * self.shape.format.element_bytes(),
        }
    }

    /// Bytes of the boxes of one page in all layers.
    #[must_use]
    pub fn box_bytes_per_page(&self) -> usize {
        self.shape.layers * self.box_elements() * self.shape.format.element_bytes()
    }

    /// Bytes of one page in all layers: keys, values and boxes.
    ///
    /// Codes fill whole words: pages of other than a multiple of 4 tokens, with 4 bits of 8, take
    /// more than their tokens do, and so do heads of such numbers of channels.
    #[must_use]
    pub fn bytes_per_page(&self) -> usize {
        self.shape.layers * self.shape.kv_heads * self.head_bytes() + self.box_bytes_per_page()
    }
}
