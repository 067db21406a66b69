//! The controller of the selection budget, on the same clock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use tinyserve_kv::{Budget, SelectionPolicy};
use tinyserve_sched::{
    Adaptive, AdmissionError, AttentionChoice, BudgetMove, Clock, EngineConfig, Event, Scheduler,
};

use super::{Plan, World, simple};
use crate::toy::{DRAWN, Toy};

const PAGE: Duration = Duration::from_micros(100);

type Moves = Arc<Mutex<Vec<BudgetMove>>>;

fn policy(ratio: f64) -> SelectionPolicy {
    SelectionPolicy {
        budget: Budget::Ratio(ratio),
        dense_layers: 0,
        min_context: 100,
        ..SelectionPolicy::default()
    }
}

/// A world whose steps take `fixed`, and 0.1 ms for each page that they read.
fn world(ratio: f64, fixed: Duration, target: Duration) -> (World, Moves) {
    world_of(Toy::new(2000, 4), ratio, fixed, target)
}

fn world_of(mut toy: Toy, ratio: f64, fixed: Duration, target: Duration) -> (World, Moves) {
    let moves = Moves::default();
    let told = Arc::clone(&moves);
    let on_move = Arc::new(move |moved: &BudgetMove| told.lock().unwrap().push(*moved));
    let clock = Clock::manual();
    let config = EngineConfig {
        max_num_seqs: 4,
        max_sequence_length: 1000,
        attention: AttentionChoice::Policy(policy(ratio)),
        adaptive: Some(Adaptive { target, min_budget: 0.25, max_budget: 1.5, on_move }),
        clock: clock.clone(),
        ..EngineConfig::default()
    };
    toy.takes = Some((clock, fixed, PAGE));
    (World::of(toy, config), moves)
}

fn last(moves: &Moves) -> Option<BudgetMove> {
    moves.lock().unwrap().last().copied()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn decode_steps_come_to_keep_to_the_target(
        ratio in 0.1..=0.9_f64,
        fixed in 0..3_u64,
        target in 4..40_u64,
        requests in 1..4_usize,
    ) {
        let (fixed, target) = (Duration::from_millis(fixed), Duration::from_millis(target));
        let (mut world, moves) = world(ratio, fixed, target);
        for _ in 0..requests {
            world.submit(simple(500, 450, 0)).unwrap();
        }
        let mut before = world.scheduler.stats();
        let mut took = Duration::ZERO;
        while world.heard.iter().any(|heard| heard.tokens.len() < 400) {
            world.step();
            let stats = world.scheduler.stats();
            took = Duration::from_secs_f64(stats.step.sum - before.step.sum);
            before = stats;
        }
        let moves = moves.lock().unwrap();
        prop_assert_eq!(before.budget_moves, moves.len() as u64, "each move is told");
        let of = |budget| match budget {
            Budget::Ratio(ratio) => ratio,
            other => panic!("{other:?}"),
        };
        let now = moves.last().map_or(ratio, |moved| of(moved.to));
        let (least, most) = (ratio * 0.25, (ratio * 1.5).min(1.0));
        for moved in moves.iter() {
            prop_assert!((least - 1e-9..=most + 1e-9).contains(&of(moved.to)), "{moved}");
        }
        // While the text grows, steps take longer: by less than a tenth from one move to the next.
        prop_assert!(took <= target.mul_f64(1.1) || now <= least + 1e-9, "{took:?} at {now}");
        prop_assert!(took >= target.mul_f64(0.7) || now >= most - 1e-9, "{took:?} at {now}");
    }
}

#[test]
fn what_the_budget_cannot_help_does_not_move_it() {
    let target = Duration::from_millis(1);
    // Short contexts are read in full, and prompts are, whatever they take.
    let (mut world, moves) = world(0.5, Duration::from_millis(50), target);
    world.submit(simple(60, 30, 0)).unwrap();
    world.run(Vec::new());
    assert_eq!(last(&moves), None);
    for _ in 0..30 {
        world.submit(simple(900, 1, 0)).unwrap();
    }
    world.run(Vec::new());
    assert_eq!(last(&moves), None);
}

