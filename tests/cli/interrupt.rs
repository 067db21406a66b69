//! Ctrl-C.
#![cfg(unix)]

use std::io::Read;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::binary::{Ran, command};

/// A run that goes on for long: the reference kernels, and a context filled to its end.
const LONG: [&str; 9] =
    ["run", "-p", "Once upon a time", "-n", "500", "--ignore-eos", "--cpu", "scalar", "--seed=1"];

fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn the_text_so_far_is_kept() {
    let mut child = command(&LONG).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0; 8];
    stdout.read_exact(&mut first).unwrap();
    interrupt(&child);
    let start = Instant::now();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let ran = Ran::new(child.wait_with_output().unwrap());
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(ran.code, Some(130), "{ran:?}");
    assert!(rest.ends_with('\n'), "{rest:?}");
    assert!(ran.stderr.contains("ended by cancelled"), "{ran:?}");
}

#[test]
fn json_says_that_it_was_cancelled() {
    // Nothing is printed while it runs, so the moment has to be found: early ones end the process
    // before it listens, late ones find it done.
    for wait in [20, 40, 60, 80, 120, 160, 240, 320, 480, 640] {
        let child = command(&[&LONG[..], &["--json"]].concat()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        interrupt(&child);
        let ran = Ran::new(child.wait_with_output().unwrap());
        match ran.code {
            Some(130) => {
                let object: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
                assert_eq!(object["finish_reason"], "cancelled");
                let tokens = object["tokens"].as_array().unwrap().len();
                assert!(tokens < 500, "{tokens}");
                assert!(object["text"].is_string() && object["kv"]["pages"].is_u64());
                return;
            }
            None => assert_eq!(ran.stdout, ""),
            Some(code) => assert_eq!(code, 0, "{ran:?}"),
        }
    }
    panic!("no moment was found");
}
