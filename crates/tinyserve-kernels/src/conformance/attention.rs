//! Cases of the operations over pages: appending, selecting, attending.

use std::ops::Range;

use tinyserve_kv::{
    Budget, GroupReduce, KvFormat, KvLayout, KvShape, PageCopy, PagePool, PageSelector, PageTable,
    ScoreCost, Scorer, SelectInput, SelectionPolicy, Slot,
};

use super::input::Numbers;
use super::{CaseOutcome, Table, known, max_error, values};
use crate::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention, Backend, Heads, KernelError,
    MassArgs, ObserveArgs, Store,
};

/// A softmax and sums over a few hundred tokens in f32 against f64.
const TOLERANCE: f32 = 5e-6;
/// The same over codes, which are counted from the least of their page: what is added up is larger
/// than what becomes of it.
const TOLERANCE_OF_CODES: f32 = 1e-5;

/// One case: its heads, pages, what each sequence holds and what reads it.
struct Case {
    heads: Heads,
    page_size: usize,
    format: KvFormat,
    /// The format of pages that are not full.
    open: KvFormat,
    /// Tokens in the cache before the step, and new tokens, of each sequence.
    sequences: Vec<(usize, usize)>,
    reads: Reads,
    layer: usize,
    /// Whether every third cached token is pruned before the step.
    pruned: bool,
}

/// Which pages the rows of a case read.
#[derive(Clone, Copy)]
enum Reads {
    Everything,
    Chosen(SelectionPolicy),
    TwoOfThree,
}

/// A selector of one's own: leaves out every third page, unless nothing would be left.
struct TwoOfThree;

impl PageSelector for TwoOfThree {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let head = input.kv_head() as u32;
        selected.extend((0..input.page_count() as u32).filter(|page| (page + head) % 3 != 1));
        !selected.is_empty()
    }

    /// Another number for each head, so that a backend that counts something else is seen.
    fn bytes_read(&self, (layer, kv_head): (usize, usize), _cost: &ScoreCost) -> usize {
        100 * layer + kv_head
    }
}

pub(super) fn run<B: Backend>(
    backend: &B,
    Table { reference, part, attention, .. }: &mut Table,
    outcomes: &mut Vec<CaseOutcome>,
) -> Result<(), KernelError> {
    for case in cases((backend.kv_formats(), backend.open_formats()))? {
        if !part.takes_next() {
            continue;
        }
        let (found, found_stats, found_told) = attend(backend, &case)?;
        let expected = known(attention, case.describe(), || attend(reference, &case))?;
        let (expected, expected_stats, expected_told) = expected;
        let error = max_error(&found, expected);
        let tolerance = if case.format.is_quantised() { TOLERANCE_OF_CODES } else { TOLERANCE };
        // Entropies and scores near zero are as good as their terms, which are near one.
        let floor = |values: &[f32]| [values, &[1.0]].concat();
        let told = found_told.iter().zip(expected_told);
        let told = told.map(|(found, expected)| max_error(&floor(found), &floor(expected)));
        outcomes.push(CaseOutcome {
            op: "observe attention",
            case: case.describe(),
            // Not f32::max, which would drop a NaN.
            max_error: told
                .fold(0.0, |worst, it| if it > worst || it.is_nan() { it } else { worst }),
            tolerance,
        });
        // What was read is counted, not computed: it is equal or wrong.
        let same = same_counts(&found_stats, expected_stats);
        let op = match case.reads {
            _ if case.pruned => "move_tokens and attend",
            Reads::Everything => "append_kv and attend",
            Reads::Chosen(_) | Reads::TwoOfThree => "select and attend",
        };
        outcomes.push(CaseOutcome {
            op,
            case: case.describe(),
            max_error: if same { error } else { f32::NAN },
            tolerance,
        });
    }
    Ok(())
}

/// Whether counts are equal, and recalls to rounding.
fn same_counts(found: &AttendStats, expected: &AttendStats) -> bool {
    let recall_error = (found.recall_sum - expected.recall_sum).abs();
    recall_error <= f64::from(TOLERANCE) * expected.recall_count as f64
        && AttendStats { recall_sum: 0.0, ..*found } == AttendStats { recall_sum: 0.0, ..*expected }
}

