//! Pages cross the bus whole and in order, on a stream of their own.
//!
//! The emulator runs a stream only as far as somebody waits for it: a copy whose events are missing
//! brings what was there before.

mod common;

use std::path::Path;
use std::sync::Mutex;

use tinyserve_cuda_emulator::{Emulator, ready};
use tinyserve_kernels::{AppendKvArgs, Backend, Cuda, Heads, KernelError};
use tinyserve_kv::{
    HostPages, KvFormat, KvLayout, KvShape, NewToken, PageId, PagePool, PageTable, Prefix, Slot,
};
use tinyserve_model::SessionToSave;

use common::Engine;
use common::sequence::numbers;

/// Waits are counted for the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const HEADS: Heads = Heads { q_heads: 4, kv_heads: 2, head_dim: 6 };
const LAYERS: usize = 3;
/// Full pages that are moved; more than are under way at a time.
const MOVED: usize = 7;
/// More than a group, so that pages of both ends of one are moved.
const CAPACITY: usize = 64 + 2 * MOVED;

fn layout(format: KvFormat, page_size: usize) -> KvLayout {
    let Heads { kv_heads, head_dim, .. } = HEADS;
    KvLayout::new(KvShape { layers: LAYERS, kv_heads, head_dim, page_size, format }).unwrap()
}

/// Fills pages from the middle of the pool on, on the device and on the host.
fn fill(
    cuda: &Cuda,
    pages: &mut <Cuda as Backend>::KvPages,
    host: &mut HostPages,
    pool: &mut PagePool,
) -> Vec<PageId> {
    let page_size = host.layout().page_size();
    for _ in 0..64 - MOVED / 2 {
        pool.allocate().unwrap();
    }
    let mut table = PageTable::new(page_size);
    let tokens = MOVED * page_size;
    assert!(table.extend(pool, tokens).unwrap().is_none());
    let slots: Vec<Slot> = (0..tokens).map(|token| table.slot(token)).collect();
    for (layer, rows) in numbers(LAYERS * tokens * HEADS.qkv_width())
        .chunks_exact(tokens * HEADS.qkv_width())
        .enumerate()
    {
        let mut qkv = cuda.tensor(HEADS.qkv_width());
        cuda.upload(rows, &mut qkv);
        cuda.append_kv(AppendKvArgs { layer, heads: HEADS, qkv: &qkv, slots: &slots, pages });
        let tokens = rows.chunks_exact(HEADS.qkv_width()).zip(&slots);
        host.append_tokens(
            layer,
            tokens.map(|(row, &slot)| NewToken {
                slot,
                keys: &row[HEADS.k_columns()],
                values: &row[HEADS.v_columns()],
            }),
        );
    }
    table.pages().to_vec()
}

fn read(host: &HostPages, page: PageId) -> Vec<u8> {
    let mut bytes = Vec::new();
    host.read_page(page, &mut bytes);
    bytes
}

