//! Stop strings across token boundaries, holding back only what may yet become one.
//!
//! It must not know tokens. The rule, which does not depend on how the text is cut into pushes: reading the text byte by
//! byte, the first stop string to be **complete** ends it; of several that are complete at the same byte, the longest
//! (which begins earliest) counts. vLLM and OpenAI likewise stop as soon as a stop string is complete, and leave it
//! out of the text unless asked to include it.
//!
//! Each byte costs one amortised step per stop string (Knuth, Morris and Pratt 1977), however long the strings are.

/// Finds stop strings across token boundaries; holds back only what may yet become one.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    include_in_output: bool,
    /// The end of the text so far that is the beginning of a stop string: whole characters, shorter than the longest.
    held: String,
    has_stopped: bool,
}

/// What a push made of the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopScan {
    /// Safe to send now.
    pub text: String,
    /// The stop string found, if any (text then ends before it, or with it when included).
    pub stopped: Option<String>,
}

#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    /// `borders[i]`: length of the longest proper prefix of `text[..=i]` that is also its suffix.
    borders: Vec<usize>,
    /// Bytes of `text` that the end of the input matches.
    num_matched: usize,
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut borders = vec![0; bytes.len()];
        let mut length = 0;
        for index in 1..bytes.len() {
            while length > 0 && bytes[index] != bytes[length] {
                length = borders[length - 1];
            }
            length += usize::from(bytes[index] == bytes[length]);
            borders[index] = length;
        }
        Self { text, borders, num_matched: 0 }
    }

    /// Takes one byte; true if the pattern is complete with it.
    fn advance(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.num_matched > 0 && bytes[self.num_matched] != byte {
            self.num_matched = self.borders[self.num_matched - 1];
        }
        self.num_matched += usize::from(bytes[self.num_matched] == byte);
        self.num_matched == bytes.len()
    }
}

impl StopMatcher {
    /// Empty strings are ignored: they would stop every text before its beginning.
    pub fn new(stop: Vec<String>, include_in_output: bool) -> Self {
        let patterns = stop.into_iter().filter(|text| !text.is_empty()).map(Pattern::new).collect();
        Self { patterns, include_in_output, held: String::new(), has_stopped: false }
    }

    /// Takes the next piece of text. After a stop string was found, all further text is dropped.
    pub fn push(&mut self, text: &str) -> StopScan {
        if self.has_stopped {
            return StopScan::default();
        }
        let num_held = self.held.len();
        for (index, &byte) in text.as_bytes().iter().enumerate() {
            let mut longest: Option<&Pattern> = None;
            for pattern in &mut self.patterns {
                if pattern.advance(byte) && longest.is_none_or(|longest| longest.text.len() < pattern.text.len()) {
                    longest = Some(pattern);
                }
            }
            let Some(stopped) = longest.map(|pattern| pattern.text.clone()) else { continue };
            let end = num_held + index + 1;
            let mut sendable = std::mem::take(&mut self.held);
            sendable.push_str(text);
            sendable.truncate(if self.include_in_output { end } else { end - stopped.len() });
            self.has_stopped = true;
            return StopScan { text: sendable, stopped: Some(stopped) };
        }
        let num_kept = self.patterns.iter().map(|pattern| pattern.num_matched).max().unwrap_or(0);
        self.held.push_str(text);
        let kept = self.held.split_off(self.held.len() - num_kept);
        StopScan { text: std::mem::replace(&mut self.held, kept), stopped: None }
    }

    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The rule as it reads: the first end of any stop string, and there the longest.
    fn naive(text: &str, stop: &[String], include: bool) -> (String, Option<String>) {
        let mut best: Option<(usize, &String)> = None;
        for pattern in stop.iter().filter(|pattern| !pattern.is_empty()) {
            if let Some(start) = text.find(pattern.as_str()) {
                let end = start + pattern.len();
                if best.is_none_or(|(other, longest)| end < other || (end == other && pattern.len() > longest.len())) {
                    best = Some((end, pattern));
                }
            }
        }
        match best {
            Some((end, pattern)) => {
                let cut = if include { end } else { end - pattern.len() };
                (text[..cut].to_owned(), Some(pattern.clone()))
            }
            None => (text.to_owned(), None),
        }
    }

