//! Thousands of schedules on a clock that is moved by hand and a toy in a model's place.
#![forbid(unsafe_code)]

mod adaptive;
mod sessions;
mod toy;

use std::collections::HashMap;
use std::sync::Once;
use std::time::Duration;

use proptest::prelude::*;
use tinyserve_model::SamplingParams;
use tinyserve_plugins::{
    Action, HookResult, Needs, Plugin, PluginManager, PrefillContext, StepContext,
};
use tinyserve_sched::{
    AdmissionError, Clock, Engine, EngineConfig, EngineState, Event, EventStream, FailureKind,
    Finished, Request, RequestId, Runner, Scheduler,
};
use toy::{DRAWN, FAILS, PANIC, PANICS, Toy, next};

const AGEING: Duration = Duration::from_millis(100);

/// What happens to a scheduler from outside.
#[derive(Debug, Clone)]
enum Move {
    Submit(Plan),
    /// Ends the request of this number, modulo how many there are.
    Abort(usize),
    /// Loses interest in it.
    Drop(usize),
    Steps(usize),
    Wait(u64),
    Delete(u8),
}

/// A request of a test.
#[derive(Debug, Clone)]
struct Plan {
    prompt: Vec<u32>,
    max_tokens: usize,
    priority: i32,
    session: Option<u8>,
    scores_prompt: bool,
    seed: Option<u64>,
    /// Whether a plugin takes tokens out of its cache.
    forgets: bool,
}

impl Plan {
    fn request(&self) -> Request {
        let sampling = match self.seed {
            Some(_) => SamplingParams {
                temperature: 1.0,
                top_p: 1.0,
                seed: self.seed,
                ..SamplingParams::default()
            },
            None => SamplingParams::greedy(),
        };
        let mut request =
            Request::new(&*self.prompt).max_tokens(self.max_tokens).sampling(sampling);
        request.priority = self.priority;
        request.session = self.session.map(|session| session.to_string());
        request.prompt_logprobs = self.scores_prompt.then_some(0);
        if self.forgets {
            request.plugins = vec![("forgetful".to_owned(), true)];
        }
        request
    }

    /// Whether its prompt cannot be computed.
    fn fails(&self) -> bool {
        self.prompt.iter().any(|&token| token >= FAILS)
    }
}

fn plan() -> impl Strategy<Value = Plan> {
    let token = prop_oneof![60 => 0..DRAWN, 1 => Just(FAILS), 1 => Just(PANICS)];
    let prompt = prop_oneof![
        // Many start alike, so that what a session kept is of use.
        4 => (0..4_u32, 1..30_usize).prop_map(|(first, n)| {
            let mut tokens = vec![first];
            (1..n).for_each(|_| tokens.push(next(&tokens)));
            tokens
        }),
        2 => prop::collection::vec(token, 1..30),
    ];
    let session = prop::option::weighted(0.4, 0..3_u8);
    let seed = prop::option::weighted(0.3, any::<u64>());
    let flags = (prop::bool::weighted(0.1), prop::bool::weighted(0.3));
    (prompt, 1..20_usize, -2..3_i32, session, flags, seed).prop_map(
        |(prompt, max_tokens, priority, session, (scores_prompt, forgets), seed)| Plan {
            prompt,
            max_tokens,
            priority,
            session,
            scores_prompt,
            seed,
            // A session goes on from what an earlier request forgot, and alone there is none.
            forgets: forgets && session.is_none(),
        },
    )
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        6 => plan().prop_map(Move::Submit),
        1 => (0..100_usize).prop_map(Move::Abort),
        1 => (0..100_usize).prop_map(Move::Drop),
        4 => (1..8_usize).prop_map(Move::Steps),
        2 => (1..200_u64).prop_map(Move::Wait),
        1 => (0..3_u8).prop_map(Move::Delete),
    ];
    prop::collection::vec(one, 1..50)
}

