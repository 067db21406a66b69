//! The CPU backend: a scalar reference and vector kernels behind the same operations.

mod activate;
mod append;
mod attend;
mod clock;
mod columns;
mod embed;
mod linear;
mod memory;
mod norm;
mod packed;
mod path;
mod peak;
mod pool;
mod project;
mod quantised;
mod rotary;
mod select;
mod simd;
mod tensor;
mod turned;

use std::sync::Mutex;

use half::bf16;
use tinyserve_kv::{
    HostPages, KvFormat, KvLayout, NewToken, PageCopy, PageId, PagePool, SelectionPolicy, TokenMove,
};

pub use clock::SelectionTimes;
pub(crate) use packed::{CodeBits, GROUP, Packed, packed_bytes};
pub use path::CpuPath;
pub(crate) use quantised::RowGroup;
pub(crate) use select::ask_selector;
pub use tensor::{CpuLinear, CpuTensor, CpuVector};
pub(crate) use tensor::{CpuWeights, vector};

use crate::reference;
use crate::{
    ActivateArgs, AppendKvArgs, AttendArgs, AttendStats, Backend, EmbedArgs, HostTensor,
    KernelError, LinearArgs, LinearImage, LinearSpec, MatrixLayout, NormArgs, ProjectArgs,
    RotaryAnglesArgs, RotaryArgs, Store, TopLogitsArgs,
};
use activate::Activate;
use clock::Clock;
use columns::Columns;
use embed::Embed;
use memory::Aligned;
use norm::Norm;
use pool::Pool;
use rotary::Rotary;
use simd::dispatch;
use tensor::Elements;

/// How a [`Cpu`] is set up.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// Threads; all that the system offers unless set. [`CpuPath::Scalar`] takes one.
    pub threads: Option<usize>,
    /// Instruction set; the best that the processor has unless set.
    pub path: Option<CpuPath>,
}

/// The CPU backend. It owns its threads.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    path: CpuPath,
    /// Buffers of attention, one for each thread.
    scratch: Vec<Mutex<attend::Scratch>>,
    /// What a call of attention lays out for its threads.
    plan: Mutex<attend::Plan>,
    /// Buffers of products of many rows, one for each thread.
    panels: Vec<Mutex<linear::PanelScratch>>,
    /// Sums of products of many rows with quantised weights, one buffer for each thread.
    sums: Vec<Mutex<Aligned>>,
    /// Input rows of the running product over quantised weights; grows, and is kept.
    quantised: Mutex<Vec<RowGroup>>,
    /// Input rows of the running product of bf16 pairs; grows, and is kept.
    rounded: Mutex<Vec<bf16>>,
    /// Times the choice of pages, when asked to.
    clock: Clock,
}

/// Most threads that can be asked for: beyond it a number is a typing mistake.
const MAX_THREADS: usize = 1024;

