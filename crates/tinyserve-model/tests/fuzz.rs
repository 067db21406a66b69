//! Broken files are refused or read: never a panic, never memory that a header merely claims.

mod common;

#[path = "common/watched.rs"]
mod watched;

use common::{Broken, safetensors, touch};
use proptest::prelude::*;
use serde_json::{Value, json};
use tinyserve_model::ModelConfig;
use watched::Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// More than any file here, and than what its tables take.
const MOST_BYTES: usize = 16 << 20;

fn open_and_read(broken: &Broken) {
    if let Ok(checkpoint) = broken.open() {
        touch(&checkpoint);
        // What a model would ask for, too.
        let config = checkpoint.config();
        let _ = checkpoint.tensor("norm.weight", &[config.hidden_size]);
        let _ = checkpoint.tensor("wte.weight", &[config.vocab_size, config.hidden_size]);
        let _ = (checkpoint.parameters(), checkpoint.weight_bytes());
        if let Some(rope) = &config.rope {
            let frequencies = rope.inverse_frequencies(config.head_dim);
            assert_eq!(frequencies.len(), config.head_dim / 2);
            assert!(frequencies.iter().all(|frequency| frequency.is_finite()), "{rope:?}");
        }
    }
    let largest = watched::largest();
    assert!(largest < MOST_BYTES, "an allocation of {largest} bytes");
}

/// A file with some bytes changed, and perhaps a part cut out.
fn mutate(mut bytes: Vec<u8>, changes: &[(u32, u8)], cut: Option<(u32, u32)>) -> Vec<u8> {
    for &(at, byte) in changes {
        let at = at as usize % bytes.len();
        bytes[at] = byte;
    }
    if let Some((from, length)) = cut {
        let from = from as usize % bytes.len();
        let to = (from + length as usize % 64).min(bytes.len());
        bytes.drain(from..to);
    }
    bytes
}

fn changes(within: u32) -> impl Strategy<Value = Vec<(u32, u8)>> {
    prop::collection::vec((0..within, any::<u8>()), 1..6)
}

fn hostile_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(|x| json!(x)),
        any::<u64>().prop_map(|x| json!(x)),
        any::<f64>().prop_map(|x| json!(x)),
        (0..70_u64).prop_map(|x| json!(x)),
        (0..64_u32).prop_map(|bits| json!(1_u64 << bits)),
        "\\PC{0,12}".prop_map(|x| json!(x)),
        any::<bool>().prop_map(|x| json!(x)),
        Just(json!(null)),
        Just(json!([])),
        Just(json!([1, "a", null])),
        Just(json!({})),
        Just(json!({"rope_type": "llama3", "factor": 1e300, "low_freq_factor": 1e-300})),
        Just(json!({"type": "dynamic", "factor": 2.0, "rope_theta": 1e308})),
    ]
}

const NAMES: [&str; 2] = ["gpt2-tiny", "llama-tied-rope-scaled-bf16"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn changed_bytes_of_a_configuration(
        which in 0..2_usize,
        changes in changes(1000),
        cut in prop::option::of((any::<u32>(), any::<u32>())),
    ) {
        let broken = Broken::copy_of(NAMES[which]);
        let json = broken.bytes("config.json");
        broken.write("config.json", mutate(json, &changes, cut));
        open_and_read(&broken);
    }

    #[test]
    fn changed_values_of_a_configuration(
        which in 0..2_usize,
        fields in prop::collection::vec((any::<u32>(), hostile_value()), 1..4),
    ) {
        let broken = Broken::copy_of(NAMES[which]);
        let mut config: Value = serde_json::from_slice(&broken.bytes("config.json")).unwrap();
        for (field, value) in fields {
            let object = config.as_object_mut().unwrap();
            let mut names: Vec<_> = object.keys().cloned().collect();
            names.extend(["rope_parameters", "head_dim", "n_inner", "eos_token_id"].map(str::to_owned));
            let name = names[field as usize % names.len()].clone();
            object.insert(name, value);
        }
        broken.create("config.json", &config);
        open_and_read(&broken);
    }

    #[test]
    fn changed_bytes_of_a_header(
        which in 0..2_usize,
        in_header in changes(4096),
        in_length in prop::option::of((0..8_u32, any::<u8>())),
        cut in prop::option::of((any::<u32>(), any::<u32>())),
    ) {
        let broken = Broken::copy_of(NAMES[which]);
        let mut bytes = broken.bytes("model.safetensors");
        if let Some((at, byte)) = in_length {
            bytes[at as usize] = byte;
        }
        // The first eight bytes are the length, which has its own changes.
        let tail = mutate(bytes.split_off(8), &in_header, cut);
        bytes.extend(tail);
        broken.write("model.safetensors", bytes);
        open_and_read(&broken);
    }

    #[test]
    fn lying_values_of_a_header(
        which in any::<u32>(),
        shape in prop::collection::vec(prop_oneof![0..4_u64, any::<u64>()], 0..5),
        from in prop_oneof![0..4096_u64, any::<u64>()],
        to in prop_oneof![0..4096_u64, any::<u64>()],
        dtype in prop::sample::select(vec!["F32", "F64", "I8", "F4", "BOOL", "BF16", "?"]),
        part in 0..4_u8,
    ) {
        let broken = Broken::copy_of(NAMES[which as usize % 2]);
        broken.edit_header(|header| {
            let tensors = header.as_object_mut().unwrap();
            let names: Vec<_> = tensors.keys().filter(|n| *n != "__metadata__").cloned().collect();
            let tensor = &mut tensors[&names[which as usize % names.len()]];
            if part != 1 { tensor["shape"] = json!(shape); }
            if part != 2 { tensor["data_offsets"] = json!([from, to]); }
            if part != 3 { tensor["dtype"] = json!(dtype); }
        });
        open_and_read(&broken);
    }

    #[test]
    fn truncated_files(length in 0..300_000_usize, index in any::<bool>()) {
        let broken = Broken::copy_of("llama-sharded-f16");
        let file = if index { "model.safetensors.index.json" } else { "model-00001-of-00002.safetensors" };
        let mut bytes = broken.bytes(file);
        bytes.truncate(length % bytes.len());
        broken.write(file, bytes);
        prop_assert!(broken.open().is_err());
        open_and_read(&broken);
    }

    #[test]
    fn any_bytes_are_no_configuration(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        prop_assert!(ModelConfig::from_json("config.json", &bytes).is_err());
    }
}

#[test]
fn a_header_that_claims_much_gets_nothing() {
    let broken = Broken::copy_of("gpt2-tiny");
    for length in [0_u64, 1, 1 << 20, 100_000_001, 1 << 40, u64::MAX - 7, u64::MAX] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        broken.write("model.safetensors", bytes);
        assert!(broken.open().is_err());
        open_and_read(&broken);
    }
    let huge = json!({"wte.weight": {
        "dtype": "F32", "shape": [u64::MAX, u64::MAX], "data_offsets": [0, u64::MAX],
    }});
    broken.write("model.safetensors", safetensors(&huge, &[0; 16]));
    assert!(broken.open().is_err());
    open_and_read(&broken);
}
