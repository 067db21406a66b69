//! Rules that a kernel's source and its PTX must keep, read from their text.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Unit, relative};

/// Text that a kernel's source may not contain, and why. `ts_cuda.cuh` is what hides it.
const FORBIDDEN: &[(&str, &str)] = &[
    ("__shared__", "use TS_SHARED or TS_DYN_SHARED, which the emulator's checker sees"),
    ("asm", "wrap it in ts_cuda.cuh, with an emulated twin"),
    ("<<<", "no host code: launches are crates/tinyserve-kernels/src/cuda"),
    ("assert", "it would put a path into the PTX"),
    ("__activemask", "state the mask that is meant"),
    ("cooperative_groups", "the emulator does not have them"),
];

/// Text of PTX that depends on where it was made.
const PLACE_DEPENDENT: &[&str] = &["_INTERNAL_", "_GLOBAL__N", ".loc ", ".loc\t", ".file"];

/// Every rule that is broken, one line each.
pub(super) fn broken(root: &Path, units: &[Unit]) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    let folder = root.join("kernels");
    let entries = fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))?;
    let mut paths: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    for path in paths {
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("cu" | "cuh")) {
            let text = fs::read_to_string(&path)?;
            broken.extend(source_rules(&relative(root, &path), &text));
        }
    }
    for unit in units {
        let path = relative(root, &unit.ptx);
        let Ok(text) = fs::read_to_string(&unit.ptx) else {
            broken.push(format!("{path}: missing; run cargo xtask build-kernels"));
            continue;
        };
        broken.extend(ptx_rules(&path, &text));
    }
    Ok(broken)
}

fn source_rules(path: &str, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    if !text.starts_with("// ") {
        broken.push(format!("{path}:1: expected a comment that says the purpose"));
    }
    if path.ends_with(".cu") && !text.contains("Must move") {
        broken.push(format!("{path}: expected a sentence `Must move …` with the bytes"));
    }
    if path.ends_with("ts_cuda.cuh") {
        return broken;
    }
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.split("//").next().unwrap_or_default();
        for (word, instead) in FORBIDDEN {
            if has_word(code, word) {
                broken.push(format!("{path}:{number}: `{word}`: {instead}"));
            }
        }
        if code.starts_with("#include <") {
            broken.push(format!("{path}:{number}: expected ts_cuda.cuh to be the only include"));
        }
    }
    broken
}

fn ptx_rules(path: &str, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    for word in PLACE_DEPENDENT {
        if text.contains(word) {
            broken.push(format!("{path}: `{word}` depends on the folder that it was made in"));
        }
    }
    if !text.contains("\n.version 8.0\n") || !text.contains("\n.target sm_80\n") {
        broken.push(format!("{path}: expected .version 8.0 and .target sm_80"));
    }
    broken
}

/// Whether `word` stands in `code` by itself.
fn has_word(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back().is_some_and(part);
        let after = code[at + word.len()..].chars().next().is_some_and(part);
        // Signs stand by themselves wherever they stand.
        !word.chars().all(part) || (!before && !after)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_that_break_a_rule_are_named() {
        let good = "// Adds.\n//\n// Must move 8 bytes.\n#include \"ts_cuda.cuh\"\n";
        assert!(source_rules("kernels/add.cu", good).is_empty());
        for bad in ["__shared__ float x;", "asm(\"\");", "#include <cmath>", "f<<<1, 1>>>();"] {
            let found = source_rules("kernels/add.cu", &format!("{good}{bad}\n"));
            assert!(found.len() == 1 && found[0].starts_with("kernels/add.cu:5"), "{found:?}");
        }
        let comment = format!("{good}// no __shared__ here\nint basm;\n");
        assert!(source_rules("kernels/add.cu", &comment).is_empty());
        assert_eq!(source_rules("kernels/add.cu", "int x;\n").len(), 2);
    }

    #[test]
    fn ptx_that_depends_on_its_place_is_named() {
        let good = "//\n.version 8.0\n.target sm_80\n.address_size 64\n";
        assert!(ptx_rules("a.ptx", good).is_empty());
        assert_eq!(ptx_rules("a.ptx", &format!("{good}.global _INTERNAL_ab\n")).len(), 1);
        assert_eq!(ptx_rules("a.ptx", "//\n.version 9.0\n.target sm_80\n").len(), 1);
    }
}
