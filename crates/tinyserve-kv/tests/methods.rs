//! Every registered method over random pages: what all of them owe, and what each one promises.

use std::sync::Arc;

use proptest::prelude::*;
use tinyserve_kv::{
    AttentionObserver, Budget, GroupReduce, METHODS, Method, PageKeys, PageSelector,
    PromptAttention, Reselect, Reselecting, ScoreCost, Scorer, SelectFields, SelectInput,
    SelectionPolicy, attention_mass, select_pages,
};

/// Keys of one head of one sequence, their boxes, and queries.
#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    page_size: usize,
    dim: usize,
    /// `[group, dim]`.
    queries: Vec<f32>,
    /// `[tokens, dim]`.
    keys: Vec<f32>,
    /// `[pages, 2, dim]`.
    boxes: Vec<f32>,
}

/// The next number of SplitMix64, in [-2, 2).
fn number(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 22) as f32 - 2.0
}

impl PageKeys for Case {
    fn keys(&self, page: usize, out: &mut Vec<f32>) {
        out.clear();
        out.extend_from_slice(self.page(page));
    }
}

impl Case {
    fn new((tokens, page_size): (usize, usize), dim: usize, group: usize, seed: u64) -> Self {
        let mut state = seed;
        let mut uniform = |n: usize| -> Vec<f32> { (0..n).map(|_| number(&mut state)).collect() };
        let (keys, queries) = (uniform(tokens * dim), uniform(group * dim));
        Self { tokens, page_size, dim, queries, keys, boxes: Vec::new() }.boxed()
    }

    fn boxed(mut self) -> Self {
        self.boxes = (0..self.pages())
            .flat_map(|page| {
                let column = |d: usize| self.page(page)[d..].iter().step_by(self.dim).copied();
                let min = (0..self.dim).map(|d| column(d).fold(f32::INFINITY, f32::min));
                let max = (0..self.dim).map(|d| column(d).fold(f32::NEG_INFINITY, f32::max));
                min.chain(max).collect::<Vec<_>>()
            })
            .collect();
        self
    }

    fn pages(&self) -> usize {
        self.tokens.div_ceil(self.page_size)
    }

    fn page(&self, page: usize) -> &[f32] {
        let start = page * self.page_size;
        let end = (start + self.page_size).min(self.tokens);
        &self.keys[start * self.dim..end * self.dim]
    }

    fn input(&self) -> SelectInput<'_> {
        SelectInput::new(SelectFields {
            layer: 3,
            kv_head: 1,
            tokens: self.tokens,
            page_size: self.page_size,
            head_dim: self.dim,
            scale: (self.dim as f32).sqrt().recip(),
            queries: &self.queries,
            boxes: &self.boxes,
            keys: Some(self),
        })
    }

    /// The case after `tokens` more tokens, with other queries.
    fn grown(&self, tokens: usize, seed: u64) -> Self {
        let more = Self::new((tokens, self.page_size), self.dim, self.group(), seed);
        let keys = [self.keys.as_slice(), &more.keys].concat();
        Self { tokens: self.tokens + tokens, keys, ..more }.boxed()
    }

    fn group(&self) -> usize {
        self.queries.len() / self.dim
    }

    /// Scores `[group, pages]`.
    fn scores(&self, scorer: &str, budget: usize) -> Vec<f32> {
        let mut scores = vec![f32::NAN; self.group() * self.pages()];
        Scorer::named(scorer).unwrap().score(&self.input(), budget, &mut scores);
        scores
    }

    /// Attention logits of query `i`, `[tokens]`.
    fn logits(&self, i: usize) -> Vec<f32> {
        let query = &self.queries[i * self.dim..(i + 1) * self.dim];
        let dot = |key: &[f32]| query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>();
        let scale = (self.dim as f32).sqrt().recip();
        self.keys.chunks_exact(self.dim).map(|key| scale * dot(key)).collect()
    }
}

fn case() -> impl Strategy<Value = Case> {
    let group = 1usize..4;
    (1usize..120, 1usize..12, 1usize..20, group, any::<u64>())
        .prop_map(|(tokens, size, dim, group, seed)| Case::new((tokens, size), dim, group, seed))
}

fn policy(scorer: &str, budget: Budget) -> SelectionPolicy {
    let (dense_layers, min_context) = (0, 0);
    let scorer = Scorer::named(scorer).unwrap();
    SelectionPolicy { scorer, budget, dense_layers, min_context, ..SelectionPolicy::default() }
}

