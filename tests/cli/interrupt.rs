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
