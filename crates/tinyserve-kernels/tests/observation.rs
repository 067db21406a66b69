//! What attention tells about its weights: log-sum-exp, entropy, and the mass of each token.

mod common;

use std::ops::Range;

use common::{Cache, LAYER, Numbers, backends, bits, shapes};
use proptest::prelude::*;
use tinyserve_kernels::{
    AttendArgs, AttendSequence, Attention, Backend, Cpu, Heads, MassArgs, ObserveArgs, Store,
};
use tinyserve_kv::{Budget, KvFormat, KvLayout, KvShape, SelectionPolicy};

/// What a call gives, and what it tells.
#[derive(Debug, PartialEq)]
struct Told {
    out: Vec<u32>,
    /// `[rows, q_heads]`.
    lse: Vec<f32>,
    /// `[rows, q_heads]`.
    entropy: Vec<f32>,
    /// `[kv_heads, pages, page_size]` of each sequence with rows that count.
    mass: Vec<f32>,
}

/// The last `rows` rows of each sequence, `[rows, qkv_width]`, of which `counted` have their mass
/// added up.
fn observe(
    cpu: &Cpu,
    cache: &Cache,
    sequences: &[(&[f32], usize, Range<usize>)],
    attention: Attention<'_>,
) -> Told {
    let (heads, width) = (cache.heads, cache.heads.qkv_width());
    let (mut qkv, mut steps, mut counted) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (tokens, rows, range)) in sequences.iter().enumerate() {
        let (start, first_position) = (qkv.len() / width, tokens.len() / width - rows);
        qkv.extend_from_slice(&tokens[first_position * width..]);
        counted.push(start + range.start..start + range.end);
        let pages = cache.tables[i].pages();
        steps.push(AttendSequence { rows: start..start + rows, first_position, pages, attention });
    }
    let (mut rows, mut out) = (cpu.tensor(width), cpu.tensor(heads.q_columns().len()));
    cpu.upload(&qkv, &mut rows);
    let (mut lse, mut entropy) = (cpu.tensor(heads.q_heads), cpu.tensor(heads.q_heads));
    let mut mass = cpu.tensor(cache.pages.layout().page_size());
    let told = MassArgs { rows: &counted, store: Store::Overwrite, out: &mut mass };
    cpu.attend(AttendArgs {
        layer: LAYER,
        heads,
        qkv: &rows,
        scale: cache.scale(),
        sequences: &steps,
        pages: &cache.pages,
        measure_recall: false,
        page_lists: None,
        sequence_stats: None,
        observe: Some(ObserveArgs { lse: &mut lse, entropy: &mut entropy, mass: Some(told) }),
        out: &mut out,
    })
    .unwrap();
    let [lse, entropy, mass] = [lse, entropy, mass].map(|told| told.values().to_vec());
    Told { out: bits(out.values()), lse, entropy, mass }
}

/// Weights, log-sum-exp and entropy of scores, in f64.
fn softmax(scores: &[f32]) -> (Vec<f64>, f64, f64) {
    let peak = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = scores.iter().map(|&s| f64::from(s - peak).exp()).sum();
    let lse = f64::from(peak) + total.ln();
    let weights: Vec<f64> = scores.iter().map(|&s| (f64::from(s) - lse).exp()).collect();
    let entropy = weights.iter().map(|&p| if p > 0.0 { -p * p.ln() } else { 0.0 }).sum();
    (weights, lse, entropy)
}

