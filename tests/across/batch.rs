//! Invariant 5: a batch, a chunking, a fork or a known prefix gives each sequence what it gets alone.

use proptest::prelude::*;
use tinyserve_kernels::{Attention, Cpu};
use tinyserve_kv::{
    Budget, EvictionPolicy, KvFormat, Prefix, PrefixIndex, PrefixOptions, SelectionPolicy,
};
use tinyserve_model::{Checkpoint, LogitRows};
use tinyserve_tests::{Runner, assert_close, cpu, golden};

fn runner(format: KvFormat, page_size: usize) -> Runner<Cpu> {
    let checkpoint = golden("llama-gqa");
    Runner::new(cpu(), &checkpoint, (page_size, format, 2048_usize.div_ceil(page_size)))
}

fn tokens(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(3..512_u32, length)
}

fn format() -> impl Strategy<Value = KvFormat> {
    prop::sample::select(KvFormat::ALL.to_vec())
}

/// Logits are bit for bit the same, so no tolerance.
fn last_row(runner: &mut Runner<Cpu>, tokens: &[u32], chunk: usize) -> Vec<f32> {
    runner.all_logits(tokens, chunk).pop().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn chunks_do_not_change_logits(
        tokens in tokens(1..60), chunk in 1..40_usize,
        format in format(), page_size in prop::sample::select(vec![1, 3, 4, 16, 64]),
    ) {
        let mut runner = runner(format, page_size);
        let whole = runner.all_logits(&tokens, usize::MAX);
        let parts = runner.all_logits(&tokens, chunk);
        prop_assert_eq!(whole, parts);
    }

    #[test]
    fn a_batch_gives_each_sequence_what_it_gets_alone(
        prompts in prop::collection::vec(tokens(1..30), 1..5),
        format in format(), page_size in prop::sample::select(vec![1, 3, 16]),
    ) {
        let mut runner = runner(format, page_size);
        let alone: Vec<_> =
            prompts.iter().map(|p| last_row(&mut runner, p, usize::MAX)).collect();
        let mut sequences: Vec<_> =
            prompts.iter().map(|p| runner.sequence(p, LogitRows::Last)).collect();
        let mut all: Vec<_> = sequences.iter_mut().collect();
        runner.step(&mut all, Attention::Dense);
        for (i, alone) in alone.iter().enumerate() {
            prop_assert_eq!(runner.output.logits(i).next().unwrap(), alone.as_slice());
        }
    }

    #[test]
    fn forks_share_pages_and_then_go_their_own_ways(
        prefix in tokens(1..40), one in tokens(1..20), other in tokens(1..20),
        page_size in prop::sample::select(vec![1, 4, 16]),
    ) {
        let mut runner = runner(KvFormat::F32, page_size);
        let joined = |tail: &[u32]| prefix.iter().chain(tail).copied().collect::<Vec<_>>();
        let alone =
            [joined(&one), joined(&other)].map(|p| last_row(&mut runner, &p, usize::MAX));
        let mut first = runner.sequence(&prefix, LogitRows::None);
        runner.step(&mut [&mut first], Attention::Dense);
        let mut second = runner.sequence(&other, LogitRows::Last);
        second.table = runner.cache.fork(&first.table);
        (first.next, first.logits) = (one, LogitRows::Last);
        runner.step(&mut [&mut first, &mut second], Attention::Dense);
        for (i, alone) in alone.iter().enumerate() {
            prop_assert_eq!(runner.output.logits(i).next().unwrap(), alone.as_slice());
        }
        runner.cache.release(first.table);
        runner.cache.release(second.table);
        prop_assert_eq!(runner.cache.pool().used_pages(), 0);
    }

    #[test]
    fn a_known_prefix_gives_what_computing_it_gives(
        prompts in prop::collection::vec((0..30_usize, tokens(1..40)), 2..6),
        page_size in prop::sample::select(vec![1, 4, 16]),
        format in format(), pages in 80..200_usize,
    ) {
        // Beginnings of one text, and tails of their own.
        let text: Vec<u32> = (3..33).collect();
        let prompts = prompts.iter().map(|(shared, tail)| [&text[..*shared], tail].concat());
        let mut alone = runner(format, page_size);
        let checkpoint = golden("llama-gqa");
        let mut runner = Runner::new(cpu(), &checkpoint, (page_size, format, pages));
        let index = PrefixIndex::new(PrefixOptions {
            identity: "llama-gqa",
            layout: *runner.cache.layout(),
            policy: EvictionPolicy::Lru,
            max_pages: usize::MAX,
        });
        runner.cache = runner.cache.with_prefix_index(index);
        let mut found = 0;
        for tokens in prompts {
            let mut sequence = runner.sequence(&tokens, LogitRows::Last);
            let prompt = Prefix { salt: "", tokens: &tokens };
            sequence.table = runner.cache.start(prompt);
            let cached = sequence.table.len();
            prop_assert!(cached < tokens.len());
            sequence.next = tokens[cached..].to_vec();
            runner.step(&mut [&mut sequence], Attention::Dense);
            let logits = runner.output.logits(0).next().unwrap().to_vec();
            prop_assert_eq!(logits, last_row(&mut alone, &tokens, usize::MAX));
            runner.cache.remember(prompt, &mut sequence.table);
            runner.cache.release(sequence.table);
            found += cached;
        }
        let stats = runner.cache.prefix_index().unwrap().stats();
        prop_assert_eq!(stats.hit_tokens, found as u64);
        prop_assert_eq!(runner.cache.available_pages(), pages);
        runner.cache.forget_prefixes();
        prop_assert_eq!(runner.cache.pool().free_pages(), pages);
    }

    #[test]
    fn a_budget_that_covers_every_page_is_dense_bit_for_bit(
        tokens in tokens(2..80), page_size in prop::sample::select(vec![1, 4, 16]),
        format in format(),
    ) {
        let mut runner = runner(format, page_size);
        let full = SelectionPolicy {
            budget: Budget::Ratio(1.0), dense_layers: 0, min_context: 0,
            ..SelectionPolicy::default()
        };
        let short = SelectionPolicy { min_context: 1000, ..full };
        let mut rows = Vec::new();
        for attention in [Attention::Dense, Attention::Policy(&full), Attention::Policy(&short)] {
            let mut sequence = runner.sequence(&tokens[..tokens.len() - 1], LogitRows::None);
            runner.step(&mut [&mut sequence], Attention::Dense);
            (sequence.next, sequence.logits) = (tokens[tokens.len() - 1..].to_vec(), LogitRows::Last);
            runner.step(&mut [&mut sequence], attention);
            rows.push(runner.output.logits(0).next().unwrap().to_vec());
            runner.cache.release(sequence.table);
        }
        prop_assert_eq!(&rows[0], &rows[1]);
        prop_assert_eq!(&rows[0], &rows[2]);
    }
}

