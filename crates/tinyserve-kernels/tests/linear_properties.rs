//! What a matrix gives: the sums that it says, and to a row of a batch, to the last bit, what it
//! gives to that row alone.

mod common;

use common::{Numbers, bits, every_backend};
use half::{bf16, f16};
use proptest::prelude::*;
use tinyserve_kernels::{
    Backend, Cpu, CpuOptions, CpuPath, DType, HostTensor, LinearArgs, LinearPart, LinearSpec,
    MatrixLayout, Store, WeightFormat,
};

fn tensor(numbers: &mut Numbers, dtype: DType, shape: &[usize]) -> HostTensor {
    let values = numbers.numbers(shape.iter().product());
    let bytes: Vec<u8> = match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
    };
    HostTensor::new("w", bytes.into(), dtype, shape).unwrap()
}

fn linear(cpu: &Cpu, spec: &LinearSpec, x: &[f32], before: &[f32], store: Store) -> Vec<f32> {
    let linear = cpu.load_linear(spec.clone()).unwrap();
    let (mut rows, mut out) = (cpu.tensor(linear.inputs()), cpu.tensor(linear.outputs()));
    cpu.upload(x, &mut rows);
    cpu.upload(before, &mut out);
    cpu.linear(LinearArgs { x: &rows, linear: &linear, store, out: &mut out });
    out.values().to_vec()
}

