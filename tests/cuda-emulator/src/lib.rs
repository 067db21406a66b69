//! Runs the CUDA kernels on the CPU, so that a machine without a GPU can test them.
//!
//! The sources of `kernels/` are compiled as C++ against `cpp/cuda_emulator.h`, where each CUDA
//! thread is a fiber, and linked with a look-alike of `libcuda`. [`install`] makes a process see it
//! as its driver: what runs on it is the real backend, through the real bindings. It knows the
//! kernels' names from the committed PTX, and nothing else of the crates that it tests.
//!
//! Nothing is compiled before it is needed: building the workspace takes no C++ compiler.

mod build;
mod parts;

use std::ffi::{CStr, c_char};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Once, OnceLock};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};

pub use build::Unavailable;

/// How the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Build {
    /// Optimised: results, and orders of threads that a seed decides.
    Plain,
    /// Watched: races, accesses out of bounds and reads of unset shared memory end a launch with
    /// the source lines of both sides. About ten times as slow.
    Checker,
}

impl Build {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Checker => "checker",
        }
    }
}

/// The driver that a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// CUDA's own, with a GPU.
    Real,
    /// The emulator.
    Emulator(Build),
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Real => f.write_str("CUDA's driver"),
            Self::Emulator(build) => write!(f, "the emulator, {} build", build.name()),
        }
    }
}

/// Says which driver a test is to use.
const DRIVER_VARIABLE: &str = "TINYSERVE_TEST_CUDA";

/// The driver that `TINYSERVE_TEST_CUDA` asks for (`driver`, `emulator` or `checker`); unless it
/// is set, CUDA's own where there is a GPU, and the emulator elsewhere.
///
/// # Panics
/// When the variable says something else.
#[must_use]
pub fn asked_for() -> Driver {
    match std::env::var(DRIVER_VARIABLE).as_deref() {
        Ok("driver") => Driver::Real,
        Ok("emulator") => Driver::Emulator(Build::Plain),
        Ok("checker") => Driver::Emulator(Build::Checker),
        Ok(other) => {
            panic!("{DRIVER_VARIABLE} is {other:?}, expected driver, emulator or checker")
        }
        // Asking the library would load it, and the emulator could not take its name any more.
        Err(_) if Path::new("/dev/nvidiactl").exists() => Driver::Real,
        Err(_) => Driver::Emulator(Build::Plain),
    }
}

/// The folder that holds the emulator as `libcuda.so`, compiled if it is not there yet: for the
/// library path of another process.
///
/// # Errors
/// When there is no C++ compiler.
///
/// # Panics
/// When the compiler refuses a source.
pub fn folder(build: Build) -> Result<PathBuf, Unavailable> {
    build::folder(build)
}

/// The emulator in this process.
#[derive(Debug)]
pub struct Emulator {
    seed: Symbol<unsafe extern "C" fn(u64)>,
    fail: Symbol<unsafe extern "C" fn(*const c_char)>,
    waits: Symbol<unsafe extern "C" fn() -> u64>,
    idle: Symbol<unsafe extern "C" fn() -> *const c_char>,
    peak: Symbol<unsafe extern "C" fn() -> u64>,
    leave: Symbol<unsafe extern "C" fn(u64)>,
    invalidate: Symbol<unsafe extern "C" fn(u64) -> u64>,
    /// Loaded as long as the process: the bindings' own search for libcuda.so is answered by it.
    _library: Library,
}

impl Emulator {
    /// Decides the order of threads and blocks from now on; 0 is a fixed one.
    pub fn seed(&self, seed: u64) {
        // SAFETY: the function stores a number; the library is never unloaded.
        unsafe { (self.seed)(seed) };
    }

    /// Has launches of `kernel` fail from now on; of none when it is empty.
    pub fn fail(&self, kernel: &CStr) {
        // SAFETY: the function copies the name; the library is never unloaded.
        unsafe { (self.fail)(kernel.as_ptr()) };
    }

    /// Times that the host has waited so far, for work that had not run.
    #[must_use]
    pub fn waits(&self) -> u64 {
        // SAFETY: the function reads a number; the library is never unloaded.
        unsafe { (self.waits)() }
    }

    /// Bytes of the device's memory that were in use at most since it was last asked.
    #[must_use]
    pub fn peak(&self) -> u64 {
        // SAFETY: the function reads and sets a number; the library is never unloaded.
        unsafe { (self.peak)() }
    }

    /// Has somebody else take the device's memory but for so many bytes; `None` gives it back.
    pub fn leave_free(&self, bytes: Option<u64>) {
        // SAFETY: the function stores a number; the library is never unloaded.
        unsafe { (self.leave)(bytes.unwrap_or(0)) };
    }

    /// Has the next `captures` captures of graphs be invalidated, as another thread's call may do it;
    /// how many were invalidated so far.
    pub fn invalidate(&self, captures: u64) -> u64 {
        // SAFETY: the function reads and sets a number; the library is never unloaded.
        unsafe { (self.invalidate)(captures) }
    }

