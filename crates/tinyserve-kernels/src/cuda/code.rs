//! The embedded PTX, and the kernels in it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use super::device::{CudaDevice, message};
use super::error::CudaError;
use super::graph::undisturbed;

macro_rules! modules {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../ptx/", $name, ".ptx")))),*]
    };
}

/// What `cargo xtask build-kernels` made of `kernels/`.
const MODULES: &[(&str, &str)] = modules!(
    "activate",
    "append_kv",
    "attend_bf16",
    "attend_f16",
    "attend_f32",
    "attend_int4",
    "attend_int8",
    "combine",
    "copy_page",
    "embed",
    "fused_decode_bf16",
    "fused_decode_f16",
    "fused_decode_f32",
    "fused_decode_int4",
    "fused_decode_int8",
    "gather_pages",
    "gemm",
    "gemv",
    "gemv_quantised",
    "move_tokens",
    "norm",
    "observe",
    "pack_pages",
    "project_bf16",
    "project_f16",
    "project_f32",
    "rotary",
    "rows",
    "score_moments",
    "score_pages",
    "seal_pages",
    "select_pages",
    "split_rows",
    "top_logits",
);

/// Comments in the PTX, as `kernels/ts_cuda.cuh` leaves them, and the instructions that they stand
/// for. Kernels that have the second one may begin while the launch before still runs.
const LET_NEXT_BEGIN: (&str, &str) = ("// ts: let next begin", "griddepcontrol.launch_dependents;");
const WAIT_FOR_LAUNCHES: (&str, &str) = ("// ts: wait for launches", "griddepcontrol.wait;");
/// What our PTX is for, and what those instructions are for.
const TARGET: (&str, &str) = ("\n.target sm_80\n", "\n.target sm_90\n");

/// The kernels of a device that were asked for so far.
#[derive(Debug)]
pub(super) struct Code {
    context: Arc<CudaContext>,
    overlaps: bool,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    kernels: HashMap<&'static str, Kernel>,
}

/// A kernel that can be launched.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    pub(super) function: CudaFunction,
    /// Whether it may begin while the launch before still runs: it waits for it itself.
    pub(super) overlaps: bool,
}

impl Code {
    pub(super) fn new(context: Arc<CudaContext>, device: &CudaDevice) -> Self {
        Self { context, overlaps: device.overlaps_launches(), loaded: Mutex::default() }
    }

    /// A kernel by its name; its module is loaded, and compiled for the device, when first used.
    pub(super) fn kernel(&self, name: &'static str) -> Result<Kernel, CudaError> {
        let loaded = || self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded().kernels.get(name) {
            return Ok(kernel.clone());
        }
        let _guard = undisturbed();
        let mut loaded = loaded();
        let Loaded { modules, kernels } = &mut *loaded;
        let failed = |message| CudaError::Driver {
            what: "loading a kernel",
            message: format!("{name}: {message}"),
        };
        let found =
            MODULES.iter().find_map(|(module, ptx)| Some((*module, ptx, entry(ptx, name)?)));
        let Some((module, ptx, entry)) = found else {
            return Err(failed("no such kernel in this binary".to_owned()));
        };
        let module = match modules.get(module) {
            Some(module) => module.clone(),
            None => {
                let ptx = if self.overlaps { overlapping_ptx(ptx) } else { (*ptx).to_owned() };
                let fresh = self.context.load_module(Ptx::from_src(ptx));
                let fresh = fresh.map_err(|error| failed(message(error)))?;
                modules.insert(module, fresh.clone());
                fresh
            }
        };
        let function = module.load_function(name).map_err(|error| failed(message(error)))?;
        let overlaps = self.overlaps && entry.contains(WAIT_FOR_LAUNCHES.0);
        let kernel = Kernel { function, overlaps };
        kernels.insert(name, kernel.clone());
        Ok(kernel)
    }

    /// Unloads everything, which waits for what runs.
    pub(super) fn clear(&mut self) {
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        loaded.kernels.clear();
        loaded.modules.clear();
    }
}

/// Embedded PTX as devices load it whose launches overlap ([`CudaDevice::overlaps_launches`]): for
/// compute capability 9.0, with instructions in the places of our comments. What assembles the PTX
/// without a device, to see what its kernels take, assembles this.
#[must_use]
pub fn overlapping_ptx(ptx: &str) -> String {
    let instructions = [LET_NEXT_BEGIN, WAIT_FOR_LAUNCHES, TARGET];
    instructions.into_iter().fold(ptx.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// What the kernel `name` consists of, if it is in this PTX.
fn entry<'a>(ptx: &'a str, name: &str) -> Option<&'a str> {
    let rest = &ptx[ptx.find(&format!(".entry {name}("))?..];
    let end = rest[1..].find(".entry ").map_or(rest.len(), |at| at + 1);
    Some(&rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_is_embedded_and_every_kernel_is_in_one() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/ptx");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let names: Vec<String> = MODULES.iter().map(|(name, _)| format!("{name}.ptx")).collect();
        assert_eq!(files, names);
        let mut entries: Vec<&str> = MODULES
            .iter()
            .flat_map(|(_, ptx)| ptx.split(".entry ").skip(1))
            .filter_map(|rest| rest.split('(').next())
            .collect();
        let all = entries.len();
        entries.sort_unstable();
        entries.dedup();
        assert_eq!(entries.len(), all, "two kernels have one name");
    }

    #[test]
    fn launches_overlap_only_of_kernels_that_wait() {
        let text = |name: &str| MODULES.iter().find(|(module, _)| *module == name).unwrap().1;
        let gemv = overlapping_ptx(text("gemv"));
        assert!(gemv.contains(TARGET.1) && !gemv.contains(TARGET.0));
        for (comment, instruction) in [LET_NEXT_BEGIN, WAIT_FOR_LAUNCHES] {
            assert!(gemv.contains(instruction) && !gemv.contains(comment));
        }
        let waits = |module, name| entry(text(module), name).unwrap().contains(WAIT_FOR_LAUNCHES.0);
        assert!(waits("rows", "gather_rows") && !waits("rows", "transpose_16"));
        for (module, ptx) in MODULES {
            for name in ptx.split(".entry ").skip(1).filter_map(|rest| rest.split('(').next()) {
                let entry = entry(ptx, name).unwrap();
                let (lets, waits) = (LET_NEXT_BEGIN.0, WAIT_FOR_LAUNCHES.0);
                assert!(entry.contains(waits) || !entry.contains(lets), "{module}: {name}");
            }
        }
    }
}
