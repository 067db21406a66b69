//! The keys of a sequence's pages, for selectors on the host that need more than boxes.

use std::fmt;

use crate::{HostPages, KvElement, PageId, with_elements};

/// Reads keys page by page, widened to f32: what attention really multiplies with.
pub trait PageKeys: fmt::Debug + Sync {
    /// Fills `out` with the keys of `page`, `[tokens of the page, head_dim]`; `out` arrives with
    /// anything in it and keeps its memory from call to call.
    ///
    /// # Panics
    /// When the sequence has no such page.
    fn keys(&self, page: usize, out: &mut Vec<f32>);
}

/// Keys of one KV head of one sequence in host memory.
#[derive(Clone, Copy)]
pub struct HostKeys<'a> {
    /// The pages of the pool.
    pub pages: &'a HostPages,
    /// Layer of the model.
    pub layer: usize,
    /// KV head of the layer.
    pub kv_head: usize,
    /// Pages of the sequence.
    pub table: &'a [PageId],
    /// Tokens of the sequence.
    pub tokens: usize,
}

impl fmt::Debug for HostKeys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, kv_head, tokens, .. } = self;
        write!(f, "HostKeys of layer {layer}, KV head {kv_head}, {tokens} tokens")
    }
}

impl PageKeys for HostKeys<'_> {
    fn keys(&self, page: usize, out: &mut Vec<f32>) {
        let layout = self.pages.layout();
        let (size, dim) = (layout.page_size(), layout.shape().head_dim);
        let tokens = (self.tokens - page * size).min(size);
        out.clear();
        out.resize(tokens * dim, 0.0);
        // The page of the newest token is read as it was appended.
        let own = (self.tokens - 1) / size;
        with_elements!(layout, (E, O) => {
            if layout.shape().format.is_quantised() && page != own {
                let codes = self.pages.code_page(self.layer, self.table[page], self.kv_head);
                let corners = self.pages.page_box::<E>(self.layer, self.table[page], self.kv_head);
                let corners = corners.min().map(KvElement::to_f32).zip(corners.max().map(KvElement::to_f32));
                for (channel, corners) in corners.enumerate() {
                    for token in 0..tokens {
                        out[token * dim + channel] = codes.key(token, channel, corners);
                    }
                }
                return;
            }
            let head = self.pages.head::<O>(self.layer, self.table[page], self.kv_head);
            for (channel, column) in head.keys.chunks_exact(size).enumerate() {
                for (token, &key) in column[..tokens].iter().enumerate() {
                    out[token * dim + channel] = KvElement::to_f32(key);
                }
            }
        });
    }
}
