//! The CUDA backend: kernels of `kernels/`, embedded as PTX, behind the operations of the seam.
//!
//! Steps go to one stream, in order, and the host waits only where something is downloaded. Pages that
//! are saved or restored cross the bus on a second one.
//! Launches of small steps wait until then, and are replayed as one graph where they came before. An
//! operation that fails leaves its cause behind, and those after it do nothing, until
//! [`Backend::check`] tells; the device's memory stays as it was.

mod append;
mod attend;
mod bucket;
mod code;
mod copies;
mod cublas;
mod device;
mod error;
mod fused_times;
mod graph;
mod launch;
mod linear;
mod measure;
mod memory;
mod open;
mod pages;
mod queue;
mod tensor;
mod top_logits;
mod workload;

use std::sync::{Mutex, MutexGuard, PoisonError};

use tinyserve_kv::{KvFormat, KvLayout, PageCopy, PageId, PagePool, SelectionPolicy, TokenMove};

use attend::FusedChoice;
pub use attend::{FusedRow, FusedTable};
pub use code::overlapping_ptx;
pub use device::CudaDevice;
pub use error::{CudaError, CudaVersion};
pub use fused_times::{FusedTimes, most_fused_bytes};
pub use measure::StepTime;
pub use pages::CudaPages;
pub use tensor::{CudaLinear, CudaTensor, CudaVector};
pub use workload::CudaWorkload;

use crate::backend::{project_step_by_step, rotate_then_append};
use crate::{
    ActivateArgs, AppendKvArgs, AttendArgs, AttendStats, Backend, EmbedArgs, HostTensor,
    KernelError, LinearArgs, LinearSpec, NormArgs, NormKind, ProjectArgs, RotaryAnglesArgs,
    RotaryArgs, RotateAndAppendArgs, Store, TopLogitsArgs,
};
use bucket::{MOST_ROWS, filled};
use launch::{Arg, Launcher, Shape};
use memory::{Buffer, Staging, Upload};

/// Threads of a block of a pointwise kernel.
const POINTWISE: u32 = 256;

/// The version of the cuBLAS that multiplies prompts.
///
/// # Errors
/// When there is none: our own kernels multiply then.
pub fn cublas_version() -> Result<String, CudaError> {
    let [major, minor, patch] = cublas::version()?;
    Ok(format!("{major}.{minor}.{patch}"))
}

/// The CUDA backend on one device.
#[derive(Debug)]
pub struct Cuda {
    launcher: Launcher,
    device: CudaDevice,
    fused: FusedChoice,
    use_graphs: bool,
    state: Mutex<State>,
    copies: Mutex<copies::Copies>,
}

/// What operations reuse, and what went wrong.
#[derive(Debug, Default)]
struct State {
    failure: Option<CudaError>,
    staging: Staging,
    ids: Upload,
    added_ids: Upload,
    positions: Upload,
    frequencies: Upload,
    rows: Upload,
    moves: Upload,
    append: append::Scratch,
    /// For calls that read everything, and for those in which some select.
    attend: [attend::Scratch; 2],
    linear: linear::Scratch,
    /// What is written over the device's cache where steps are timed.
    cold: Option<Buffer>,
    top_logits: top_logits::Scratch,
}

impl Cuda {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// When there is no driver, no such device, or one of them is too old.
    pub fn new(ordinal: usize) -> Result<Self, KernelError> {
        let (context, device) = device::open(ordinal)?;
        // SAFETY: steps go to one stream, in order, and copies of pages to another, ordered by events
        // of their own, so that no buffer needs to be watched.
        // Watching would wait inside captures for what is outside.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(device::driver_error("making a stream"))?;
        let launcher = Launcher::new(context, stream, &device);
        Ok(Self {
            launcher,
            device,
            fused: FusedChoice::default(),
            use_graphs: true,
            state: Mutex::default(),
            copies: Mutex::default(),
        })
    }

