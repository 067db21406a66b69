//! Needles: facts that were planted far back, and whether they are found.

use serde::Serialize;
use tinyserve_kernels::{AttendStats, Backend};
use tinyserve_kv::PageTable;
use tinyserve_model::LogitRows;

use crate::task::seeded;
use crate::{BudgetFields, Control, LabError, NeedleTask, Probe, Question, Trial};

/// Cells of the depth axis of a heat map.
const DEPTHS: usize = 10;

/// What to ask.
#[derive(Debug, Clone, Copy)]
pub struct NeedleTest {
    /// Tokens of a document, its question and its answer.
    pub context: usize,
    /// Facts in one document; 1 is the passkey test, more are key-value retrieval.
    pub pairs: usize,
    /// Questions in all.
    pub samples: usize,
    /// The same seed gives the same documents.
    pub seed: u64,
}

impl Default for NeedleTest {
    fn default() -> Self {
        Self { context: 4096, pairs: 32, samples: 32, seed: 0 }
    }
}

/// Questions about facts of similar depth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DepthCell {
    /// Depths from here, as a share of the document …
    pub from: f64,
    /// … to here.
    pub to: f64,
    /// Questions.
    pub samples: usize,
    /// Questions that were answered in full.
    pub correct: usize,
}

/// How one trial answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NeedleRow {
    /// The method's name.
    pub policy: &'static str,
    /// Its budget.
    #[serde(flatten)]
    pub budget: BudgetFields,
    /// Tokens of a document with question and answer.
    pub context: usize,
    /// Facts in a document.
    pub pairs: usize,
    /// Questions that were asked.
    pub samples: usize,
    /// Questions that were answered in full.
    pub correct: usize,
    /// Their share.
    pub accuracy: f64,
    /// KV bytes read over those of dense attention, in the steps of question and answer.
    pub bytes_read_ratio: Option<f64>,
    /// By depth.
    pub depths: Vec<DepthCell>,
}

/// Asks `test.samples` questions of each trial; stops early when `control` says no, with the
/// questions that all trials have answered until then.
///
/// A document is read once, densely; each question is then fed token by token through the trial's
/// selection, over the shared pages, and the answer is drawn greedily the same way.
///
/// # Errors
/// When the documents do not fit, or the model fails.
pub fn needle<B: Backend>(
    probe: &mut Probe<B>,
    task: &dyn NeedleTask,
    test: &NeedleTest,
    trials: &[Trial],
    control: &mut Control<'_>,
) -> Result<Vec<NeedleRow>, LabError> {
    let limit = probe.model().config().max_positions;
    if test.context > limit {
        return Err(LabError::Setting {
            what: "context",
            found: test.context.to_string(),
            expected: format!("at most {limit}, the model's context"),
        });
    }
    let mut rows: Vec<_> =
        trials.iter().map(|trial| (row(trial, test), AttendStats::default())).collect();
    let (mut asked, mut number) = (0, 0);
    'documents: while asked < test.samples {
        let document = task.document(test.context, test.pairs, &mut seeded(test.seed, number))?;
        number += 1;
        let Some((table, prompt)) = probe.prefill(&document.tokens, control)? else { break };
        for question in document.questions.iter().take(test.samples - asked) {
            let mut answers = Vec::new();
            for trial in trials {
                let chooser = trial.start(&prompt);
                match answer(probe, &table, question, &chooser) {
                    Ok(found) => answers.push(found),
                    Err(error) => {
                        probe.release(table);
                        return Err(error);
                    }
                }
                if !control(
                    "questions",
                    asked * trials.len() + answers.len(),
                    test.samples * trials.len(),
                ) {
                    probe.release(table);
                    break 'documents;
                }
            }
            // Only whole questions count, so that all rows have answered the same ones.
            for ((row, stats), (correct, read)) in rows.iter_mut().zip(answers) {
                let cell = ((question.depth * DEPTHS as f64) as usize).min(DEPTHS - 1);
                row.samples += 1;
                row.correct += usize::from(correct);
                row.depths[cell].samples += 1;
                row.depths[cell].correct += usize::from(correct);
                stats.add(&read);
            }
            asked += 1;
        }
        probe.release(table);
    }
    Ok(rows
        .into_iter()
        .map(|(mut row, stats)| {
            row.accuracy = row.correct as f64 / row.samples.max(1) as f64;
            row.bytes_read_ratio = stats.bytes_ratio();
            row
        })
        .collect())
}

fn row(trial: &Trial, test: &NeedleTest) -> NeedleRow {
    let cell = |i: usize| DepthCell {
        from: i as f64 / DEPTHS as f64,
        to: (i + 1) as f64 / DEPTHS as f64,
        samples: 0,
        correct: 0,
    };
    NeedleRow {
        policy: trial.name(),
        budget: trial.budget(),
        context: test.context,
        pairs: test.pairs,
        samples: 0,
        correct: 0,
        accuracy: 0.0,
        bytes_read_ratio: None,
        depths: (0..DEPTHS).map(cell).collect(),
    }
}

/// Whether the answer comes out, and what was read on the way.
fn answer<B: Backend>(
    probe: &mut Probe<B>,
    document: &PageTable,
    question: &Question,
    chooser: &crate::Chooser,
) -> Result<(bool, AttendStats), LabError> {
    let mut table = probe.fork(document);
    let (mut stats, mut correct) = (AttendStats::default(), true);
    // The last token of the answer is only looked at, not fed.
    let fed = question.tokens.iter().chain(&question.answer[..question.answer.len() - 1]);
    for (i, token) in fed.enumerate() {
        let step = probe.step(&mut table, &[*token], chooser.attention(), LogitRows::Last, false);
        let output = match step {
            Ok(output) => output,
            Err(error) => {
                probe.release(table);
                return Err(error);
            }
        };
        stats.add(output.stats());
        if let Some(digit) = (i + 1).checked_sub(question.tokens.len()) {
            let logits = output.logits(0).last().unwrap_or(&[]);
            if best(logits) != question.answer[digit] {
                correct = false;
                break;
            }
        }
    }
    probe.release(table);
    Ok((correct, stats))
}

/// The most likely token, the first of equals.
pub(crate) fn best(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best as u32
}
