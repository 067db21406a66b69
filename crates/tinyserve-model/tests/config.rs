//! Configurations as repositories write them: what is read, what is derived, what is refused.

use serde_json::{Value, json};
use tinyserve_kernels::Activation;
use tinyserve_model::{Architecture, ModelConfig};

fn llama(changes: &Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    });
    merge(&mut config, changes);
    config
}

fn gpt2(changes: &Value) -> Value {
    let mut config = json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 384,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    });
    merge(&mut config, changes);
    config
}

/// Null takes a field away.
fn merge(config: &mut Value, changes: &Value) {
    let fields = config.as_object_mut().unwrap();
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            fields.remove(name);
        } else {
            fields.insert(name.clone(), value.clone());
        }
    }
}

fn read(config: &Value) -> ModelConfig {
    ModelConfig::from_json("config.json", config.to_string().as_bytes())
        .unwrap_or_else(|error| panic!("{error}: {config}"))
}

#[track_caller]
fn refused(config: &Value, words: &[&str]) {
    let message = ModelConfig::from_json("folder/config.json", config.to_string().as_bytes())
        .expect_err("a refusal")
        .to_string();
    for word in ["folder/config.json"].iter().chain(words) {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
    assert!(!message.contains('\n'), "{message}");
}

#[test]
fn llama_fields_have_the_defaults_of_transformers() {
    let config = read(&llama(&json!({})));
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.q_heads, config.kv_heads, config.head_dim), (4, 4, 16));
    assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
    assert_eq!(config.activation, Activation::Silu);
    assert_eq!(config.rope.unwrap().theta, 10_000.0);
    let config = read(&llama(&json!({
        "num_key_value_heads": 1, "head_dim": 32, "attention_bias": true, "mlp_bias": true,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": [2, 7],
    })));
    assert_eq!((config.q_heads, config.kv_heads, config.head_dim), (4, 1, 32));
    assert!(config.tie_word_embeddings && config.attention_bias && config.mlp_bias);
    assert_eq!((config.bos, config.eos), (Some(1), vec![2, 7]));
}

#[test]
fn gpt2_fields_have_the_defaults_of_transformers() {
    let config = read(&gpt2(&json!({})));
    assert_eq!(config.architecture, Architecture::Gpt2);
    assert_eq!((config.q_heads, config.kv_heads, config.head_dim), (4, 4, 12));
    assert_eq!((config.intermediate_size, config.max_positions), (192, 256));
    assert!(config.tie_word_embeddings && config.rope.is_none());
    let config = read(&gpt2(&json!({ "n_inner": 100, "tie_word_embeddings": false })));
    assert_eq!((config.intermediate_size, config.tie_word_embeddings), (100, false));
    let config = read(&gpt2(&json!({ "n_positions": null, "n_ctx": 128 })));
    assert_eq!(config.max_positions, 128, "the older name");
    let config = read(&gpt2(&json!({ "n_ctx": 128 })));
    assert_eq!(config.max_positions, 256, "the newer name counts");
}

