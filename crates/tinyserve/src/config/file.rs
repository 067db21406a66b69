//! Files of settings.

use std::path::Path;

use crate::{TinyServeConfig, TinyServeError};

impl TinyServeConfig {
    /// Reads a `.json` or `.toml` file; keys that it leaves out keep their defaults.
    ///
    /// # Errors
    /// When the file cannot be read, has another ending, holds an unknown key or a value of the
    /// wrong type, or a value is out of its range.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TinyServeError> {
        let path = path.as_ref();
        let format = FileFormat::of(path)?;
        let text = std::fs::read_to_string(path)
            .map_err(|source| TinyServeError::ConfigIo { path: path.into(), source })?;
        let config: Self = match format {
            FileFormat::Json => serde_json::from_str(&text).map_err(|e| e.to_string()),
            FileFormat::Toml => toml::from_str(&text).map_err(|e| one_line(&e)),
        }
        .map_err(|message| TinyServeError::ConfigFormat {
            path: path.into(),
            message: renamed(message),
        })?;
        config.check().map_err(|error| TinyServeError::ConfigFormat {
            path: path.into(),
            message: error.to_string(),
        })?;
        Ok(config)
    }

    /// Writes a `.json` or `.toml` file.
    ///
    /// # Errors
    /// When the file cannot be written or has another ending.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), TinyServeError> {
        let path = path.as_ref();
        let text = match FileFormat::of(path)? {
            FileFormat::Json => serde_json::to_string_pretty(self).map_err(|e| e.to_string()),
            FileFormat::Toml => toml::to_string_pretty(self).map_err(|e| e.to_string()),
        }
        .map_err(|message| TinyServeError::ConfigFormat { path: path.into(), message })?;
        std::fs::write(path, text + "\n")
            .map_err(|source| TinyServeError::ConfigIo { path: path.into(), source })
    }
}

enum FileFormat {
    Json,
    Toml,
}

impl FileFormat {
    fn of(path: &Path) -> Result<Self, TinyServeError> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Ok(Self::Json),
            Some("toml") => Ok(Self::Toml),
            _ => Err(TinyServeError::ConfigFormat {
                path: path.into(),
                message: "a configuration file ends in .json or .toml".to_owned(),
            }),
        }
    }
}

/// Says of a published name what it is called here; the error lists every other name.
fn renamed(message: String) -> String {
    if message.starts_with("unknown field `max_cache_size_gb`") {
        return "max_cache_size_gb is not a setting: kv_cache_memory_bytes is, in bytes \
                (8 GB are 8000000000)"
            .to_owned();
    }
    message
}

