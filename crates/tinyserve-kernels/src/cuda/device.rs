//! Finding devices, in the only order in which the bindings do not panic.

use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::error::{CudaError, CudaVersion};

/// The oldest driver that loads our PTX.
const OLDEST_DRIVER: CudaVersion = CudaVersion { major: 12, minor: 0 };
/// The oldest compute capability that our PTX is for.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);
/// The oldest driver whose graphs hold launches that overlap, and the oldest capability that has
/// them.
const OVERLAPS_FROM: (CudaVersion, (i32, i32)) = (CudaVersion { major: 12, minor: 3 }, (9, 0));

/// A GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct CudaDevice {
    /// Its number, as in `cuda:0`.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of memory.
    pub memory: usize,
    /// Bytes of memory that are free.
    pub free: usize,
    /// Newest CUDA version that the driver knows.
    pub driver: CudaVersion,
    /// Why it cannot be used, if it cannot.
    pub unusable: Option<CudaError>,
}

impl CudaDevice {
    /// Every GPU of this machine.
    ///
    /// # Errors
    /// When there is no driver, no GPU, or the driver is too old.
    pub fn all() -> Result<Vec<Self>, CudaError> {
        let driver = driver()?;
        (0..count()?).map(|ordinal| Self::describe(ordinal, driver)).collect()
    }

    /// Whether launches of a step overlap on it: each begins while the one before still runs, and
    /// waits for it where it has to (CUDA's programmatic dependent launch).
    #[must_use]
    pub fn overlaps_launches(&self) -> bool {
        let (driver, capability) = OVERLAPS_FROM;
        self.driver >= driver && self.capability >= capability
    }

    fn describe(ordinal: usize, driver: CudaVersion) -> Result<Self, CudaError> {
        let context = CudaContext::new(ordinal).map_err(driver_error("opening a device"))?;
        let capability =
            context.compute_capability().map_err(driver_error("asking for the capability"))?;
        let name = context.name().map_err(driver_error("asking for the name"))?;
        let (free, memory) =
            context.mem_get_info().map_err(driver_error("asking for the memory"))?;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = context.attribute(count).map_err(driver_error("counting multiprocessors"))?;
        let multiprocessors = usize::try_from(count).unwrap_or(1).max(1);
        let unusable = (capability < OLDEST_CAPABILITY).then(|| CudaError::DeviceTooOld {
            ordinal,
            name: name.clone(),
            capability,
        });
        Ok(Self { ordinal, name, capability, multiprocessors, memory, free, driver, unusable })
    }
}

/// Opens a device, if it can be used.
pub(super) fn open(ordinal: usize) -> Result<(Arc<CudaContext>, CudaDevice), CudaError> {
    let driver = driver()?;
    let count = count()?;
    if ordinal >= count {
        return Err(CudaError::NoSuchDevice { asked: ordinal, count });
    }
    let device = CudaDevice::describe(ordinal, driver)?;
    if let Some(error) = device.unusable {
        return Err(error);
    }
    let context = CudaContext::new(ordinal).map_err(driver_error("opening a device"))?;
    Ok((context, device))
}

/// Starts the driver; without its library, every other call of the bindings panics.
fn driver() -> Result<CudaVersion, CudaError> {
    // SAFETY: loading the driver's library runs its constructors; nothing else is called.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(CudaError::NoDevice),
        Err(error) => return Err(driver_error("starting the driver")(error)),
    }
    let mut number = 0;
    // SAFETY: the pointer is to a number of our own.
    let done = unsafe { sys::cuDriverGetVersion(&raw mut number) };
    done.result().map_err(driver_error("asking for the driver's version"))?;
    let have = CudaVersion::from_driver(number);
    if have < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { have, need: OLDEST_DRIVER });
    }
    Ok(have)
}

fn count() -> Result<usize, CudaError> {
    let count = CudaContext::device_count().map_err(driver_error("counting devices"))?;
    match usize::try_from(count) {
        Ok(count @ 1..) => Ok(count),
        _ => Err(CudaError::NoDevice),
    }
}

/// A driver's refusal of `what`, as our error.
pub(super) fn driver_error(what: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::Driver { what, message: message(error) }
}

/// What the driver says, in one line, and what to do where nothing can run any more.
pub(super) fn message(error: DriverError) -> String {
    let said = match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) if name != text => {
            format!("{} ({})", text.to_string_lossy(), name.to_string_lossy())
        }
        (Ok(name), _) => name.to_string_lossy().into_owned(),
        _ => format!("{:?}", error.0),
    };
    if loses_the_device(error.0) {
        format!("{said}; this process cannot use the device any more, start it again")
    } else {
        said
    }
}

/// Whether CUDA answers every later call of the process with the same error, as its manual says.
fn loses_the_device(code: sys::CUresult) -> bool {
    use sys::CUresult as Code;
    matches!(
        code,
        Code::CUDA_ERROR_ECC_UNCORRECTABLE
            | Code::CUDA_ERROR_ILLEGAL_ADDRESS
            | Code::CUDA_ERROR_LAUNCH_TIMEOUT
            | Code::CUDA_ERROR_ASSERT
            | Code::CUDA_ERROR_HARDWARE_STACK_ERROR
            | Code::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | Code::CUDA_ERROR_MISALIGNED_ADDRESS
            | Code::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | Code::CUDA_ERROR_INVALID_PC
            | Code::CUDA_ERROR_LAUNCH_FAILED
    )
}
