//! Real checkpoints open: every tensor where it is stored, every text as its tokens.

mod common;

use common::{Broken, GOLDEN, data, golden, ids, read_json};
use serde_json::json;
use tinyserve_kernels::{Activation, DType};
use tinyserve_model::{Architecture, BUILTIN_MODEL, Checkpoint, RopeScaling};

/// The tensor shapes that a configuration leads to, by the names of the hub's own files.
fn expected_tensors(checkpoint: &Checkpoint) -> Vec<(String, Vec<usize>)> {
    let c = checkpoint.config();
    let (hidden, wide) = (c.hidden_size, c.intermediate_size);
    let (q, kv) = (c.q_heads * c.head_dim, c.kv_heads * c.head_dim);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| tensors.push((name, shape.to_vec()));
    match c.architecture {
        Architecture::Gpt2 => {
            add("wte.weight".into(), &[c.vocab_size, hidden]);
            add("wpe.weight".into(), &[c.max_positions, hidden]);
            for layer in 0..c.layers {
                for (name, inputs, outputs) in [
                    ("attn.c_attn", hidden, 3 * hidden),
                    ("attn.c_proj", hidden, hidden),
                    ("mlp.c_fc", hidden, wide),
                    ("mlp.c_proj", wide, hidden),
                ] {
                    add(format!("h.{layer}.{name}.weight"), &[inputs, outputs]);
                    add(format!("h.{layer}.{name}.bias"), &[outputs]);
                }
                for name in ["ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"] {
                    add(format!("h.{layer}.{name}"), &[hidden]);
                }
            }
            add("ln_f.weight".into(), &[hidden]);
            add("ln_f.bias".into(), &[hidden]);
        }
        Architecture::Llama => {
            add("embed_tokens.weight".into(), &[c.vocab_size, hidden]);
            for layer in 0..c.layers {
                for (name, outputs, inputs) in [
                    ("self_attn.q_proj", q, hidden),
                    ("self_attn.k_proj", kv, hidden),
                    ("self_attn.v_proj", kv, hidden),
                    ("self_attn.o_proj", hidden, q),
                    ("mlp.gate_proj", wide, hidden),
                    ("mlp.up_proj", wide, hidden),
                    ("mlp.down_proj", hidden, wide),
                ] {
                    add(format!("layers.{layer}.{name}.weight"), &[outputs, inputs]);
                }
                for name in ["input_layernorm", "post_attention_layernorm"] {
                    add(format!("layers.{layer}.{name}.weight"), &[hidden]);
                }
            }
            add("norm.weight".into(), &[hidden]);
        }
        _ => unreachable!("no checkpoint of another architecture is here"),
    }
    if !c.tie_word_embeddings {
        add("lm_head.weight".into(), &[c.vocab_size, hidden]);
    }
    tensors
}

#[test]
fn every_tensor_is_found_and_counted_once() {
    let mut checkpoints: Vec<_> =
        GOLDEN.iter().map(|name| (*name, Checkpoint::open(&golden(name)).unwrap())).collect();
    for name in ["slm4096-gpt2", "nanosort-gpt2"] {
        checkpoints.push((name, Checkpoint::open(&data("data/models").join(name)).unwrap()));
    }
    checkpoints.push((BUILTIN_MODEL, Checkpoint::load(BUILTIN_MODEL).unwrap()));
    for (model, checkpoint) in checkpoints {
        let (mut elements, mut bytes) = (0, 0);
        for (name, shape) in expected_tensors(&checkpoint) {
            let tensor = checkpoint.tensor(&name, &shape).unwrap();
            assert_eq!(tensor.dtype(), checkpoint.dtype(), "{model} {name}");
            assert!(tensor.to_f32(0..tensor.len()).iter().all(|x| x.is_finite()), "{name}");
            elements += tensor.len();
            bytes += tensor.bytes().len();
        }
        assert_eq!(checkpoint.parameters(), elements, "{model}");
        assert_eq!(checkpoint.weight_bytes(), bytes, "{model}");
        let in_files: usize = checkpoint.weight_files().map(|(_, bytes)| bytes).sum();
        assert!(in_files >= bytes, "{model}");
    }
}

#[test]
fn element_types_stay_as_they_are_stored() {
    let dtypes = GOLDEN.map(|name| Checkpoint::open(&golden(name)).unwrap().dtype());
    assert_eq!(dtypes, [DType::F32, DType::F32, DType::F32, DType::Bf16, DType::F16]);
}

#[test]
fn a_tensor_is_the_files_own_memory() {
    let checkpoint = Checkpoint::open(&golden("llama-gqa")).unwrap();
    let once = checkpoint.tensor("embed_tokens.weight", &[512, 64]).unwrap();
    let again = checkpoint.tensor("model.embed_tokens.weight", &[512, 64]).unwrap();
    assert_eq!(once.bytes().as_ptr(), again.bytes().as_ptr());
    assert_eq!(once.name(), "model.embed_tokens.weight");
}