#[test]
fn pages_cross_whole_and_in_order() {
    let Some(ready) = ready() else { return };
    let _guard = ONE_AT_A_TIME.lock();
    let cuda = Cuda::new(0).unwrap();
    for (format, page_size) in KvFormat::ALL.into_iter().flat_map(|f| [4, 33].map(|p| (f, p))) {
        let case = format!("{format}, pages of {page_size}");
        let layout = layout(format, page_size);
        let mut pages = cuda.allocate_pages(layout, CAPACITY).unwrap();
        let mut host = HostPages::new(layout, CAPACITY).unwrap();
        let mut pool = PagePool::new(CAPACITY).unwrap();
        let ids = fill(&cuda, &mut pages, &mut host, &mut pool);
        let waits = || ready.emulator.map_or(0, Emulator::waits);
        let before = waits();
        let mut saved = Vec::new();
        let take = |bytes: &[u8]| {
            saved.push(bytes.to_vec());
            Ok::<(), KernelError>(())
        };
        cuda.download_pages(&pages, &ids, take).unwrap();
        if ready.emulator.is_some() {
            assert_eq!(waits() - before, MOVED as u64, "{case}: one wait for each page");
        }
        for (i, (bytes, &page)) in saved.iter().zip(&ids).enumerate() {
            assert!(*bytes == read(&host, page), "{case}: page {i}");
        }
        assert_eq!(saved.len(), MOVED, "{case}");
        // Put back elsewhere, and at once saved again.
        let mut elsewhere: Vec<PageId> = ids.iter().map(|_| pool.allocate().unwrap()).collect();
        elsewhere.reverse();
        for (&page, bytes) in elsewhere.iter().zip(&saved) {
            cuda.upload_page(&mut pages, page, bytes).unwrap();
        }
        let mut again = Vec::new();
        let take = |bytes: &[u8]| {
            again.push(bytes.to_vec());
            Ok::<(), KernelError>(())
        };
        cuda.download_pages(&pages, &elsewhere, take).unwrap();
        assert!(again == saved, "{case}: pages that were put back");
        cuda.check().unwrap();
    }
}

#[test]
fn a_reader_that_fails_stops_the_copies_and_nothing_else() {
    if ready().is_none() {
        return;
    }
    let _guard = ONE_AT_A_TIME.lock();
    let cuda = Cuda::new(0).unwrap();
    let layout = layout(KvFormat::F16, 4);
    let mut pages = cuda.allocate_pages(layout, CAPACITY).unwrap();
    let mut host = HostPages::new(layout, CAPACITY).unwrap();
    let mut pool = PagePool::new(CAPACITY).unwrap();
    let ids = fill(&cuda, &mut pages, &mut host, &mut pool);
    let mut taken = 0;
    let full = || KernelError::Invalid {
        what: "disk",
        found: "full".to_owned(),
        expected: "room".to_owned(),
    };
    let stopped = cuda.download_pages(&pages, &ids, |_| {
        taken += 1;
        if taken == 2 { Err(full()) } else { Ok(()) }
    });
    assert_eq!((stopped, taken), (Err(full()), 2));
    let take = |bytes: &[u8]| {
        assert!(bytes == read(&host, ids[0]));
        Ok::<(), KernelError>(())
    };
    cuda.download_pages(&pages, &ids[..1], take).unwrap();
}

/// A session goes on, bit for bit, where it was saved; so does the one that it was saved from.
#[test]
fn sessions_are_saved_and_restored_between_steps() {
    if ready().is_none() {
        return;
    }
    let _guard = ONE_AT_A_TIME.lock();
    // Absent where the tests were built elsewhere.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(folder).unwrap();
    let path = folder.join("copies.session");
    for format in [KvFormat::F16, KvFormat::Int8] {
        let tokens: Vec<u32> = (0..24).map(|i| i * 5 % 200).collect();
        let mut engine = Engine::new(Cuda::new(0).unwrap(), format);
        let mut table = engine.cache.new_table();
        engine.step(&mut table, &tokens).unwrap();
        let prefix = Prefix { tokens: &tokens, salt: "" };
        let session = SessionToSave { identity: "test", prefix, selected: &[], table: &table };
        let backend = engine.model.backend();
        assert_eq!(engine.cache.save_session(backend, &path, session).unwrap(), tokens.len());
        let expected =
            [engine.step(&mut table, &[7]).unwrap(), engine.step(&mut table, &[8]).unwrap()];
        let mut other = Engine::new(Cuda::new(0).unwrap(), format);
        let backend = other.model.backend();
        let restored = other.cache.restore_session(backend, &path, "test").unwrap();
        assert_eq!(restored.tokens, tokens, "{format}");
        let mut table = restored.table;
        let found = [other.step(&mut table, &[7]).unwrap(), other.step(&mut table, &[8]).unwrap()];
        assert_eq!(found, expected, "{format}");
    }
}
