//! What the crates may know of each other, read from `cargo metadata`.
//!
//! The map and its reasons are in docs/architecture.md. Rules about source text are in `sources`.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::sources::{self, Source};

/// Each crate of the house with the crates right before it. It may depend on those, and on
/// whatever those may depend on.
const CRATES: &[(&str, &[&str])] = &[
    ("tinyserve-kv", &[]),
    ("tinyserve-kernels", &["tinyserve-kv"]),
    ("tinyserve-model", &["tinyserve-kernels"]),
    ("tinyserve-lab", &["tinyserve-model"]),
    ("tinyserve-plugins", &["tinyserve-kv"]),
    ("tinyserve-sched", &["tinyserve-model", "tinyserve-plugins"]),
    ("tinyserve", &["tinyserve-sched"]),
    ("tinyserve-server", &["tinyserve"]),
    ("tinyserve-cli", &["tinyserve-server", "tinyserve-lab"]),
];

/// Packages that check the others: they may depend on all of them, and none depends on these.
const CHECKERS: &[&str] = &["tinyserve-cuda-emulator", "tinyserve-tests", "xtask"];

/// External packages that stay in their room. Dev-dependencies are free.
const ROOMS: &[(&[&str], &[&str])] = &[
    (&["cudarc"], &["tinyserve-kernels"]),
    (&["safetensors", "tokenizers"], &["tinyserve-model", "tinyserve-tests", "xtask"]),
    (
        &["memmap2"],
        &["tinyserve-kv", "tinyserve-kernels", "tinyserve-model", "tinyserve-tests", "xtask"],
    ),
    (&["minijinja", "minijinja-contrib"], &["tinyserve-model"]),
    (&["rustix"], &["tinyserve"]),
    (&["axum", "tokio", "hyper"], &["tinyserve-server"]),
    (&["clap", "anyhow", "indicatif"], &["tinyserve-cli", "xtask"]),
    (&["rustyline"], &["tinyserve-cli"]),
    (&["proptest", "criterion", "tempfile"], &["tinyserve-tests"]),
];

/// Crates with `unsafe` somewhere inside, which therefore cannot forbid it at their root.
const MAY_HOLD_UNSAFE: &[&str] =
    &["tinyserve-cuda-emulator", "tinyserve-kernels", "tinyserve-model"];

/// What we read of `cargo metadata`.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<Dependency>,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for a normal one, else `"dev"` or `"build"`.
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    src_path: String,
}

/// Prints every broken rule, and fails if there is one.
pub(crate) fn run(root: &Path) -> Result<()> {
    let broken = check(root)?;
    for line in &broken {
        eprintln!("{line}");
    }
    if !broken.is_empty() {
        bail!("the architecture check found {} broken rules, expected none", broken.len());
    }
    println!("the architecture holds");
    Ok(())
}

/// Every broken rule of the workspace in `root`, one line each.
fn check(root: &Path) -> Result<Vec<String>> {
    let output = crate::cargo()
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context("cannot read `cargo metadata`")?;

    let mut sources = BTreeSet::new();
    for package in &metadata.packages {
        sources::collect(root, &package.folder(), &mut sources)?;
    }
    let sources: Vec<Source> = sources.into_iter().collect();

    let mut broken = metadata.wrong_edges();
    broken.extend(metadata.wrong_rooms());
    broken.extend(metadata.missing_forbids(root, &sources));
    broken.extend(sources.iter().flat_map(sources::broken_rules));
    Ok(broken)
}

impl Metadata {
    /// Dependencies between our crates that point the wrong way, and crates that are not on the map.
    fn wrong_edges(&self) -> Vec<String> {
        let mut broken = Vec::new();
        for package in &self.packages {
            let name = package.name.as_str();
            let is_checker = CHECKERS.contains(&name);
            if !is_checker && !CRATES.iter().any(|(known, _)| *known == name) {
                broken.push(format!(
                    "{name}: not on the map, add it to CRATES in xtask/src/architecture.rs"
                ));
                continue;
            }
            let allowed = if is_checker { self.ours() } else { before(name) };
            for dependency in package.shipped().filter(|&it| self.ours().contains(it)) {
                if !allowed.contains(dependency) || CHECKERS.contains(&dependency) {
                    broken.push(format!(
                        "{}: depends on {dependency}, expected {}",
                        package.manifest(),
                        any_of(&allowed)
                    ));
                }
            }
        }
        broken
    }

