//! Which pages are chosen: against a naive sort, a naive softmax, and the policy's own words.

#[path = "common/numbers.rs"]
mod numbers;

use numbers::Numbers;
use proptest::prelude::*;
use tinyserve_kv::{
    Budget, PageSelector, SelectFields, SelectInput, SelectionPolicy, attention_mass, score_box,
    select_pages,
};

/// Scores with many ties, both zeros, infinities and NaN of both signs.
fn scores() -> impl Strategy<Value = Vec<f32>> {
    let score = prop_oneof![
        6 => (-4i8..4).prop_map(f32::from),
        4 => -1e3f32..1e3,
        1 => prop::sample::select(vec![
            0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::MAX, f32::MIN,
        ]),
    ];
    prop::collection::vec(score, 0..40)
}

fn select(scores: &[f32], budget: usize, sink: usize, recent: usize) -> Vec<u32> {
    // What was in the list before does not matter.
    let mut selected = vec![9; 3];
    select_pages(scores, budget, sink, recent, &mut selected);
    selected
}

/// The definition, without care for speed: always-kept pages, then the best of the rest.
fn naive(scores: &[f32], budget: usize, sink: usize, recent: usize) -> Vec<u32> {
    let pages = scores.len();
    let always = |page: usize| page < sink || page + recent.max(1) >= pages;
    let mut chosen: Vec<usize> = (0..pages).filter(|&page| always(page)).collect();
    while chosen.len() < budget.min(pages) {
        let mut best: Option<usize> = None;
        for page in (0..pages).filter(|page| !chosen.contains(page)) {
            let rank =
                |page: usize| if scores[page].is_nan() { f32::INFINITY } else { scores[page] };
            if best.is_none_or(|best| rank(page) > rank(best)) {
                best = Some(page);
            }
        }
        chosen.extend(best);
    }
    chosen.sort_unstable();
    chosen.into_iter().map(|page| page as u32).collect()
}

