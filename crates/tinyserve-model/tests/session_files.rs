//! Session files: what is restored is what was saved, or nothing.

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use proptest::prelude::*;
use tinyserve_kernels::{Attention, Cpu};
use tinyserve_kv::{Budget, GroupReduce, KvFormat, PageTable, Prefix, Scorer, SelectionPolicy};
use tinyserve_model::{
    Activations, Batch, Checkpoint, KvCache, LogitRows, Model, ModelError, Observe,
    RestoredSession, SelectedTokens, SequenceStep, SessionToSave, StepOutput,
};
use twox_hash::XxHash3_64;

const IDENTITY: &str = "stories260k f32";
const PAGES: usize = 40;

/// A model with a cache.
struct World {
    model: Model<Cpu>,
    cache: KvCache<Cpu>,
    activations: Activations<Cpu>,
    output: StepOutput,
}

impl World {
    fn new(checkpoint: &Checkpoint, format: KvFormat, page_size: usize) -> Self {
        let model = Model::load(Cpu::reference(), checkpoint, |_, _| {}).unwrap();
        let layout = model.config().kv_layout(page_size, format).unwrap();
        let cache = KvCache::new(model.backend(), layout, PAGES).unwrap();
        let activations = Activations::new(&model);
        Self { model, cache, activations, output: StepOutput::default() }
    }

    fn builtin() -> Self {
        Self::new(&Checkpoint::builtin().unwrap(), KvFormat::F16, 8)
    }

    /// Logits after `tokens`, which follow what `table` holds.
    fn step(&mut self, table: &mut PageTable, tokens: &[u32]) -> Vec<f32> {
        self.cache.extend(self.model.backend(), table, tokens.len()).unwrap();
        let (attention, logits) = (Attention::Dense, LogitRows::Last);
        let step = SequenceStep { tokens, table, attention, logits, observe: Observe::default() };
        let batch = Batch { sequences: &[step], measure_recall: false, list_pages: false };
        let (activations, cache) = (&mut self.activations, &mut self.cache);
        self.model.forward(activations, cache, &batch, &mut self.output).unwrap();
        self.output.logits(0).next().unwrap().to_vec()
    }

    fn save(&self, path: &Path, tokens: &[u32], table: &PageTable) -> Result<usize, ModelError> {
        let prefix = Prefix { salt: "tenant", tokens };
        let selected = &selected();
        let session = SessionToSave { identity: IDENTITY, prefix, selected, table };
        self.cache.save_session(self.model.backend(), path, session)
    }

    fn restore(&mut self, path: &Path) -> Result<RestoredSession, ModelError> {
        self.cache.restore_session(self.model.backend(), path, IDENTITY)
    }

    /// Saves a sequence of these tokens, and forgets it.
    fn save_tokens(&mut self, path: &Path, tokens: &[u32]) {
        let mut table = self.cache.new_table();
        self.step(&mut table, tokens);
        self.save(path, tokens, &table).unwrap();
        self.cache.release(table);
    }
}

/// Two policies that no default is, with shares of many digits, and a selector of the caller.
fn selected() -> Vec<SelectedTokens> {
    let policy = SelectionPolicy {
        scorer: Scorer::named("mean-std").unwrap(),
        budget: Budget::TopP(0.1 + 0.2),
        sink_pages: 3,
        recent_pages: 4,
        dense_layers: 5,
        min_context: 6,
        group_reduce: GroupReduce::SoftmaxVote,
    };
    let ratio = SelectionPolicy { budget: Budget::Ratio(1.0 / 3.0), ..SelectionPolicy::default() };
    let tokens = SelectionPolicy { budget: Budget::Tokens(77), ..ratio };
    let all = [(1..2, Some(policy)), (2..9, Some(ratio)), (9..10, Some(tokens)), (12..16, None)];
    all.map(|(positions, policy)| SelectedTokens { positions, policy }).to_vec()
}

fn tokens(from: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| 3 + (from + 7 * i) % 500).collect()
}

