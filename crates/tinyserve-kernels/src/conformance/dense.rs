//! Cases of the operations that know no pages.

use std::collections::HashMap;
use std::fmt;

use half::bf16;

use super::input::Numbers;
use super::{CaseOutcome, Part, Table, known, max_error, values};
use crate::backend::project_step_by_step;
use crate::{
    ActivateArgs, Activation, Backend, Cpu, DType, EmbedArgs, Heads, KernelError, LinearArgs,
    LinearPart, LinearSpec, MatrixLayout, NormArgs, NormKind, ProjectActivation, ProjectArgs,
    RotaryAnglesArgs, RotaryArgs, Store, TopLogits, TopLogitsArgs, WeightFormat,
};

const ROWS: [usize; 6] = [1, 2, 3, 4, 7, 17];
/// Rows of a prefill: backends multiply them tile by tile.
const MANY_ROWS: [usize; 2] = [24, 70];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
const FORMATS: [WeightFormat; 3] = [WeightFormat::Stored, WeightFormat::Int8, WeightFormat::Int4];
const STORES: [Store; 2] = [Store::Overwrite, Store::Add];

/// Sums of a few hundred products in f32 against f64.
const SUMS: f32 = 2e-6;
/// A handful of roundings.
const FEW_ROUNDINGS: f32 = 1e-6;

pub(super) fn run<B: Backend>(
    backend: &B,
    Table { reference, part, dense, .. }: &mut Table,
    outcomes: &mut Vec<CaseOutcome>,
) -> Result<(), KernelError> {
    let reference = &*reference;
    let mut checks = Checks { expected: dense, outcomes };
    for dtype in DTYPES {
        for (store, format) in STORES.into_iter().flat_map(|s| FORMATS.map(|f| (s, f))) {
            for hidden in [1, 12, 64, 131] {
                if !part.takes_next() {
                    continue;
                }
                let case = format!("{dtype} as {format:?} {store:?} hidden {hidden}");
                let table = (dtype, format, hidden);
                let found = embed(backend, table, store)?;
                checks.check("embed", case, 0.0, &found, || embed(reference, table, store))?;
            }
        }
    }
    for kind in [NormKind::Layer, NormKind::Rms] {
        for (rows, hidden) in [(1, 1), (3, 7), (2, 48), (17, 131), (300, 256)] {
            for bias in [false, true] {
                if !part.takes_next() {
                    continue;
                }
                let case = format!("{kind:?} [{rows}, {hidden}] bias {bias}");
                let found = norm(backend, kind, (rows, hidden), bias)?;
                let expected = || norm(reference, kind, (rows, hidden), bias);
                checks.check("norm", case, SUMS, &found, expected)?;
            }
        }
    }
    linears(backend, reference, part, &mut checks)?;
    for (rows, head_dim, q_heads, kv_heads) in [
        (1, 2, 1, 1),
        (3, 6, 4, 2),
        (7, 12, 8, 1),
        (17, 40, 3, 1),
        (5, 64, 8, 2),
        (4, 80, 4, 1),
        (2, 128, 2, 2),
    ] {
        if !part.takes_next() {
            continue;
        }
        let heads = Heads { q_heads, kv_heads, head_dim };
        let case = format!("[{rows}] {q_heads} and {kv_heads} heads of {head_dim}");
        let (angles, qkv) = rotary(backend, heads, rows);
        // Positions reach 100,000: an angle's own rounding is 4e-3 there, so it is exact or wrong.
        let expected = || Ok(rotary(reference, heads, rows).0);
        checks.check("rotary_angles", case.clone(), FEW_ROUNDINGS, &angles, expected)?;
        let expected = || Ok(rotary(reference, heads, rows).1);
        checks.check("rotary", case, FEW_ROUNDINGS, &qkv, expected)?;
    }
    for activation in [Activation::GeluTanh, Activation::Gelu, Activation::Relu, Activation::Silu] {
        for gated in [false, true] {
            for (rows, width) in [(1, 1), (3, 21), (2, 64), (300, 131), (400, 256)] {
                if !part.takes_next() {
                    continue;
                }
                let case = format!("{activation:?} [{rows}, {width}] gated {gated}");
                let found = activate(backend, activation, gated, (rows, width));
                let expected = || Ok(activate(reference, activation, gated, (rows, width)));
                checks.check("activate", case, FEW_ROUNDINGS, &found, expected)?;
            }
        }
    }
    for columns in [1, 13, 64] {
        if !part.takes_next() {
            continue;
        }
        let case = format!("4 of [6, {columns}]");
        let found = gather(backend, columns);
        checks.check("gather_rows", case, 0.0, &found, || Ok(gather(reference, columns)))?;
    }
    // One slice of a device's, several, and a last one that has fewer tokens than are asked for.
    for (vocab, k) in [(1, 1), (5, 128), (300, 1), (300, 7), (8192 + 3, 40), (20_000, 128)] {
        for few in [true, false] {
            if !part.takes_next() {
                continue;
            }
            let case = format!("{k} of [3, {vocab}]{}", if few { ", few different" } else { "" });
            let (tokens, sums) = top_logits(backend, (vocab, k), few);
            let expected = || Ok(top_logits(reference, (vocab, k), few).0);
            checks.check("top_logits", case.clone(), 0.0, &tokens, expected)?;
            let expected = || Ok(top_logits(reference, (vocab, k), few).1);
            checks.check("top_logits", format!("{case}: ln Σ exp"), SUMS, &sums, expected)?;
        }
    }
    for broken in [f32::NAN, f32::INFINITY] {
        if !part.takes_next() {
            continue;
        }
        let case = format!("{broken} is no logit");
        let unknown = log_sum_exp_of(backend, broken).is_nan();
        let found = vec![f32::from(u8::from(unknown))];
        checks.check("top_logits", case, 0.0, &found, || Ok(vec![1.0]))?;
    }
    projections(backend, part, outcomes)
}

