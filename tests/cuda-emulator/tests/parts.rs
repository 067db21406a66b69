//! Rows that are read in more parts than one launch leaves are attended to in several launches.

mod common;

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Attention, Cuda, Heads};
use tinyserve_kv::KvFormat;

use common::sequence::{Sequence, Step, layout, numbers};

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
    let (width, tokens) = (HEADS.qkv_width(), BEFORE + ROWS);
    let rows = numbers(tokens * width);
    let layout = layout(HEADS, 64, KvFormat::F16);
    let mut sequence = Sequence::new(&cuda, HEADS, layout, tokens).unwrap();
    sequence.append(&cuda, &rows);
    let attend = |first_position: usize, n: usize| {
        let step = Step {
            rows: &rows[first_position * width..(first_position + n) * width],
            first_position,
            attention: Attention::Dense,
            scale: 0.35,
            page_lists: None,
        };
        sequence.attend(&cuda, step).unwrap()
    };
    let together = attend(BEFORE, ROWS);
    assert!(together.iter().all(|x| x.is_finite()));
    let half = ROWS / 2;
    let apart = [BEFORE, BEFORE + half].map(|first| attend(first, half));
    assert_eq!(together, apart.concat());
}
