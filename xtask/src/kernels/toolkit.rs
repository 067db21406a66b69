//! Where nvcc and its tools are; a private environment from pinned wheels where there is none.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The compiler that the committed PTX is made with: another one writes other text.
const VERSION: &str = "V13.0.88";

/// What a private environment holds. Without their dependencies, which are not pinned.
const WHEELS: &[&str] = &[
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    // The first ones that can be had; they read what 13.0 writes.
    "nvidia-cuda-cuobjdump==13.2.78",
    "nvidia-cuda-nvdisasm==13.2.78",
];

/// An assembler of CUDA 12.0, the oldest driver that we support.
const OLDEST: &str = "nvidia-cuda-nvcc-cu12==12.0.140";

/// nvcc and what lies beside it.
pub(crate) struct Toolkit {
    pub(crate) nvcc: PathBuf,
    version: String,
}

impl Toolkit {
    /// nvcc from NVCC, CUDA_HOME or PATH; else the pinned one.
    pub(crate) fn find(root: &Path) -> Result<Self> {
        if let Some(nvcc) = env::var_os("NVCC") {
            return Self::at(PathBuf::from(nvcc)).context("NVCC");
        }
        if let Some(home) = env::var_os("CUDA_HOME") {
            return Self::at(Path::new(&home).join("bin/nvcc")).context("CUDA_HOME");
        }
        let on_path = env::var_os("PATH").into_iter().flat_map(|path| {
            env::split_paths(&path).map(|folder| folder.join("nvcc")).collect::<Vec<_>>()
        });
        match on_path.into_iter().find(|nvcc| nvcc.is_file()) {
            Some(nvcc) => Self::at(nvcc),
            None => Self::private(root),
        }
    }

    /// The compiler that the committed PTX is made with.
    pub(crate) fn pinned(root: &Path) -> Result<Self> {
        match Self::find(root) {
            Ok(toolkit) if toolkit.version == VERSION => Ok(toolkit),
            _ => Self::private(root),
        }
    }

    pub(crate) fn describe(&self) -> String {
        format!("nvcc {}", self.version)
    }

    /// A tool beside nvcc.
    pub(crate) fn tool(&self, name: &str) -> PathBuf {
        self.nvcc.with_file_name(name)
    }

    fn at(nvcc: PathBuf) -> Result<Self> {
        let output = Command::new(&nvcc)
            .arg("--version")
            .output()
            .with_context(|| format!("{} cannot be run", nvcc.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let words = text.split([' ', '\n', ',']);
        let version = words.filter(|word| word.starts_with('V')).find(|word| word.contains('.'));
        let Some(version) = version else {
            bail!("{} --version names no version", nvcc.display());
        };
        Ok(Self { version: version.to_owned(), nvcc })
    }

    fn private(root: &Path) -> Result<Self> {
        let folder = root.join("target/cuda-toolkit");
        let nvcc = folder.join("nvidia/cu13/bin/nvcc");
        if !nvcc.exists() {
            install(&folder, WHEELS)?;
        }
        Self::at(nvcc)
    }
}

/// The assembler of CUDA 12.0.
pub(crate) fn oldest_assembler(root: &Path) -> Result<PathBuf> {
    let folder = root.join("target/cuda-toolkit-oldest");
    let ptxas = folder.join("nvidia/cuda_nvcc/bin/ptxas");
    if !ptxas.exists() {
        install(&folder, &[OLDEST])?;
    }
    Ok(ptxas)
}

/// Installs wheels into `folder` with the pip of an environment of its own.
fn install(folder: &Path, wheels: &[&str]) -> Result<()> {
    println!("installing {} into {}", wheels.join(" "), folder.display());
    let aside = folder.with_extension("part");
    if aside.exists() {
        fs::remove_dir_all(&aside)?;
    }
    let environment = aside.join("venv");
    run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    let target = aside.join("packages");
    run(Command::new(environment.join("bin/pip"))
        .args(["install", "--quiet", "--no-deps", "--only-binary=:all:", "--target"])
        .arg(&target)
        .args(wheels))?;
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::rename(&target, folder)?;
    fs::remove_dir_all(&aside)?;
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.trim().lines().last().unwrap_or_default().to_owned();
        bail!("{command:?} ended with {}: {last}", output.status);
    }
    Ok(())
}
