//! Folders that are no whole checkpoint: one sentence with the file, what it has and what it needs.

mod common;

use common::{Broken, assert_refused, data, golden, safetensors, touch};
use serde_json::{Value, json};
use tinyserve_model::{Checkpoint, ModelError, Tokenizer};

const SHARDED: &str = "llama-sharded-f16";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
const INDEX: &str = "model.safetensors.index.json";

/// Renames tensors of `model.safetensors`; `None` takes one away and its bytes stay.
fn rename(broken: &Broken, new_name: impl Fn(&str) -> Option<String>) {
    broken.edit_header(|header| {
        let old = std::mem::take(header.as_object_mut().unwrap());
        let renamed = old.into_iter().map(|(name, tensor)| {
            // The bytes of a tensor that nobody asks for have to belong to something.
            let unused = || format!("unused.{name}");
            let name =
                if name == "__metadata__" { name } else { new_name(&name).unwrap_or_else(unused) };
            (name, tensor)
        });
        *header = Value::Object(renamed.collect());
    });
}

#[test]
fn places_without_a_checkpoint() {
    assert_refused(Checkpoint::load("no/such/folder"), &["no/such/folder", "no such folder"]);
    let names = ["builtin:gpt5", "builtin:stories260k"];
    assert_refused(Checkpoint::load(names[0]), &names);
    assert_refused(Tokenizer::load(names[0]), &names);
    let file = data("golden/README.md");
    assert_refused(Checkpoint::open(&file), &["README.md", "a file", "a folder"]);
    let folder = tempfile::tempdir().unwrap();
    assert_refused(Checkpoint::open(folder.path()), &["config.json", "no such file"]);
    std::fs::create_dir(folder.path().join("config.json")).unwrap();
    assert_refused(Checkpoint::open(folder.path()), &["config.json", "a folder", "a file"]);
}

#[test]
fn weights_that_are_not_there() {
    let broken = Broken::copy_of("llama-gqa");
    broken.remove("model.safetensors");
    assert_refused(broken.open(), &["no weights", "model.safetensors", INDEX]);
    for pickle in ["pytorch_model.bin.index.json", "pytorch_model.bin"] {
        broken.write(pickle, "");
        assert_refused(broken.open(), &[pickle, "convert", "safe_serialization=True"]);
    }
}

#[test]
fn shards_that_are_not_whole() {
    let broken = Broken::copy_of(SHARDED);
    broken.remove(SHARDS[1]);
    assert_refused(broken.open(), &[SHARDS[1], "no such file", INDEX]);

    let broken = Broken::copy_of(SHARDED);
    let mut index: Value = serde_json::from_slice(&broken.bytes(INDEX)).unwrap();
    index["weight_map"]["model.more.weight"] = json!(SHARDS[0]);
    broken.create(INDEX, &index);
    assert_refused(broken.open(), &[SHARDS[0], "model.more.weight", INDEX]);
    // A name that leaves the folder could read any file of the machine.
    for name in [json!("../x.safetensors"), json!("/etc/passwd"), json!(".."), json!(""), json!(3)]
    {
        index["weight_map"]["model.more.weight"] = name.clone();
        broken.create(INDEX, &index);
        let found = name.to_string();
        assert_refused(broken.open(), &[INDEX, "weight_map.model.more.weight", &found]);
    }
    broken.create(INDEX, &json!({"metadata": {}}));
    assert_refused(broken.open(), &[INDEX, "weight_map is missing"]);

    let broken = Broken::copy_of(SHARDED);
    let mut index: Value = serde_json::from_slice(&broken.bytes(INDEX)).unwrap();
    index["weight_map"].as_object_mut().unwrap().remove("model.norm.weight").unwrap();
    broken.create(INDEX, &index);
    let norm = broken.open().unwrap().tensor("norm.weight", &[64]);
    assert_refused(norm, &[INDEX, "norm.weight"]);
}

#[test]
fn headers_that_lie() {
    let tensor = |shape: &[usize], from: usize, to: usize| json!({"dtype": "F32", "shape": shape, "data_offsets": [from, to]});
    let cases = [
        ("overlapping", json!({"a": tensor(&[2], 0, 8), "b": tensor(&[2], 4, 12)})),
        ("too few bytes for a shape", json!({"a": tensor(&[3], 0, 16)})),
        ("more than the file", json!({"a": tensor(&[100], 0, 400)})),
        ("less than the file", json!({"a": tensor(&[2], 0, 8)})),
        ("backwards", json!({"a": tensor(&[2], 8, 0)})),
        ("a hole", json!({"a": tensor(&[1], 0, 4), "b": tensor(&[2], 8, 16)})),
        ("no header", json!([])),
    ];
    let broken = Broken::copy_of("gpt2-tiny");
    for (what, header) in cases {
        broken.write("model.safetensors", safetensors(&header, &[0; 16]));
        let error = broken.open().map(|_| ()).expect_err(what);
        assert_refused(Err::<(), _>(error), &["model.safetensors", "a whole safetensors file"]);
    }
}