#[test]
fn what_is_restored_goes_on_as_what_was_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    for name in ["llama-gqa", "gpt2-tiny"] {
        let checkpoint = Checkpoint::open(&common::golden(name)).unwrap();
        for (format, page_size) in KvFormat::ALL.into_iter().flat_map(|f| [(f, 1), (f, 8), (f, 16)])
        {
            let mut world = World::new(&checkpoint, format, page_size);
            let prompt = tokens(1, 35);
            let mut table = world.cache.new_table();
            world.step(&mut table, &prompt);
            let saved = world.save(&path, &prompt, &table).unwrap();
            assert_eq!(saved, 35 - 35 % page_size);
            let tail = &prompt[saved..];
            let expected = {
                let mut whole = world.cache.fork(&table);
                assert_eq!(world.cache.truncate(&mut whole, saved), saved);
                let logits = world.step(&mut whole, &[tail, &[9, 10]].concat());
                world.cache.release(whole);
                logits
            };
            // Other pages than those it was saved from, in another process as it were.
            let mut other = World::new(&checkpoint, format, page_size);
            let mut before = other.cache.new_table();
            other.cache.extend(other.model.backend(), &mut before, 3 * page_size).unwrap();
            let mut restored = other.restore(&path).unwrap();
            assert_eq!(
                (restored.tokens.as_slice(), restored.salt.as_str()),
                (prompt.as_slice(), "tenant")
            );
            assert_eq!((restored.table.len(), restored.selected), (saved, selected()));
            let found = other.step(&mut restored.table, &[tail, &[9, 10]].concat());
            assert_eq!(found, expected, "{name} {format} {page_size}");
        }
    }
}

#[test]
fn a_file_for_another_engine_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    World::builtin().save_tokens(&path, &tokens(1, 20));
    let builtin = Checkpoint::builtin().unwrap();
    let other = Checkpoint::open(&common::golden("llama-gqa")).unwrap();
    for (mut world, word) in [
        (World::new(&builtin, KvFormat::F32, 8), "kv_cache_dtype is f16, expected f32"),
        (World::new(&builtin, KvFormat::F16, 4), "page_size is 8, expected 4"),
        (World::new(&other, KvFormat::F16, 8), "layers is 5, expected"),
    ] {
        let error = world.restore(&path).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("session"), "{error}");
        assert_eq!(world.cache.pool().used_pages(), 0);
    }
    let mut world = World::builtin();
    let backend = Cpu::reference();
    let error = world.cache.restore_session(&backend, &path, "another model").unwrap_err();
    assert!(error.to_string().contains("model is stories260k f32, expected another model"));
    let missing = world.restore(&folder.path().join("none")).unwrap_err().to_string();
    assert!(missing.contains("none cannot be read"), "{missing}");
    // A pool that is too small says so, and keeps nothing.
    let mut held = world.cache.new_table();
    world.cache.extend(&backend, &mut held, 8 * (PAGES - 1)).unwrap();
    let full = world.restore(&path).unwrap_err().to_string();
    assert!(full.contains("2 are needed"), "{full}");
    assert_eq!(world.cache.pool().free_pages(), 1);
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let mut world = World::builtin();
    world.save_tokens(&path, &tokens(1, 20));
    let good = std::fs::read(&path).unwrap();
    let mut refuse = |bytes: &[u8], what: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = world.restore(&path).expect_err(what).to_string();
        assert!(error.contains("session"), "{what}: {error}");
        assert_eq!(world.cache.pool().used_pages(), 0, "{what}");
    };
    // Every byte before the pages and of the first page's end, and a sample of the rest.
    let page = good.len() / 2;
    let front = front_bytes(&good) + 40;
    let places = (0..front).chain(page - 300..page + 300).chain((0..good.len()).step_by(97));
    for at in places.chain(good.len() - 20..good.len()) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        refuse(&bytes, &format!("a bit of byte {at}"));
    }
    for length in (0..front).chain((0..good.len()).step_by(211)) {
        refuse(&good[..length], &format!("{length} bytes"));
    }
    refuse(&[good.as_slice(), &[0]].concat(), "a byte too many");
    // Two pages that changed places have their own bytes, and are refused.
    let page = (good.len() - front_bytes(&good)) / 2;
    let (rest, last) = good.split_at(good.len() - page);
    let (front, first) = rest.split_at(rest.len() - page);
    refuse(&[front, last, first].concat(), "pages in another order");
    std::fs::write(&path, &good).unwrap();
    assert_eq!(world.restore(&path).unwrap().tokens, tokens(1, 20));
}