    /// Kernels that were not launched so far, in the order of the alphabet.
    #[must_use]
    pub fn idle_kernels(&self) -> Vec<String> {
        // SAFETY: the function fills a string of its own; the library is never unloaded.
        let names = unsafe { CStr::from_ptr((self.idle)()) }.to_string_lossy().into_owned();
        let mut names: Vec<String> = names.split_whitespace().map(str::to_owned).collect();
        names.sort();
        names
    }
}

/// Makes this process see the emulator as its CUDA driver.
///
/// Call it before the first look for a driver. Only the first call in a process decides about the
/// build.
///
/// # Errors
/// When there is no C++ compiler.
///
/// # Panics
/// When the emulator cannot be compiled or loaded.
pub fn install(build: Build) -> Result<&'static Emulator, &'static Unavailable> {
    static INSTALLED: OnceLock<Result<Emulator, Unavailable>> = OnceLock::new();
    INSTALLED.get_or_init(|| load(build)).as_ref()
}

/// The look-alike of cuBLAS in this process.
#[derive(Debug)]
pub struct Cublas {
    products: Symbol<unsafe extern "C" fn() -> u64>,
    _library: Library,
}

impl Cublas {
    /// Products that it has computed.
    #[must_use]
    pub fn products(&self) -> u64 {
        // SAFETY: the function reads a number; the library is never unloaded.
        unsafe { (self.products)() }
    }
}

/// Makes this process find a cuBLAS that multiplies what lies in the emulator's memory.
///
/// # Errors
/// When there is no C++ compiler.
///
/// # Panics
/// When it cannot be loaded.
pub fn install_cublas() -> Result<&'static Cublas, &'static Unavailable> {
    static INSTALLED: OnceLock<Result<Cublas, Unavailable>> = OnceLock::new();
    let load = || {
        let path = cublas_folder(Build::Plain)?.join("libcublas.so");
        // SAFETY: the library is ours, and has no constructors.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
        let library = library.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // SAFETY: the name and the type are those of cpp/cublas.cpp.
        let products = unsafe { library.get(b"cublas_emulator_products\0") };
        let products = products.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Ok(Cublas { products, _library: library })
    };
    INSTALLED.get_or_init(load).as_ref()
}

/// The folder that holds the look-alike of cuBLAS, for the library path of another process.
///
/// # Errors
/// When there is no C++ compiler.
pub fn cublas_folder(build: Build) -> Result<PathBuf, Unavailable> {
    Ok(folder(build)?.join(build::CUBLAS))
}

/// The program that runs kernels with one mistake each, and says what the checker finds in them.
///
/// # Errors
/// When there is no C++ compiler.
pub fn broken_kernels() -> Result<PathBuf, Unavailable> {
    build::broken()
}

/// Says which orders of threads the emulator runs.
const SEEDS_VARIABLE: &str = "TINYSERVE_TEST_CUDA_SEEDS";

/// What a test runs on.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// The emulator, if it is one.
    pub emulator: Option<&'static Emulator>,
}

impl Ready {
    /// Calls `test` once for each order of threads: those that `TINYSERVE_TEST_CUDA_SEEDS` names
    /// (as `0-7`), unless it is set the fixed one and a random one; on a GPU, which has an order of
    /// its own, once.
    ///
    /// # Panics
    /// When the variable says something else.
    pub fn orders(&self, mut test: impl FnMut(u64)) {
        let Some(emulator) = self.emulator else { return test(0) };
        let text = std::env::var(SEEDS_VARIABLE).unwrap_or_else(|_| "0-1".to_owned());
        let range = text
            .split_once('-')
            .and_then(|(first, last)| Some(first.parse::<u64>().ok()?..=last.parse().ok()?));
        let expected = "expected two numbers as in 0-7";
        for seed in range.unwrap_or_else(|| panic!("{SEEDS_VARIABLE} is {text:?}, {expected}")) {
            emulator.seed(seed);
            test(seed);
        }
        emulator.seed(0);
    }
}

/// Makes a CUDA device available to this process, and says on stderr which driver it has; `None`,
/// with the reason on stderr, where there is neither a GPU nor a C++ compiler.
#[must_use]
pub fn ready() -> Option<Ready> {
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
    Some(Ready { emulator })
}

fn load(build: Build) -> Result<Emulator, Unavailable> {
    let path = folder(build)?.join("libcuda.so");
    // SAFETY: the library is ours; loading it runs constructors that fill a list of kernels.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
    let library = library.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    // SAFETY: the names and the types are those of cpp/driver.cpp.
    let functions = unsafe {
        (
            library.get(b"cuda_emulator_seed\0"),
            library.get(b"cuda_emulator_fail\0"),
            library.get(b"cuda_emulator_waits\0"),
            library.get(b"cuda_emulator_idle\0"),
            library.get(b"cuda_emulator_peak\0"),
            library.get(b"cuda_emulator_leave\0"),
            library.get(b"cuda_emulator_invalidate\0"),
        )
    };
    let (Ok(seed), Ok(fail), Ok(waits), Ok(idle), Ok(peak), Ok(leave), Ok(invalidate)) = functions
    else {
        panic!("{}: a function of cpp/driver.cpp is missing", path.display());
    };
    Ok(Emulator { seed, fail, waits, idle, peak, leave, invalidate, _library: library })
}