/// Elements below which a pointwise operation stays on one thread.
const SERIAL_ELEMENTS: usize = 64 * 1024;

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the thread count is out of range, the processor lacks the instruction set, or the
    /// system refuses a thread.
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        let path = options.path.unwrap_or_else(CpuPath::detect).check()?;
        let threads = match options.threads {
            None => std::thread::available_parallelism().map_or(1, usize::from),
            Some(n @ 1..=MAX_THREADS) => n,
            Some(n) => {
                return Err(KernelError::Invalid {
                    what: "threads",
                    found: n.to_string(),
                    expected: format!("1 to {MAX_THREADS}"),
                });
            }
        };
        let threads = if path == CpuPath::Scalar { 1 } else { threads };
        let pool = Pool::new(threads).map_err(|error| KernelError::Invalid {
            what: "threads",
            found: threads.to_string(),
            expected: format!("as many as the system starts ({error})"),
        })?;
        let scratch = (0..threads).map(|_| Mutex::default()).collect();
        let panels = (0..threads).map(|_| Mutex::default()).collect();
        let sums = (0..threads).map(|_| Mutex::default()).collect();
        let (plan, quantised, rounded, clock) = Default::default();
        Ok(Self { pool, path, scratch, plan, panels, sums, quantised, rounded, clock })
    }

    /// The scalar reference, on the thread that calls it: what other backends are held to.
    #[must_use]
    pub fn reference() -> Self {
        Self {
            pool: Pool::callers(),
            path: CpuPath::Scalar,
            scratch: vec![Mutex::default()],
            plan: Mutex::default(),
            panels: Vec::new(),
            sums: Vec::new(),
            quantised: Mutex::default(),
            rounded: Mutex::default(),
            clock: Clock::default(),
        }
    }

    /// Whether there are kernels that choose as `policy` says; other policies are asked on the
    /// thread that reads the pages, with the keys, which is slow.
    #[must_use]
    pub fn has_kernels(policy: &SelectionPolicy) -> bool {
        select::has_kernels(policy)
    }

    /// Threads that operations are split over.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set in use.
    #[must_use]
    pub fn path(&self) -> CpuPath {
        self.path
    }

    /// Starts or stops timing the choice of pages.
    pub fn time_selection(&self, on: bool) {
        self.clock.switch(on);
    }

    /// What choosing pages took since the last call, while it was timed. Policies without kernels
    /// are counted as scoring.
    pub fn take_selection_times(&self) -> SelectionTimes {
        self.clock.take()
    }

    /// Runs `f` on pairs of input and output rows, on several threads when there is much to do.
    fn rows(
        &self,
        (x, columns): (&[f32], usize),
        out: &mut CpuTensor,
        f: impl Fn(&[f32], &mut [f32]) + Send + Sync,
    ) {
        let (rows, width) = (out.rows(), out.columns());
        let out = out.values_mut();
        if self.threads() == 1 || x.len().max(out.len()) < SERIAL_ELEMENTS {
            f(x, out);
            return;
        }
        let at_once = rows.div_ceil(4 * self.threads());
        let columns_of = Columns::new(out, width);
        self.pool.run(rows.div_ceil(at_once), &|_, i| {
            let rows = i * at_once..((i + 1) * at_once).min(rows);
            let x = &x[rows.start * columns..rows.end * columns];
            // SAFETY: each item has rows of its own.
            f(x, unsafe { columns_of.rows(rows) });
        });
    }
}

impl Backend for Cpu {
    type Tensor = CpuTensor;
    type Vector = CpuVector;
    type Linear = CpuLinear;
    type KvPages = HostPages;

    fn tensor(&self, columns: usize) -> CpuTensor {
        CpuTensor::new(columns)
    }

    fn load_vector(&self, vector: &HostTensor) -> Result<CpuVector, KernelError> {
        Ok(CpuVector(tensor::vector(vector)?))
    }

    fn load_linear(&self, spec: LinearSpec) -> Result<CpuLinear, KernelError> {
        CpuLinear::new(self, spec)
    }

    fn linear_bytes(&self, linear: &CpuLinear) -> usize {
        linear.bytes()
    }

