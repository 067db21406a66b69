//! The golden checkpoints against what transformers computed with them.

use tinyserve_kernels::Attention;
use tinyserve_kv::KvFormat;
use tinyserve_model::{Checkpoint, LogitRows, logprob};
use tinyserve_tests::{
    GOLDEN, GoldenCase, Runner, Sequence, argmax, assert_close, cpu, golden, golden_cases,
    golden_from_pretrained,
};

/// Of the largest logit; the reference computes in f32 too.
const TOLERANCE: f32 = 1e-4;

/// Whether a numeric error within the tolerance leaves every greedy choice as it is.
fn margin_allows(case: &GoldenCase) -> bool {
    let scale = case.last_logits.iter().fold(0.0_f32, |a, &b| a.max(b.abs()));
    case.min_margin > 2.0 * TOLERANCE * scale
}

fn nll_mean(rows: &[Vec<f32>], ids: &[u32]) -> f64 {
    let nll: f64 = rows.iter().zip(&ids[1..]).map(|(row, &id)| -f64::from(logprob(row, id))).sum();
    nll / (ids.len() - 1) as f64
}

#[test]
fn token_ids_are_equal() {
    for name in GOLDEN {
        let checkpoint = golden(name);
        let tokenizer = checkpoint.tokenizer().unwrap();
        for case in golden_cases(name) {
            let mut ids = tokenizer.encode(&case.text, true).unwrap();
            // The reference cut prompts so that the context still holds the greedy tokens.
            ids.truncate(checkpoint.config().max_positions - case.greedy.len());
            assert_eq!(ids, case.ids, "{name}");
        }
    }
}

/// Checks every case alone; returns how many had margins to compare greedy tokens by.
fn check_alone(name: &str, checkpoint: &Checkpoint, cases: &[GoldenCase]) -> usize {
    let mut compared = 0;
    for page_size in [1, 4, 16, 64] {
        let pages = 1024_usize.div_ceil(page_size);
        let mut runner = Runner::new(cpu(), checkpoint, (page_size, KvFormat::F32, pages));
        for (i, case) in cases.iter().enumerate() {
            for chunk in [usize::MAX, 7] {
                let what = format!("{name} case {i} page {page_size} chunk {chunk}");
                let rows = runner.all_logits(&case.ids, chunk);
                assert_close(&what, rows.last().unwrap(), &case.last_logits, TOLERANCE);
                let nll = nll_mean(&rows, &case.ids);
                assert!((nll - case.nll_mean).abs() <= 1e-4, "{what}: {nll} {}", case.nll_mean);
            }
            if margin_allows(case) {
                let greedy = runner.greedy(&case.ids, case.greedy.len(), Attention::Dense);
                assert_eq!(greedy, case.greedy, "{name} case {i} page {page_size}");
                compared += 1;
            }
        }
        assert_eq!(runner.cache.pool().used_pages(), 0, "every page came back");
    }
    compared
}

#[test]
fn logits_tokens_and_likelihoods_are_equal_alone() {
    let compared: usize =
        GOLDEN.iter().map(|name| check_alone(name, &golden(name), &golden_cases(name))).sum();
    assert!(compared >= 4 * 15, "only {compared} of 80 had margins to compare greedy tokens");
}

#[test]
fn half_precision_checkpoints_are_what_from_pretrained_makes_of_them() {
    for name in ["llama-tied-rope-scaled-bf16", "llama-sharded-f16"] {
        let (checkpoint, cases) = golden_from_pretrained(name);
        assert!(check_alone(name, &checkpoint, &cases) >= 4 * 2, "{name}: too few margins");
    }
}

/// All cases of a checkpoint at once: prompts in chunks of different sizes, so that some decode
/// while others still prefill, as a scheduler will run them.
#[test]
fn a_mixed_batch_gives_each_case_its_own_tokens() {
    for name in GOLDEN {
        let (checkpoint, cases) = (golden(name), golden_cases(name));
        for page_size in [1, 4, 16, 64] {
            let pages = 4096_usize.div_ceil(page_size);
            let mut runner = Runner::new(cpu(), &checkpoint, (page_size, KvFormat::F32, pages));
            let mut states: Vec<(Sequence, usize, Vec<u32>)> = cases
                .iter()
                .map(|_| (runner.sequence(&[], LogitRows::Last), 0, Vec::new()))
                .collect();
            loop {
                let mut active = Vec::new();
                for (i, (sequence, fed, tokens)) in states.iter_mut().enumerate() {
                    let case = &cases[i];
                    if tokens.len() == case.greedy.len() {
                        continue;
                    }
                    let chunk = [3, 64, 1000, 17][i % 4];
                    let end = (*fed + chunk).min(case.ids.len());
                    sequence.next = match tokens.last() {
                        Some(&token) => vec![token],
                        None => case.ids[*fed..end].to_vec(),
                    };
                    *fed = end;
                    active.push((i, sequence));
                }
                if active.is_empty() {
                    break;
                }
                let indices: Vec<usize> = active.iter().map(|(i, _)| *i).collect();
                let mut batch: Vec<&mut Sequence> = active.into_iter().map(|(_, s)| s).collect();
                runner.step(&mut batch, Attention::Dense);
                for (slot, i) in indices.into_iter().enumerate() {
                    let (_, fed, tokens) = &mut states[i];
                    if *fed < cases[i].ids.len() {
                        continue;
                    }
                    let logits = runner.output.logits(slot).next().unwrap();
                    if tokens.is_empty() {
                        let what = format!("{name} case {i} page {page_size} in a batch");
                        assert_close(&what, logits, &cases[i].last_logits, TOLERANCE);
                    }
                    tokens.push(argmax(logits));
                }
            }
            for (i, (_, _, tokens)) in states.iter().enumerate() {
                if margin_allows(&cases[i]) {
                    assert_eq!(*tokens, cases[i].greedy, "{name} case {i} page {page_size}");
                }
            }
        }
    }
}