#[test]
fn masks_are_listed_but_are_no_parameters() {
    let checkpoint = Checkpoint::open(&golden("gpt2-hub-names")).unwrap();
    let listed: Vec<_> = checkpoint.tensors().filter(|tensor| !tensor.parameter).collect();
    let names: Vec<_> = listed.iter().map(|tensor| tensor.name).collect();
    assert_eq!(names, ["h.0.attn.bias", "h.1.attn.bias"]);
}

#[test]
fn configurations_are_read_as_written() {
    let config = |name: &str| Checkpoint::open(&golden(name)).unwrap().config().clone();
    let gpt2 = config("gpt2-tiny");
    assert_eq!(gpt2.architecture, Architecture::Gpt2);
    assert_eq!((gpt2.head_dim, gpt2.intermediate_size, gpt2.max_positions), (12, 192, 512));
    assert_eq!((gpt2.activation, gpt2.tie_word_embeddings), (Activation::GeluTanh, true));
    assert_eq!((gpt2.bos, gpt2.eos), (Some(0), vec![0]));
    let slm = Checkpoint::open(&data("data/models/slm4096-gpt2")).unwrap();
    assert_eq!(slm.config().activation, Activation::Gelu);
    assert_eq!((slm.config().bos, slm.config().eos.len()), (None, 0));
    let nanosort = Checkpoint::open(&data("data/models/nanosort-gpt2")).unwrap();
    assert!(!nanosort.config().tie_word_embeddings);
    let llama = config("llama-tied-rope-scaled-bf16");
    assert_eq!((llama.q_heads, llama.kv_heads, llama.head_dim), (4, 4, 32));
    let rope = llama.rope.unwrap();
    assert_eq!(rope.theta, 500_000.0);
    assert_eq!(
        rope.scaling,
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64
        }
    );
    let llama = config("llama-sharded-f16");
    assert_eq!((llama.kv_heads, llama.bos, llama.eos), (1, Some(1), vec![2]));
}

#[test]
fn texts_and_tokens_are_the_references() {
    for name in GOLDEN {
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let tokenizer = checkpoint.tokenizer().unwrap();
        let expected = read_json(&format!("golden/{name}/expected.json"));
        for case in expected["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let (prompt, greedy) = (ids(&case["ids"]), ids(&case["greedy"]));
            let mut encoded = tokenizer.encode(text, true).unwrap();
            // The reference cut one text so that what follows it fits into the context.
            encoded.truncate(checkpoint.config().max_positions - greedy.len());
            assert_eq!(encoded, prompt, "{name} {text:?}");
            let decoded = tokenizer.decode(&greedy, true).unwrap();
            assert_eq!(decoded, case["greedy_text"].as_str().unwrap(), "{name} {text:?}");
        }
    }
}

#[test]
fn texts_and_tokens_of_pretrained_models_are_the_references() {
    let builtin = Checkpoint::builtin().unwrap();
    let slm = Checkpoint::open(&data("data/models/slm4096-gpt2")).unwrap();
    for (name, checkpoint) in [("stories260k", builtin), ("slm4096-gpt2", slm)] {
        let tokenizer = checkpoint.tokenizer().unwrap();
        let golden = read_json(&format!("data/models/{name}/golden.json"));
        for case in golden["cases"].as_array().unwrap() {
            let prompt = case["prompt"].as_str().unwrap();
            let mut tokens = ids(&case["prompt_ids"]);
            assert_eq!(tokenizer.encode(prompt, true).unwrap(), tokens, "{name} {prompt:?}");
            tokens.extend(ids(&case["greedy_ids"]));
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.decode(&tokens, true).unwrap(), text, "{name} {prompt:?}");
        }
    }
}

#[test]
fn tokens_that_end_a_text_are_found_wherever_they_are_written() {
    let special = |checkpoint: &Broken| {
        let config = checkpoint.open().unwrap().config().clone();
        (config.bos, config.eos)
    };
    let broken = Broken::copy_of("llama-gqa");
    assert_eq!(special(&broken), (Some(1), vec![2]));
    broken.create("generation_config.json", &json!({"eos_token_id": [2, 7]}));
    assert_eq!(special(&broken), (Some(1), vec![2, 7]));
    broken.create("generation_config.json", &json!({"bos_token_id": 3, "eos_token_id": 4}));
    assert_eq!(special(&broken), (Some(3), vec![4]));
    broken.remove("generation_config.json");
    broken.set("config.json", "bos_token_id", json!(null));
    broken.set("config.json", "eos_token_id", json!(null));
    assert_eq!(special(&broken), (None, vec![]));
    broken.create(
        "tokenizer_config.json",
        &json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}),
    );
    assert_eq!(special(&broken), (Some(1), vec![2]));
    broken.create("tokenizer_config.json", &json!({"eos_token": "not a token"}));
    assert_eq!(special(&broken), (None, vec![]));
}

#[test]
fn a_stored_head_is_not_counted_where_the_embedding_is_the_head() {
    let broken = Broken::copy_of("llama-gqa");
    let untied = broken.open().unwrap().parameters();
    broken.set("config.json", "tie_word_embeddings", json!(true));
    assert_eq!(broken.open().unwrap().parameters(), untied - 512 * 64);
}
