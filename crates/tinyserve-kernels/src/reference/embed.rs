//! Rows of an embedding table.

use crate::HostTensor;

/// Adds row `id` of `table` `[vocab, hidden]` to `out` `[hidden]`, or puts it there.
pub(crate) fn embed_row(table: &HostTensor, id: u32, add: bool, out: &mut [f32]) {
    let hidden = out.len();
    let row = table.to_f32(id as usize * hidden..(id as usize + 1) * hidden);
    for (out, x) in out.iter_mut().zip(row) {
        *out = if add { *out + x } else { x };
    }
}
