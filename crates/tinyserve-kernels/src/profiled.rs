//! A backend that times another one, operation by operation.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tinyserve_kv::{KvFormat, KvLayout, PageCopy, PageId, PagePool, TokenMove};

use crate::{
    ActivateArgs, AppendKvArgs, AttendArgs, AttendStats, Backend, EmbedArgs, HostTensor,
    KernelError, LinearArgs, LinearImage, LinearSpec, NormArgs, ProjectActivation, ProjectArgs,
    RotaryAnglesArgs, RotaryArgs, RotateAndAppendArgs, TopLogitsArgs,
};

/// Forwards every operation to `B`; while it is switched on, it adds up what the large ones take.
///
/// Switched off, it costs one load per operation. Only a backend whose operations are done when
/// they return can be timed so.
#[derive(Debug)]
pub struct Profiled<B> {
    inner: B,
    on: AtomicBool,
    linear: AtomicU64,
    attend: AtomicU64,
}

/// What operations took since they were last asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Profile {
    /// Matrix products, which read the weights, with the norms and activations of projections.
    pub linear: Duration,
    /// Attention, page selection included.
    pub attend: Duration,
}

impl<B: Backend> Profiled<B> {
    /// A wrapper that is switched off.
    #[must_use]
    pub fn new(inner: B) -> Self {
        let zero = AtomicU64::default;
        Self { inner, on: AtomicBool::new(false), linear: zero(), attend: zero() }
    }

    /// The backend that does the work.
    #[must_use]
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// Starts or stops timing.
    pub fn switch(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    /// What was added up, which starts again from zero.
    pub fn take(&self) -> Profile {
        let take = |sum: &AtomicU64| Duration::from_nanos(sum.swap(0, Ordering::Relaxed));
        Profile { linear: take(&self.linear), attend: take(&self.attend) }
    }

    fn timed<T>(&self, sum: &AtomicU64, run: impl FnOnce() -> T) -> T {
        if !self.on.load(Ordering::Relaxed) {
            return run();
        }
        let start = Instant::now();
        let result = run();
        sum.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }
}

impl<B: Backend + Sync> Backend for Profiled<B> {
    type Tensor = B::Tensor;
    type Vector = B::Vector;
    type Linear = B::Linear;
    type KvPages = B::KvPages;

    fn tensor(&self, columns: usize) -> B::Tensor {
        self.inner.tensor(columns)
    }

    fn load_vector(&self, vector: &HostTensor) -> Result<B::Vector, KernelError> {
        self.inner.load_vector(vector)
    }

    fn load_linear(&self, spec: LinearSpec) -> Result<B::Linear, KernelError> {
        self.inner.load_linear(spec)
    }

    fn linear_bytes(&self, linear: &B::Linear) -> usize {
        self.inner.linear_bytes(linear)
    }

    fn image_layout(&self) -> Option<&'static str> {
        self.inner.image_layout()
    }

    fn linear_image(&self, linear: &B::Linear) -> Option<LinearImage> {
        self.inner.linear_image(linear)
    }

    fn load_linear_image(&self, image: LinearImage) -> Result<B::Linear, KernelError> {
        self.inner.load_linear_image(image)
    }

    fn allocate_pages(&self, layout: KvLayout, pages: usize) -> Result<B::KvPages, KernelError> {
        self.inner.allocate_pages(layout, pages)
    }

    fn rounds_inputs(&self) -> bool {
        self.inner.rounds_inputs()
    }