    /// External packages in a crate where they do not belong.
    fn wrong_rooms(&self) -> Vec<String> {
        let mut broken = Vec::new();
        for package in &self.packages {
            for dependency in package.shipped() {
                for (externals, rooms) in ROOMS {
                    if externals.contains(&dependency) && !rooms.contains(&package.name.as_str()) {
                        broken.push(format!(
                            "{}: depends on {dependency}, which belongs in {} \
                             (or in dev-dependencies)",
                            package.manifest(),
                            any_of(&rooms.iter().copied().collect())
                        ));
                    }
                }
            }
        }
        broken
    }

    /// Crate roots without `#![forbid(unsafe_code)]`.
    fn missing_forbids(&self, root: &Path, sources: &[Source]) -> Vec<String> {
        let mut broken = Vec::new();
        for package in &self.packages {
            if MAY_HOLD_UNSAFE.contains(&package.name.as_str()) {
                continue;
            }
            for target in package.targets.iter().filter(|target| target.is_crate_root()) {
                let path = sources::relative(root, Path::new(&target.src_path));
                let source = sources.iter().find(|source| source.path == path);
                if !source.is_some_and(Source::forbids_unsafe) {
                    broken.push(format!("{path}: crate root without #![forbid(unsafe_code)]"));
                }
            }
        }
        broken
    }

    /// Names of our own packages, built already or not.
    fn ours(&self) -> BTreeSet<&str> {
        let members = self.packages.iter().map(|package| package.name.as_str());
        members
            .chain(CRATES.iter().map(|(name, _)| *name))
            .chain(CHECKERS.iter().copied())
            .collect()
    }
}

impl Package {
    fn folder(&self) -> std::path::PathBuf {
        Path::new(&self.manifest_path).parent().unwrap_or(Path::new("")).to_owned()
    }

    /// The manifest as messages name it: its folder's name and the file.
    fn manifest(&self) -> String {
        let folder = self.folder();
        let folder = folder.file_name().map_or("".into(), |name| name.to_string_lossy());
        format!("{folder}/Cargo.toml")
    }

    /// Dependencies of what is shipped: normal and build, not dev.
    fn shipped(&self) -> impl Iterator<Item = &str> {
        self.dependencies
            .iter()
            .filter(|dependency| dependency.kind.as_deref() != Some("dev"))
            .map(|dependency| dependency.name.as_str())
    }
}

impl Target {
    fn is_crate_root(&self) -> bool {
        self.kind.iter().any(|kind| ["lib", "bin", "proc-macro"].contains(&kind.as_str()))
    }
}

/// Every crate that `name` may depend on.
fn before(name: &str) -> BTreeSet<&'static str> {
    let mut all = BTreeSet::new();
    for (_, direct) in CRATES.iter().filter(|(known, _)| *known == name) {
        for crate_name in *direct {
            all.insert(*crate_name);
            all.extend(before(crate_name));
        }
    }
    all
}

