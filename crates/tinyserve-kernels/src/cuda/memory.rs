//! Device memory, and what is sent to it.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, sys};

use super::device::driver_error;
use super::error::CudaError;
use super::launch::{Arg, Launcher};

/// Bytes of a staging buffer for weights: large enough to hide the call, small enough to pin.
const STAGE_BYTES: usize = 8 << 20;

/// Bytes up to which a buffer grows to the next power of two.
const LARGE_BYTES: usize = 1 << 20;

/// Bytes on a device; given back when dropped, behind the work that is under way.
#[derive(Debug)]
pub(super) struct Buffer {
    slice: CudaSlice<u8>,
    pointer: u64,
    device: Launcher,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.before_freeing(&self.addresses());
    }
}

impl Buffer {
    /// Memory for `bytes` bytes, zeroed.
    pub(super) fn zeroed(device: &Launcher, bytes: usize, what: &str) -> Result<Self, CudaError> {
        // An empty allocation has no address.
        let slice = device.stream.alloc_zeros::<u8>(bytes.max(16));
        let slice = slice.map_err(|error| {
            if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                let free = device.context.mem_get_info().map_or(0, |(free, _)| free);
                CudaError::OutOfMemory { what: what.to_owned(), asked: bytes, free }
            } else {
                driver_error("allocating memory")(error)
            }
        })?;
        let (pointer, _) = slice.device_ptr(&device.stream);
        Ok(Self { slice, pointer, device: device.clone() })
    }

    /// A copy of `values`.
    pub(super) fn of<T: Pod>(
        device: &Launcher,
        values: &[T],
        what: &str,
    ) -> Result<Self, CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut buffer = Self::zeroed(device, bytes.len(), what)?;
        buffer.write(device, 0, bytes)?;
        Ok(buffer)
    }

    fn addresses(&self) -> Range<u64> {
        self.pointer..self.pointer + self.slice.len() as u64
    }

    pub(super) fn bytes(&self) -> usize {
        self.slice.len()
    }

    /// The address of the byte at `offset`.
    pub(super) fn at(&self, offset: usize) -> u64 {
        debug_assert!(offset <= self.bytes(), "offset {offset} of {} bytes", self.bytes());
        self.pointer + offset as u64
    }

    pub(super) fn arg(&self) -> Arg {
        Arg::Pointer(self.pointer)
    }

    /// Writes `bytes` at `offset`.
    pub(super) fn write(
        &mut self,
        device: &Launcher,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), CudaError> {
        device.before_writing(&self.addresses())?;
        let mut to = self.slice.slice_mut(offset..offset + bytes.len());
        device.stream.memcpy_htod(bytes, &mut to).map_err(driver_error("copying to the device"))
    }

    /// Zeroes it.
    pub(super) fn clear(&mut self, device: &Launcher) -> Result<(), CudaError> {
        device.before_writing(&self.addresses())?;
        device.stream.memset_zeros(&mut self.slice).map_err(driver_error("zeroing memory"))
    }

    /// Copies all of `from` to `offset`.
    pub(super) fn copy_from(
        &mut self,
        device: &Launcher,
        offset: usize,
        from: &Self,
    ) -> Result<(), CudaError> {
        device.flush()?;
        let mut to = self.slice.slice_mut(offset..offset + from.bytes());
        let copied = device.stream.memcpy_dtod(&from.slice, &mut to);
        copied.map_err(driver_error("copying on the device"))
    }

    /// Reads bytes from `offset` on, once all work before is done.
    pub(super) fn read(
        &self,
        device: &Launcher,
        offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), CudaError> {
        device.flush()?;
        let from = self.slice.slice(offset..offset + bytes.len());
        let copied = device.stream.memcpy_dtoh(&from, bytes);
        copied.map_err(driver_error("copying from the device"))?;
        device.stream.synchronize().map_err(driver_error("waiting for the device"))
    }
}

impl Buffer {
    /// Writes pinned `bytes` at its start, once `stream` comes to it.
    pub(super) fn write_on(
        &mut self,
        stream: &Arc<CudaStream>,
        bytes: &[u8],
    ) -> Result<(), CudaError> {
        let mut to = self.slice.slice_mut(..bytes.len());
        stream.memcpy_htod(bytes, &mut to).map_err(driver_error("copying to the device"))
    }