    /// Whether decode steps score, select and attend in one launch where there is a kernel for it;
    /// `None` decides by size, as [`Self::use_fused_up_to`] says.
    #[must_use]
    pub fn use_fused_kernel(mut self, fused: Option<bool>) -> Self {
        self.fused.forced = fused;
        self
    }

    /// Most bytes of a KV head, counted as [`FusedRow::most_bytes`] counts them, of which decode
    /// steps score, select and attend in one launch; [`FusedTable::DEFAULT`] says unless it is set.
    #[must_use]
    pub fn use_fused_up_to(mut self, bytes: Option<usize>) -> Self {
        self.fused.most_bytes = bytes;
        self
    }

    /// Whether decode steps that come again are replayed as graphs; they are unless it is said.
    #[must_use]
    pub fn use_graphs(mut self, graphs: bool) -> Self {
        self.use_graphs = graphs;
        self
    }

    /// Whether cuBLAS multiplies prompts where it is installed; it does unless it is said.
    #[must_use]
    pub fn use_cublas(self, cublas: bool) -> Self {
        self.state().linear.products.unused = !cublas;
        self
    }

    /// Whether pages are chosen by kernels as `policy` says; anything else is chosen on the host, at
    /// the price of a round trip in every layer.
    #[must_use]
    pub fn has_kernels(policy: &SelectionPolicy) -> bool {
        attend::has_kernels(policy)
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    fn copies(&self) -> MutexGuard<'_, copies::Copies> {
        // A stage is waited for before it is used again, whatever happened.
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a panic left half done is written again before it is read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an operation, unless an earlier one failed; its failure is kept. What is asserted about
    /// rows belongs inside: a tensor that was to be written by one that failed has none.
    fn run(&self, operation: impl FnOnce(&mut State) -> Result<(), CudaError>) {
        let mut state = self.state();
        if state.failure.is_none()
            && let Err(error) = operation(&mut state)
        {
            state.failure = Some(error);
        }
    }

    /// Blocks for `rows` rows of `columns` channels.
    fn pointwise(rows: usize, columns: usize) -> Shape {
        Shape::new((rows, columns.div_ceil(POINTWISE as usize), 1), POINTWISE)
    }
}

impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Vector = CudaVector;
    type Linear = CudaLinear;
    type KvPages = CudaPages;

    fn tensor(&self, columns: usize) -> CudaTensor {
        CudaTensor::new(columns)
    }

    fn load_vector(&self, vector: &HostTensor) -> Result<CudaVector, KernelError> {
        let values = crate::cpu::vector(vector)?;
        let what = format!("tensor {:?}", vector.name());
        let columns = values.len();
        Ok(CudaVector { values: Buffer::of(&self.launcher, &values, &what)?, columns })
    }

    fn load_linear(&self, spec: LinearSpec) -> Result<CudaLinear, KernelError> {
        linear::load(&self.launcher, &mut self.state().staging, spec)
    }

    fn linear_bytes(&self, linear: &CudaLinear) -> usize {
        linear.bytes()
    }

