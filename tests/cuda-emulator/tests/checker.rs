//! The checker finds what it is there for, and nothing in a kernel that is right.

use std::process::Command;

use tinyserve_cuda_emulator::broken_kernels;

#[test]
fn every_mistake_is_found_and_named() {
    let program = match broken_kernels() {
        Ok(program) => program,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return;
        }
    };
    let output = Command::new(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let expected = [
        ("right", "nothing"),
        ("no_barrier", "read of unset"),
        ("one_barrier_of_two", "race"),
        ("no_syncwarp", "race"),
        ("lost_update", "race"),
        ("past_the_end", "out of bounds"),
        ("unset", "read of unset"),
        ("misaligned", "misaligned"),
        ("divergent", "__syncthreads"),
        ("early_read", "before waiting for the launch that wrote it"),
        ("early_write", "before waiting"),
        ("never_waits", "has not waited"),
    ];
    assert_eq!(text.lines().count(), expected.len(), "{text}");
    for (kernel, finding) in expected {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{kernel}: ")));
        assert!(line.is_some_and(|line| line.contains(finding)), "{kernel}: {finding}\n{text}");
    }
}
