//! Quantised weights on disk: the same numbers as without them, whatever happened to the file.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Broken, GOLDEN, assert_refused};
use tinyserve_kernels::{Attention, Cpu, CpuOptions, WeightFormat};
use tinyserve_kv::KvFormat;
use tinyserve_model::{
    Activations, Batch, CacheOutcome, Checkpoint, KvCache, LoadOptions, LogitRows, Model, Observe,
    SequenceStep, StepOutput,
};

fn load(checkpoint: &Checkpoint, format: WeightFormat, cache: Option<&Path>) -> Model<Cpu> {
    let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let options = LoadOptions { format, cache: cache.map(PathBuf::from) };
    Model::load_with(cpu, checkpoint, &options, |_, _| ()).unwrap()
}

/// Loads with the cache; what became of it, and the bits of a few logits.
fn cached(
    checkpoint: &Checkpoint,
    format: WeightFormat,
    folder: &Path,
) -> (CacheOutcome, Vec<u32>) {
    let model = load(checkpoint, format, Some(folder));
    (model.weights_cache().unwrap().clone(), logits(&model))
}

fn logits(model: &Model<Cpu>) -> Vec<u32> {
    let layout = model.config().kv_layout(16, KvFormat::F32).unwrap();
    let mut cache = KvCache::new(model.backend(), layout, 1).unwrap();
    let mut table = cache.new_table();
    let tokens = [5, 9, 2];
    cache.extend(model.backend(), &mut table, tokens.len()).unwrap();
    let sequence = SequenceStep {
        tokens: &tokens,
        table: &table,
        attention: Attention::Dense,
        logits: LogitRows::All,
        observe: Observe::default(),
    };
    let batch = Batch { sequences: &[sequence], measure_recall: false, list_pages: false };
    let (mut activations, mut output) = (Activations::new(model), StepOutput::default());
    model.forward(&mut activations, &mut cache, &batch, &mut output).unwrap();
    output.logits(0).flatten().map(|logit| logit.to_bits()).collect()
}

/// The one file in a folder.
fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [file] = files.as_slice() else { panic!("one file, found {files:?}") };
    file.clone()
}

fn replaced(outcome: &CacheOutcome) -> &str {
    match outcome {
        CacheOutcome::Written { replaced: Some(why), .. } => why,
        other => panic!("expected a file that was replaced, found {other:?}"),
    }
}

#[test]
fn cached_weights_are_the_quantised_ones() {
    for name in GOLDEN {
        let source = Broken::copy_of(name);
        let checkpoint = source.open().unwrap();
        let folder = tempfile::tempdir().unwrap();
        // A folder that is not there yet is made.
        let folder = folder.path().join("a").join("b");
        for format in [WeightFormat::Int8, WeightFormat::Int4] {
            let expected = logits(&load(&checkpoint, format, None));
            let (outcome, found) = cached(&checkpoint, format, &folder);
            assert!(matches!(&outcome, CacheOutcome::Written { replaced: None, .. }), "{outcome}");
            assert!(!outcome.is_warning());
            assert_eq!(found, expected);
            let (outcome, found) = cached(&checkpoint, format, &folder);
            assert!(matches!(&outcome, CacheOutcome::Used { .. }), "{outcome}");
            assert_eq!(found, expected, "{name} {format:?}");
        }
        // Each format has a file of its own, and nothing half-written stays.
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
    }
}