#[test]
fn tensors_of_another_shape_or_type() {
    let broken = Broken::copy_of("llama-gqa");
    let checkpoint = broken.open().unwrap();
    assert_refused(
        checkpoint.tensor("norm.weight", &[65]),
        &["model.safetensors", "model.norm.weight", "[64]", "[65]"],
    );
    assert_refused(
        checkpoint.tensor("layers.9.input_layernorm.weight", &[64]),
        &["model.safetensors", "layers.9.input_layernorm.weight"],
    );
    // Its bytes are as many: only the name of the type tells.
    broken.edit_header(|header| header["model.norm.weight"]["dtype"] = json!("I32"));
    let checkpoint = broken.open().unwrap();
    let norm = checkpoint.tensor("norm.weight", &[64]);
    assert_refused(norm, &["model.norm.weight", "I32", "F32, F16 or BF16"]);
    checkpoint.tensor("lm_head.weight", &[512, 64]).expect("the others are as good as before");
}

#[test]
fn heads_that_are_missing() {
    for name in ["llama-gqa", "gpt2-tiny"] {
        let broken = Broken::copy_of(name);
        rename(&broken, |name| (name != "lm_head.weight").then(|| name.to_owned()));
        broken.set("config.json", "tie_word_embeddings", json!(false));
        let checkpoint = broken.open().unwrap();
        let shape = [checkpoint.config().vocab_size, checkpoint.config().hidden_size];
        let head = checkpoint.tensor("lm_head.weight", &shape);
        assert_refused(head, &["model.safetensors", "lm_head.weight", "tie_word_embeddings"]);
    }
}

#[test]
fn prefixes_may_be_there_or_not() {
    for (name, prefix, norm) in
        [("gpt2-tiny", "transformer.", "ln_f.weight"), ("llama-gqa", "model.", "norm.weight")]
    {
        let whole = Checkpoint::open(&golden(name)).unwrap();
        let shape = [whole.config().hidden_size];
        let broken = Broken::copy_of(name);
        rename(&broken, |name| Some(name.strip_prefix(prefix).unwrap_or(name).to_owned()));
        let bare = broken.open().unwrap();
        let [before, after] =
            [whole, bare].map(|checkpoint| checkpoint.tensor(norm, &shape).unwrap());
        assert_eq!((before.name(), after.name()), (&*format!("{prefix}{norm}"), norm));
        assert_eq!(before.bytes(), after.bytes());
    }
}

#[test]
fn tables_of_old_llama_files_are_no_parameters() {
    let broken = Broken::copy_of("llama-gqa");
    let before = broken.open().unwrap();
    let (parameters, bytes) = (before.parameters(), before.weight_bytes());
    let table = "model.layers.0.self_attn.rotary_emb.inv_freq";
    broken.edit_header(|header| {
        let tensors = header.as_object_mut().unwrap().values();
        let end = tensors.filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max().unwrap();
        header[table] = json!({"dtype": "F32", "shape": [4], "data_offsets": [end, end + 16]});
    });
    let mut file = broken.bytes("model.safetensors");
    file.extend([0; 16]);
    broken.write("model.safetensors", file);
    let after = broken.open().unwrap();
    assert!(after.tensors().any(|tensor| tensor.name == table && !tensor.parameter));
    assert_eq!((after.parameters(), after.weight_bytes()), (parameters, bytes));
}

#[test]
fn a_file_with_misaligned_tensors_is_read_all_the_same() {
    let whole = Checkpoint::open(&golden("gpt2-tiny")).unwrap();
    let broken = Broken::copy_of("gpt2-tiny");
    for padding in 0..8 {
        // Spaces after a header are allowed, and some writers leave out those that align.
        broken.edit_header(|header| header["__metadata__"] = json!({"x": "x".repeat(padding)}));
        assert_eq!(touch(&whole), touch(&broken.open().unwrap()), "{padding}");
    }
}

#[test]
fn weights_do_not_need_a_tokenizer() {
    let broken = Broken::copy_of("gpt2-hub-names");
    broken.remove("merges.txt");
    let checkpoint = broken.open().unwrap();
    assert!(touch(&checkpoint) > 0);
    assert_refused(checkpoint.tokenizer(), &["no merges.txt beside vocab.json", "tokenizer.json"]);
    broken.remove("vocab.json");
    assert_refused(checkpoint.tokenizer(), &["no tokenizer.json and no vocab.json"]);
    let missing = checkpoint.tokenizer().unwrap_err();
    assert!(matches!(missing, ModelError::NoTokenizer { .. }), "{missing:?}");
}