    fn kv_formats(&self) -> &'static [KvFormat] {
        &KvFormat::ALL
    }

    fn allocate_pages(&self, layout: KvLayout, pages: usize) -> Result<CudaPages, KernelError> {
        CudaPages::new(&self.launcher, layout, pages)
    }

    fn copy_page(&self, pages: &mut CudaPages, copy: PageCopy) {
        self.run(|_| append::copy_page(&self.launcher, pages, copy));
    }

    fn forget_free_pages(&self, pages: &mut CudaPages, pool: &PagePool) {
        if let Some(open) = &mut pages.open {
            open.forget_free(pool);
        }
    }

    fn download_pages<E: From<KernelError>>(
        &self,
        pages: &CudaPages,
        ids: &[PageId],
        take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.copies().download(&self.launcher, pages, ids, take)
    }

    fn upload_page(
        &self,
        pages: &mut CudaPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        assert_eq!(bytes.len(), pages.layout().bytes_per_page(), "bytes of a page");
        self.copies().upload(&self.launcher, pages, page, bytes)?;
        if let Some(open) = &mut pages.open {
            open.close_page(page);
        }
        Ok(())
    }

    fn move_tokens(&self, pages: &mut CudaPages, moves: &[TokenMove]) -> Result<(), KernelError> {
        let mut state = self.state();
        Ok(append::move_tokens(&self.launcher, &mut state.moves, pages, moves)?)
    }

    fn embed(&self, args: EmbedArgs<'_, Self>) {
        self.run(|state| {
            // A step begins here; long prompts do not come again.
            self.launcher.keep_back(self.use_graphs && args.ids.len() <= MOST_ROWS)?;
            // Positions are looked up behind tokens, in the same step.
            let ids = match args.store {
                Store::Overwrite => &mut state.ids,
                Store::Add => &mut state.added_ids,
            };
            linear::embed(&self.launcher, ids, args)
        });
    }

    fn norm(&self, args: NormArgs<'_, Self>) {
        let NormArgs { kind, x, weight, bias, epsilon, out } = args;
        let (rows, columns) = (x.rows(), x.columns());
        assert_eq!(out.columns(), columns, "output width of a norm");
        assert_eq!(weight.columns, columns, "scale of a norm");
        assert!(bias.is_none_or(|bias| bias.columns == columns), "shift of a norm");
        self.run(|_| {
            out.resize(&self.launcher, rows)?;
            let kernel = match kind {
                NormKind::Layer => "norm_layer",
                NormKind::Rms => "norm_rms",
            };
            let args = [
                x.arg(),
                weight.values.arg(),
                bias.map_or(Arg::Pointer(0), |bias| bias.values.arg()),
                out.arg(),
                Arg::count(columns),
                Arg::Number(epsilon),
            ];
            // SAFETY: `x` and `out` have room for these rows of `columns`, as both vectors have.
            unsafe { self.launcher.launch(kernel, Shape::new((x.bucket(), 1, 1), 256), &args) }
        });
    }

    fn linear(&self, args: LinearArgs<'_, Self>) {
        let multiprocessors = self.device.multiprocessors;
        self.run(|state| linear::linear(&self.launcher, multiprocessors, &mut state.linear, args));
    }

    fn project(&self, args: ProjectArgs<'_, Self>) {
        let mut left = None;
        self.run(|_| {
            left = linear::project(&self.launcher, self.device.multiprocessors, args)?;
            Ok(())
        });
        if let Some(args) = left {
            project_step_by_step(self, args);
        }
    }

    fn rotary_angles(&self, args: RotaryAnglesArgs<'_, Self>) {
        let RotaryAnglesArgs { positions, inverse_frequencies, out } = args;
        let half = inverse_frequencies.len();
        assert_eq!(out.columns(), 2 * half, "width of the angles");
        self.run(|state| {
            out.resize(&self.launcher, positions.len())?;
            let args = [
                state.positions.send(&self.launcher, &filled(positions, 0))?,
                state.frequencies.send(&self.launcher, inverse_frequencies)?,
                out.arg(),
                Arg::count(half),
            ];
            let shape = Shape::new((out.bucket(), 1, 1), 128);
            // SAFETY: `out` has a row of twice as many columns as frequencies for each position.
            unsafe { self.launcher.launch("rotary_angles", shape, &args) }
        });
    }

    fn rotary(&self, args: RotaryArgs<'_, Self>) {
        let RotaryArgs { angles, heads, qkv } = args;
        assert_eq!(angles.columns(), heads.head_dim, "width of the angles");
        assert_eq!(qkv.columns(), heads.qkv_width(), "width of queries, keys and values");
        self.run(|_| {
            assert_eq!(angles.rows(), qkv.rows(), "rows of the angles");
            let args = [
                angles.arg(),
                qkv.arg(),
                Arg::count(heads.head_dim),
                Arg::count(heads.qkv_width()),
            ];
            let shape = Shape::new((qkv.bucket(), heads.q_heads + heads.kv_heads, 1), 64);
            // SAFETY: queries and keys are the first heads of each row, and `angles` has as many.
            unsafe { self.launcher.launch("rotary", shape, &args) }
        });
    }

    fn append_kv(&self, args: AppendKvArgs<'_, Self>) {
        self.run(|state| append::append_kv(&self.launcher, &mut state.append, None, args));
    }

    fn rotate_and_append(&self, args: RotateAndAppendArgs<'_, Self>) {
        // Blocks take the rows of a page one after the other: long prompts are rotated apart.
        if args.slots.len() > MOST_ROWS {
            return rotate_then_append(self, args);
        }
        let RotateAndAppendArgs { angles, layer, heads, qkv, slots, pages } = args;
        let args = AppendKvArgs { layer, heads, qkv: &*qkv, slots, pages };
        self.run(|state| append::append_kv(&self.launcher, &mut state.append, Some(angles), args));
    }

    fn attend(&self, args: AttendArgs<'_, Self>) -> Result<AttendStats, KernelError> {
        self.check()?;
        attend::attend(self, args)
    }

    fn activate(&self, args: ActivateArgs<'_, Self>) {
        let ActivateArgs { activation, gated, x, out } = args;
        let (rows, width) = (x.rows(), out.columns());
        let expected = if gated { 2 * width } else { width };
        assert_eq!(x.columns(), expected, "input width of an activation");
        self.run(|_| {
            out.resize(&self.launcher, rows)?;
            let number = linear::activation_number(activation);
            let args =
                [x.arg(), out.arg(), Arg::Whole(number), Arg::flag(gated), Arg::count(width)];
            let shape = Self::pointwise(out.bucket(), width);
            // SAFETY: `x` has room for these rows of `width`, or twice that, and so has `out`.
            unsafe { self.launcher.launch("activate", shape, &args) }
        });
    }

    fn gather_rows(&self, x: &CudaTensor, rows: &[u32], out: &mut CudaTensor) {
        assert_eq!(out.columns(), x.columns(), "width of gathered rows");
        self.run(|state| {
            assert!(rows.iter().all(|&row| (row as usize) < x.rows()), "rows to gather");
            out.resize(&self.launcher, rows.len())?;
            let indices = state.rows.send(&self.launcher, &filled(rows, 0))?;
            let args = [x.arg(), indices, out.arg(), Arg::count(x.columns())];
            let shape = Self::pointwise(out.bucket(), x.columns());
            // SAFETY: every index is a row of `x`, and `out` has room for a row for each.
            unsafe { self.launcher.launch("gather_rows", shape, &args) }
        });
    }

    fn top_logits(&self, args: TopLogitsArgs<'_, Self>) {
        self.run(|state| top_logits::top_logits(&self.launcher, &mut state.top_logits, args));
    }

    fn download(&self, x: &CudaTensor, out: &mut Vec<f32>) {
        // What it holds from the step before is overwritten, and needs no zeroing.
        out.resize(x.rows() * x.columns(), 0.0);
        self.run(|_| match &x.values {
            Some(values) => values.read(&self.launcher, 0, bytemuck::cast_slice_mut(out)),
            None => Ok(()),
        });
    }

    fn upload(&self, values: &[f32], out: &mut CudaTensor) {
        assert!(values.len().is_multiple_of(out.columns()), "whole rows");
        self.run(|_| {
            out.resize(&self.launcher, values.len() / out.columns())?;
            match &mut out.values {
                Some(buffer) => buffer.write(&self.launcher, 0, bytemuck::cast_slice(values)),
                None => Ok(()),
            }
        });
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn check(&self) -> Result<(), KernelError> {
        match self.state().failure.take() {
            None => Ok(()),
            Some(error) => Err(error.into()),
        }
    }
}