#[test]
fn a_damaged_file_is_replaced_and_never_used() {
    let source = Broken::copy_of("llama-gqa");
    let checkpoint = source.open().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (_, expected) = cached(&checkpoint, WeightFormat::Int4, folder.path());
    let file = only_file(folder.path());
    let whole = fs::read(&file).unwrap();
    let check = |bytes: &[u8], what: String| {
        fs::write(&file, bytes).unwrap();
        let (outcome, found) = cached(&checkpoint, WeightFormat::Int4, folder.path());
        assert!(outcome.is_warning() && !replaced(&outcome).is_empty(), "{what}");
        assert!(!outcome.to_string().contains('\n'), "{what}");
        assert_eq!(found, expected, "{what}");
        assert_eq!(fs::read(only_file(folder.path())).unwrap(), whole, "{what}");
    };
    let n = whole.len();
    for end in [0, 1, 8, 19, 20, 100, 4095, 4096, n / 2, n - 1] {
        check(&whole[..end], format!("the first {end} of {n} bytes"));
    }
    check(&[&whole[..], &[0]].concat(), "a byte more".to_owned());
    check(b"something else", "something else".to_owned());
    for at in (0..40).chain((40..n).step_by(n / 60)).chain([n - 1]) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        check(&bytes, format!("a bit of byte {at} of {n}"));
    }
}

#[test]
fn a_file_of_another_model_or_format_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (Broken::copy_of("llama-gqa"), Broken::copy_of("llama-gqa"));
    // The same shapes, other weights.
    let mut bytes = other.bytes("model.safetensors");
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    other.write("model.safetensors", &bytes);
    let one = one.open().unwrap();
    let (_, expected) = cached(&one, WeightFormat::Int8, folder.path());
    let file = only_file(folder.path());
    for (format, why) in [(WeightFormat::Int8, "other weight files"), (WeightFormat::Int4, "int4")]
    {
        let elsewhere = tempfile::tempdir().unwrap();
        cached(&other.open().unwrap(), format, elsewhere.path());
        fs::copy(only_file(elsewhere.path()), &file).unwrap();
        let (outcome, found) = cached(&one, WeightFormat::Int8, folder.path());
        assert!(replaced(&outcome).contains(why), "{outcome}");
        assert_eq!(found, expected);
    }
}

#[test]
fn weights_that_changed_are_quantised_again() {
    let source = Broken::copy_of("gpt2-tiny");
    let folder = tempfile::tempdir().unwrap();
    let (_, before) = cached(&source.open().unwrap(), WeightFormat::Int8, folder.path());
    let mut bytes = source.bytes("model.safetensors");
    let n = bytes.len();
    for byte in &mut bytes[n - 2000..] {
        *byte ^= 1;
    }
    source.write("model.safetensors", &bytes);
    let checkpoint = source.open().unwrap();
    let (outcome, after) = cached(&checkpoint, WeightFormat::Int8, folder.path());
    assert!(replaced(&outcome).contains("other weight files"), "{outcome}");
    assert_ne!(after, before);
    assert_eq!(after, logits(&load(&checkpoint, WeightFormat::Int8, None)));
}

#[test]
fn what_cannot_be_written_is_told_and_weights_serve_all_the_same() {
    let source = Broken::copy_of("gpt2-tiny");
    let checkpoint = source.open().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (_, expected) = cached(&checkpoint, WeightFormat::Int8, folder.path());
    let file = only_file(folder.path());
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let (outcome, found) = cached(&checkpoint, WeightFormat::Int8, folder.path());
    assert!(matches!(&outcome, CacheOutcome::NotWritten { .. }) && outcome.is_warning());
    assert!(outcome.to_string().contains("cannot be written"), "{outcome}");
    assert_eq!(found, expected);
    assert_eq!(only_file(folder.path()), file);
}

#[test]
fn what_cannot_be_cached_is_refused() {
    let source = Broken::copy_of("gpt2-tiny");
    let checkpoint = source.open().unwrap();
    let load = |format, folder: &Path| {
        let options = LoadOptions { format, cache: Some(folder.to_owned()) };
        Model::load_with(Cpu::reference(), &checkpoint, &options, |_, _| ()).map(|_| ())
    };
    let folder = tempfile::tempdir().unwrap();
    assert_refused(load(WeightFormat::Stored, folder.path()), &["weights_cache", "int8 or int4"]);
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert_refused(load(WeightFormat::Int8, &file), &["file", "a folder for cached weights"]);
}