proptest! {
    #[test]
    fn pages_are_the_naive_choice(
        scores in scores(),
        budget in 0usize..45,
        sink in 0usize..6,
        recent in 0usize..6,
    ) {
        let selected = select(&scores, budget, sink, recent);
        prop_assert_eq!(&selected, &naive(&scores, budget, sink, recent));
        let pages = scores.len();
        prop_assert_eq!(selected.len(), pages.min(budget.max(sink + recent.max(1))));
        prop_assert!(selected.windows(2).all(|pair| pair[0] < pair[1]), "ascending and unique");
        prop_assert!(selected.iter().all(|&page| (page as usize) < pages));
    }

    #[test]
    fn a_larger_budget_keeps_what_a_smaller_one_chose(
        scores in scores(),
        sink in 0usize..4,
        recent in 0usize..4,
    ) {
        let mut smaller = Vec::new();
        for budget in 0..=scores.len() {
            let larger = select(&scores, budget, sink, recent);
            prop_assert!(smaller.iter().all(|page| larger.contains(page)), "budget {}", budget);
            smaller = larger;
        }
        let all: Vec<u32> = (0..scores.len() as u32).collect();
        prop_assert_eq!(smaller, all, "a full budget reads everything");
    }

    #[test]
    fn extreme_counts_do_not_overflow(
        scores in scores(),
        pick in prop::array::uniform3(prop::sample::select(vec![0, 1, usize::MAX - 1, usize::MAX])),
    ) {
        let [budget, sink, recent] = pick;
        let selected = select(&scores, budget, sink, recent);
        let pages = scores.len();
        let kept = budget.max(sink.saturating_add(recent.max(1)));
        prop_assert_eq!(selected.len(), pages.min(kept));
        let policy = SelectionPolicy { sink_pages: sink, recent_pages: recent, ..policy() };
        prop_assert!(policy.page_budget(0, 100, 1).is_none_or(|budget| budget < 100));
    }

    #[test]
    fn a_policy_is_its_parts(
        tokens in 1usize..300,
        page_size in 1usize..20,
        head_dim in 1usize..12,
        group in 1usize..5,
        layer in 0usize..4,
        policy in policies(),
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let pages = tokens.div_ceil(page_size);
        let mut boxes = Vec::new();
        for _ in 0..pages {
            let corners = (numbers.numbers(head_dim), numbers.numbers(head_dim));
            let pairs = || corners.0.iter().zip(&corners.1);
            boxes.extend(pairs().map(|(a, b)| a.min(*b)));
            boxes.extend(pairs().map(|(a, b)| a.max(*b)));
        }
        let queries = numbers.numbers(group * head_dim);
        let input = SelectInput::new(SelectFields {
            layer, kv_head: 0, tokens, page_size, head_dim, scale: 1.0, queries: &queries,
            boxes: &boxes, keys: None,
        });
        prop_assert_eq!(input.page_count(), pages);
        prop_assert_eq!(input.queries().count(), group);
        let mut selected = Vec::new();
        let chose = policy.select(&input, &mut selected);

        let dense = layer < policy.dense_layers || tokens < policy.min_context;
        let always = policy.sink_pages + policy.recent_pages.max(1);
        let budget = policy.budget.pages(pages, page_size).max(always);
        prop_assert_eq!(chose, !dense && budget < pages);
        if !chose {
            prop_assert!(selected.is_empty());
            prop_assert_eq!(policy.page_budget(layer, tokens, page_size), None);
            return Ok(());
        }
        prop_assert_eq!(policy.page_budget(layer, tokens, page_size), Some(budget));
        let scores: Vec<f32> = boxes
            .chunks_exact(2 * head_dim)
            .map(|corners| {
                let (min, max) = corners.split_at(head_dim);
                let scores = queries.chunks_exact(head_dim).map(|q| score_box(q, min, max));
                scores.fold(f32::NEG_INFINITY, f32::max)
            })
            .collect();
        let manual = naive(&scores, budget, policy.sink_pages, policy.recent_pages);
        prop_assert_eq!(selected.len(), budget);
        prop_assert_eq!(selected, manual);
    }

    #[test]
    fn mass_is_a_softmax_over_pages(
        logits in prop::collection::vec(-20f32..20.0, 1..200),
        page_size in 1usize..20,
        chosen in any::<u64>(),
    ) {
        let pages = logits.len().div_ceil(page_size) as u32;
        let (selected, rest): (Vec<u32>, Vec<u32>) =
            (0..pages).partition(|page| chosen >> (page % 64) & 1 == 1);
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let in_selected = |token: usize| selected.contains(&((token / page_size) as u32));
        let kept: f64 = (0..logits.len())
            .filter(|&token| in_selected(token))
            .map(|token| f64::from(logits[token]).exp())
            .sum();
        let mass = |list: &[u32]| attention_mass(&logits, list, page_size);
        prop_assert!((f64::from(mass(&selected)) - kept / total).abs() < 1e-6);
        prop_assert!((mass(&selected) + mass(&rest) - 1.0).abs() < 1e-6, "additive");
        let all: Vec<u32> = (0..pages).collect();
        prop_assert_eq!(mass(&all), 1.0);
        prop_assert_eq!(mass(&[]), 0.0);
        prop_assert_eq!(mass(&[pages, u32::MAX]), 0.0, "pages beyond the tokens");
        // A constant added to every logit changes nothing, however large.
        let shifted: Vec<f32> = logits.iter().map(|x| x.round() + 4096.0).collect();
        let rounded: Vec<f32> = logits.iter().map(|x| x.round()).collect();
        prop_assert_eq!(
            attention_mass(&shifted, &selected, page_size),
            attention_mass(&rounded, &selected, page_size)
        );
    }
}

fn policy() -> SelectionPolicy {
    SelectionPolicy { dense_layers: 0, min_context: 0, ..SelectionPolicy::default() }
}

fn policies() -> impl Strategy<Value = SelectionPolicy> {
    let budget = prop_oneof![
        (1u32..=100).prop_map(|percent| Budget::Ratio(f64::from(percent) / 100.0)),
        (1usize..200).prop_map(Budget::Tokens),
    ];
    (budget, 0usize..4, 0usize..4, 0usize..3, 0usize..100).prop_map(
        |(budget, sink_pages, recent_pages, dense_layers, min_context)| SelectionPolicy {
            budget,
            sink_pages,
            recent_pages,
            dense_layers,
            min_context,
            ..policy()
        },
    )
}

#[test]
fn ties_go_to_the_lower_page() {
    assert_eq!(select(&[1.0, 1.0, 1.0, 1.0, 1.0, 0.0], 3, 0, 1), [0, 1, 5]);
    assert_eq!(select(&[-0.0, 0.0, -0.0, 0.0, 9.0], 3, 0, 1), [0, 1, 4], "one zero, not two");
    assert_eq!(select(&[0.0, -0.0, 0.0, -0.0, 9.0], 3, 0, 1), [0, 1, 4]);
}

