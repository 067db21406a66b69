//! Rules about source text: where `unsafe` may stand, first lines, lengths.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Longest source file, in lines. A longer one holds more than one purpose.
const LINES_MAX: usize = 700;

/// How a file begins: with its purpose, or with the README that says it.
const FIRST_LINES: &[&str] = &["//", "#![doc = include_str!("];

/// Where `unsafe` may stand: files, or folders with a final slash.
const UNSAFE_PLACES: &[&str] = &[
    "crates/tinyserve-kernels/src/",
    "crates/tinyserve-model/src/mmap.rs",
    // Counts allocations: there is no safe way to be the allocator.
    "crates/tinyserve-model/tests/common/watched.rs",
    // Loads the emulator as a library.
    "tests/cuda-emulator/src/lib.rs",
];

/// Where vectors are instructions only in functions that have an instruction set; not where every
/// function has it.
const VECTOR_PLACE: &str = "crates/tinyserve-kernels/src/cpu/";
const NOT_VECTORS: &[&str] = &["simd/neon.rs", "simd/portable.rs"];

/// Calls whose closure the compiler may compile apart from the function that it stands in.
const OWN_FUNCTIONS: &[&str] = &["from_fn", "map", "fold", "for_each", "flat_map", "filter_map"];

/// A Rust file, its path relative to the workspace with forward slashes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
}

/// Adds every Rust file under `folder`, build results excepted.
pub(crate) fn collect(root: &Path, folder: &Path, all: &mut BTreeSet<Source>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("{}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("{}", folder.display()))?;
        let path = entry.path();
        let kind = entry.file_type().with_context(|| format!("{}", path.display()))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if kind.is_dir() && name != "target" && !name.starts_with('.') {
            collect(root, &path, all)?;
        } else if kind.is_file() && name.ends_with(".rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
            all.insert(Source { path: relative(root, &path), text });
        }
    }
    Ok(())
}

/// `path` as messages name it.
pub(crate) fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().replace('\\', "/")
}

/// Every rule that `source` breaks, one line each.
pub(crate) fn broken_rules(source: &Source) -> Vec<String> {
    let Source { path, text } = source;
    let mut broken = Vec::new();
    if !FIRST_LINES.iter().any(|begin| text.starts_with(begin)) {
        broken.push(format!("{path}:1: expected a first line `//! …` that says the purpose"));
    }
    let n_lines = text.lines().count();
    if n_lines > LINES_MAX {
        broken.push(format!("{path}: {n_lines} lines, expected at most {LINES_MAX}"));
    }
    let may_be_unsafe = UNSAFE_PLACES.iter().any(|place| match place.strip_suffix('/') {
        Some(_) => path.starts_with(place),
        None => path == place,
    });
    if !may_be_unsafe {
        for line in unsafe_lines(text) {
            broken.push(format!(
                "{path}:{line}: `unsafe`, expected only in {}",
                UNSAFE_PLACES.join(" and ")
            ));
        }
    }
    if let Some(file) = path.strip_prefix(VECTOR_PLACE)
        && !NOT_VECTORS.contains(&file)
    {
        for line in vector_closure_lines(text) {
            broken.push(format!(
                "{path}:{line}: vectors in a closure, which may be compiled without their \
                 instruction set, expected a loop or `array!`"
            ));
        }
    }
    broken
}

impl Source {
    /// Whether the file says `#![forbid(unsafe_code)]`, in code and not in a comment.
    pub(crate) fn forbids_unsafe(&self) -> bool {
        let code: String = code_only(&self.text).split_whitespace().collect();
        code.contains("#![forbid(unsafe_code)]")
    }
}

/// Numbers of the lines where the keyword `unsafe` stands in code: a block, a function, an
/// implementation, an attribute.
fn unsafe_lines(text: &str) -> Vec<usize> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(code_only(text).lines()) {
        let mut words = line.split(|c: char| !is_word(c));
        if words.any(|word| word == "unsafe") {
            found.push(number);
        }
    }
    found
}

