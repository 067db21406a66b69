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
    // All that was said before: the prompt, and the answer as it was generated.
    let stays = stderr.lines().find(|line| line.starts_with("session")).unwrap();
    let stays = stays.split_once("; ").unwrap().1.split_once(" tokens").unwrap().0;
    assert!(prompts[1].contains(&format!(" {stays} of them kept")), "{stderr}");
    assert!(stderr.contains("2 turns"), "{stderr}");
    assert!(stderr.contains("nothing was said yet"), "{stderr}");
    assert!(stderr.contains("/what is no command"), "{stderr}");
}

#[test]
fn what_does_not_fit_is_said_and_the_conversation_goes_on() {
    let long = "word ".repeat(600);
    let said = format!("{long}\nOnce upon a time\n");
    let ran = with_stdin(&["chat", "--temperature", "0", "-n", "8"], said.as_bytes());
    let said = ran.stderr.contains("at most 512") && ran.stderr.contains("/reset to begin");
    assert!(said, "{ran:?}");
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

/// A program at a terminal of its own, which `script` makes.
#[cfg(target_os = "linux")]
struct Terminal {
    child: std::process::Child,
    input: std::process::ChildStdin,
    output: std::process::ChildStdout,
    /// What it showed, escape sequences included, and how much of it was looked for.
    shown: Vec<u8>,
    looked: usize,
}

#[cfg(target_os = "linux")]
impl Terminal {
    fn open(args: &str) -> Self {
        let binary = crate::binary::command(&[]);
        let line = format!("{} {args}", binary.get_program().display());
        let mut child = std::process::Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("TERM", "xterm")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("script, of util-linux");
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, input, output, shown: Vec::new(), looked: 0 }
    }

    fn types(&mut self, keys: &str) {
        self.input.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until it shows `text`.
    fn shows(&mut self, text: &str) {
        loop {
            let new = &self.shown[self.looked..];
            if let Some(at) = new.windows(text.len()).position(|part| part == text.as_bytes()) {
                self.looked += at + text.len();
                return;
            }
            let mut more = [0; 256];
            let read = self.output.read(&mut more).unwrap();
            let so_far = String::from_utf8_lossy(&self.shown);
            assert!(read > 0, "it ended without {text:?}: {so_far}");
            self.shown.extend_from_slice(&more[..read]);
        }
    }

    /// Waits until it has ended; its exit code.
    fn ends(mut self) -> Option<i32> {
        std::io::copy(&mut self.output, &mut std::io::sink()).unwrap();
        self.child.wait().unwrap().code()
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_terminal_has_lines_that_come_back_and_answers_that_stop() {
    let mut chat = Terminal::open("chat -n 480 --temperature 1 --seed 1 --cpu scalar");
    chat.shows("> ");
    chat.types("Once upon a tiem\x7f\x7fme\n");
    chat.shows(", ");
    chat.types("\x03");
    chat.shows("(stopped)");
    chat.shows("> ");
    chat.types("\x1b[A");
    chat.shows("Once upon a time");
    chat.types("\n");
    chat.shows("\n");
    chat.shows(" ");
    chat.types("\x03");
    chat.shows("(stopped)");
    chat.shows("> ");
    chat.types("/stats\n");
    chat.shows("ended by cancelled");
    chat.shows("2 turns");
    // At the prompt Ctrl-C says how to leave, and the second in a row leaves.
    chat.shows("> ");
    chat.types("\x03");
    chat.shows("once more");
    chat.shows("> ");
    chat.types("/help\n");
    chat.shows("arrow keys");
    chat.shows("> ");
    chat.types("\x03");
    chat.shows("once more");
    chat.shows("> ");
    chat.types("\x03");
    assert_eq!(chat.ends(), Some(130));
}

#[test]
fn a_conversation_is_saved_and_another_process_goes_on_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let talk = folder.path().join("talk");
    let talk = talk.to_str().unwrap();
    let args = ["chat", "--temperature", "0", "-n", "24"];
    let first = "Once upon a time there was a little girl named Lily who had a big red ball";
    let told = |stderr: &str, what: &str| {
        stderr.lines().find(|line| line.contains(what)).map(str::to_owned).unwrap_or_default()
    };
    let whole = with_stdin(&args, format!("{first}\n/save {talk}\nThen\n/stats\n").as_bytes());
    assert!(whole.stderr.contains("saved 2 messages, and keys and values of "), "{whole:?}");
    let stats = told(&whole.stderr, "kept from before");
    let whole = whole.done();
    let answers: Vec<_> = whole.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(answers.len(), 2, "{answers:?}");

    let again = with_stdin(&args, format!("/load {talk}\nThen\n/stats\n").as_bytes());
    assert!(again.stderr.contains("loaded 2 messages, and keys and values of "), "{again:?}");
    let kept = told(&again.stderr, "kept from before");
    assert!(!kept.contains(" 0 of them") && !stats.is_empty(), "{again:?}");
    let again = again.done();
    assert_eq!(again.lines().find(|line| !line.is_empty()), Some(answers[1]));

    // Damaged keys and values are computed again, and what was said is not lost.
    let session = format!("{talk}.session");
    let mut bytes = std::fs::read(&session).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&session, bytes).unwrap();
    let damaged = with_stdin(&args, format!("/load {talk}\nThen\n").as_bytes());
    assert!(damaged.stderr.contains("computed again") && damaged.stderr.contains(&session));
    let damaged = damaged.done();
    assert_eq!(damaged.lines().find(|line| !line.is_empty()), Some(answers[1]));

    std::fs::write(format!("{talk}.json"), "[1]").unwrap();
    let said = format!("/save {talk}\n/load {talk}\n/load\n/load {talk}-not\n");
    let refused = with_stdin(&args, said.as_bytes());
    for part in
        ["nothing was said yet", "no saved conversation", "needs the name", "cannot be read"]
    {
        assert!(refused.stderr.contains(part), "{part:?} is not in {refused:?}");
    }
    refused.done();
}
