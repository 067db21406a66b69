//! Builds the binary once and runs it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tinyserve_tests::{GoldenCase, golden_cases, json};

/// The binary of this profile, built beside this test.
fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        // <target>/<profile>/deps/<this test>
        let test = std::env::current_exe().expect("this test's own path");
        let profile = test.ancestors().nth(2).expect("a folder of the profile");
        let target = profile.parent().expect("a target folder");
        let name = match profile.file_name().and_then(|name| name.to_str()) {
            Some("debug") => "dev",
            Some(name) => name,
            None => panic!("{} names no profile", profile.display()),
        };
        let build = Command::new(env!("CARGO"))
            .args(["build", "--package", "tinyserve-cli", "--profile", name])
            .args(["--message-format", "json", "--quiet", "--target-dir"])
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo");
        assert!(build.status.success(), "the binary does not build");
        let messages = String::from_utf8(build.stdout).expect("cargo's messages are UTF-8");
        let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut built =
            messages.filter_map(|message| Some(message["executable"].as_str()?.to_owned()));
        built.next_back().expect("an executable among cargo's messages").into()
    })
}

/// The command, without the settings of whoever runs the tests.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(path());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TINYSERVE_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What a run printed and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn new(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("UTF-8 on stdout"),
            stderr: String::from_utf8(output.stderr).expect("UTF-8 on stderr"),
        }
    }

    /// Its stdout, if it ended well.
    #[track_caller]
    pub(crate) fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// Its stdout as one JSON value, if it ended well.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let text = self.done();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Its stderr, if it was refused in one sentence with `code`.
    #[track_caller]
    pub(crate) fn refused(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        assert!(self.stderr.starts_with("error: "), "{self:?}");
        for word in ["panicked", "backtrace"] {
            assert!(!self.stderr.contains(word), "{self:?}");
        }
        self.stderr
    }

    /// As [`Self::refused`], in one line that has each of `words`.
    #[track_caller]
    pub(crate) fn refused_with(self, code: i32, words: &[&str]) {
        let stderr = self.refused(code);
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        for word in words {
            assert!(stderr.contains(word), "{word:?} is not in {stderr:?}");
        }
    }
}

/// Runs with `args`.
pub(crate) fn tinyserve(args: &[&str]) -> Ran {
    Ran::new(command(args).output().expect("the binary runs"))
}

/// Runs with `args` split at spaces.
pub(crate) fn words(args: &str) -> Ran {
    tinyserve(&args.split_whitespace().collect::<Vec<_>>())
}

/// Runs with `args` and `input` on stdin.
pub(crate) fn with_stdin(args: &[&str], input: &[u8]) -> Ran {
    let mut child = command(args).stdin(Stdio::piped()).spawn().expect("the binary runs");
    // The pipe closes when it is dropped. A program that refuses early may not read it.
    let _ = child.stdin.take().expect("a pipe").write_all(input);
    Ran::new(child.wait_with_output().expect("the binary ends"))
}

/// The cases of a golden checkpoint whose whole text the reference read: it cut longer ones to
/// leave room for its answer.
pub(crate) fn whole_cases(name: &str) -> Vec<GoldenCase> {
    let config: Value = json(&format!("golden/{name}/config.json"));
    let context = config.get("n_positions").or_else(|| config.get("max_position_embeddings"));
    let context = context.and_then(Value::as_u64).expect("a context") as usize;
    let mut cases = golden_cases(name);
    cases.retain(|case| case.ids.len() + case.greedy.len() < context);
    cases
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}