fn selector(
    method: Method,
    budget: Budget,
    prompt: &Arc<PromptAttention>,
) -> Box<dyn PageSelector> {
    match method {
        Method::Dense => Box::new(policy("box", Budget::Ratio(1.0))),
        Method::Score(scorer) => Box::new(policy(scorer.name(), budget)),
        Method::Evict(evictor) => evictor.start(policy("box", budget), Arc::clone(prompt)),
    }
}

fn select(selector: &dyn PageSelector, case: &Case) -> Option<Vec<u32>> {
    let mut list = Vec::new();
    selector.select(&case.input(), &mut list).then_some(list)
}

proptest! {
    #[test]
    fn every_method_returns_a_list_of_its_budget(
        case in case(),
        percent in 1u32..100,
        seed in any::<u64>(),
    ) {
        let budget = Budget::Ratio(f64::from(percent) / 100.0);
        let observer = AttentionObserver::default();
        prop_assert_eq!(select(&observer, &case), None, "observing reads everything");
        let prompt = Arc::new(observer.finish());
        let later = case.grown(1, seed);
        for &method in METHODS {
            let expected = match method {
                Method::Dense => None,
                _ => policy("box", budget).page_budget(3, later.tokens, later.page_size),
            };
            let list = select(selector(method, budget, &prompt).as_ref(), &later);
            prop_assert_eq!(list.as_ref().map(Vec::len), expected, "{}", method.name());
            let again = select(selector(method, budget, &prompt).as_ref(), &later);
            prop_assert_eq!(&list, &again, "{} differs when it is repeated", method.name());
            let Some(list) = list else { continue };
            prop_assert!(list.windows(2).all(|pair| pair[0] < pair[1]), "{}", method.name());
            prop_assert_eq!(list[0], 0, "the sink");
            prop_assert_eq!(*list.last().unwrap() as usize, later.pages() - 1, "the newest page");
        }
    }

    #[test]
    fn bounds_bound_and_tighter_ones_are_tighter(case in case()) {
        let (oracle, two) = (case.scores("oracle", 1), case.scores("two-boxes", 1));
        let (one, cuboid) = (case.scores("box", 1), case.scores("cuboid-mean", 1));
        let slack = 1e-4 * case.dim as f32;
        for i in 0..oracle.len() {
            prop_assert!(oracle[i] <= two[i] + slack, "{} above its two boxes {}", oracle[i], two[i]);
            prop_assert!(two[i] <= one[i] + slack, "{} above the box {}", two[i], one[i]);
            prop_assert!(cuboid[i] <= one[i] + slack, "{} above the box {}", cuboid[i], one[i]);
        }
        // Nominating every page, the second stage is the oracle to half a step in each channel.
        let staged = case.scores("two-stage", case.pages());
        for (i, (staged, oracle)) in staged.iter().zip(&oracle).enumerate() {
            let query = &case.queries[i / case.pages() * case.dim..][..case.dim];
            let half_steps: f32 = query.iter().map(|q| q.abs() * 4.0 / 255.0 / 2.0).sum();
            prop_assert!((staged - oracle).abs() <= half_steps + slack, "{staged} for {oracle}");
        }
    }

    #[test]
    fn pages_of_equal_keys_score_their_product(mut case in case()) {
        let dim = case.dim;
        let size = case.page_size * dim;
        for page in case.keys.chunks_mut(size) {
            let (first, rest) = page.split_at_mut(dim);
            rest.chunks_exact_mut(dim).for_each(|key| key.copy_from_slice(first));
        }
        let case = case.boxed();
        let oracle = case.scores("oracle", case.pages());
        for name in ["box", "mean-std", "cuboid-mean", "two-boxes", "two-stage"] {
            for (score, product) in case.scores(name, case.pages()).iter().zip(&oracle) {
                let error = (score - product).abs();
                prop_assert!(error <= 1e-3 * dim as f32, "{name}: {score} for {product}");
            }
        }
    }

    #[test]
    fn no_list_holds_more_mass_than_the_oracle_of_mass(
        case in case(),
        budget in 1usize..20,
        other in prop::sample::select(METHODS.to_vec()),
    ) {
        // One query: a group shares its list, and what is best for one is not for the other.
        let case = Case { queries: case.queries[..case.dim].to_vec(), ..case };
        let shares = case.scores("oracle-mass", 1);
        let scale = case.input().scale();
        let total: f32 = shares.iter().map(|score| (scale * score).exp()).sum();
        prop_assert!((total - 1.0).abs() < 1e-3, "shares add up to {total}");
        let budget = Budget::Tokens(budget * case.page_size);
        let mass = |list: Option<Vec<u32>>| {
            list.map_or(1.0, |list| attention_mass(&case.logits(0), &list, case.page_size))
        };
        let prompt = Arc::default();
        let best = mass(select(&policy("oracle-mass", budget), &case));
        if !matches!(other, Method::Dense) {
            let found = mass(select(selector(other, budget, &prompt).as_ref(), &case));
            prop_assert!(found <= best + 1e-5, "{} holds {found} of {best}", other.name());
        }
    }

    #[test]
    fn what_was_evicted_does_not_come_back(case in case(), seeds in prop::array::uniform4(any::<u64>())) {
        let prompt = Arc::default();
        for name in ["h2o", "snapkv"] {
            let method = Method::named(name).unwrap();
            let budget = Budget::Tokens(4 * case.page_size);
            let selector = selector(method, budget, &prompt);
            let (mut case, mut before, mut pages) = (case.clone(), None::<Vec<u32>>, 0);
            for seed in seeds {
                let list = select(selector.as_ref(), &case);
                if let (Some(before), Some(list)) = (&before, &list) {
                    let fresh = |page: &u32| *page as usize >= pages || before.contains(page);
                    prop_assert!(list.iter().all(fresh), "{name}: {before:?}, then {list:?}");
                }
                before = list.or(before);
                pages = case.pages();
                case = case.grown(3, seed);
            }
        }
    }

    #[test]
    fn top_p_grows_with_p_and_one_reads_everything(case in case()) {
        let mut smaller: Vec<u32> = Vec::new();
        let all: Vec<u32> = (0..case.pages() as u32).collect();
        for p in [0.01, 0.3, 0.6, 0.9, 0.99] {
            let policy = policy("box", Budget::TopP(p));
            let list = select(&policy, &case).unwrap_or_else(|| all.clone());
            prop_assert!(smaller.iter().all(|page| list.contains(page)), "p {p}");
            prop_assert!(list.is_sorted() && list.contains(&0) && list.ends_with(&all[all.len() - 1..]));
            smaller = list;
        }
    }

    #[test]
    fn moving_all_keys_moves_scores_and_stretching_the_query_stretches_them(
        case in case(), seed in any::<u64>(), stretch in 0.25f32..4.0,
    ) {
        let mut state = seed;
        let by: Vec<f32> = (0..case.dim).map(|_| number(&mut state)).collect();
        let mut moved = case.clone();
        moved.keys.chunks_exact_mut(case.dim).for_each(|key| {
            key.iter_mut().zip(&by).for_each(|(k, b)| *k += b);
        });
        let moved = moved.boxed();
        let queries = case.queries.iter().map(|q| stretch * q).collect();
        let stretched = Case { queries, ..case.clone() };
        let slack = 1e-3 * case.dim as f32;
        // The int8 keys of two-stage move by up to half a step.
        for name in ["box", "mean-std", "cuboid-mean", "two-boxes", "oracle"] {
            let score = |case: &Case| case.scores(name, case.pages());
            let (here, there, long) = (score(&case), score(&moved), score(&stretched));
            for (i, here) in here.iter().enumerate() {
                let query = &case.queries[i / case.pages() * case.dim..][..case.dim];
                let shift: f32 = query.iter().zip(&by).map(|(q, b)| q * b).sum();
                prop_assert!((there[i] - here - shift).abs() <= slack, "{name}: {} {here}", there[i]);
                prop_assert!((long[i] - stretch * here).abs() <= slack, "{name}: {} {here}", long[i]);
            }
        }
    }

    #[test]
    fn the_order_of_tokens_in_a_page_and_of_heads_in_a_group_says_nothing(
        case in case(), budget in 1usize..8,
    ) {
        let mut turned = case.clone();
        let size = case.page_size * case.dim;
        for page in turned.keys.chunks_mut(size) {
            let reversed: Vec<f32> = page.chunks_exact(case.dim).rev().flatten().copied().collect();
            page.copy_from_slice(&reversed);
        }
        let turned = turned.boxed();
        for name in ["box", "mean-std", "cuboid-mean", "two-stage", "oracle", "oracle-mass"] {
            let scores = case.scores(name, case.pages()).into_iter();
            for (one, other) in scores.zip(turned.scores(name, case.pages())) {
                prop_assert!((one - other).abs() <= 1e-3 * case.dim as f32, "{name}: {one} {other}");
            }
        }
        let heads = case.queries.chunks_exact(case.dim).rev().flatten().copied().collect();
        let turned = Case { queries: heads, ..case.clone() };
        let scored = policy("oracle", Budget::Tokens(budget * case.page_size));
        for group_reduce in [GroupReduce::Max, GroupReduce::SoftmaxVote] {
            let policy = SelectionPolicy { group_reduce, ..scored };
            let [one, other] = [&case, &turned].map(|case| policy.scores(&case.input(), budget));
            for (one, other) in one.iter().zip(&other) {
                prop_assert!((one - other).abs() <= 1e-4 * one.abs().max(1.0), "{one} {other}");
            }
        }
    }

    #[test]
    fn a_group_s_maximum_bounds_each_head_and_its_votes_are_one_for_each(
        case in case(), budget in 1usize..8,
    ) {
        let scored = policy("box", Budget::Tokens(budget * case.page_size));
        let best = scored.scores(&case.input(), budget);
        let heads = case.scores("box", budget);
        for scores in heads.chunks_exact(case.pages()) {
            prop_assert!(best.iter().zip(scores).all(|(best, score)| best >= score));
        }
        let votes = SelectionPolicy { group_reduce: GroupReduce::SoftmaxVote, ..scored };
        let votes: f32 = votes.scores(&case.input(), budget).iter().sum();
        prop_assert!((votes - case.group() as f32).abs() < 1e-3, "{votes} of {}", case.group());
    }

    #[test]
    fn what_a_policy_says_of_its_scores_is_what_it_selects_by(
        case in case(), budget in 1usize..8,
        scorer in prop::sample::select(METHODS.to_vec()),
    ) {
        let Method::Score(scorer) = scorer else { return Ok(()) };
        let policy = policy(scorer.name(), Budget::Tokens(budget * case.page_size));
        let list = select(&policy, &case);
        let scores = policy.page_scores(&case.input());
        prop_assert_eq!(list.is_some(), scores.is_some());
        let (Some(list), Some(scores)) = (list, scores) else { return Ok(()) };
        let mut expected = Vec::new();
        select_pages(&scores, list.len(), policy.sink_pages, policy.recent_pages, &mut expected);
        prop_assert_eq!(list, expected);
    }

    #[test]
    fn summaries_are_read_when_pages_are_scored_and_not_when_a_choice_is_kept(
        case in case(), steps in 2usize..4,
    ) {
        let cost = ScoreCost {
            tokens: case.tokens, pages: case.pages(), budget: 1, page_size: case.page_size,
            queries: case.group(), head_dim: case.dim, vector_bytes: 2 * case.dim,
        };
        let bytes = |selector: &dyn PageSelector| {
            select(selector, &case);
            selector.bytes_read((3, 1), &cost)
        };
        // Three pages are always read: up to there, and in dense layers, nothing is scored.
        let scores = cost.pages > 3;
        let vectors = cost.pages * cost.vector_bytes;
        let boxes = if scores { vectors * case.group().min(2) } else { 0 };
        let scored = policy("two-boxes", Budget::Tokens(case.page_size));
        prop_assert_eq!(bytes(&scored), 2 * boxes);
        let dense = SelectionPolicy { dense_layers: 4, ..scored };
        let kept = Reselecting::new(scored, Reselect::Every(steps));
        for step in 0..2 * steps {
            let expected = if step % steps == 0 { 2 * boxes } else { 0 };
            prop_assert_eq!(bytes(&kept), expected, "step {}", step);
            prop_assert_eq!(bytes(&Reselecting::new(dense, Reselect::Every(steps))), 0);
        }
        // One kept box, of whatever kind, costs what the box of the keys costs.
        for name in ["box", "mean-std", "cuboid-mean"] {
            prop_assert_eq!(bytes(&policy(name, Budget::Tokens(case.page_size))), boxes, "{}", name);
        }
        // The estimate of a page's mass takes mean and variance, and its guard a box.
        let moments = if scores { 2 * vectors } else { 0 };
        prop_assert_eq!(bytes(&policy("box", Budget::TopP(0.5))), boxes + moments);
        prop_assert_eq!(bytes(&policy("streaming", Budget::TopP(0.5))), boxes + moments);
        for name in ["h2o", "snapkv"] {
            let evictor = selector(Method::named(name).unwrap(), Budget::Tokens(1), &Arc::default());
            prop_assert_eq!(bytes(evictor.as_ref()), 0, "{} scores no page", name);
        }
    }

    #[test]
    fn streaming_is_sinks_and_a_window(case in case(), budget in 1usize..12) {
        let list = select(&policy("streaming", Budget::Tokens(budget * case.page_size)), &case);
        let pages = case.pages() as u32;
        let kept = budget.max(3) as u32;
        let window = (kept < pages).then(|| {
            std::iter::once(0).chain(pages - (kept - 1)..pages).collect::<Vec<_>>()
        });
        prop_assert_eq!(list, window);
    }

    #[test]
    fn h2o_begins_with_the_pages_that_the_prompt_used_most(case in case(), budget in 4usize..9) {
        let observer = AttentionObserver::default();
        prop_assert_eq!(select(&observer, &case), None);
        let seen = observer.finish();
        let used: Vec<f32> = seen.head(3, 1).unwrap().mass
            .chunks(case.page_size).map(|page| page.iter().sum()).collect();
        let budget = Budget::Tokens(budget * case.page_size);
        let list = select(selector(Method::named("h2o").unwrap(), budget, &Arc::new(seen)).as_ref(), &case);
        if let Some(list) = list {
            let mut expected = Vec::new();
            select_pages(&used, list.len(), 1, 2, &mut expected);
            // Of pages with the same attention, to the last bit, either may stay.
            let attention = |list: &[u32]| {
                let mut used: Vec<f32> = list.iter().map(|&page| used[page as usize]).collect();
                used.sort_by(f32::total_cmp);
                used
            };
            prop_assert_eq!(attention(&list), attention(&expected), "{:?}", list);
        }
    }

    #[test]
    fn an_observer_remembers_the_same_in_whatever_order_rows_come(
        case in case(), seeds in prop::array::uniform8(any::<u64>()),
    ) {
        let mut rows = vec![case];
        for seed in seeds {
            rows.push(rows[rows.len() - 1].grown(1, seed));
        }
        let seen = |rows: &mut dyn Iterator<Item = &Case>| {
            let observer = AttentionObserver::default();
            rows.for_each(|row| assert_eq!(select(&observer, row), None));
            observer.finish().head(3, 1).cloned()
        };
        let in_order = seen(&mut rows.iter());
        prop_assert_eq!(&in_order, &seen(&mut rows.iter().rev()));
        let (odd, even) = (rows.iter().skip(1).step_by(2), rows.iter().step_by(2));
        prop_assert_eq!(&in_order, &seen(&mut odd.chain(even)));
        let seen = in_order.unwrap();
        prop_assert_eq!(seen.queries, rows.len() * rows[0].group());
        let mass: f32 = seen.mass.iter().sum();
        prop_assert!((mass - seen.queries as f32).abs() < 1e-3 * mass, "{} of {}", mass, seen.queries);
    }

    #[test]
    fn one_query_votes_as_it_scores(case in case(), budget in 1usize..20) {
        let case = Case { queries: case.queries[..case.dim].to_vec(), ..case };
        let policy = policy("oracle", Budget::Tokens(budget * case.page_size));
        let vote = SelectionPolicy { group_reduce: GroupReduce::SoftmaxVote, ..policy };
        prop_assert_eq!(select(&policy, &case), select(&vote, &case));
    }

    #[test]
    fn a_kept_selection_is_the_old_one_and_the_new_pages(
        case in case(), seed in any::<u64>(), steps in 2usize..5, budget in 1usize..8,
    ) {
        let policy = policy("box", Budget::Tokens(budget * case.page_size));
        let kept = Reselecting::new(policy, Reselect::Every(steps));
        let first = select(&kept, &case);
        prop_assert_eq!(&first, &select(&policy, &case));
        let (mut later, pages) = (case.clone(), case.pages() as u32);
        for step in 1..steps {
            later = later.grown(1, seed ^ step as u64);
            let mut expected = first.clone();
            if let Some(list) = &mut expected {
                list.extend(pages..later.pages() as u32);
            }
            prop_assert_eq!(select(&kept, &later), expected);
        }
        later = later.grown(1, seed);
        prop_assert_eq!(select(&kept, &later), select(&policy, &later));
        // Queries that do not change are as similar as can be; others are not.
        let similar = Reselecting::new(policy, Reselect::Below(0.9999));
        let first = select(&similar, &case);
        prop_assert_eq!(&select(&similar, &case), &first);
        let opposite = Case { queries: case.queries.iter().map(|q| -q).collect(), ..case.clone() };
        prop_assert_eq!(select(&similar, &opposite), select(&policy, &opposite));
    }
}

