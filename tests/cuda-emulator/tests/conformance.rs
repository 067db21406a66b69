//! The CUDA backend passes the table of cases that every backend is held to.

use std::collections::BTreeSet;
use std::time::Instant;

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Cuda, conformance};

#[test]
fn every_kernel_passes_the_table() {
    let Some(ready) = ready() else { return };
    let idle = ready.in_parts("every_kernel_passes_the_table", |part, parts| {
        let cuda = Cuda::new(0).unwrap().use_fused_up_to(Some(conformance::FUSED_UP_TO));
        let mut table = conformance::Table::part(part, parts);
        ready.orders(|seed| {
            let start = Instant::now();
            let outcomes = table.run(&cuda).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            eprintln!("order {seed}: {} cases in {seconds:.1} s", outcomes.len());
            assert!(!outcomes.is_empty());
            let failed = outcomes.iter().filter(|outcome| !outcome.passed());
            let failed: Vec<String> = failed.map(ToString::to_string).collect();
            assert!(failed.is_empty(), "order {seed}, {}:\n{}", failed.len(), failed.join("\n"));
        });
        ready.emulator.map_or_else(String::new, |emulator| emulator.idle_kernels().join(" "))
    });
    let Some(idle) = idle.filter(|_| ready.emulator.is_some()) else { return };
    let idle = idle.iter().map(|kernels| kernels.split(' ').collect::<BTreeSet<_>>());
    let idle = idle.reduce(|some, others| &some & &others).unwrap();
    // Those serve cuBLAS: tests/cublas.rs has them run.
    assert_eq!(idle.into_iter().collect::<Vec<_>>(), ["split_bf16", "split_f16", "store_products"]);
}
