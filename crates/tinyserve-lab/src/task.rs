//! Documents with something planted in them, and the questions about it.

use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use rand_chacha::ChaCha8Rng;
use tinyserve_model::{LookupTokens, Tokenizer};

use crate::LabError;

/// A text to read and questions to ask.
#[derive(Debug, Clone)]
pub struct Document {
    /// What is read first, `[context − question]`.
    pub tokens: Vec<u32>,
    /// What is asked, each after the document alone.
    pub questions: Vec<Question>,
}

/// A question about one planted fact.
#[derive(Debug, Clone)]
pub struct Question {
    /// Where the fact lies: 0 at the beginning of the document, 1 at its end.
    pub depth: f64,
    /// What is fed after the document.
    pub tokens: Vec<u32>,
    /// What has to come out, token by token.
    pub answer: Vec<u32>,
}

/// Makes documents.
pub trait NeedleTask {
    /// A document that fills `context` tokens together with its question and answer, with
    /// `pairs` facts.
    ///
    /// # Errors
    /// When they do not fit.
    fn document(
        &self,
        context: usize,
        pairs: usize,
        random: &mut ChaCha8Rng,
    ) -> Result<Document, LabError>;
}

/// Look-ups for models that are made for them: pairs KEY VALUE among fillers.
#[derive(Debug, Clone)]
pub struct LookupTask {
    /// Tokens that texts are made of.
    pub tokens: LookupTokens,
    /// Distractors in each document: tokens that resemble a planted key, each with a value of its
    /// own.
    pub near_keys: usize,
}

fn setting(what: &'static str, found: usize, expected: String) -> LabError {
    LabError::Setting { what, found: found.to_string(), expected }
}

impl NeedleTask for LookupTask {
    fn document(
        &self,
        context: usize,
        pairs: usize,
        random: &mut ChaCha8Rng,
    ) -> Result<Document, LabError> {
        let LookupTokens { keys, values, fillers, near_keys } = &self.tokens;
        if pairs == 0 || pairs > keys.len() {
            return Err(setting("pairs", pairs, format!("1 to {}, the model's keys", keys.len())));
        }
        if self.near_keys > 0 && near_keys.len() != keys.len() {
            let expected = "0: this model has no tokens that resemble its keys".to_owned();
            return Err(setting("near_keys", self.near_keys, expected));
        }
        // The question is one token, and a planted fact two.
        let length = context.saturating_sub(1);
        if length < 4 * (pairs + self.near_keys) {
            let expected =
                format!("at least {} for so many facts", 4 * (pairs + self.near_keys) + 1);
            return Err(setting("context", context, expected));
        }
        let mut tokens: Vec<u32> = (0..length).map(|_| pick(fillers, random)).collect();
        let mut order: Vec<usize> = (0..keys.len()).collect();
        order.shuffle(random);
        let mut questions = Vec::new();
        let mut taken = vec![false; length];
        for (i, &key) in order[..pairs].iter().enumerate() {
            // One fact in each stretch of the document, so that every depth is asked for.
            let (from, to) = (i * length / pairs, (i + 1) * length / pairs - 1);
            let at = random.random_range(from..to);
            let value = pick(values, random);
            tokens[at..at + 2].copy_from_slice(&[keys[key], value]);
            taken[at..at + 2].fill(true);
            questions.push(Question {
                depth: at as f64 / length as f64,
                tokens: vec![keys[key]],
                answer: vec![value],
            });
        }
        let mut left = self.near_keys;
        while left > 0 {
            let at = random.random_range(0..length - 1);
            if !taken[at] && !taken[at + 1] {
                let key = order[random.random_range(0..pairs)];
                tokens[at..at + 2].copy_from_slice(&[near_keys[key], pick(values, random)]);
                taken[at..at + 2].fill(true);
                left -= 1;
            }
        }
        Ok(Document { tokens, questions })
    }
}

fn pick(tokens: &[u32], random: &mut ChaCha8Rng) -> u32 {
    tokens[random.random_range(0..tokens.len())]
}

/// Pass keys in running text, for models that read.
#[derive(Debug)]
pub struct PasskeyTask<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Text that hides them; it is repeated as often as needed.
    pub filler: &'a str,
}

/// Who has a pass key.
const NAMES: [&str; 16] = [
    "Alice", "Brown", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jacob",
    "Kate", "Louis", "Mary", "Noah", "Olive", "Peter",
];

impl PasskeyTask<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>, LabError> {
        Ok(self.tokenizer.encode(text, false)?)
    }
}

impl NeedleTask for PasskeyTask<'_> {
    fn document(
        &self,
        context: usize,
        pairs: usize,
        random: &mut ChaCha8Rng,
    ) -> Result<Document, LabError> {
        if pairs == 0 || pairs > NAMES.len() {
            return Err(setting("pairs", pairs, format!("1 to {} names", NAMES.len())));
        }
        let mut names = NAMES;
        names.shuffle(random);
        let facts = names[..pairs]
            .iter()
            .map(|name| {
                let key = random.random_range(10_000..100_000);
                let question = format!(" The pass key of {name} is");
                let both = self.encode(&format!("{question} {key}"))?;
                let tokens = self.encode(&question)?;
                let fact = self.encode(&format!("{question} {key}."))?;
                if !both.starts_with(&tokens) || both.len() == tokens.len() {
                    return Err(LabError::Setting {
                        what: "tokenizer",
                        found: "one that spells a number differently after its question".to_owned(),
                        expected: "one whose tokens of a text begin with those of its beginning"
                            .to_owned(),
                    });
                }
                let answer = both[tokens.len()..].to_vec();
                Ok((fact, Question { depth: 0.0, tokens, answer }))
            })
            .collect::<Result<Vec<_>, LabError>>()?;
        let planted: usize = facts.iter().map(|(fact, _)| fact.len()).sum();
        let asked = facts.iter().map(|(_, q)| q.tokens.len() + q.answer.len()).max().unwrap_or(0);
        let Some(filler) = context.checked_sub(planted + asked).filter(|&n| n >= pairs) else {
            let expected = format!("at least {} for {pairs} pass keys", planted + asked + pairs);
            return Err(setting("context", context, expected));
        };
        let text = self.encode(self.filler)?;
        if text.is_empty() {
            let expected = "a text to hide pass keys in".to_owned();
            return Err(LabError::Setting { what: "text", found: "empty".to_owned(), expected });
        }
        let start = random.random_range(0..text.len());
        let mut filler_tokens = text.iter().copied().cycle().skip(start).take(filler);
        let mut tokens = Vec::with_capacity(context);
        let mut questions = Vec::new();
        let mut used = 0;
        for (i, (fact, question)) in facts.into_iter().enumerate() {
            let (from, to) = (i * filler / pairs, (i + 1) * filler / pairs);
            let at = random.random_range(from..to.max(from + 1));
            tokens.extend(filler_tokens.by_ref().take(at - used));
            used = at;
            questions.push((tokens.len(), question));
            tokens.extend(fact);
        }
        tokens.extend(filler_tokens);
        let questions = questions
            .into_iter()
            .map(|(at, q)| Question { depth: at as f64 / tokens.len() as f64, ..q })
            .collect();
        Ok(Document { tokens, questions })
    }
}

/// A seed of its own for each document.
pub(crate) fn seeded(seed: u64, document: usize) -> ChaCha8Rng {
    use rand::SeedableRng;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(document as u64);
    let _ = random.next_u32();
    random
}
