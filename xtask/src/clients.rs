//! `cargo xtask clients`: clients that others wrote, against the binary.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Which clients run.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(crate) struct Args {
    /// Leave lm-eval's local-completions out: it installs 760 MB.
    #[arg(long)]
    pub(crate) no_lm_eval: bool,
}

/// How long the server may take to listen, and to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the clients; where Python or its packages cannot be had, says so and passes.
pub(crate) fn run(root: &Path, args: Args) -> Result<()> {
    let folder = root.join("tests/clients");
    let python = match environment(root, "clients", &folder.join("requirements.txt")) {
        Ok(python) => python,
        Err(reason) => return skip(&reason),
    };
    let mut server = Served::start(root, &["--api-key", "key", "--max-num-queued-reqs", "24"])?;
    let status = Command::new(&python)
        .arg(folder.join("openai_python.py"))
        .arg(&server.address)
        .status()
        .context("cannot start Python")?;
    passed("openai_python.py", status)?;
    if !args.no_lm_eval {
        match environment(root, "lm-eval", &folder.join("requirements-lm-eval.txt")) {
            Ok(python) => lm_eval(&folder, &python, &server.address)?,
            Err(reason) => skip(&reason)?,
        }
    }
    server.stop()
}

fn skip(reason: &str) -> Result<()> {
    println!("   skipped: {reason}");
    Ok(())
}

fn passed(what: &str, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("{what} ended with {status}");
    }
    Ok(())
}

/// The Python of a virtual environment with the packages of `requirements`, or why there is none.
fn environment(root: &Path, name: &str, requirements: &Path) -> Result<PathBuf, String> {
    let folder = root.join("target").join(format!("venv-{name}"));
    let python = folder.join("bin/python");
    let wanted = std::fs::read(requirements)
        .map_err(|error| format!("{} cannot be read: {error}", requirements.display()))?;
    let done = folder.join("requirements.txt");
    if std::fs::read(&done).is_ok_and(|installed| installed == wanted) && python.exists() {
        return Ok(python);
    }
    let run = |command: &mut Command, what: &str| {
        let output = command.stdin(Stdio::null()).output();
        let output = output.map_err(|error| format!("{what} does not start: {error}"))?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let stderr = String::from_utf8_lossy(&output.stderr);
                Err(format!("{what} failed: {}", stderr.lines().last().unwrap_or("no reason")))
            }
        }
    };
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder), "python3 -m venv")?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"])
        .arg(requirements);
    run(&mut pip, "pip install")?;
    std::fs::write(&done, wanted).map_err(|error| format!("{}: {error}", done.display()))?;
    Ok(python)
}

/// What lm-eval measures on the tasks beside the scripts, and the least that the built-in model
/// reaches: it was trained on such stories, and a greedy answer is always the same.
const TASKS: [(&str, f64); 2] = [("tinyserve_stories", 0.7), ("tinyserve_continue", 1.0)];

/// Scores and generates, with prompts as texts and as lists of tokens.
fn lm_eval(folder: &Path, python: &Path, address: &str) -> Result<()> {
    for tokenized in ["False", "True"] {
        let model = format!(
            "model=stories260k,base_url={address}/v1/completions,num_concurrent=4,max_retries=1,\
             tokenized_requests={tokenized},tokenizer_backend=remote,auth_token=key"
        );
        let output = Command::new(python)
            .args(["-m", "lm_eval", "run", "--model", "local-completions", "--batch_size", "4"])
            .args(["--model_args", &model, "--include_path"])
            .arg(folder.join("lm_eval"))
            .args(["--tasks", &TASKS.map(|(task, _)| task).join(",")])
            // The tasks are local: nothing is asked of anybody else.
            .envs([
                ("HF_HUB_OFFLINE", "1"),
                ("HF_DATASETS_OFFLINE", "1"),
                ("OPENAI_API_KEY", "key"),
            ])
            .current_dir(folder)
            .output()
            .context("cannot start lm-eval")?;
        let table = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!(
                "lm-eval ended with {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        for (task, least) in TASKS {
            let value = measured(&table, task).with_context(|| format!("no {task} in {table}"))?;
            println!("   lm-eval, tokenized_requests={tokenized}: {task} {value}");
            if value < least {
                bail!("lm-eval measures {value} on {task}, expected at least {least}");
            }
        }
    }
    Ok(())
}

/// The value of a task in lm-eval's table: the number behind the arrow.
fn measured(table: &str, task: &str) -> Option<f64> {
    let row = table.lines().find(|line| line.starts_with('|') && line.contains(task))?;
    row.split('|').map(str::trim).skip_while(|cell| *cell != "↑").find_map(|cell| cell.parse().ok())
}

/// A server of the release binary; it ends with this value.
pub(crate) struct Served {
    child: Child,
    /// Such as `http://127.0.0.1:8000`.
    pub(crate) address: String,
}

impl Served {
    /// Builds the binary, starts it on a free port and waits until it serves.
    pub(crate) fn start(root: &Path, flags: &[&str]) -> Result<Self> {
        let built = crate::cargo()
            .args(["build", "--release", "--locked", "--quiet", "--package", "tinyserve-cli"])
            .current_dir(root)
            .status()
            .context("cannot start cargo")?;
        passed("cargo build", built)?;
        let log = root.join("target/serve.log");
        let mut child = Command::new(root.join("target/release/tinyserve"))
            .args(["serve", "--port", "0"])
            .args(flags)
            .stdin(Stdio::null())
            .stderr(File::create(&log).with_context(|| format!("cannot write {}", log.display()))?)
            .spawn()
            .context("cannot start the server")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let lines = BufReader::new(File::open(&log)?).lines().map_while(Result::ok);
            let line = lines.into_iter().find(|line| line.starts_with("serving "));
            if let Some(address) =
                line.and_then(|line| Some(line.rsplit_once(" on ")?.1.to_owned()))
            {
                return Ok(Self { child, address });
            }
            if child.try_wait()?.is_some() || Instant::now() > deadline {
                let _ = child.kill();
                let mut said = String::new();
                File::open(&log)?.read_to_string(&mut said)?;
                bail!("the server does not serve: {said}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end, as a service manager does; it must end well.
    pub(crate) fn stop(&mut self) -> Result<()> {
        let id = self.child.id().to_string();
        let status =
            Command::new("kill").args(["-TERM", &id]).status().context("cannot start kill")?;
        passed("kill", status)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return passed("the server", status);
            }
            if Instant::now() > deadline {
                bail!("the server did not end within {} s of SIGTERM", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // After a check that failed; one that ended already is not there to be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::measured;

    #[test]
    fn values_are_read_from_lm_evals_table() {
        let table = "local-completions ({'model': 'a'}), limit: None\n\
             |      Tasks      |Version|Filter|n-shot|Metric|   |Value|   |Stderr|\n\
             |-----------------|------:|------|-----:|------|---|----:|---|-----:|\n\
             |tinyserve_stories|      1|none  |     0|acc   |↑  |0.875|±  | 0.125|\n";
        assert_eq!(measured(table, "tinyserve_stories"), Some(0.875));
        assert_eq!(measured(table, "another"), None);
    }
}
