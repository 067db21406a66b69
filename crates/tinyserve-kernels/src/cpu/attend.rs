//! Paged attention: one kernel over a page list, whether the list is a selection or everything.
//!
//! A call works through units: some rows of one sequence and the query heads of one KV head. Each
//! unit first chooses its pages; then its list is read, by several threads when it is long, each
//! one a part of it; then the parts are merged. The parts depend on nothing but the list, so that
//! neither the batch nor the number of threads shows in the result.

mod ahead;
mod codes;
mod count;
mod observe;
mod products;
mod scores;
mod softmax;
mod tile;

use std::ops::Range;
use std::sync::{Mutex, PoisonError, RwLock};

use tinyserve_kv::{HostPages, KvElement, KvLayout, PageId, with_element};

use super::clock::Clock;
use super::columns::Columns;
use super::path::CpuPath;
use super::select::{Choice, Chosen, choose};
use super::simd::{Element, Kernel, Simd, dispatch};
use super::{Cpu, CpuTensor};
use crate::reference;
use crate::{AttendArgs, AttendSequence, AttendStats, Attention, Heads, KernelError, PageLists};

use observe::Observed;
use softmax::{Shape, State};
use tile::{PageList, Target, Tile, TileScratch, pages_ahead, part_pages};

/// Rows of a prefill chunk that share one pass over the pages.
const ROW_TILE: usize = 16;
/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL_WORK: usize = 32 * 1024;
/// Units that are worked through together: their page lists are held at the same time.
const WAVE: usize = 512;
/// Most parts of a list that a thread reads in a row: it asks for the next one's pages meanwhile.
const MOST_PARTS: usize = 4;
/// Runs of parts for each thread, when there are enough: fewer might not be shared out evenly.
const ITEMS_OF_THREAD: usize = 8;
/// Numbers of a vector of the widest instruction set.
const MOST_LANES: usize = 16;

/// Rows of one sequence and the query heads of one KV head.
pub(super) struct Unit {
    /// The sequence's number in the call.
    sequence: usize,
    /// Rows of the batch.
    rows: Range<usize>,
    /// Tokens that the first row sees; each next row sees one more.
    first_visible: usize,
    kv_head: usize,
    /// Whether the pages are chosen.
    selects: bool,
    /// The part that is computed first, when several are computed apart, and their number.
    parts: (usize, usize),
}

impl Unit {
    fn table<'a>(&self, context: &Context<'a>) -> &'a [PageId] {
        context.sequences[self.sequence].pages
    }

    /// Tokens that the last row sees.
    fn tokens(&self) -> usize {
        self.first_visible + self.rows.len() - 1
    }
}

/// What a unit reads.
#[derive(Debug, Default)]
struct Pages {
    chosen: Chosen,
    list: Vec<u32>,
    stats: AttendStats,
    error: Option<KernelError>,
    /// The mass of the list's tokens `[pages of the list, page_size]`, when it is asked for.
    mass: Mutex<Vec<f32>>,
}

/// What every unit of a call needs.
pub(super) struct Context<'a> {
    pub(super) path: CpuPath,
    pub(super) clock: &'a Clock,
    pub(super) layer: usize,
    pub(super) heads: Heads,
    pub(super) pages: &'a HostPages,
    pub(super) scale: f32,
    sequences: &'a [AttendSequence<'a>],
    qkv: &'a CpuTensor,
    measure_recall: bool,
    observed: Option<Observed<'a>>,
    columns: Columns<'a>,
}

/// What a call of attention lays out; the next call reuses its memory.
#[derive(Default)]
pub(super) struct Plan {
    /// Rows that are some sequence's.
    written: Vec<bool>,
    units: Vec<Unit>,
    /// What each unit reads; more than there are units, after a larger call.
    pages: Vec<RwLock<Pages>>,
    /// What threads take one by one: a unit, and some of its parts.
    items: Vec<(usize, Range<usize>)>,
    /// A [`State`] for each part, and its [`observe::Records`] when mass is asked for.
    parts: Vec<f32>,
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan").field("units", &self.units.len()).finish_non_exhaustive()
    }
}

