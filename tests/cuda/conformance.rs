//! The table of cases that every backend is held to.

use tinyserve_kernels::conformance;

use crate::support::{cuda, seeds};

#[test]
fn every_kernel_passes_the_table() {
    let Some((cuda, emulator)) = cuda() else { return };
    // A GPU has an order of its own.
    let seeds = if emulator.is_some() { seeds() } else { 0..=0 };
    for seed in seeds {
        if let Some(emulator) = emulator {
            emulator.seed(seed);
        }
        let start = std::time::Instant::now();
        let outcomes = conformance::run(&cuda).unwrap();
        let failed: Vec<String> =
            outcomes.iter().filter(|outcome| !outcome.passed()).map(ToString::to_string).collect();
        eprintln!(
            "seed {seed}: {} cases in {:.1} s",
            outcomes.len(),
            start.elapsed().as_secs_f64()
        );
        assert!(!outcomes.is_empty());
        assert!(
            failed.is_empty(),
            "seed {seed}: {} of {}\n{}",
            failed.len(),
            outcomes.len(),
            failed.join("\n")
        );
    }
}
