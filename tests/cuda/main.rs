//! The CUDA backend, on the emulator where there is no GPU.
//!
//! `TINYSERVE_TEST_CUDA` says which driver the tests use (`driver`, `emulator` or `checker`), and
//! `TINYSERVE_TEST_CUDA_SEEDS` which orders of threads the emulator runs (`0-7`).

mod conformance;
mod support;