pub(super) fn attend(cpu: &Cpu, args: AttendArgs<'_, Cpu>) -> Result<AttendStats, KernelError> {
    let AttendArgs {
        layer,
        heads,
        qkv,
        scale,
        sequences,
        pages,
        measure_recall,
        mut page_lists,
        mut sequence_stats,
        observe,
        out,
    } = args;
    if let Some(stats) = &sequence_stats {
        assert_eq!(stats.len(), sequences.len(), "one count of what was read for each sequence");
    }
    let (width, shape) = (heads.q_columns().len(), pages.layout().shape());
    assert_eq!(
        (heads.kv_heads, heads.head_dim),
        (shape.kv_heads, shape.head_dim),
        "heads of pages"
    );
    assert!(heads.q_heads.is_multiple_of(heads.kv_heads), "query heads of one KV head");
    assert_eq!(qkv.columns(), heads.qkv_width(), "width of queries, keys and values");
    assert_eq!(out.columns(), width, "output width of attention");
    // Only waited for when two callers share a backend; whoever panicked left nothing that is
    // read before it is written.
    let mut plan = cpu.plan.lock().unwrap_or_else(PoisonError::into_inner);
    // Threads write rows at the same time: that is sound because each is written for one sequence.
    plan.written.clear();
    plan.written.resize(out.rows(), false);
    for row in sequences.iter().flat_map(|sequence| sequence.rows.clone()) {
        assert!(!std::mem::replace(&mut plan.written[row], true), "row {row} is in two sequences");
    }
    let (observed, mut mass) = Observed::new(observe, out.rows(), heads, sequences, pages.layout());
    let columns = Columns::new(out.values_mut(), width);
    // Heads that do not fill a wide vector waste it: the narrower one has less to waste.
    let path = match cpu.path() {
        CpuPath::Avx512 | CpuPath::Avx512Bf16 if heads.head_dim < 16 => CpuPath::Avx2,
        path => path,
    };
    let context = Context {
        path,
        clock: &cpu.clock,
        layer,
        heads,
        pages,
        scale,
        sequences,
        qkv,
        measure_recall,
        observed,
        columns,
    };
    let work: usize =
        sequences.iter().map(|s| s.rows.len() * (s.first_position + s.rows.len()) * width).sum();
    let serial = work < SERIAL_WORK;
    let mut units = sequences
        .iter()
        .enumerate()
        .flat_map(|(index, sequence)| {
            tiles(sequence, layer, pages.layout()).map(move |tile| (index, tile))
        })
        .flat_map(|(sequence, (rows, selects))| {
            let skipped = rows.start - sequences[sequence].rows.start;
            let first_visible = sequences[sequence].first_position + skipped + 1;
            (0..heads.kv_heads).map(move |kv_head| Unit {
                sequence,
                rows: rows.clone(),
                first_visible,
                kv_head,
                selects,
                parts: (0, 1),
            })
        });
    let mut stats = AttendStats::default();
    loop {
        plan.units.clear();
        plan.units.extend(units.by_ref().take(WAVE));
        if plan.units.is_empty() {
            return Ok(stats);
        }
        context.run(cpu, serial, &mut plan, (&mut stats, sequence_stats.as_deref_mut()))?;
        if let Some(lists) = page_lists.as_deref_mut() {
            context.add_lists(&mut plan, lists);
        }
        if let Some(mass) = &mut mass {
            context.add_mass(&plan, mass);
        }
    }
}

/// Splits the rows of a sequence into tiles: up to [`ROW_TILE`] rows that read everything, or one
/// row that selects; gives the rows, and whether they select.
///
/// Where pages hold codes, the rows of a tile lie in the same page: it is the one that they read as
/// it was appended.
fn tiles<'a>(
    sequence: &'a AttendSequence<'a>,
    layer: usize,
    layout: &KvLayout,
) -> impl Iterator<Item = (Range<usize>, bool)> + 'a {
    let (page_size, quantised) = (layout.page_size(), layout.shape().format.is_quantised());
    let Range { start: first, end } = sequence.rows;
    let selects = move |row: usize| match sequence.attention {
        Attention::Dense => false,
        Attention::Policy(policy) => {
            let tokens = sequence.first_position + row - first + 1;
            policy.page_budget(layer, tokens, page_size).is_some()
        }
        Attention::Custom(_) => true,
    };
    let begins_page =
        move |row: usize| (sequence.first_position + row - first).is_multiple_of(page_size);
    let mut next = first;
    std::iter::from_fn(move || {
        let start = next;
        next += usize::from(start < end);
        let alone = start < end && selects(start);
        let joins = |row: usize| !(alone || selects(row) || quantised && begins_page(row));
        while next < end && next - start < ROW_TILE && joins(next) {
            next += 1;
        }
        (start < next).then_some((start..next, alone))
    })
}

