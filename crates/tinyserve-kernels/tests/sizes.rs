//! Every format at every size of pages and heads that models and users ask for.

mod common;

use common::{Cache, Numbers, backends};
use tinyserve_kernels::{Attention, Heads};
use tinyserve_kv::{Budget, KvFormat, KvLayout, KvShape, SelectionPolicy};

/// Of models: OpenAI's, Llama's, Phi's, Gemma's; and odd ones beside them.
const HEAD_DIMS: [usize; 8] = [32, 37, 64, 80, 96, 128, 250, 256];
const PAGE_SIZES: [usize; 6] = [8, 16, 24, 32, 64, 128];

#[test]
fn pages_of_8_to_128_tokens_and_heads_of_32_to_256_channels_are_read_in_every_format() {
    let mut numbers = Numbers(11);
    let policy = SelectionPolicy {
        budget: Budget::Ratio(0.5),
        sink_pages: 1,
        recent_pages: 1,
        dense_layers: 0,
        min_context: 0,
        ..SelectionPolicy::default()
    };
    let paths = backends(1);
    for (i, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        for (j, page_size) in PAGE_SIZES.into_iter().enumerate() {
            let heads = Heads { q_heads: [2, 8, 4][(i + 2 * j) % 3], kv_heads: 1, head_dim };
            // Two sealed pages, and an open one that is nearly empty, half full or full.
            let tokens = 2 * page_size + [1, page_size / 2, page_size][(i + j) % 3];
            let qkv = numbers.numbers(tokens * heads.qkv_width());
            let last = &qkv[(tokens - 1) * heads.qkv_width()..];
            for format in KvFormat::ALL {
                let shape = KvShape { layers: 2, kv_heads: 1, head_dim, page_size, format };
                let layout = KvLayout::new(shape).unwrap();
                for cpu in &paths {
                    let what = format!("{format}, {head_dim}, {page_size}, {}", cpu.path());
                    let mut cache = Cache::new(heads, layout, &[tokens]);
                    cache.append(cpu, 0, 0, &qkv);
                    let step = [(0, tokens - 1, 1, Attention::Dense)];
                    let (out, _) = cache.attend(cpu, last, &step, false).unwrap();
                    for (head, found) in out.chunks_exact(head_dim).enumerate() {
                        let query = &last[head * head_dim..(head + 1) * head_dim];
                        let expected = cache.masked((0, tokens, 0), query, |_| true);
                        for (&found, expected) in found.iter().zip(expected) {
                            let error = (f64::from(found) - expected).abs();
                            assert!(error <= 1e-5, "{what}: {found}, not {expected}");
                        }
                    }
                    let step = [(0, tokens - 1, 1, Attention::Policy(&policy))];
                    let (_, stats) = cache.attend(cpu, last, &step, false).unwrap();
                    assert_eq!((stats.pages_read, stats.pages_total), (2, 3), "{what}");
                }
            }
        }
    }
}