#[test]
fn later_requests_start_with_the_budget_of_now_and_own_policies_stay() {
    let (mut world, moves) = world(0.5, Duration::ZERO, Duration::from_millis(5));
    let plan = || Plan { seed: None, ..simple(800, 100, 0) };
    world.submit(plan()).unwrap();
    world.run(Vec::new());
    let Some(BudgetMove { to: Budget::Ratio(now), .. }) = last(&moves) else { panic!("no move") };
    assert!(now < 0.3, "{now}");
    let step = |world: &mut World| {
        let before = world.scheduler.stats().step.sum;
        world.step();
        let seconds = world.scheduler.stats().step.sum - before;
        Duration::from_micros((1e6 * seconds).round() as u64)
    };
    let pages = |ratio: f64| PAGE * (ratio * 201.0) as u32;
    world.submit(plan()).unwrap();
    while world.heard[1].tokens.is_empty() {
        step(&mut world);
    }
    assert_eq!(step(&mut world), pages(now));
    world.scheduler.abort(world.heard[1].id);
    let mut own = plan().request();
    own.attention = Some(AttentionChoice::Policy(policy(0.9)));
    let (submission, _stream) = world.scheduler.intake().take(own, |_| {}).unwrap();
    world.scheduler.add(submission);
    (0..4).for_each(|_| world.step());
    assert_eq!(step(&mut world), pages(0.9));
}

#[test]
fn what_is_computed_again_reads_as_much_as_it_did() {
    // Two of the four fit at last.
    let mut toy = Toy::new(280, 4);
    toy.once = Some(HashMap::new());
    let (mut world, moves) = world_of(toy, 0.9, Duration::ZERO, Duration::from_millis(5));
    let mut said: Vec<Vec<u32>> = vec![Vec::new(); 4];
    for turn in 0..3 {
        for (session, said) in said.iter_mut().enumerate() {
            // No two texts begin alike.
            said.extend((0..60).map(|i| (session as u32 + i) % DRAWN));
            let plan = simple(1, 1, 0);
            let session = Some(session as u8);
            world.submit(Plan { prompt: said.clone(), max_tokens: 120, session, ..plan }).unwrap();
        }
        world.run(Vec::new());
        for (said, heard) in said.iter_mut().zip(&world.heard[4 * turn..]) {
            assert!(matches!(heard.end, Some(Event::Finished(_))), "{:?}", heard.end);
            said.extend(&heard.tokens);
        }
    }
    let stats = world.scheduler.stats();
    assert!(moves.lock().unwrap().len() > 4 && stats.preemptions > 2, "{stats:?}");
    assert!(stats.sessions_evicted > 0 && world.scheduler.runner().selected_again > 500);
}

#[test]
fn without_a_policy_there_is_nothing_to_move() {
    let refused = |attention, min_budget, target| {
        let adaptive = Adaptive { target, min_budget, max_budget: 1.0, on_move: Arc::new(|_| {}) };
        let config =
            EngineConfig { attention, adaptive: Some(adaptive), ..EngineConfig::default() };
        match Scheduler::new(Toy::new(10, 4), config) {
            Err(AdmissionError::Setting { name, .. }) => name,
            other => panic!("{:?}", other.map(|_| ())),
        }
    };
    let ms = Duration::from_millis(1);
    let policy = || AttentionChoice::Policy(policy(0.5));
    assert_eq!(refused(AttentionChoice::Dense, 0.5, ms), "adaptive");
    assert_eq!(refused(policy(), 0.0, ms), "adaptive_min_budget");
    assert_eq!(refused(policy(), 0.5, Duration::ZERO), "target_latency_ms");
}
