//! Ctrl-C.
#![cfg(unix)]

use std::io::Read;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use tinyserve_tests::data;

use crate::binary::{Ran, command, text};

/// A run that goes on for seconds: 2000 tokens on the reference kernels.
fn long(more: &[&str]) -> Command {
    let model = data("golden/llama-tied-rope-scaled-bf16");
    let args = ["run", text(&model), "-p", "Once upon a time", "-n", "2000", "--ignore-eos"];
    command(&[&args[..], &["--cpu", "scalar"], more].concat())
}

fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn the_text_so_far_is_kept() {
    let mut child = long(&[]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    // Eight bytes may end inside a character: only the whole is text.
    let mut shown = vec![0; 8];
    stdout.read_exact(&mut shown).unwrap();
    interrupt(&child);
    let start = Instant::now();
    stdout.read_to_end(&mut shown).unwrap();
    let shown = String::from_utf8(shown).unwrap();
    let ran = Ran::new(child.wait_with_output().unwrap());
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(ran.code, Some(130), "{ran:?}");
    assert!(shown.ends_with('\n'), "{shown:?}");
    assert!(ran.stderr.contains("ended by cancelled"), "{ran:?}");
}

#[test]
fn json_says_that_it_was_cancelled() {
    // Nothing is printed while it runs, so the moment has to be found: early ones end the process
    // before it listens, late ones find it done.
    for wait in [20, 40, 60, 80, 120, 160, 240, 320, 480, 640] {
        let child = long(&["--json"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        interrupt(&child);
        let ran = Ran::new(child.wait_with_output().unwrap());
        match ran.code {
            Some(130) => {
                let object: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
                assert_eq!(object["finish_reason"], "cancelled");
                let tokens = object["tokens"].as_array().unwrap().len();
                assert!(tokens < 2000, "{tokens}");
                assert!(object["text"].is_string() && object["kv"]["pages"].is_u64());
                return;
            }
            None => assert_eq!(ran.stdout, ""),
            Some(code) => assert_eq!(code, 0, "{ran:?}"),
        }
    }
    panic!("no moment was found");
}

/// What a long command prints, as JSON, when Ctrl-C comes while it works.
///
/// Nothing tells when that is, so the moment has to be found: early ones end the process before it
/// listens or before there is anything to print, late ones find it done.
fn interrupted(args: &[&str]) -> serde_json::Value {
    for wait in [100, 200, 400, 800, 1600, 3200, 6400, 12_800] {
        let Some(ran) = interrupted_after(Duration::from_millis(wait), args) else { continue };
        match ran.code {
            Some(130) if ran.stdout.is_empty() => assert_eq!(ran.stderr, ""),
            Some(130) => return serde_json::from_str(&ran.stdout).unwrap(),
            None => assert_eq!(ran.stdout, ""),
            Some(_) => panic!("it was over before it could be interrupted: {args:?} {ran:?}"),
        }
    }
    panic!("no moment was found for {args:?}");
}

/// How the command ended, interrupted after `wait`; `None` when it did not end: a shell that runs
/// tests in the background has Ctrl-C ignored until the command listens to it.
fn interrupted_after(wait: Duration, args: &[&str]) -> Option<Ran> {
    let mut child = command(args).spawn().unwrap();
    std::thread::sleep(wait);
    interrupt(&child);
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(10) {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(Ran::new(child.wait_with_output().unwrap()))
}

/// A text that takes longer to read than any test waits.
fn long_text(home: &tempfile::TempDir) -> std::path::PathBuf {
    let file = home.path().join("long.txt");
    let story = "Once upon a time there was a little girl named Lily. She loved to play outside. ";
    std::fs::write(&file, story.repeat(2_500)).unwrap();
    file
}

#[test]
fn a_comparison_keeps_the_windows_that_all_policies_have_read() {
    let home = tempfile::tempdir().unwrap();
    let file = long_text(&home);
    let flags = ["eval", "kl", "--text-file", text(&file), "--json", "--dense-layers", "0"];
    let windows = ["--window", "64", "--samples", "100k", "--policies", "dense,box,h2o"];
    let rows = interrupted(&[&flags[..], &windows].concat());
    let tokens: Vec<_> = rows.as_array().unwrap().iter().map(|row| &row["tokens"]).collect();
    let read = tokens[0].as_u64().unwrap();
    assert!(tokens.len() == 3 && tokens.iter().all(|&n| n == tokens[0]), "{rows}");
    // A window predicts 31 tokens.
    assert!(read > 0 && read.is_multiple_of(31), "{rows}");
    assert!(rows[1]["perplexity"].as_f64().unwrap() > 1.0, "{rows}");
}

#[test]
fn needles_keep_the_questions_that_all_policies_have_answered() {
    let flags = "eval needle --context 200 --pairs 2 --samples 1m --policies dense,box,snapkv \
                 --dense-layers 0 --json";
    let rows = interrupted(&flags.split_whitespace().collect::<Vec<_>>());
    let samples: Vec<_> = rows.as_array().unwrap().iter().map(|row| &row["samples"]).collect();
    let asked = samples[0].as_u64().unwrap();
    assert!(samples.len() == 3 && samples.iter().all(|&n| n == samples[0]), "{rows}");
    assert!(asked > 0 && asked < 1 << 20, "{rows}");
}

#[test]
fn a_perplexity_is_of_what_was_read_until_then() {
    let home = tempfile::tempdir().unwrap();
    let file = long_text(&home);
    let told = interrupted(&["eval", "perplexity", "--text-file", text(&file), "--json"]);
    assert!(told["tokens"].as_u64().unwrap() > 0, "{told}");
    assert!(told["perplexity"].as_f64().unwrap() > 1.0, "{told}");
}

#[test]
fn an_attention_bench_tells_what_it_has_measured() {
    let flags = "bench attention --q-heads 2 --kv-heads 1 --head-dim 8 --tokens 256,512 --layers 1 \
                 --ratios 0.25 --scorer box,mean-std -r 1m -t 1 -o json";
    let rows = interrupted(&flags.split_whitespace().collect::<Vec<_>>());
    let rows = rows.as_array().unwrap();
    // The second cache was not begun.
    assert_eq!(rows.len(), 3, "{rows:?}");
    for row in rows {
        let runs = row["n_runs"].as_u64().unwrap();
        assert!(runs > 0 && runs < 1 << 20 && runs == rows[0]["n_runs"].as_u64().unwrap(), "{row}");
        assert_eq!(row["n_tokens"], 256, "{row}");
        assert!(row["median_ns"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn a_report_is_of_the_steps_until_then() {
    let home = tempfile::tempdir().unwrap();
    let [page, trace] = ["a.html", "a.trace"].map(|name| home.path().join(name));
    let run = ["analyze", "-p", "Once upon a time", "-n", "500", "--cpu", "scalar"];
    let files = ["--report", text(&page), "--trace", text(&trace), "--dense-layers", "0"];
    for wait in [50, 100, 200, 400, 800, 1600] {
        let run = [&run[..], &files].concat();
        let Some(ran) = interrupted_after(Duration::from_millis(wait), &run) else { continue };
        assert_ne!(ran.code, Some(0), "it was over before it could be interrupted: {ran:?}");
        if page.exists() {
            assert_eq!(ran.code, Some(130), "{ran:?}");
            let steps = ran.stdout.split(": ").nth(1).unwrap().trim_end();
            let count: usize = steps.split(' ').next().unwrap().parse().unwrap();
            assert!(count > 0 && count < 500, "{ran:?}");
            let again = home.path().join("b.html");
            let told = command(&["analyze", "--from", text(&trace), "--report", text(&again)]);
            assert!(Ran::new({ told }.output().unwrap()).done().contains(steps));
            return;
        }
    }
    panic!("no moment was found");
}

#[test]
fn the_second_time_ends_at_once() {
    // One prefill step of seconds, which the first Ctrl-C would wait for.
    let model = data("golden/llama-tied-rope-scaled-bf16");
    let prompt = "word ".repeat(600);
    let args = ["run", text(&model), "-p", &prompt, "--cpu", "scalar", "--json"];
    let mut child =
        command(&[&args[..], &["--attention-chunk-size", "2k"]].concat()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&child);
    std::thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none(), "the step was over too soon");
    interrupt(&child);
    let start = Instant::now();
    let ran = Ran::new(child.wait_with_output().unwrap());
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(130), ""), "{ran:?}");
}
