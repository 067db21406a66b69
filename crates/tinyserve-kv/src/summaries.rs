//! What scorers keep of full pages: made when one first asks, forgotten when the page changes.

use std::sync::{OnceLock, PoisonError, RwLock};

use crate::memory::ZeroedMemory;
use crate::{
    GROUP_PAGES, HostKeys, HostPages, KvElement, KvError, METHODS, PageId, PageKeys, PageSummary,
    Scorer,
};

/// The summaries of every scorer that has asked for some.
#[derive(Debug)]
pub(crate) struct Summaries {
    /// `[methods][layers, kv_heads]`.
    of: Vec<OnceLock<Box<[RwLock<HeadSummaries>]>>>,
}

/// Those of one scorer, of all pages of one KV head of one layer.
#[derive(Debug, Default)]
struct HeadSummaries {
    /// `[groups][boxes][head_dim][2 (max, min)][GROUP_PAGES]`, from the first page on that is made.
    boxes: Option<ZeroedMemory>,
    /// One bit for each page that is made, by group.
    made: Vec<u64>,
}

impl HeadSummaries {
    fn has(&self, page: PageId) -> bool {
        let (group, lane) = (page.index() / GROUP_PAGES, page.index() % GROUP_PAGES);
        self.made.get(group).is_some_and(|made| made & (1 << lane) != 0)
    }
}

impl Summaries {
    pub(crate) fn new() -> Self {
        Self { of: METHODS.iter().map(|_| OnceLock::new()).collect() }
    }

    /// Forgets what was made of `page` in `heads` of `[layers, kv_heads]`.
    pub(crate) fn forget(&mut self, page: PageId, heads: std::ops::Range<usize>) {
        let (group, lane) = (page.index() / GROUP_PAGES, page.index() % GROUP_PAGES);
        for of_scorer in self.of.iter_mut().filter_map(OnceLock::get_mut) {
            for head in &mut of_scorer[heads.clone()] {
                // Whoever panicked had not noted what it was making.
                let head = head.get_mut().unwrap_or_else(PoisonError::into_inner);
                if let Some(made) = head.made.get_mut(group) {
                    *made &= !(1 << lane);
                }
            }
        }
    }

    fn of(&self, scorer: Scorer, heads: usize) -> &[RwLock<HeadSummaries>] {
        let at = METHODS.iter().position(|method| method.name() == scorer.name());
        let of_scorer = at.and_then(|at| self.of.get(at));
        let Some(of_scorer) = of_scorer else { panic!("{scorer:?} is not registered") };
        of_scorer.get_or_init(|| (0..heads).map(|_| RwLock::default()).collect())
    }

    /// Bytes of address space that they take.
    fn bytes(&self) -> usize {
        let heads = self.of.iter().filter_map(OnceLock::get).flatten();
        heads
            .map(|head| head.read().unwrap_or_else(PoisonError::into_inner))
            .filter_map(|head| head.boxes.as_ref().map(ZeroedMemory::bytes))
            .sum()
    }
}

/// The boxes that a scorer keeps of the pages of one KV head.
#[derive(Debug, Clone, Copy)]
pub struct GroupSummaries<'a, E> {
    /// `[groups][boxes, head_dim, 2 (max, min), GROUP_PAGES]`.
    boxes: &'a [E],
    /// Elements of one group.
    length: usize,
}

impl<'a, E> GroupSummaries<'a, E> {
    /// The boxes of a group of pages `[boxes, head_dim, 2 (max, min), GROUP_PAGES]`; those of pages
    /// that were not asked for are garbage.
    #[must_use]
    pub fn group(&self, group: usize) -> &'a [E] {
        &self.boxes[group * self.length..(group + 1) * self.length]
    }
}

