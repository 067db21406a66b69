//! Steps that are timed run as others do, and their times are the device's.

use std::time::Duration;

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{
    Backend, Cuda, DType, HostTensor, KernelError, LinearArgs, LinearPart, LinearSpec,
    MatrixLayout, StepTime, Store, WeightFormat,
};

const WIDTH: usize = 8;

/// The products of ones with a matrix of ones, added `times` times in one step; `reads` looks at
/// them in between.
fn products(cuda: &Cuda, times: usize, reads: bool) -> Result<(Vec<f32>, StepTime), KernelError> {
    let bytes: Vec<u8> = [1f32; WIDTH * WIDTH].into_iter().flat_map(f32::to_le_bytes).collect();
    let weight = HostTensor::new("ones", bytes.into(), DType::F32, &[WIDTH, WIDTH])?;
    let parts = vec![LinearPart { weight, bias: None }];
    let (layout, format) = (MatrixLayout::OutIn, WeightFormat::Stored);
    let linear = cuda.load_linear(LinearSpec { parts, layout, format })?;
    let (mut x, mut out, mut values) = (cuda.tensor(WIDTH), cuda.tensor(WIDTH), Vec::new());
    cuda.upload(&[1.0; WIDTH], &mut x);
    cuda.upload(&[0.0; WIDTH], &mut out);
    let ((), time) = cuda.time_step(|| {
        for _ in 0..times {
            let store = Store::Add;
            cuda.linear(LinearArgs { x: &x, linear: &linear, store, out: &mut out });
            if reads {
                cuda.download(&out, &mut values);
            }
        }
        Ok::<_, KernelError>(())
    })?;
    cuda.download(&out, &mut values);
    Ok((values, time))
}

#[test]
fn a_step_that_is_timed_runs_once_and_fails_as_others_do() {
    let Some(ready) = ready() else { return };
    let cuda = Cuda::new(0).unwrap();
    for (times, reads, captures) in [(3, false, 0), (20, false, 1), (20, true, 1)] {
        let (values, time) = products(&cuda, times, reads).unwrap();
        assert_eq!(values, [(times * WIDTH) as f32; WIDTH], "{times} times, {reads}");
        assert!(time.device > Duration::ZERO && time.host > Duration::ZERO, "{time:?}");
        assert_eq!(cuda.captured_steps(), captures, "{times} times, {reads}");
    }
    let Some(emulator) = ready.emulator else { return };
    // Somebody else ends the capture: it is timed all the same.
    emulator.invalidate(1);
    assert_eq!(products(&Cuda::new(0).unwrap(), 20, false).unwrap().0, [160.0; WIDTH]);
    emulator.fail(c"gemv_f32_1");
    let failed = products(&Cuda::new(0).unwrap(), 20, false);
    emulator.fail(c"");
    let sentence = failed.unwrap_err().to_string();
    assert!(sentence.contains("kernel gemv_f32_1 failed in a grid"), "{sentence}");
}