#[test]
fn activations_are_read_by_name_and_never_guessed() {
    for (name, activation) in [
        ("gelu_new", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("gelu", Activation::Gelu),
        ("relu", Activation::Relu),
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
    ] {
        assert_eq!(read(&gpt2(&json!({ "activation_function": name }))).activation, activation);
    }
    refused(&gpt2(&json!({ "activation_function": "quick_gelu" })), &["quick_gelu", "gelu_new"]);
    refused(&llama(&json!({ "hidden_act": "mish" })), &["hidden_act", "mish"]);
}

/// Frequencies of transformers 5.23's `LlamaRotaryEmbedding` with 16 channels per head.
#[test]
fn rope_frequencies_are_those_of_transformers_in_both_spellings() {
    let plain =
        [1.0, 0.316_227_76, 0.1, 0.031_622_78, 0.01, 0.003_162_277_9, 0.001, 0.000_316_227_76];
    let linear = plain.map(|frequency: f32| frequency / 4.0);
    let wide = [
        1.0,
        0.193_922_76,
        0.037_606_03,
        0.007_292_665,
        0.001_414_213_4,
        0.000_274_248_2,
        5.318_295_7e-5,
        1.031_338_5e-5,
    ];
    let llama3 = [
        1.0,
        0.193_922_76,
        0.037_606_03,
        0.007_292_665,
        0.000_429_556_7,
        8.570_256e-6,
        1.661_967_4e-6,
        3.222_933e-7,
    ];
    let cases = [
        (json!({ "rope_type": "default" }), 10_000.0, plain),
        (json!({ "rope_type": "linear", "factor": 4.0 }), 10_000.0, linear),
        // Unscaled up to max_position_embeddings, and longer contexts are refused.
        (json!({ "rope_type": "dynamic", "factor": 2.0 }), 500_000.0, wide),
        (
            json!({
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }),
            500_000.0,
            llama3,
        ),
    ];
    for (scaling, theta, expected) in cases {
        let mut older = scaling.clone();
        let kind = older.as_object_mut().unwrap().remove("rope_type").unwrap();
        older["type"] = kind;
        let mut newer = scaling.clone();
        newer["rope_theta"] = json!(theta);
        for config in [
            llama(&json!({ "rope_scaling": scaling, "rope_theta": theta })),
            llama(&json!({ "rope_scaling": older, "rope_theta": theta })),
            llama(&json!({ "rope_parameters": newer })),
        ] {
            let found = read(&config).rope.unwrap().inverse_frequencies(16);
            assert_eq!(found.len(), 8);
            for (found, expected) in found.iter().zip(expected) {
                let error = (found - expected).abs() / expected;
                assert!(error < 2e-7, "{found} for {expected} in {config}");
            }
        }
    }
    let none = read(&llama(&json!({ "rope_scaling": null })));
    assert_eq!(none.rope.unwrap().inverse_frequencies(16)[1], 0.316_227_76);
}

#[test]
fn rope_that_is_not_supported_is_refused_by_name() {
    for kind in ["yarn", "longrope", "su", "mrope"] {
        let scaling = json!({ "rope_type": kind, "factor": 2.0 });
        refused(&llama(&json!({ "rope_scaling": scaling })), &["rope_type", kind]);
        refused(&llama(&json!({ "rope_parameters": scaling })), &["rope_type", kind]);
    }
    refused(&llama(&json!({ "rope_scaling": { "type": "linear" } })), &["factor"]);
    refused(&llama(&json!({ "rope_scaling": { "type": "linear", "factor": 0.0 } })), &["factor"]);
    refused(&llama(&json!({ "rope_scaling": 3 })), &["rope_scaling", "3"]);
    // Apart as written, equal as f32: frequencies between them would be blended by 0 / 0.
    let equal = json!({
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
        "high_freq_factor": 1.000_000_01, "original_max_position_embeddings": 64,
    });
    refused(&llama(&json!({ "rope_scaling": equal })), &["high_freq_factor", "1.00000001"]);
    refused(&llama(&json!({ "rope_theta": -1.0 })), &["rope_theta", "-1"]);
    refused(&llama(&json!({ "partial_rotary_factor": 0.5 })), &["partial_rotary_factor", "0.5"]);
}

#[test]
fn architectures_that_are_not_supported_are_refused_by_name() {
    let other = json!({ "architectures": ["MambaForCausalLM"], "model_type": "mamba" });
    refused(&llama(&other), &["Mamba", "GPT2LMHeadModel", "LlamaForCausalLM"]);
    refused(&llama(&json!({ "architectures": null, "model_type": null })), &["model_type"]);
    // Trained with a window that the forward pass does not know.
    let sibling = json!({ "architectures": ["MistralForCausalLM"], "model_type": "mistral" });
    refused(&llama(&sibling), &["MistralForCausalLM"]);
    let older = json!({ "architectures": ["GPT2Model"], "model_type": null });
    assert_eq!(read(&gpt2(&older)).architecture, Architecture::Gpt2);
}

#[test]
fn sizes_that_no_model_has_are_refused_by_field() {
    for field in ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"] {
        for value in [json!(0), json!(-3), json!(1.5), json!("64"), json!(1u64 << 50)] {
            refused(&llama(&json!({ field: value })), &[field, &value.to_string()]);
        }
        refused(&llama(&json!({ field: null })), &[field]);
    }
    refused(&llama(&json!({ "num_attention_heads": 5 })), &["num_attention_heads"]);
    refused(&llama(&json!({ "num_key_value_heads": 3 })), &["num_key_value_heads"]);
    refused(&llama(&json!({ "head_dim": 15 })), &["head_dim", "15"]);
    refused(&gpt2(&json!({ "n_head": 5 })), &["n_head"]);
    refused(&gpt2(&json!({ "n_positions": null })), &["n_positions"]);
    refused(&llama(&json!({ "rms_norm_eps": "small" })), &["rms_norm_eps", "small"]);
}

#[test]
fn attention_that_is_computed_otherwise_is_refused() {
    refused(&gpt2(&json!({ "scale_attn_weights": false })), &["scale_attn_weights"]);
    let by_layer = "scale_attn_by_inverse_layer_idx";
    refused(&gpt2(&json!({ by_layer: true })), &[by_layer]);
    refused(&gpt2(&json!({ "add_cross_attention": true })), &["add_cross_attention"]);
}