    fn kv_formats(&self) -> &'static [KvFormat] {
        self.inner.kv_formats()
    }

    fn open_formats(&self) -> &'static [KvFormat] {
        self.inner.open_formats()
    }

    fn copy_page(&self, pages: &mut B::KvPages, copy: PageCopy) {
        self.inner.copy_page(pages, copy);
    }

    fn forget_free_pages(&self, pages: &mut B::KvPages, pool: &PagePool) {
        self.inner.forget_free_pages(pages, pool);
    }

    fn download_pages<E: From<KernelError>>(
        &self,
        pages: &B::KvPages,
        ids: &[PageId],
        take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.inner.download_pages(pages, ids, take)
    }

    fn upload_page(
        &self,
        pages: &mut B::KvPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        self.inner.upload_page(pages, page, bytes)
    }

    fn move_tokens(&self, pages: &mut B::KvPages, moves: &[TokenMove]) -> Result<(), KernelError> {
        self.inner.move_tokens(pages, moves)
    }

    fn embed(&self, args: EmbedArgs<'_, Self>) {
        let EmbedArgs { table, ids, store, out } = args;
        self.inner.embed(EmbedArgs { table, ids, store, out });
    }

    fn norm(&self, args: NormArgs<'_, Self>) {
        let NormArgs { kind, x, weight, bias, epsilon, out } = args;
        self.inner.norm(NormArgs { kind, x, weight, bias, epsilon, out });
    }

    fn linear(&self, args: LinearArgs<'_, Self>) {
        let LinearArgs { x, linear, store, out } = args;
        self.timed(&self.linear, || self.inner.linear(LinearArgs { x, linear, store, out }));
    }

    fn rotary_angles(&self, args: RotaryAnglesArgs<'_, Self>) {
        let RotaryAnglesArgs { positions, inverse_frequencies, out } = args;
        self.inner.rotary_angles(RotaryAnglesArgs { positions, inverse_frequencies, out });
    }

    fn rotary(&self, args: RotaryArgs<'_, Self>) {
        let RotaryArgs { angles, heads, qkv } = args;
        self.inner.rotary(RotaryArgs { angles, heads, qkv });
    }

    fn append_kv(&self, args: AppendKvArgs<'_, Self>) {
        let AppendKvArgs { layer, heads, qkv, slots, pages } = args;
        self.inner.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
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
        let args = AttendArgs {
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
        };
        self.timed(&self.attend, || self.inner.attend(args))
    }

    fn activate(&self, args: ActivateArgs<'_, Self>) {
        let ActivateArgs { activation, gated, x, out } = args;
        self.inner.activate(ActivateArgs { activation, gated, x, out });
    }

    fn rotate_and_append(&self, args: RotateAndAppendArgs<'_, Self>) {
        let RotateAndAppendArgs { angles, layer, heads, qkv, slots, pages } = args;
        let args = RotateAndAppendArgs { angles, layer, heads, qkv, slots, pages };
        self.inner.rotate_and_append(args);
    }

    fn project(&self, args: ProjectArgs<'_, Self>) {
        let ProjectArgs { norm, linear, activate, out } = args;
        let NormArgs { kind, x, weight, bias, epsilon, out: normed } = norm;
        let norm = NormArgs { kind, x, weight, bias, epsilon, out: normed };
        let activate = activate.map(|ProjectActivation { activation, gated, product }| {
            ProjectActivation { activation, gated, product }
        });
        let args = ProjectArgs { norm, linear, activate, out };
        self.timed(&self.linear, || self.inner.project(args));
    }

    fn gather_rows(&self, x: &B::Tensor, rows: &[u32], out: &mut B::Tensor) {
        self.inner.gather_rows(x, rows, out);
    }

    fn top_logits(&self, args: TopLogitsArgs<'_, Self>) {
        let TopLogitsArgs { logits, rows, k, out } = args;
        self.inner.top_logits(TopLogitsArgs { logits, rows, k, out });
    }

    fn download(&self, x: &B::Tensor, out: &mut Vec<f32>) {
        self.inner.download(x, out);
    }

    fn upload(&self, values: &[f32], out: &mut B::Tensor) {
        self.inner.upload(values, out);
    }

    fn is_synchronous(&self) -> bool {
        self.inner.is_synchronous()
    }

    fn check(&self) -> Result<(), KernelError> {
        self.inner.check()
    }
}
