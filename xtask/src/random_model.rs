//! `cargo xtask random-model`: a checkpoint folder of the right shape with random weights.
//!
//! The tensors are generated one at a time while the file is written, so that memory holds one
//! tensor and not the model. The folder appears under its name only when it is complete.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use safetensors::{Dtype, View};
use serde_json::{Value, json};
use tinyserve_kernels::DType;
use tinyserve_model::{SyntheticModel, SyntheticShape, SyntheticTensor};

use crate::folder;

/// What to write, and where.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The model whose shape to take.
    #[arg(long, value_parser = shape())]
    shape: SyntheticShape,
    /// Element type of the stored weights.
    #[arg(long, value_parser = dtype(), default_value = "f16")]
    dtype: DType,
    /// Longest context, instead of the shape's own.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_positions: Option<u32>,
    /// Seed: the same seed, shape and type give the same bytes on every machine.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Folder to write: a new or an empty one.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// The names of the shapes, which clap lists.
fn shape() -> impl TypedValueParser<Value = SyntheticShape> {
    PossibleValuesParser::new(SyntheticShape::ALL.map(SyntheticShape::name))
        .try_map(|name| name.parse::<SyntheticShape>())
}

/// The names of the element types, which clap lists.
fn dtype() -> impl TypedValueParser<Value = DType> {
    let all = [DType::F32, DType::F16, DType::Bf16];
    PossibleValuesParser::new(all.map(DType::name)).try_map(move |name| {
        all.into_iter().find(|dtype| dtype.name() == name).ok_or("expected f32, f16 or bf16")
    })
}

/// Writes the folder, and says how large it became.
pub(crate) fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    let out = &args.out;
    let mut model = SyntheticModel::new(args.shape, args.dtype).seed(args.seed);
    if let Some(positions) = args.max_positions {
        model = model.max_positions(positions as usize);
    }
    folder::create(out, |folder| write_folder(folder, &model, args))?;
    println!(
        "{}: {:.1} M parameters, {:.1} MB, written in {:.1} s",
        out.display(),
        (model.weight_bytes() / args.dtype.size()) as f64 / 1e6,
        model.weight_bytes() as f64 / 1e6,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Writes every file into `folder`.
fn write_folder(folder: &Path, model: &SyntheticModel, args: &Args) -> Result<()> {
    write_weights(&folder.join("model.safetensors"), model, args)?;
    write_json(&folder.join("config.json"), &model.config_json())?;
    let (bos, eos) = model.bos_and_eos();
    let generation =
        json!({ "_from_model_config": true, "bos_token_id": bos, "eos_token_id": eos });
    write_json(&folder.join("generation_config.json"), &generation)?;
    write_json(&folder.join("tokenizer.json"), &tokenizer(model))?;

    // The weights were a temporary file of their owner: whoever may read config.json may read them.
    let readers = fs::metadata(folder.join("config.json")).and_then(|config| {
        fs::set_permissions(folder.join("model.safetensors"), config.permissions())
    });
    readers.with_context(|| format!("cannot set permissions in {}", folder.display()))
}

/// Writes the tensors, one after the other.
fn write_weights(path: &Path, model: &SyntheticModel, args: &Args) -> Result<()> {
    let views = model.tensors().into_iter().map(|tensor| {
        (tensor.name().to_owned(), Unmade { tensor, dtype: args.dtype, seed: args.seed })
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// A tensor whose bytes are made when the file asks for them.
struct Unmade {
    tensor: SyntheticTensor,
    dtype: DType,
    seed: u64,
}

impl View for Unmade {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.tensor.bytes(self.dtype, self.seed).into()
    }

    fn data_len(&self) -> usize {
        self.tensor.elements() * self.dtype.size()
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, format!("{value:#}\n"))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// A tokenizer with one token per byte: every text can be tokenised and comes back as it was.
fn tokenizer(model: &SyntheticModel) -> Value {
    let specials = model.special_tokens();
    let first_byte = model.first_byte_token();
    let mut vocabulary = serde_json::Map::new();
    for (id, token) in specials {
        vocabulary.insert((*token).to_owned(), json!(id));
    }
    for (id, byte) in (first_byte..).zip(0..=u8::MAX) {
        vocabulary.insert(byte_letter(byte).to_string(), json!(id));
    }
    let added: Vec<Value> = specials
        .iter()
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        })
        .collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": model.post_processor().unwrap_or_else(|| byte_level.clone()),
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": [],
        },
    })
}

