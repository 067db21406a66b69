//! `cargo xtask ci`: everything that a change must pass, in order, up to the first failure.

use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Crates whose only use is to compile C, or to look for C libraries on the machine.
const C_BUILDERS: &[&str] = &["autotools", "bindgen", "cc", "cmake", "nasm-rs", "pkg-config"];

/// One thing that must pass: its name, what it runs, and the environment it needs.
struct Step {
    name: &'static str,
    action: Action,
}

enum Action {
    /// Cargo with these arguments and variables.
    Cargo(&'static [&'static str], &'static [(&'static str, &'static str)]),
    /// The binary's dependencies contain nothing that would compile C.
    ///
    /// The release build alone cannot show that: where an earlier build left its results, a build
    /// script does not run again.
    NoCBuilders,
    /// The binary's dependencies may be shipped inside it.
    Licences,
    /// Clients that others wrote, against the binary.
    Clients,
    /// The server's page in a real browser.
    Page,
}

/// lm-eval installs more than everything else together: developers run it by hand.
const OPENAI_ONLY: crate::clients::Args = crate::clients::Args { no_lm_eval: true };

/// Orders of threads in which the emulator runs the CUDA kernels.
const SEEDS: &str = "TINYSERVE_TEST_CUDA_SEEDS";

const STEPS: &[Step] = &[
    Step { name: "format", action: Action::Cargo(&["fmt", "--all", "--check"], &[]) },
    Step {
        name: "lints",
        action: Action::Cargo(
            &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"],
            &[],
        ),
    },
    Step {
        name: "documentation",
        action: Action::Cargo(
            &["doc", "--workspace", "--no-deps", "--locked"],
            &[("RUSTDOCFLAGS", "-D warnings")],
        ),
    },
    Step {
        name: "release build without a C compiler",
        action: Action::Cargo(
            &["build", "--release", "--locked"],
            &[("CC", "/bin/false"), ("CXX", "/bin/false")],
        ),
    },
    Step { name: "no dependency that compiles C", action: Action::NoCBuilders },
    Step { name: "licences of the dependencies", action: Action::Licences },
    Step {
        name: "tests",
        action: Action::Cargo(&["test", "--workspace", "--locked"], &[(SEEDS, "0-7")]),
    },
    Step {
        name: "CUDA kernels under the checker",
        // Of the workspace, as the tests before: a package alone has fewer features of what it depends
        // on, which would be compiled again. The kernels' conformance is that of the CPU.
        action: Action::Cargo(
            &[
                "test",
                "--workspace",
                "--exclude",
                "tinyserve-kernels",
                "--locked",
                "--test",
                "conformance",
                "--test",
                "copies",
                "--test",
                "cublas",
            ],
            &[("TINYSERVE_TEST_CUDA", "checker"), (SEEDS, "0-0")],
        ),
    },
    Step { name: "clients of the server", action: Action::Clients },
    Step { name: "the page in a browser", action: Action::Page },
];

/// Runs every step in `root`, and says how long each one took.
pub(crate) fn run(root: &Path) -> Result<()> {
    let started = Instant::now();
    let times = run_steps(STEPS, &mut |step| step.action.run(root))?;
    println!("\nall {} steps passed in {}", STEPS.len(), seconds(started.elapsed()));
    for (step, time) in STEPS.iter().zip(times) {
        println!("  {:>8}  {}", seconds(time), step.name);
    }
    Ok(())
}

/// Runs `steps` in order, and stops at the first that fails with its number, name and cause.
fn run_steps(steps: &[Step], run: &mut dyn FnMut(&Step) -> Result<()>) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    for (number, step) in (1..).zip(steps) {
        println!("\n== {number}/{}: {}\n   {}", steps.len(), step.name, step.action.command_line());
        let started = Instant::now();
        let done = run(step);
        let time = started.elapsed();
        done.with_context(|| {
            let n_steps = steps.len();
            format!("step {number} of {n_steps}, {}, failed after {}", step.name, seconds(time))
        })?;
        println!("   passed in {}", seconds(time));
        times.push(time);
    }
    Ok(times)
}

