//! What the system says about memory, where it says it in files.

use std::fs;

/// Bytes that this process has resident.
#[must_use]
pub fn resident() -> Option<u64> {
    field("/proc/self/status", "VmRSS:")
}

/// Bytes of code that runs for the first time in a step, and of what the allocator keeps.
const STILL_TO_COME: u64 = 1 << 20;

/// Bytes that this process takes beside what its memory plan counts one by one: those that it has
/// before weights and cache are made, and some for code that has not run yet.
#[must_use]
pub fn process() -> u64 {
    resident().unwrap_or(0) + STILL_TO_COME
}

/// Most bytes that this process ever had resident.
#[must_use]
pub fn peak_resident() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// Bytes of the machine.
#[must_use]
pub fn total() -> Option<u64> {
    field("/proc/meminfo", "MemTotal:")
}

/// Bytes that new work can have.
#[must_use]
pub fn available() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

/// A line such as `MemTotal:  16384 kB`.
fn field(file: &str, name: &str) -> Option<u64> {
    kib(&fs::read_to_string(file).ok()?, name)
}

fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        assert_eq!(kib("A: 1 kB\nVmHWM:\t   20 kB\n", "VmHWM:"), Some(20 * 1024));
        assert_eq!(kib("A: 1 kB\n", "VmHWM:"), None);
        assert_eq!(kib("VmHWM: x kB\n", "VmHWM:"), None);
    }
}
