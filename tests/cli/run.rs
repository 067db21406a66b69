//! `run`: text on stdout and nothing else there, the same with the same seed.

use std::io::Read;
use std::process::Stdio;

use serde_json::Value;
use tinyserve_tests::data;

use crate::binary::{command, text, tinyserve, whole_cases, with_stdin};

const PROMPT: &str = "Once upon a time";

#[test]
fn the_builtin_model_tells_its_story() {
    let story = data("data/models/stories260k/karpathy_expected_stdout.txt");
    let story = std::fs::read_to_string(story).unwrap();
    let ran = tinyserve(&["run", "-p", PROMPT, "--temperature", "0", "-n", "100"]);
    for part in ["load", "prefill", "decode", "tok/s", "pages", "read 100.0 %"] {
        assert!(ran.stderr.contains(part), "{part:?} is not in {:?}", ran.stderr);
    }
    let text = ran.done();
    let text = text.strip_suffix('\n').unwrap();
    assert!(text.len() > 200, "{text}");
    assert!(story.strip_prefix(PROMPT).unwrap().starts_with(text), "{text}");
}

#[test]
fn json_has_the_fields_of_the_contract() {
    let ran = tinyserve(&["run", "-p", PROMPT, "--temperature", "0", "-n", "8", "--json"]);
    assert_eq!(ran.stderr, "");
    let object = ran.json();
    assert_eq!(object["text"], ", there was a little girl");
    assert_eq!(object["tokens"].as_array().unwrap().len(), 8);
    assert_eq!((&object["prompt_tokens"], &object["finish_reason"]), (&5.into(), &"length".into()));
    for name in ["load_ms", "prefill_ms", "prefill_tok_s", "ttft_ms", "decode_ms", "decode_tok_s"] {
        let value = object["timings"][name].as_f64();
        assert!(value.is_some_and(|value| value > 0.0), "{name}: {value:?}");
    }
    let kv = &object["kv"];
    // 5 + 7 tokens in one page of 16; five layers of 4 heads of 8 channels, keys, values and boxes.
    assert_eq!(kv["pages"], 1);
    assert_eq!(kv["bytes_resident"], 5 * 4 * 8 * (16 + 1) * 2 * 4);
    assert_eq!((&kv["bytes_read_ratio"], &kv["recall"]), (&1.0.into(), &Value::Null));
}

#[test]
fn one_token_has_no_decode_speed() {
    let object = tinyserve(&["run", "-p", PROMPT, "-n", "1", "--json"]).json();
    assert_eq!(object["tokens"].as_array().unwrap().len(), 1);
    assert_eq!(object["timings"]["decode_tok_s"], Value::Null);
    assert_eq!(object["kv"]["bytes_read_ratio"], Value::Null);
}

#[test]
fn the_seed_decides() {
    let with = |seed: &str| {
        let args = ["run", "-p", PROMPT, "-n", "60", "--temperature", "1.2", "--seed", seed];
        tinyserve(&args).done()
    };
    assert_eq!(with("7"), with("7"));
    assert_ne!(with("7"), with("8"));
}

#[test]
fn golden_checkpoints_continue_as_the_reference_does() {
    for name in ["gpt2-tiny", "gpt2-hub-names", "llama-gqa", "llama-sharded-f16"] {
        let folder = data(&format!("golden/{name}"));
        // A gap this wide is out of the reach of rounding.
        for case in whole_cases(name).iter().filter(|case| case.min_margin > 1e-3) {
            let args = ["run", text(&folder), "-p", &case.text, "-n", "48", "--temperature", "0"];
            let more = ["--ignore-eos", "--json", "--kv-cache-dtype", "f32"];
            let rope = ["--rope-frequency-dtype", "weights"];
            let object = tinyserve(&[&args[..], &more, &rope].concat()).json();
            let expected: Value = case.greedy.clone().into();
            assert_eq!(object["tokens"], expected, "{name}: {:?}", case.text);
            assert_eq!(object["prompt_tokens"], case.ids.len());
        }
    }
}

#[test]
fn prompts_come_from_files_and_from_stdin() {
    let settings = ["--temperature", "0", "-n", "8"];
    let expected = tinyserve(&[&["run", "-p", PROMPT][..], &settings].concat()).done();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, PROMPT).unwrap();
    let from_file = tinyserve(&[&["run", "--prompt-file", text(&file)][..], &settings].concat());
    assert_eq!(from_file.done(), expected);
    let args = [&["run", "--prompt-file", "-"][..], &settings].concat();
    assert_eq!(with_stdin(&args, PROMPT.as_bytes()).done(), expected);
}

#[test]
fn a_prompt_may_look_like_a_flag() {
    let text = tinyserve(&["tokenize", "-p", "--json", "--json"]).json();
    assert!(text["tokens"].as_array().unwrap().len() > 2);
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    let args = ["run", "-p", PROMPT, "-n", "480", "--ignore-eos"];
    let mut child = command(&args).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    // The pipe is closed now, long before 480 tokens are through it.
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(!stderr.contains("error") && !stderr.contains("panicked"), "{stderr}");
}

#[test]
fn the_command_starts_at_once() {
    // The first run pays for the disk.
    tinyserve(&["--version"]).done();
    let best = (0..5).map(|_| {
        let start = std::time::Instant::now();
        tinyserve(&["--version"]).done();
        start.elapsed()
    });
    let best = best.min().unwrap();
    assert!(best.as_millis() < 100, "{best:?}");
}

#[test]
fn a_saved_session_is_not_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("story.session");
    let prompt = "Once upon a time there was a little girl who went to the park with her dog. ";
    let run = |prompt: &str, more: &[&str]| {
        let args = ["run", "-p", prompt, "-n", "20", "--temperature", "0", "--page-size", "8"];
        tinyserve(&[&args[..], more].concat())
    };
    let first = run(prompt, &["--json", "--save-session", text(&file)]).json();
    assert_eq!(first["cached_tokens"], 0);
    let longer = format!("{prompt}{}", first["text"].as_str().unwrap());
    let alone = run(&longer, &["--json"]).json();
    let loaded = run(&longer, &["--json", "--load-session", text(&file)]).json();
    assert_eq!(loaded["text"], alone["text"]);
    let [cached, all] = ["cached_tokens", "prompt_tokens"].map(|key| loaded[key].as_u64().unwrap());
    assert!(cached.is_multiple_of(8) && cached + 16 > all, "{cached} of {all}");
    assert!(cached < all);
    // A file of another layout, a damaged one and none at all are refused by name.
    let other = ["--page-size", "16", "--load-session", text(&file)];
    let args = ["run", "-p", prompt, "-n", "1"];
    tinyserve(&[&args[..], &other].concat()).refused_with(1, &["page_size is 8", "story.session"]);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let damaged = run(prompt, &["--load-session", text(&file)]);
    damaged.refused_with(1, &["wrong checksum", "story.session"]);
    std::fs::remove_file(&file).unwrap();
    run(prompt, &["--load-session", text(&file)])
        .refused_with(1, &["story.session cannot be read"]);
    let nowhere = folder.path().join("no/folder");
    run(prompt, &["--save-session", text(&nowhere)]).refused_with(1, &["cannot be written"]);
}
