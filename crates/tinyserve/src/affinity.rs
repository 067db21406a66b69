//! Which of the system's processors a thread may run on.

use std::ops::Range;

/// Processors of their own for replicas: threads of one do not push those of another aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pinning {
    /// Numbers of the processors that this process may use.
    processors: Vec<usize>,
    threads: usize,
}

impl Pinning {
    /// Processors for `replicas` replicas of `threads` threads; `None` for a single one, which the
    /// system places better, where there are too few, and where the system does not say.
    pub(crate) fn plan(replicas: usize, threads: usize) -> Option<Self> {
        Self::among(system::allowed()?, replicas, threads)
    }

    fn among(processors: Vec<usize>, replicas: usize, threads: usize) -> Option<Self> {
        let enough = replicas.checked_mul(threads)? <= processors.len();
        (replicas > 1 && enough).then_some(Self { processors, threads })
    }

    /// Keeps the calling thread, and those that it starts, on the processors of a replica. Where
    /// the system refuses, they run where it likes.
    pub(crate) fn pin(&self, replica: usize) {
        system::pin(&self.processors[self.range(replica)]);
    }

    fn range(&self, replica: usize) -> Range<usize> {
        replica * self.threads..(replica + 1) * self.threads
    }
}

#[cfg(target_os = "linux")]
mod system {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    pub(super) fn allowed() -> Option<Vec<usize>> {
        let set = sched_getaffinity(None).ok()?;
        Some((0..CpuSet::MAX_CPU).filter(|&processor| set.is_set(processor)).collect())
    }

    pub(super) fn pin(processors: &[usize]) {
        let mut set = CpuSet::new();
        processors.iter().for_each(|&processor| set.set(processor));
        // A thread that cannot be pinned works as well as one that nobody asked to be.
        let _ = sched_setaffinity(None, &set);
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn allowed() -> Option<Vec<usize>> {
        None
    }

    pub(super) fn pin(_: &[usize]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_share_no_processor() {
        let processors = vec![1, 3, 4, 6, 8];
        let pinning = Pinning::among(processors.clone(), 2, 2).unwrap();
        let of = |replica| &pinning.processors[pinning.range(replica)];
        assert_eq!((of(0), of(1)), (&[1, 3][..], &[4, 6][..]));
        assert_eq!(Pinning::among(processors.clone(), 3, 2), None);
        assert_eq!(Pinning::among(processors, 1, 2), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_pinned_thread_and_what_it_starts_stay_where_they_are() {
        let all = system::allowed().unwrap();
        let Some(pinning) = Pinning::among(all.clone(), 2, 1) else { return };
        let inherited = std::thread::spawn(move || {
            pinning.pin(1);
            std::thread::spawn(|| system::allowed().unwrap()).join().unwrap()
        });
        assert_eq!(inherited.join().unwrap(), all[1..2]);
        assert_eq!(system::allowed().unwrap(), all);
    }
}
