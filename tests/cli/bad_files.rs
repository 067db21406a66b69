//! Files that are missing or broken: exit code 1, the file's name, nothing on stdout.

use std::fs;
use std::path::Path;

use tempfile::TempDir;
use tinyserve_tests::data;

use crate::binary::{text, tinyserve, with_stdin};

/// A copy of a golden checkpoint to break.
fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(data(&format!("golden/{name}"))).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

/// Replaces text in a file of a checkpoint.
fn edit(folder: &Path, file: &str, from: &str, to: &str) {
    let path = folder.join(file);
    let before = fs::read_to_string(&path).unwrap();
    let after = before.replacen(from, to, 1);
    assert_ne!(before, after, "{from:?} is not in {file}");
    fs::write(path, after).unwrap();
}

#[track_caller]
fn refused(folder: &Path, words: &[&str]) {
    for json in [&[][..], &["--json"]] {
        let args = [&["run", text(folder), "-p", "Hello", "-n", "2"][..], json].concat();
        tinyserve(&args).refused_with(1, words);
    }
}

#[test]
fn checkpoints_that_are_not_there() {
    refused(Path::new("no/such/folder"), &["no/such/folder", "no such folder"]);
    refused(Path::new("builtin:gpt5"), &["builtin:gpt5", "builtin:stories260k"]);
    let folder = tempfile::tempdir().unwrap();
    refused(folder.path(), &["config.json", "no such file"]);
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let folder = copy("llama-gqa");
        fs::remove_file(folder.path().join(file)).unwrap();
        refused(folder.path(), &[file]);
    }
    let folder = copy("llama-sharded-f16");
    fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    refused(folder.path(), &["model-00002-of-00002.safetensors"]);
}

#[test]
fn checkpoints_that_are_broken() {
    let cases = [
        ("config.json", "LlamaForCausalLM", "MambaForCausalLM", ["architectures", "Mamba"]),
        ("config.json", "\"silu\"", "\"mish\"", ["hidden_act", "mish"]),
        ("config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", ["layers.3", ""]),
        (
            "config.json",
            "\"num_hidden_layers\": 3",
            "\"num_hidden_layers\": -1",
            ["num_hidden_layers", "-1"],
        ),
        (
            "config.json",
            "\"vocab_size\": 512",
            "\"vocab_size\": 513",
            ["embed_tokens", "[512, 64]"],
        ),
        ("config.json", "{", "", ["config.json", ""]),
        ("tokenizer.json", "{", "[", ["tokenizer.json", ""]),
    ];
    for (file, from, to, words) in cases {
        let folder = copy("llama-gqa");
        edit(folder.path(), file, from, to);
        refused(folder.path(), &words);
    }
}

#[test]
fn weights_that_are_broken() {
    let folder = copy("llama-gqa");
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut lying = bytes.clone();
    lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for broken in [&bytes[..bytes.len() / 2], &bytes[..4], &[], &lying] {
        fs::write(&path, broken).unwrap();
        refused(folder.path(), &["model.safetensors"]);
    }
    // A header of the right length that names another type: the same number of bytes.
    let mut other = bytes.clone();
    let at = other.windows(5).position(|window| window == b"\"F32\"").unwrap();
    other[at..at + 5].copy_from_slice(b"\"I32\"");
    fs::write(&path, other).unwrap();
    refused(folder.path(), &["model.safetensors", "I32"]);
}

#[test]
fn prompts_that_are_no_prompts() {
    tinyserve(&["run", "-p", ""]).refused_with(1, &["the prompt is empty"]);
    tinyserve(&["run", "-p", "", "--json"]).refused_with(1, &["the prompt is empty"]);
    let stdin = ["run", "--prompt-file", "-"];
    with_stdin(&stdin, b"").refused_with(1, &["stdin is empty"]);
    with_stdin(&stdin, b"ab\xff").refused_with(1, &["stdin", "0xff", "offset 2"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    let args = ["run", "--prompt-file", text(&file), "--json"];
    tinyserve(&args).refused_with(1, &["prompt.txt", "cannot be read"]);
    fs::write(&file, b"caf\xe9 au lait").unwrap();
    tinyserve(&args).refused_with(1, &["prompt.txt", "not UTF-8", "0xe9", "offset 3"]);
    fs::write(&file, "").unwrap();
    tinyserve(&args).refused_with(1, &["prompt.txt", "empty"]);
    fs::write(&file, "word ".repeat(600)).unwrap();
    tinyserve(&args).refused_with(1, &["tokens, expected at most 512", "context"]);
    tinyserve(&["run", "--prompt-file", text(folder.path())]).refused_with(1, &["cannot be read"]);
}

#[test]
fn texts_that_have_no_perplexity() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    let args = ["eval", "perplexity", "--text-file", text(&file), "--json"];
    tinyserve(&args).refused_with(1, &["text.txt", "cannot be read"]);
    fs::write(&file, "").unwrap();
    tinyserve(&args).refused_with(1, &["text.txt", "empty"]);
    fs::write(&file, b"\xc0").unwrap();
    tinyserve(&args).refused_with(1, &["text.txt", "0xc0", "offset 0"]);
    fs::write(&file, "Once upon a time").unwrap();
    for stride in ["0", "600"] {
        let args = [&args[..], &["--stride", stride]].concat();
        tinyserve(&args).refused_with(2, &["--stride is", "expected 1 to 512"]);
    }
}

#[test]
fn configuration_files_that_are_broken() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("a.toml", "pages = 3", "pages"),
        ("b.json", r#"{"selection_ratio": 0}"#, "selection_ratio is 0"),
        ("c.toml", "page_size = 0", "page_size is 0"),
        ("d.toml", "kv_cache_dtype = \"fp8\"", "fp8"),
        ("e.yaml", "page_size: 3", ".json or .toml"),
        ("f.json", "{", "EOF"),
    ];
    for (name, content, word) in cases {
        let file = folder.path().join(name);
        fs::write(&file, content).unwrap();
        let args = ["run", "-p", "a", "--json", "--config", text(&file)];
        tinyserve(&args).refused_with(1, &[name, word]);
    }
    tinyserve(&["run", "-p", "a", "--config", "none.toml"]).refused_with(1, &["none.toml"]);
}
