//! Every refusal, word for word: what was found, and what was expected.

// Sizes that a 32-bit usize cannot write down.
#![cfg(target_pointer_width = "64")]

use std::fmt::Debug;

use tinyserve_kv::{
    Budget, HostPages, KvError, KvFormat, KvLayout, KvShape, PagePool, PageTable, SelectionPolicy,
};

const SHAPE: KvShape =
    KvShape { layers: 2, kv_heads: 3, head_dim: 5, page_size: 16, format: KvFormat::F16 };

#[track_caller]
fn check<T: Debug>(outcome: Result<T, KvError>, sentence: &str) {
    assert_eq!(outcome.unwrap_err().to_string(), sentence);
}

#[test]
fn layouts() {
    let zero = KvLayout::new;
    check(zero(KvShape { layers: 0, ..SHAPE }), "layers is 0, expected at least 1");
    check(zero(KvShape { kv_heads: 0, ..SHAPE }), "kv_heads is 0, expected at least 1");
    check(zero(KvShape { head_dim: 0, ..SHAPE }), "head_dim is 0, expected at least 1");
    check(zero(KvShape { page_size: 0, ..SHAPE }), "page_size is 0, expected at least 1");
    check(
        KvLayout::new(KvShape { page_size: 4097, ..SHAPE }),
        "page_size is 4097, expected 1 to 4096 tokens",
    );
    assert!(KvLayout::new(KvShape { page_size: 4096, ..SHAPE }).is_ok());
    for shape in [
        KvShape { layers: usize::MAX, ..SHAPE },
        KvShape { head_dim: usize::MAX / 2, ..SHAPE },
        KvShape { layers: 1 << 31, kv_heads: 1 << 31, ..SHAPE },
        // The product fits in usize, and is more than any allocation may hold.
        KvShape { layers: 1, kv_heads: 1, head_dim: 1 << 60, page_size: 1, ..SHAPE },
    ] {
        check(
            KvLayout::new(shape),
            "page bytes is more than this machine can address, \
             expected a smaller layers × kv_heads × head_dim × page_size",
        );
    }
    // The largest that passes: its sizes do not overflow, page size 1 being the worst case.
    let shape = KvShape { layers: 1, kv_heads: 1, head_dim: (1 << 60) - 1, page_size: 1, ..SHAPE };
    let layout = KvLayout::new(shape).unwrap();
    assert_eq!(layout.bytes_per_page(), 8 * ((1 << 60) - 1));
    assert_eq!(layout.bytes_per_token(), 4 * ((1 << 60) - 1));
    let codes = KvShape { head_dim: (1 << 59) - 1, format: KvFormat::Int8, ..shape };
    // A value of one token fills a word of four.
    let bytes = (1 << 59) + 4 * ((1 << 59) - 1) + 4 + 4 * ((1 << 59) - 1);
    assert_eq!(KvLayout::new(codes).unwrap().bytes_per_page(), bytes);
}

#[test]
fn formats() {
    for format in KvFormat::ALL {
        assert_eq!(format.to_string().parse(), Ok(format));
        assert_eq!(format.name(), format.to_string());
    }
    assert_eq!("float16".parse(), Ok(KvFormat::F16));
    assert_eq!("float32".parse(), Ok(KvFormat::F32));
    assert_eq!("bfloat16".parse(), Ok(KvFormat::Bf16));
    check(
        "fp8".parse::<KvFormat>(),
        "kv_cache_dtype is \"fp8\", expected f32, f16, bf16, int8 or int4",
    );
    check("".parse::<KvFormat>(), "kv_cache_dtype is \"\", expected f32, f16, bf16, int8 or int4");
}

#[test]
fn pools() {
    check(PagePool::new(0), "page pool capacity is 0, expected 1 to 4294967295 pages");
    check(
        PagePool::new(1 << 32),
        "page pool capacity is 4294967296, expected 1 to 4294967295 pages",
    );
    let mut pool = PagePool::new(2).unwrap();
    let mut table = PageTable::new(4);
    check(table.extend(&mut pool, 9), "the KV pool has 2 free pages of 2, 3 are needed");
    table.extend(&mut pool, 8).unwrap();
    check(table.extend(&mut pool, 1), "the KV pool has 0 free pages of 2, 1 are needed");
    check(pool.allocate(), "the KV pool has 0 free pages of 2, 1 are needed");
}

#[test]
fn host_memory() {
    let layout = KvLayout::new(SHAPE).unwrap();
    check(
        HostPages::new(layout, usize::MAX),
        "KV pool is 18446744073709551615 pages, expected fewer pages: their bytes overflow",
    );
    check(
        HostPages::new(layout, 1 << 52),
        "KV pool is 8646911284551352320 bytes, which the system refuses, \
         expected fewer pages, a shorter context or a smaller kv_cache_dtype",
    );
}

#[test]
fn policies() {
    let with = |budget| SelectionPolicy { budget, ..SelectionPolicy::default() }.check();
    for (ratio, found) in
        [(0.0, "0"), (-0.5, "-0.5"), (1.01, "1.01"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")]
    {
        check(
            with(Budget::Ratio(ratio)),
            &format!("selection_ratio is {found}, expected above 0 and at most 1"),
        );
    }
    check(with(Budget::Tokens(0)), "token_budget is 0, expected at least 1 token");
    for budget in [Budget::Ratio(1.0), Budget::Ratio(1e-9), Budget::Tokens(1)] {
        assert_eq!(with(budget), Ok(()));
    }
}
