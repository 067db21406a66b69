//! A value that is no number reaches the rows that see its token, and no other.

mod common;

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Attention, Backend, Cpu, Cuda, Heads};
use tinyserve_kv::KvFormat;

use common::sequence::{Sequence, Step, layout, numbers};

const ROWS: usize = 90;
/// Tokens with a value that is no number, one of a channel each: apart, in one chunk, and the last.
const BROKEN: [(usize, usize, f32); 4] =
    [(20, 3, f32::NAN), (21, 40, f32::INFINITY), (70, 17, f32::NEG_INFINITY), (89, 0, f32::NAN)];

/// What a prompt's rows attend to.
fn attended<B: Backend>(backend: &B, heads: Heads, format: KvFormat) -> Vec<f32> {
    let Heads { q_heads, kv_heads, head_dim } = heads;
    let mut rows = numbers(ROWS * heads.qkv_width());
    for (token, channel, value) in BROKEN {
        rows[token * heads.qkv_width() + (q_heads + kv_heads) * head_dim + channel] = value;
    }
    let mut sequence = Sequence::new(backend, heads, layout(heads, 16, format), ROWS).unwrap();
    sequence.append(backend, &rows);
    let step = Step {
        rows: &rows,
        first_position: 0,
        attention: Attention::Dense,
        scale: 0.125,
        page_lists: None,
    };
    sequence.attend(backend, step).unwrap()
}

#[test]
fn what_is_no_number_reaches_the_rows_that_see_it() {
    if ready().is_none() {
        return;
    }
    let (cuda, cpu) = (Cuda::new(0).unwrap(), Cpu::reference());
    for (q_heads, head_dim) in [(1, 64), (2, 128), (4, 32)] {
        let heads = Heads { q_heads, kv_heads: 1, head_dim };
        for format in [KvFormat::F16, KvFormat::Bf16] {
            let found = attended(&cuda, heads, format);
            let expected = attended(&cpu, heads, format);
            assert!(expected[..BROKEN[0].0 * q_heads * head_dim].iter().all(|x| x.is_finite()));
            assert!(expected.iter().any(|x| x.is_nan()));
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let row = i / (q_heads * head_dim);
                let same = if expected.is_finite() {
                    (found - expected).abs() < 1e-5
                } else {
                    // Infinity less infinity, or times a part that is 0, is no number either.
                    !found.is_finite()
                };
                assert!(same, "{format}, {heads:?}, row {row}, {i}: {found} for {expected}");
            }
        }
    }
}