/// Buffers that a thread reuses from unit to unit.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// What choosing pages needs.
    choice: Choice,
    /// What the tile's softmax needs.
    tile: TileScratch,
    /// What sealing a page needs.
    sealed_rows: Vec<u8>,
}

impl Scratch {
    /// Memory that sealing a page reuses.
    pub(super) fn sealed_rows(&mut self) -> &mut Vec<u8> {
        &mut self.sealed_rows
    }
}

impl Context<'_> {
    /// Works through the units of `plan`.
    fn run(
        &self,
        cpu: &Cpu,
        serial: bool,
        plan: &mut Plan,
        (stats, mut sequence_stats): (&mut AttendStats, Option<&mut [AttendStats]>),
    ) -> Result<(), KernelError> {
        let Plan { units, pages, items, parts, .. } = plan;
        while pages.len() < units.len() {
            pages.push(RwLock::default());
        }
        let each = |items: usize, one: bool, run: &(dyn Fn(usize, usize) + Sync)| {
            if serial || one {
                (0..items).for_each(|item| run(0, item));
            } else {
                cpu.pool.run(items, run);
            }
        };
        let scratch = |thread: usize| {
            // A panic left nothing behind that is read before it is written, here and below.
            cpu.scratch[thread].lock().unwrap_or_else(PoisonError::into_inner)
        };
        let nobody_selects = units.iter().all(|unit| !unit.selects);
        let choosing = if nobody_selects { None } else { self.clock.start() };
        each(units.len(), nobody_selects, &|thread, index| {
            let mut chosen = pages[index].write().unwrap_or_else(PoisonError::into_inner);
            let choice = &mut scratch(thread).choice;
            with_element!(self.pages.layout().shape().format, E => {
                self.choose::<E>(&units[index], choice, &mut chosen);
            });
        });
        self.clock.chose(choosing);
        // In the order of the units, so that neither sums nor errors depend on who was faster.
        items.clear();
        let (part, mut first) = (part_pages(self.pages.layout().page_size()), 0);
        for (index, unit) in units.iter_mut().enumerate() {
            let chosen = pages[index].get_mut().unwrap_or_else(PoisonError::into_inner);
            if let Some(error) = chosen.error.take() {
                return Err(error);
            }
            stats.add(&chosen.stats);
            if let Some(of_sequences) = &mut sequence_stats {
                of_sequences[unit.sequence].add(&chosen.stats);
            }
            // Prefill has tiles enough for all threads, and its softmax fills the caches.
            let apart = unit.rows.len() == 1 && self.path != CpuPath::Scalar;
            let n = if apart { self.list(unit, chosen).len().div_ceil(part) } else { 1 };
            unit.parts = (first, n);
            first += if n > 1 { n } else { 0 };
        }
        let total: usize = units.iter().map(|unit| unit.parts.1).sum();
        let run = (total / (ITEMS_OF_THREAD * cpu.pool.threads())).clamp(1, MOST_PARTS);
        for (index, unit) in units.iter().enumerate() {
            let runs = (0..unit.parts.1).step_by(run);
            items.extend(runs.map(|part| (index, part..(part + run).min(unit.parts.1))));
        }
        let width = self.shape(1).state() + self.records(1).len(part);
        if parts.len() < first * width {
            parts.resize(first * width, 0.0);
        }
        let columns = Columns::new(&mut parts[..first * width], width);
        each(items.len(), false, &|thread, item| {
            let (index, run) = items[item].clone();
            let chosen = pages[index].read().unwrap_or_else(PoisonError::into_inner);
            let tile = &mut scratch(thread).tile;
            for part in run.clone() {
                let target = if units[index].parts.1 == 1 {
                    Target::Rows
                } else {
                    let part = units[index].parts.0 + part;
                    // SAFETY: each part is one item's, and nobody reads it before all are done.
                    Target::Part(unsafe { columns.slice(part, 0..width) })
                };
                with_element!(self.pages.layout().shape().format, E => {
                    self.attend::<E>((&units[index], part, &run), &chosen, target, tile);
                });
            }
        });
        for (unit, pages) in units.iter().zip(pages).filter(|(unit, _)| unit.parts.1 > 1) {
            let (first, n) = unit.parts;
            let parts = &mut parts[first * width..(first + n) * width];
            let pages = pages.get_mut().unwrap_or_else(PoisonError::into_inner);
            dispatch(self.path, Merge { context: self, unit, pages, parts, width });
        }
        Ok(())
    }

    /// Chooses the pages of a unit, and counts what will be read.
    fn choose<E: KvElement + Element>(&self, unit: &Unit, choice: &mut Choice, pages: &mut Pages) {
        let tokens = unit.tokens();
        let total = self.pages.layout().pages_for(tokens);
        let queries = self.queries(unit.rows.start, unit.kv_head);
        pages.error = None;
        pages.chosen = Chosen::Everything;
        if unit.selects {
            let chosen = choose::<E>(
                self,
                self.sequences[unit.sequence].attention,
                (unit.kv_head, &unit.table(self)[..total], tokens),
                queries,
                choice,
                &mut pages.list,
            );
            match chosen {
                Ok(chosen) => pages.chosen = chosen,
                Err(error) => {
                    pages.error = Some(error);
                    return;
                }
            }
        }
        let list = self.list(unit, pages);
        let mut stats = self.count(unit, list, pages.chosen);
        if let PageList::These(list) = list
            && self.measure_recall
            && list.len() < total
        {
            for query in queries.chunks_exact(self.heads.head_dim) {
                let row = self.reference_row(unit, tokens, query);
                stats.recall_sum += f64::from(reference::recall::<E>(&row, list));
                stats.recall_count += 1;
            }
        }
        pages.stats = stats;
    }

    /// Adds the lists of rows that are their sequences' last.
    fn add_lists(&self, plan: &mut Plan, lists: &mut PageLists) {
        for (unit, pages) in plan.units.iter().zip(&mut plan.pages) {
            let pages = pages.get_mut().unwrap_or_else(PoisonError::into_inner);
            let last = unit.rows.end == self.sequences[unit.sequence].rows.end;
            if last && pages.chosen == Chosen::Listed {
                lists.push((self.layer, unit.sequence, unit.kv_head), &pages.list);
            }
        }
    }

    fn list<'a>(&self, unit: &Unit, pages: &'a Pages) -> PageList<'a> {
        match pages.chosen {
            Chosen::Listed => PageList::These(&pages.list),
            _ => PageList::All(self.pages.layout().pages_for(unit.tokens())),
        }
    }

    /// Attends to one part of a unit's list, or to all of it; the thread reads the parts `run` in a
    /// row.
    fn attend<E: KvElement + Element>(
        &self,
        (unit, part, run): (&Unit, usize, &Range<usize>),
        pages: &Pages,
        target: Target<'_>,
        scratch: &mut TileScratch,
    ) {
        let list = self.list(unit, pages);
        if self.path == CpuPath::Scalar {
            self.reference::<E>(unit, list, pages);
            return;
        }
        let length = part_pages(self.pages.layout().page_size());
        let pages_of = |parts: Range<usize>| match target {
            Target::Rows => 0..list.len(),
            Target::Part(_) => parts.start * length..(parts.end * length).min(list.len()),
        };
        let (range, asked) = (pages_of(part..part + 1), pages_of(run.clone()));
        let mass = &pages.mass;
        let ahead = pages_ahead(self.pages.layout(), unit.rows.len());
        if self.pages.layout().shape().format.is_quantised() {
            let pages = self.pages.code_pages(self.layer, unit.kv_head);
            let tile = Tile {
                context: self,
                unit,
                pages,
                list,
                range,
                target,
                asked,
                ahead,
                scratch,
                mass,
            };
            dispatch(self.path, tile);
        } else {
            let pages = self.pages.head_pages::<E>(self.layer, unit.kv_head);
            let tile = Tile {
                context: self,
                unit,
                pages,
                list,
                range,
                target,
                asked,
                ahead,
                scratch,
                mass,
            };
            dispatch(self.path, tile);
        }
    }

    /// The queries of a tile of `rows` rows.
    fn shape(&self, rows: usize) -> Shape {
        let (head_dim, group) = (self.heads.head_dim, self.heads.group());
        let stride = head_dim.next_multiple_of(MOST_LANES);
        Shape { queries: rows * group, group, head_dim, stride, observed: self.observed.is_some() }
    }

    /// Queries `[group, head_dim]` of `row` that share `kv_head`.
    fn queries(&self, row: usize, kv_head: usize) -> &[f32] {
        let width = self.heads.group() * self.heads.head_dim;
        let start = row * self.heads.qkv_width() + kv_head * width;
        &self.qkv.values()[start..start + width]
    }

    /// Columns of the output that belong to `kv_head`.
    fn columns_of(&self, kv_head: usize) -> Range<usize> {
        let width = self.heads.group() * self.heads.head_dim;
        kv_head * width..(kv_head + 1) * width
    }

    /// Writes what `numbers`, a [`State`], comes to into the rows of `unit`.
    fn finish(&self, unit: &Unit, numbers: &mut [f32]) {
        let state = State::new(numbers, self.shape(unit.rows.len()));
        let mut query = 0;
        for row in unit.rows.clone() {
            // SAFETY: rows and KV heads of units do not overlap, and the slice ends in this loop.
            let out = unsafe { self.columns.slice(row, self.columns_of(unit.kv_head)) };
            for (head, out) in out.chunks_exact_mut(self.heads.head_dim).enumerate() {
                state.finish(query, out);
                if let Some(observed) = &self.observed {
                    let head = unit.kv_head * self.heads.group() + head;
                    observed.store(row, head, (state.lse(query), state.entropy(query)));
                }
                query += 1;
            }
        }
    }

    fn reference_row<'a>(
        &'a self,
        unit: &Unit,
        tokens: usize,
        query: &'a [f32],
    ) -> reference::AttendRow<'a> {
        reference::AttendRow {
            pages: self.pages,
            layer: self.layer,
            kv_head: unit.kv_head,
            table: unit.table(self),
            tokens,
            query,
            scale: self.scale,
        }
    }

    fn reference<E: KvElement>(&self, unit: &Unit, list: PageList<'_>, pages: &Pages) {
        let everything: Vec<u32>;
        let list = match list {
            PageList::These(list) => list,
            PageList::All(pages) => {
                everything = (0..pages as u32).collect();
                &everything
            }
        };
        let size = self.pages.layout().page_size();
        let mut mass = pages.mass.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = self.mass_queries(unit);
        mass.clear();
        mass.resize(if counted.is_empty() { 0 } else { list.len() * size }, 0.0);
        for (i, row) in unit.rows.clone().enumerate() {
            let tokens = unit.first_visible + i;
            // A later row of the tile may see a page that this one does not.
            let seen = list.partition_point(|&page| (page as usize) * size < tokens);
            // SAFETY: rows and KV heads of units do not overlap, and the slice ends in this loop.
            let out = unsafe { self.columns.slice(row, self.columns_of(unit.kv_head)) };
            let queries = self.queries(row, unit.kv_head).chunks_exact(self.heads.head_dim);
            let heads = queries.zip(out.chunks_exact_mut(self.heads.head_dim)).enumerate();
            for (head, (query, out)) in heads {
                let reference_row = self.reference_row(unit, tokens, query);
                reference::attend_row::<E>(&reference_row, &list[..seen], out);
                if let Some(observed) = &self.observed {
                    let counts = counted.contains(&(i * self.heads.group() + head));
                    let mass = if counts { &mut mass[..] } else { &mut [] };
                    let told = reference::observe_row::<E>(&reference_row, &list[..seen], mass);
                    observed.store(row, unit.kv_head * self.heads.group() + head, told);
                }
            }
        }
    }
}

