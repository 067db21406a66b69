//! `tinyserve inspect`: a model's shape and the memory it needs.

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use tinyserve::kernels::Activation;
use tinyserve::kv::KvLayout;
use tinyserve::model::{
    Checkpoint, LargestStep, MemoryPlan, ModelConfig, RopeScaling, TensorInfo, Tokenizer,
};
use tinyserve::{PlannedMemory, TinyServeError};

use crate::args::{LayoutArgs, MemoryArgs, ModelArgs, WeightsArgs};
use crate::units::{bytes, count, short_count};
use crate::{memory, output, plan};

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    layout: LayoutArgs,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Lists every tensor too.
    #[arg(long, conflicts_with = "json")]
    tensors: bool,
    /// Prints one JSON object, tensors included.
    #[arg(long)]
    json: bool,
}

/// Memory at one context length, in bytes.
#[derive(Debug, Serialize)]
struct PlanRow {
    context: usize,
    pages: usize,
    weight_bytes: u64,
    kv_bytes: u64,
    box_bytes: u64,
    open_bytes: u64,
    scratch_bytes: u64,
    process_bytes: u64,
    total_bytes: u64,
}

/// Prints what is known before anything is loaded.
pub(crate) fn inspect(args: &InspectArgs) -> Result<()> {
    let mut config = args.model.config()?;
    args.layout.apply(&mut config);
    args.weights.apply(&mut config);
    args.memory.apply(&mut config);
    config.check()?;
    let checkpoint = Checkpoint::load(&config.model)?;
    let model = checkpoint.config();
    // The plan ends where a user's own limit does; without one it shows all that the model can.
    let longest = match config.max_sequence_length {
        Some(_) => config.sequence_limit(model.max_positions)?,
        None => model.max_positions,
    };
    let layout = config.kv_layout(model, checkpoint.dtype())?;
    let weights = config.weights.resolve(checkpoint.dtype())?;
    let tokenizer = checkpoint.tokenizer().map_err(|error| error.to_string());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = config.threads.unwrap_or(threads);
    let tokens = config.attention_chunk_size;
    let largest = LargestStep { tokens, sequences: 1, logits: 1, threads };
    let one_page =
        MemoryPlan::new(&checkpoint, weights, layout, largest, 1).process_bytes(memory::process());
    let report = Report {
        name: &config.model,
        checkpoint: &checkpoint,
        tokenizer,
        layout,
        weights: config.weights.name(checkpoint.dtype()),
        memory: PlannedMemory::new(&config, &checkpoint, threads),
        plan: rows(&one_page, longest),
    };
    if args.json {
        return output::json(&report.json());
    }
    let mut text = report.text();
    if args.tensors {
        text += "\ntensors\n";
        text.extend(checkpoint.tensors().map(tensor_line));
    }
    output::text(&text)
}

/// Memory at 512, 1024, … tokens and at the longest context.
fn rows(one_page: &MemoryPlan, longest: usize) -> Vec<PlanRow> {
    let lengths = std::iter::successors(Some(512), |length| Some(length * 2));
    let lengths = lengths.take_while(|&length| length < longest).chain([longest]);
    lengths
        .map(|context| {
            let plan = MemoryPlan { pages: one_page.layout.pages_for(context), ..*one_page };
            PlanRow {
                context,
                pages: plan.pages,
                weight_bytes: plan.weight_bytes,
                kv_bytes: plan.kv_bytes(),
                box_bytes: plan.box_bytes(),
                open_bytes: plan.open_bytes(),
                scratch_bytes: plan.scratch_bytes,
                process_bytes: plan.process_bytes,
                total_bytes: plan.total_bytes(),
            }
        })
        .collect()
}

fn box_bytes_per_page(layout: &KvLayout) -> u64 {
    layout.box_bytes_per_page() as u64
}

fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::GeluTanh => "gelu_tanh",
        Activation::Gelu => "gelu",
        Activation::Relu => "relu",
        Activation::Silu => "silu",
    }
}

fn tensor_line(tensor: TensorInfo<'_>) -> String {
    let note = if tensor.parameter { "" } else { " (not a parameter)" };
    let size = bytes(tensor.bytes as u64);
    format!("  {} {} {:?} {size}, {}{note}\n", tensor.name, tensor.dtype, tensor.shape, tensor.file)
}

struct Report<'a> {
    name: &'a str,
    checkpoint: &'a Checkpoint,
    tokenizer: Result<Tokenizer, String>,
    layout: KvLayout,
    /// How weights are kept, by name.
    weights: &'static str,
    memory: Result<PlannedMemory, TinyServeError>,
    plan: Vec<PlanRow>,
}

