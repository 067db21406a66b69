//! The pages of one KV head in one layer: what attention looks up in its inner loops.

use crate::{CodeLayout, CodePage, GROUP_PAGES, HostPages, KvElement, PageId};

/// Keys and values of one head in one page of one layer.
#[derive(Debug, Clone, Copy)]
pub struct HeadPage<'a, E> {
    /// Keys `[head_dim, page_size]`; columns beyond the sequence are garbage.
    pub keys: &'a [E],
    /// Values `[page_size, head_dim]`; rows beyond the sequence are garbage.
    pub values: &'a [E],
    page_size: usize,
}

impl<'a, E: KvElement> HeadPage<'a, E> {
    #[inline(always)]
    pub(crate) fn new(both: &'a [E], page_size: usize) -> Self {
        let (keys, values) = both.split_at(both.len() / 2);
        Self { keys, values, page_size }
    }

    /// The key of the token at `offset`, channel by channel.
    ///
    /// # Panics
    /// When the page has no such token.
    pub fn key(&self, offset: usize) -> impl Iterator<Item = E> + use<'a, E> {
        assert!(offset < self.page_size, "offset {offset} in a page of {}", self.page_size);
        self.keys[offset..].iter().step_by(self.page_size).copied()
    }
}

/// Where the pages of one head of one layer lie.
#[derive(Debug, Clone, Copy)]
struct Places<'a, T> {
    /// The layer's pages, from the head's first on.
    from_first: &'a [T],
    capacity: usize,
    /// Elements of one page.
    page: usize,
    /// Elements from the head's pages in one group to those in the next.
    group: usize,
}

impl<'a, T> Places<'a, T> {
    fn new(layer: &'a [T], page: usize, (kv_head, kv_heads): (usize, usize), pages: usize) -> Self {
        let run = GROUP_PAGES * page;
        // A pool without pages has no head to begin with.
        let from_first = layer.get(kv_head * run..).unwrap_or_default();
        Self { from_first, capacity: pages, page, group: kv_heads * run }
    }

    #[inline(always)]
    fn start(&self, page: PageId) -> usize {
        let index = page.index();
        // Beyond the last page lies padding.
        assert!(index < self.capacity, "a page of the pool");
        index / GROUP_PAGES * self.group + index % GROUP_PAGES * self.page
    }

    #[inline(always)]
    fn get(&self, page: PageId) -> &'a [T] {
        let start = self.start(page);
        &self.from_first[start..start + self.page]
    }
}

/// All pages of one head of one layer, where the format has no codes.
#[derive(Debug, Clone, Copy)]
pub struct HeadPages<'a, E> {
    places: Places<'a, E>,
    page_size: usize,
}

impl<'a, E: KvElement> HeadPages<'a, E> {
    /// Keys and values of `page`.
    ///
    /// # Panics
    /// When the page is out of range.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, page: PageId) -> HeadPage<'a, E> {
        HeadPage::new(self.places.get(page), self.page_size)
    }
}

/// All pages of one head of one layer as codes.
#[derive(Debug, Clone, Copy)]
pub struct CodePages<'a> {
    places: Places<'a, u8>,
    layout: CodeLayout,
}

impl<'a> CodePages<'a> {
    /// How the codes of each page lie.
    #[inline(always)]
    #[must_use]
    pub fn layout(&self) -> CodeLayout {
        self.layout
    }

    /// The bytes of the layer from the head's first page on.
    #[inline(always)]
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.places.from_first
    }

    /// Where `page` begins among [`Self::bytes`].
    ///
    /// # Panics
    /// When the page is out of range.
    #[inline(always)]
    #[must_use]
    pub fn start(&self, page: PageId) -> usize {
        self.places.start(page)
    }

    /// Keys and values of `page`; garbage while the page is open.
    ///
    /// # Panics
    /// When the page is out of range.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, page: PageId) -> CodePage<'a> {
        CodePage::new(self.layout, self.places.get(page))
    }
}

impl HostPages {
    /// The pages of `kv_head` of `layer`, for many look-ups.
    ///
    /// # Panics
    /// When `E` is not the element of the layout's format, the format has codes, or an index is
    /// out of range.
    #[must_use]
    pub fn head_pages<E: KvElement>(&self, layer: usize, kv_head: usize) -> HeadPages<'_, E> {
        let shape = self.layout.shape();
        assert!(!shape.format.is_quantised(), "{} has codes", shape.format);
        self.check_element::<E>(kv_head);
        let elements = bytemuck::cast_slice(self.layer_pages(layer));
        let page = 2 * self.layout.head_elements();
        let heads = (kv_head, shape.kv_heads);
        let places = Places::new(elements, page, heads, self.capacity());
        HeadPages { places, page_size: shape.page_size }
    }

    /// The pages of `kv_head` of `layer` as codes, for many look-ups.
    ///
    /// # Panics
    /// When the format has no codes or an index is out of range.
    #[must_use]
    pub fn code_pages(&self, layer: usize, kv_head: usize) -> CodePages<'_> {
        let shape = self.layout.shape();
        let Some(layout) = self.layout.codes() else { panic!("{} has no codes", shape.format) };
        self.check_head(kv_head);
        let heads = (kv_head, shape.kv_heads);
        let bytes = self.layer_pages(layer);
        CodePages { places: Places::new(bytes, layout.bytes(), heads, self.capacity()), layout }
    }

    /// Keys and values of `kv_head` in `page` of `layer` as codes; garbage while the page is open.
    ///
    /// # Panics
    /// When the format has no codes or an index is out of range.
    #[must_use]
    pub fn code_page(&self, layer: usize, page: PageId, kv_head: usize) -> CodePage<'_> {
        self.code_pages(layer, kv_head).get(page)
    }

    fn layer_pages(&self, layer: usize) -> &[u8] {
        assert!(layer < self.layout.shape().layers, "layer {layer}");
        self.pages.elements(layer * self.layer_bytes()..(layer + 1) * self.layer_bytes())
    }
}