/// A TOML error without the excerpt that it draws under its sentence.
fn one_line(error: &toml::de::Error) -> String {
    error.message().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionMode, GroupReduceName, KvCacheDtype};

    #[test]
    fn files_round_trip_and_leave_defaults_alone() {
        let dir = tempfile::tempdir().unwrap();
        let config = TinyServeConfig {
            page_size: 32,
            token_budget: Some(512),
            attention: AttentionMode::Sparse,
            scorer: "mean-std".to_owned().try_into().unwrap(),
            group_reduce: GroupReduceName::SoftmaxVote,
            kv_cache_dtype: KvCacheDtype::Bf16,
            ..TinyServeConfig::default()
        };
        for name in ["c.json", "c.toml"] {
            let path = dir.path().join(name);
            config.save(&path).unwrap();
            assert_eq!(TinyServeConfig::load(&path).unwrap(), config);
        }
        let path = dir.path().join("partial.toml");
        std::fs::write(&path, "block_size = 8\nmax_model_len = 100\n").unwrap();
        let loaded = TinyServeConfig::load(&path).unwrap();
        assert_eq!((loaded.page_size, loaded.max_sequence_length), (8, Some(100)));
        assert_eq!(loaded.selection_ratio, 0.3);
    }

    #[test]
    fn mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let cases = [
            ("a.toml", "pages = 3", "pages"),
            ("y.json", r#"{"max_cache_size_gb": 8}"#, "gb is not a setting: kv_cache_memory_bytes"),
            ("y.toml", "max_cache_size_gb = 8", "gb is not a setting: kv_cache_memory_bytes"),
            ("b.json", r#"{"selection_ratio": 0}"#, "selection_ratio is 0"),
            ("c.json", r#"{"selection_ratio": 1.5}"#, "selection_ratio is 1.5"),
            ("d.toml", "page_size = 0", "page_size is 0"),
            ("e.toml", "num_gpus = 0", "num_gpus is 0"),
            ("u.toml", "gpu_ids = [1, 1]", "gpu_ids is [1, 1], expected numbers of devices"),
            ("v.toml", "num_gpus = 3\ngpu_ids = [0, 2]", "gpu_ids is [0, 2], expected 3"),
            ("w.toml", "num_gpus = 2\ndevice = \"cpu\"", "device is cpu, expected auto or cuda"),
            ("x.toml", "device = \"cuda\"\nreplicas = 2", "replicas is 2, expected 1 on CUDA"),
            ("l.toml", "max_num_seqs = 0", "max_num_seqs is 0"),
            ("o.toml", "tensor_parallel_size = 2", "tensor_parallel_size is 2, expected 1"),
            ("p.toml", "replicas = 3\nthreads = 2", "replicas is 3, expected at most 2"),
            (
                "m.toml",
                "max_num_batched_tokens = 3",
                "max_num_batched_tokens is 3, expected at least 16",
            ),
            ("n.toml", "session_timeout = -1.0", "session_timeout is -1"),
            ("j.toml", "target_memory_gb = 0.0", "target_memory_gb is 0"),
            ("k.toml", "target_memory_gb = inf", "target_memory_gb is inf"),
            ("q.toml", "gpu_memory_utilization = 1.5", "memory_utilization is 1.5"),
            ("r.toml", "memory_utilization = 0.5\ntarget_memory_gb = 1.0", "target_memory_gb"),
            ("i.toml", "weights = \"int3\"", "int3"),
            ("o.toml", "weights_cache = \"here\"", "weights_cache is here"),
            ("f.toml", "kv_cache_dtype = \"int3\"", "int3"),
            (
                "y.toml",
                "open_page_dtype = \"f32\"",
                "open_page_dtype is f32 with kv_cache_dtype auto, expected kv_cache_dtype int8",
            ),
            (
                "z.toml",
                "open_page_dtype = \"f16\"\nkv_cache_dtype = \"f32\"",
                "open_page_dtype is f16 with kv_cache_dtype f32, expected kv_cache_dtype int8",
            ),
            (
                "0.toml",
                "open_page_dtype = \"f32\"\nkv_cache_dtype = \"int4\"\nnum_gpus = 2",
                "open_page_dtype is f32 with a CUDA device, expected f16 on CUDA",
            ),
            (
                "1.toml",
                "open_page_dtype = \"bf16\"\nkv_cache_dtype = \"int4\"",
                "unknown variant `bf16`, expected one of `f16`",
            ),
            ("g.json", "{", "EOF"),
            ("h.yaml", "", ".json or .toml"),
            (
                "q.toml",
                "adaptive = true\nattention = \"dense\"",
                "adaptive is true, expected false",
            ),
            ("r.toml", "adaptive_min_budget = 0.0", "adaptive_min_budget is 0"),
            ("s.toml", "adaptive_max_budget = 0.5", "adaptive_max_budget is 0.5"),
            ("t.toml", "adaptive = true\nadaptive_min_budget = 1.0", "no room to move"),
            ("j.toml", "scorer = \"bocks\"", "cuboid-mean"),
            ("k.json", r#"{"top_p_pages": 1.5}"#, "top_p_pages is 1.5"),
            ("2.toml", "target_latency_ms = 1e300", "target_latency_ms is 1000"),
            ("3.toml", "target_latency_ms = 1e-300", "target_latency_ms is 0.000"),
            ("4.toml", "target_latency_ms = -1.0", "target_latency_ms is -1"),
        ];
        for (name, text, expected) in cases {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let message = TinyServeConfig::load(&path).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains(name), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        let missing = TinyServeConfig::load(dir.path().join("none.toml")).unwrap_err();
        assert!(missing.to_string().contains("none.toml"));
    }
}
