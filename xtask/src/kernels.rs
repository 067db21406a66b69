//! `cargo xtask build-kernels` and `check-kernels`: from `kernels/*.cu` to the PTX that crates embed.

mod review;
mod rules;
mod toolkit;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use tinyserve_kernels::overlapping_ptx;
use toolkit::Toolkit;

/// What nvcc 13 writes into its PTX, and what we lower it to, so that drivers from CUDA 12.0 on load
/// it. `check-kernels` has an assembler of that age confirm that nothing in it is newer.
const PTX_VERSION: (&str, &str) = (".version 9.0", ".version 8.0");

/// The architecture on which launches overlap.
const OVERLAPPING: &str = "sm_90";

/// A kernel source and the PTX that is made of it.
struct Unit {
    name: String,
    source: PathBuf,
    ptx: PathBuf,
}

/// Arguments of `check-kernels`.
#[derive(clap::Args)]
pub(crate) struct CheckArgs {
    /// Leaves out the emulator, which takes minutes.
    #[arg(long)]
    without_emulator: bool,
}

/// Writes the PTX and the table of what the kernels take.
pub(crate) fn build(root: &Path) -> Result<()> {
    let toolkit = Toolkit::find(root)?;
    println!("{}", toolkit.describe());
    fs::create_dir_all(ptx_folder(root))?;
    let units = units(root)?;
    for unit in &units {
        let text = compile(&toolkit, unit, root)?;
        fs::write(&unit.ptx, text).with_context(|| format!("{}", unit.ptx.display()))?;
        println!("  {}", relative(root, &unit.ptx));
    }
    for stale in stale(root, &units)? {
        fs::remove_file(&stale).with_context(|| format!("{}", stale.display()))?;
        println!("  {} has no source any more: removed", relative(root, &stale));
    }
    let page = review::page(&toolkit, root, &units)?;
    fs::write(review::path(root), page)?;
    println!("  {}", relative(root, &review::path(root)));
    Ok(())
}

/// Runs every check that this machine allows, and names those it skips.
pub(crate) fn check(root: &Path, args: &CheckArgs) -> Result<()> {
    let units = units(root)?;
    let mut broken = rules::broken(root, &units)?;
    println!("rules of the sources and the PTX: {} broken", broken.len());
    if let Some(stale) = stale(root, &units)?.first() {
        broken.push(format!("{}: has no source", relative(root, stale)));
    }
    match Toolkit::pinned(root) {
        Ok(toolkit) => broken.extend(with_toolkit(&toolkit, root, &units)?),
        Err(error) => println!("skipped: rebuilding, registers and spills, loads: {error:#}"),
    }
    match toolkit::oldest_assembler(root) {
        Ok(ptxas) => {
            let found = floor(&ptxas, root, &units)?;
            println!("loads from CUDA 12.0 on: {} of {}", units.len() - found.len(), units.len());
            broken.extend(found);
        }
        Err(error) => println!("skipped: the oldest driver's assembler: {error:#}"),
    }
    if !broken.is_empty() {
        for line in &broken {
            eprintln!("{line}");
        }
        bail!("check-kernels found {} mistakes, expected none", broken.len());
    }
    if args.without_emulator {
        println!("skipped: the emulator, as asked for");
        return Ok(());
    }
    for (build, seeds) in [("emulator", "0-7"), ("checker", "0-7")] {
        let started = Instant::now();
        let status = crate::cargo()
            .args(["test", "--locked", "-p", "tinyserve-cuda-emulator"])
            .env("TINYSERVE_TEST_CUDA", build)
            .env("TINYSERVE_TEST_CUDA_SEEDS", seeds)
            .current_dir(root)
            .status()
            .context("cannot start cargo")?;
        if !status.success() {
            bail!("tests on the {build}, seeds {seeds}, ended with {status}");
        }
        let seconds = started.elapsed().as_secs();
        println!("tests on the {build}, seeds {seeds}: passed in {seconds} s");
    }
    println!("the kernels hold");
    Ok(())
}