fn config() -> impl Strategy<Value = (EngineConfig, usize, usize)> {
    (1..6_usize, 0..12_usize, 1..9_usize, 8..40_usize, prop::sample::select(vec![1, 2, 4, 5]))
        .prop_map(|(seqs, more, chunk, pages, page_size)| {
            let config = EngineConfig {
                max_num_seqs: seqs,
                max_num_batched_tokens: seqs + more,
                attention_chunk_size: chunk,
                max_sequence_length: 60,
                priority_ageing: AGEING,
                session_timeout: Duration::from_millis(500),
                clock: Clock::manual(),
                ..EngineConfig::default()
            };
            (config, pages, page_size)
        })
}

/// Forgets some tokens of the prompt, which depend on where its request began to compute, and of the
/// answer now and then.
struct Forgetful;

/// What [`Forgetful`] remembers of a request.
#[derive(Default)]
struct Memory {
    began: usize,
    steps: usize,
}

impl Plugin for Forgetful {
    fn needs(&self) -> Needs {
        // So no other requests decide where one begins.
        Needs { attention_mass: true, ..Needs::default() }
    }

    fn on_prefill(&self, context: &mut PrefillContext<'_>) -> HookResult {
        assert!(context.is_first() || context.computed().start > 0);
        if context.is_first() {
            context.state::<Memory>().began = context.computed().start;
        }
        let forgets = context.is_last() && context.cached_tokens() > 4;
        let also = if context.state::<Memory>().began.is_multiple_of(2) { 3 } else { 2 };
        Ok(if forgets { Action::Prune(vec![1, also]) } else { Action::Continue })
    }

    fn on_step(&self, context: &mut StepContext<'_>) -> HookResult {
        let (cached, generated) = (context.cached_tokens() as u32, context.generated().len());
        context.state::<Memory>().steps += 1;
        assert_eq!(context.state::<Memory>().steps, generated + 1, "it sees each step once");
        let forgets = generated % 4 != 1 && cached > 5;
        Ok(if forgets { Action::Prune(vec![2, cached - 2]) } else { Action::Continue })
    }
}

/// What is known of a request from its events.
struct Heard {
    plan: Plan,
    stream: Option<EventStream>,
    id: RequestId,
    submitted: u64,
    started: bool,
    told_prompt: usize,
    tokens: Vec<u32>,
    terminals: usize,
    end: Option<Event>,
}

impl Heard {
    fn listen(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        while let Some(event) = stream.try_next() {
            assert_eq!(self.terminals, 0, "{event:?} comes after the end");
            match event {
                Event::Started { .. } => {
                    assert!(!self.started, "it started twice");
                    self.started = true;
                }
                Event::Prompt(tokens) => self.told_prompt += tokens.len(),
                Event::Token(token) => self.tokens.push(token.id),
                Event::Prefill { .. } => {}
                end => {
                    self.terminals += 1;
                    self.end = Some(end);
                }
            }
        }
    }
}

struct World {
    scheduler: Scheduler<Toy>,
    clock: Clock,
    milliseconds: u64,
    heard: Vec<Heard>,
    aborts: std::sync::Arc<std::sync::Mutex<Vec<RequestId>>>,
}

impl World {
    fn new((config, pages, page_size): (EngineConfig, usize, usize)) -> Self {
        let plugins = PluginManager::new();
        plugins.register("forgetful", Forgetful).unwrap();
        plugins.disable("forgetful").unwrap();
        Self::of(Toy::new(pages, page_size), EngineConfig { plugins, ..config })
    }

    fn of(toy: Toy, config: EngineConfig) -> Self {
        let clock = config.clock.clone();
        let scheduler = Scheduler::new(toy, config).unwrap();
        let aborts = std::sync::Arc::default();
        Self { scheduler, clock, milliseconds: 0, heard: Vec::new(), aborts }
    }

    fn submit(&mut self, plan: Plan) -> Result<(), AdmissionError> {
        self.submit_request(plan.request(), plan)
    }

