//! Pruned sequences go on as if they had never read the tokens that are gone, and what a step tells
//! about attention is true.

use tinyserve_kernels::{Attention, Cpu};
use tinyserve_kv::{KvFormat, PageSelector, SelectInput};
use tinyserve_model::{LogitRows, Observe};
use tinyserve_tests::{Runner, Sequence, assert_close, cpu, golden};

const MODELS: [&str; 2] = ["gpt2-tiny", "llama-gqa"];
const PAGES: usize = 300;

fn runner(name: &str, page_size: usize) -> Runner<Cpu> {
    Runner::new(cpu(), &golden(name), (page_size, KvFormat::F32, PAGES))
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| 3 + i * 37 % 200).collect()
}

/// Reads every page but those of some tokens; with pages of one token that is what pruning leaves.
struct Without(Vec<u32>);

impl PageSelector for Without {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        assert_eq!(input.page_size(), 1);
        selected.extend((0..input.page_count() as u32).filter(|page| !self.0.contains(page)));
        true
    }
}

fn prefilled(runner: &mut Runner<Cpu>, tokens: &[u32]) -> Sequence {
    let mut sequence = runner.sequence(tokens, LogitRows::Last);
    runner.step(&mut [&mut sequence], Attention::Dense);
    sequence
}

fn prune(runner: &mut Runner<Cpu>, sequence: &mut Sequence, places: &[u32]) {
    let Runner { model, cache, .. } = runner;
    cache.prune(model.backend(), &mut sequence.table, places).unwrap();
}

fn step(
    runner: &mut Runner<Cpu>,
    sequence: &mut Sequence,
    token: u32,
    how: Attention<'_>,
) -> Vec<f32> {
    sequence.next = vec![token];
    runner.step(&mut [sequence], how);
    runner.output.logits(0).next().unwrap().to_vec()
}

#[test]
fn a_pruned_sequence_goes_on_without_the_tokens_at_their_true_positions() {
    for name in MODELS {
        for page_size in [1, 4, 16] {
            let (mut pruned, mut whole) = (runner(name, page_size), runner(name, 1));
            let prompt = prompt(45);
            let mut one = prefilled(&mut pruned, &prompt);
            let mut other = prefilled(&mut whole, &prompt);
            // Positions that go, in three prunings; places differ from the second on.
            let gone: Vec<u32> = vec![0, 3, 4, 5, 6, 7, 8, 20, 33, 41];
            let mut done: Vec<u32> = Vec::new();
            let mut token = 9;
            for part in [&gone[..4], &gone[4..9], &gone[9..]] {
                let place = |position: &u32| {
                    position - done.iter().filter(|d| *d < position).count() as u32
                };
                let places: Vec<u32> = part.iter().map(place).collect();
                prune(&mut pruned, &mut one, &places);
                done.extend_from_slice(part);
                let selector = Without(done.clone());
                for _ in 0..4 {
                    let found = step(&mut pruned, &mut one, token, Attention::Dense);
                    let expected =
                        step(&mut whole, &mut other, token, Attention::Custom(&selector));
                    assert_close(name, &found, &expected, 1e-4);
                    token = 3 + (token * 11) % 200;
                }
            }
            assert_eq!(one.table.len() + gone.len(), other.table.len());
            assert_eq!(one.table.next_position(), other.table.next_position());
            let pages = pruned.cache.layout().pages_for(one.table.len());
            assert_eq!(pruned.cache.pool().used_pages(), pages);
            pruned.cache.release(one.table);
            assert_eq!(pruned.cache.pool().used_pages(), 0);
        }
    }
}

#[test]
fn pruning_nothing_and_looking_on_change_no_bit() {
    for name in MODELS {
        let mut runner = runner(name, 4);
        let prompt = prompt(30);
        let mut plain = prefilled(&mut runner, &prompt);
        let mut watched = runner.sequence(&prompt, LogitRows::Last);
        watched.observe = Observe { entropy: true, mass_rows: usize::MAX };
        runner.step(&mut [&mut watched], Attention::Dense);
        for token in [7, 8, 9] {
            prune(&mut runner, &mut watched, &[]);
            let expected = step(&mut runner, &mut plain, token, Attention::Dense);
            let found = step(&mut runner, &mut watched, token, Attention::Dense);
            assert_eq!(found, expected, "{name}");
        }
    }
}

#[test]
fn a_step_tells_of_each_sequence_what_it_asks_for() {
    for name in MODELS {
        let mut runner = runner(name, 4);
        let heads = runner.model.config().q_heads;
        let layers = runner.model.config().layers;
        let (one, two) = (prompt(21), prompt(9));
        let mut mass = runner.sequence(&one, LogitRows::Last);
        mass.observe = Observe { entropy: false, mass_rows: 5 };
        let mut entropy = runner.sequence(&two, LogitRows::Last);
        entropy.observe = Observe { entropy: true, mass_rows: 0 };
        let mut nothing = runner.sequence(&two, LogitRows::Last);
        runner.step(&mut [&mut nothing, &mut mass, &mut entropy], Attention::Dense);
        let out = &runner.output;
        assert!(out.attention_entropy(0).is_none() && out.attention_mass(0).is_none());
        assert!(out.attention_entropy(1).is_none() && out.attention_mass(2).is_none());
        let told = out.attention_mass(1).unwrap();
        assert_eq!(told.len(), one.len());
        // Every head of every layer gives each row's weights, one in all.
        let sum: f32 = told.iter().sum();
        assert!((sum - (5 * heads * layers) as f32).abs() < 1e-3, "{name}: {sum}");
        // The last token was seen by the last row only.
        assert!(told[20] <= (heads * layers) as f32);
        let told = out.attention_entropy(2).unwrap().to_vec();
        assert_eq!(told.len(), heads * layers);
        let most = (two.len() as f32).ln();
        assert!(told.iter().all(|&x| (0.0..=most + 1e-5).contains(&x)), "{name}: {told:?}");
        assert!(told.iter().any(|&x| x > 0.1), "{name}: {told:?}");
        // Alone, it tells the same.
        let mut alone = runner.sequence(&two, LogitRows::Last);
        alone.observe = entropy.observe;
        runner.step(&mut [&mut alone], Attention::Dense);
        assert_eq!(runner.output.attention_entropy(0).unwrap(), told);
        // What was observed once is not told again.
        runner.step(&mut [&mut nothing], Attention::Dense);
        assert!(runner.output.attention_entropy(0).is_none());
    }
}

#[test]
fn a_copy_and_a_fork_of_a_pruned_sequence_go_on_like_it() {
    let mut runner = runner("llama-gqa", 4);
    let mut own = prefilled(&mut runner, &prompt(30));
    prune(&mut runner, &mut own, &[1, 2, 9, 11]);
    let mut fork = runner.sequence(&[], LogitRows::Last);
    fork.table = runner.cache.fork(&own.table);
    let mut copy = runner.sequence(&[], LogitRows::Last);
    copy.table = runner.cache.duplicate(runner.model.backend(), &own.table).unwrap();
    let expected = step(&mut runner, &mut own, 5, Attention::Dense);
    for mut other in [fork, copy] {
        let found = step(&mut runner, &mut other, 5, Attention::Dense);
        assert_eq!(found, expected);
        runner.cache.release(other.table);
    }
}