/// Matrices of every type and format, with few rows and many.
fn linears<B: Backend>(
    backend: &B,
    reference: &Cpu,
    part: &mut Part,
    checks: &mut Checks<'_>,
) -> Result<(), KernelError> {
    for (l, layout) in [MatrixLayout::OutIn, MatrixLayout::InOut].into_iter().enumerate() {
        for (d, dtype) in DTYPES.into_iter().enumerate() {
            // Parts of one width with a tail, several of different widths, enough to split, and
            // inputs that no cache takes at once.
            for (inputs, parts) in [
                (1, vec![1]),
                (7, vec![5, 3]),
                (64, vec![64, 40, 32]),
                (100, vec![131]),
                (259, vec![260, 131]),
                (1096, vec![35]),
            ] {
                for format in FORMATS {
                    if !part.takes_next() {
                        continue;
                    }
                    // Loaded once for all rows: quantising takes longer than multiplying.
                    let spec = (layout, (dtype, format), inputs, parts.as_slice());
                    let inputs_as = Inputs::of(backend, (dtype, format));
                    let found = load(backend, spec)?;
                    let mut loaded = None;
                    for (r, rows) in ROWS.into_iter().enumerate() {
                        for (s, store) in STORES.into_iter().enumerate() {
                            // Codes are the same from every type: each is stored one way.
                            if format != WeightFormat::Stored && (l + d + r + s) % 2 == 0 {
                                continue;
                            }
                            let case = format!(
                                "{layout:?} {dtype} as {format:?} [{rows}, {inputs}] to {parts:?} \
                                 {store:?}{inputs_as}"
                            );
                            let found = linear(backend, &found, rows, store, Inputs::AsTheyAre);
                            checks.check("linear", case, SUMS, &found, || {
                                let layer = match &mut loaded {
                                    Some(layer) => layer,
                                    none => none.insert(load(reference, spec)?),
                                };
                                Ok(linear(reference, layer, rows, store, inputs_as))
                            })?;
                        }
                    }
                }
            }
        }
    }
    for (dtype, rows) in DTYPES.into_iter().flat_map(|dtype| MANY_ROWS.map(|rows| (dtype, rows))) {
        for (inputs, parts) in [(72, vec![67]), (256, vec![40, 24]), (1100, vec![33])] {
            if !part.takes_next() {
                continue;
            }
            let spec = (MatrixLayout::OutIn, (dtype, WeightFormat::Stored), inputs, &parts[..]);
            let inputs_as = Inputs::of(backend, spec.1);
            let case = format!("{dtype} [{rows}, {inputs}] to {parts:?}{inputs_as}");
            let found = linear(backend, &load(backend, spec)?, rows, Store::Add, Inputs::AsTheyAre);
            checks.check("linear", case, SUMS, &found, || {
                Ok(linear(reference, &load(reference, spec)?, rows, Store::Add, inputs_as))
            })?;
        }
    }
    Ok(())
}

