//! The table of cases notices a backend that is a little wrong, in whichever operation.

mod common;

use tinyserve_kernels::{
    ActivateArgs, AppendKvArgs, AttendArgs, AttendStats, Backend, Cpu, CpuLinear, CpuOptions,
    CpuPath, CpuTensor, CpuVector, EmbedArgs, HostTensor, KernelError, LinearArgs, LinearSpec,
    MassArgs, NormArgs, ObserveArgs, ProjectActivation, ProjectArgs, RotaryAnglesArgs, RotaryArgs,
    RotateAndAppendArgs, TopLogitsArgs,
};
use tinyserve_kv::{HostPages, KvLayout, PageCopy, PageId, TokenMove};

use common::WholeTable;

/// What is done to an operation's result.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// The last value is off by one part in a thousand of the largest.
    Nudge,
    /// The last value is not a number.
    Nan,
}

/// A backend one of whose operations is wrong.
#[derive(Debug)]
struct Perturbed {
    cpu: Cpu,
    op: &'static str,
    fault: Fault,
}

impl Perturbed {
    fn spoil(&self, op: &str, out: &mut CpuTensor) {
        if op != self.op {
            return;
        }
        let mut values = out.values().to_vec();
        let largest = values.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        if let Some(last) = values.last_mut() {
            *last = match self.fault {
                Fault::Nudge => *last + 1e-3 * largest,
                Fault::Nan => f32::NAN,
            };
        }
        self.cpu.upload(&values, out);
    }
}

impl Backend for Perturbed {
    type Tensor = CpuTensor;
    type Vector = CpuVector;
    type Linear = CpuLinear;
    type KvPages = HostPages;

    fn rounds_inputs(&self) -> bool {
        (self.op == "rounds_inputs") != self.cpu.rounds_inputs()
    }
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
        if self.op != "copy_page" {
            self.cpu.copy_page(pages, copy);
        }
    }
    fn download_pages<E: From<KernelError>>(
        &self,
        pages: &HostPages,
        ids: &[PageId],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.cpu.download_pages(pages, ids, |bytes| match self.op {
            "download_pages" => take(&vec![0; bytes.len()]),
            _ => take(bytes),
        })
    }
    fn upload_page(
        &self,
        pages: &mut HostPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        if self.op != "upload_page" {
            self.cpu.upload_page(pages, page, bytes)?;
        }
        Ok(())
    }
    fn move_tokens(&self, pages: &mut HostPages, moves: &[TokenMove]) -> Result<(), KernelError> {
        self.cpu.move_tokens(pages, moves)
    }
    fn embed(&self, args: EmbedArgs<'_, Self>) {
        let EmbedArgs { table, ids, store, out } = args;
        self.cpu.embed(EmbedArgs { table, ids, store, out: &mut *out });
        self.spoil("embed", out);
    }
    fn norm(&self, args: NormArgs<'_, Self>) {
        let NormArgs { kind, x, weight, bias, epsilon, out } = args;
        self.cpu.norm(NormArgs { kind, x, weight, bias, epsilon, out: &mut *out });
        self.spoil("norm", out);
    }
    fn linear(&self, args: LinearArgs<'_, Self>) {
        let LinearArgs { x, linear, store, out } = args;
        self.cpu.linear(LinearArgs { x, linear, store, out: &mut *out });
        self.spoil("linear", out);
    }
    fn project(&self, args: ProjectArgs<'_, Self>) {
        let ProjectArgs { norm, linear, activate, out } = args;
        let NormArgs { kind, x, weight, bias, epsilon, out: normed } = norm;
        let norm = NormArgs { kind, x, weight, bias, epsilon, out: normed };
        let activate = activate.map(|ProjectActivation { activation, gated, product }| {
            ProjectActivation { activation, gated, product }
        });
        self.cpu.project(ProjectArgs { norm, linear, activate, out: &mut *out });
        self.spoil("project", out);
    }
    fn rotary_angles(&self, args: RotaryAnglesArgs<'_, Self>) {
        let RotaryAnglesArgs { positions, inverse_frequencies, out } = args;
        self.cpu.rotary_angles(RotaryAnglesArgs { positions, inverse_frequencies, out: &mut *out });
        self.spoil("rotary_angles", out);
    }
    fn rotary(&self, args: RotaryArgs<'_, Self>) {
        let RotaryArgs { angles, heads, qkv } = args;
        self.cpu.rotary(RotaryArgs { angles, heads, qkv: &mut *qkv });
        self.spoil("rotary", qkv);
    }
    fn rotate_and_append(&self, args: RotateAndAppendArgs<'_, Self>) {
        let RotateAndAppendArgs { angles, layer, heads, qkv, slots, pages } = args;
        if self.op != "rotate_and_append" {
            self.rotary(RotaryArgs { angles, heads, qkv: &mut *qkv });
        }
        self.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
    }
    fn append_kv(&self, args: AppendKvArgs<'_, Self>) {
        let AppendKvArgs { layer, heads, qkv, slots, pages } = args;
        if self.op == "append_kv" {
            let mut wrong = self.cpu.tensor(heads.qkv_width());
            self.cpu.upload(qkv.values(), &mut wrong);
            self.spoil("append_kv", &mut wrong);
            self.cpu.append_kv(AppendKvArgs { layer, heads, qkv: &wrong, slots, pages });
        } else {
            self.cpu.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
        }
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
        let mut observe = observe;
        let mut stats = self.cpu.attend(AttendArgs {
            layer,
            heads,
            qkv,
            scale,
            sequences,
            pages,
            measure_recall,
            page_lists,
            sequence_stats,
            observe: observe.as_mut().map(reborrow),
            out: &mut *out,
        })?;
        let told = observe.map(|it| {
            let mass = it.mass.map(|mass| ("mass", mass.out));
            [Some(("lse", it.lse)), Some(("entropy", it.entropy)), mass].into_iter().flatten()
        });
        self.spoil("attend", out);
        for (op, told) in told.into_iter().flatten() {
            self.spoil(op, told);
        }
        stats.bytes_read += u64::from(self.op == "attend stats");
        Ok(stats)
    }
    fn activate(&self, args: ActivateArgs<'_, Self>) {
        let ActivateArgs { activation, gated, x, out } = args;
        self.cpu.activate(ActivateArgs { activation, gated, x, out: &mut *out });
        self.spoil("activate", out);
    }
    fn gather_rows(&self, x: &CpuTensor, rows: &[u32], out: &mut CpuTensor) {
        self.cpu.gather_rows(x, rows, out);
        self.spoil("gather_rows", out);
    }
    fn top_logits(&self, args: TopLogitsArgs<'_, Self>) {
        let TopLogitsArgs { logits, rows, k, out } = args;
        if self.op != "top_logits" {
            return self.cpu.top_logits(TopLogitsArgs { logits, rows, k, out });
        }
        out.begin(k, logits.columns());
        for &row in rows {
            let row = row as usize * logits.columns();
            let mut values = logits.values()[row..row + logits.columns()].to_vec();
            match self.fault {
                Fault::Nudge => values.iter_mut().for_each(|x| *x *= 1.001),
                Fault::Nan => values[0] = f32::NAN,
            }
            out.push_row(&values);
        }
    }
    fn download(&self, x: &CpuTensor, out: &mut Vec<f32>) {
        self.cpu.download(x, out);
    }
    fn upload(&self, values: &[f32], out: &mut CpuTensor) {
        self.cpu.upload(values, out);
    }
}

