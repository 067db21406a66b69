//! A row of a batch gets from a matrix, to the last bit, what it gets alone.

mod common;

use common::{Numbers, backends, bits};
use half::{bf16, f16};
use proptest::prelude::*;
use tinyserve_kernels::{
    Backend, Cpu, DType, HostTensor, LinearArgs, LinearPart, LinearSpec, MatrixLayout, Store,
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_row_does_not_depend_on_its_batch(
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
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
        let spec = LinearSpec { parts, layout };
        let width: usize = outputs.iter().sum();
        let x = numbers.numbers(rows * inputs);
        let before = numbers.numbers(rows * width);
        // Strips end elsewhere with more threads: that changes nothing either.
        for (cpu, alone) in backends(3).into_iter().zip(backends(1)) {
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
