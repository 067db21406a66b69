//! Every path of the CPU passes the table of cases, on one thread and on several.

mod common;

use tinyserve_kernels::{Cpu, CpuOptions, CpuPath};

use common::WholeTable;

#[test]
fn every_path_passes_the_table() {
    let mut table = WholeTable::new();
    for path in CpuPath::available() {
        // What rounds is another path's code, but for products with weights.
        let threads: &[usize] = if path.rounds_inputs() { &[3] } else { &[1, 3] };
        for &threads in threads {
            let options = CpuOptions { threads: Some(threads), path: Some(path) };
            let outcomes = table.run(|| Cpu::new(options).unwrap());
            let failed: Vec<String> = outcomes
                .iter()
                .filter(|outcome| !outcome.passed())
                .map(ToString::to_string)
                .collect();
            assert!(failed.is_empty(), "{path} on {threads} threads:\n{}", failed.join("\n"));
        }
    }
}
