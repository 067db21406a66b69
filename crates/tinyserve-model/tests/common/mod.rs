//! Where the data of these tests lies, and checkpoints that are broken on purpose.
#![allow(dead_code)] // Each test file uses its own part.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use serde_json::{Value, json};
use tinyserve_model::{Checkpoint, ModelError, Tokenizer};

/// The golden checkpoints.
pub(crate) const GOLDEN: [&str; 5] = [
    "gpt2-tiny",
    "gpt2-hub-names",
    "llama-gqa",
    "llama-tied-rope-scaled-bf16",
    "llama-sharded-f16",
];

pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests").join(path)
}

pub(crate) fn golden(name: &str) -> PathBuf {
    data("golden").join(name)
}

/// A file's bytes, unpacked where it is stored packed.
pub(crate) fn read(path: &str) -> Vec<u8> {
    let plain = data(path);
    if plain.exists() {
        return fs::read(plain).unwrap();
    }
    let mut bytes = Vec::new();
    let packed = fs::File::open(data(&format!("{path}.gz"))).unwrap();
    GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    bytes
}

pub(crate) fn read_json(path: &str) -> Value {
    serde_json::from_slice(&read(path)).unwrap()
}

pub(crate) fn tokenizer(path: &str) -> Tokenizer {
    Tokenizer::from_json(path, &read(path)).unwrap()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A copy of a checkpoint that a test may break.
pub(crate) struct Broken {
    folder: tempfile::TempDir,
}

impl Broken {
    pub(crate) fn copy_of(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(golden(name)).unwrap() {
            let path = entry.unwrap().path();
            let to = folder.path().join(path.file_name().unwrap());
            // Not `fs::copy`: it would copy the permissions too.
            fs::write(to, fs::read(&path).unwrap()).unwrap();
        }
        Self { folder }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn remove(&self, file: &str) -> &Self {
        fs::remove_file(self.path().join(file)).unwrap();
        self
    }

    pub(crate) fn write(&self, file: &str, bytes: impl AsRef<[u8]>) -> &Self {
        fs::write(self.path().join(file), bytes).unwrap();
        self
    }

    pub(crate) fn bytes(&self, file: &str) -> Vec<u8> {
        fs::read(self.path().join(file)).unwrap()
    }

    /// Sets a field of a JSON file; `null` removes it.
    pub(crate) fn set(&self, file: &str, field: &str, value: Value) -> &Self {
        let mut json: Value = serde_json::from_slice(&self.bytes(file)).unwrap_or(json!({}));
        let fields = json.as_object_mut().unwrap();
        if value.is_null() {
            fields.remove(field);
        } else {
            fields.insert(field.to_owned(), value);
        }
        self.write(file, json.to_string())
    }

    /// Adds or removes fields of a JSON file that may not be there yet.
    pub(crate) fn create(&self, file: &str, json: &Value) -> &Self {
        self.write(file, json.to_string())
    }

    /// Rewrites the header of `model.safetensors`.
    pub(crate) fn edit_header(&self, edit: impl FnOnce(&mut Value)) -> &Self {
        let file = "model.safetensors";
        let bytes = self.bytes(file);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        edit(&mut header);
        self.write(file, safetensors(&header, &bytes[8 + length..]))
    }

    pub(crate) fn open(&self) -> Result<Checkpoint, ModelError> {
        Checkpoint::open(self.path())
    }
}

pub(crate) fn safetensors(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// Fails unless the error is one sentence with all of `parts` in it.
#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(result: Result<T, ModelError>, parts: &[&str]) {
    let message = result.expect_err("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    assert!(!message.contains('\n'), "{message:?}");
}

/// Reads every tensor that can be read, as a model would.
pub(crate) fn touch(checkpoint: &Checkpoint) -> usize {
    let mut sum = 0;
    for tensor in checkpoint.tensors() {
        if let Ok(tensor) = checkpoint.tensor(tensor.name, tensor.shape) {
            sum += tensor.bytes().iter().map(|&byte| usize::from(byte)).sum::<usize>();
        }
    }
    sum
}
