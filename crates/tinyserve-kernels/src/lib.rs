#![doc = include_str!("../README.md")]

mod backend;
pub mod conformance;
mod cpu;
mod cuda;
mod error;
mod page_lists;
mod profiled;
mod reference;
mod tensor;
mod top_logits;

pub use backend::{
    ActivateArgs, Activation, AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention,
    Backend, EmbedArgs, Heads, LinearArgs, LinearImage, LinearPart, LinearSize, LinearSpec,
    MassArgs, MatrixLayout, NormArgs, NormKind, ObserveArgs, ProjectActivation, ProjectArgs,
    RotaryAnglesArgs, RotaryArgs, RotateAndAppendArgs, Store, WeightFormat,
};
pub use cpu::{Cpu, CpuLinear, CpuOptions, CpuPath, CpuTensor, CpuVector, SelectionTimes};
pub use cuda::{
    Cuda, CudaDevice, CudaError, CudaLinear, CudaPages, CudaTensor, CudaVector, CudaVersion,
    CudaWorkload, FusedRow, FusedTable, FusedTimes, StepTime, cublas_version, most_fused_bytes,
    overlapping_ptx,
};
pub use error::KernelError;
pub use page_lists::{PageLists, Reuse};
pub use profiled::{Profile, Profiled};
pub use tensor::{DType, HostTensor};
pub use top_logits::{MOST_TOP_LOGITS, TopLogits, TopLogitsArgs, TopRow, log_sum_exp};