    /// Reads pinned `bytes` from its start, once `stream` comes to it.
    pub(super) fn read_on(
        &self,
        stream: &Arc<CudaStream>,
        bytes: &mut [u8],
    ) -> Result<(), CudaError> {
        let from = self.slice.slice(..bytes.len());
        stream.memcpy_dtoh(&from, bytes).map_err(driver_error("copying from the device"))
    }
}

/// A buffer that grows, and keeps what was sent last: what has not changed is not sent again.
#[derive(Debug, Default)]
pub(super) struct Upload {
    host: Vec<u8>,
    device: Option<Buffer>,
}

impl Upload {
    /// What was sent last.
    pub(super) fn sent<T: Pod>(&self) -> Vec<T> {
        let values = self.host.chunks_exact(size_of::<T>());
        values.map(bytemuck::pod_read_unaligned).collect()
    }

    /// The address of a copy of `values`.
    pub(super) fn send<T: Pod>(
        &mut self,
        device: &Launcher,
        values: &[T],
    ) -> Result<Arg, CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if let Some(buffer) = &self.device
            && self.host == bytes
        {
            return Ok(buffer.arg());
        }
        let buffer = grown(&mut self.device, device, bytes.len(), "a step's indices")?;
        self.host.clear();
        buffer.write(device, 0, bytes)?;
        self.host.extend_from_slice(bytes);
        Ok(buffer.arg())
    }
}

/// `buffer`, made larger if it does not hold `bytes` bytes; what was in it is then lost.
pub(super) fn grown<'a>(
    buffer: &'a mut Option<Buffer>,
    device: &Launcher,
    bytes: usize,
    what: &str,
) -> Result<&'a mut Buffer, CudaError> {
    if buffer.as_ref().is_none_or(|buffer| buffer.bytes() < bytes) {
        // The old one first: there may be no room for both.
        *buffer = None;
    }
    match buffer {
        Some(buffer) => Ok(buffer),
        empty => Ok(empty.insert(Buffer::zeroed(device, room(bytes), what)?)),
    }
}

/// Bytes of a buffer that is to hold `bytes`: more than that, so that a slightly larger step, or
/// one that comes again, finds it where it is.
pub(super) fn room(bytes: usize) -> usize {
    let power = bytes.next_power_of_two();
    // Of large ones, at most a quarter is room to grow.
    if bytes <= LARGE_BYTES { power } else { bytes.next_multiple_of(power / 8) }
}

/// Two pinned buffers that take turns, so that reading a file and copying to the device overlap.
#[derive(Debug, Default)]
pub(super) struct Staging {
    buffers: Vec<Stage>,
    next: usize,
}

#[derive(Debug)]
struct Stage {
    pinned: PinnedHostSlice<u8>,
    copied: Option<cudarc::driver::CudaEvent>,
}

impl Staging {
    /// Copies `bytes`, a file's, into a buffer of their own.
    pub(super) fn upload(
        &mut self,
        device: &Launcher,
        bytes: &[u8],
        what: &str,
    ) -> Result<Buffer, CudaError> {
        let mut buffer = Buffer::zeroed(device, bytes.len(), what)?;
        if self.buffers.is_empty() {
            for _ in 0..2 {
                let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
                // SAFETY: a byte of a staging buffer is written before it is read.
                let pinned = unsafe { device.context.alloc_pinned_with_flags(STAGE_BYTES, flags) };
                let pinned = pinned.map_err(driver_error("pinning memory"))?;
                self.buffers.push(Stage { pinned, copied: None });
            }
        }
        for (i, piece) in bytes.chunks(STAGE_BYTES).enumerate() {
            let stage = &mut self.buffers[self.next];
            self.next = 1 - self.next;
            if let Some(copied) = stage.copied.take() {
                copied.synchronize().map_err(driver_error("waiting for a copy"))?;
            }
            let pinned = stage.pinned.as_mut_slice().map_err(driver_error("pinning memory"))?;
            pinned[..piece.len()].copy_from_slice(piece);
            buffer.write(device, i * STAGE_BYTES, &pinned[..piece.len()])?;
            let event = device.stream.record_event(None);
            stage.copied = Some(event.map_err(driver_error("recording an event"))?);
        }
        Ok(buffer)
    }
}
