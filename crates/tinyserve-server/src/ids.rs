//! Names that nobody else has.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// 32 hexadecimal digits, different at each call and in each process. They name things and keep
/// no secret.
pub(crate) fn random() -> String {
    static KEYS: OnceLock<[RandomState; 2]> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let keys = KEYS.get_or_init(|| [RandomState::new(), RandomState::new()]);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let [high, low] = [&keys[0], &keys[1]].map(|key| key.hash_one(count));
    format!("{high:016x}{low:016x}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_differ() {
        let names: std::collections::HashSet<String> = (0..1000).map(|_| super::random()).collect();
        assert!(names.len() == 1000 && names.iter().all(|name| name.len() == 32));
    }
}
