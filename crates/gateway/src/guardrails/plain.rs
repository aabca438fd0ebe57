//! The plain form in which shapes of personal data are looked for, so that full-width letters, unusual dashes and blanks, digits of
//! other scripts and invisible characters do not hide an address or a number.
//!
//! Every letter is made plain by itself: compatibility forms decomposed (as NFKD does it), accents off, invisible characters gone. Case
//! stays: secrets differ by it. Because no letter's form looks at its neighbours, a text is made plain in whatever pieces it comes,
//! and every byte knows the place of its letter in the original.
//!
//! **Invariant**: a text of plain ASCII is its own plain form.

use unicode_normalization::char::decompose_compatible;

use super::normalise::{MAX_SKIPPED, is_accent, is_invisible};

/// Stands for a flood of invisible characters, so that no match is stretched over it.
const FLOOD: char = '\u{fffd}';

/// A text in its plain form.
#[derive(Debug, Default)]
pub(super) struct Plain {
    pub(super) text: String,
    /// For every byte of the text where its letter begins and ends in the original.
    places: Vec<(usize, usize)>,
}

impl Plain {
    /// `None`: the text is its own plain form.
    pub(super) fn of(text: &str) -> Option<Self> {
        if text.bytes().all(|byte| byte.is_ascii() && (!byte.is_ascii_control() || byte.is_ascii_whitespace())) {
            return None;
        }
        let mut plain = Self::default();
        let mut num_invisible = 0;
        for (start, letter) in text.char_indices() {
            let place = (start, start + letter.len_utf8());
            if letter.is_ascii_whitespace() || letter.is_ascii() && !letter.is_ascii_control() {
                plain.push(letter, place);
            } else if letter.is_whitespace() {
                plain.push(' ', place);
            } else if is_invisible(letter) {
                num_invisible += 1;
                if num_invisible > MAX_SKIPPED {
                    plain.push(FLOOD, place);
                    num_invisible = 0;
                }
                continue;
            } else {
                decompose_compatible(letter, |part| {
                    if !is_accent(part) {
                        plain.push(plain_letter(part), place);
                    }
                });
            }
            num_invisible = 0;
        }
        Some(plain)
    }

    fn push(&mut self, letter: char, place: (usize, usize)) {
        self.text.push(letter);
        self.places.extend(std::iter::repeat_n(place, letter.len_utf8()));
    }

    /// Where what stands in the original from here on begins.
    pub(super) fn at(&self, original: usize) -> usize {
        self.places.partition_point(|(start, _)| *start < original)
    }

    /// The place of a byte in a text of this length; of the end its end.
    pub(super) fn start(&self, at: usize, original_len: usize) -> usize {
        self.places.get(at).map_or(original_len, |(start, _)| *start)
    }

    /// The end of the letter before a byte.
    pub(super) fn end(&self, at: usize) -> usize {
        at.checked_sub(1).and_then(|last| self.places.get(last)).map_or(0, |(_, end)| *end)
    }
}

fn plain_letter(letter: char) -> char {
    match letter {
        // Hyphens, dashes and the minus sign.
        '\u{2010}'..='\u{2015}' | '\u{2212}' => '-',
        '\u{3002}' => '.',
        _ => digit(letter).unwrap_or(letter),
    }
}

/// The zeros of scripts that write numbers in digits of their own, as the Unicode character database has them (category Nd).
const ZEROS: [char; 18] = [
    '\u{660}', '\u{6f0}', '\u{7c0}', '\u{966}', '\u{9e6}', '\u{a66}', '\u{ae6}', '\u{b66}', '\u{be6}', '\u{c66}',
    '\u{ce6}', '\u{d66}', '\u{e50}', '\u{ed0}', '\u{f20}', '\u{1040}', '\u{17e0}', '\u{1810}',
];

fn digit(letter: char) -> Option<char> {
    let value =
        ZEROS.iter().find_map(|&zero| u32::from(letter).checked_sub(u32::from(zero)).filter(|value| *value < 10));
    char::from_digit(value?, 10)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tricks_become_plain_and_keep_their_places() {
        for (text, expected) in [
            ("ｂｏｂ＠ｅｘ．ｃｏｍ", "bob@ex.com"),
            ("bob\u{200b}@ex\u{ad}.com", "bob@ex.com"),
            ("mu\u{308}nchen münchen", "munchen munchen"),
            ("4111‑1111–1111\u{a0}1111", "4111-1111-1111 1111"),
            ("٤١١١ ४१११", "4111 4111"),
            ("例え。jp", "例え.jp"),
            ("ＡＫＩＡ", "AKIA"),
        ] {
            let plain = Plain::of(text).unwrap();
            assert_eq!(plain.text, expected);
            assert_eq!(plain.end(plain.text.len()), text.len());
        }
        assert!(Plain::of("plain\n\ttext 4111-1111").is_none());
        let plain = Plain::of("é\u{200b}b").unwrap();
        assert_eq!((plain.at(0), plain.at(2), plain.at(5), plain.at(6)), (0, 1, 1, 2));
        assert_eq!((plain.start(1, 6), plain.start(2, 6), plain.end(1), plain.end(0)), (5, 6, 2, 0));
    }

    #[test]
    fn a_flood_of_invisible_characters_ends_a_match() {
        let text = format!("bob{}@x.org", "\u{200b}".repeat(70));
        assert_eq!(Plain::of(&text).unwrap().text, "bob\u{fffd}@x.org");
    }

    proptest! {
        #[test]
        fn letters_are_made_plain_by_themselves(text in "[a1@. \n\u{200b}é＠４٤例]{0,30}", cut in 0_usize..30) {
            let cut = text.char_indices().map(|(at, _)| at).nth(cut).unwrap_or(text.len());
            let form = |text: &str| Plain::of(text).map_or_else(|| text.to_owned(), |plain| plain.text);
            prop_assert_eq!(form(&text[..cut]) + &form(&text[cut..]), form(&text));
        }
    }
}