impl Case {
    fn describe(&self) -> String {
        let Heads { q_heads, kv_heads, head_dim } = self.heads;
        let Self { page_size, format, open, sequences, reads, layer, pruned, .. } = self;
        let open = if open == format || *open == KvFormat::F16 {
            String::new()
        } else {
            format!(", open in {open},")
        };
        let pruned = if *pruned { ", every third pruned" } else { "" };
        let reads = match reads {
            Reads::Everything => String::new(),
            Reads::Chosen(SelectionPolicy { scorer, budget, group_reduce, .. }) => {
                format!(" {budget:?} by {scorer:?} {group_reduce:?} in layer {layer}")
            }
            Reads::TwoOfThree => " two of three pages".to_owned(),
        };
        format!(
            "{format}{open} {q_heads} over {kv_heads} heads of {head_dim}, pages of {page_size}, \
             (cached, new) {sequences:?}{reads}{pruned}"
        )
    }
}

/// The cases of a backend's formats, and of those that it has for open pages.
fn cases((formats, open): (&[KvFormat], &[KvFormat])) -> Result<Vec<Case>, KernelError> {
    let formats = formats.iter().flat_map(|format| {
        let open = if format.is_quantised() { open } else { std::slice::from_ref(format) };
        open.iter().map(|&open| (*format, open))
    });
    let formats: Vec<(KvFormat, KvFormat)> = formats.collect();
    let heads = [
        (1, 1, 1),
        (2, 2, 5),
        (4, 2, 6),
        (8, 1, 12),
        (3, 3, 40),
        (8, 2, 64),
        (4, 1, 80),
        (2, 1, 128),
    ];
    let mut cases = Vec::new();
    for (i, (q_heads, kv_heads, head_dim)) in heads.into_iter().enumerate() {
        let heads = Heads { q_heads, kv_heads, head_dim };
        for &(format, open) in &formats {
            for (j, page_size) in [1, 4, 16, 33].into_iter().enumerate() {
                // Of what differs in a sequence's last page alone, every second case is enough.
                if format.is_quantised() && open != KvFormat::F16 && (i + j) % 2 == 1 {
                    continue;
                }
                // One token alone, a prompt, a chunk after a prefix, a decode, a mixed batch.
                let sequences = [
                    vec![(0, 1)],
                    vec![(0, 37)],
                    vec![(29, 18)],
                    vec![(100, 1)],
                    vec![(50, 1), (0, 20), (15, 1), (3, 9)],
                ];
                let case = |sequences: &[(usize, usize)], reads, layer| Case {
                    heads,
                    page_size,
                    format,
                    open,
                    sequences: sequences.to_vec(),
                    reads,
                    layer,
                    pruned: false,
                };
                cases.push(case(&sequences[(i + j) % 5], Reads::Everything, 1));
                cases.push(case(&sequences[(i + j + 2) % 5], Reads::Everything, 0));
                let budget = match (i + j) % 3 {
                    0 => Budget::Ratio(0.3),
                    1 => Budget::Tokens(3 * page_size),
                    _ => Budget::Ratio(1.0),
                };
                let policy = SelectionPolicy {
                    budget,
                    sink_pages: j % 2,
                    recent_pages: i % 3,
                    dense_layers: 1,
                    min_context: 0,
                    ..SelectionPolicy::default()
                };
                for sequences in [vec![(100, 1)], vec![(60, 1), (20, 1), (0, 1)], vec![(40, 3)]] {
                    cases.push(case(&sequences, Reads::Chosen(policy), 1));
                }
                cases.push(case(&[(100, 1)], Reads::Chosen(policy), 0));
                // What some backends have kernels for, and others ask the host.
                let scorers = ["mean-std", "two-boxes", "mean-std", "cuboid-mean"];
                let scorer = Scorer::named(scorers[(i + j) % 4])?;
                let group_reduce =
                    if (i + j) % 4 == 2 { GroupReduce::SoftmaxVote } else { GroupReduce::Max };
                let budget = Budget::Ratio(0.3);
                let other = SelectionPolicy { scorer, group_reduce, budget, ..policy };
                cases.push(case(&[(70, 1), (40, 2)], Reads::Chosen(other), 1));
                if !format.is_quantised() {
                    let pruned = case(&[(90, 1), (12, 3)], Reads::Chosen(policy), 1);
                    cases.push(Case { pruned: true, ..pruned });
                }
                cases.push(case(&[(70, 1), (9, 3)], Reads::TwoOfThree, 1));
            }
        }
    }
    // Lists that devices read in parts, dense and chosen, of a group as large as they come.
    for (format, open) in formats {
        let long = |reads| Case {
            heads: Heads { q_heads: 8, kv_heads: 1, head_dim: 16 },
            page_size: 16,
            format,
            open,
            sequences: vec![(1100, 1), (700, 2)],
            reads,
            layer: 1,
            pruned: false,
        };
        let policy = SelectionPolicy {
            budget: Budget::Ratio(0.8),
            dense_layers: 1,
            min_context: 0,
            ..SelectionPolicy::default()
        };
        cases.extend([Reads::Everything, Reads::Chosen(policy)].map(long));
        // Pages of several blocks of tokens, whose scores some kernels sum up together.
        for (q_heads, page_size) in [(8, 64), (4, 64), (8, 32)] {
            let heads = Heads { q_heads, ..long(Reads::Everything).heads };
            let sequences = vec![(2 * page_size + 9, 1)];
            cases.push(Case { heads, page_size, sequences, ..long(Reads::Everything) });
        }
    }
    Ok(cases)
}

