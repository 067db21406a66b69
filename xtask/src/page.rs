//! `cargo xtask page`: the server's page in a real browser.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::clients::Served;
use crate::load::Client;

/// What becomes of the picture.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Args {
    /// Take a picture of the page while it answers, as a PNG file.
    #[arg(long, value_name = "FILE")]
    screenshot: Option<PathBuf>,
}

/// Clients that ask beside the page while its picture is taken.
const OTHERS: u64 = 20;
/// Names that the browser is installed under.
const BROWSERS: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "chrome"];
/// What the page is asked for: greedy, so that the answer is known.
const ASKED: &str = "prompt=Once%20upon%20a%20time&max_tokens=400&temperature=0&attention=sparse\
     &selection_ratio=0.3&run=1";
/// How the answer begins.
const ANSWER: &str = "Once upon a time</span>, there was a little girl named Lily";

/// Opens the page, lets it stream an answer, and looks at what it shows; where there is no
/// browser, says so and passes.
pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let Some(browser) = BROWSERS.into_iter().find(|name| starts(name)) else {
        println!("   skipped: none of {} is installed", BROWSERS.join(", "));
        return Ok(());
    };
    let mut server = Served::start(root, &[])?;
    let address = format!("{}/#{ASKED}", server.address);
    let (page, log) = open(browser, &["--virtual-time-budget=10000", "--dump-dom", &address])?;
    for (what, words) in [
        ("the answer", ANSWER),
        ("the summary", " tokens after 5 of the prompt"),
        ("the reason", "ended by stop"),
        ("the server's state", "<span id=\"health\">ready</span>"),
        ("the model", "<span id=\"model\">stories260k</span>"),
    ] {
        if !page.contains(words) {
            bail!("the page does not show {what}, {words:?}: {page}\n{log}");
        }
    }
    for figure in ["speed", "running", "waiting", "pages"] {
        if page.contains(&format!("<b id=\"{figure}\">–</b>")) {
            bail!("the page shows no {figure}: {page}");
        }
    }
    // Scripts that fail and resources that the policy forbids are told on the console; what it
    // finds elegant or not is not.
    let told = |line: &&str| line.contains("CONSOLE") && !line.contains("[DOM]");
    if let Some(line) = log.lines().find(told) {
        bail!("the browser's console says {line}");
    }
    if let Some(file) = &args.screenshot {
        let file = format!("--screenshot={}", file.display());
        beside_others(&server.address, || {
            open(browser, &["--virtual-time-budget=12000", &file, &address])
        })?;
    }
    println!("   the page streams an answer and shows the cache in {browser}");
    server.stop()
}

/// Does `work` while others ask the server, too: more than run at once, with pauses.
fn beside_others<T>(address: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let address = address.trim_start_matches("http://");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for client in 0..OTHERS {
            let over = &over;
            scope.spawn(move || {
                let body = json!({
                    "prompt": "Once upon a time", "max_tokens": 300 + 7 * client, "ignore_eos": true,
                    "tinyserve": {"attention": "sparse", "selection_ratio": 0.3},
                });
                let mut connection = Client::new(address);
                while !over.load(Ordering::Relaxed) {
                    // The picture shows what came of it.
                    let _ = connection.complete(&body, false, None);
                    std::thread::sleep(Duration::from_millis(10 * client));
                }
            });
        }
        let done = work();
        over.store(true, Ordering::Relaxed);
        done
    })
}

fn starts(browser: &str) -> bool {
    let run =
        Command::new(browser).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.is_ok_and(|status| status.success())
}

/// What the browser writes to stdout and stderr.
fn open(browser: &str, args: &[&str]) -> Result<(String, String)> {
    let output = Command::new(browser)
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"])
        .args(["--enable-logging=stderr", "--window-size=1280,820"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {browser}"))?;
    let (page, log) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{browser} ended with {}: {log}", output.status);
    }
    Ok((page.into_owned(), log.into_owned()))
}
