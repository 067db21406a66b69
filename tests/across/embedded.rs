//! Pretrained models against oracles that nobody here wrote.

use serde::Deserialize;
use tinyserve::{Prompt, TinyServe, TinyServeRequest, Weights};
use tinyserve_kernels::Attention;
use tinyserve_kv::KvFormat;
use tinyserve_model::{Checkpoint, logprob};
use tinyserve_tests::{Runner, assert_close, cpu, data, json};

#[derive(Deserialize)]
struct Oracle {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    text: String,
    min_top1_top2_margin: f32,
    mean_nll_of_sequence: f64,
    logits_last: Vec<f32>,
}

fn check(name: &str, checkpoint: &Checkpoint) {
    let oracle: Oracle = json(&format!("data/models/{name}/golden.json"));
    let tokenizer = checkpoint.tokenizer().unwrap();
    let mut runner = Runner::new(cpu(), checkpoint, (16, KvFormat::F32, 64));
    for (i, case) in oracle.cases.iter().enumerate() {
        let what = format!("{name} case {i}");
        if !case.prompt.is_empty() {
            assert_eq!(tokenizer.encode(&case.prompt, true).unwrap(), case.prompt_ids, "{what}");
        }
        assert!(case.min_top1_top2_margin > 1e-3, "{what}: no margin to compare by");
        let n = case.greedy_ids.len();
        let greedy = runner.greedy(&case.prompt_ids, n, Attention::Dense);
        assert_eq!(greedy, case.greedy_ids, "{what}");
        let sequence: Vec<u32> = case.prompt_ids.iter().chain(&greedy).copied().collect();
        assert_eq!(tokenizer.decode(&sequence, true).unwrap(), case.text, "{what}");
        let rows = runner.all_logits(&sequence, 64);
        assert_close(&what, rows.last().unwrap(), &case.logits_last, 1e-4);
        let nll: f64 =
            rows.iter().zip(&sequence[1..]).map(|(row, &id)| -f64::from(logprob(row, id))).sum();
        let nll = nll / (sequence.len() - 1) as f64;
        assert!((nll - case.mean_nll_of_sequence).abs() < 1e-4, "{what}: {nll}");
    }
}

#[test]
fn stories260k_is_its_oracle() {
    check("stories260k", &Checkpoint::builtin().unwrap());
}

#[test]
fn slm4096_with_the_exact_gelu_is_its_oracle() {
    check("slm4096-gpt2", &Checkpoint::open(&data("data/models/slm4096-gpt2")).unwrap());
}

/// The text that karpathy/llama2.c's own test pins for this model, byte for byte, through the
/// facade.
#[test]
fn two_hundred_greedy_tokens_are_karpathys() {
    let expected =
        std::fs::read_to_string(data("data/models/stories260k/karpathy_expected_stdout.txt"))
            .unwrap();
    for page_size in [1, 16, 64] {
        let engine = TinyServe::builder().page_size(page_size).build().unwrap();
        let request = TinyServeRequest::new(Prompt::Tokens(vec![1]))
            .max_tokens(200)
            .temperature(0.0)
            .ignore_eos(true);
        let response = engine.serve(request).unwrap();
        assert_eq!(response.tokens.len(), 200);
        assert_eq!(response.generated_text.trim_end(), expected.trim_end());
    }
}

/// How much more perplexed a model is by its own text with quantised weights, as a share.
fn perplexity_lost(model: &str, weights: Weights) -> f64 {
    let perplexity = |weights, text: Option<String>| {
        let engine = TinyServe::builder().model(model).weights(weights).build().unwrap();
        let text = text.unwrap_or_else(|| {
            let texts = (1..=3).map(|seed| {
                let request = TinyServeRequest::new("Once upon a time");
                let request = request.max_tokens(400).temperature(0.8).seed(seed);
                engine.serve(request).unwrap().generated_text
            });
            texts.collect()
        });
        (engine.perplexity(&text, None, |_, _| true).unwrap().perplexity, text)
    };
    let (stored, text) = perplexity(Weights::Auto, None);
    perplexity(weights, Some(text)).0 / stored - 1.0
}

#[test]
fn quantised_weights_predict_as_well() {
    let slm = data("data/models/slm4096-gpt2");
    let slm = slm.to_str().unwrap();
    for (model, weights, most) in [
        ("builtin:stories260k", Weights::Int8, 0.005),
        (slm, Weights::Int8, 0.005),
        (slm, Weights::Int4, 0.04),
        ("builtin:stories260k", Weights::Int4, 0.04),
    ] {
        let lost = perplexity_lost(model, weights);
        assert!(lost <= most, "{model} {weights:?}: {lost:.4} more, expected at most {most}");
    }
}

#[test]
fn quantised_weights_give_the_same_text_on_any_number_of_threads() {
    for weights in [Weights::Int8, Weights::Int4] {
        let tokens = |threads| {
            let engine = TinyServe::builder().weights(weights).threads(threads).build().unwrap();
            let request = TinyServeRequest::new("Once upon a time").max_tokens(60).seed(3);
            engine.serve(request).unwrap().tokens
        };
        let expected = tokens(1);
        for threads in [2, 3, 8] {
            assert_eq!(tokens(threads), expected, "{weights:?} on {threads} threads");
        }
    }
}

/// The mean negative log likelihood of the oracle's sequences with keys and values in `format`.
fn nll(checkpoint: &Checkpoint, oracle: &Oracle, format: KvFormat) -> f64 {
    let mut runner = Runner::new(cpu(), checkpoint, (16, format, 64));
    let (mut sum, mut count) = (0.0, 0);
    for case in &oracle.cases {
        let sequence: Vec<u32> = case.prompt_ids.iter().chain(&case.greedy_ids).copied().collect();
        let rows = runner.all_logits(&sequence, 64);
        let logprobs = rows.iter().zip(&sequence[1..]).map(|(row, &id)| logprob(row, id));
        sum -= logprobs.map(f64::from).sum::<f64>();
        count += sequence.len() - 1;
    }
    sum / f64::from(count as u32)
}

#[test]
fn codes_cost_little_likelihood() {
    let models = [
        ("stories260k", Checkpoint::builtin().unwrap()),
        ("slm4096-gpt2", Checkpoint::open(&data("data/models/slm4096-gpt2")).unwrap()),
    ];
    for (name, checkpoint) in models {
        let oracle: Oracle = json(&format!("data/models/{name}/golden.json"));
        let f16 = nll(&checkpoint, &oracle, KvFormat::F16);
        // Perplexity within 0.5 % and 3 %.
        for (format, bound) in [(KvFormat::Int8, 1.005f64), (KvFormat::Int4, 1.03)] {
            let found = nll(&checkpoint, &oracle, format);
            assert!((found - f16).abs() <= bound.ln(), "{name}: {found} with {format}, {f16}");
            assert_ne!(found, f16, "{name}: {format} changes nothing");
        }
    }
}
