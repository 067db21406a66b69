//! Rows of an embedding table, widened where they are written.

use super::simd::{Element, Kernel, Simd};

/// Looks rows up.
pub(super) struct Embed<'a, E> {
    /// `[vocab, hidden]`.
    pub(super) table: &'a [E],
    pub(super) hidden: usize,
    /// `[rows]`.
    pub(super) ids: &'a [u32],
    /// Whether rows are added to what is there.
    pub(super) add: bool,
    /// `[rows, hidden]`.
    pub(super) out: &'a mut [f32],
}

impl<E: Element> Kernel for Embed<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (&id, out) in self.ids.iter().zip(self.out.chunks_exact_mut(self.hidden)) {
            let row = &self.table[id as usize * self.hidden..(id as usize + 1) * self.hidden];
            for (x, out) in row.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
                let x = simd.load_up_to(x);
                let x = if self.add { simd.add(simd.load_up_to(out), x) } else { x };
                simd.store_up_to(x, out);
            }
        }
    }
}
