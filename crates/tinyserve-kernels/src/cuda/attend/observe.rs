//! What attention tells about its weights: log-sum-exp, entropy, mass, recall.

use super::plan::{Layout, Pages, TilePlan};
use super::{Call, Placed, STATE, Scratch};
use crate::cuda::CudaTensor;
use crate::cuda::error::CudaError;
use crate::cuda::launch::{Arg, Shape};
use crate::cuda::memory::grown;
use crate::{AttendStats, ObserveArgs, Store};

impl Call<'_> {
    /// Tells about the weights, out of `states`.
    pub(super) fn observe(
        &self,
        observe: ObserveArgs<'_, CudaTensor>,
        states: Arg,
        tiles: &[TilePlan],
        sequences: usize,
        plan: &Layout,
        placed: Placed,
    ) -> Result<(), CudaError> {
        let (device, heads) = (self.device, self.heads);
        let ObserveArgs { lse, entropy, mass } = observe;
        for tensor in [&mut *lse, &mut *entropy] {
            assert_eq!(tensor.columns(), heads.q_heads, "width of what attention tells");
            tensor.resize(device, self.rows)?;
        }
        let n = self.rows * heads.q_heads;
        let args = [states, lse.arg(), entropy.arg(), Arg::count(n)];
        // SAFETY: all three have `n` entries.
        unsafe { device.launch("observe", Shape::new((n.div_ceil(256), 1, 1), 256), &args)? };
        let Some(mass) = mass else { return Ok(()) };
        let layout = self.pages.layout();
        assert_eq!(mass.rows.len(), sequences, "rows of mass for each sequence");
        assert_eq!(mass.out.columns(), layout.page_size(), "width of mass");
        // Where the mass of each sequence that is asked for begins, and its pages.
        let (mut of_sequences, mut total) = (Vec::new(), 0);
        for (sequence, rows) in mass.rows.iter().enumerate() {
            if rows.is_empty() {
                continue;
            }
            let of_it = |tile: &&TilePlan| tile.sequence == sequence;
            let first = tiles.iter().position(|tile| tile.sequence == sequence);
            let tokens = tiles.iter().filter(of_it).map(TilePlan::tokens).max();
            let pages = layout.pages_for(tokens.unwrap_or(0));
            of_sequences.push((rows, first, tiles.iter().filter(of_it).count(), total, pages));
            total += heads.kv_heads * pages;
        }
        match mass.store {
            Store::Overwrite => mass.out.resize(device, total)?,
            Store::Add => assert_eq!(mass.out.rows(), total, "rows of mass to add to"),
        }
        let names = ["mass_f32", "mass_f16", "mass_bf16", "mass_int8", "mass_int4"];
        let kernel = self.pages.element().kernel(names);
        for (rows, first, n_tiles, start, pages) in of_sequences {
            let Some(first) = first else { continue };
            let mut args = vec![
                self.qkv,
                self.pages.layer(self.layer),
                placed.tables,
                placed.records.offset(first * size_of_val(&plan.records[0])),
                placed.lists,
                placed.lengths,
                states,
                mass.out.arg().offset(4 * start * layout.page_size()),
                self.pages.shape(),
                Arg::count(heads.group()),
                Arg::count(heads.qkv_width()),
                Arg::Number(self.scale),
                Arg::count(n_tiles),
                Arg::count(rows.start),
                Arg::count(rows.end),
                Arg::flag(mass.store == Store::Add),
            ];
            args.extend(self.code_args());
            // SAFETY: `plan` was laid out for these pages, and `out` has a row for each of them.
            unsafe {
                let shape = Shape::new((pages, heads.kv_heads, 1), 128);
                device.launch(kernel, shape, &args)?;
            }
        }
        Ok(())
    }
}

/// Adds up how much of the dense attention mass the lists hold: dense attention of the rows that
/// selected, of which only the sums of weights are kept.
pub(super) fn measure(
    call: &Call<'_>,
    scratch: &mut Scratch,
    tiles: &[TilePlan],
    plan: &Layout,
    placed: Placed,
    (stats, mut sequence_stats): (&mut AttendStats, Option<&mut [AttendStats]>),
) -> Result<(), CudaError> {
    let (device, heads, layout) = (call.device, call.heads, call.pages.layout());
    let dense = plan.everything(layout.page_size());
    let records = scratch.dense_records.send(device, &dense.records)?;
    let bytes = 4 * call.rows * heads.q_columns().len();
    let out = grown(&mut scratch.dense, device, bytes, "dense attention")?.arg();
    let bytes = 4 * STATE * call.rows * heads.q_heads;
    let states = grown(&mut scratch.dense_states, device, bytes, "states of attention")?.arg();
    call.attend(&mut scratch.parts, &dense, Placed { records, ..placed }, (out, states))?;
    let mut all = [Vec::new(), Vec::new()];
    for (states, buffer) in all.iter_mut().zip([&scratch.states, &scratch.dense_states]) {
        states.resize(STATE * call.rows * heads.q_heads, 0.0f32);
        if let Some(buffer) = buffer {
            buffer.read(device, 0, bytemuck::cast_slice_mut(states))?;
        }
    }
    let [listed, dense] = all;
    for tile in tiles.iter().filter(|tile| tile.has_list()) {
        let total = layout.pages_for(tile.tokens());
        for head in 0..heads.q_heads {
            if tile.length(head / heads.group(), total) == total {
                continue;
            }
            let at = STATE * (tile.rows.start * heads.q_heads + head);
            // The largest scores and the sums of weights relative to them.
            let fall = f64::from(listed[at]) - f64::from(dense[at]);
            let mass = f64::from(listed[at + 1]) * fall.exp2() / f64::from(dense[at + 1]);
            let found = AttendStats { recall_sum: mass, recall_count: 1, ..AttendStats::default() };
            stats.add(&found);
            if let Some(of_sequences) = &mut sequence_stats {
                of_sequences[tile.sequence].add(&found);
            }
        }
    }
    debug_assert!(tiles.iter().any(|tile| tile.pages != Pages::Everything), "somebody selects");
    Ok(())
}
