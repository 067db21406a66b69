//! The licences of what the binary is made of, against the list in `deny.toml`.
//!
//! `cargo deny check` reads the same list, and asks for advisories besides, which needs the
//! network; this does not.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// What prints each package that the binary contains or is built by, with its licence.
pub(crate) const TREE: &[&str] = &[
    "tree",
    "--color",
    "never",
    "--locked",
    "-p",
    "tinyserve-cli",
    "-e",
    "normal,build",
    "--prefix",
    "none",
    "--format",
    "{p}|{l}",
];

/// Each package of the binary, with its licence, a line each: what [`TREE`] prints.
pub(crate) fn tree(root: &Path) -> Result<String> {
    let output =
        crate::cargo().args(TREE).current_dir(root).output().context("cannot start cargo")?;
    let tree = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || !tree.starts_with("tinyserve-cli ") {
        bail!(
            "cargo tree ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(tree.into_owned())
}

/// Fails when a package may not be shipped under the licences of `deny.toml`.
pub(crate) fn check(root: &Path) -> Result<()> {
    let rules = std::fs::read_to_string(root.join("deny.toml")).context("deny.toml")?;
    let allowed = allowed(&rules).context("deny.toml: found no list, expected licenses.allow")?;
    let tree = tree(root)?;
    let (packages, refused) = refused(&tree, &allowed);
    if !refused.is_empty() {
        bail!("{}; expected {}", refused.join(", "), allowed.join(", "));
    }
    println!("   {packages} packages, each under one of {}", allowed.join(", "));
    Ok(())
}

/// The list `allow` under `[licenses]`.
fn allowed(rules: &str) -> Option<Vec<&str>> {
    let (_, section) = rules.split_once("\n[licenses]\n")?;
    let section = section.split("\n[").next()?;
    let (list, _) = section.split_once("allow = [")?.1.split_once(']')?;
    let names = list.split(',').map(|name| name.trim().trim_matches('"'));
    Some(names.filter(|name| !name.is_empty()).collect())
}

/// How many packages a tree has, and those that none of the `allowed` licences covers.
fn refused(tree: &str, allowed: &[&str]) -> (usize, Vec<String>) {
    let packages: BTreeSet<_> =
        tree.lines().filter_map(|line| line.trim_end_matches(" (*)").split_once('|')).collect();
    let bad = packages.iter().filter(|(_, licence)| !permits(licence, allowed));
    let bad = bad.map(|(package, licence)| format!("{package} is under {licence:?}")).collect();
    (packages.len(), bad)
}

/// Whether an SPDX expression leaves a choice whose every licence is `allowed`.
fn permits(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<_> = spaced.split_whitespace().collect();
    let mut words = Words { words: &words, allowed };
    words.any().is_some_and(|permitted| permitted && words.words.is_empty())
}

/// An expression that is being read; `None` stands for one that is none.
struct Words<'a> {
    words: &'a [&'a str],
    allowed: &'a [&'a str],
}

impl Words<'_> {
    fn next(&mut self) -> Option<&str> {
        let (first, rest) = self.words.split_first()?;
        self.words = rest;
        Some(first)
    }

    /// Reads `word` if it comes next.
    fn skips(&mut self, word: &str) -> bool {
        let found = self.words.first() == Some(&word);
        if found {
            self.words = &self.words[1..];
        }
        found
    }

    fn any(&mut self) -> Option<bool> {
        let mut permitted = self.all()?;
        while self.skips("OR") {
            permitted |= self.all()?;
        }
        Some(permitted)
    }

    fn all(&mut self) -> Option<bool> {
        let mut permitted = self.one()?;
        while self.skips("AND") {
            permitted &= self.one()?;
        }
        Some(permitted)
    }

    fn one(&mut self) -> Option<bool> {
        if self.skips("(") {
            let permitted = self.any()?;
            return self.skips(")").then_some(permitted);
        }
        let allowed = self.allowed;
        let name = self.next()?;
        let permitted = allowed.contains(&name);
        let is_name = !matches!(name, "OR" | "AND" | "WITH" | ")");
        // An exception only adds to what a licence permits.
        if self.skips("WITH") {
            self.next()?;
        }
        is_name.then_some(permitted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_read() {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"];
        for (expression, permitted) in [
            ("MIT", true),
            ("MIT OR GPL-3.0", true),
            ("GPL-3.0/MIT", true),
            ("MIT AND GPL-3.0", false),
            ("(MIT OR GPL-3.0) AND Unicode-3.0", true),
            ("(MIT OR GPL-3.0) AND MPL-2.0", false),
            ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", true),
            ("GPL-3.0 OR MPL-2.0 AND MIT", false),
            ("", false),
            ("MIT MIT", false),
            ("(MIT", false),
            ("MIT OR", false),
        ] {
            assert_eq!(permits(expression, &allowed), permitted, "{expression}");
        }
    }

    #[test]
    fn the_binary_may_be_shipped() {
        check(&crate::root()).unwrap();
    }

    #[test]
    fn what_is_not_allowed_is_named() {
        let rules = "# rules\n[licenses]\n# these\nallow = [\"MIT\", \"ISC\"]\n\n[bans]\n";
        let allowed = allowed(rules).unwrap();
        assert_eq!(allowed, ["MIT", "ISC"]);
        let tree = "a v1.0.0|MIT\nb v2.0.0|GPL-3.0\na v1.0.0|MIT (*)\nc v1.0.0|\n";
        let (packages, refused) = refused(tree, &allowed);
        assert_eq!(packages, 3);
        assert_eq!(refused, ["b v2.0.0 is under \"GPL-3.0\"", "c v1.0.0 is under \"\""]);
    }
}
