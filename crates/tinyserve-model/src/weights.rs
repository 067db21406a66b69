//! The safetensors files of a checkpoint: where each tensor lies.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Component, Path};
use std::sync::Arc;

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tinyserve_kernels::DType;

use crate::ModelError;
use crate::files::Files;
use crate::json::Fields;
use crate::mmap::MappedFile;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The same weights as a Python pickle.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
/// What follows the length at the start of a safetensors file.
const LENGTH_BYTES: usize = 8;

/// One weight file.
#[derive(Debug, Clone)]
pub(crate) struct WeightFile {
    pub(crate) name: String,
    /// The name with its place, for error messages.
    pub(crate) path: String,
    pub(crate) content: Content,
}

impl WeightFile {
    pub(crate) fn len(&self) -> usize {
        match &self.content {
            Content::Held { bytes, .. } => bytes.len(),
            Content::Made { length, .. } => *length,
        }
    }

    /// All of its bytes, held or made.
    pub(crate) fn bytes(&self) -> Bytes {
        match &self.content {
            Content::Held { bytes, .. } => bytes.clone(),
            Content::Made { make, .. } => make(),
        }
    }

    /// Where the bytes are a file's.
    pub(crate) fn map(&self) -> Option<&MappedFile> {
        match &self.content {
            Content::Held { map, .. } => map.as_ref(),
            Content::Made { .. } => None,
        }
    }
}

/// Where the bytes of a weight file come from.
#[derive(Clone)]
pub(crate) enum Content {
    /// They are in memory, or in a file that is mapped.
    Held { bytes: Bytes, map: Option<MappedFile> },
    /// They are made each time they are read, the same ones, so that they take memory only while
    /// they are used.
    Made { length: usize, make: Arc<dyn Fn() -> Bytes + Send + Sync> },
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held { bytes, map } => {
                f.debug_struct("Held").field("length", &bytes.len()).field("map", map).finish()
            }
            Self::Made { length, .. } => f.debug_struct("Made").field("length", length).finish(),
        }
    }
}

/// Where a tensor lies.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    /// Index into the files.
    pub(crate) file: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(crate) range: Range<usize>,
}

impl Stored {
    /// The element type, if it is one that weights can have.
    pub(crate) fn weight_dtype(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::Bf16),
            _ => None,
        }
    }
}

/// All tensors of a checkpoint by name.
#[derive(Debug, Clone)]
pub(crate) struct WeightFiles {
    pub(crate) files: Vec<WeightFile>,
    pub(crate) tensors: BTreeMap<String, Stored>,
}

impl WeightFiles {
    /// Maps the files and reads their headers; the weights themselves are not touched.
    pub(crate) fn open(files: &Files) -> Result<Self, ModelError> {
        if let Some((bytes, map)) = files.map(SINGLE)? {
            let content = Content::Held { bytes, map };
            let file = WeightFile { name: SINGLE.to_owned(), path: files.path(SINGLE), content };
            let tensors = header(&file, 0)?;
            return Ok(Self { files: vec![file], tensors });
        }
        if let Some(json) = files.read(INDEX)? {
            return Self::shards(files, &json);
        }
        if let Some(found) = PICKLES.into_iter().find(|name| files.exists(name)) {
            return Err(ModelError::OnlyPickle { folder: files.place(), found: found.to_owned() });
        }
        Err(ModelError::File {
            file: files.place(),
            found: "no weights".to_owned(),
            expected: format!("{SINGLE}, or {INDEX} and its shards"),
        })
    }

    /// Tensors (name, shape, content) of type `dtype` that lie in no file.
    pub(crate) fn in_memory(
        place: &str,
        dtype: DType,
        tensors: impl Iterator<Item = (String, Vec<usize>, Content)>,
    ) -> Self {
        let dtype = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::Bf16 => Dtype::BF16,
        };
        let mut all = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for (name, shape, content) in tensors {
            let file = WeightFile { name: name.clone(), path: format!("{place}/{name}"), content };
            let stored = Stored { file: all.files.len(), dtype, shape, range: 0..file.len() };
            all.files.push(file);
            all.tensors.insert(name, stored);
        }
        all
    }

    /// The files that an index names.
    fn shards(folder: &Files, json: &[u8]) -> Result<Self, ModelError> {
        let path = folder.path(INDEX);
        let fields = Fields::parse(&path, json)?;
        let expected = "an object of tensor names and the file of each";
        let Some(Value::Object(map)) = fields.get("weight_map") else {
            return Err(fields.error("weight_map", expected));
        };
        let (mut files, mut headers) = (Vec::new(), Vec::new());
        let mut numbers = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (tensor, shard) in map {
            let Some(shard) = shard.as_str().filter(|name| is_plain(name)) else {
                return Err(ModelError::Field {
                    file: path,
                    field: format!("weight_map.{tensor}"),
                    found: shard.to_string(),
                    expected: "the name of a file in the same folder".to_owned(),
                });
            };
            let number = match numbers.get(shard) {
                Some(&number) => number,
                None => {
                    let (bytes, map) = folder.map(shard)?.ok_or_else(|| ModelError::File {
                        file: folder.path(shard),
                        found: "no such file".to_owned(),
                        expected: format!("the shard that {INDEX} names for tensor {tensor}"),
                    })?;
                    let number: usize = files.len();
                    let (name, path) = (shard.to_owned(), folder.path(shard));
                    let file = WeightFile { name, path, content: Content::Held { bytes, map } };
                    headers.push(header(&file, number)?);
                    files.push(file);
                    numbers.insert(shard, number);
                    number
                }
            };
            let stored = headers[number].remove(tensor).ok_or_else(|| {
                let expected = format!("although {INDEX} says so");
                let file = files[number].path.clone();
                ModelError::MissingTensor { file, tensor: tensor.clone(), expected }
            })?;
            tensors.insert(tensor.clone(), stored);
        }
        Ok(Self { files, tensors })
    }

    /// The stored bytes of a tensor, shared with its file.
    pub(crate) fn bytes(&self, stored: &Stored) -> Bytes {
        self.files[stored.file].bytes().slice(stored.range.clone())
    }
}

/// Whether `name` names a file in the folder itself, and not one somewhere else on the machine.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none()
}

/// Reads and checks a header: every tensor lies inside the file and fills its shape.
fn header(file: &WeightFile, number: usize) -> Result<BTreeMap<String, Stored>, ModelError> {
    let wrong = |found: String| ModelError::File {
        file: file.path.clone(),
        found,
        expected: "a whole safetensors file: copy or download it again".to_owned(),
    };
    let bytes = file.bytes();
    if bytes.is_empty() {
        return Err(wrong("an empty file".to_owned()));
    }
    let (length, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| {
        wrong(format!("{} bytes that do not fit their own header ({error})", bytes.len()))
    })?;
    let start = LENGTH_BYTES + length;
    let tensors = metadata.tensors().into_iter().map(|(name, info)| {
        let (from, to) = info.data_offsets;
        let stored = Stored {
            file: number,
            dtype: info.dtype,
            shape: info.shape.clone(),
            range: start + from..start + to,
        };
        (name, stored)
    });
    Ok(tensors.collect())
}