/// The letter that stands for `byte` in byte-level vocabularies: itself where it can be seen, else
/// the next free one from U+0100 on.
fn byte_letter(byte: u8) -> char {
    let is_visible = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..);
    if is_visible(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|&it| !is_visible(it)).count();
    // At most 68 bytes are not visible, so this is a letter below U+0144.
    char::from_u32(0x100 + n_before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;
    use tokenizers::Tokenizer;

    fn write(shape: SyntheticShape, dtype: DType, seed: u64, out: &Path) -> Result<()> {
        run(&Args { shape, dtype, max_positions: Some(64), seed, out: out.to_owned() })
    }

    fn read_config(folder: &Path) -> Value {
        serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
    }

    #[test]
    fn tiny_gpt2_reads_back() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("model");
        write(SyntheticShape::TinyGpt2, DType::F32, 7, &out).unwrap();
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let shape_of = |name: &str| file.tensor(name).unwrap().shape().to_vec();
        assert_eq!(file.len(), 2 + 2 * 12 + 2);
        assert_eq!(shape_of("wte.weight"), [320, 64]);
        assert_eq!(shape_of("wpe.weight"), [64, 64]);
        assert_eq!(shape_of("h.1.attn.c_attn.weight"), [64, 192]);
        assert_eq!(shape_of("h.1.mlp.c_fc.weight"), [64, 256]);
        assert_eq!(shape_of("h.1.mlp.c_proj.weight"), [256, 64]);
        assert!(file.tensor("lm_head.weight").is_err());

        let values = |name: &str| -> Vec<f32> {
            let (fours, _) = file.tensor(name).unwrap().data().as_chunks::<4>();
            fours.iter().map(|&four| f32::from_le_bytes(four)).collect()
        };
        assert!(values("ln_f.weight").iter().all(|&it| it == 1.0));
        assert!(values("h.0.attn.c_attn.bias").iter().all(|&it| it == 0.0));
        let wte = values("wte.weight");
        let n = wte.len() as f32;
        let mean = wte.iter().sum::<f32>() / n;
        let deviation = (wte.iter().map(|it| (it - mean).powi(2)).sum::<f32>() / n).sqrt();
        assert!(mean.abs() < 0.001 && (deviation - 0.02).abs() < 0.001, "{mean} ± {deviation}");
        assert_ne!(values("h.0.mlp.c_fc.weight"), values("h.1.mlp.c_fc.weight"));

        let config = read_config(&out);
        assert_eq!(config["n_positions"], 64);
        assert_eq!(config["torch_dtype"], "float32");
        assert!(!home.path().join("model.partial").exists());
    }

    #[test]
    fn tiny_llama_reads_back() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("model");
        write(SyntheticShape::TinyLlama, DType::Bf16, 7, &out).unwrap();
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 1 + 2 * 9 + 2);
        for (name, shape) in [
            ("model.embed_tokens.weight", vec![320, 64]),
            ("model.layers.1.self_attn.q_proj.weight", vec![64, 64]),
            ("model.layers.1.self_attn.k_proj.weight", vec![32, 64]),
            ("model.layers.1.mlp.down_proj.weight", vec![64, 172]),
            ("model.norm.weight", vec![64]),
            ("lm_head.weight", vec![320, 64]),
        ] {
            let tensor = file.tensor(name).unwrap();
            assert_eq!(tensor.shape(), shape, "{name}");
            assert_eq!(tensor.dtype(), Dtype::BF16, "{name}");
        }
        assert_eq!(file.tensor("model.norm.weight").unwrap().data()[..2], [0x80, 0x3f]);
        assert_eq!(read_config(&out)["max_position_embeddings"], 64);
    }

    #[test]
    fn a_seed_decides_the_bytes() {
        let home = tempfile::tempdir().unwrap();
        let bytes = |name: &str, seed| {
            let out = home.path().join(name);
            write(SyntheticShape::TinyLlama, DType::F16, seed, &out).unwrap();
            fs::read(out.join("model.safetensors")).unwrap()
        };
        let first = bytes("a", 1);
        assert_eq!(first, bytes("b", 1));
        assert_ne!(first, bytes("c", 2));
    }

    #[test]
    fn every_text_comes_back() {
        let home = tempfile::tempdir().unwrap();
        for (name, shape) in [("g", SyntheticShape::TinyGpt2), ("l", SyntheticShape::TinyLlama)] {
            let out = home.path().join(name);
            write(shape, DType::F16, 0, &out).unwrap();
            let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
            let text = "Once upon\n\ta tïme… 🦀\u{0}\u{ad}";
            let ids = tokenizer.encode(text, true).unwrap();
            let config = read_config(&out);
            let bos = config["bos_token_id"].as_u64().unwrap();
            let starts_with_bos = u64::from(ids.get_ids()[0]) == bos;
            assert_eq!(starts_with_bos, config["model_type"] == "llama", "{name}");
            assert_eq!(ids.len(), text.len() + usize::from(starts_with_bos));
            assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), text);
            assert!(
                tokenizer.get_vocab_size(true) as u64 <= config["vocab_size"].as_u64().unwrap()
            );
        }
    }

    #[test]
    fn a_folder_with_files_is_left_alone() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("config.json");
        fs::write(&file, "mine").unwrap();
        let refused = |out: &Path| {
            let error = write(SyntheticShape::TinyGpt2, DType::F16, 0, out).unwrap_err();
            format!("{error:#}")
        };
        assert!(refused(home.path()).contains("the folder is not empty"));
        assert!(refused(&file).contains("expected a folder to write to"));
        assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
        let empty = home.path().join("empty");
        fs::create_dir(&empty).unwrap();
        write(SyntheticShape::TinyGpt2, DType::F16, 0, &empty).unwrap();
        assert!(empty.join("tokenizer.json").exists());
    }
}