    fn image_layout(&self) -> Option<&'static str> {
        Some(packed::IMAGE_LAYOUT)
    }

    fn linear_image(&self, linear: &CpuLinear) -> Option<LinearImage> {
        match &linear.weights {
            CpuWeights::Packed(packed) => Some(packed.image()),
            CpuWeights::Stored { .. } => None,
        }
    }

    fn load_linear_image(&self, image: LinearImage) -> Result<CpuLinear, KernelError> {
        let packed = Packed::from_image(image)?;
        let (inputs, outputs) = (packed.inputs, packed.outputs);
        Ok(CpuLinear { weights: CpuWeights::Packed(packed), inputs, outputs })
    }

    fn allocate_pages(&self, layout: KvLayout, pages: usize) -> Result<HostPages, KernelError> {
        Ok(HostPages::new(layout, pages)?)
    }

    fn rounds_inputs(&self) -> bool {
        self.path.rounds_inputs()
    }

    fn kv_formats(&self) -> &'static [KvFormat] {
        &KvFormat::ALL
    }

    fn open_formats(&self) -> &'static [KvFormat] {
        &[KvFormat::F16, KvFormat::F32]
    }

    fn copy_page(&self, pages: &mut HostPages, copy: PageCopy) {
        pages.copy(copy);
    }

    fn forget_free_pages(&self, pages: &mut HostPages, pool: &PagePool) {
        pages.forget_free(pool);
    }

    fn download_pages<E: From<KernelError>>(
        &self,
        pages: &HostPages,
        ids: &[PageId],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut bytes = Vec::new();
        ids.iter().try_for_each(|&page| {
            bytes.clear();
            pages.read_page(page, &mut bytes);
            take(&bytes)
        })
    }

    fn upload_page(
        &self,
        pages: &mut HostPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        pages.write_page(page, bytes);
        Ok(())
    }

    fn move_tokens(&self, pages: &mut HostPages, moves: &[TokenMove]) -> Result<(), KernelError> {
        let format = pages.layout().shape().format;
        if format.is_quantised() {
            return Err(KernelError::Invalid {
                what: "kv_cache_dtype",
                found: format.to_string(),
                expected: "f32, f16 or bf16 where tokens are pruned: codes of a page share its box"
                    .to_owned(),
            });
        }
        pages.move_tokens(moves);
        Ok(())
    }

    fn embed(&self, args: EmbedArgs<'_, Self>) {
        let EmbedArgs { table, ids, store, out } = args;
        assert_eq!(out.columns(), table.inputs, "width of an embedding");
        out.resize(ids.len());
        let (hidden, add) = (table.inputs, store == Store::Add);
        let out = out.values_mut();
        let (parts, layout) = match &table.weights {
            CpuWeights::Stored { parts, layout } => (parts.as_slice(), *layout),
            CpuWeights::Packed(packed) => {
                for (&id, out) in ids.iter().zip(out.chunks_exact_mut(hidden)) {
                    assert!((id as usize) < packed.outputs, "a row of the table");
                    packed.embed_row(id as usize, add, out);
                }
                return;
            }
        };
        let [part] = parts else {
            panic!("an embedding table is one matrix, found {}", parts.len());
        };
        assert_eq!(layout, MatrixLayout::OutIn, "layout of an embedding table");
        if self.path == CpuPath::Scalar {
            for (&id, out) in ids.iter().zip(out.chunks_exact_mut(hidden)) {
                reference::embed_row(&part.weight, id, add, out);
            }
            return;
        }
        match part.elements() {
            Elements::F32(table) => dispatch(self.path, Embed { table, hidden, ids, add, out }),
            Elements::F16(table) => dispatch(self.path, Embed { table, hidden, ids, add, out }),
            Elements::Bf16(table) => dispatch(self.path, Embed { table, hidden, ids, add, out }),
        }
    }

    fn norm(&self, args: NormArgs<'_, Self>) {
        let NormArgs { kind, x, weight, bias, epsilon, out } = args;
        out.resize(x.rows());
        let columns = x.columns();
        assert_eq!(out.columns(), columns, "output width of a norm");
        assert_eq!(weight.0.len(), columns, "scale of a norm");
        assert!(bias.is_none_or(|bias| bias.0.len() == columns), "shift of a norm");
        let (weight, bias) = (weight.0.as_slice(), bias.map(|bias| bias.0.as_slice()));
        self.rows((x.values(), columns), out, |x, out| {
            if self.path == CpuPath::Scalar {
                for (x, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(columns)) {
                    reference::norm_row(kind, epsilon, x, (weight, bias), out);
                }
            } else {
                dispatch(self.path, Norm { kind, epsilon, x, weight, bias, out });
            }
        });
    }

    fn linear(&self, args: LinearArgs<'_, Self>) {
        let LinearArgs { x, linear, store, out } = args;
        assert_eq!(x.columns(), linear.inputs, "input width of a linear layer");
        assert_eq!(out.columns(), linear.outputs, "output width of a linear layer");
        out.resize(x.rows());
        let scalar = self.path == CpuPath::Scalar;
        let (parts, layout) = match &linear.weights {
            CpuWeights::Stored { parts, layout } => (parts, *layout),
            CpuWeights::Packed(packed) if scalar => {
                let add = store == Store::Add;
                return reference::quantised_linear(x.values(), packed, add, out.values_mut());
            }
            CpuWeights::Packed(packed) => {
                return quantised::linear(self, (x, None), packed, store, out, None);
            }
        };
        if !scalar {
            linear::linear(self, x, parts, store, out, None);
            return;
        }
        let mut start = 0;
        for part in parts {
            let columns = start..start + part.outputs;
            start = columns.end;
            let rows = reference::LinearRows {
                x: x.values(),
                inputs: linear.inputs,
                weight: &part.weight,
                layout,
                bias: part.bias.as_deref(),
                columns,
                width: linear.outputs,
                add: store == Store::Add,
            };
            reference::linear(&rows, out.values_mut());
        }
    }

    fn rotary_angles(&self, args: RotaryAnglesArgs<'_, Self>) {
        let RotaryAnglesArgs { positions, inverse_frequencies, out } = args;
        out.resize(positions.len());
        let dim = out.columns();
        assert_eq!(dim, 2 * inverse_frequencies.len(), "width of the angles");
        for (&position, out) in positions.iter().zip(out.values_mut().chunks_exact_mut(dim)) {
            reference::rotary_angles_row(position, inverse_frequencies, out);
        }
    }

    fn rotary(&self, args: RotaryArgs<'_, Self>) {
        let RotaryArgs { angles, heads, qkv } = args;
        let dim = heads.head_dim;
        assert_eq!(angles.columns(), dim, "width of the angles");
        assert_eq!(qkv.columns(), heads.qkv_width(), "width of queries, keys and values");
        assert_eq!(angles.rows(), qkv.rows(), "rows of the angles");
        self.rows((angles.values(), dim), qkv, |angles, qkv| {
            if self.path == CpuPath::Scalar {
                let rows = qkv.chunks_exact_mut(heads.qkv_width());
                for (angles, row) in angles.chunks_exact(dim).zip(rows) {
                    for head in row[..heads.v_columns().start].chunks_exact_mut(dim) {
                        reference::rotate_head(angles, head);
                    }
                }
            } else {
                dispatch(self.path, Rotary { heads, angles, qkv });
            }
        });
    }

    fn append_kv(&self, args: AppendKvArgs<'_, Self>) {
        let AppendKvArgs { layer, heads, qkv, slots, pages } = args;
        assert_eq!(qkv.columns(), heads.qkv_width(), "width of queries, keys and values");
        assert_eq!(qkv.rows(), slots.len(), "one slot per row");
        if self.path != CpuPath::Scalar {
            return append::append_kv(self, AppendKvArgs { layer, heads, qkv, slots, pages });
        }
        let rows = qkv.values().chunks_exact(heads.qkv_width()).zip(slots);
        let tokens = rows.map(|(row, &slot)| {
            let (keys, values) = (&row[heads.k_columns()], &row[heads.v_columns()]);
            NewToken { slot, keys, values }
        });
        pages.append_tokens(layer, tokens);
    }

    fn attend(&self, args: AttendArgs<'_, Self>) -> Result<AttendStats, KernelError> {
        args.out.resize(args.qkv.rows());
        attend::attend(self, args)
    }

    fn activate(&self, args: ActivateArgs<'_, Self>) {
        let ActivateArgs { activation, gated, x, out } = args;
        out.resize(x.rows());
        let (columns, width) = (x.columns(), out.columns());
        assert_eq!(columns, if gated { 2 * width } else { width }, "input width of an activation");
        self.rows((x.values(), columns), out, |x, out| {
            if self.path == CpuPath::Scalar {
                for (x, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(width)) {
                    for (i, out) in out.iter_mut().enumerate() {
                        let y = reference::activate(activation, x[i]);
                        *out = if gated { y * x[width + i] } else { y };
                    }
                }
            } else {
                dispatch(self.path, Activate { activation, gated, width, x, out });
            }
        });
    }

    fn project(&self, args: ProjectArgs<'_, Self>) {
        project::project(self, args);
    }

    fn gather_rows(&self, x: &CpuTensor, rows: &[u32], out: &mut CpuTensor) {
        out.resize(rows.len());
        let columns = x.columns();
        assert_eq!(out.columns(), columns, "width of gathered rows");
        for (&row, out) in rows.iter().zip(out.values_mut().chunks_exact_mut(columns)) {
            out.copy_from_slice(&x.values()[row as usize * columns..][..columns]);
        }
    }

    fn top_logits(&self, args: TopLogitsArgs<'_, Self>) {
        let TopLogitsArgs { logits, rows, k, out } = args;
        let vocab = logits.columns();
        out.begin(k, vocab);
        for &row in rows {
            out.push_row(&logits.values()[row as usize * vocab..][..vocab]);
        }
    }

    fn download(&self, x: &CpuTensor, out: &mut Vec<f32>) {
        out.clear();
        out.extend_from_slice(x.values());
    }

    fn upload(&self, values: &[f32], out: &mut CpuTensor) {
        assert!(values.len().is_multiple_of(out.columns()), "whole rows");
        out.resize(values.len() / out.columns());
        out.values_mut().copy_from_slice(values);
    }
}
