//! The model that looks things up answers exactly with dense attention, and the methods do with
//! it what they promise.

use tinyserve_kernels::{Cpu, CpuOptions};
use tinyserve_kv::{Budget, KvFormat, METHODS, Method, SelectionPolicy};
use tinyserve_lab::{LookupTask, NeedleRow, NeedleTest, Probe, Trial, needle};
use tinyserve_model::{InductionGeometry, InductionModel, Model};

fn policy(budget: Budget) -> SelectionPolicy {
    let (dense_layers, min_context) = (0, 0);
    SelectionPolicy { budget, dense_layers, min_context, ..SelectionPolicy::default() }
}

fn trial(name: &str, tokens: usize) -> Trial {
    Trial::new(Method::named(name).unwrap(), policy(Budget::Tokens(tokens)))
}

fn ask(
    geometry: InductionGeometry,
    test: &NeedleTest,
    near_keys: usize,
    trials: &[Trial],
) -> Vec<NeedleRow> {
    let model = InductionModel::new(geometry);
    let cpu = Cpu::new(CpuOptions { threads: Some(2), path: None }).unwrap();
    let loaded = Model::load(cpu, &model.checkpoint().unwrap(), |_, _| {}).unwrap();
    let layout = loaded.config().kv_layout(16, KvFormat::F32).unwrap();
    let mut probe = Probe::new(loaded, layout, test.context).unwrap();
    probe.observe(32);
    let task = LookupTask { tokens: model.tokens(), near_keys };
    needle(&mut probe, &task, test, trials, &mut |_, _, _| true).unwrap()
}

/// All look-ups of one document, and the passkey test, a single fact in a document, `passkeys`
/// times.
fn dense_is_exact(context: usize, passkeys: usize) {
    for geometry in InductionGeometry::ALL {
        for (pairs, samples) in [(64, 64), (1, passkeys)].into_iter().filter(|it| it.1 > 0) {
            let test = NeedleTest { context, pairs, samples, seed: 1 };
            let rows = ask(geometry, &test, 0, &[trial("dense", 1)]);
            assert_eq!(rows[0].correct, samples, "{geometry:?} {pairs} pairs: {rows:?}");
            assert_eq!(rows[0].bytes_read_ratio, Some(1.0));
        }
    }
}

#[test]
fn dense_attention_answers_exactly_at_1k_and_4k() {
    dense_is_exact(1 << 10, 2);
    dense_is_exact(1 << 12, 2);
}

#[test]
fn dense_attention_answers_exactly_at_16k() {
    // Every document takes seconds to read: passkeys are asked for nearer by and further away.
    dense_is_exact(1 << 14, 0);
}

#[test]
#[ignore = "minutes: run it in release, cargo test --release -p tinyserve-lab -- --ignored"]
fn dense_attention_answers_exactly_at_64k() {
    dense_is_exact(1 << 16, 1);
}

#[test]
fn with_outliers_boxes_find_what_windows_and_lots_lose() {
    let test = NeedleTest { context: 2048, pairs: 32, samples: 32, seed: 0 };
    let trials: Vec<_> =
        METHODS.iter().map(|&method| Trial::new(method, policy(Budget::Tokens(128)))).collect();
    for row in ask(InductionGeometry::Outlier, &test, 0, &trials) {
        match row.policy {
            "streaming" | "random" | "h2o" | "snapkv" => {
                assert!(row.accuracy < 0.3, "{row:?}");
            }
            _ => assert_eq!(row.accuracy, 1.0, "{row:?}"),
        }
        // What a window still holds is found.
        if row.policy == "streaming" {
            let last = row.depths.last().unwrap();
            assert!(last.correct > 0 && row.correct - last.correct <= 1, "{row:?}");
        }
    }
}

#[test]
fn with_random_codes_a_box_says_little_and_the_oracle_everything() {
    let test = NeedleTest { context: 2048, pairs: 32, samples: 32, seed: 0 };
    let rows = ask(
        InductionGeometry::Gaussian,
        &test,
        0,
        &[trial("dense", 1), trial("oracle", 128), trial("box", 128)],
    );
    assert_eq!((rows[0].accuracy, rows[1].accuracy), (1.0, 1.0));
    assert!(rows[2].accuracy < 0.8, "{:?}", rows[2]);
}

#[test]
fn keys_that_resemble_the_asked_one_do_not_fool_dense_attention() {
    let test = NeedleTest { context: 2048, pairs: 16, samples: 16, seed: 0 };
    for geometry in InductionGeometry::ALL {
        let rows = ask(geometry, &test, 256, &[trial("dense", 1), trial("oracle", 128)]);
        assert_eq!((rows[0].accuracy, rows[1].accuracy), (1.0, 1.0), "{geometry:?}");
    }
}

#[test]
fn a_test_that_is_stopped_keeps_its_whole_questions() {
    let model = InductionModel::new(InductionGeometry::Outlier);
    let cpu = Cpu::new(CpuOptions { threads: Some(1), path: None }).unwrap();
    let loaded = Model::load(cpu, &model.checkpoint().unwrap(), |_, _| {}).unwrap();
    let layout = loaded.config().kv_layout(16, KvFormat::F32).unwrap();
    let mut probe = Probe::new(loaded, layout, 512).unwrap();
    let free = probe.cache().pool().free_pages();
    let task = LookupTask { tokens: model.tokens(), near_keys: 0 };
    let test = NeedleTest { context: 512, pairs: 8, samples: 8, seed: 0 };
    let trials = [trial("dense", 1), trial("box", 64)];
    let mut calls = 0;
    let mut five = |what: &'static str, _: usize, _: usize| {
        calls += usize::from(what == "questions");
        calls < 5
    };
    let rows = needle(&mut probe, &task, &test, &trials, &mut five).unwrap();
    assert_eq!((rows[0].samples, rows[1].samples), (2, 2));
    assert_eq!(probe.cache().pool().free_pages(), free, "pages leak");
    let rows = needle(&mut probe, &task, &test, &trials, &mut |_, _, _| true).unwrap();
    assert_eq!((rows[0].samples, rows[1].samples), (8, 8));
    assert_eq!(probe.cache().pool().free_pages(), free, "pages leak");
}
