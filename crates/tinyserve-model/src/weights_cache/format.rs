//! The bytes of a cache file.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tinyserve_kernels::{LinearImage, WeightFormat};

use super::identity::SourceFile;

const MAGIC: &[u8; 8] = b"TSWEIGHT";
/// Raised whenever the description at the top of `weights_cache.rs` changes.
const VERSION: u32 = 1;
/// Magic, version, length and checksum of the header.
const FIXED_BYTES: usize = 20;
/// What matrices as a whole are aligned to.
const PAGE: usize = 4096;
/// What each matrix is aligned to.
const LINE: usize = 64;
/// Bytes under one checksum: threads share them out.
const CHECKED_BYTES: usize = 8 << 20;
/// Threads that check: memory is as fast as it gets with a few.
const MOST_THREADS: usize = 8;

/// What a cache says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Header {
    layout: String,
    format: String,
    source: Vec<SourceFile>,
    matrices: BTreeMap<String, Matrix>,
    /// Of every [`CHECKED_BYTES`] of matrices.
    checksums: Vec<u32>,
    /// Bytes of matrices in all.
    bytes: usize,
}

/// Where a matrix lies, counted from the first one.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Matrix {
    bits: u8,
    inputs: usize,
    outputs: usize,
    weights: Range<usize>,
    biases: Range<usize>,
}

impl Header {
    pub(super) fn new(layout: &str, format: &str, source: Vec<SourceFile>) -> Self {
        Self {
            layout: layout.to_owned(),
            format: format.to_owned(),
            source,
            matrices: BTreeMap::new(),
            checksums: Vec::new(),
            bytes: 0,
        }
    }

    /// Writes a whole file with `images`.
    pub(super) fn write(
        mut self,
        images: &[(String, LinearImage)],
        out: &mut impl Write,
    ) -> io::Result<()> {
        for (name, image) in images {
            let start = self.bytes.next_multiple_of(LINE);
            let weights = start..start + image.weights.len();
            let biases = weights.end..weights.end + 4 * image.bias.len();
            self.bytes = biases.end;
            let (inputs, outputs) = (image.inputs, image.outputs);
            let bits = if image.format == WeightFormat::Int4 { 4 } else { 8 };
            let matrix = Matrix { bits, inputs, outputs, weights, biases };
            self.matrices.insert(name.clone(), matrix);
        }
        let mut sums = Checksums::default();
        // Once for the checksums, once for the file.
        for_each_piece(images, |piece| {
            sums.add(piece);
            Ok(())
        })?;
        self.checksums = sums.finish();
        let header = serde_json::to_vec(&self)?;
        let length = u32::try_from(header.len()).map_err(io::Error::other)?;
        out.write_all(MAGIC)?;
        for number in [VERSION, length, crc32fast::hash(&header)] {
            out.write_all(&number.to_le_bytes())?;
        }
        out.write_all(&header)?;
        let end = FIXED_BYTES + header.len();
        out.write_all(&[0; PAGE][..end.next_multiple_of(PAGE) - end])?;
        for_each_piece(images, |piece| out.write_all(piece))
    }
}

/// All bytes of the matrices in their order, zeros between them included.
fn for_each_piece(
    images: &[(String, LinearImage)],
    mut f: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0usize;
    for (_, image) in images {
        f(&[0; LINE][..at.next_multiple_of(LINE) - at])?;
        f(&image.weights)?;
        let biases: Vec<u8> = image.bias.iter().flat_map(|bias| bias.to_le_bytes()).collect();
        f(&biases)?;
        at = at.next_multiple_of(LINE) + image.weights.len() + biases.len();
    }
    Ok(())
}

/// Checksums of bytes that come in pieces.
#[derive(Default)]
struct Checksums {
    bytes: usize,
    running: crc32fast::Hasher,
    done: Vec<u32>,
}

impl Checksums {
    fn add(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() {
            let room = CHECKED_BYTES - self.bytes % CHECKED_BYTES;
            let (now, later) = piece.split_at(room.min(piece.len()));
            self.running.update(now);
            self.bytes += now.len();
            if self.bytes.is_multiple_of(CHECKED_BYTES) {
                self.done.push(std::mem::take(&mut self.running).finalize());
            }
            piece = later;
        }
    }