    fn submit_request(&mut self, request: Request, plan: Plan) -> Result<(), AdmissionError> {
        let aborts = std::sync::Arc::clone(&self.aborts);
        let abort = move |id| aborts.lock().unwrap().push(id);
        let (submission, stream) = self.scheduler.intake().take(request, abort)?;
        self.scheduler.add(submission);
        self.heard.push(Heard {
            plan,
            id: stream.id(),
            stream: Some(stream),
            submitted: self.milliseconds,
            started: false,
            told_prompt: 0,
            tokens: Vec::new(),
            terminals: 0,
            end: None,
        });
        Ok(())
    }

    fn step(&mut self) {
        for id in std::mem::take(&mut *self.aborts.lock().unwrap()) {
            self.scheduler.abort(id);
        }
        let started_before: Vec<bool> = self.heard.iter().map(|heard| heard.started).collect();
        self.scheduler.step();
        self.heard.iter_mut().for_each(Heard::listen);
        self.check_pages();
        self.check_order(&started_before);
        self.clock.advance(Duration::from_millis(1));
        self.milliseconds += 1;
    }

    /// No page is lost, none is held twice.
    fn check_pages(&self) {
        let pool = self.scheduler.runner().pool();
        assert!(pool.is_consistent());
        let mut held = HashMap::new();
        for page in self.scheduler.held_pages() {
            *held.entry(page).or_insert(0) += 1;
        }
        let used = pool.used_pages() - pool.idle_pages();
        assert_eq!(held.len(), used, "pages that somebody holds, and pages in use");
        for (page, count) in held {
            // The index of prefixes may be one more holder.
            assert!([count, count + 1].contains(&pool.holders(page)), "{page:?}: {count}");
        }
    }

    /// Whoever started before somebody who came earlier and still waits had the better priority,
    /// by more than the waiting made up for.
    fn check_order(&self, started_before: &[bool]) {
        for (starter, before) in self.heard.iter().zip(started_before) {
            if *before || !starter.started {
                continue;
            }
            // Requests of sessions also wait for each other.
            let waiting = self.heard.iter().filter(|other| {
                !other.started
                    && other.end.is_none()
                    && other.stream.is_some()
                    && other.plan.session.is_none()
                    && other.id < starter.id
            });
            for other in waiting {
                let later = Duration::from_millis(starter.submitted - other.submitted);
                let better = other.plan.priority - starter.plan.priority;
                assert!(
                    better > 0 && later <= AGEING * better as u32,
                    "priority {} after {later:?} overtakes priority {}",
                    starter.plan.priority,
                    other.plan.priority,
                );
            }
        }
    }

    fn run(&mut self, moves: Vec<Move>) {
        for one in moves {
            let count = self.heard.len().max(1);
            match one {
                Move::Submit(plan) => match self.submit(plan) {
                    Ok(()) | Err(AdmissionError::NeverFits { .. }) => {}
                    Err(error) => panic!("{error}"),
                },
                Move::Abort(index) => {
                    let id = self.heard.get(index % count).map(|heard| heard.id);
                    id.into_iter().for_each(|id| self.scheduler.abort(id));
                    self.heard.iter_mut().for_each(Heard::listen);
                    self.check_pages();
                }
                Move::Drop(index) => {
                    if let Some(heard) = self.heard.get_mut(index % count) {
                        heard.stream = None;
                    }
                }
                Move::Steps(n) => (0..n).for_each(|_| self.step()),
                Move::Wait(ms) => {
                    self.clock.advance(Duration::from_millis(ms));
                    self.milliseconds += ms;
                }
                Move::Delete(session) => {
                    self.scheduler.delete_session(&session.to_string());
                    self.check_pages();
                }
            }
        }
        // Each step draws or computes at least one token of somebody.
        for _ in 0..20_000 {
            if self.scheduler.is_idle() && self.aborts.lock().unwrap().is_empty() {
                return;
            }
            self.step();
        }
        panic!("the scheduler does not come to an end");
    }
}

/// What a request draws when nobody else is there and pages abound.
fn alone(plan: &Plan) -> Vec<u32> {
    let clock = Clock::manual();
    let config = EngineConfig { clock, max_sequence_length: 60, ..EngineConfig::default() };
    let mut world = World::new((config, 100, 4));
    world.submit(Plan { session: None, ..plan.clone() }).unwrap();
    world.run(Vec::new());
    world.heard.pop().unwrap().tokens
}