/// What the reference multiplies by: a backend that rounds is right if it gives the exact product
/// of what it has rounded.
#[derive(Clone, Copy, PartialEq)]
enum Inputs {
    AsTheyAre,
    RoundedToBf16,
}

impl Inputs {
    fn of<B: Backend>(backend: &B, weights: (DType, WeightFormat)) -> Self {
        let rounded = backend.rounds_inputs() && weights == (DType::Bf16, WeightFormat::Stored);
        if rounded { Self::RoundedToBf16 } else { Self::AsTheyAre }
    }
}

impl fmt::Display for Inputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::RoundedToBf16 { ", inputs rounded" } else { "" })
    }
}

/// Compares what a backend gives with what the reference gave, or gives now.
struct Checks<'a> {
    expected: &'a mut HashMap<String, Vec<f32>>,
    outcomes: &'a mut Vec<CaseOutcome>,
}

impl Checks<'_> {
    fn check(
        &mut self,
        op: &'static str,
        case: String,
        tolerance: f32,
        found: &[f32],
        expected: impl FnOnce() -> Result<Vec<f32>, KernelError>,
    ) -> Result<(), KernelError> {
        let expected = known(self.expected, format!("{op} {case}"), expected)?;
        let max_error = max_error(found, expected);
        self.outcomes.push(CaseOutcome { op, case, max_error, tolerance });
        Ok(())
    }
}

/// A projection is its operations one after the other, to the bit: each of them has cases of its own.
fn projections<B: Backend>(
    backend: &B,
    part: &mut Part,
    outcomes: &mut Vec<CaseOutcome>,
) -> Result<(), KernelError> {
    // Of the type that is multiplied in a way of its own, if there is one.
    let dtype = if backend.rounds_inputs() { DType::Bf16 } else { DType::F16 };
    for format in FORMATS {
        // Blocks of quantised outputs that end between the halves of a gate, parts that differ,
        // little work, and enough to be split among threads by few wide rows and by many.
        for (inputs, parts, rows) in [
            (131, vec![160, 160], vec![1, 3]),
            (40, vec![21, 21], vec![1, 35]),
            (24, vec![5, 27], vec![3, 2_100]),
            (16, vec![160, 160], vec![220]),
            (8, vec![12_016, 12_016], vec![3]),
        ] {
            if part.takes_next() {
                projections_of(backend, (dtype, format), (inputs, &parts), &rows, outcomes)?;
            }
        }
    }
    // Rows that a device normalises in each block, by the number that share a pass over weights.
    for dtype in DTYPES {
        if part.takes_next() {
            let weights = (dtype, WeightFormat::Stored);
            projections_of(backend, weights, (1096, &[101, 101]), &[1, 2, 3, 8], outcomes)?;
        }
    }
    Ok(())
}

/// Projections through one matrix.
fn projections_of<B: Backend>(
    backend: &B,
    (dtype, format): (DType, WeightFormat),
    (inputs, parts): (usize, &[usize]),
    rows: &[usize],
    outcomes: &mut Vec<CaseOutcome>,
) -> Result<(), KernelError> {
    let layer = load(backend, (MatrixLayout::OutIn, (dtype, format), inputs, parts))?;
    for function in [None, Some((Activation::GeluTanh, false)), Some((Activation::Silu, true))] {
        for &rows in rows {
            let kind = if rows == 3 { NormKind::Layer } else { NormKind::Rms };
            let case = format!(
                "{kind:?} {dtype} as {format:?} [{rows}, {inputs}] to {parts:?}, {function:?}"
            );
            let (found, expected) = project(backend, &layer, kind, rows, function)?;
            let max_error = max_error(&found, &expected);
            outcomes.push(CaseOutcome { op: "project", case, max_error, tolerance: 0.0 });
        }
    }
    Ok(())
}