    fn finish(mut self) -> Vec<u32> {
        if !self.bytes.is_multiple_of(CHECKED_BYTES) {
            self.done.push(self.running.finalize());
        }
        self.done
    }
}

/// A file whose every byte is what it was when it was written.
pub(super) struct Content {
    header: Header,
    matrices: Bytes,
}

impl Content {
    /// Checks a whole file; an error says why it cannot be used.
    pub(super) fn parse(file: &Bytes, expected: &Header) -> Result<Self, String> {
        let number = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?))
        };
        if file.get(..8) != Some(MAGIC) {
            return Err("it holds something else than cached weights".to_owned());
        }
        let cut = || format!("it ends after {} bytes", file.len());
        let version = number(8).ok_or_else(cut)?;
        if version != VERSION {
            return Err(format!("its version is {version} and not {VERSION}"));
        }
        let (length, checksum) = (number(12).ok_or_else(cut)?, number(16).ok_or_else(cut)?);
        let end = FIXED_BYTES + length as usize;
        let header = file.get(FIXED_BYTES..end).ok_or_else(cut)?;
        if crc32fast::hash(header) != checksum {
            return Err("its header is not what was written".to_owned());
        }
        let header: Header = serde_json::from_slice(header)
            .map_err(|error| format!("its header cannot be read ({error})"))?;
        if header.layout != expected.layout || header.format != expected.format {
            return Err(format!("it holds {} in layout {}", header.format, header.layout));
        }
        if header.source != expected.source {
            return Err("it was made from other weight files".to_owned());
        }
        let start = end.next_multiple_of(PAGE);
        if start.checked_add(header.bytes) != Some(file.len()) {
            return Err(cut());
        }
        let matrices = file.slice(start..);
        let between = &file[end..start];
        if between.iter().any(|&byte| byte != 0) {
            return Err("its padding is not what was written".to_owned());
        }
        if header.checksums.len() != matrices.len().div_ceil(CHECKED_BYTES)
            || !checksums_match(&matrices, &header.checksums)
        {
            return Err("its weights are not what was written".to_owned());
        }
        Ok(Self { header, matrices })
    }

    /// One matrix, in the file's memory.
    pub(super) fn image(&self, name: &str) -> Option<LinearImage> {
        let matrix = self.header.matrices.get(name)?;
        let inside = |range: &Range<usize>| {
            let bytes = (range.start <= range.end).then_some(&self.matrices)?;
            (range.end <= bytes.len()).then(|| bytes.slice(range.clone()))
        };
        let biases = inside(&matrix.biases)?;
        Some(LinearImage {
            format: if matrix.bits == 4 { WeightFormat::Int4 } else { WeightFormat::Int8 },
            inputs: matrix.inputs,
            outputs: matrix.outputs,
            weights: inside(&matrix.weights)?,
            bias: biases.as_chunks().0.iter().map(|&bias| f32::from_le_bytes(bias)).collect(),
        })
    }

    /// Every matrix.
    pub(super) fn images(&self) -> Vec<(String, LinearImage)> {
        let names = self.header.matrices.keys();
        names.filter_map(|name| Some((name.clone(), self.image(name)?))).collect()
    }
}

/// Compares them on a few threads: this is what reads the file.
fn checksums_match(bytes: &[u8], checksums: &[u32]) -> bool {
    let (next, same) = (AtomicUsize::new(0), AtomicBool::new(true));
    let check = || {
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            let Some(&expected) = checksums.get(chunk) else { return };
            let start = chunk * CHECKED_BYTES;
            let part = &bytes[start..(start + CHECKED_BYTES).min(bytes.len())];
            if crc32fast::hash(part) != expected {
                same.store(false, Ordering::Relaxed);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 1..threads.min(MOST_THREADS).min(checksums.len()) {
            scope.spawn(check);
        }
        check();
    });
    same.into_inner()
}