#[test]
fn a_score_that_is_not_a_number_is_read_whatever_its_sign() {
    for nan in [f32::NAN, -f32::NAN] {
        assert_eq!(select(&[5.0, f32::MAX, nan, 7.0, 0.0], 2, 0, 1), [2, 4]);
        assert_eq!(select(&[f32::INFINITY, nan, 0.0], 2, 0, 1), [0, 2], "it ties with infinity");
    }
}

#[test]
fn short_sequences_are_read_whole() {
    assert!(select(&[], 3, 1, 2).is_empty());
    assert_eq!(select(&[1.0], 0, 0, 0), [0], "the newest token's page");
    assert_eq!(select(&[1.0, 2.0], 1, 1, 2), [0, 1]);
    assert_eq!(select(&[1.0, 2.0, 3.0], 1, 5, 5), [0, 1, 2], "sink and recent overlap");
    assert_eq!(select(&[3.0, 2.0, 1.0, 0.0], 1, 0, 0), [3]);
}

#[test]
fn budgets_are_the_reference_formula() {
    for (ratio, pages, expected) in [
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.3, 1, 1),
        (0.3, 3, 1),
        (0.3, 4, 1),
        (0.3, 7, 2),
        (0.1, 10, 1),
        (0.1, 9, 1),
        (0.5, 5, 2),
        (1.0, 10, 10),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (1e-300, 10, 1),
        (0.999_999, 10, 9),
    ] {
        assert_eq!(Budget::Ratio(ratio).pages(pages, 16), expected, "{ratio} of {pages} pages");
    }
    for (tokens, expected) in [(1, 1), (15, 1), (16, 1), (31, 1), (32, 2), (159, 9), (9999, 10)] {
        assert_eq!(Budget::Tokens(tokens).pages(10, 16), expected, "{tokens} tokens");
    }
}

#[test]
fn a_ratio_in_decimals_gives_the_decimal_floor() {
    for thousandths in 1..=1000usize {
        for pages in (1..200).chain([999, 1000, 1024, 4096, 100_000, 1 << 20]) {
            let ratio = Budget::Ratio(thousandths as f64 / 1000.0);
            let expected = (thousandths * pages / 1000).max(1);
            assert_eq!(ratio.pages(pages, 16), expected, "{thousandths}/1000 of {pages}");
        }
    }
}

#[test]
fn page_budget_is_none_where_everything_is_read() {
    let policy = SelectionPolicy::default();
    assert_eq!(policy.page_budget(2, 1600, 16), Some(30), "0.3 of 100 pages");
    assert_eq!(policy.page_budget(1, 1600, 16), None, "a dense layer");
    assert_eq!(policy.page_budget(2, 1023, 16), None, "a short context");
    assert_eq!(policy.page_budget(2, 1024, 16), Some(19), "0.3 of 64 pages");
    assert_eq!(policy.page_budget(2, 1025, 16), Some(19), "0.3 of 65 pages");
    let budget = |budget| SelectionPolicy { budget, ..policy };
    assert_eq!(budget(Budget::Ratio(1.0)).page_budget(2, 1600, 16), None);
    assert_eq!(budget(Budget::Tokens(1600)).page_budget(2, 1600, 16), None);
    assert_eq!(budget(Budget::Tokens(1599)).page_budget(2, 1600, 16), Some(99));
    assert_eq!(budget(Budget::Tokens(1)).page_budget(2, 1600, 16), Some(3), "sink and recent");
    assert_eq!(budget(Budget::Tokens(1)).page_budget(2, 0, 16), None);
}

#[test]
fn mass_of_special_logits() {
    let inf = f32::INFINITY;
    assert_eq!(attention_mass(&[], &[], 4), 1.0, "nothing is missed");
    assert_eq!(
        attention_mass(&[-inf, 0.0, -inf, 0.0], &[0], 2),
        0.5,
        "masked tokens weigh nothing"
    );
    assert!(attention_mass(&[0.0, f32::NAN], &[0], 1).is_nan());
    assert_eq!(attention_mass(&[3e38, -3e38], &[0], 1), 1.0);
}
