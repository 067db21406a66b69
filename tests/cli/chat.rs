//! `chat`: a conversation through pipes.

#[cfg(unix)]
use std::io::{Read, Write};

use crate::binary::{tinyserve, with_stdin};

#[test]
fn a_conversation_goes_on_and_starts_again() {
    let args = ["chat", "--temperature", "0", "-n", "12"];
    let first = "Once upon a time there was a little girl named Lily who had a big red ball";
    let said = format!("{first}\n/stats\nThen\n/stats\n/reset\n/stats\n{first}\n/what\n");
    let ran = with_stdin(&args, said.as_bytes());
    let stderr = ran.stderr.clone();
    let answers = ran.done();
    let answers: Vec<_> = answers.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(answers.first(), answers.last(), "the same again after /reset: {answers:?}");
    assert!(answers.len() >= 3 && !answers[0].is_empty(), "{answers:?}");
    let prompts: Vec<_> = stderr.lines().filter(|line| line.starts_with("prompt")).collect();
    assert!(prompts[0].contains(" 0 of them kept"), "{stderr}");
    assert!(!prompts[1].contains(" 0 of them kept"), "{stderr}");
    assert!(stderr.contains("2 turns"), "{stderr}");
    assert!(stderr.contains("nothing was said yet"), "{stderr}");
    assert!(stderr.contains("/what is no command"), "{stderr}");
}

#[test]
fn what_does_not_fit_is_said_and_the_conversation_goes_on() {
    let long = "word ".repeat(600);
    let said = format!("{long}\nOnce upon a time\n");
    let ran = with_stdin(&["chat", "--temperature", "0", "-n", "8"], said.as_bytes());
    assert!(ran.stderr.contains("at most 512"), "{ran:?}");
    assert!(ran.done().contains("there was a little girl"));
}

#[test]
fn a_model_without_a_template_is_named() {
    let model = tinyserve_tests::data("golden/gpt2-tiny");
    let model = model.to_str().unwrap();
    tinyserve(&["chat", model]).refused_with(1, &[model, "chat template"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let args = ["chat", "-n", "480", "--temperature", "1", "--seed", "1", "--cpu", "scalar"];
    let mut child =
        crate::binary::command(&args).stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"Once upon a time\n").unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 4]).unwrap();
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    // The program still listens.
    stdin.write_all(b"/stats\n/exit\n").unwrap();
    drop(stdin);
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let ran = crate::binary::Ran::new(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.stderr.contains("(stopped)") && ran.stderr.contains("ended by cancelled"),
        "{ran:?}"
    );
}
