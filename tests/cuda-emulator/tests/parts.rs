//! Rows that are read in more parts than one launch leaves are attended to in several launches.

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, Attention, Backend, Cuda, CudaTensor, Heads,
};
use tinyserve_kv::{KvFormat, KvLayout, KvShape, PagePool, PageTable, Slot};

/// Queries that leave no room for a second row in a pass.
const HEADS: Heads = Heads { q_heads: 8, kv_heads: 1, head_dim: 8 };
/// Tokens before the rows that attend: four parts of 512, nearly.
const BEFORE: usize = 1536;
/// Rows of more than 2048 parts together.
const ROWS: usize = 520;

#[test]
fn rows_give_together_what_they_give_in_smaller_steps() {
    if ready().is_none() {
        return;
    }
    let cuda = Cuda::new(0).unwrap();
    let Heads { kv_heads, head_dim, .. } = HEADS;
    let shape = KvShape { layers: 1, kv_heads, head_dim, page_size: 64, format: KvFormat::F16 };
    let layout = KvLayout::new(shape).unwrap();
    let tokens = BEFORE + ROWS;
    let mut pool = PagePool::new(layout.pages_for(tokens)).unwrap();
    let mut pages = cuda.allocate_pages(layout, pool.capacity()).unwrap();
    let mut table = PageTable::new(64);
    table.extend(&mut pool, tokens).unwrap();
    let slots: Vec<Slot> = (0..tokens).map(|token| table.slot(token)).collect();
    let mut number = 1u32;
    let rows: Vec<f32> = (0..tokens * HEADS.qkv_width())
        .map(|_| {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (number >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let upload = |rows: &[f32]| {
        let mut tensor = cuda.tensor(HEADS.qkv_width());
        cuda.upload(rows, &mut tensor);
        tensor
    };
    let qkv = upload(&rows);
    cuda.append_kv(AppendKvArgs {
        layer: 0,
        heads: HEADS,
        qkv: &qkv,
        slots: &slots,
        pages: &mut pages,
    });
    let attend = |qkv: &CudaTensor, first_position: usize, n: usize| {
        let sequence = AttendSequence {
            rows: 0..n,
            first_position,
            pages: table.pages(),
            attention: Attention::Dense,
        };
        let (mut out, mut values) = (cuda.tensor(HEADS.q_columns().len()), Vec::new());
        let attended = cuda.attend(AttendArgs {
            layer: 0,
            heads: HEADS,
            qkv,
            scale: 0.35,
            sequences: &[sequence],
            pages: &pages,
            measure_recall: false,
            page_lists: None,
            sequence_stats: None,
            observe: None,
            out: &mut out,
        });
        attended.unwrap();
        cuda.download(&out, &mut values);
        cuda.check().unwrap();
        values
    };
    let width = HEADS.qkv_width();
    let together = attend(&upload(&rows[BEFORE * width..]), BEFORE, ROWS);
    assert!(together.iter().all(|x| x.is_finite()));
    let half = ROWS / 2;
    let apart = [BEFORE, BEFORE + half]
        .map(|first| attend(&upload(&rows[first * width..(first + half) * width]), first, half));
    assert_eq!(together, apart.concat());
}