/// A projection, and its operations one after the other.
fn project<B: Backend>(
    backend: &B,
    layer: &Layer<B>,
    kind: NormKind,
    rows: usize,
    function: Option<(Activation, bool)>,
) -> Result<(Vec<f32>, Vec<f32>), KernelError> {
    let mut numbers = layer.numbers.clone();
    let x = upload(backend, &numbers.take(rows * layer.inputs), layer.inputs);
    let weight = backend.load_vector(&numbers.tensor(DType::F32, &[layer.inputs])?)?;
    let shift = backend.load_vector(&numbers.tensor(DType::F32, &[layer.inputs])?)?;
    let bias = (kind == NormKind::Layer).then_some(&shift);
    let (mut normed, mut product) = (backend.tensor(layer.inputs), backend.tensor(layer.outputs));
    let halved = function.is_some_and(|(_, gated)| gated);
    let width = if halved { layer.outputs / 2 } else { layer.outputs };
    let both = [project_step_by_step::<B>, B::project].map(|project| {
        let mut out = backend.tensor(width);
        let (x, weight, out_of_norm) = (&x, &weight, &mut normed);
        let activate = function.map(|(activation, gated)| ProjectActivation {
            activation,
            gated,
            product: &mut product,
        });
        let norm = NormArgs { kind, x, weight, bias, epsilon: 1e-5, out: out_of_norm };
        project(backend, ProjectArgs { norm, linear: &layer.linear, activate, out: &mut out });
        values(backend, &out)
    });
    let [expected, found] = both;
    Ok((found, expected))
}

fn upload<B: Backend>(backend: &B, numbers: &[f32], columns: usize) -> B::Tensor {
    let mut tensor = backend.tensor(columns);
    backend.upload(numbers, &mut tensor);
    tensor
}

fn embed<B: Backend>(
    backend: &B,
    (dtype, format, hidden): (DType, WeightFormat, usize),
    store: Store,
) -> Result<Vec<f32>, KernelError> {
    let mut numbers = Numbers::new(1);
    let weight = numbers.tensor(dtype, &[9, hidden])?;
    let parts = vec![LinearPart { weight, bias: None }];
    let table = backend.load_linear(LinearSpec { parts, layout: MatrixLayout::OutIn, format })?;
    let mut out = upload(backend, &numbers.take(5 * hidden), hidden);
    backend.embed(EmbedArgs { table: &table, ids: &[8, 0, 3, 3, 1], store, out: &mut out });
    Ok(values(backend, &out))
}

fn norm<B: Backend>(
    backend: &B,
    kind: NormKind,
    (rows, hidden): (usize, usize),
    bias: bool,
) -> Result<Vec<f32>, KernelError> {
    let mut numbers = Numbers::new(2);
    let weight = backend.load_vector(&numbers.tensor(DType::F32, &[hidden])?)?;
    let shift = numbers.tensor(DType::Bf16, &[hidden])?;
    let shift = bias.then(|| backend.load_vector(&shift)).transpose()?;
    // Off centre, as residual streams are.
    let x: Vec<f32> = numbers.take(rows * hidden).into_iter().map(|x| 0.5 + 3.0 * x).collect();
    let (x, mut out) = (upload(backend, &x, hidden), backend.tensor(hidden));
    let (bias, epsilon) = (shift.as_ref(), 1e-5);
    backend.norm(NormArgs { kind, x: &x, weight: &weight, bias, epsilon, out: &mut out });
    Ok(values(backend, &out))
}

/// A linear layer of a case, and the numbers that its rows are drawn from.
struct Layer<B: Backend> {
    linear: B::Linear,
    inputs: usize,
    outputs: usize,
    numbers: Numbers,
}

fn load<B: Backend>(
    backend: &B,
    (layout, (dtype, format), inputs, outputs): (
        MatrixLayout,
        (DType, WeightFormat),
        usize,
        &[usize],
    ),
) -> Result<Layer<B>, KernelError> {
    let mut numbers = Numbers::new(3);
    let parts = outputs
        .iter()
        .enumerate()
        .map(|(i, &n)| {
            let shape = match layout {
                MatrixLayout::OutIn => [n, inputs],
                MatrixLayout::InOut => [inputs, n],
            };
            let weight = numbers.tensor(dtype, &shape)?;
            let bias = numbers.tensor(dtype, &[n])?;
            Ok(LinearPart { weight, bias: (i % 2 == 0).then_some(bias) })
        })
        .collect::<Result<_, KernelError>>()?;
    let linear = backend.load_linear(LinearSpec { parts, layout, format })?;
    Ok(Layer { linear, inputs, outputs: outputs.iter().sum(), numbers })
}

