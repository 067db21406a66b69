//! `--weights-cache`: a file for the next start, which changes nothing but the time it takes.

use std::fs;

use crate::binary::{Ran, command, text, tinyserve};

#[test]
fn a_cache_is_written_then_used_then_replaced_when_it_is_broken() {
    let folder = tempfile::tempdir().unwrap();
    let base = ["run", "-p", "Once", "-n", "20", "--seed", "1", "--weights", "int4"];
    let expected = tinyserve(&base).done();
    let cached = |more: &[&str]| {
        let cache = ["--weights-cache", text(folder.path())];
        tinyserve(&[&base[..], &cache, more].concat())
    };
    let written = cached(&["-v"]);
    assert!(written.stderr.contains(": written"), "{written:?}");
    assert_eq!(written.done(), expected);
    let used = cached(&["-v"]);
    assert!(used.stderr.contains(": used"), "{used:?}");
    assert_eq!(used.done(), expected);
    // What went as it should is told to whoever asks only.
    assert!(!cached(&[]).stderr.contains("weights cache"));
    let file = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 16;
    fs::write(&file, bytes).unwrap();
    let replaced = cached(&[]);
    let warning = replaced.stderr.lines().find(|line| line.starts_with("warning: ")).unwrap();
    assert!(warning.contains(text(&file)) && warning.contains("not what was written"));
    assert_eq!(replaced.done(), expected);
    let used = cached(&["-v"]);
    assert!(used.stderr.contains(": used"), "{used:?}");
}

#[test]
fn a_benchmark_uses_the_cache_too_and_a_variable_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        let args = ["bench", "latency", "--shape", "tiny-llama", "-p", "0", "-n", "1", "-r", "1"];
        let mut command = command(&[&args[..], &["--weights", "int8", "-v"]].concat());
        command.env("TINYSERVE_WEIGHTS_CACHE", folder.path());
        Ran::new(command.output().unwrap()).stderr
    };
    let (first, second) = (run(), run());
    assert!(first.contains("tiny-llama-int8.weights: written"), "{first}");
    assert!(second.contains("tiny-llama-int8.weights: used"), "{second}");
}

#[test]
fn stored_weights_are_not_cached() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ["--weights-cache", text(folder.path())];
    tinyserve(&[&["run", "-p", "a"][..], &cache].concat())
        .refused_with(2, &["--weights-cache", "int8 or int4"]);
    let settings = folder.path().join("settings.toml");
    fs::write(&settings, "weights_cache = \"cached\"\n").unwrap();
    let refused = tinyserve(&["run", "-p", "a", "--config", text(&settings)]);
    refused.refused_with(1, &["settings.toml", "weights_cache", "int8 or int4"]);
}
