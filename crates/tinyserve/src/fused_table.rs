//! The file that remembers up to which size one launch is no slower than several.
//!
//! ```json
//! {"version": 1, "rows": [{
//!   "device": "…", "kv_cache_dtype": "f16", "page_size": 16, "q_heads": 32, "kv_heads": 8, "head_dim": 128,
//!   "times": [{"bytes": 32768, "fused_ns": 1, "split_ns": 2}]
//! }]}
//! ```
//!
//! One launch and several add up in another order. What was measured is kept, so that a clock that
//! wavers does not change a text from one start to the next.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tinyserve_kernels::{Cuda, DType, FusedTimes, Heads, most_fused_bytes};
use tinyserve_kv::KvFormat;
use tinyserve_model::ModelConfig;

use crate::{TinyServeConfig, TinyServeError};

/// Raised whenever rows say something else, or what was timed is no longer what is run.
const VERSION: u32 = 1;

/// What the file holds, and what a mistake in it is refused with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FusedTableFile {
    version: u32,
    rows: Vec<FusedTableRow>,
}

/// What was measured on a device, for a shape of heads and pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FusedTableRow {
    /// Name of the device.
    pub device: String,
    /// How keys and values are stored: f32, f16, bf16, int8 or int4.
    pub kv_cache_dtype: String,
    /// Tokens of one page.
    pub page_size: usize,
    /// Query heads.
    pub q_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// Times in the order of their bytes, at least one.
    pub times: Vec<FusedTime>,
}

/// What one layer of a decode step took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FusedTime {
    /// Bytes of the boxes of a KV head, and of its keys and values beyond 512 tokens.
    pub bytes: usize,
    /// Nanoseconds in one launch.
    pub fused_ns: u64,
    /// Nanoseconds in several.
    pub split_ns: u64,
}

impl FusedTableFile {
    /// Reads the file; where there is none, no row.
    ///
    /// # Errors
    /// When it cannot be read, is of another version, or does not say what such a file says.
    pub fn read(path: &Path) -> Result<Self, TinyServeError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { version: VERSION, rows: Vec::new() });
            }
            Err(source) => return Err(TinyServeError::ConfigIo { path: path.into(), source }),
        };
        Self::parse(&text).map_err(|found| TinyServeError::Setting {
            field: "fused_table",
            found: format!("{}, {found}", path.display()),
            expected: format!(
                "a table of version {VERSION} as a start on a CUDA device writes it; where there is \
                 no file, it is measured again"
            ),
        })
    }

    /// The table that `text` is, or what it is instead.
    fn parse(text: &str) -> Result<Self, String> {
        // Another version may have other keys, which are none of its mistakes.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } =
            serde_json::from_str(text).map_err(|error| format!("no table: {error}"))?;
        if version != VERSION {
            return Err(format!("a table of version {version}"));
        }
        let table: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        for (i, row) in table.rows.iter().enumerate() {
            let of_row = || format!("row {i}, of {}", row.device);
            if let Err(error) = row.kv_cache_dtype.parse::<KvFormat>() {
                return Err(format!("{}: {error}", of_row()));
            }
            if row.times.is_empty() || !row.times.is_sorted_by(|a, b| a.bytes < b.bytes) {
                return Err(format!("{}, whose times are not in the order of bytes", of_row()));
            }
            if table.rows[..i].iter().any(|other| other.is_like(row)) {
                return Err(format!("{}, which is there twice", of_row()));
            }
        }
        Ok(table)
    }

    /// Writes the file, whole or not at all.
    fn write(&self, path: &Path) -> Result<(), TinyServeError> {
        let failed = |source| TinyServeError::ConfigIo { path: path.into(), source };
        let text = serde_json::to_string_pretty(self).map_err(io::Error::from).map_err(failed)?;
        // Put in place whole: another start may read it now.
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".{}", std::process::id()));
        let written = fs::write(&aside, text + "\n").and_then(|()| fs::rename(&aside, path));
        written.map_err(|error| {
            let _ = fs::remove_file(&aside);
            failed(error)
        })
    }

    /// Everything that was measured.
    #[must_use]
    pub fn rows(&self) -> &[FusedTableRow] {
        &self.rows
    }
}

impl FusedTableRow {
    /// Most bytes of one launch: those up to which it was no slower, 0 where it always was.
    #[must_use]
    pub fn most_bytes(&self) -> usize {
        let times =
            |&FusedTime { bytes, fused_ns, split_ns }: &_| FusedTimes { bytes, fused_ns, split_ns };
        most_fused_bytes(&self.times.iter().map(times).collect::<Vec<_>>())
    }

