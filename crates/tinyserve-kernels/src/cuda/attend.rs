//! Paged attention on a device: what is read is laid out on the host, chosen and read there.
//!
//! How long every list will be follows from the policy and the number of tokens, so that nothing is
//! waited for. A custom selector is the exception: boxes and queries go to the host for it.

mod custom;
mod fused;
mod kernels;
mod observe;
mod parts;
mod plan;

use tinyserve_kv::{GROUP_PAGES, SelectionPolicy};

use super::bucket::bucket;
use super::error::CudaError;
use super::launch::{Arg, Launcher, Shape};
use super::memory::{Buffer, Upload, grown};
use super::pages::CudaPages;
use super::workload::{CudaWorkload, f32s};
use super::{Cuda, CudaTensor};
use crate::{AttendArgs, AttendStats, Heads, KernelError};
pub(super) use fused::{FusedChoice, fused_bytes, has_fused_kernel};
pub use fused::{FusedRow, FusedTable};
use kernels::{SCORE_MOMENTS, attend_kernel};
use observe::measure;
use parts::{MOST_PARTS, part_pages, parts_of_list};
use plan::{Layout, MOST_QUERIES, Scored, TilePlan, TileRecord, page_bucket};

/// As `ATTEND_STATE` in kernels/attend.cuh.
const STATE: usize = 3;
/// Threads of a block that attends.
const ATTEND_THREADS: u32 = 128;
/// Threads of a block that scores pages, as in kernels/score_pages.cu; it takes as many places of a
/// table as a group has pages.
const SCORE_THREADS: u32 = 128;
/// Threads of a block that scores pages by moments, and its pages, as in kernels/score_moments.cu.
const MOMENT_THREADS: u32 = 128;
const MOMENT_PAGES: usize = 8;
/// Threads of a block that selects pages, as `SELECT_BINS` in kernels/select.cuh.
const SELECT_THREADS: u32 = 256;

/// Buffers that calls of attention reuse. Layers that read everything have some of their own: what
/// they sent need not be sent again when others have selected, in the same step or the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// KV heads of the last call.
    kv_heads: usize,
    records: Upload,
    tables: Upload,
    lengths: Upload,
    selecting: Upload,
    fused: Upload,
    fused_scores: Option<Buffer>,
    lists: Option<Buffer>,
    scores: Option<Buffer>,
    parts: Option<Buffer>,
    states: Option<Buffer>,
    /// What dense attention gives where recall is measured: its result is not kept.
    dense: Option<Buffer>,
    dense_states: Option<Buffer>,
    dense_records: Upload,
}

/// Most bytes of the buffers of both kinds of calls.
pub(super) fn most_bytes(workload: &CudaWorkload<'_>) -> u64 {
    let CudaWorkload { layout, heads, tokens, sequences, context, pages, .. } = *workload;
    let Heads { q_heads, kv_heads, head_dim } = heads;
    let of_sequence = layout.pages_for(context);
    // Rows that are read in parts: those of decodes, whose pages are all different, and those that
    // share a pass with no other row.
    let part = part_pages(layout.page_size());
    let alone = match (MOST_QUERIES / heads.group(), layout.shape().format.is_quantised()) {
        (0 | 1, _) => tokens,
        (_, true) => layout.pages_for(tokens).min(tokens),
        (_, false) => 0,
    };
    let of_row = parts_of_list(of_sequence, layout.page_size());
    let parts = alone
        .saturating_mul(of_row)
        .saturating_add(pages / part)
        .saturating_add(sequences)
        .min(of_row.max(MOST_PARTS));
    let tiles = bucket(tokens.max(sequences));
    let listed = pages.saturating_add(sequences);
    let scored = [bucket(sequences), kv_heads, page_bucket(of_sequence)];
    let call = [
        f32s(&[parts, q_heads, head_dim + STATE]),
        f32s(&[tiles, size_of::<TileRecord>() / 4]),
        // Tables, lists, lengths, numbers of tiles that are scored.
        f32s(&[listed]),
        f32s(&[listed, kv_heads]),
        f32s(&[tiles, kv_heads]),
        f32s(&[tiles]),
        // Scores: by the kernels that are launched apart, and by the one that does all.
        f32s(&scored),
        f32s(&scored),
        // Where recall is measured: the dense result, and states of both.
        f32s(&[tiles, q_heads, head_dim]),
        f32s(&[tiles, q_heads, STATE]),
        f32s(&[tiles, q_heads, STATE]),
        f32s(&[tiles, size_of::<TileRecord>() / 4]),
    ];
    let call = call.into_iter().fold(0, u64::saturating_add);
    let keys = if workload.gathers_keys { f32s(&[kv_heads, context, head_dim]) } else { 0 };
    call.saturating_mul(2).saturating_add(keys)
}