/// `x·w + b`, for each row, output after output, in f64; and the sum of what was added up, with
/// every sign positive, which is what rounding is relative to.
fn sums(spec: &LinearSpec, x: &[f32]) -> Vec<(f64, f64)> {
    let mut sums = Vec::new();
    for part in &spec.parts {
        let w = part.weight.to_f32(0..part.weight.len());
        let &[first, second] = part.weight.shape() else { unreachable!("matrices") };
        let (outputs, out_stride, in_stride) = match spec.layout {
            MatrixLayout::OutIn => (first, second, 1),
            MatrixLayout::InOut => (second, 1, second),
        };
        for output in 0..outputs {
            let bias = part.bias.as_ref().map_or(0.0, |b| b.to_f32(output..output + 1)[0]);
            let terms = x
                .iter()
                .enumerate()
                .map(|(i, &x)| f64::from(x) * f64::from(w[output * out_stride + i * in_stride]))
                .chain([f64::from(bias)]);
            sums.push((terms.clone().sum(), terms.map(f64::abs).sum()));
        }
    }
    sums
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn outputs_are_the_sums_of_products(
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        layout in prop::sample::select(vec![MatrixLayout::OutIn, MatrixLayout::InOut]),
        store in prop::sample::select(vec![Store::Overwrite, Store::Add]),
        inputs in 1usize..300,
        outputs in prop::collection::vec((1usize..150, any::<bool>()), 1..4),
        rows in 1usize..20,
        threads in 1usize..4,
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let parts = outputs
            .iter()
            .map(|&(n, bias)| {
                let shape = match layout {
                    MatrixLayout::OutIn => [n, inputs],
                    MatrixLayout::InOut => [inputs, n],
                };
                let weight = tensor(&mut numbers, dtype, &shape);
                LinearPart { weight, bias: bias.then(|| tensor(&mut numbers, dtype, &[n])) }
            })
            .collect();
        let spec = LinearSpec { parts, layout, format: WeightFormat::Stored };
        let width: usize = outputs.iter().map(|(n, _)| n).sum();
        let (x, before) = (numbers.numbers(rows * inputs), numbers.numbers(rows * width));
        let rounded: Vec<f32> = x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        let [exact, of_rounded] = [&x, &rounded].map(|x| -> Vec<(f64, f64)> {
            x.chunks_exact(inputs).flat_map(|x| sums(&spec, x)).collect()
        });
        for cpu in every_backend(threads) {
            let rounds = cpu.path().rounds_inputs() && dtype == DType::Bf16;
            let expected = if rounds { &of_rounded } else { &exact };
            let found = linear(&cpu, &spec, &x, &before, store);
            prop_assert_eq!(found.len(), expected.len());
            for ((&found, &before), &(sum, size)) in found.iter().zip(&before).zip(expected) {
                let before = if store == Store::Add { f64::from(before) } else { 0.0 };
                // A chain of n additions is off by n half-units of its size at most, 2e-5 here;
                // their signs are mixed, so ten of them are plenty.
                let tolerance = 6e-7 * (size + before.abs());
                let error = (f64::from(found) - (sum + before)).abs();
                prop_assert!(error <= tolerance, "{}: {found}, off by {error:e}", cpu.path());
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch(
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        format in prop::sample::select(vec![
            WeightFormat::Stored,
            WeightFormat::Int8,
            WeightFormat::Int4,
        ]),
        layout in prop::sample::select(vec![MatrixLayout::OutIn, MatrixLayout::InOut]),
        store in prop::sample::select(vec![Store::Overwrite, Store::Add]),
        inputs in 1usize..150,
        outputs in prop::collection::vec(1usize..140, 1..4),
        rows in 1usize..16,
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let parts = outputs
            .iter()
            .map(|&n| {
                let shape = match layout {
                    MatrixLayout::OutIn => [n, inputs],
                    MatrixLayout::InOut => [inputs, n],
                };
                let weight = tensor(&mut numbers, dtype, &shape);
                let bias = Some(tensor(&mut numbers, dtype, &[n]));
                LinearPart { weight, bias }
            })
            .collect();
        let spec = LinearSpec { parts, layout, format };
        let width: usize = outputs.iter().sum();
        let x = numbers.numbers(rows * inputs);
        let before = numbers.numbers(rows * width);
        // Strips end elsewhere with more threads: that changes nothing either.
        for (cpu, alone) in every_backend(3).into_iter().zip(every_backend(1)) {
            let batch = linear(&cpu, &spec, &x, &before, store);
            for (row, found) in batch.chunks_exact(width).enumerate() {
                let (x, before) =
                    (&x[row * inputs..][..inputs], &before[row * width..][..width]);
                let expected = linear(&alone, &spec, x, before, store);
                prop_assert_eq!(bits(found), bits(&expected), "{} row {}", cpu.path(), row);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn a_row_of_a_long_prompt_is_what_it_is_alone(
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        format in prop::sample::select(vec![
            WeightFormat::Stored,
            WeightFormat::Int8,
            WeightFormat::Int4,
        ]),
        store in prop::sample::select(vec![Store::Overwrite, Store::Add]),
        inputs in prop::sample::select(vec![1000usize, 1024, 1025, 1039, 2048, 2500]),
        outputs in prop::sample::select(vec![1usize, 3, 64, 67, 130]),
        rows in 1usize..300,
        seed in any::<u64>(),
    ) {
        // Quantising takes longer than multiplying here.
        let quantised = format != WeightFormat::Stored;
        let (inputs, outputs) =
            if quantised { (inputs.min(1039), outputs.min(67)) } else { (inputs, outputs) };
        let mut numbers = Numbers(seed);
        let weight = tensor(&mut numbers, dtype, &[outputs, inputs]);
        let bias = Some(tensor(&mut numbers, dtype, &[outputs]));
        let parts = vec![LinearPart { weight, bias }];
        let spec = LinearSpec { parts, layout: MatrixLayout::OutIn, format };
        let x = numbers.numbers(rows * inputs);
        let before = numbers.numbers(rows * outputs);
        let paths = CpuPath::available().filter(|&path| path != CpuPath::Scalar);
        for path in paths {
            let cpu = Cpu::new(CpuOptions { threads: Some(2), path: Some(path) }).unwrap();
            let batch = linear(&cpu, &spec, &x, &before, store);
            for row in [0, rows / 2, rows - 1] {
                let alone = linear(
                    &cpu, &spec, &x[row * inputs..][..inputs], &before[row * outputs..][..outputs], store,
                );
                let found = &batch[row * outputs..][..outputs];
                prop_assert_eq!(bits(found), bits(&alone), "{} row {} of {}", path, row, rows);
            }
        }
    }
}
