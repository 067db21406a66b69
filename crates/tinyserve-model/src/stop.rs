//! Stop strings, found across token borders while text streams.

/// Lets text through until a stop string appears, holding back what could still become one.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    shown: bool,
    found: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops`; empty strings are ignored.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(),
            held: String::new(),
            shown: false,
            found: None,
        }
    }

    /// The same matcher; `shown` decides whether the stop string belongs to the text.
    #[must_use]
    pub fn showing(mut self, shown: bool) -> Self {
        self.shown = shown;
        self
    }

    /// The stop string that ended the text.
    #[must_use]
    pub fn found(&self) -> Option<&str> {
        self.found.map(|index| self.stops[index].as_str())
    }

    /// Takes new text; returns the text that may be shown and whether a stop string ended it.
    ///
    /// The stop string itself is not shown, unless [`Self::showing`] asks for it.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let stops = self.stops.iter().enumerate();
        let found = stops.filter_map(|(index, stop)| Some((self.held.find(stop)?, index))).min();
        if let Some((start, index)) = found {
            self.found = Some(index);
            self.held.truncate(if self.shown { start + self.stops[index].len() } else { start });
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// The text that was held back and turned out not to be a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(length, _)| length)
        .rev()
        .find(|&length| text.ends_with(&stop[..length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<_> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let mut shown = String::new();
        for piece in pieces {
            let (text, stopped) = matcher.push(piece);
            shown.push_str(&text);
            if stopped {
                return (shown, true);
            }
        }
        (shown + &matcher.finish(), false)
    }

    #[test]
    fn a_stop_is_found_across_pieces_and_not_shown() {
        assert_eq!(run(&["END"], &["one E", "N", "D two"]), ("one ".to_owned(), true));
        assert_eq!(run(&["\n\n"], &["a\n", "b\n", "\nc"]), ("a\nb".to_owned(), true));
        assert_eq!(run(&["b", "ab"], &["xa", "b"]), ("x".to_owned(), true), "the earliest wins");
    }

    #[test]
    fn the_stop_that_was_found_is_told_and_shown_if_asked() {
        let mut matcher =
            StopMatcher::new(&["x".to_owned(), String::new(), "END".to_owned()]).showing(true);
        assert_eq!(matcher.push("one EN"), ("one ".to_owned(), false));
        assert_eq!(
            (matcher.push("D two"), matcher.found()),
            (("END".to_owned(), true), Some("END"))
        );
    }

    #[test]
    fn what_only_looks_like_a_stop_is_shown_in_the_end() {
        assert_eq!(run(&["END"], &["one EN", "x E"]), ("one ENx E".to_owned(), false));
        assert_eq!(run(&[""], &["any"]), ("any".to_owned(), false));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".to_owned(), false));
    }

    #[test]
    fn nothing_is_held_that_cannot_become_a_stop() {
        let mut matcher = StopMatcher::new(&["END".to_owned()]);
        assert_eq!(matcher.push("hello "), ("hello ".to_owned(), false));
        assert_eq!(matcher.push("E"), (String::new(), false));
    }
}