/// The scalar reference and the vector paths are the same model.
#[test]
fn every_instruction_set_computes_the_same_logits() {
    use tinyserve_kernels::{CpuOptions, CpuPath};
    for name in tinyserve_tests::GOLDEN {
        let checkpoint = golden(name);
        let rows = |checkpoint: &Checkpoint, path| {
            let backend = Cpu::new(CpuOptions { threads: Some(2), path: Some(path) }).unwrap();
            let mut runner = Runner::new(backend, checkpoint, (16, KvFormat::F32, 16));
            runner.all_logits(&(3..100).collect::<Vec<_>>(), 31)
        };
        let expected = rows(&checkpoint, CpuPath::Scalar);
        for path in CpuPath::available().filter(|path| !path.rounds_inputs()) {
            for (found, expected) in rows(&checkpoint, path).iter().zip(&expected) {
                assert_close(&format!("{name} {path}"), found, expected, 2e-5);
            }
        }
    }
}

/// Rounding what bf16 weights are multiplied by moves logits a little, by as much in every chunk;
/// with other weights there is none.
#[test]
fn inputs_are_rounded_for_bf16_weights_alone() {
    use tinyserve_kernels::{CpuOptions, CpuPath};
    let tokens: Vec<u32> = (3..100).collect();
    for name in tinyserve_tests::GOLDEN {
        let checkpoint = golden(name);
        let rows = |path, chunk| {
            let backend = Cpu::new(CpuOptions { threads: Some(2), path: Some(path) }).unwrap();
            let mut runner = Runner::new(backend, &checkpoint, (16, KvFormat::F32, 16));
            runner.all_logits(&tokens, chunk)
        };
        let exact = rows(CpuPath::Portable, 97);
        for path in CpuPath::available().filter(|path| path.rounds_inputs()) {
            let rounded = rows(path, 97);
            for chunk in [1, 31, 50] {
                assert_eq!(rows(path, chunk), rounded, "{name} {path}, chunks of {chunk}");
            }
            if !name.ends_with("bf16") {
                assert!(path != CpuPath::PortableBf16 || rounded == exact, "{name} {path}");
                continue;
            }
            assert_ne!(rounded, exact, "{name} {path}");
            for (rounded, exact) in rounded.iter().zip(&exact) {
                assert_close(&format!("{name} {path}"), rounded, exact, 3e-2);
            }
        }
    }
}

/// Who computes a part of a step has no influence on what it comes to.
#[test]
fn the_number_of_threads_changes_nothing() {
    use tinyserve_kernels::CpuOptions;
    let policy = SelectionPolicy {
        budget: Budget::Ratio(0.3),
        dense_layers: 0,
        min_context: 0,
        ..Default::default()
    };
    for name in tinyserve_tests::GOLDEN {
        let checkpoint = golden(name);
        let prompt: Vec<u32> = (3..90).collect();
        for attention in [Attention::Dense, Attention::Policy(&policy)] {
            let results: Vec<_> = [1, 2, 3, 8]
                .into_iter()
                .map(|threads| {
                    let options = CpuOptions { threads: Some(threads), ..Default::default() };
                    let backend = Cpu::new(options).unwrap();
                    let mut runner = Runner::new(backend, &checkpoint, (4, KvFormat::F16, 40));
                    let tokens = runner.greedy(&prompt, 24, attention);
                    // The last step's logits are what every step before made of them, too.
                    let logits = runner.output.logits(0).next().unwrap().to_vec();
                    (tokens, logits)
                })
                .collect();
            for (result, threads) in results[1..].iter().zip([2, 3, 8]) {
                assert_eq!(result, &results[0], "{name}, {attention:?}, {threads} threads");
            }
        }
    }
}
