//! How it is measured, and chosen, whether a decode step's attention is one launch.

mod common;

use std::ffi::CStr;
use std::sync::Mutex;

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Attention, Cuda, CudaDevice, Heads, KernelError, most_fused_bytes};
use tinyserve_kv::{Budget, KvFormat, SelectionPolicy};

use common::sequence::{Sequence, Step, layout};

/// Memory is counted, and kernels fail, for the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const HEADS: Heads = Heads { q_heads: 4, kv_heads: 2, head_dim: 64 };
/// Tokens of the sequence that attends.
const TOKENS: usize = 256;

fn free() -> usize {
    CudaDevice::all().unwrap()[0].free
}

#[test]
fn times_are_in_the_order_of_bytes_and_leave_nothing_behind() {
    let Some(ready) = ready() else { return };
    let _guard = ONE_AT_A_TIME.lock();
    let cuda = Cuda::new(0).unwrap();
    let before = free();
    for format in KvFormat::ALL {
        let times = cuda.time_fused(&layout(HEADS, 64, format), HEADS).unwrap();
        assert!(!times.is_empty() && times.is_sorted_by(|a, b| a.bytes < b.bytes), "{times:?}");
        assert!(times.iter().all(|times| times.fused_ns > 0 && times.split_ns > 0), "{times:?}");
        // Only the last one may be slower: nothing larger is looked at.
        let slower = times.iter().position(|times| times.fused_ns > times.split_ns);
        assert!(slower.is_none_or(|slower| slower + 1 == times.len()), "{format}: {times:?}");
        let most = most_fused_bytes(&times);
        assert!(most == 0 || times.iter().any(|times| times.bytes == most), "{format}: {times:?}");
        if ready.emulator.is_some() {
            assert_eq!(free(), before, "{format}");
        }
    }
    // Neither has a kernel that does all in one.
    let narrow = Heads { head_dim: 6, ..HEADS };
    assert_eq!(cuda.time_fused(&layout(narrow, 64, KvFormat::F16), narrow), Ok(Vec::new()));
    let many = Heads { q_heads: 32, ..HEADS };
    let f16 = layout(HEADS, 64, KvFormat::F16);
    assert_eq!(cuda.time_fused(&f16, many), Ok(Vec::new()));
    let Some(emulator) = ready.emulator else { return };
    emulator.leave_free(Some(16 << 10));
    let refused = cuda.time_fused(&f16, HEADS).unwrap_err().to_string();
    assert!(refused.contains("no memory for a KV cache"), "{refused}");
    emulator.leave_free(None);
    assert_eq!(free(), before);
}

/// A decode step of attention that selects; what it leaves.
fn attend(cuda: &Cuda) -> Result<Vec<f32>, KernelError> {
    let sequence = Sequence::new(cuda, HEADS, layout(HEADS, 16, KvFormat::F16), TOKENS)?;
    let policy = SelectionPolicy {
        budget: Budget::Ratio(0.3),
        dense_layers: 0,
        min_context: 0,
        ..SelectionPolicy::default()
    };
    let step = Step {
        rows: &vec![1.0; HEADS.qkv_width()],
        first_position: TOKENS - 1,
        attention: Attention::Policy(&policy),
        scale: 1.0,
        page_lists: None,
    };
    sequence.attend(cuda, step)
}

#[test]
fn bytes_decide_what_is_launched_unless_the_user_does() {
    let Some(emulator) = ready().and_then(|ready| ready.emulator) else { return };
    let _guard = ONE_AT_A_TIME.lock();
    // A kernel that fails shows that it was launched.
    let launches = |kernel: &CStr, bytes, forced| {
        let cuda = Cuda::new(0).unwrap().use_fused_up_to(bytes).use_fused_kernel(forced);
        attend(&cuda).unwrap();
        emulator.fail(kernel);
        let failed = attend(&cuda);
        emulator.fail(c"");
        match failed {
            Ok(_) => false,
            Err(error) => {
                let name = kernel.to_string_lossy();
                assert!(error.to_string().contains(&format!("kernel {name}")), "{error}");
                true
            }
        }
    };
    // Boxes of 16 pages, and no more keys and values than one part has.
    let bytes = 16 * 2 * HEADS.head_dim * 2;
    for (most, forced, fused) in [
        (Some(0), None, false),
        (Some(bytes - 1), None, false),
        (Some(bytes), None, true),
        (Some(usize::MAX), None, true),
        // The built-in table: a GPU found one launch slower.
        (None, None, false),
        (Some(0), Some(true), true),
        (Some(usize::MAX), Some(false), false),
    ] {
        let case = format!("up to {most:?}, forced {forced:?}");
        assert_eq!(launches(c"fused_decode_f16_64", most, forced), fused, "{case}");
        assert_eq!(launches(c"select_pages", most, forced), !fused, "{case}");
    }
}
