//! What scorers keep of pages is what they would make of them now, whatever became of the pages.

mod common;

use common::{Numbers, layouts_of};
use proptest::prelude::*;
use tinyserve_kv::{
    GROUP_PAGES, HostKeys, HostPages, KvElement, KvFormat, METHODS, Method, PageKeys, PagePool,
    PageTable, Scorer, with_element,
};

/// Pages of the pool: more than one group.
const CAPACITY: usize = GROUP_PAGES + 40;

/// What happens to a sequence.
#[derive(Debug, Clone)]
enum Event {
    /// So many tokens are appended.
    Grow(usize),
    /// Another sequence takes its pages over, and grows.
    Fork(usize),
    /// It ends, and a new one takes its pages.
    Restart(usize),
    /// Some of its tokens are pruned, where the format allows.
    Prune(usize),
    /// A full page is written out and put back elsewhere.
    Move(usize),
    /// Scorers ask.
    Ask,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (1usize..40).prop_map(Event::Grow),
        1 => (1usize..20).prop_map(Event::Fork),
        1 => (1usize..40).prop_map(Event::Restart),
        1 => (2usize..5).prop_map(Event::Prune),
        1 => any::<prop::sample::Index>().prop_map(|page| Event::Move(page.index(1 << 16))),
        4 => Just(Event::Ask),
    ]
}

fn scorers() -> impl Iterator<Item = Scorer> {
    METHODS.iter().filter_map(|method| match method {
        Method::Score(scorer) if scorer.summary().is_some() => Some(*scorer),
        _ => None,
    })
}

fn grow(
    (pages, pool, table): (&mut HostPages, &mut PagePool, &mut PageTable),
    tokens: usize,
    numbers: &mut Numbers,
) {
    let shape = pages.layout().shape();
    let tokens = tokens
        .min(CAPACITY / 3 * shape.page_size - table.len().min(CAPACITY / 3 * shape.page_size));
    if let Some(copy) = table.extend(pool, tokens).unwrap() {
        pages.copy(copy);
    }
    for place in table.len() - tokens..table.len() {
        for layer in 0..shape.layers {
            let row = numbers.numbers(shape.kv_heads * shape.head_dim);
            pages.append(layer, table.slot(place), &row, &row);
        }
    }
}

/// How far from `x` its neighbours in boxes of `format` are, at most.
fn slack(format: KvFormat, x: f32) -> f32 {
    match format {
        KvFormat::F32 => 0.0,
        KvFormat::Bf16 => x.abs() / 128.0 + 1e-40,
        KvFormat::F16 | KvFormat::Int8 | KvFormat::Int4 => x.abs() / 1024.0 + 6e-8,
    }
}

/// Every scorer's boxes of every full page, of the kept ones and of the keys.
fn check(pages: &HostPages, table: &PageTable) -> Result<(), TestCaseError> {
    let (layout, shape) = (pages.layout(), pages.layout().shape());
    let dim = shape.head_dim;
    for (scorer, layer, kv_head) in scorers().flat_map(|scorer| {
        let heads = (0..shape.layers).flat_map(move |l| (0..shape.kv_heads).map(move |h| (l, h)));
        heads.map(move |(layer, kv_head)| (scorer, layer, kv_head))
    }) {
        let keys = HostKeys { pages, layer, kv_head, table: table.pages(), tokens: table.len() };
        let summary = scorer.summary().unwrap();
        let mut corners = vec![0.0; 2 * summary.boxes() * dim];
        let mut of_page = Vec::new();
        with_element!(shape.format, E => {
            let found = pages.with_summaries::<E, _>(scorer, keys, |kept| {
                for number in 0..table.pages().len().saturating_sub(1) {
                    keys.keys(number, &mut of_page);
                    summary.summarise(&of_page, layout.page_size(), &mut corners);
                    let page = table.pages()[number].index();
                    let boxes = kept.group(page / GROUP_PAGES);
                    for (i, &exact) in corners.iter().enumerate() {
                        // `[boxes, 2 (min, max), head_dim]` beside `[boxes, head_dim, 2 (max, min)]`.
                        let (one, row, channel) = (i / (2 * dim), i / dim % 2, i % dim);
                        let place = 2 * (one * dim + channel) + 1 - row;
                        let found = boxes[place * GROUP_PAGES + page % GROUP_PAGES];
                        let found = KvElement::to_f32(found);
                        let outwards = if row == 0 { exact - found } else { found - exact };
                        prop_assert!(
                            (0.0..=slack(shape.format, exact)).contains(&outwards)
                                || found.is_nan() && exact.is_nan()
                                || found.abs() == 65_504.0 && found.abs() <= exact.abs(),
                            "{:?}, page {}, channel {}: {} is kept of {}",
                            scorer, number, channel, found, exact
                        );
                    }
                }
                Ok(())
            });
            found.unwrap()?;
        });
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_kept_is_what_the_keys_say(
        layout in layouts_of(&KvFormat::ALL),
        events in prop::collection::vec(event(), 1..24),
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let mut pages = HostPages::new(layout, CAPACITY).unwrap();
        let mut pool = PagePool::new(CAPACITY).unwrap();
        let size = layout.page_size();
        let mut table = PageTable::new(size);
        let quantised = layout.shape().format.is_quantised();
        for event in events {
            match event {
                Event::Grow(n) => grow((&mut pages, &mut pool, &mut table), n, &mut numbers),
                Event::Fork(n) => {
                    let mut fork = table.fork(&mut pool);
                    grow((&mut pages, &mut pool, &mut fork), n, &mut numbers);
                    check(&pages, &fork)?;
                    std::mem::replace(&mut table, fork).release(&mut pool);
                }
                Event::Restart(n) => {
                    std::mem::replace(&mut table, PageTable::new(size)).release(&mut pool);
                    pages.forget_free(&pool);
                    grow((&mut pages, &mut pool, &mut table), n, &mut numbers);
                }
                Event::Prune(every) if !quantised && table.len() > 1 => {
                    let places: Vec<u32> = (0..table.len() as u32 - 1).step_by(every).collect();
                    let moves = table.prune(&mut pool, &places).unwrap();
                    pages.move_tokens(&moves);
                }
                Event::Move(page) if table.len() > size => {
                    // What was there before is asked for first, and something else put there.
                    check(&pages, &table)?;
                    let full = table.len() / size;
                    let mut bytes = Vec::new();
                    pages.read_page(table.pages()[page % full], &mut bytes);
                    let other = table.pages()[(page + 1) % full];
                    if !(quantised && full * size == table.len()) {
                        pages.write_page(other, &bytes);
                    }
                }
                Event::Ask => check(&pages, &table)?,
                Event::Prune(_) | Event::Move(_) => {}
            }
        }
        check(&pages, &table)?;
        if table.pages().len() > 1 {
            prop_assert!(pages.summary_bytes() > 0);
        }
    }
}