fn near(found: f32, expected: f64, tolerance: f64) -> bool {
    (f64::from(found) - expected).abs() <= tolerance * expected.abs().max(1.0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn it_is_what_the_scores_say(
        (heads, layout) in shapes(),
        lengths in prop::collection::vec((1usize..60, 1usize..20, 0usize..20), 1..4),
        seed in any::<u64>(),
    ) {
        let (mut numbers, width, dim) = (Numbers(seed), heads.qkv_width(), heads.head_dim);
        let sizes: Vec<usize> = lengths.iter().map(|(tokens, ..)| *tokens).collect();
        let qkv: Vec<Vec<f32>> = sizes.iter().map(|n| numbers.numbers(n * width)).collect();
        let sequences: Vec<(&[f32], usize, Range<usize>)> = lengths
            .iter()
            .zip(&qkv)
            .map(|(&(tokens, rows, skipped), qkv)| {
                let rows = rows.min(tokens);
                (qkv.as_slice(), rows, skipped.min(rows)..rows)
            })
            .collect();
        for cpu in backends(1) {
            let mut cache = Cache::new(heads, layout, &sizes);
            // In one step: a row sees its own page as it was appended, and pages that a step fills
            // are kept so until the next one appends.
            let places: Vec<_> = (0..qkv.len()).map(|index| (index, 0)).collect();
            let appended: Vec<_> = qkv.iter().map(Vec::as_slice).collect();
            cache.append_batch(&cpu, &places, &appended);
            let told = observe(&cpu, &cache, &sequences, Attention::Dense);
            let (mut row, mut first) = (0, 0);
            for (index, (tokens, rows, counted)) in sequences.iter().enumerate() {
                let total = tokens.len() / width;
                let capacity = layout.pages_for(total) * layout.page_size();
                let mut mass = vec![0.0; heads.kv_heads * capacity];
                for i in 0..*rows {
                    let seen = total - rows + i + 1;
                    for head in 0..heads.q_heads {
                        let query = &tokens[(seen - 1) * width + head * dim..][..dim];
                        let kv_head = head / heads.group();
                        let (weights, lse, entropy) =
                            softmax(&cache.logits((index, seen, kv_head), query));
                        let at = row * heads.q_heads + head;
                        let path = cpu.path();
                        prop_assert!(near(told.lse[at], lse, 1e-5), "{path}: {} {lse}", told.lse[at]);
                        let found = told.entropy[at];
                        prop_assert!(near(found, entropy, 1e-5), "{path}: {found} {entropy}");
                        if counted.contains(&i) {
                            for (sum, p) in mass[kv_head * capacity..].iter_mut().zip(weights) {
                                *sum += p;
                            }
                        }
                    }
                    row += 1;
                }
                if counted.is_empty() {
                    continue;
                }
                for (&found, expected) in told.mass[first..].iter().zip(&mass) {
                    prop_assert!(near(found, *expected, 1e-5), "{}: {found} {expected}", cpu.path());
                }
                first += mass.len();
            }
            prop_assert_eq!(told.mass.len(), first);
        }
    }

    #[test]
    fn asking_changes_nothing_and_threads_do_not_show(
        (heads, layout) in shapes(),
        tokens in prop_oneof![1usize..60, 1000usize..3000],
        rows in 1usize..20,
        selects in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (mut numbers, width) = (Numbers(seed), heads.qkv_width());
        let (rows, qkv) = (rows.min(tokens), numbers.numbers(tokens * width));
        let policy = SelectionPolicy {
            budget: Budget::Ratio(0.4), dense_layers: 0, min_context: 0, ..Default::default()
        };
        let attention = if selects { Attention::Policy(&policy) } else { Attention::Dense };
        for (alone, several) in backends(1).into_iter().zip(backends(3)).skip(1) {
            let mut cache = Cache::new(heads, layout, &[tokens]);
            cache.append(&alone, 0, 0, &qkv);
            let last = [(qkv.as_slice(), rows, 0..rows)];
            let told = observe(&alone, &cache, &last, attention);
            prop_assert_eq!(&told, &observe(&several, &cache, &last, attention));
            let first = tokens - rows;
            let steps = [(0, first, rows, attention)];
            let (out, _) = cache.attend(&alone, &qkv[first * width..], &steps, false).unwrap();
            prop_assert_eq!(&told.out, &bits(&out), "{}", alone.path());
            // Every query's weights sum up to one.
            let sum: f64 = told.mass.iter().map(|&x| f64::from(x)).sum();
            let queries = (rows * heads.q_heads) as f64;
            prop_assert!((sum - queries).abs() <= 1e-4 * queries, "{}: {sum}", alone.path());
        }
    }
}

/// One head of two channels; keys are `[keys[i], 0]`, the query `[1, 0]`.
fn one_head(cpu: &Cpu, keys: &[f32]) -> Told {
    let heads = Heads { q_heads: 1, kv_heads: 1, head_dim: 2 };
    let shape =
        KvShape { layers: 2, kv_heads: 1, head_dim: 2, page_size: 4, format: KvFormat::F32 };
    let mut cache = Cache::new(heads, KvLayout::new(shape).unwrap(), &[keys.len()]);
    let qkv: Vec<f32> = keys.iter().flat_map(|&key| [1.0, 0.0, key, 0.0, 0.5, 0.5]).collect();
    cache.append(cpu, 0, 0, &qkv);
    observe(cpu, &cache, &[(&qkv, 1, 0..1)], Attention::Dense)
}

#[test]
fn equal_scores_have_the_entropy_of_their_number_and_one_far_ahead_has_none() {
    for cpu in backends(1) {
        for level in [0.0, -500.0, 500.0] {
            for tokens in [1, 2, 33, 700, 5000] {
                let told = one_head(&cpu, &vec![level; tokens]);
                let (n, path) = (tokens as f64, cpu.path());
                assert!(near(told.entropy[0], n.ln(), 1e-5), "{path}: {:?}", told.entropy);
                for mass in &told.mass[..tokens] {
                    assert!(near(mass * tokens as f32, 1.0, 1e-4), "{path}: {mass}");
                }
            }
        }
        for ahead in [0, 350, 699] {
            let mut keys = vec![-1e4; 700];
            keys[ahead] = 1e4;
            let told = one_head(&cpu, &keys);
            assert!(told.entropy[0] < 1e-30, "{}: {}", cpu.path(), told.entropy[0]);
            assert_eq!(told.mass[ahead], 1.0, "{}", cpu.path());
        }
    }
}

#[test]
fn what_is_not_a_number_shows() {
    for cpu in backends(1) {
        for at in [0, 3, 300] {
            let mut keys = vec![0.5; 400];
            keys[at] = f32::NAN;
            let told = one_head(&cpu, &keys);
            assert!(told.lse[0].is_nan() && told.entropy[0].is_nan(), "{} {told:?}", cpu.path());
            assert!(told.mass[at].is_nan(), "{}: {}", cpu.path(), told.mass[at]);
        }
    }
}