#[test]
fn names_are_unique_and_unknown_ones_are_answered_with_the_list() {
    let names: Vec<_> = METHODS.iter().map(|method| method.name()).collect();
    for (i, name) in names.iter().enumerate() {
        assert!(!names[..i].contains(name), "{name}");
        assert_eq!(Method::named(name).unwrap().name(), *name);
        assert!(!Method::named(name).unwrap().about().is_empty());
    }
    let error = Method::named("bocks").unwrap_err().to_string();
    assert!(names.iter().all(|name| error.contains(name)) && error.contains("bocks"), "{error}");
    assert!(Scorer::named("h2o").is_err(), "an evictor scores nothing");
}

#[test]
fn lots_fall_evenly() {
    // 20 of 64 pages in 400 draws: three are always read, 17 of the other 61 are drawn.
    let mut drawn = [0; 64];
    for seed in 0..400 {
        let case = Case::new((64, 1), 2, 1, seed);
        let list = select(&policy("random", Budget::Tokens(20)), &case).unwrap();
        list.iter().for_each(|&page| drawn[page as usize] += 1);
    }
    assert_eq!((drawn[0], drawn[62], drawn[63]), (400, 400, 400));
    let (mean, deviation) = (400.0 * 17.0 / 61.0, (400.0f64 * 17.0 * 44.0).sqrt() / 61.0);
    for (page, &n) in drawn.iter().enumerate().take(62).skip(1) {
        assert!((f64::from(n) - mean).abs() < 4.5 * deviation, "page {page}: {n} of {mean}");
    }
}

