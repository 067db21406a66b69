//! Stored `[in, out]` matrices turned to `[out, in]` while they are loaded.
//!
//! A product with one row needs a sum over all inputs for each output. Over `[in, out]` weights it
//! reads several places of memory at once, which takes twice the time of one stream.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::Cpu;
use super::memory::zeroed;
use crate::{HostTensor, KernelError};

/// Outputs that one thread turns at a time.
const OUTPUTS: usize = 64;
/// Inputs of a square that stays in the first-level cache while it is turned.
const INPUTS: usize = 64;

/// `[out, in]` for `[in, out]`, in the same element type, on the threads of `cpu`.
pub(super) fn turned(cpu: &Cpu, weight: &HostTensor) -> Result<HostTensor, KernelError> {
    let &[inputs, outputs] = weight.shape() else {
        panic!("a matrix has two dimensions, found {:?}", weight.shape());
    };
    let mut memory = zeroed(weight.bytes().len())?;
    match weight.dtype().size() {
        4 => turn::<u32>(cpu, weight.bytes(), (inputs, outputs), &mut memory),
        _ => turn::<u16>(cpu, weight.bytes(), (inputs, outputs), &mut memory),
    }
    HostTensor::new(weight.name(), Bytes::from_owner(memory), weight.dtype(), &[outputs, inputs])
}

fn turn<T: bytemuck::Pod + Send + Sync>(
    cpu: &Cpu,
    from: &[u8],
    (inputs, outputs): (usize, usize),
    to: &mut [u8],
) {
    let from: &[T] = bytemuck::cast_slice(from);
    let to: &mut [T] = &mut bytemuck::cast_slice_mut(to)[..inputs * outputs];
    let strips: Vec<_> = to.chunks_mut(OUTPUTS * inputs).map(Mutex::new).collect();
    cpu.pool.run(strips.len(), &|_, strip| {
        // Never waited for: each strip is taken once.
        let to = &mut **strips[strip].lock().unwrap_or_else(PoisonError::into_inner);
        let first = strip * OUTPUTS;
        for start in (0..inputs).step_by(INPUTS) {
            let end = (start + INPUTS).min(inputs);
            for (output, to) in (first..).zip(to.chunks_exact_mut(inputs)) {
                for (input, to) in (start..end).zip(&mut to[start..end]) {
                    *to = from[input * outputs + output];
                }
            }
        }
    });
}
