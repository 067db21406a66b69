//! The seam for custom page selectors on the host.

use crate::{PageKeys, ScoreCost};

/// What a selector sees: one decode step of one KV head of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct SelectInput<'a> {
    layer: usize,
    kv_head: usize,
    tokens: usize,
    page_size: usize,
    head_dim: usize,
    scale: f32,
    queries: &'a [f32],
    boxes: &'a [f32],
    keys: Option<&'a dyn PageKeys>,
}

/// The fields of a [`SelectInput`].
#[derive(Debug, Clone, Copy)]
pub struct SelectFields<'a> {
    /// Layer of the model.
    pub layer: usize,
    /// KV head of the layer.
    pub kv_head: usize,
    /// Tokens of the sequence, the newest included.
    pub tokens: usize,
    /// Tokens of one page.
    pub page_size: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// Factor of `q·k` before the softmax, usually `1/√head_dim`.
    pub scale: f32,
    /// Queries that share the KV head, `[group, head_dim]`, after rotary embedding.
    pub queries: &'a [f32],
    /// Boxes of the sequence's pages, `[pages, 2 (min, max), head_dim]`.
    pub boxes: &'a [f32],
    /// The keys, where the backend can give them to the host.
    pub keys: Option<&'a dyn PageKeys>,
}

impl<'a> SelectInput<'a> {
    /// Checks that the slices fit the sizes.
    ///
    /// # Panics
    /// When they do not: the caller is a backend, and its arithmetic is wrong.
    #[must_use]
    pub fn new(fields: SelectFields<'a>) -> Self {
        let SelectFields {
            layer,
            kv_head,
            tokens,
            page_size,
            head_dim,
            scale,
            queries,
            boxes,
            keys,
        } = fields;
        assert!(
            !queries.is_empty() && queries.len().is_multiple_of(head_dim),
            "queries [group, head_dim]"
        );
        assert_eq!(boxes.len(), tokens.div_ceil(page_size) * 2 * head_dim, "boxes [pages, 2, dim]");
        Self { layer, kv_head, tokens, page_size, head_dim, scale, queries, boxes, keys }
    }

    /// Layer of the model.
    #[must_use]
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// KV head of the layer.
    #[must_use]
    pub fn kv_head(&self) -> usize {
        self.kv_head
    }

    /// Tokens of the sequence, the newest included.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens of one page.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages of the sequence; the last one may be partial.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.tokens.div_ceil(self.page_size)
    }

    /// Tokens of `page`: the page size, or fewer in the last one.
    ///
    /// # Panics
    /// When `page` is not below [`Self::page_count`].
    #[must_use]
    pub fn page_tokens(&self, page: usize) -> usize {
        assert!(page < self.page_count(), "page {page} of {}", self.page_count());
        (self.tokens - page * self.page_size).min(self.page_size)
    }

    /// Channels of one head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Factor of `q·k` before the softmax.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// How many queries share the KV head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.queries.len() / self.head_dim
    }

    /// The queries that share the KV head, each `[head_dim]`.
    pub fn queries(&self) -> impl Iterator<Item = &'a [f32]> {
        self.queries.chunks_exact(self.head_dim)
    }

    /// Channel-wise minimum `[head_dim]` of the keys of `page`.
    ///
    /// # Panics
    /// When `page` is not below [`Self::page_count`].
    #[must_use]
    pub fn min(&self, page: usize) -> &'a [f32] {
        &self.boxes[2 * page * self.head_dim..][..self.head_dim]
    }

    /// Channel-wise maximum `[head_dim]` of the keys of `page`.
    ///
    /// # Panics
    /// When `page` is not below [`Self::page_count`].
    #[must_use]
    pub fn max(&self, page: usize) -> &'a [f32] {
        &self.boxes[(2 * page + 1) * self.head_dim..][..self.head_dim]
    }

    /// Fills `out` with the keys of `page`, `[tokens of the page, head_dim]`, as attention reads
    /// them.
    ///
    /// # Panics
    /// When `page` is not below [`Self::page_count`], or the backend gave no keys: a selector that
    /// needs them says so in [`PageSelector::needs_keys`].
    pub fn keys(&self, page: usize, out: &mut Vec<f32>) {
        assert!(page < self.page_count(), "page {page} of {}", self.page_count());
        let Some(keys) = self.keys else { panic!("this selector did not say that it needs keys") };
        keys.keys(page, out);
    }
}

/// Chooses the pages that one KV head of one sequence reads in a decode step.
///
/// This is the seam for research: a custom selector runs on the host, with the page summaries
/// widened to f32 for it, and with the keys if it needs them. What ships is a
/// [`crate::SelectionPolicy`], which is data, so that a backend can run it where the pages live; as
/// a selector it is the reference for those kernels.
pub trait PageSelector: Send + Sync {
    /// Fills `selected` with page indices in ascending order and returns `true`, or returns
    /// `false` to read every page. `selected` arrives empty.
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool;

    /// Whether [`SelectInput::keys`] is called. A backend whose pages are not in host memory
    /// refuses such a selector, or copies the keys.
    fn needs_keys(&self) -> bool {
        false
    }

    /// Bytes of summaries that the last choice of KV head `head.1` in layer `head.0` took, as a
    /// kernel would read them: a box for each page unless the selector says otherwise. For whoever
    /// counts what a step reads.
    fn bytes_read(&self, _head: (usize, usize), cost: &ScoreCost) -> usize {
        2 * cost.pages * cost.vector_bytes
    }

    /// The scores of all pages `[pages]`, the higher the sooner read, if that is how it chooses:
    /// for whoever watches a selection. `None` where it reads everything.
    fn page_scores(&self, _input: &SelectInput<'_>) -> Option<Vec<f32>> {
        None
    }
}
