//! Every kernel of a path against the reference.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
use tinyserve::TinyServeError;
use tinyserve::kernels::conformance::{self, CaseOutcome, Table};
use tinyserve::kernels::{
    Backend, Cpu, CpuOptions, CpuPath, Cuda, DType, HostTensor, KernelError, LinearArgs,
    LinearPart, LinearSpec, MatrixLayout, Store, WeightFormat,
};

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
    /// Bytes that a device moves in a second, by what moves them.
    bandwidths: Vec<(&'static str, f64)>,
}

/// Runs all cases of `table` on `path`.
pub(crate) fn run(table: &mut Table, path: CpuPath) -> Result<PathReport> {
    let cpu = Cpu::new(CpuOptions { threads: None, path: Some(path) });
    report(path.name(), cpu.and_then(|cpu| table.run(&cpu)))
}

/// Runs all cases on a CUDA device.
pub(crate) fn run_cuda(number: usize) -> Result<PathReport> {
    let run = || {
        let cuda = Cuda::new(number)?;
        let outcomes = conformance::run(&cuda)?;
        let bandwidths =
            vec![("copy", cuda.copy_bandwidth()?), ("gemv f16", gemv_bandwidth(&cuda)?)];
        Ok::<_, KernelError>((outcomes, bandwidths))
    };
    let (outcomes, mut bandwidths) = run().map_err(TinyServeError::from)?;
    bandwidths.extend(crate::bench::bandwidths(number)?);
    Ok(PathReport { bandwidths, ..PathReport::new(&format!("cuda:{number}"), &outcomes) })
}

/// Width of the matrix that a product is timed with: 32 MiB of f16.
const GEMV_WIDTH: usize = 4096;
/// Products; the fastest counts.
const PRODUCTS: usize = 5;

/// Bytes of weights that a product with one row reads in a second.
fn gemv_bandwidth(cuda: &Cuda) -> Result<f64, KernelError> {
    let bytes = vec![0u8; 2 * GEMV_WIDTH * GEMV_WIDTH];
    let shape = [GEMV_WIDTH, GEMV_WIDTH];
    let weight = HostTensor::new("a matrix that is timed", bytes.into(), DType::F16, &shape)?;
    let parts = vec![LinearPart { weight, bias: None }];
    let (layout, format) = (MatrixLayout::OutIn, WeightFormat::Stored);
    let linear = cuda.load_linear(LinearSpec { parts, layout, format })?;
    let (mut x, mut out) = (cuda.tensor(GEMV_WIDTH), cuda.tensor(GEMV_WIDTH));
    cuda.upload(&[1.0; GEMV_WIDTH], &mut x);
    let mut fastest = f64::INFINITY;
    for _ in 0..PRODUCTS {
        cuda.synchronize()?;
        let start = Instant::now();
        let store = Store::Overwrite;
        cuda.linear(LinearArgs { x: &x, linear: &linear, store, out: &mut out });
        cuda.synchronize()?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    Ok(cuda.linear_bytes(&linear) as f64 / fastest)
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
        Self { path: path.to_owned(), ops, bandwidths: Vec::new() }
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
            "bandwidth_gb_s": self
                .bandwidths
                .iter()
                .map(|(what, bytes)| ((*what).to_owned(), json!(bytes / 1e9)))
                .collect::<serde_json::Map<_, _>>(),
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
        for (what, bytes) in &self.bandwidths {
            text += &format!("  {what:<20} {:.1} GB/s\n", bytes / 1e9);
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
