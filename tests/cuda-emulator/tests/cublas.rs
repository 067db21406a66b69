//! Prompts are multiplied by cuBLAS where it is installed, and by our own kernels elsewhere.

use half::{bf16, f16};
use tinyserve_cuda_emulator::{install_cublas, ready};
use tinyserve_kernels::{
    Backend, Cpu, Cuda, CudaError, DType, EmbedArgs, HostTensor, KernelError, LinearArgs,
    LinearPart, LinearSpec, MatrixLayout, Store, WeightFormat, cublas_version,
};

/// More than a batch of decode steps has, and more than are multiplied at once.
const ROWS: usize = 270;
const INPUTS: usize = 72;
const OUTPUTS: [usize; 2] = [40, 27];

/// Numbers in −1 to 1 from a seed (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    fn tensor(&mut self, dtype: DType, shape: &[usize]) -> HostTensor {
        let values = (0..shape.iter().product()).map(|_| self.next());
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            DType::F16 => values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
            DType::Bf16 => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        HostTensor::new("a matrix", bytes.into(), dtype, shape).unwrap()
    }
}

/// Rows of every size that a float has, of which halves hold few.
fn rows() -> Vec<f32> {
    let mut numbers = Numbers(2);
    let size = |row: usize| 10f32.powi((row % 25) as i32 - 15);
    (0..ROWS * INPUTS).map(|i| size(i / INPUTS) * numbers.next()).collect()
}

/// A product, in columns side by side, added to what is there.
fn product<B: Backend>(backend: &B, dtype: DType) -> Result<Vec<f32>, KernelError> {
    let mut numbers = Numbers(1);
    let part = |n: usize| LinearPart {
        weight: numbers.tensor(dtype, &[n, INPUTS]),
        bias: Some(numbers.tensor(DType::F32, &[n])),
    };
    let parts = OUTPUTS.map(part).to_vec();
    let (layout, format) = (MatrixLayout::OutIn, WeightFormat::Stored);
    let linear = backend.load_linear(LinearSpec { parts, layout, format }).unwrap();
    let outputs = OUTPUTS.iter().sum();
    let (mut x, mut out) = (backend.tensor(INPUTS), backend.tensor(outputs));
    backend.upload(&rows(), &mut x);
    backend.upload(&vec![0.25; ROWS * outputs], &mut out);
    // A step of few rows begins, whose launches are kept back.
    let table = LinearPart { weight: numbers.tensor(dtype, &[4, INPUTS]), bias: None };
    let spec = LinearSpec { parts: vec![table], layout, format };
    let table = backend.load_linear(spec).unwrap();
    let mut row = backend.tensor(INPUTS);
    let (store, out_row) = (Store::Overwrite, &mut row);
    backend.embed(EmbedArgs { table: &table, ids: &[3], store, out: out_row });
    backend.linear(LinearArgs { x: &x, linear: &linear, store: Store::Add, out: &mut out });
    let mut values = Vec::new();
    backend.download(&out, &mut values);
    backend.check()?;
    Ok(values)
}

fn compare(cuda: &Cuda, dtype: DType) {
    let (found, expected) =
        (product(cuda, dtype).unwrap(), product(&Cpu::reference(), dtype).unwrap());
    let outputs = OUTPUTS.iter().sum::<usize>();
    for (row, (found, expected)) in found.chunks(outputs).zip(expected.chunks(outputs)).enumerate()
    {
        let largest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
        for (found, expected) in found.iter().zip(expected) {
            let error = (found - expected).abs() / largest;
            assert!(error < 3e-6, "{dtype}, row {row}: {found} for {expected}, error {error:e}");
        }
    }
}

#[test]
fn products_are_the_same_with_and_without_it() {
    let Some(ready) = ready() else { return };
    let types = [DType::F32, DType::F16, DType::Bf16];
    let Some(emulator) = ready.emulator else {
        for dtype in types {
            compare(&Cuda::new(0).unwrap(), dtype);
            compare(&Cuda::new(0).unwrap().use_cublas(false), dtype);
        }
        return;
    };
    match cublas_version() {
        Err(CudaError::NoCublas) => {}
        other => {
            eprintln!("skipped: there is a cuBLAS that knows nothing of the emulator: {other:?}");
            return;
        }
    }
    let sentence = CudaError::NoCublas.to_string();
    assert!(sentence.contains("libcublas.so") && sentence.contains("our own"), "{sentence}");
    for dtype in types {
        compare(&Cuda::new(0).unwrap(), dtype);
    }
    let cublas = install_cublas().unwrap();
    assert_eq!(cublas_version().unwrap(), "12.0.0");
    ready.orders(|_| {
        for (dtype, parts) in types.into_iter().zip([1, 2, 3]) {
            let before = cublas.products();
            compare(&Cuda::new(0).unwrap().use_cublas(false), dtype);
            assert_eq!(cublas.products(), before, "{dtype}");
            compare(&Cuda::new(0).unwrap(), dtype);
            // Rows in two pieces; the parts of one type lie side by side.
            assert_eq!(cublas.products(), before + 2 * parts, "{dtype}");
        }
    });
    // A kernel on the way that fails is named.
    emulator.fail(c"store_products");
    let failed = product(&Cuda::new(0).unwrap(), DType::F16);
    emulator.fail(c"");
    let sentence = failed.unwrap_err().to_string();
    assert!(sentence.contains("kernel store_products failed"), "{sentence}");
}