impl Action {
    fn run(&self, root: &Path) -> Result<()> {
        match self {
            Self::Cargo(args, envs) => {
                let status = crate::cargo()
                    .args(*args)
                    .envs(envs.iter().copied())
                    .current_dir(root)
                    .status()
                    .context("cannot start cargo")?;
                self.passed(status)
            }
            Self::Page => crate::page::run(root, &crate::page::Args::default()),
            Self::Clients => crate::clients::run(root, OPENAI_ONLY),
            Self::Licences => crate::licences::check(root),
            Self::NoCBuilders => {
                let tree = crate::licences::tree(root)?;
                let found = c_builders(&tree);
                if !found.is_empty() {
                    bail!("tinyserve-cli depends on {}, expected no C", found.join(", "));
                }
                Ok(())
            }
        }
    }

    fn passed(&self, status: ExitStatus) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        bail!("`{}` ended with {status}", self.command_line())
    }

    /// What a developer types to run the same thing alone.
    fn command_line(&self) -> String {
        let (args, envs) = match self {
            Self::Cargo(args, envs) => (*args, *envs),
            Self::NoCBuilders | Self::Licences => (crate::licences::TREE, [].as_slice()),
            Self::Clients => (["xtask", "clients", "--no-lm-eval"].as_slice(), [].as_slice()),
            Self::Page => (["xtask", "page"].as_slice(), [].as_slice()),
        };
        let mut words = Vec::new();
        for (name, value) in envs {
            words.push(format!("{name}={}", quoted(value)));
        }
        words.push("cargo".to_owned());
        words.extend(args.iter().map(|arg| quoted(arg)));
        words.join(" ")
    }
}

/// The lines of `cargo tree --prefix none` that name a package which compiles C.
fn c_builders(tree: &str) -> Vec<String> {
    let mut found: Vec<String> = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| C_BUILDERS.contains(name))
        .map(str::to_owned)
        .collect();
    found.sort();
    found.dedup();
    found
}

fn quoted(word: &str) -> String {
    if word.contains([' ', '|']) { format!("{word:?}") } else { word.to_owned() }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    #[test]
    fn stops_at_the_first_failure_and_names_it() {
        let mut ran = Vec::new();
        let error = run_steps(STEPS, &mut |step| {
            ran.push(step.name);
            if step.name == "lints" { bail!("a warning") } else { Ok(()) }
        })
        .unwrap_err();
        assert_eq!(ran, ["format", "lints"]);
        let message = format!("{error:#}");
        assert!(message.starts_with("step 2 of 10, lints, failed after "), "{message}");
        assert!(message.ends_with(": a warning"), "{message}");
    }

    #[test]
    fn times_every_step() {
        let times = run_steps(STEPS, &mut |_| Ok(())).unwrap();
        assert_eq!(times.len(), STEPS.len());
    }

    #[test]
    fn a_cargo_that_fails_is_an_error() {
        let check = |arg: &'static str| {
            let status =
                crate::cargo().arg(arg).stdout(Stdio::null()).stderr(Stdio::null()).status();
            Action::Cargo(&["word"], &[]).passed(status.unwrap())
        };
        check("--version").unwrap();
        let error = check("no-such-command").unwrap_err();
        assert!(error.to_string().starts_with("`cargo word` ended with exit"), "{error}");
    }

    #[test]
    fn command_lines_can_be_typed() {
        let lines: Vec<String> = STEPS.iter().map(|step| step.action.command_line()).collect();
        assert_eq!(
            lines[2],
            r#"RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked"#
        );
        assert_eq!(lines[3], "CC=/bin/false CXX=/bin/false cargo build --release --locked");
    }

    #[test]
    fn the_binary_compiles_no_c() {
        Action::NoCBuilders.run(&crate::root()).unwrap();
    }

    #[test]
    fn finds_what_compiles_c() {
        let tree = "tinyserve-cli v0.1.0 (/a)\nonig_sys v69.9.1\ncc v1.2.0\nccc v1.0.0\ncc v1.2.0";
        assert_eq!(c_builders(tree), ["cc"]);
        assert!(c_builders("tinyserve-cli v0.1.0\nhalf v2.7.1 (*)\n").is_empty());
    }
}