fn with_toolkit(toolkit: &Toolkit, root: &Path, units: &[Unit]) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for unit in units {
        let path = relative(root, &unit.ptx);
        let expected = compile(toolkit, unit, root)?;
        if fs::read_to_string(&unit.ptx).ok().as_deref() != Some(&expected) {
            broken
                .push(format!("{path}: not what its source gives; run cargo xtask build-kernels"));
        }
    }
    println!("rebuilt with {}: {} differ", toolkit.describe(), broken.len());
    let page = review::page(toolkit, root, units)?;
    if fs::read_to_string(review::path(root)).ok().as_deref() != Some(&page) {
        let path = relative(root, &review::path(root));
        broken.push(format!("{path}: out of date; run cargo xtask build-kernels"));
    }
    let narrow = review::narrow_streams(toolkit, root, units)?;
    println!("streams of keys, values and weights in 16-byte loads: {} are not", narrow.len());
    broken.extend(narrow);
    Ok(broken)
}

fn floor(ptxas: &Path, root: &Path, units: &[Unit]) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for unit in units {
        for arch in review::ARCHITECTURES {
            let out = scratch(root)?.join("floor.cubin");
            let output = Command::new(ptxas)
                .args([&format!("-arch={arch}"), "-o"])
                .arg(&out)
                .arg(loaded(root, unit, arch)?)
                .output()
                .with_context(|| format!("{}", ptxas.display()))?;
            // An old assembler that meets something new may also crash: anything but 0 counts.
            if !output.status.success() {
                let path = relative(root, &unit.ptx);
                let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                broken.push(format!("{path}: CUDA 12.0 refuses it for {arch}: {text}"));
            }
        }
    }
    Ok(broken)
}

/// The file of a unit's PTX as devices of `arch` load it.
fn loaded(root: &Path, unit: &Unit, arch: &str) -> Result<PathBuf> {
    if arch != OVERLAPPING {
        return Ok(unit.ptx.clone());
    }
    let ptx = fs::read_to_string(&unit.ptx).with_context(|| format!("{}", unit.ptx.display()))?;
    let path = scratch(root)?.join(format!("{}.{arch}.ptx", unit.name));
    fs::write(&path, overlapping_ptx(&ptx)).with_context(|| format!("{}", path.display()))?;
    Ok(path)
}

/// The PTX of a source, lowered.
fn compile(toolkit: &Toolkit, unit: &Unit, root: &Path) -> Result<String> {
    let out = scratch(root)?.join(format!("{}.ptx", unit.name));
    let output = Command::new(&toolkit.nvcc)
        .args(["-ptx", "-arch=compute_80", "-O3", "-std=c++17", "-DNDEBUG"])
        .args(["--Werror", "all-warnings", "-o"])
        .arg(&out)
        .arg(&unit.source)
        .output()
        .with_context(|| format!("{}", toolkit.nvcc.display()))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        bail!("{}: nvcc ended with {}\n{text}", relative(root, &unit.source), output.status);
    }
    let text = fs::read_to_string(&out)?;
    let (from, to) = PTX_VERSION;
    if !text.contains(from) && !text.contains(to) {
        bail!("{}: expected `{from}` in what nvcc writes", unit.name);
    }
    Ok(text.replacen(from, to, 1))
}

fn units(root: &Path) -> Result<Vec<Unit>> {
    let folder = root.join("kernels");
    let mut units = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))? {
        let source = entry?.path();
        if source.extension().is_some_and(|extension| extension == "cu")
            && let Some(name) = source.file_stem().and_then(|name| name.to_str())
        {
            let ptx = ptx_folder(root).join(format!("{name}.ptx"));
            units.push(Unit { name: name.to_owned(), source: source.clone(), ptx });
        }
    }
    units.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(units)
}

/// PTX whose source is gone.
fn stale(root: &Path, units: &[Unit]) -> Result<Vec<PathBuf>> {
    let mut stale = Vec::new();
    for entry in fs::read_dir(ptx_folder(root))? {
        let path = entry?.path();
        let is_ptx = path.extension().is_some_and(|extension| extension == "ptx");
        if is_ptx && units.iter().all(|unit| unit.ptx != path) {
            stale.push(path);
        }
    }
    Ok(stale)
}

fn ptx_folder(root: &Path) -> PathBuf {
    root.join("crates/tinyserve-kernels/ptx")
}

/// A folder for what is made in between.
fn scratch(root: &Path) -> Result<PathBuf> {
    let folder = root.join("target/kernels");
    fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    Ok(folder)
}

fn relative(root: &Path, path: &Path) -> String {
    crate::sources::relative(root, path)
}
