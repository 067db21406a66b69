//! Every kernel of a path against the reference.

use anyhow::Result;
use half::f16;
use serde_json::{Value, json};
use tinyserve::TinyServeError;
use tinyserve::kernels::conformance::{self, CaseOutcome, Table};
use tinyserve::kernels::{
    Backend, Cpu, CpuOptions, CpuPath, Cuda, DType, HostTensor, KernelError, LinearArgs,
    LinearPart, LinearSpec, MatrixLayout, Store, WeightFormat,
};
use tinyserve::model::SyntheticNormal;

use crate::bench;

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
        let cuda = Cuda::new(number)?.use_fused_up_to(Some(conformance::FUSED_UP_TO));
        let outcomes = conformance::run(&cuda)?;
        let copy = cuda.copy_bandwidth()?;
        Ok::<_, KernelError>((cuda, outcomes, copy))
    };
    let (cuda, outcomes, copy) = run().map_err(TinyServeError::from)?;
    let mut bandwidths = vec![("copy", copy), ("gemv f16", gemv_bandwidth(&cuda)?)];
    drop(cuda);
    bandwidths.extend(bench::bandwidths(number)?);
    Ok(PathReport { bandwidths, ..PathReport::new(&format!("cuda:{number}"), &outcomes) })
}

/// Width of the matrices that a product is timed with: 32 MiB of f16 each.
const GEMV_WIDTH: usize = 4096;
/// Matrices that a row is multiplied with in turn: more than a device's cache holds.
const MATRICES: usize = 4;

/// Bytes of weights that a product with one row reads in a second.
fn gemv_bandwidth(cuda: &Cuda) -> Result<f64> {
    let kernel_error = |error| TinyServeError::from(error);
    let mut random = SyntheticNormal::new(0, "a matrix that is timed");
    let values = (0..GEMV_WIDTH * GEMV_WIDTH).map(|_| f16::from_f32(random.sample()));
    let bytes: Vec<u8> = values.flat_map(f16::to_le_bytes).collect();
    let linears = (0..MATRICES).map(|_| {
        let shape = [GEMV_WIDTH, GEMV_WIDTH];
        let weight =
            HostTensor::new("a matrix that is timed", bytes.clone().into(), DType::F16, &shape)?;
        let parts = vec![LinearPart { weight, bias: None }];
        let (layout, format) = (MatrixLayout::OutIn, WeightFormat::Stored);
        cuda.load_linear(LinearSpec { parts, layout, format })
    });
    let linears = linears.collect::<Result<Vec<_>, _>>().map_err(kernel_error)?;
    let (mut x, mut out) = (cuda.tensor(GEMV_WIDTH), cuda.tensor(GEMV_WIDTH));
    cuda.upload(&[1.0; GEMV_WIDTH], &mut x);
    let mut run = || {
        let timed = cuda.time_step(|| {
            for linear in &linears {
                let store = Store::Overwrite;
                cuda.linear(LinearArgs { x: &x, linear, store, out: &mut out });
            }
            Ok::<_, KernelError>(())
        });
        Ok(timed.map_err(kernel_error)?.1.device.as_secs_f64())
    };
    // The first one loads the kernel.
    run()?;
    let seconds = bench::typical(run)?;
    let bytes: usize = linears.iter().map(|linear| cuda.linear_bytes(linear)).sum();
    Ok(bytes as f64 / seconds)
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