/// The same observation, to be looked at afterwards.
fn reborrow<'a>(args: &'a mut ObserveArgs<'_, CpuTensor>) -> ObserveArgs<'a, CpuTensor> {
    let ObserveArgs { lse, entropy, mass } = args;
    let mass = mass.as_mut().map(|mass| MassArgs {
        rows: mass.rows,
        store: mass.store,
        out: &mut *mass.out,
    });
    ObserveArgs { lse, entropy, mass }
}

/// Operations of the table that fail when `op` of a backend is wrong.
fn failing(table: &mut WholeTable, op: &'static str, fault: Fault) -> Vec<&'static str> {
    failing_on(table, CpuPath::detect(), op, fault)
}

fn failing_on(
    table: &mut WholeTable,
    path: CpuPath,
    op: &'static str,
    fault: Fault,
) -> Vec<&'static str> {
    let outcomes = table.run(|| {
        let cpu = Cpu::new(CpuOptions { threads: Some(1), path: Some(path) }).unwrap();
        Perturbed { cpu, op, fault }
    });
    let mut failing = Vec::new();
    for outcome in outcomes.iter().filter(|outcome| !outcome.passed()) {
        if !failing.contains(&outcome.op) {
            failing.push(outcome.op);
        }
    }
    failing
}

#[test]
fn a_wrong_result_fails_its_operation_and_no_other() {
    let mut table = WholeTable::new();
    let mut failing = |op, fault| failing(&mut table, op, fault);
    let pages = ["append_kv and attend", "move_tokens and attend", "select and attend"];
    for fault in [Fault::Nudge, Fault::Nan] {
        for op in ["embed", "rotary", "project", "gather_rows", "top_logits", "rotate_and_append"] {
            assert_eq!(failing(op, fault), [op], "{fault:?}");
        }
        // A projection is compared with its operations.
        for op in ["norm", "linear", "activate"] {
            assert_eq!(failing(op, fault), [op, "project"], "{fault:?}");
        }
        let rotated = failing("rotary_angles", fault);
        assert_eq!(rotated[0], "rotary_angles", "{fault:?}: {rotated:?}");
        assert!(rotated.iter().all(|op| op.starts_with("rotary")), "{fault:?}: {rotated:?}");
        for op in ["append_kv", "attend"] {
            let mut failed = failing(op, fault);
            failed.sort_unstable();
            failed.dedup();
            // The last number of a row is a value: what is told about the weights does not see it.
            assert_eq!(failed, pages, "{op} {fault:?}");
        }
        for told in ["lse", "entropy", "mass"] {
            assert_eq!(failing(told, fault), ["observe attention"], "{told} {fault:?}");
        }
    }
    assert!(!failing("attend stats", Fault::Nudge).is_empty());
    for op in ["copy_page", "download_pages", "upload_page"] {
        assert!(!failing(op, Fault::Nudge).is_empty(), "{op}");
    }
    assert!(failing("none", Fault::Nudge).is_empty());
    // Whoever says that inputs are rounded, or are not, is held to it.
    for path in [CpuPath::Portable, CpuPath::PortableBf16] {
        assert_eq!(failing_on(&mut table, path, "rounds_inputs", Fault::Nudge), ["linear"]);
    }
}
