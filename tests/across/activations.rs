//! nanosort-gpt2 against its author's own activations, stage by stage.

use std::cell::RefCell;
use std::collections::HashMap;

use safetensors::SafeTensors;
use tinyserve_kernels::{
    ActivateArgs, AppendKvArgs, AttendArgs, AttendStats, Attention, Backend, Cpu, CpuLinear,
    CpuTensor, CpuVector, EmbedArgs, HostTensor, KernelError, LinearArgs, LinearSpec, NormArgs,
    RotaryAnglesArgs, RotaryArgs, TopLogitsArgs,
};
use tinyserve_kv::{HostPages, KvFormat, KvLayout, PageCopy, PageId, TokenMove};
use tinyserve_model::{Checkpoint, LogitRows};
use tinyserve_tests::{Runner, assert_close, cpu, data};

/// A backend that remembers what each operation wrote.
#[derive(Debug)]
struct Recorder {
    cpu: Cpu,
    log: RefCell<Vec<(&'static str, Vec<f32>)>>,
}

impl Recorder {
    fn record(&self, op: &'static str, out: &CpuTensor) {
        self.log.borrow_mut().push((op, out.values().to_vec()));
    }
}

impl Backend for Recorder {
    type Tensor = CpuTensor;
    type Vector = CpuVector;
    type Linear = CpuLinear;
    type KvPages = HostPages;

    fn tensor(&self, columns: usize) -> CpuTensor {
        self.cpu.tensor(columns)
    }
    fn load_vector(&self, vector: &HostTensor) -> Result<CpuVector, KernelError> {
        self.cpu.load_vector(vector)
    }
    fn load_linear(&self, spec: LinearSpec) -> Result<CpuLinear, KernelError> {
        self.cpu.load_linear(spec)
    }

    fn linear_bytes(&self, linear: &CpuLinear) -> usize {
        self.cpu.linear_bytes(linear)
    }
    fn allocate_pages(&self, layout: KvLayout, pages: usize) -> Result<HostPages, KernelError> {
        self.cpu.allocate_pages(layout, pages)
    }
    fn copy_page(&self, pages: &mut HostPages, copy: PageCopy) {
        self.cpu.copy_page(pages, copy);
    }
    fn download_pages<E: From<KernelError>>(
        &self,
        pages: &HostPages,
        ids: &[PageId],
        take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.cpu.download_pages(pages, ids, take)
    }
    fn upload_page(
        &self,
        pages: &mut HostPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        self.cpu.upload_page(pages, page, bytes)
    }
    fn move_tokens(&self, pages: &mut HostPages, moves: &[TokenMove]) -> Result<(), KernelError> {
        self.cpu.move_tokens(pages, moves)
    }
    fn embed(&self, args: EmbedArgs<'_, Self>) {
        let EmbedArgs { table, ids, store, out } = args;
        self.cpu.embed(EmbedArgs { table, ids, store, out: &mut *out });
        self.record("embed", out);
    }
    fn norm(&self, args: NormArgs<'_, Self>) {
        let NormArgs { kind, x, weight, bias, epsilon, out } = args;
        self.cpu.norm(NormArgs { kind, x, weight, bias, epsilon, out: &mut *out });
        self.record("norm", out);
    }
    fn linear(&self, args: LinearArgs<'_, Self>) {
        let LinearArgs { x, linear, store, out } = args;
        self.cpu.linear(LinearArgs { x, linear, store, out: &mut *out });
        self.record("linear", out);
    }
    fn rotary_angles(&self, args: RotaryAnglesArgs<'_, Self>) {
        let RotaryAnglesArgs { positions, inverse_frequencies, out } = args;
        self.cpu.rotary_angles(RotaryAnglesArgs { positions, inverse_frequencies, out });
    }
    fn rotary(&self, args: RotaryArgs<'_, Self>) {
        let RotaryArgs { angles, heads, qkv } = args;
        self.cpu.rotary(RotaryArgs { angles, heads, qkv });
    }
    fn append_kv(&self, args: AppendKvArgs<'_, Self>) {
        let AppendKvArgs { layer, heads, qkv, slots, pages } = args;
        self.cpu.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
    }
    fn attend(&self, args: AttendArgs<'_, Self>) -> Result<AttendStats, KernelError> {
        let AttendArgs {
            layer,
            heads,
            qkv,
            scale,
            sequences,
            pages,
            measure_recall,
            page_lists,
            sequence_stats,
            observe,
            out,
        } = args;
        let stats = self.cpu.attend(AttendArgs {
            layer,
            heads,
            qkv,
            scale,
            sequences,
            pages,
            measure_recall,
            page_lists,
            sequence_stats,
            observe,
            out: &mut *out,
        });
        self.record("attend", out);
        stats
    }
    fn activate(&self, args: ActivateArgs<'_, Self>) {
        let ActivateArgs { activation, gated, x, out } = args;
        self.cpu.activate(ActivateArgs { activation, gated, x, out: &mut *out });
        self.record("activate", out);
    }
    fn gather_rows(&self, x: &CpuTensor, rows: &[u32], out: &mut CpuTensor) {
        self.cpu.gather_rows(x, rows, out);
    }
    fn top_logits(&self, args: TopLogitsArgs<'_, Self>) {
        let TopLogitsArgs { logits, rows, k, out } = args;
        self.cpu.top_logits(TopLogitsArgs { logits, rows, k, out });
    }
    fn download(&self, x: &CpuTensor, out: &mut Vec<f32>) {
        self.cpu.download(x, out);
    }
    fn upload(&self, values: &[f32], out: &mut CpuTensor) {
        self.cpu.upload(values, out);
    }
}

/// The author's activations: name → values, with the batch of three sequences first.
fn oracle() -> HashMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(data("data/models/nanosort-gpt2/partials.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            (name, (view.shape().to_vec(), values))
        })
        .collect()
}