fn any_of(names: &BTreeSet<&str>) -> String {
    if names.is_empty() {
        return "no crate of ours".to_owned();
    }
    names.iter().copied().collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn this_workspace_keeps_its_rules() {
        let broken = check(&crate::root()).unwrap();
        assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
    }

    /// A workspace of one package with one dependency.
    fn one(package: &str, dependency: &str, kind: Option<&str>) -> Metadata {
        serde_json::from_value(json!({ "packages": [{
            "name": package,
            "manifest_path": format!("/house/crates/{package}/Cargo.toml"),
            "dependencies": [{ "name": dependency, "kind": kind }],
            "targets": [{ "kind": ["lib"], "src_path": format!("/house/crates/{package}/src/lib.rs") }],
        }]}))
        .unwrap()
    }

    #[track_caller]
    fn check_edge(package: &str, dependency: &str, kind: Option<&str>, allowed: bool) {
        let broken = one(package, dependency, kind).wrong_edges();
        assert_eq!(broken.is_empty(), allowed, "{package} → {dependency}: {broken:?}");
    }

    #[test]
    fn edges_point_one_way() {
        for (package, dependency) in [
            ("tinyserve-kernels", "tinyserve-kv"),
            ("tinyserve-model", "tinyserve-kernels"),
            ("tinyserve-model", "tinyserve-kv"),
            ("tinyserve-plugins", "tinyserve-kv"),
            ("tinyserve-sched", "tinyserve-plugins"),
            ("tinyserve", "tinyserve-kv"),
            ("tinyserve", "tinyserve-plugins"),
            ("tinyserve-server", "tinyserve"),
            ("tinyserve-cli", "tinyserve"),
            ("tinyserve-cli", "tinyserve-server"),
            ("xtask", "tinyserve-sched"),
            ("tinyserve-tests", "tinyserve-cli"),
        ] {
            check_edge(package, dependency, None, true);
            check_edge(package, dependency, Some("build"), true);
        }
        for (package, dependency) in [
            ("tinyserve-kv", "tinyserve-kernels"),
            ("tinyserve-kernels", "tinyserve-model"),
            ("tinyserve-model", "tinyserve"),
            ("tinyserve-plugins", "tinyserve-kernels"),
            ("tinyserve-plugins", "tinyserve-model"),
            ("tinyserve-model", "tinyserve-plugins"),
            ("tinyserve-server", "tinyserve-cli"),
            ("tinyserve-kv", "xtask"),
            ("tinyserve-cli", "tinyserve-tests"),
            ("tinyserve-tests", "xtask"),
        ] {
            check_edge(package, dependency, None, false);
            check_edge(package, dependency, Some("build"), false);
            check_edge(package, dependency, Some("dev"), true);
        }
    }

    #[test]
    fn a_wrong_edge_is_named_with_what_was_expected() {
        assert_eq!(
            one("tinyserve-kernels", "tinyserve-model", None).wrong_edges(),
            ["tinyserve-kernels/Cargo.toml: depends on tinyserve-model, expected tinyserve-kv"]
        );
        assert_eq!(
            one("tinyserve-kv", "tinyserve", None).wrong_edges(),
            ["tinyserve-kv/Cargo.toml: depends on tinyserve, expected no crate of ours"]
        );
    }

    #[test]
    fn a_crate_that_is_not_on_the_map_is_named() {
        let broken = one("tinyserve-utils", "half", None).wrong_edges();
        assert_eq!(broken.len(), 1);
        assert!(broken[0].starts_with("tinyserve-utils: not on the map"), "{broken:?}");
    }

    #[test]
    fn external_packages_stay_in_their_rooms() {
        for (package, dependency, kind, allowed) in [
            ("tinyserve-kernels", "cudarc", None, true),
            ("tinyserve-model", "cudarc", None, false),
            ("tinyserve-model", "safetensors", None, true),
            ("xtask", "safetensors", None, true),
            ("tinyserve-cli", "safetensors", None, false),
            ("tinyserve-kv", "memmap2", None, true),
            ("tinyserve-kernels", "memmap2", None, true),
            ("tinyserve", "tokenizers", Some("build"), false),
            ("tinyserve-server", "axum", None, true),
            ("tinyserve-cli", "tokio", None, false),
            ("tinyserve-sched", "hyper", None, false),
            ("tinyserve-cli", "clap", None, true),
            ("tinyserve", "clap", None, false),
            ("tinyserve-tests", "anyhow", None, false),
            ("tinyserve-model", "indicatif", None, false),
            ("tinyserve-kv", "proptest", Some("dev"), true),
            ("tinyserve-kv", "proptest", None, false),
            ("tinyserve-kernels", "criterion", None, false),
            ("tinyserve-tests", "tempfile", None, true),
            ("xtask", "tempfile", None, false),
            ("tinyserve-kv", "half", None, true),
        ] {
            let broken = one(package, dependency, kind).wrong_rooms();
            assert_eq!(broken.is_empty(), allowed, "{package} → {dependency}: {broken:?}");
        }
    }

    #[test]
    fn crate_roots_forbid_unsafe() {
        let root = Path::new("/house");
        let with = Source {
            path: "crates/tinyserve-kv/src/lib.rs".into(),
            text: "//! Pages.\n#![forbid(unsafe_code)]\n".into(),
        };
        let without = Source { text: "//! #![forbid(unsafe_code)]\n".into(), ..with.clone() };
        let kv = one("tinyserve-kv", "half", None);
        assert!(kv.missing_forbids(root, &[with]).is_empty());
        let expected =
            ["crates/tinyserve-kv/src/lib.rs: crate root without #![forbid(unsafe_code)]"];
        assert_eq!(kv.missing_forbids(root, &[without]), expected);
        assert_eq!(kv.missing_forbids(root, &[]), expected);
        assert!(one("tinyserve-model", "half", None).missing_forbids(root, &[]).is_empty());
    }
}