/// What the launches of a call have in common.
struct Call<'a> {
    device: &'a Launcher,
    pages: &'a CudaPages,
    layer: usize,
    heads: Heads,
    qkv: Arg,
    rows: usize,
    /// Factor of scores.
    score_scale: f32,
    /// The same in units of ln 2.
    scale: f32,
}

/// Where tiles lie on the device.
#[derive(Clone, Copy)]
struct Placed {
    records: Arg,
    tables: Arg,
    lists: Arg,
    lengths: Arg,
}

pub(super) fn attend(cuda: &Cuda, args: AttendArgs<'_, Cuda>) -> Result<AttendStats, KernelError> {
    let AttendArgs { layer, heads, qkv, scale, sequences, pages, measure_recall, .. } = args;
    let AttendArgs { mut sequence_stats, observe, out, .. } = args;
    check_shapes(heads, qkv, pages, out);
    let layout = pages.layout();
    let mut tiles = plan::tiles(sequences, layer, layout, heads.group());
    let device = &cuda.launcher;
    out.resize(device, qkv.rows())?;
    let call = Call {
        device,
        pages,
        layer,
        heads,
        qkv: qkv.arg(),
        rows: qkv.rows(),
        score_scale: scale,
        scale: scale * std::f32::consts::LOG2_E,
    };
    custom::ask(&call, qkv, sequences, &mut tiles)?;
    let mut stats = AttendStats::default();
    for tile in &tiles {
        let of_tile = plan::count(tile, layer, layout, heads, sequences[tile.sequence].attention);
        stats.add(&of_tile);
        if let Some(of_sequences) = &mut sequence_stats {
            of_sequences[tile.sequence].add(&of_tile);
        }
    }
    if tiles.is_empty() {
        return Ok(stats);
    }
    let selects = tiles.iter().any(TilePlan::has_list);
    let mut state = cuda.state();
    let scratch = &mut state.attend[usize::from(selects)];
    scratch.kv_heads = heads.kv_heads;
    let plan = Layout::new(&tiles, sequences, pages, heads, cuda.fused);
    let placed = call.place(scratch, &plan)?;
    call.select(scratch, &plan, placed)?;
    let recall = measure_recall && selects;
    let states = if recall || observe.is_some() {
        let bytes = 4 * STATE * call.rows * heads.q_heads;
        grown(&mut scratch.states, device, bytes, "states of attention")?.arg()
    } else {
        Arg::Pointer(0)
    };
    call.fused(scratch, &plan, placed, (out.arg(), states))?;
    if plan.attends {
        call.attend(&mut scratch.parts, &plan, placed, (out.arg(), states))?;
    }
    if recall {
        measure(&call, scratch, &tiles, &plan, placed, (&mut stats, sequence_stats))?;
    }
    if let Some(observe) = observe {
        call.observe(observe, states, &tiles, sequences.len(), &plan, placed)?;
    }
    Ok(stats)
}

/// Whether there are kernels that choose as `policy` says.
pub(super) fn has_kernels(policy: &SelectionPolicy) -> bool {
    Scored::of(policy).is_some()
}