impl Report<'_> {
    fn model(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    fn json(&self) -> Value {
        let (model, checkpoint) = (self.model(), self.checkpoint);
        let files = checkpoint.weight_files();
        let tokenizer = match &self.tokenizer {
            Ok(tokenizer) => json!({ "vocab_size": tokenizer.vocab_size() }),
            Err(error) => json!({ "error": error }),
        };
        let tensors = checkpoint.tensors().map(|tensor| {
            json!({
                "name": tensor.name,
                "dtype": tensor.dtype.to_string(),
                "shape": tensor.shape,
                "bytes": tensor.bytes,
                "file": tensor.file,
                "parameter": tensor.parameter,
            })
        });
        json!({
            "model": self.name,
            "architecture": model.architecture.name(),
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "layers": model.layers,
            "q_heads": model.q_heads,
            "kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "intermediate_size": model.intermediate_size,
            "max_positions": model.max_positions,
            "activation": activation_name(model.activation),
            "tie_word_embeddings": model.tie_word_embeddings,
            "positions": positions(model),
            "bos": model.bos,
            "eos": model.eos,
            "parameters": checkpoint.parameters(),
            "weights_dtype": checkpoint.dtype().name(),
            "weight_bytes": checkpoint.weight_bytes(),
            "files": files.map(|(name, bytes)| json!({ "name": name, "bytes": bytes }))
                .collect::<Vec<_>>(),
            "tokenizer": tokenizer,
            "tensors": tensors.collect::<Vec<_>>(),
            "kv": {
                "page_size": self.layout.page_size(),
                "kv_cache_dtype": self.layout.shape().format.name(),
                "bytes_per_token": self.layout.bytes_per_token(),
                "box_bytes_per_page": box_bytes_per_page(&self.layout),
            },
            "weights": self.weights,
            "memory_plan": self.plan,
            "memory": match &self.memory {
                Ok(memory) => plan::object(memory),
                Err(error) => json!({ "error": error.to_string() }),
            },
        })
    }

    fn text(&self) -> String {
        let (model, checkpoint) = (self.model(), self.checkpoint);
        let head = if model.tie_word_embeddings { "tied to the embedding" } else { "its own" };
        let mut lines = vec![
            format!("model         {}", self.name),
            format!("architecture  {}, {} layers", model.architecture.name(), model.layers),
            format!(
                "channels      {}, feed-forward {} ({})",
                model.hidden_size,
                model.intermediate_size,
                activation_name(model.activation)
            ),
            format!(
                "heads         {} over {} KV heads, {} channels each",
                model.q_heads, model.kv_heads, model.head_dim
            ),
            format!("vocabulary    {} tokens, output head {head}", model.vocab_size),
            format!("context       {} tokens, positions {}", model.max_positions, positions(model)),
            format!(
                "parameters    {} ({}), {} of {}",
                short_count(checkpoint.parameters() as u64),
                count(checkpoint.parameters() as u64),
                bytes(checkpoint.weight_bytes() as u64),
                checkpoint.dtype()
            ),
        ];
        for (name, size) in checkpoint.weight_files() {
            lines.push(format!("file          {name}, {}", bytes(size as u64)));
        }
        lines.push(match &self.tokenizer {
            Ok(tokenizer) => {
                let bos = model.bos.map_or("none".to_owned(), |id| id.to_string());
                let size = tokenizer.vocab_size();
                format!("tokenizer     {size} tokens, begins with {bos}, ends with {:?}", model.eos)
            }
            Err(error) => format!("tokenizer     none that can be used: {error}"),
        });
        let layout = &self.layout;
        lines.push(format!(
            "KV cache      {} of {} per token, boxes {} per page of {} tokens\n",
            bytes(layout.bytes_per_token() as u64),
            layout.shape().format,
            bytes(box_bytes_per_page(layout)),
            layout.page_size(),
        ));
        lines.push(match &self.memory {
            Ok(memory) => format!("{}\n{}", plan::lines(memory), plan::formats(memory)),
            Err(error) => format!("memory plan   none: {error}\n"),
        });
        lines.push(format!(
            "{:>9} {:>9} {:>12} {:>12} {:>12} {:>12} {:>12}",
            "context", "pages", self.weights, "KV", "boxes", "scratch", "total"
        ));
        for row in &self.plan {
            lines.push(format!(
                "{:>9} {:>9} {:>12} {:>12} {:>12} {:>12} {:>12}",
                row.context,
                row.pages,
                bytes(row.weight_bytes),
                bytes(row.kv_bytes),
                bytes(row.box_bytes),
                bytes(row.scratch_bytes + row.open_bytes),
                bytes(row.total_bytes)
            ));
        }
        lines.push(String::new());
        lines.join("\n")
    }
}

/// How positions enter, in words.
fn positions(model: &ModelConfig) -> String {
    match &model.rope {
        None => "learned".to_owned(),
        Some(rope) => {
            let scaling = match rope.scaling {
                RopeScaling::None => String::new(),
                RopeScaling::Linear { factor } => format!(", linear scaling by {factor}"),
                RopeScaling::Dynamic { factor } => format!(", dynamic scaling by {factor}"),
                RopeScaling::Llama3 { factor, .. } => format!(", llama3 scaling by {factor}"),
                // A kind that this report does not know yet still has a name.
                other => format!(", {other:?}"),
            };
            format!("rotary with θ {}{scaling}", rope.theta)
        }
    }
}
