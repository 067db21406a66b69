//! A sequence in the pages of a backend, and attention over it.

use tinyserve_kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, Attention, Backend, Heads, KernelError, PageLists,
};
use tinyserve_kv::{KvFormat, KvLayout, KvShape, PagePool, PageTable, Slot};

/// Numbers in −1 to 1, the same every time.
pub(crate) fn numbers(count: usize) -> Vec<f32> {
    let mut number = 1u32;
    let next = || {
        number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (number >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Pages of one layer.
pub(crate) fn layout(heads: Heads, page_size: usize, format: KvFormat) -> KvLayout {
    let Heads { kv_heads, head_dim, .. } = heads;
    KvLayout::new(KvShape { layers: 1, kv_heads, head_dim, page_size, format }).unwrap()
}

/// One sequence alone in pages of one layer.
pub(crate) struct Sequence<B: Backend> {
    heads: Heads,
    pages: B::KvPages,
    table: PageTable,
}

/// Rows that attend to what is before them, and to themselves.
pub(crate) struct Step<'a> {
    /// `[rows, qkv_width]`.
    pub(crate) rows: &'a [f32],
    pub(crate) first_position: usize,
    pub(crate) attention: Attention<'a>,
    pub(crate) scale: f32,
    pub(crate) page_lists: Option<&'a mut PageLists>,
}

impl<B: Backend> Sequence<B> {
    /// Room for `tokens` tokens, in pages side by side.
    pub(crate) fn new(
        backend: &B,
        heads: Heads,
        layout: KvLayout,
        tokens: usize,
    ) -> Result<Self, KernelError> {
        let mut pool = PagePool::new(layout.pages_for(tokens)).unwrap();
        let mut table = PageTable::new(layout.page_size());
        assert!(table.extend(&mut pool, tokens).unwrap().is_none());
        Self::in_table(backend, heads, layout, &pool, table)
    }

    /// The sequence of `table`, in pages for the whole `pool`.
    pub(crate) fn in_table(
        backend: &B,
        heads: Heads,
        layout: KvLayout,
        pool: &PagePool,
        table: PageTable,
    ) -> Result<Self, KernelError> {
        let pages = backend.allocate_pages(layout, pool.capacity())?;
        Ok(Self { heads, pages, table })
    }

    /// Puts keys and values of `rows` (`[tokens, qkv_width]`), which are all tokens, into the pages.
    pub(crate) fn append(&mut self, backend: &B, rows: &[f32]) {
        let slots: Vec<Slot> = (0..self.table.len()).map(|token| self.table.slot(token)).collect();
        let mut qkv = backend.tensor(self.heads.qkv_width());
        backend.upload(rows, &mut qkv);
        backend.append_kv(AppendKvArgs {
            layer: 0,
            heads: self.heads,
            qkv: &qkv,
            slots: &slots,
            pages: &mut self.pages,
        });
    }

    /// What the rows of `step` attend to, `[rows, q_heads × head_dim]`.
    pub(crate) fn attend(&self, backend: &B, step: Step<'_>) -> Result<Vec<f32>, KernelError> {
        let Step { rows, first_position, attention, scale, page_lists } = step;
        let width = self.heads.qkv_width();
        let (mut qkv, mut out) =
            (backend.tensor(width), backend.tensor(self.heads.q_columns().len()));
        backend.upload(rows, &mut qkv);
        let sequence = AttendSequence {
            rows: 0..rows.len() / width,
            first_position,
            pages: self.table.pages(),
            attention,
        };
        backend.attend(AttendArgs {
            layer: 0,
            heads: self.heads,
            qkv: &qkv,
            scale,
            sequences: &[sequence],
            pages: &self.pages,
            measure_recall: false,
            page_lists,
            sequence_stats: None,
            observe: None,
            out: &mut out,
        })?;
        let mut values = Vec::new();
        backend.download(&out, &mut values);
        backend.check()?;
        Ok(values)
    }
}
