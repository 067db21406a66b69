//! The likeliest tokens of rows of logits, found where the logits are.

use super::Cuda;
use super::bucket::{bucket, filled};
use super::error::CudaError;
use super::launch::{Arg, Launcher, Shape};
use super::memory::{Buffer, Upload, grown};
use super::workload::f32s;
use crate::{MOST_TOP_LOGITS, TopLogitsArgs};

/// As `LOGITS_SLICE` in kernels/top_logits.cu.
const SLICE: usize = 8192;
/// Threads of a block, as `SELECT_BINS` in kernels/select.cuh.
const THREADS: u32 = 256;
const WHAT: &str = "the likeliest tokens";

/// Buffers that calls reuse.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    rows: Upload,
    parts: Option<Buffer>,
    found: Option<Buffer>,
    /// What came to the host.
    records: Vec<u32>,
}

/// Most bytes of the buffers for `rows` rows.
pub(super) fn most_bytes(rows: usize, vocab: usize) -> u64 {
    let record = 2 + 2 * MOST_TOP_LOGITS;
    let slices = vocab.div_ceil(SLICE);
    f32s(&[bucket(rows), slices, record]).saturating_add(f32s(&[bucket(rows), record]))
}

/// Finds them, and waits for what was found: a few bytes.
pub(super) fn top_logits(
    device: &Launcher,
    scratch: &mut Scratch,
    args: TopLogitsArgs<'_, Cuda>,
) -> Result<(), CudaError> {
    let TopLogitsArgs { logits, rows, k, out } = args;
    let vocab = logits.columns();
    assert!(rows.iter().all(|&row| (row as usize) < logits.rows()), "rows of logits");
    out.begin(k, vocab);
    let k = k.min(vocab);
    let (slices, launched) = (vocab.div_ceil(SLICE), bucket(rows.len()));
    // As the kernels have it: the largest logit, the sum, tokens, logits.
    let record = 2 + 2 * k;
    let parts = grown(&mut scratch.parts, device, 4 * launched * slices * record, WHAT)?.arg();
    let indices = scratch.rows.send(device, &filled(rows, 0))?;
    let found = grown(&mut scratch.found, device, 4 * launched * record, WHAT)?;
    let args = [logits.arg(), indices, parts, Arg::count(vocab), Arg::count(k)];
    let shape = Shape::new((slices, launched, 1), THREADS);
    // SAFETY: every index is a row of `logits`, and `parts` has a record for each slice of each.
    unsafe { device.launch("top_logits_parts", shape, &args)? };
    let args = [parts, found.arg(), Arg::count(slices), Arg::count(k)];
    // SAFETY: as above; `found` has a record for each row, and the slices have `k` tokens together.
    unsafe { device.launch("top_logits_merge", Shape::new((launched, 1, 1), THREADS), &args)? };
    scratch.records.clear();
    scratch.records.resize(rows.len() * record, 0);
    found.read(device, 0, bytemuck::cast_slice_mut(&mut scratch.records))?;
    for record in scratch.records.chunks_exact(record) {
        let (largest, sum) = (f32::from_bits(record[0]), f32::from_bits(record[1]));
        let log_sum_exp = f64::from(largest) + f64::from(sum).ln();
        let known = largest.is_finite() && log_sum_exp.is_finite();
        let (tokens, values) = record[2..].split_at(k);
        let tokens = tokens.iter().zip(values).map(|(&id, &bits)| (id, f32::from_bits(bits)));
        out.push(tokens, if known { log_sum_exp } else { f64::NAN });
    }
    Ok(())
}