/// `[heads, tokens, dim]` as `[tokens, heads·dim]`.
fn heads_last(values: &[f32], [heads, tokens, dim]: [usize; 3]) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for t in 0..tokens {
        for h in 0..heads {
            out.extend_from_slice(&values[(h * tokens + t) * dim..][..dim]);
        }
    }
    out
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// Scores before and after the softmax `[heads, tokens, tokens]`, from recorded queries and keys.
fn attention_weights(qkv: &[f32], [heads, tokens, dim]: [usize; 3]) -> (Vec<f32>, Vec<f32>) {
    let width = 3 * heads * dim;
    let (mut scores, mut weights) = (Vec::new(), Vec::new());
    for h in 0..heads {
        for t in 0..tokens {
            let q = &qkv[t * width + h * dim..][..dim];
            let row: Vec<f32> = (0..tokens)
                .map(|s| {
                    let k = &qkv[s * width + (heads + h) * dim..][..dim];
                    q.iter().zip(k).map(|(a, b)| a * b).sum::<f32>() / (dim as f32).sqrt()
                })
                .collect();
            let total: f32 = row[..=t].iter().map(|x| x.exp()).sum();
            weights.extend((0..tokens).map(|s| if s <= t { row[s].exp() / total } else { 0.0 }));
            scores.extend((0..tokens).map(|s| if s <= t { row[s] } else { f32::NEG_INFINITY }));
        }
    }
    (scores, weights)
}

#[test]
fn every_stage_is_the_authors() {
    let checkpoint = Checkpoint::open(&data("data/models/nanosort-gpt2")).unwrap();
    let oracle = oracle();
    let (shape, ids) = &oracle["idx"];
    let (sequences, tokens) = (shape[0], shape[1]);
    let mut stages = 0;
    for page_size in [1, 4, 16] {
        for sequence in 0..sequences {
            let ids: Vec<u32> =
                ids[sequence * tokens..][..tokens].iter().map(|&id| id as u32).collect();
            let recorder = Recorder { cpu: cpu(), log: RefCell::new(Vec::new()) };
            let mut runner = Runner::new(recorder, &checkpoint, (page_size, KvFormat::F32, 16));
            let mut state = runner.sequence(&ids, LogitRows::All);
            runner.step(&mut [&mut state], Attention::Dense);
            let log = runner.model.backend().log.borrow();
            let mut log = log.iter();
            let mut take = |op: &str| {
                let (found, values) = log.next().expect("an operation");
                assert_eq!(*found, op);
                values
            };
            let part = |name: &str| {
                let (shape, values) = &oracle[name];
                // Position embeddings are the same for each sequence and stored once.
                let of = if shape[0] == 1 { 0 } else { sequence };
                let size = values.len() / shape[0];
                &values[of * size..][..size]
            };
            let mut check = |name: &str, found: &[f32]| {
                assert_close(&format!("{name} of sequence {sequence}"), found, part(name), 2e-5);
                stages += 1;
            };
            let dims = [3, tokens, 16];

            let tok_emb = take("embed");
            check("tok_emb", tok_emb);
            let x = take("embed");
            check("pos_emb", &difference(x, tok_emb));
            check("x", x);
            check("ln1", take("norm"));
            let qkv = take("linear");
            check("qkv", qkv);
            for (i, name) in ["q", "k", "v"].into_iter().enumerate() {
                let columns: Vec<f32> =
                    qkv.chunks_exact(144).flat_map(|row| &row[i * 48..][..48]).copied().collect();
                let expected = heads_last(part(name), dims);
                assert_close(name, &columns, &expected, 2e-5);
            }
            let (scores, weights) = attention_weights(qkv, dims);
            let seen = |values: &[f32], mask: &[f32]| -> Vec<f32> {
                let pairs = values.iter().zip(mask);
                pairs.map(|(&v, &w)| if w > 0.0 { v } else { 0.0 }).collect()
            };
            assert_close("att", &seen(&scores, &weights), &seen(part("att"), &weights), 2e-5);
            check("attSm", &weights);
            check("y", take("attend"));
            let attn_resid = take("linear");
            check("yProj", &difference(attn_resid, x));
            check("attnResid", attn_resid);
            check("ln2", take("norm"));
            check("fc", take("linear"));
            check("gelu", take("activate"));
            let mlp_resid = take("linear");
            check("mlp", &difference(mlp_resid, attn_resid));
            check("mlpResid", mlp_resid);
            check("block0", mlp_resid);
            for name in ["block1", "block2"] {
                for op in ["norm", "linear", "attend", "linear", "norm", "linear", "activate"] {
                    take(op);
                }
                check(name, take("linear"));
            }
            check("ln_f", take("norm"));
            let logits = take("linear");
            check("lm_head", logits);
            let probabilities: Vec<f32> = logits
                .chunks_exact(3)
                .flat_map(|row| (0..3).map(|id| tinyserve_model::logprob(row, id).exp()))
                .collect();
            check("probs", &probabilities);
            assert!(log.next().is_none(), "operations after the logits");
            let returned: Vec<f32> = runner.output.logits(0).flatten().copied().collect();
            assert_close("returned logits", &returned, part("lm_head"), 2e-5);
        }
    }
    assert_eq!(stages, 3 * 3 * 20);
}
