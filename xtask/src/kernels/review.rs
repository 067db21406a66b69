//! What can be said of the kernels' speed without a GPU: registers, shared memory, loads.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::toolkit::Toolkit;
use super::{OVERLAPPING, Unit, loaded, relative, scratch};

/// What the PTX is assembled for: A100, H100.
pub(super) const ARCHITECTURES: [&str; 2] = ["sm_80", OVERLAPPING];

/// The committed table.
pub(super) fn path(root: &Path) -> PathBuf {
    root.join("docs/cuda-kernels.md")
}

/// What ptxas says of one kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Usage {
    kernel: String,
    registers: u32,
    shared: u32,
}

/// The page with every kernel's usage and bytes.
pub(super) fn page(toolkit: &Toolkit, root: &Path, units: &[Unit]) -> Result<String> {
    let mut text = "# The CUDA kernels, without a GPU\n\n\
        Written by `cargo xtask build-kernels`, and compared by `cargo xtask check-kernels`; do not \
        edit by hand.\n\
        Registers of a thread and bytes of static shared memory, as ptxas counts them for sm_80 and \
        sm_90. None spills: ptxas refuses a kernel that does.\n\
        This says what a kernel takes; how fast some are: docs/benchmarks/2026-11-26-gpu.md.\n"
        .to_owned();
    for unit in units {
        let source = fs::read_to_string(&unit.source)?;
        let _ = write!(text, "\n## {}\n\n{}\n\n", unit.name, summary(&source));
        text += "| kernel | registers sm_80 | registers sm_90 | shared memory |\n\
                 | --- | ---: | ---: | ---: |\n";
        let [old, new] = ARCHITECTURES.map(|arch| usage(toolkit, root, unit, arch));
        for (old, new) in old?.iter().zip(&new?) {
            let Usage { kernel, registers, shared } = old;
            let _ = writeln!(text, "| `{kernel}` | {registers} | {} | {shared} |", new.registers);
        }
    }
    Ok(text)
}

/// The first sentence of a source's comment, and what it says must move.
fn summary(source: &str) -> String {
    let comment: Vec<&str> =
        source.lines().map_while(|line| line.strip_prefix("//")).map(str::trim).collect();
    let first = comment.first().copied().unwrap_or_default().to_owned();
    let mut all = first;
    let mut moves = false;
    for line in &comment[1..] {
        moves = (moves && !line.is_empty()) || line.starts_with("Must move");
        if moves {
            all.push('\n');
            all += line;
        }
    }
    all
}

fn usage(toolkit: &Toolkit, root: &Path, unit: &Unit, arch: &str) -> Result<Vec<Usage>> {
    let out = cubin(root, unit, arch)?;
    let output = Command::new(toolkit.tool("ptxas"))
        .args([&format!("-arch={arch}"), "-v", "--warn-on-spills", "-Werror", "-o"])
        .arg(&out)
        .arg(loaded(root, unit, arch)?)
        .output()
        .context("ptxas")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{}: ptxas ended with {}\n{text}", relative(root, &unit.ptx), output.status);
    }
    let mut all = usages(&text);
    all.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    Ok(all)
}

fn usages(text: &str) -> Vec<Usage> {
    let mut all = Vec::new();
    let mut kernel = None;
    for line in text.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            kernel = rest.split('\'').next().map(str::to_owned);
        }
        if let (Some(rest), Some(kernel)) = (line.split("Used ").nth(1), &kernel) {
            let number = |what: &str| {
                let before = rest.split(what).next().filter(|before| before.len() < rest.len())?;
                before.rsplit([' ', ',']).find(|word| !word.is_empty())?.parse().ok()
            };
            let kernel = kernel.clone();
            let registers = number(" registers").unwrap_or_default();
            all.push(Usage {
                kernel,
                registers,
                shared: number(" bytes smem").unwrap_or_default(),
            });
        }
    }
    all
}

fn cubin(root: &Path, unit: &Unit, arch: &str) -> Result<PathBuf> {
    Ok(scratch(root)?.join(format!("{}.{arch}.cubin", unit.name)))
}