/// Puts the parts of a unit together, in their order.
struct Merge<'a> {
    context: &'a Context<'a>,
    unit: &'a Unit,
    pages: &'a mut Pages,
    /// [`State`]s and their [`observe::Records`], one after the other.
    parts: &'a mut [f32],
    /// Numbers of a part.
    width: usize,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let shape = self.context.shape(1);
        let (first, rest) = self.parts.split_at_mut(self.width);
        let (total, records) = first.split_at_mut(shape.state());
        for part in rest.chunks_exact_mut(self.width) {
            State::new(total, shape).merge(simd, &mut part[..shape.state()]);
        }
        let counted = self.context.mass_queries(self.unit);
        if !counted.is_empty() {
            let size = self.context.pages.layout().page_size();
            let (length, part) = (self.context.list(self.unit, self.pages).len(), part_pages(size));
            let state = State::new(total, shape);
            let mass = self.pages.mass.get_mut().unwrap_or_else(PoisonError::into_inner);
            mass.clear();
            mass.resize(length * size, 0.0);
            let rest = rest.chunks_exact(self.width).map(|part| &part[shape.state()..]);
            let records = std::iter::once(&*records).chain(rest);
            for (records, mass) in records.zip(mass.chunks_mut(part * size)) {
                self.context.records(1).add_mass(records, &state, counted.clone(), mass);
            }
        }
        self.context.finish(self.unit, total);
    }
}
