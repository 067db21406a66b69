//! A value that is no number reaches the rows that see its token, and no other.

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, Attention, Backend, Cpu, Cuda, Heads,
};
use tinyserve_kv::{KvFormat, KvLayout, KvShape, PagePool, PageTable, Slot};

const ROWS: usize = 90;
/// Tokens with a value that is no number, one of a channel each: apart, in one chunk, and the last.
const BROKEN: [(usize, usize, f32); 4] =
    [(20, 3, f32::NAN), (21, 40, f32::INFINITY), (70, 17, f32::NEG_INFINITY), (89, 0, f32::NAN)];

/// What a prompt's rows attend to.
fn attended<B: Backend>(backend: &B, heads: Heads, format: KvFormat) -> Vec<f32> {
    let Heads { q_heads, kv_heads, head_dim } = heads;
    let shape = KvShape { layers: 1, kv_heads, head_dim, page_size: 16, format };
    let layout = KvLayout::new(shape).unwrap();
    let mut pool = PagePool::new(layout.pages_for(ROWS)).unwrap();
    let mut pages = backend.allocate_pages(layout, pool.capacity()).unwrap();
    let mut table = PageTable::new(16);
    table.extend(&mut pool, ROWS).unwrap();
    let slots: Vec<Slot> = (0..ROWS).map(|token| table.slot(token)).collect();
    let (width, mut number) = (heads.qkv_width(), 1u32);
    let mut rows: Vec<f32> = (0..ROWS * width)
        .map(|_| {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (number >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    for (token, channel, value) in BROKEN {
        rows[token * width + (q_heads + kv_heads) * head_dim + channel] = value;
    }
    let (mut qkv, mut out) = (backend.tensor(width), backend.tensor(heads.q_columns().len()));
    backend.upload(&rows, &mut qkv);
    backend.append_kv(AppendKvArgs {
        layer: 0,
        heads,
        qkv: &qkv,
        slots: &slots,
        pages: &mut pages,
    });
    let sequence = AttendSequence {
        rows: 0..ROWS,
        first_position: 0,
        pages: table.pages(),
        attention: Attention::Dense,
    };
    let attended = backend.attend(AttendArgs {
        layer: 0,
        heads,
        qkv: &qkv,
        scale: 0.125,
        sequences: &[sequence],
        pages: &pages,
        measure_recall: false,
        page_lists: None,
        sequence_stats: None,
        observe: None,
        out: &mut out,
    });
    attended.unwrap();
    let mut values = Vec::new();
    backend.download(&out, &mut values);
    backend.check().unwrap();
    values
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