/// The lists of the last call, those of a row's KV heads one after the other.
pub(super) fn page_lists(cuda: &Cuda) -> Result<Vec<Vec<u32>>, KernelError> {
    let state = cuda.state();
    let scratch = &state.attend[1];
    let (records, lengths) = (scratch.records.sent::<TileRecord>(), scratch.lengths.sent::<u32>());
    let mut all = Vec::new();
    let Some(lists) = &scratch.lists else { return Ok(all) };
    for record in records.iter().filter(|record| record.list_stride > 0) {
        for kv_head in 0..scratch.kv_heads {
            let mut list = vec![0u32; lengths[record.lengths as usize + kv_head] as usize];
            let start = record.list as usize + kv_head * record.list_stride as usize;
            lists.read(&cuda.launcher, 4 * start, bytemuck::cast_slice_mut(&mut list))?;
            all.push(list);
        }
    }
    Ok(all)
}

fn check_shapes(heads: Heads, qkv: &CudaTensor, pages: &CudaPages, out: &CudaTensor) {
    let shape = pages.layout().shape();
    assert_eq!(
        (heads.kv_heads, heads.head_dim),
        (shape.kv_heads, shape.head_dim),
        "heads of pages"
    );
    assert!(heads.q_heads.is_multiple_of(heads.kv_heads), "query heads of one KV head");
    assert_eq!(qkv.columns(), heads.qkv_width(), "width of queries, keys and values");
    assert_eq!(out.columns(), heads.q_columns().len(), "output width of attention");
}

