//! Tests that several processes share.

use std::process::Command;

use crate::Ready;

/// Says which part of a test a process runs, as `0/2`.
const PART_VARIABLE: &str = "TINYSERVE_TEST_CUDA_PART";

/// Comes before what a part has to tell, on its stderr.
const TELLS: &str = "this part tells: ";

impl Ready {
    /// Calls `test` for every part of its cases, with the part's number from 0 and how many parts
    /// there are, and returns what each of them tells; `None` in a process that had a part to run.
    ///
    /// The emulator runs one kernel after the other: on it each core has a part, in a process of its
    /// own, which runs the test `name` of this program again. A GPU has all cases in one part.
    ///
    /// # Panics
    /// When a part fails, with what it said.
    pub fn in_parts(
        &self,
        name: &str,
        test: impl FnOnce(usize, usize) -> String,
    ) -> Option<Vec<String>> {
        if let Ok(text) = std::env::var(PART_VARIABLE) {
            let part = text.split_once('/').and_then(|(number, parts)| {
                Some((number.parse::<usize>().ok()?, parts.parse::<usize>().ok()?))
            });
            let expected = "expected a part and how many there are, as 0/2";
            let (number, parts) =
                part.unwrap_or_else(|| panic!("{PART_VARIABLE} is {text:?}, {expected}"));
            eprintln!("{TELLS}{}", test(number, parts));
            return None;
        }
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let parts = self.emulator.map_or(1, |_| cores());
        if parts == 1 {
            return Some(vec![test(0, 1)]);
        }
        Some(std::thread::scope(|scope| {
            let started: Vec<_> =
                (0..parts).map(|number| scope.spawn(move || run(name, number, parts))).collect();
            let told = started.into_iter().map(|part| match part.join() {
                Ok(told) => told,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            told.collect()
        }))
    }
}

/// Runs a part of the test `name` in a process of its own, and returns what it tells.
fn run(name: &str, number: usize, parts: usize) -> String {
    let program = std::env::current_exe().expect("a test knows its program");
    let mut command = Command::new(program);
    command.args(["--exact", name, "--nocapture"]);
    command.env(PART_VARIABLE, format!("{number}/{parts}"));
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    let part = format!("part {number} of {parts} of {name}");
    assert!(output.status.success(), "{part} ended with {}:\n{said}", output.status);
    eprintln!("{part}:\n{said}");
    let told = said.lines().find_map(|line| line.strip_prefix(TELLS));
    told.unwrap_or_else(|| panic!("{part} tells nothing:\n{said}")).to_owned()
}