/// Kernels that stream keys, values or weights: the start of their names, how many different streams
/// they have, and whether they read single halves beside them, which are ranges of codes. Those for
/// shapes that 16 bytes do not divide are named `_any`.
const STREAMS: &[(&str, usize, bool)] = &[
    ("attend_int", 2, true),
    ("attend_", 2, false),
    ("fused_decode_", 3, true),
    ("gemm_", 2, false),
    ("gemv_", 1, false),
    ("project_", 1, false),
];

/// Kernels whose streams are not in 16-byte loads, one line each.
pub(super) fn narrow_streams(
    toolkit: &Toolkit,
    root: &Path,
    units: &[Unit],
) -> Result<Vec<String>> {
    let mut narrow = Vec::new();
    let mut seen = 0;
    for unit in units {
        for arch in ARCHITECTURES {
            let output = Command::new(toolkit.tool("cuobjdump"))
                .arg("-sass")
                .arg(cubin(root, unit, arch)?)
                .output()
                .context("cuobjdump")?;
            if !output.status.success() {
                bail!("{}: cuobjdump ended with {}", unit.name, output.status);
            }
            for (kernel, sass) in functions(&String::from_utf8_lossy(&output.stdout)) {
                let Some((_, streams, ranges)) =
                    STREAMS.iter().find(|(name, ..)| kernel.starts_with(name))
                else {
                    continue;
                };
                if kernel.ends_with("_any") {
                    continue;
                }
                seen += 1;
                let wide = sass.lines().filter(|line| is_load(line, ".128")).count();
                let halves = sass.lines().filter(|line| is_load(line, ".U16")).count();
                if wide < *streams || (halves > 0 && !ranges) {
                    narrow.push(format!(
                        "{kernel} for {arch}: {wide} loads of 16 bytes and {halves} of 2, expected \
                         at least {streams} and none"
                    ));
                }
            }
        }
    }
    if seen == 0 {
        narrow.push("no kernel that streams was found in the disassembly".to_owned());
    }
    Ok(narrow)
}

fn is_load(line: &str, width: &str) -> bool {
    line.split("LDG").nth(1).is_some_and(|rest| {
        rest.split_whitespace().next().is_some_and(|modifiers| modifiers.contains(width))
    })
}

/// The functions of a disassembly, by name.
fn functions(text: &str) -> Vec<(String, &str)> {
    text.split("Function : ")
        .skip(1)
        .filter_map(|part| {
            let (name, body) = part.split_once('\n')?;
            Some((name.trim().to_owned(), body))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ptxas_says() {
        let text = "ptxas info    : Compiling entry function 'norm_rms' for 'sm_90'\n\
                    ptxas info    : Function properties for norm_rms\n\
                    ptxas info    : Used 18 registers, used 1 barriers, 32 bytes smem\n\
                    ptxas info    : Compiling entry function 'embed' for 'sm_90'\n\
                    ptxas info    : Used 12 registers, used 0 barriers\n";
        let usage = |kernel: &str, registers, shared| Usage {
            kernel: kernel.to_owned(),
            registers,
            shared,
        };
        assert_eq!(usages(text), [usage("norm_rms", 18, 32), usage("embed", 12, 0)]);
    }

    #[test]
    fn reads_loads_by_their_width() {
        assert!(is_load("/*0090*/ LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;", ".128"));
        assert!(!is_load("/*0090*/ LDS.128 R4, [R2] ;", ".128"));
        assert!(is_load("LDG.E.U16 R4, [R2]", ".U16") && !is_load("LDG.E R4, [R2.128]", ".128"));
        let all = functions("x\n\t\tFunction : a\nLDG\n\t\tFunction : b\nSTG\n");
        assert_eq!(all, [("a".to_owned(), "LDG\n\t\t"), ("b".to_owned(), "STG\n")]);
    }

    #[test]
    fn a_source_says_what_it_is_and_what_it_moves() {
        let source =
            "// Adds.\n//\n// Grid 1.\n// Must move 8 bytes,\n// at once.\n\n// Not this.\n";
        assert_eq!(summary(source), "Adds.\nMust move 8 bytes,\nat once.");
    }
}
