#![doc = include_str!("../README.md")]

mod backend;
mod error;
mod tensor;

pub use backend::{
    ActivateArgs, Activation, AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention,
    Backend, EmbedArgs, Heads, LinearArgs, LinearPart, LinearSpec, MatrixLayout, NormArgs,
    NormKind, RotaryAnglesArgs, RotaryArgs, Store,
};
pub use error::KernelError;
pub use tensor::{DType, HostTensor};