impl HostPages {
    /// Calls `read` with what `scorer` keeps of the pages of a sequence, all but its last one,
    /// which may be open and is read in any case.
    ///
    /// What is not there yet is made. It stays until tokens of the page are written again, so a
    /// page's keys are read once for each scorer that is used. In the element type of the boxes,
    /// rounded outwards, a summary takes what as many boxes take, and bounds what it bounded.
    ///
    /// # Errors
    /// When the system refuses the memory.
    ///
    /// # Panics
    /// When `E` is not the element of the layout's format, an index is out of range, or the scorer
    /// keeps nothing.
    pub fn with_summaries<E: KvElement, R>(
        &self,
        scorer: Scorer,
        keys: HostKeys<'_>,
        read: impl FnOnce(GroupSummaries<'_, E>) -> R,
    ) -> Result<R, KvError> {
        let HostKeys { layer, kv_head, table, .. } = keys;
        self.check_element::<E>(kv_head);
        let shape = self.layout.shape();
        assert!(layer < shape.layers, "layer {layer}");
        let Some(summary) = scorer.summary() else { panic!("{scorer:?} keeps nothing of a page") };
        let full = &table[..table.len().saturating_sub(1)];
        let heads = self.summaries.of(scorer, shape.layers * shape.kv_heads);
        let head = &heads[layer * shape.kv_heads + kv_head];
        let complete =
            |head: &HeadSummaries| head.boxes.is_some() && full.iter().all(|&page| head.has(page));
        let reader = || head.read().unwrap_or_else(PoisonError::into_inner);
        if !complete(&reader()) {
            let head = &mut head.write().unwrap_or_else(PoisonError::into_inner);
            self.make_summaries::<E>(summary, keys, head)?;
        }
        // Nobody forgets while the pages are borrowed.
        let head = reader();
        let boxes = head
            .boxes
            .as_ref()
            .map_or(&[][..], |boxes| boxes.elements::<E>(0..boxes.bytes() / size_of::<E>()));
        let length = summary.boxes() * self.layout.group_box_elements();
        Ok(read(GroupSummaries { boxes, length }))
    }

    /// Bytes of address space for what scorers keep of pages.
    #[must_use]
    pub fn summary_bytes(&self) -> usize {
        self.summaries.bytes()
    }

    fn make_summaries<E: KvElement>(
        &self,
        summary: &dyn PageSummary,
        keys: HostKeys<'_>,
        head: &mut HeadSummaries,
    ) -> Result<(), KvError> {
        let (dim, size) = (self.layout.shape().head_dim, self.layout.page_size());
        let groups = self.capacity().div_ceil(GROUP_PAGES);
        let length = summary.boxes() * self.layout.group_box_elements();
        if head.boxes.is_none() {
            head.boxes = Some(ZeroedMemory::new(groups * length * size_of::<E>())?);
            head.made = vec![0; groups];
        }
        let Some(memory) = &mut head.boxes else { return Ok(()) };
        let boxes = memory.elements_mut::<E>(0..groups * length);
        let mut corners = vec![0.0; 2 * summary.boxes() * dim];
        let mut of_page = Vec::new();
        let full = &keys.table[..keys.table.len().saturating_sub(1)];
        for (number, page) in full.iter().enumerate() {
            let (group, lane) = (page.index() / GROUP_PAGES, page.index() % GROUP_PAGES);
            if head.made[group] & (1 << lane) != 0 {
                continue;
            }
            keys.keys(number, &mut of_page);
            summary.summarise(&of_page, size, &mut corners);
            let group_boxes = &mut boxes[group * length..(group + 1) * length];
            let places = group_boxes.chunks_exact_mut(2 * dim * GROUP_PAGES);
            for (corners, places) in corners.chunks_exact(2 * dim).zip(places) {
                let (min, max) = corners.split_at(dim);
                for (rows, (&min, &max)) in
                    places.chunks_exact_mut(2 * GROUP_PAGES).zip(min.iter().zip(max))
                {
                    let (max, min) = (E::at_least(max), E::at_most(min));
                    (rows[lane], rows[GROUP_PAGES + lane]) = (max, min);
                }
            }
            head.made[group] |= 1 << lane;
        }
        Ok(())
    }

    /// Forgets what scorers keep of `page` in `layer`, or in every layer.
    pub(crate) fn forget_summaries(&mut self, page: PageId, layer: Option<usize>) {
        let shape = self.layout.shape();
        let layers = layer.map_or(0..shape.layers, |layer| layer..layer + 1);
        let heads = layers.start * shape.kv_heads..layers.end * shape.kv_heads;
        self.summaries.forget(page, heads);
    }
}
