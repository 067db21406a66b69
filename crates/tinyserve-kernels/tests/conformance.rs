//! Every path of the CPU passes the table; a backend that is wrong in one operation does not.

mod common;

use common::wrong::{Fault, Wrong};
use tinyserve_kernels::conformance::{OPS, run};
use tinyserve_kernels::{Cpu, CpuOptions, CpuPath};

#[test]
fn every_path_passes_the_table() {
    for path in CpuPath::available() {
        for threads in [1, 3] {
            let options = CpuOptions { threads: Some(threads), path: Some(path) };
            let cpu = Cpu::new(options).unwrap();
            let outcomes = run(&cpu, None);
            for op in OPS {
                assert!(outcomes.iter().any(|outcome| outcome.op == op), "no case for {op}");
            }
            let failed: Vec<String> = outcomes
                .iter()
                .filter(|outcome| !outcome.passed)
                .map(ToString::to_string)
                .collect();
            assert!(failed.is_empty(), "{path} on {threads} threads:\n{}", failed.join("\n"));
        }
    }
}

#[test]
fn a_wrong_operation_fails_its_cases() {
    for op in OPS {
        for fault in [Fault::Off, Fault::Nan] {
            let outcomes = run(&Wrong { cpu: Cpu::reference(), op, fault }, Some(op));
            let own: Vec<_> = outcomes.iter().filter(|outcome| outcome.op == op).collect();
            assert!(!own.is_empty(), "no case for {op}");
            let passed: Vec<String> =
                own.iter().filter(|outcome| outcome.passed).map(ToString::to_string).collect();
            assert!(passed.is_empty(), "{op} is wrong ({fault:?}):\n{}", passed.join("\n"));
        }
    }
}

#[test]
fn a_filter_picks_cases_by_operation_and_name() {
    let cpu = Cpu::reference();
    let outcomes = run(&cpu, Some("linear [1, 7] to [5] f16 OutIn"));
    assert_eq!(outcomes.len(), 1, "{outcomes:?}");
    assert!(outcomes[0].passed && outcomes[0].op == "linear");
    assert!(run(&cpu, Some("no such case")).is_empty());
}