    /// Whether it is of the same device and shape.
    fn is_like(&self, other: &Self) -> bool {
        let times = Vec::new();
        Self { times: times.clone(), ..self.clone() } == Self { times, ..other.clone() }
    }
}

impl TinyServeConfig {
    /// `cuda`, which chooses between one launch and several as these settings say for `model`, whose
    /// weights are stored as `stored`. What `fused_table` lacks is measured, and written there.
    ///
    /// # Errors
    /// When the file does not say what such a file says, or cannot be written; when the device
    /// fails.
    pub fn choose_fused(
        &self,
        cuda: Cuda,
        model: &ModelConfig,
        stored: DType,
    ) -> Result<Cuda, TinyServeError> {
        let cuda = cuda.use_fused_kernel(self.use_fused_kernel);
        let Some(path) = &self.fused_table else { return Ok(cuda) };
        let mut table = FusedTableFile::read(path)?;
        let layout = self.kv_layout(model, stored)?;
        let (q_heads, kv_heads) = (model.q_heads, model.kv_heads);
        let heads = Heads { q_heads, kv_heads, head_dim: model.head_dim };
        let mut row = FusedTableRow {
            device: cuda.device().name.clone(),
            kv_cache_dtype: layout.shape().format.to_string(),
            page_size: layout.page_size(),
            q_heads,
            kv_heads,
            head_dim: model.head_dim,
            times: Vec::new(),
        };
        let most = match table.rows.iter().find(|known| known.is_like(&row)) {
            Some(known) => known.most_bytes(),
            None => {
                let times = cuda.time_fused(&layout, heads)?.into_iter();
                let time = |FusedTimes { bytes, fused_ns, split_ns }| FusedTime {
                    bytes,
                    fused_ns,
                    split_ns,
                };
                row.times = times.map(time).collect();
                if row.times.is_empty() {
                    // There is no kernel to choose.
                    return Ok(cuda);
                }
                let most = row.most_bytes();
                table.rows.push(row);
                table.write(path)?;
                most
            }
        };
        Ok(cuda.use_fused_up_to(Some(most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(device: &str, times: &[(usize, u64, u64)]) -> FusedTableRow {
        let time = |&(bytes, fused_ns, split_ns): &_| FusedTime { bytes, fused_ns, split_ns };
        FusedTableRow {
            device: device.to_owned(),
            kv_cache_dtype: "int8".to_owned(),
            page_size: 16,
            q_heads: 8,
            kv_heads: 2,
            head_dim: 64,
            times: times.iter().map(time).collect(),
        }
    }

    #[test]
    fn files_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fused.json");
        assert_eq!(FusedTableFile::read(&path).unwrap().rows(), []);
        let rows = vec![row("one", &[(10, 1, 2), (20, 3, 2)]), row("other", &[(10, 3, 2)])];
        assert_eq!(rows.iter().map(FusedTableRow::most_bytes).collect::<Vec<_>>(), [10, 0]);
        let table = FusedTableFile { version: VERSION, rows };
        table.write(&path).unwrap();
        assert_eq!(FusedTableFile::read(&path).unwrap(), table);
        // What was written aside has gone.
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        let nowhere = folder.path().join("missing/fused.json");
        let refused = table.write(&nowhere).unwrap_err().to_string();
        assert!(refused.contains("missing/fused.json"), "{refused}");
    }

    #[test]
    fn mistakes_are_named() {
        let text = |rows: Vec<FusedTableRow>| {
            serde_json::to_string(&FusedTableFile { version: VERSION, rows }).unwrap()
        };
        let good = text(vec![row("a", &[(10, 1, 2)])]);
        FusedTableFile::parse(&good).unwrap();
        for (text, expected) in [
            ("{".to_owned(), "no table"),
            ("{\"rows\": []}".to_owned(), "missing field `version`"),
            (good.replace("\"version\":1", "\"version\":2"), "a table of version 2"),
            (good.replace("page_size", "pages"), "unknown field `pages`"),
            (good.replace("\"bytes\":10", "\"bytes\":-1"), "invalid value"),
            (good.replace("int8", "auto"), "row 0, of a: "),
            (text(vec![row("a", &[])]), "not in the order of bytes"),
            (text(vec![row("a", &[(2, 1, 1), (2, 1, 1)])]), "not in the order of bytes"),
            (text(vec![row("a", &[(1, 1, 1)]); 2]), "row 1, of a, which is there twice"),
        ] {
            let found = FusedTableFile::parse(&text).unwrap_err();
            assert!(found.contains(expected), "{found}, expected {expected}");
        }
    }
}