fn linear<B: Backend>(
    backend: &B,
    layer: &Layer<B>,
    rows: usize,
    store: Store,
    inputs: Inputs,
) -> Vec<f32> {
    let mut numbers = layer.numbers.clone();
    let mut x = numbers.take(rows * layer.inputs);
    if inputs == Inputs::RoundedToBf16 {
        x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }
    let x = upload(backend, &x, layer.inputs);
    let mut out = upload(backend, &numbers.take(rows * layer.outputs), layer.outputs);
    backend.linear(LinearArgs { x: &x, linear: &layer.linear, store, out: &mut out });
    values(backend, &out)
}

fn rotary<B: Backend>(backend: &B, heads: Heads, rows: usize) -> (Vec<f32>, Vec<f32>) {
    let mut numbers = Numbers::new(4);
    let half = heads.head_dim / 2;
    let inverse_frequencies: Vec<f32> =
        (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
    let positions: Vec<u32> = (0..rows as u32).map(|row| row * row * 397).collect();
    let mut angles = backend.tensor(heads.head_dim);
    backend.rotary_angles(RotaryAnglesArgs {
        positions: &positions,
        inverse_frequencies: &inverse_frequencies,
        out: &mut angles,
    });
    let width = heads.qkv_width();
    let mut qkv = upload(backend, &numbers.take(rows * width), width);
    backend.rotary(RotaryArgs { angles: &angles, heads, qkv: &mut qkv });
    (values(backend, &angles), values(backend, &qkv))
}

fn activate<B: Backend>(
    backend: &B,
    activation: Activation,
    gated: bool,
    (rows, width): (usize, usize),
) -> Vec<f32> {
    let mut numbers = Numbers::new(5);
    let columns = if gated { 2 * width } else { width };
    // Wide enough to reach both ends of every function.
    let x: Vec<f32> = numbers.take(rows * columns).into_iter().map(|x| 12.0 * x).collect();
    let (x, mut out) = (upload(backend, &x, columns), backend.tensor(width));
    backend.activate(ActivateArgs { activation, gated, x: &x, out: &mut out });
    values(backend, &out)
}

/// Tokens, then logits, of each row; and `ln Σ exp` of each.
fn top_logits<B: Backend>(
    backend: &B,
    (vocab, k): (usize, usize),
    few: bool,
) -> (Vec<f32>, Vec<f32>) {
    let mut numbers = Numbers::new(7).take(4 * vocab);
    // Scores of a few kinds only: every choice is among equals, -0 and 0 included.
    numbers.iter_mut().for_each(|x| *x = if few { (*x * 2.0).round() } else { 20.0 * *x });
    let logits = upload(backend, &numbers, vocab);
    let mut top = TopLogits::default();
    backend.top_logits(TopLogitsArgs { logits: &logits, rows: &[3, 0, 2], k, out: &mut top });
    let rows = || (0..top.rows()).map(|row| top.row(row));
    // Token ids are far below what an f32 holds exactly.
    let tokens = rows().flat_map(|row| row.tokens).flat_map(|&(id, logit)| [id as f32, logit]);
    (tokens.collect(), rows().map(|row| row.log_sum_exp as f32).collect())
}

/// `ln Σ exp` of logits of which one is `broken`.
fn log_sum_exp_of<B: Backend>(backend: &B, broken: f32) -> f64 {
    let mut numbers = Numbers::new(8).take(300);
    numbers[270] = broken;
    let logits = upload(backend, &numbers, 300);
    let mut top = TopLogits::default();
    backend.top_logits(TopLogitsArgs { logits: &logits, rows: &[0], k: 2, out: &mut top });
    top.row(0).log_sum_exp
}

fn gather<B: Backend>(backend: &B, columns: usize) -> Vec<f32> {
    let x = upload(backend, &Numbers::new(6).take(6 * columns), columns);
    let mut out = backend.tensor(columns);
    backend.gather_rows(&x, &[5, 0, 0, 2], &mut out);
    values(backend, &out)
}
