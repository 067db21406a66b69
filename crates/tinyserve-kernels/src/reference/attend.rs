//! Attention of one row and one query head over listed pages: scores, softmax, weighted sum.

use tinyserve_kv::{HostPages, KvElement, PageId, attention_mass, with_element};

/// One query head of one row, and the pages it may read.
#[derive(Clone, Copy)]
pub(crate) struct AttendRow<'a> {
    pub(crate) pages: &'a HostPages,
    pub(crate) layer: usize,
    pub(crate) kv_head: usize,
    /// The sequence's page table.
    pub(crate) table: &'a [PageId],
    /// Tokens that the row sees.
    pub(crate) tokens: usize,
    /// `[head_dim]`.
    pub(crate) query: &'a [f32],
    pub(crate) scale: f32,
}

impl AttendRow<'_> {
    /// Tokens of page `index` that the row sees.
    fn visible(&self, index: usize) -> usize {
        let size = self.pages.layout().page_size();
        (self.tokens - (index * size).min(self.tokens)).min(size)
    }

    /// Whether the row reads codes of page `index`: it sees the page that it is in itself as it was
    /// appended, whether later rows of the same step have filled it or not.
    fn reads_codes(&self, index: usize) -> bool {
        let layout = self.pages.layout();
        layout.shape().format.is_quantised() && index != (self.tokens - 1) / layout.page_size()
    }

    /// Calls `each` with the key and the value, `[head_dim]`, of every token of page `index` that the
    /// row sees.
    fn tokens_of<E: KvElement>(&self, index: usize, mut each: impl FnMut(&[f64], &[f64])) {
        let (page, dim) = (self.table[index], self.query.len());
        let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
        if self.reads_codes(index) {
            let codes = self.pages.code_page(self.layer, page, self.kv_head);
            let corners = self.pages.page_box::<E>(self.layer, page, self.kv_head);
            let corners: Vec<(f32, f32)> =
                corners.min().map(E::to_f32).zip(corners.max().map(E::to_f32)).collect();
            for offset in 0..self.visible(index) {
                for (channel, &corners) in corners.iter().enumerate() {
                    key[channel] = f64::from(codes.key(offset, channel, corners));
                    value[channel] = f64::from(codes.value(offset, channel));
                }
                each(&key, &value);
            }
            return;
        }
        with_element!(self.pages.layout().open_format(), O => {
            let head = self.pages.head::<O>(self.layer, page, self.kv_head);
            let values = head.values.chunks_exact(dim);
            for (offset, values) in values.take(self.visible(index)).enumerate() {
                for (wide, x) in key.iter_mut().zip(head.key(offset)) {
                    *wide = f64::from(KvElement::to_f32(x));
                }
                for (wide, &x) in value.iter_mut().zip(values) {
                    *wide = f64::from(KvElement::to_f32(x));
                }
                each(&key, &value);
            }
        });
    }

    fn scores<E: KvElement>(&self, list: &[u32]) -> Vec<f64> {
        let mut scores = Vec::new();
        for &index in list {
            self.tokens_of::<E>(index as usize, |key, _| {
                let dot: f64 = self.query.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
                scores.push(dot * f64::from(self.scale));
            });
        }
        scores
    }
}

/// Writes the row's output `[head_dim]`; `list` holds indices into the page table.
pub(crate) fn attend_row<E: KvElement>(row: &AttendRow<'_>, list: &[u32], out: &mut [f32]) {
    let scores = row.scores::<E>(list);
    let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - peak).exp()).sum();
    let mut sums = vec![0.0; out.len()];
    let mut scores = scores.into_iter();
    for &index in list {
        row.tokens_of::<E>(index as usize, |_, value| {
            let weight = (scores.next().unwrap_or(f64::NAN) - peak).exp() / total;
            for (sum, v) in sums.iter_mut().zip(value) {
                *sum += weight * v;
            }
        });
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum as f32;
    }
}

/// Log-sum-exp of the row's scores and the entropy of its weights in nats; adds the weights of
/// listed tokens to `mass` `[pages of the list, page_size]`, unless it is empty.
pub(crate) fn observe_row<E: KvElement>(
    row: &AttendRow<'_>,
    list: &[u32],
    mass: &mut [f32],
) -> (f32, f32) {
    let scores = row.scores::<E>(list);
    let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - peak).exp()).sum();
    let lse = peak + total.ln();
    let entropy: f64 = scores.iter().map(|score| (score - lse).exp() * (lse - score)).sum();
    let mut weights = scores.iter().map(|score| (score - lse).exp());
    for (&index, mass) in list.iter().zip(mass.chunks_mut(row.pages.layout().page_size())) {
        for (mass, weight) in mass[..row.visible(index as usize)].iter_mut().zip(&mut weights) {
            *mass += weight as f32;
        }
    }
    (lse as f32, entropy as f32)
}

/// Share of the dense attention mass that the pages of `list` hold.
pub(crate) fn recall<E: KvElement>(row: &AttendRow<'_>, list: &[u32]) -> f32 {
    let size = row.pages.layout().page_size();
    let all: Vec<u32> = (0..row.tokens.div_ceil(size) as u32).collect();
    let logits: Vec<f32> = row.scores::<E>(&all).into_iter().map(|score| score as f32).collect();
    attention_mass(&logits, list, size)
}
