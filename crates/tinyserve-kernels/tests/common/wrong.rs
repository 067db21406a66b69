//! A backend that is wrong in one operation.

use tinyserve_kernels::{
    ActivateArgs, AppendKvArgs, AttendArgs, AttendStats, Backend, Cpu, EmbedArgs, HostTensor,
    KernelError, LinearArgs, LinearSpec, NormArgs, RotaryAnglesArgs, RotaryArgs,
};
use tinyserve_kv::{KvLayout, PageCopy};

/// What is wrong with the values.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// The last value is off by a hundredth of what a unit is.
    Off,
    /// The last value is not a number.
    Nan,
}

/// The reference, but for one operation.
pub(crate) struct Wrong {
    pub(crate) cpu: Cpu,
    pub(crate) op: &'static str,
    pub(crate) fault: Fault,
}

type Tensor = <Cpu as Backend>::Tensor;

impl Wrong {
    fn spoilt(&self, x: f32) -> f32 {
        match self.fault {
            Fault::Off => x + 0.01,
            Fault::Nan => f32::NAN,
        }
    }

    fn spoil(&self, op: &str, out: &mut Tensor) {
        if op == self.op {
            let mut values = out.values().to_vec();
            if let Some(last) = values.last_mut() {
                *last = self.spoilt(*last);
            }
            self.cpu.upload(&values, out);
        }
    }
}

impl Backend for Wrong {
    type Tensor = Tensor;
    type Vector = <Cpu as Backend>::Vector;
    type Linear = <Cpu as Backend>::Linear;
    type KvPages = <Cpu as Backend>::KvPages;

    fn tensor(&self, columns: usize) -> Tensor {
        self.cpu.tensor(columns)
    }

    fn load_vector(&self, vector: &HostTensor) -> Result<Self::Vector, KernelError> {
        self.cpu.load_vector(vector)
    }

    fn load_linear(&self, spec: LinearSpec) -> Result<Self::Linear, KernelError> {
        self.cpu.load_linear(spec)
    }

    fn allocate_pages(&self, layout: KvLayout, pages: usize) -> Result<Self::KvPages, KernelError> {
        self.cpu.allocate_pages(layout, pages)
    }

    fn copy_page(&self, pages: &mut Self::KvPages, copy: PageCopy) {
        // A backend that forgets to copy, or copies from the wrong page.
        match (self.op, self.fault) {
            ("copy_page", Fault::Off) => {}
            ("copy_page", Fault::Nan) => {
                self.cpu.copy_page(pages, PageCopy { from: copy.to, to: copy.from });
            }
            _ => self.cpu.copy_page(pages, copy),
        }
    }

    fn embed(&self, args: EmbedArgs<'_, Self>) {
        let EmbedArgs { table, ids, store, out } = args;
        self.cpu.embed(EmbedArgs { table, ids, store, out });
        self.spoil("embed", out);
    }

    fn norm(&self, args: NormArgs<'_, Self>) {
        let NormArgs { kind, x, weight, bias, epsilon, out } = args;
        self.cpu.norm(NormArgs { kind, x, weight, bias, epsilon, out });
        self.spoil("norm", out);
    }

    fn linear(&self, args: LinearArgs<'_, Self>) {
        let LinearArgs { x, linear, store, out } = args;
        self.cpu.linear(LinearArgs { x, linear, store, out });
        self.spoil("linear", out);
    }

    fn rotary_angles(&self, args: RotaryAnglesArgs<'_, Self>) {
        let RotaryAnglesArgs { positions, inverse_frequencies, out } = args;
        self.cpu.rotary_angles(RotaryAnglesArgs { positions, inverse_frequencies, out });
        self.spoil("rotary_angles", out);
    }

    fn rotary(&self, args: RotaryArgs<'_, Self>) {
        let RotaryArgs { angles, heads, qkv } = args;
        self.cpu.rotary(RotaryArgs { angles, heads, qkv });
        self.spoil("rotary", qkv);
    }

    fn append_kv(&self, args: AppendKvArgs<'_, Self>) {
        let AppendKvArgs { layer, heads, qkv, slots, pages } = args;
        if self.op != "append_kv" {
            self.cpu.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
            return;
        }
        // Boxes are wrong too: the keys of the last page are what the fault makes of them.
        let mut values = qkv.values().to_vec();
        values.iter_mut().for_each(|x| *x = self.spoilt(-*x));
        let mut spoilt = self.cpu.tensor(heads.qkv_width());
        self.cpu.upload(&values, &mut spoilt);
        self.cpu.append_kv(AppendKvArgs { layer, heads, qkv: &spoilt, slots, pages });
    }

    fn attend(&self, args: AttendArgs<'_, Self>) -> Result<AttendStats, KernelError> {
        let AttendArgs { layer, heads, qkv, scale, sequences, pages, measure_recall, out } = args;
        let stats = self.cpu.attend(AttendArgs {
            layer,
            heads,
            qkv,
            scale,
            sequences,
            pages,
            measure_recall,
            out,
        })?;
        if self.op == "attend" {
            // The last row that is read: rows of no sequence are not looked at.
            let width = heads.q_columns().len();
            let last = sequences.last().map_or(0, |last| last.rows.end) * width - 1;
            let mut values = out.values().to_vec();
            values[last] = self.spoilt(values[last]);
            self.cpu.upload(&values, out);
        }
        Ok(stats)
    }

    fn activate(&self, args: ActivateArgs<'_, Self>) {
        let ActivateArgs { activation, gated, x, out } = args;
        self.cpu.activate(ActivateArgs { activation, gated, x, out });
        self.spoil("activate", out);
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) {
        self.cpu.gather_rows(x, rows, out);
        self.spoil("gather_rows", out);
    }

    fn download(&self, x: &Tensor, out: &mut Vec<f32>) {
        self.cpu.download(x, out);
        if self.op == "transfer"
            && let Some(last) = out.last_mut()
        {
            *last = self.spoilt(*last);
        }
    }

    fn upload(&self, values: &[f32], out: &mut Tensor) {
        self.cpu.upload(values, out);
    }
}
