//! A memory plan, for people and for programs.

use serde_json::{Value, json};
use tinyserve::PlannedMemory;
use tinyserve::kv::{KvFormat, KvLayout, KvShape};
use tinyserve::model::MemoryPlan;

use crate::units::{bytes, count};

/// What one token and one page of a format take, and how many tokens fit.
struct OfFormat {
    format: KvFormat,
    bytes_per_token: u64,
    box_bytes_per_page: u64,
    tokens: usize,
}

/// The plan in lines.
pub(crate) fn lines(memory: &PlannedMemory) -> String {
    let PlannedMemory { target_bytes, largest, plan, max_sequence_length } = memory;
    let target = match target_bytes {
        Some(target) => format!("of at most {}", bytes(*target)),
        None => "of a machine that does not say how much is free".to_owned(),
    };
    let layout = &plan.layout;
    let mut lines = vec![
        format!("memory plan   {target}"),
        format!("  process     {}: the program and the tokenizer", bytes(plan.process_bytes)),
        format!("  weights     {}", bytes(plan.weight_bytes)),
        format!("  scratch     {}: activations and threads", bytes(plan.scratch_bytes)),
        format!(
            "  KV          {}: {} pages of {} tokens of {}",
            bytes(plan.kv_bytes()),
            count(plan.pages as u64),
            layout.page_size(),
            layout.shape().format,
        ),
        format!("  boxes       {}", bytes(plan.box_bytes())),
        format!("  total       {}, resident once every page was in use", bytes(plan.total_bytes())),
    ];
    if plan.open_bytes() > 0 {
        lines.insert(
            4,
            format!(
                "  open pages  {}: {} until they are full",
                bytes(plan.open_bytes()),
                layout.open_format()
            ),
        );
    }
    if plan.loading_bytes > 0 {
        lines.push(format!(
            "  loading     {} beside the weights, given back before pages fill",
            bytes(plan.loading_bytes)
        ));
    }
    lines.push(format!(
        "pages that fit {}, {} tokens; longest context {} tokens\n",
        count(largest.pages as u64),
        count(largest.tokens() as u64),
        count(*max_sequence_length as u64),
    ));
    lines.join("\n")
}

/// A table of what each format takes, and how many of its tokens fit.
pub(crate) fn formats(memory: &PlannedMemory) -> String {
    let mut text =
        format!("{:>9} {:>12} {:>12} {:>15}\n", "KV", "per token", "boxes/page", "tokens that fit");
    for of in of_formats(memory) {
        text += &format!(
            "{:>9} {:>12} {:>12} {:>15}\n",
            of.format.name(),
            bytes(of.bytes_per_token),
            bytes(of.box_bytes_per_page),
            count(of.tokens as u64)
        );
    }
    text
}

/// The plan as an object.
pub(crate) fn object(memory: &PlannedMemory) -> Value {
    let PlannedMemory { target_bytes, largest, plan, max_sequence_length } = memory;
    let formats = of_formats(memory).map(|of| {
        json!({
            "kv_cache_dtype": of.format.name(),
            "bytes_per_token": of.bytes_per_token,
            "box_bytes_per_page": of.box_bytes_per_page,
            "tokens_that_fit": of.tokens,
        })
    });
    json!({
        "target_bytes": target_bytes,
        "process_bytes": plan.process_bytes,
        "weight_bytes": plan.weight_bytes,
        "loading_bytes": plan.loading_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "open_bytes": plan.open_bytes(),
        "pages": plan.pages,
        "kv_bytes": plan.kv_bytes(),
        "box_bytes": plan.box_bytes(),
        "total_bytes": plan.total_bytes(),
        "pages_that_fit": largest.pages,
        "tokens_that_fit": largest.tokens(),
        "longest_context": max_sequence_length,
        "formats": formats.collect::<Vec<_>>(),
    })
}

fn of_formats(memory: &PlannedMemory) -> impl Iterator<Item = OfFormat> {
    let PlannedMemory { largest, target_bytes, .. } = *memory;
    KvFormat::ALL.into_iter().filter_map(move |format| {
        let asked = largest.layout;
        let mut layout = KvLayout::new(KvShape { format, ..asked.shape() }).ok()?;
        if format.is_quantised() && asked.shape().format.is_quantised() {
            layout = layout.with_open_format(asked.open_format()).ok()?;
        }
        let plan = MemoryPlan { layout, ..largest };
        let fitted = target_bytes.map_or(Ok(plan), |target| plan.fit(target, u32::MAX as usize));
        Some(OfFormat {
            format,
            bytes_per_token: plan.layout.bytes_per_token() as u64,
            box_bytes_per_page: plan.box_bytes_per_page(),
            tokens: fitted.map_or(0, |plan| plan.tokens()),
        })
    })
}
