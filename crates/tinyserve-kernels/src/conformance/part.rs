//! Which cases of the table are run.

/// One of several parts of the table, as it goes through the cases.
#[derive(Debug)]
pub(super) struct Part {
    number: usize,
    parts: usize,
    /// Cases, or groups of them that share weights, that it was asked about.
    asked: u32,
}

impl Part {
    pub(super) fn new(number: usize, parts: usize) -> Self {
        assert!(number < parts, "part {number} of {parts}, expected one from 0 on");
        Self { number, parts, asked: 0 }
    }

    /// The table starts over: its parts are the same in every run.
    pub(super) fn begin(&mut self) {
        self.asked = 0;
    }

    /// Whether the next case, or group of cases, is in this part.
    pub(super) fn takes_next(&mut self) -> bool {
        // Scattered (by the golden ratio): what every second case has in common is not in one part.
        let scattered = self.asked.wrapping_mul(0x9e37_79b9) >> 16;
        self.asked += 1;
        scattered as usize % self.parts == self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_in_one_part_and_no_part_has_most_of_them() {
        for parts in 1..=9 {
            let mut all: Vec<Part> = (0..parts).map(|number| Part::new(number, parts)).collect();
            let mut taken = vec![0; parts];
            for _ in 0..2 {
                all.iter_mut().for_each(Part::begin);
                for _ in 0..3000 {
                    let takers: Vec<usize> =
                        (0..parts).filter(|&number| all[number].takes_next()).collect();
                    assert_eq!(takers.len(), 1, "{takers:?} of {parts}");
                    taken[takers[0]] += 1;
                }
            }
            let fair = 6000 / parts;
            assert!(taken.iter().all(|&n| n > fair / 2 && n < fair * 2), "{taken:?}");
        }
    }
}
