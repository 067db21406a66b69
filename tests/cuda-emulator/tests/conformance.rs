//! The CUDA backend passes the table of cases that every backend is held to.

use std::time::Instant;

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Cuda, conformance};

#[test]
fn every_kernel_passes_the_table() {
    let Some(ready) = ready() else { return };
    let cuda = Cuda::new(0).unwrap().use_fused_up_to(Some(conformance::FUSED_UP_TO));
    let mut table = conformance::Table::new();
    ready.orders(|seed| {
        let start = Instant::now();
        let outcomes = table.run(&cuda).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        eprintln!("order {seed}: {} cases in {seconds:.1} s", outcomes.len());
        assert!(!outcomes.is_empty());
        let failed: Vec<String> =
            outcomes.iter().filter(|outcome| !outcome.passed()).map(ToString::to_string).collect();
        assert!(failed.is_empty(), "order {seed}, {}:\n{}", failed.len(), failed.join("\n"));
    });
    if let Some(emulator) = ready.emulator {
        // Those serve cuBLAS: tests/cublas.rs has them run.
        assert_eq!(emulator.idle_kernels(), ["split_bf16", "split_f16", "store_products"]);
    }
}
