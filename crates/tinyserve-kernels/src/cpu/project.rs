//! Projections in fewer passes: rows are normalised where they are quantised, and a function is
//! applied strip by strip where the product is stored, unless that is so little that no thread but
//! the caller's would be asked for it.

use super::activate::InStore;
use super::columns::Columns;
use super::quantised::RowNorm;
use super::tensor::{CpuLinear, CpuTensor, CpuWeights};
use super::{Cpu, CpuPath, SERIAL_ELEMENTS, linear, quantised};
use crate::backend::project_step_by_step;
use crate::{ActivateArgs, Backend, NormArgs, ProjectActivation, ProjectArgs, Store};

/// `out = f(norm(x)·Wᵀ + b)`.
pub(super) fn project(cpu: &Cpu, args: ProjectArgs<'_, Cpu>) {
    if cpu.path() == CpuPath::Scalar {
        return project_step_by_step(cpu, args);
    }
    let ProjectArgs { norm, linear, activate, out } = args;
    let (rows, width) = (norm.x.rows(), out.columns());
    out.resize(rows);
    let Some(ProjectActivation { activation, gated, product }) = activate else {
        return store(cpu, norm, linear, out, None);
    };
    product.resize(rows);
    let in_store = match &linear.weights {
        CpuWeights::Packed(packed) => quantised::stores_activated(packed, gated),
        CpuWeights::Stored { parts, .. } => linear::stores_activated(parts, gated),
    };
    if !in_store || rows * linear.outputs < SERIAL_ELEMENTS {
        store(cpu, norm, linear, product, None);
        return cpu.activate(ActivateArgs { activation, gated, x: product, out });
    }
    let function = InStore { activation, gated, width, out: Columns::new(out.values_mut(), width) };
    store(cpu, norm, linear, product, Some(&function));
}

/// `product = norm(x)·Wᵀ + b`, and the function of it.
fn store(
    cpu: &Cpu,
    norm: NormArgs<'_, Cpu>,
    linear: &CpuLinear,
    product: &mut CpuTensor,
    function: Option<&InStore<'_>>,
) {
    let outputs = function.map_or(linear.outputs, |function| {
        if function.gated { 2 * function.width } else { function.width }
    });
    assert_eq!(norm.x.columns(), linear.inputs, "input width of a projection");
    assert_eq!(outputs, linear.outputs, "output width of a projection");
    assert_eq!(product.columns(), linear.outputs, "width of a projection's product");
    let packed = match &linear.weights {
        CpuWeights::Packed(packed) => packed,
        CpuWeights::Stored { parts, .. } => {
            let NormArgs { kind, x, weight, bias, epsilon, out } = norm;
            cpu.norm(NormArgs { kind, x, weight, bias, epsilon, out: &mut *out });
            return linear::linear(cpu, out, parts, Store::Overwrite, product, function);
        }
    };
    let NormArgs { kind, x, weight, bias, epsilon, out } = norm;
    assert_eq!(out.columns(), linear.inputs, "output width of a norm");
    assert_eq!(weight.0.len(), linear.inputs, "scale of a norm");
    assert!(bias.is_none_or(|bias| bias.0.len() == linear.inputs), "shift of a norm");
    out.resize(x.rows());
    let (weight, bias) = (weight.0.as_slice(), bias.map(|bias| bias.0.as_slice()));
    let out = Columns::new(out.values_mut(), linear.inputs);
    let norm = RowNorm { kind, epsilon, weight, bias, out };
    quantised::linear(cpu, (x, Some(norm)), packed, Store::Overwrite, product, function);
}