/// Somebody who writes such files knows how checksums are made.
#[test]
fn what_no_session_can_have_selected_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let mut world = World::builtin();
    world.save_tokens(&path, &tokens(1, 20));
    let good = std::fs::read(&path).unwrap();
    let header_end = 16 + u32::from_le_bytes(good[12..16].try_into().unwrap()) as usize;
    let (front_end, header) =
        (front_bytes(&good), std::str::from_utf8(&good[16..header_end]).unwrap());
    for (was, is, said) in [
        (r#""end":2"#, r#""end":1"#, "selected[0].positions is 1..1, expected some from 0 on"),
        (r#""end":16"#, r#""end":21"#, "selected[3].positions is 12..21"),
        (r#""start":9"#, r#""start":8"#, "selected[2].positions is 8..10, expected some from 9 on"),
        (r#""mean-std""#, r#""no-such""#, "selected[0].scorer is "),
        (r#""0.30000000000000004""#, r#""1.5""#, "selected[0].top_p_pages is 1.5, expected above"),
        (r#""0.3333333333333333""#, r#""a third""#, r#"selected[1].selection_ratio is "a third""#),
        (r#":77"#, r#":0"#, "selected[2].token_budget is 0"),
        (r#""softmax_vote""#, r#""vote""#, "a damaged header (unknown variant `vote`"),
        (r#""pages":2"#, r#""pages":3"#, "3 pages of 20 tokens, expected pages that tokens fill"),
    ] {
        let changed = header.replacen(was, is, 1);
        assert_ne!(changed, header, "{was}");
        let mut bytes = good[..12].to_vec();
        bytes.extend((changed.len() as u32).to_le_bytes());
        bytes.extend(changed.as_bytes());
        bytes.extend(&good[header_end..front_end - 8]);
        bytes.extend(XxHash3_64::oneshot(&bytes).to_le_bytes());
        bytes.extend(&good[front_end..]);
        std::fs::write(&path, bytes).unwrap();
        let error = world.restore(&path).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert_eq!(world.cache.pool().used_pages(), 0);
    }
    let mut old = good;
    old[8] = 1;
    std::fs::write(&path, old).unwrap();
    let error = world.restore(&path).unwrap_err().to_string();
    assert!(error.contains("found version 1, expected version 2: save the session"), "{error}");
}

fn front_bytes(file: &[u8]) -> usize {
    let header = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    16 + header + 4 * 20 + 8
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_file_of_anything_is_refused(
        cut in any::<prop::sample::Index>(),
        edits in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..40)), 0..4),
        tail in prop::collection::vec(any::<u8>(), 0..40),
        keep in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("session");
        let mut world = World::builtin();
        world.save_tokens(&path, &tokens(1, 20));
        let good = std::fs::read(&path).unwrap();
        let mut bytes = good.clone();
        if !keep {
            bytes.truncate(cut.index(good.len()));
            bytes.extend(&tail);
        }
        for (at, edit) in &edits {
            let at = at.index(bytes.len().max(1));
            for (i, byte) in edit.iter().enumerate().take(bytes.len().saturating_sub(at)) {
                bytes[at + i] = *byte;
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        let restored = world.restore(&path);
        prop_assert_eq!(restored.is_ok(), bytes == good);
        if restored.is_err() {
            prop_assert_eq!(world.cache.pool().used_pages(), 0);
        }
    }
}

#[test]
fn two_that_save_to_one_file_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let mut world = World::builtin();
    world.save_tokens(&path, &tokens(1, 20));
    // Somebody else is writing: the file that is there stays.
    let partial = folder.path().join("session.partial");
    let busy = std::fs::File::create(&partial).unwrap();
    busy.try_lock().unwrap();
    let table = world.restore(&path).unwrap().table;
    let error = world.save(&path, &tokens(1, 16), &table).unwrap_err().to_string();
    assert!(error.contains("another process writing it"), "{error}");
    assert_eq!(world.restore(&path).unwrap().tokens, tokens(1, 20));
    // Somebody was killed while writing: what is left is in nobody's way.
    drop(busy);
    world.save(&path, &tokens(1, 16), &table).unwrap();
    assert!(!partial.exists());
}

#[cfg(unix)]
#[test]
fn a_session_file_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    World::builtin().save_tokens(&path, &tokens(1, 20));
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

const CHILD: &str = "TINYSERVE_TEST_SESSION_FILE";

/// Not a test of its own: what the tests below run as another process, which saves to the file that
/// they name, one session and then another, until it is killed or a save fails.
#[test]
fn child_that_saves() {
    let Some(path) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let mut world = World::builtin();
    let tables = [1, 2].map(|from| {
        let mut table = world.cache.new_table();
        world.step(&mut table, &tokens(from, 80));
        table
    });
    println!("ready");
    loop {
        for (from, table) in [1, 2].into_iter().zip(&tables) {
            if let Err(error) = world.save(&path, &tokens(from, 80), table) {
                println!("{error}");
                std::process::exit(0);
            }
        }
    }
}

/// Starts the child, and waits until it begins to save.
fn child(path: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child_that_saves", "--exact", "--nocapture"]).env(CHILD, path);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("ready")));
    child
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_file_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let mut world = World::builtin();
    world.save_tokens(&path, &tokens(1, 80));
    let (mut seen, mut left) = ([0, 0], 0);
    for kill in 0..40_u64 {
        let mut child = child(&path);
        // At odd moments of writing and putting into place.
        std::thread::sleep(Duration::from_micros(977 * kill));
        child.kill().unwrap();
        child.wait().unwrap();
        left += usize::from(folder.path().join("session.partial").exists());
        let restored = world.restore(&path).unwrap();
        let from = restored.tokens[0] - 3;
        assert!(from == 1 || from == 2, "a session that nobody saved");
        assert_eq!(restored.tokens, tokens(from, 80));
        seen[from as usize - 1] += 1;
        world.cache.release(restored.table);
    }
    println!("killed 40 times: {seen:?} of the two sessions, {left} while a file was half written");
}

#[cfg(unix)]
#[test]
fn a_full_disk_fails_the_save_and_keeps_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let mut world = World::builtin();
    world.save_tokens(&path, &tokens(1, 20));
    let good = std::fs::read(&path).unwrap();
    let executable = std::env::current_exe().unwrap();
    let run = |script: &str, path: &Path| {
        let mut shell = Command::new("sh");
        shell.args(["-c", script, "sh"]).arg(&executable).arg(path.parent().unwrap());
        shell.env(CHILD, path).stdin(Stdio::null()).output().unwrap()
    };
    let child = "exec \"$1\" child_that_saves --exact --nocapture";
    // A limit on the size of files fails writes as a full disk does, with another word.
    let limited = run(&format!("trap '' XFSZ; ulimit -f 16; {child}"), &path);
    let said = String::from_utf8_lossy(&limited.stdout);
    assert!(said.contains("cannot be written"), "{said}");
    assert_eq!(std::fs::read(&path).unwrap(), good);
    assert!(!folder.path().join("session.partial").exists());
    // A small file system of its own, where the system lets a test have one.
    let mounted = r#"mount -t tmpfs -o size=64k tmpfs "$2" || { echo no mount; exit; }; "#;
    let script = format!("unshare -rm sh -c '{mounted}{child}' sh \"$1\" \"$2\"");
    let full = run(&script, &path);
    let said = String::from_utf8_lossy(&full.stdout);
    if full.stdout.is_empty() || said.contains("no mount") {
        println!("skipped: this system lets no test mount a file system");
    } else {
        assert!(said.contains("cannot be written: No space left on device"), "{said}");
    }
    assert_eq!(std::fs::read(&path).unwrap(), good, "what lies below the mount");
    assert_eq!(world.restore(&path).unwrap().tokens, tokens(1, 20));
}