impl Call<'_> {
    /// Sends what the host has laid out.
    fn place(&self, scratch: &mut Scratch, plan: &Layout) -> Result<Placed, CudaError> {
        let device = self.device;
        let records = scratch.records.send(device, &plan.records)?;
        let tables = scratch.tables.send(device, &plan.tables)?;
        let lengths = scratch.lengths.send(device, &plan.lengths)?;
        let lists = grown(&mut scratch.lists, device, 4 * plan.list_entries, "page lists")?;
        for (start, list) in &plan.known_lists {
            lists.write(device, 4 * start, bytemuck::cast_slice(list))?;
        }
        Ok(Placed { records, tables, lists: lists.arg(), lengths })
    }

    /// Scores the pages of the tiles that select, and lists the best.
    fn select(
        &self,
        scratch: &mut Scratch,
        plan: &Layout,
        placed: Placed,
    ) -> Result<(), CudaError> {
        if plan.selecting.is_empty() {
            return Ok(());
        }
        let (device, heads) = (self.device, self.heads);
        let selecting = scratch.selecting.send(device, &plan.selecting)?;
        let lists = plan.selecting.len() * heads.kv_heads;
        let bytes = 4 * lists * plan.most_pages;
        let scores = grown(&mut scratch.scores, device, bytes, "page scores")?.arg();
        self.score(plan, placed, selecting, scores)?;
        let args = [
            scores,
            placed.records,
            selecting,
            placed.lists,
            Arg::count(self.pages.layout().page_size()),
            Arg::count(plan.most_pages),
        ];
        let grid = (plan.selecting.len(), heads.kv_heads, 1);
        // SAFETY: as above; a list has room for its budget, which is what the kernel lists.
        unsafe { device.launch("select_pages", Shape::new(grid, SELECT_THREADS), &args) }
    }

    /// Scores pages by their boxes, or by the moments of their keys.
    fn score(
        &self,
        plan: &Layout,
        placed: Placed,
        selecting: Arg,
        scores: Arg,
    ) -> Result<(), CudaError> {
        let (heads, element) = (self.heads, self.pages.element());
        let args = |pages: Arg, first: usize| {
            vec![
                self.qkv,
                pages,
                placed.tables,
                placed.records,
                selecting.offset(size_of::<u32>() * first),
                scores.offset(size_of::<f32>() * first * heads.kv_heads * plan.most_pages),
                self.pages.shape(),
                Arg::count(heads.group()),
                Arg::count(heads.qkv_width()),
                Arg::count(plan.most_pages),
            ]
        };
        let kernel = element.of_boxes(["score_pages_f32", "score_pages_f16", "score_pages_bf16"]);
        let grid = (plan.by_boxes, heads.kv_heads, plan.most_pages.div_ceil(GROUP_PAGES));
        let shared = u32::try_from(4 * heads.group() * heads.head_dim).unwrap_or(u32::MAX);
        let shape = Shape { shared, ..Shape::new(grid, SCORE_THREADS) };
        let boxes = self.pages.layer_boxes(self.layer);
        // SAFETY: `plan` was laid out for these pages, and the buffers are as large as it says.
        unsafe { self.device.launch(kernel, shape, &args(boxes, 0))? };
        let kernel = element.kernel(SCORE_MOMENTS);
        let by_moments = plan.selecting.len() - plan.by_boxes;
        let grid = (by_moments, heads.kv_heads, plan.most_pages.div_ceil(MOMENT_PAGES));
        let mut args = args(self.pages.layer(self.layer), plan.by_boxes);
        args.extend(self.code_args());
        // SAFETY: as above.
        unsafe { self.device.launch(kernel, Shape::new(grid, MOMENT_THREADS), &args) }
    }

    /// Reads the lists, and merges what was read in parts.
    fn attend(
        &self,
        parts: &mut Option<Buffer>,
        plan: &Layout,
        placed: Placed,
        (out, states): (Arg, Arg),
    ) -> Result<(), CudaError> {
        let (device, heads) = (self.device, self.heads);
        let layout = self.pages.layout();
        let bytes = 4 * plan.parts.most * heads.q_heads * (heads.head_dim + STATE);
        let parts = grown(parts, device, bytes, "parts of attention")?.arg();
        let part_pages = Arg::count(part_pages(layout.page_size()));
        let (kernel, queries) = attend_kernel(
            self.pages.element(),
            self.pages.is_wide(),
            heads.head_dim,
            plan.most_queries,
        );
        let passes = plan.most_queries.div_ceil(queries);
        for tiles in plan.parts.launches(plan.records.len()) {
            let records = placed.records.offset(size_of::<TileRecord>() * tiles.start);
            let mut args = vec![
                self.qkv,
                self.pages.layer(self.layer),
                placed.tables,
                records,
                placed.lists,
                placed.lengths,
                out,
                parts,
                states,
                self.pages.shape(),
                Arg::count(heads.group()),
                Arg::count(heads.qkv_width()),
                Arg::Number(self.scale),
                part_pages,
            ];
            args.extend(self.code_args());
            let grid = (tiles.len(), plan.parts.blocks(), heads.kv_heads * passes);
            // SAFETY: `plan` was laid out for these pages, and the buffers are as large as it says.
            unsafe { device.launch(kernel, Shape::new(grid, ATTEND_THREADS), &args)? };
            if plan.parts.most == 0 {
                continue;
            }
            let args = [
                parts,
                records,
                placed.lengths,
                out,
                states,
                self.pages.shape(),
                Arg::count(heads.group()),
                part_pages,
            ];
            let grid = (tiles.len(), heads.q_heads, 1);
            // SAFETY: as above; launches are in order, so the parts of one are merged before the next.
            unsafe { device.launch("combine", Shape::new(grid, ATTEND_THREADS), &args)? };
        }
        Ok(())
    }

    /// What kernels over codes read beside them: boxes and open pages.
    fn code_args(&self) -> impl Iterator<Item = Arg> {
        let quantised = self.pages.open.is_some();
        let boxes = self.pages.layer_boxes(self.layer);
        let args = [boxes, self.pages.layer_open(self.layer), self.pages.heads()];
        args.into_iter().filter(move |_| quantised)
    }
}
