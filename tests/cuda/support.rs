//! The device that the tests run on.

use std::ops::RangeInclusive;
use std::sync::Once;

use tinyserve_cuda_emulator::{Driver, Emulator, asked_for, install};
use tinyserve_kernels::Cuda;

/// Says which seeds the emulator runs.
const SEEDS_VARIABLE: &str = "TINYSERVE_TEST_CUDA_SEEDS";

/// The backend, and the emulator if it runs on one; `None`, with the reason on stderr, where there
/// is neither a GPU nor a C++ compiler.
pub(crate) fn cuda() -> Option<(Cuda, Option<&'static Emulator>)> {
    static TOLD: Once = Once::new();
    let driver = asked_for();
    let emulator = match driver {
        Driver::Real => None,
        Driver::Emulator(build) => match install(build) {
            Ok(emulator) => Some(emulator),
            Err(reason) => {
                TOLD.call_once(|| eprintln!("skipped: {reason}"));
                return None;
            }
        },
    };
    TOLD.call_once(|| eprintln!("CUDA tests run on {driver}"));
    let cuda = Cuda::new(0).unwrap_or_else(|error| panic!("{driver}: {error}"));
    Some((cuda, emulator))
}

/// Orders of threads to run: the fixed one and a random one unless the environment says more.
pub(crate) fn seeds() -> RangeInclusive<u64> {
    let Ok(text) = std::env::var(SEEDS_VARIABLE) else { return 0..=1 };
    let range = text
        .split_once('-')
        .and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?));
    range.unwrap_or_else(|| panic!("{SEEDS_VARIABLE} is {text:?}, expected two numbers as in 0-7"))
}
