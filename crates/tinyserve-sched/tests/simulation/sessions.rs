//! Sessions whose pages go, because somebody else needs them or through a file: what they answer is
//! what they would have answered alone.

use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use tinyserve_kv::{Budget, GroupReduce, KvError, SelectionPolicy};
use tinyserve_model::ModelError;
use tinyserve_sched::{AttentionChoice, Clock, EngineConfig, Event, Request};

use super::{AGEING, Plan, World, quiet_about_the_toy, simple};
use crate::toy::DRAWN;

const LONGEST: usize = 80;
const SESSIONS: usize = 3;

/// One request of a session.
#[derive(Debug, Clone)]
struct Turn {
    /// Goes on from so many tokens of what was said, modulo its length, instead of from all.
    from: Option<usize>,
    new: Vec<u32>,
    max_tokens: usize,
    priority: i32,
    attention: u8,
    forgets: bool,
}

#[derive(Debug, Clone)]
enum Move {
    /// The session's next turn, if its last one has ended.
    Next(usize),
    /// Saves the session and restores it.
    File(usize),
    Rival(usize, usize, i32),
    /// Somebody else has the session's text, and computes it as a prompt.
    Echo(usize),
    Steps(usize),
}

fn attention(choice: u8) -> AttentionChoice {
    let narrow = SelectionPolicy {
        budget: Budget::Ratio(0.3),
        sink_pages: 1,
        recent_pages: 1,
        dense_layers: 0,
        min_context: 8,
        ..SelectionPolicy::default()
    };
    let (budget, sink_pages, min_context) = (Budget::Tokens(10), 0, 0);
    match choice {
        0 => AttentionChoice::Dense,
        1 => AttentionChoice::Policy(narrow),
        // One that computes one token in a step.
        _ => AttentionChoice::Policy(SelectionPolicy {
            budget,
            sink_pages,
            min_context,
            group_reduce: GroupReduce::SoftmaxVote,
            ..narrow
        }),
    }
}

fn turn() -> impl Strategy<Value = Turn> {
    let from = prop::option::weighted(0.2, 0..LONGEST);
    let new = prop::collection::vec(0..DRAWN, 1..8);
    let forgets = prop::bool::weighted(0.3);
    (from, new, 1..14_usize, -1..2_i32, 0..3_u8, forgets).prop_map(
        |(from, new, max_tokens, priority, attention, forgets)| Turn {
            from,
            new,
            max_tokens,
            priority,
            attention,
            forgets,
        },
    )
}

fn one_move() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => (0..SESSIONS).prop_map(Move::Next),
        1 => (0..SESSIONS).prop_map(Move::File),
        2 => (1..20_usize, 1..20_usize, -1..2_i32).prop_map(|(p, n, prio)| Move::Rival(p, n, prio)),
        1 => (0..SESSIONS).prop_map(Move::Echo),
        4 => (1..12_usize).prop_map(Move::Steps),
    ]
}

/// A session, and how far it is.
struct Talk<'a> {
    name: usize,
    turns: &'a [Turn],
    /// Place in `World::heard` of the turn that was submitted last.
    heard: Option<usize>,
    said: Vec<u32>,
    answers: Vec<Vec<u32>>,
}

impl<'a> Talk<'a> {
    fn new(name: usize, turns: &'a [Turn]) -> Self {
        Self { name, turns, heard: None, said: Vec::new(), answers: Vec::new() }
    }

    /// Whether no turn runs; what the last one said is then known.
    fn rests(&mut self, world: &World) -> bool {
        let Some(heard) = self.heard.map(|index| &world.heard[index]) else { return true };
        match &heard.end {
            None => return false,
            Some(Event::Finished(_)) => {}
            other => panic!("{other:?}"),
        }
        self.said.extend(&heard.tokens);
        self.answers.push(heard.tokens.clone());
        self.heard = None;
        true
    }