    fn longest_open_beginning(text: &str, stop: &[String]) -> usize {
        let is_open = |pattern: &String, n: usize| text.as_bytes().ends_with(&pattern.as_bytes()[..n]);
        let longest = |pattern: &String| (1..pattern.len()).filter(|&n| is_open(pattern, n)).max();
        stop.iter().filter_map(longest).max().unwrap_or(0)
    }

    fn pieces() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[abé\u{1f600}]{0,4}", 0..30)
    }

    fn stops() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[abé\u{1f600}]{0,6}", 0..5)
    }

    proptest! {
        #[test]
        fn any_cut_of_a_text_gives_what_the_naive_search_gives(pieces in pieces(), stop in stops(), include: bool) {
            let mut matcher = StopMatcher::new(stop.clone(), include);
            let mut text = String::new();
            let mut stopped = None;
            for piece in &pieces {
                let scan = matcher.push(piece);
                text.push_str(&scan.text);
                stopped = stopped.or(scan.stopped);
            }
            text.push_str(&matcher.finish());
            prop_assert_eq!((text, stopped), naive(&pieces.concat(), &stop, include));
        }

        #[test]
        fn exactly_what_may_become_a_stop_string_is_held_back(pieces in pieces(), stop in stops()) {
            let mut matcher = StopMatcher::new(stop.clone(), false);
            let mut sent = String::new();
            let mut seen = String::new();
            for piece in &pieces {
                seen.push_str(piece);
                let scan = matcher.push(piece);
                if scan.stopped.is_some() {
                    break;
                }
                sent.push_str(&scan.text);
                prop_assert_eq!(seen.len() - sent.len(), longest_open_beginning(&seen, &stop));
            }
        }
    }

    fn check(stop: &[&str], include: bool, pieces: &[&str], expected: &[(&str, Option<&str>)]) {
        let mut matcher = StopMatcher::new(stop.iter().map(|&text| text.to_owned()).collect(), include);
        let scans: Vec<StopScan> = pieces.iter().map(|piece| matcher.push(piece)).collect();
        let expected: Vec<StopScan> = (expected.iter())
            .map(|(text, stopped)| StopScan { text: (*text).to_owned(), stopped: stopped.map(str::to_owned) })
            .collect();
        assert_eq!(scans, expected);
    }

    #[test]
    fn the_first_complete_stop_string_wins_and_of_several_the_longest() {
        check(&["abcd", "bc"], false, &["xab", "cd"], &[("x", None), ("a", Some("bc"))]);
        check(&["c", "abc", "bc"], false, &["xabc"], &[("x", Some("abc"))]);
        check(&["c", "abc"], true, &["xab", "cd"], &[("x", None), ("abc", Some("abc"))]);
    }

    #[test]
    fn nothing_comes_after_a_stop_string() {
        check(&["\n\n"], false, &["a\n", "\nb", "c"], &[("a", None), ("", Some("\n\n")), ("", None)]);
    }

    #[test]
    fn a_beginning_that_came_to_nothing_is_sent_at_the_end() {
        let mut matcher = StopMatcher::new(vec!["###".into()], false);
        assert_eq!(matcher.push("a##").text, "a");
        assert_eq!(matcher.finish(), "##");
    }

    /// The beginning of a long stop string goes on matching: what is held back must not be searched again at each push.
    #[test]
    fn near_misses_of_a_long_stop_string_cost_one_pass() {
        let mut matcher = StopMatcher::new(vec![format!("{}b", "a".repeat(100_000))], false);
        let mut num_sent = 0;
        for _ in 0..2_000 {
            num_sent += matcher.push(&"a".repeat(1_000)).text.len();
        }
        assert_eq!(num_sent, 2_000_000 - 100_000);
        assert_eq!(matcher.finish().len(), 100_000);
    }
}