/// Numbers of the lines where a call of [`OWN_FUNCTIONS`] begins in whose arguments vectors are
/// computed: by `simd`, or by intrinsics.
fn vector_closure_lines(text: &str) -> Vec<usize> {
    let code = code_only(text);
    let mut found = Vec::new();
    for name in OWN_FUNCTIONS {
        for (at, _) in code.match_indices(name) {
            let rest = &code[at + name.len()..];
            let rest = match rest.strip_prefix("::<") {
                Some(rest) => &rest[rest.find('(').unwrap_or(rest.len())..],
                None => rest,
            };
            if code[..at].ends_with(is_word) || !rest.starts_with('(') {
                continue;
            }
            let mut depth = 0;
            let end = rest.find(|c| {
                depth += i32::from(c == '(') - i32::from(c == ')');
                depth == 0
            });
            let arguments = &rest[..end.unwrap_or(rest.len())];
            let mut words = arguments.split(|c: char| !is_word(c));
            if arguments.contains('|')
                && words
                    .any(|word| word == "simd" || word == "intrinsic" || word.starts_with("_mm"))
            {
                found.push(1 + code[..at].matches('\n').count());
            }
        }
    }
    found.sort_unstable();
    found
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// `text` with comments, strings and character literals blanked out; line ends stay.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at);
        if end > at {
            let blanked = chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' });
            out.extend(blanked);
            at = end;
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    out
}

/// Where the comment, string or character that starts at `at` ends; `at` itself when none does.
fn literal_end(chars: &[char], at: usize) -> usize {
    let next = |offset: usize| chars.get(at + offset).copied();
    match (chars[at], next(1)) {
        ('/', Some('/')) => find(chars, at, |rest| rest[0] == '\n'),
        ('/', Some('*')) => block_comment_end(chars, at),
        ('"', _) => quoted_end(chars, at, '"'),
        ('\'', Some('\\')) => quoted_end(chars, at, '\''),
        ('\'', Some(_)) if next(2) == Some('\'') => at + 3,
        ('r', Some('"' | '#')) if starts_word(chars, at) => raw_string_end(chars, at),
        _ => at,
    }
}

/// Whether the `r` at `at` can begin a raw string: alone, or after the prefix of `br` or `cr`.
fn starts_word(chars: &[char], at: usize) -> bool {
    let outside = |index: usize| index == 0 || !is_word(chars[index - 1]);
    outside(at) || (matches!(chars[at - 1], 'b' | 'c') && outside(at - 1))
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut at = start;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                at += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    chars.len()
}

fn quoted_end(chars: &[char], start: usize, quote: char) -> usize {
    let mut at = start + 1;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            c if c == quote => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

fn raw_string_end(chars: &[char], start: usize) -> usize {
    let n_hashes = chars[start + 1..].iter().take_while(|&&c| c == '#').count();
    let open = start + 1 + n_hashes;
    if chars.get(open) != Some(&'"') {
        return start; // A raw identifier, as r#type.
    }
    let closes = |rest: &[char]| {
        rest[0] == '"' && rest.len() > n_hashes && rest[1..=n_hashes].iter().all(|&c| c == '#')
    };
    (find(chars, open + 1, closes) + 1 + n_hashes).min(chars.len())
}

/// The first place from `start` on whose rest satisfies `is_it`, else the end.
fn find(chars: &[char], start: usize, is_it: impl Fn(&[char]) -> bool) -> usize {
    (start..chars.len()).find(|&at| is_it(&chars[at..])).unwrap_or(chars.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn finds_unsafe_in_code_only() {
        for (text, lines) in [
            ("fn f() { unsafe { g() } }", vec![1]),
            ("\n\nunsafe fn f() {}", vec![3]),
            ("unsafe impl Send for X {}", vec![1]),
            ("#[unsafe(no_mangle)]\nunsafe\nextern \"C\" {}", vec![1, 2]),
            ("// unsafe { }\n/// unsafe fn\n//! unsafe impl", vec![]),
            ("/* unsafe { /* unsafe { */ unsafe { */ fn f() {}", vec![]),
            ("/* a */ unsafe {}", vec![1]),
            ("let s = \"unsafe { \\\" unsafe {\"; unsafe {}", vec![1]),
            ("let s = \"unsafe {\n unsafe {\";\nunsafe {}", vec![3]),
            ("let s = r#\"\" unsafe {\"#;", vec![]),
            ("let s = br##\"\"# unsafe {\"##;\nunsafe {}", vec![2]),
            ("let s = r\"\\\"; unsafe {}", vec![1]),
            ("let c = '\"'; unsafe {} // \"", vec![1]),
            ("let c = '\\''; unsafe {}", vec![1]),
            ("fn f<'a>(x: &'a str) { unsafe {} }", vec![1]),
            ("let r#type = var\"\"; #![forbid(unsafe_code)]", vec![]),
            ("let not_unsafe = unsafely;", vec![]),
        ] {
            assert_eq!(unsafe_lines(text), lines, "{text}");
        }
    }

    #[test]
    fn vectors_stay_in_functions_that_have_an_instruction_set() {
        for (text, lines) in [
            ("let x: [V; 2] = std::array::from_fn(|i| simd.load(&x[i]));", vec![1]),
            ("\nlet x = std::array::from_fn::<_, 2, _>(|i| {\n f(simd, i)\n});", vec![2]),
            ("codes.map(|code| intrinsic!(_mm256_and_si256(code, x)))", vec![1]),
            ("intrinsic!(codes.map(|c| f(_mm_add_ps(c, c))))", vec![1]),
            ("x.iter().fold(zero, |sum, x| simd.add(sum, x))", vec![1]),
            ("let x = std::array::from_fn(|i| &x[i]); simd.load(x[0])", vec![]),
            ("simd.sums(&sums).iter().map(|x| x + 1.0)", vec![]),
            ("array!(2, |i| simd.load(&x[i]))", vec![]),
            ("remap(|i| simd.load(i)); maps(|i| simd.load(i))", vec![]),
            ("// from_fn(|i| simd.load(i))", vec![]),
        ] {
            assert_eq!(vector_closure_lines(text), lines, "{text}");
        }
        let text = "//! A file.\nlet x = a.map(|a| simd.sum(a));\n";
        for (path, allowed) in [
            ("crates/tinyserve-kernels/src/cpu/norm.rs", false),
            ("crates/tinyserve-kernels/src/cpu/simd/avx2.rs", false),
            ("crates/tinyserve-kernels/src/cpu/simd/neon.rs", true),
            ("crates/tinyserve-kernels/src/cuda/copies.rs", true),
        ] {
            let broken = broken_rules(&source(path, text));
            assert_eq!(broken.is_empty(), allowed, "{path}: {broken:?}");
        }
    }

    #[test]
    fn unsafe_has_its_places() {
        let text = "//! A file.\nunsafe fn f() {}\n";
        for (path, allowed) in [
            ("crates/tinyserve-kernels/src/cpu/simd.rs", true),
            ("crates/tinyserve-model/src/mmap.rs", true),
            ("crates/tinyserve-model/src/weights.rs", false),
            ("crates/tinyserve-kernels/tests/cases.rs", false),
            ("crates/tinyserve-kernels/build.rs", false),
            ("crates/tinyserve-cli/src/main.rs", false),
            ("tests/src/lib.rs", false),
            ("xtask/src/main.rs", false),
        ] {
            let broken = broken_rules(&source(path, text));
            assert_eq!(broken.is_empty(), allowed, "{path}: {broken:?}");
            if !allowed {
                assert!(broken[0].starts_with(&format!("{path}:2: `unsafe`")), "{broken:?}");
            }
        }
    }

    #[test]
    fn a_file_begins_with_its_purpose() {
        assert!(broken_rules(&source("a.rs", "//! Pages.\n")).is_empty());
        assert!(
            broken_rules(&source("a.rs", "#![doc = include_str!(\"../README.md\")]")).is_empty()
        );
        assert!(broken_rules(&source("a.rs", "// Generated by cargo xtask.\n")).is_empty());
        for text in
            ["use std::fmt;\n//! Late.\n", "#![forbid(unsafe_code)]\n", "", "\n//! Pages.\n"]
        {
            let broken = broken_rules(&source("a.rs", text));
            assert_eq!(broken, ["a.rs:1: expected a first line `//! …` that says the purpose"]);
        }
    }

    #[test]
    fn a_file_has_an_end() {
        let text = "// A line.\n".repeat(LINES_MAX);
        assert!(broken_rules(&source("a.rs", &text)).is_empty());
        let longer = broken_rules(&source("a.rs", &(text + "// One more.\n")));
        assert_eq!(longer, ["a.rs: 701 lines, expected at most 700"]);
    }

    #[test]
    fn reads_the_files_of_a_package() {
        let root = crate::root();
        let mut all = BTreeSet::new();
        collect(&root, &root.join("xtask"), &mut all).unwrap();
        let this = all.iter().find(|source| source.path == "xtask/src/sources.rs").unwrap();
        assert!(this.text.contains("reads_the_files_of_a_package"));
    }
}