/// Signs that alternate. Queries and keys lie along them: scores need both corners of a box.
fn direction(index: usize) -> f32 {
    if index.is_multiple_of(2) { 1.0 } else { -1.0 }
}

/// Keys whose pages have clearly different scores, so that rounding cannot swap two of them: each
/// page's keys are its own multiple of one direction, and, every second one, of the opposite by an
/// amount that says nothing about the first.
fn keys(numbers: &mut Numbers, position: usize, page_size: usize, head_dim: usize) -> Vec<f32> {
    let page = position / page_size;
    // Permutations of the pages below 256, so that the best pages are not neighbours.
    let height = if (position % page_size).is_multiple_of(2) {
        0.05 + (page * 167 % 256) as f32 / 256.0
    } else {
        -0.05 - (page * 59 % 256) as f32 / 256.0
    };
    (0..head_dim).map(|d| height * direction(d) * (1.0 + 0.001 * numbers.next())).collect()
}

/// What attention gives, what it counts, and what it tells about its weights: log-sum-exp,
/// entropy and mass.
pub(super) type Attended = (Vec<f32>, AttendStats, [Vec<f32>; 3]);

fn attend<B: Backend>(backend: &B, case: &Case) -> Result<Attended, KernelError> {
    let Case { heads, page_size, format, open, layer, .. } = *case;
    let mut layout = KvLayout::new(KvShape {
        layers: 2,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        page_size,
        format,
    })?;
    if format.is_quantised() {
        layout = layout.with_open_format(open)?;
    }
    let pages_of = |&(cached, new): &(usize, usize)| layout.pages_for(cached + new);
    // Two pages more than needed, so that the case can move two.
    let capacity = case.sequences.iter().map(pages_of).sum::<usize>() + 2;
    let mut pool = PagePool::new(capacity)?;
    let mut pages = backend.allocate_pages(layout, capacity)?;
    let mut numbers = Numbers::new(7);
    let row = |position: usize, numbers: &mut Numbers| -> Vec<f32> {
        let mut qkv: Vec<f32> = heads
            .q_columns()
            .map(|i| {
                // Every second head looks the other way, so that a group disagrees on the pages.
                let sign = direction(i / heads.head_dim) * direction(i % heads.head_dim);
                sign * (1.0 + numbers.next())
            })
            .collect();
        for _ in 0..heads.kv_heads {
            qkv.extend(keys(numbers, position, page_size, heads.head_dim));
        }
        qkv.extend(numbers.take(heads.v_columns().len()));
        qkv
    };
    let append = |qkv: &[f32], slots: &[Slot], pages: &mut B::KvPages| {
        let mut tensor = backend.tensor(heads.qkv_width());
        backend.upload(qkv, &mut tensor);
        backend.append_kv(AppendKvArgs { layer, heads, qkv: &tensor, slots, pages });
        tensor
    };
    let mut tables: Vec<PageTable> = Vec::new();
    for &(cached, new) in &case.sequences {
        let mut table = PageTable::new(page_size);
        let none = table.extend(&mut pool, cached)?;
        debug_assert!(none.is_none(), "nothing is shared");
        let qkv: Vec<f32> = (0..cached).flat_map(|p| row(p, &mut numbers)).collect();
        let slots: Vec<Slot> = (0..cached).map(|p| table.slot(p)).collect();
        if cached > 0 {
            append(&qkv, &slots, &mut pages);
        }
        if case.pruned {
            let every_third: Vec<u32> = (0..cached as u32).skip(1).step_by(3).collect();
            backend.move_tokens(&mut pages, &table.prune(&mut pool, &every_third)?)?;
        }
        let none = table.extend(&mut pool, new)?;
        debug_assert!(none.is_none(), "nothing is shared");
        tables.push(table);
    }
    // A copied page is read like the page it was copied from.
    let moved = pool.allocate()?;
    let first = tables[0].pages()[0];
    backend.copy_page(&mut pages, PageCopy { from: first, to: moved });
    let mut lists: Vec<_> = tables.iter().map(|table| table.pages().to_vec()).collect();
    if tables[0].len() - case.sequences[0].1 >= page_size {
        lists[0][0] = moved;
    }
    // So is a page that was taken away and put back elsewhere.
    if tables[0].len() - case.sequences[0].1 >= 2 * page_size {
        let put_back = pool.allocate()?;
        let mut bytes = Vec::new();
        backend.download_pages(&pages, &[lists[0][1]], |page| {
            bytes.extend_from_slice(page);
            Ok::<(), KernelError>(())
        })?;
        backend.upload_page(&mut pages, put_back, &bytes)?;
        lists[0][1] = put_back;
    }
    let (mut qkv, mut slots, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
    for (i, &(_, new)) in case.sequences.iter().enumerate() {
        let (start, cached) = (slots.len(), tables[i].len() - new);
        for place in cached..cached + new {
            qkv.extend(row(tables[i].position(place), &mut numbers));
            slots.push(tables[i].slot(place));
        }
        sequences.push(AttendSequence {
            rows: start..slots.len(),
            first_position: cached,
            pages: &lists[i],
            attention: match &case.reads {
                Reads::Everything => Attention::Dense,
                Reads::Chosen(policy) => Attention::Policy(policy),
                Reads::TwoOfThree => Attention::Custom(&TwoOfThree),
            },
        });
    }
    let qkv = append(&qkv, &slots, &mut pages);
    let mut out = backend.tensor(heads.q_columns().len());
    let attend = |observe: Option<ObserveArgs<'_, B::Tensor>>, out: &mut B::Tensor| {
        backend.attend(AttendArgs {
            layer,
            heads,
            qkv: &qkv,
            scale: (heads.head_dim as f32).sqrt().recip(),
            sequences: &sequences,
            pages: &pages,
            measure_recall: observe.is_none(),
            page_lists: None,
            sequence_stats: None,
            observe,
            out,
        })
    };
    let stats = attend(None, &mut out)?;
    let (mut lse, mut entropy) = (backend.tensor(heads.q_heads), backend.tensor(heads.q_heads));
    let (mut mass, mut again) =
        (backend.tensor(page_size), backend.tensor(heads.q_columns().len()));
    // Every second sequence, and of each all but the first rows.
    let counted = |(i, sequence): (usize, &AttendSequence<'_>)| -> Range<usize> {
        let Range { start, end } = sequence.rows;
        if i.is_multiple_of(2) { start + (end - start) / 3..end } else { start..start }
    };
    let rows: Vec<_> = sequences.iter().enumerate().map(counted).collect();
    // Adding costs the reference another run: some cases are enough.
    let stores =
        if page_size == 4 { &[Store::Overwrite, Store::Add][..] } else { &[Store::Overwrite] };
    for &store in stores {
        let told = MassArgs { rows: &rows, store, out: &mut mass };
        let told = ObserveArgs { lse: &mut lse, entropy: &mut entropy, mass: Some(told) };
        attend(Some(told), &mut again)?;
    }
    let told = [lse, entropy, mass].map(|told| values(backend, &told));
    Ok((values(backend, &out), stats, told))
}