fn quiet_about_the_toy() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let message = info.payload().downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| info.payload().downcast_ref::<&str>().copied());
            if message != Some(PANIC) {
                told(info);
            }
        }));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn every_schedule_ends_well(config in config(), moves in moves()) {
        quiet_about_the_toy();
        let (most_tokens, most_seqs) = (config.0.max_num_batched_tokens, config.0.max_num_seqs);
        let mut world = World::new(config);
        world.run(moves);
        let toy = world.scheduler.runner();
        prop_assert!(toy.largest_step <= most_tokens && toy.widest_step <= most_seqs);
        let mut ends = [0; 4];
        for heard in &mut world.heard {
            heard.listen();
            if heard.stream.is_none() {
                continue;
            }
            prop_assert_eq!(heard.terminals, 1, "{:?}", heard.plan);
            match heard.end.as_ref().unwrap() {
                Event::Failed(failure) => {
                    ends[0] += 1;
                    prop_assert!(heard.plan.fails(), "{}", failure);
                    let kinds = [FailureKind::Model, FailureKind::Panic];
                    prop_assert!(kinds.contains(&failure.kind));
                    prop_assert!(heard.tokens.is_empty());
                }
                Event::Finished(Finished { summary, .. }) => {
                    ends[1] += 1;
                    prop_assert!(!heard.plan.fails());
                    prop_assert_eq!(&heard.tokens, &alone(&heard.plan), "{:?}", heard.plan);
                    prop_assert_eq!(summary.usage.completion_tokens, heard.tokens.len());
                    let scored = if heard.plan.scores_prompt { heard.plan.prompt.len() } else { 0 };
                    prop_assert_eq!(heard.told_prompt, scored);
                }
                Event::Aborted(_) => {
                    ends[2] += 1;
                    let whole = if heard.plan.fails() { vec![] } else { alone(&heard.plan) };
                    prop_assert!(whole.starts_with(&heard.tokens));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
        // After all sessions have timed out, nobody holds anything.
        world.clock.advance(Duration::from_secs(1));
        world.scheduler.expire_sessions();
        let pool = world.scheduler.runner().pool();
        prop_assert_eq!(pool.used_pages(), pool.idle_pages());
        let stats = world.scheduler.stats();
        prop_assert_eq!((stats.running, stats.waiting, stats.queued_requests), (0, 0, 0));
        prop_assert_eq!((stats.queued_tokens, stats.sessions, stats.pages_used), (0, 0, 0));
        let ended = stats.finished_stop + stats.finished_length + stats.aborted + stats.failed;
        prop_assert_eq!(stats.requests, ended);
    }
}

/// A world of `pages` pages of four tokens, as many sequences as there are, without ageing to speak of.
fn world(pages: usize) -> World {
    let config = EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 16,
        max_sequence_length: 60,
        priority_ageing: AGEING,
        clock: Clock::manual(),
        ..EngineConfig::default()
    };
    World::new((config, pages, 4))
}

fn simple(prompt: usize, max_tokens: usize, priority: i32) -> Plan {
    let prompt = (0..prompt as u32).map(|i| i % DRAWN).collect();
    let (session, scores_prompt, seed, forgets) = (None, false, None, false);
    Plan { prompt, max_tokens, priority, session, scores_prompt, seed, forgets }
}

#[test]
fn the_lowest_priority_and_newest_gives_its_pages() {
    let mut world = world(12);
    for priority in [0, 1, 1, 0] {
        world.submit(simple(4, 30, priority)).unwrap();
    }
    world.run(Vec::new());
    let preemptions: Vec<u32> = world
        .heard
        .iter()
        .map(|heard| match &heard.end {
            Some(Event::Finished(finished)) => finished.summary.timings.preemptions,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(preemptions[2] > 0 && preemptions[2] >= preemptions[1], "{preemptions:?}");
    assert_eq!(preemptions[0], 0, "{preemptions:?}");
    assert!(preemptions[1] >= preemptions[3], "{preemptions:?}");
    for heard in &world.heard {
        assert_eq!(heard.tokens, alone(&heard.plan));
    }
}

#[test]
fn decodes_come_before_prompts() {
    let mut world = world(100);
    world.submit(simple(4, 40, 0)).unwrap();
    world.step();
    assert_eq!(world.heard[0].tokens.len(), 1);
    (0..4).for_each(|_| world.submit(simple(40, 5, -2)).unwrap());
    for step in 2..12 {
        world.step();
        assert_eq!(world.heard[0].tokens.len(), step, "a token in every step");
    }
}

#[test]
fn nobody_starves() {
    let mut world = world(100);
    // More of better priority than can be served, for ever.
    (0..8).for_each(|_| world.submit(simple(8, 20, 0)).unwrap());
    world.step();
    world.submit(simple(4, 2, 3)).unwrap();
    let patient = world.heard.len() - 1;
    for _ in 0..2000 {
        world.submit(simple(8, 20, 0)).unwrap();
        world.step();
        if world.heard[patient].end.is_some() {
            // Three steps of priority are worth 300 ms of arrivals: those 300 requests of some 21
            // steps each, eight at a time, come before it, and nobody else.
            assert!((300..1000).contains(&world.milliseconds), "{} ms", world.milliseconds);
            return;
        }
    }
    panic!("it starved");
}

#[test]
fn ten_thousand_requests_leave_nothing_behind() {
    quiet_about_the_toy();
    let mut world = world(10);
    let mut random = 1_u64;
    let mut draw = move |n: u64| {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % n
    };
    let mut ended = 0;
    for _ in 0..10_000 {
        let mut plan = simple(1 + draw(20) as usize, 1 + draw(10) as usize, draw(3) as i32);
        plan.session = (draw(4) == 0).then(|| draw(5) as u8);
        world.submit(plan).unwrap();
        if draw(3) == 0 {
            let index = draw(world.heard.len() as u64) as usize;
            world.scheduler.abort(world.heard[index].id);
        }
        (0..draw(6)).for_each(|_| world.step());
        let before = world.heard.len();
        world.heard.retain(|heard| heard.end.is_none());
        ended += before - world.heard.len();
    }
    world.run(Vec::new());
    world.heard.iter_mut().for_each(Heard::listen);
    ended += world.heard.iter().filter(|heard| heard.end.is_some()).count();
    assert_eq!(ended, 10_000);
    world.scheduler.clear_sessions();
    assert_eq!(world.scheduler.stats().pages_used, 0);
    assert!(world.scheduler.stats().preemptions > 0);
}

#[test]
fn what_a_dead_replica_had_fails_and_others_go_on() {
    quiet_about_the_toy();
    let mut broken = Toy::new(20, 4);
    broken.dies_at = Some(3);
    let config = EngineConfig { max_sequence_length: 60, ..EngineConfig::default() };
    let engine = Engine::start_replicas("toy", vec![broken, Toy::new(20, 4)], &config).unwrap();
    let plan = simple(4, 20, 0);
    let request = |session: u32| plan.request().session(session.to_string());
    let mut failed = 0;
    for session in 0..20 {
        match engine.submit(request(session)).unwrap().last().unwrap() {
            Event::Finished(_) => {}
            Event::Failed(failure) => {
                assert_eq!(failure.kind, FailureKind::EngineStopped, "{failure}");
                failed += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(failed, 1, "the request that the replica died of");
    let states = engine.replica_states();
    assert_eq!(states, [EngineState::Stopped, EngineState::Running]);
    assert_eq!(engine.state(), EngineState::Running);
    // Nobody counts on what it had.
    let stats = engine.stats();
    assert_eq!((stats.requests, stats.failed, stats.finished_length), (20, 1, 19));
    assert_eq!((stats.running, stats.waiting, stats.pages), (0, 0, 20));
    // Its sessions start again elsewhere.
    for session in 0..20 {
        assert!(matches!(
            engine.submit(request(session)).unwrap().last(),
            Some(Event::Finished(_))
        ));
    }
    assert_eq!(engine.list_sessions().wait().unwrap().len(), 20);
}