#[test]
fn a_needle_in_its_own_channel_is_found_by_some_and_lost_by_chance() {
    // 64 pages of equal keys; token 500 alone has something in channel 1, which is asked for.
    let mut case = Case::new((1024, 16), 4, 1, 1);
    case.keys.chunks_exact_mut(4).for_each(|key| key.copy_from_slice(&[1.0, 0.0, 0.0, 0.0]));
    case.keys[500 * 4 + 1] = 8.0;
    case.queries = vec![0.0, 10.0, 0.0, 0.0];
    let case = case.boxed();
    let finds = |name: &str| {
        let list = select(&policy(name, Budget::Tokens(64)), &case).unwrap();
        list.contains(&(500 / 16))
    };
    for name in
        ["box", "mean-std", "cuboid-mean", "two-boxes", "two-stage", "oracle", "oracle-mass"]
    {
        assert!(finds(name), "{name}");
    }
    assert!(!finds("streaming") && !finds("random"));
    assert_eq!(case.scores("cuboid-mean", 1)[31], 80.0, "the whole product");
    // The estimate from moments sees the page: it alone holds the mass.
    let list = select(&policy("box", Budget::TopP(0.9)), &case).unwrap();
    assert_eq!(list, [0, 31, 62, 63]);
}

#[test]
fn snapkv_keeps_what_the_prompt_asked_for_and_h2o_what_it_used() {
    let mut case = Case::new((640, 16), 4, 1, 1);
    case.keys.chunks_exact_mut(4).for_each(|key| key.copy_from_slice(&[1.0, 0.0, 0.0, 0.0]));
    case.keys[300 * 4 + 1] = 8.0;
    case.queries = vec![0.0, 10.0, 0.0, 0.0];
    let asked = case.boxed();
    let silent = Case { queries: vec![0.0; 4], ..asked.clone() };
    for name in ["snapkv", "h2o"] {
        let keeps = |prompt: &Case| {
            let observer = AttentionObserver::default();
            assert_eq!(select(&observer, prompt), None);
            let seen = observer.finish();
            assert_eq!(seen.head(3, 1).unwrap().queries, 1);
            let method = Method::named(name).unwrap();
            let selector = selector(method, Budget::Tokens(64), &Arc::new(seen));
            select(selector.as_ref(), &asked).unwrap().contains(&(300 / 16))
        };
        assert!(keeps(&asked), "{name} forgot what was asked for");
        assert!(!keeps(&silent), "{name} cannot know what is asked later");
    }
}
