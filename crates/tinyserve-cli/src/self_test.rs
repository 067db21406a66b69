//! Every kernel of a path against the reference.

use anyhow::Result;
use serde_json::{Value, json};
use tinyserve::TinyServeError;
use tinyserve::kernels::conformance::{self, CaseOutcome};
use tinyserve::kernels::{Cpu, CpuOptions, CpuPath, Cuda, KernelError};

/// What the cases of one operation came to.
struct OpReport {
    op: &'static str,
    cases: usize,
    failed: Vec<String>,
    /// Largest error as a share of its case's tolerance; NaN when one was.
    worst: f64,
}

/// What the cases of one path came to.
pub(crate) struct PathReport {
    /// A path of the CPU, or a device.
    path: String,
    ops: Vec<OpReport>,
}

/// Runs all cases on `path`.
pub(crate) fn run(path: CpuPath) -> Result<PathReport> {
    let cpu = Cpu::new(CpuOptions { threads: None, path: Some(path) });
    report(path.name(), cpu.and_then(|cpu| conformance::run(&cpu)))
}

/// Runs all cases on a CUDA device.
pub(crate) fn run_cuda(number: usize) -> Result<PathReport> {
    report(&format!("cuda:{number}"), Cuda::new(number).and_then(|cuda| conformance::run(&cuda)))
}

fn report(path: &str, outcomes: Result<Vec<CaseOutcome>, KernelError>) -> Result<PathReport> {
    Ok(PathReport::new(path, &outcomes.map_err(TinyServeError::from)?))
}

impl PathReport {
    fn new(path: &str, outcomes: &[CaseOutcome]) -> Self {
        let mut ops: Vec<OpReport> = Vec::new();
        for outcome in outcomes {
            let at = ops.iter().position(|report| report.op == outcome.op).unwrap_or_else(|| {
                ops.push(OpReport { op: outcome.op, cases: 0, failed: Vec::new(), worst: 0.0 });
                ops.len() - 1
            });
            let report = &mut ops[at];
            report.cases += 1;
            let share = f64::from(outcome.max_error) / f64::from(outcome.tolerance);
            // An operation that must be exact has the tolerance 0: no error is no share of it.
            let share = if outcome.max_error == 0.0 { 0.0 } else { share };
            if share > report.worst || share.is_nan() {
                report.worst = share;
            }
            if !outcome.passed() {
                report.failed.push(outcome.case.clone());
            }
        }
        Self { path: path.to_owned(), ops }
    }

    /// Whether there were cases and all of them are within their tolerances.
    pub(crate) fn passed(&self) -> bool {
        !self.ops.is_empty() && self.ops.iter().all(|op| op.failed.is_empty())
    }

    pub(crate) fn json(&self) -> Value {
        let ops = self.ops.iter().map(|op| {
            json!({
                "op": op.op,
                "cases": op.cases,
                "failed": op.failed,
                "worst_error_of_tolerance": op.worst,
            })
        });
        json!({
            "path": self.path,
            "passed": self.passed(),
            "ops": ops.collect::<Vec<_>>(),
        })
    }

    pub(crate) fn text(&self) -> String {
        let verdict = |passed: bool| if passed { "PASS" } else { "FAIL" };
        let mut text = format!("\nself-test of {}: {}\n", self.path, verdict(self.passed()));
        for op in &self.ops {
            text += &format!(
                "  {:<20} {:>4} cases, worst error {:>5.1} % of its tolerance  {}\n",
                op.op,
                op.cases,
                op.worst * 100.0,
                verdict(op.failed.is_empty()),
            );
            for case in &op.failed {
                text += &format!("    failed: {case}\n");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(op: &'static str, max_error: f32, tolerance: f32) -> CaseOutcome {
        CaseOutcome { op, case: format!("{max_error}"), max_error, tolerance }
    }

    #[test]
    fn one_failure_is_enough() {
        let good =
            [outcome("norm", 0.5, 1.0), outcome("norm", 0.25, 1.0), outcome("embed", 0.0, 0.0)];
        let report = PathReport::new("scalar", &good);
        assert!(report.passed() && report.text().contains("scalar: PASS"), "{}", report.text());
        assert_eq!(report.ops.iter().map(|op| op.worst).collect::<Vec<_>>(), [0.5, 0.0]);
        for bad in [outcome("norm", 2.0, 1.0), outcome("norm", f32::NAN, 1.0)] {
            let report = PathReport::new("scalar", &[&good[..], &[bad]].concat());
            assert!(!report.passed() && report.text().contains("FAIL"), "{}", report.text());
            assert_eq!(report.ops[0].failed.len(), 1);
        }
        assert!(!PathReport::new("scalar", &[]).passed());
    }
}