    /// Submits the next turn if it is time; tells whether there are more to come.
    fn next(&mut self, world: &mut World) -> bool {
        if !self.rests(world) {
            return true;
        }
        let Some((turn, rest)) = self.turns.split_first() else { return false };
        self.turns = rest;
        if let Some(from) = turn.from {
            self.said.truncate(from % (self.said.len() + 1));
        }
        self.said.extend(&turn.new);
        if self.said.len() + turn.max_tokens > LONGEST {
            self.turns = &[];
            return false;
        }
        let plan = Plan {
            prompt: self.said.clone(),
            max_tokens: turn.max_tokens,
            priority: turn.priority,
            session: Some(self.name as u8),
            scores_prompt: false,
            seed: None,
            forgets: turn.forgets,
        };
        let request = Request { attention: Some(attention(turn.attention)), ..plan.request() };
        self.heard = Some(world.heard.len());
        world.submit_request(request, plan).unwrap();
        true
    }

    /// Saves the session and restores it when there is room; what was pruned is not saved.
    fn through_a_file(&mut self, world: &mut World) {
        let (id, path) = (self.name.to_string(), Path::new("a file"));
        if !self.rests(world) || world.scheduler.save_session(&id, path, "toy").is_err() {
            return;
        }
        assert!(world.scheduler.delete_session(&id));
        loop {
            match world.scheduler.restore_session(&id, path, "toy") {
                Ok(info) => return assert!(info.cached_tokens > 0 || info.cached_pages == 0),
                Err(ModelError::Kv(KvError::OutOfPages { .. })) => world.step(),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// What a session answers when nobody else is there and pages abound.
fn alone(name: usize, turns: &[Turn]) -> Vec<Vec<u32>> {
    let clock = Clock::manual();
    let config = EngineConfig { clock, max_sequence_length: LONGEST, ..EngineConfig::default() };
    let mut world = World::new((config, 1000, 4));
    let mut talk = Talk::new(name, turns);
    while talk.next(&mut world) {
        world.step();
    }
    assert_eq!(world.scheduler.stats().preemptions + world.scheduler.stats().sessions_evicted, 0);
    talk.answers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn sessions_answer_as_they_do_alone(
        scripts in prop::array::uniform3(prop::collection::vec(turn(), 1..5)),
        moves in prop::collection::vec(one_move(), 0..40),
        (seqs, more, chunk, spare) in (1..5_usize, 0..12_usize, 1..9_usize, 0..12_usize),
    ) {
        quiet_about_the_toy();
        let config = EngineConfig {
            max_num_seqs: seqs,
            max_num_batched_tokens: seqs + more,
            attention_chunk_size: chunk,
            max_sequence_length: LONGEST,
            priority_ageing: AGEING,
            session_timeout: Duration::from_secs(3600),
            clock: Clock::manual(),
            ..EngineConfig::default()
        };
        let mut world = World::new((config, LONGEST / 4 + spare, 4));
        let mut talks: Vec<_> =
            scripts.iter().enumerate().map(|(name, turns)| Talk::new(name, turns)).collect();
        for one in moves {
            match one {
                Move::Next(session) => drop(talks[session].next(&mut world)),
                Move::File(session) => talks[session].through_a_file(&mut world),
                Move::Rival(prompt, tokens, priority) => {
                    world.submit(simple(prompt, tokens, priority)).unwrap();
                }
                Move::Echo(session) => {
                    let prompt = [&*talks[session].said, &[0]].concat();
                    world.submit(Plan { prompt, ..simple(1, 1, 0) }).unwrap();
                }
                Move::Steps(steps) => (0..steps).for_each(|_| world.step()),
            }
        }
        for _ in 0..20_000 {
            let more = talks.iter_mut().filter_map(|talk| talk.next(&mut world).then_some(())).count();
            if more == 0 {
                break;
            }
            world.step();
        }
        for (name, (talk, turns)) in talks.iter().zip(&scripts).enumerate() {
            prop_assert!(talk.heard.is_none());
            prop_assert_eq!(&talk.answers, &alone(name, turns));
        }
    }
}
