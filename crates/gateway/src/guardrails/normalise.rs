//! The form in which phrases are compared, so that look-alike letters, accents, odd cases and invisible characters do
//! not hide them.
//!
//! A text becomes a row of bytes in which every letter is folded by itself: compatibility forms to plain letters (as
//! NFKC does it), accents off, case folded, runs of blanks to one, invisible characters gone; and a [`BOUNDARY`] byte
//! stands wherever a word begins or ends. Because no letter's fold looks at its neighbours, a text can be folded piece by
//! piece, and every byte knows the place of its letter in the original.
//!
//! Two views are needed, for a letter can be meant or be looked at: Cyrillic `В` is the capital of `в`, and looks like a
//! Latin `B`. [`View::Meant`] folds by meaning alone; [`View::Looks`] takes letters outside ASCII for what Unicode's
//! confusables (UTS 39) say they look like. ASCII itself is never confused: `m` stays `m`, though the table has it look
//! like `rn`.
//!
//! **Invariant**: folding a text in pieces, each with the [`Before`] that the piece before left, gives the same bytes as
//! folding it whole.

use unicode_normalization::char::{canonical_combining_class, decompose_compatible};

use super::scan::End;

/// Stands in folded text where a word begins or ends. UTF-8 has no such byte.
pub(super) const BOUNDARY: u8 = 0xff;

/// More invisible characters than this between two letters are a flood; of more blanks than this in a row, another
/// counts. It bounds how much text a phrase can be stretched over.
pub(super) const MAX_SKIPPED: u8 = 64;

/// How letters are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// By what they are.
    Meant,
    /// By what they look like.
    Looks,
}

/// What stands before the place where folding goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Before {
    is_word: bool,
    is_blank: bool,
    num_blanks: u8,
    num_invisible: u8,
}

/// A folded byte and the letter it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) byte: u8,
    /// Where the letter begins in the original, in bytes.
    pub(super) start: usize,
    /// Where it ends.
    pub(super) end: usize,
    /// What stood before the letter: folding can be taken up again there.
    pub(super) before: Before,
}

/// A folded piece.
#[derive(Debug, Default)]
pub(super) struct Folded {
    pub(super) units: Vec<Unit>,
    /// Invisible characters beyond [`MAX_SKIPPED`] in a row: nobody writes so but to hide something.
    pub(super) floods: Vec<(usize, usize)>,
}

impl Folded {
    /// The bytes alone.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.units.iter().map(|unit| unit.byte).collect()
    }
}

/// Folds `text[from..]` after `before` into `folded`, and says what stands before what comes next.
pub(super) fn fold(view: View, text: &str, from: (usize, Before), end: End, folded: &mut Folded) -> Before {
    let (from, mut before) = from;
    for (offset, letter) in text[from..].char_indices() {
        let start = from + offset;
        let letter = Letter { char: letter, start, end: start + letter.len_utf8() };
        before = if letter.char.is_ascii_alphanumeric() {
            fold_plain(letter, before, folded)
        } else if letter.char.is_whitespace() {
            fold_blank(letter, before, folded)
        } else if is_invisible(letter.char) {
            let num_invisible = before.num_invisible.saturating_add(1);
            if num_invisible > MAX_SKIPPED {
                folded.floods.push((letter.start, letter.end));
            }
            Before { num_invisible, ..before }
        } else {
            fold_other(view, letter, before, folded)
        };
    }
    if end == End::Last && before.is_word {
        let place = Letter { char: ' ', start: text.len(), end: text.len() };
        folded.units.push(place.unit(BOUNDARY, before));
    }
    before
}

/// The bytes of a whole text.
pub(super) fn fold_whole(view: View, text: &str) -> Vec<u8> {
    let mut folded = Folded::default();
    fold(view, text, (0, Before::default()), End::Last, &mut folded);
    folded.bytes()
}

#[derive(Clone, Copy)]
struct Letter {
    char: char,
    start: usize,
    end: usize,
}

impl Letter {
    fn unit(self, byte: u8, before: Before) -> Unit {
        Unit { byte, start: self.start, end: self.end, before }
    }
}

/// Most letters of most texts.
fn fold_plain(letter: Letter, before: Before, folded: &mut Folded) -> Before {
    if !before.is_word {
        folded.units.push(letter.unit(BOUNDARY, before));
    }
    folded.units.push(letter.unit(letter.char.to_ascii_lowercase() as u8, before));
    Before { is_word: true, ..Before::default() }
}

fn fold_blank(letter: Letter, before: Before, folded: &mut Folded) -> Before {
    if before.is_word {
        folded.units.push(letter.unit(BOUNDARY, before));
    }
    let is_skipped = before.is_blank && before.num_blanks < MAX_SKIPPED;
    if !is_skipped {
        folded.units.push(letter.unit(b' ', before));
    }
    let num_blanks = if is_skipped { before.num_blanks + 1 } else { 0 };
    // Blanks do not make invisible characters fewer: else both together would stretch a phrase without end.
    Before { is_word: false, is_blank: true, num_blanks, num_invisible: before.num_invisible }
}

fn fold_other(view: View, letter: Letter, before: Before, folded: &mut Folded) -> Before {
    let mut is_word = before.is_word;
    let mut buffer = [0; 4];
    for_each_folded(view, letter.char, &mut |part| {
        if is_word_letter(part) != is_word {
            is_word = !is_word;
            folded.units.push(letter.unit(BOUNDARY, before));
        }
        for byte in part.encode_utf8(&mut buffer).bytes() {
            folded.units.push(letter.unit(byte, before));
        }
    });
    Before { is_word, ..Before::default() }
}

fn for_each_folded(view: View, letter: char, emit: &mut impl FnMut(char)) {
    decompose_compatible(letter, |part| match view {
        _ if part.is_ascii() => emit(part.to_ascii_lowercase()),
        View::Meant => fold_case(part, emit),
        View::Looks => fold_looks(part, emit),
    });
}

/// Full case folding by way of the capital, which brings `ß`, `ς` and `ſ` together with `ss`, `σ` and `s`.
fn fold_case(letter: char, emit: &mut impl FnMut(char)) {
    for lower in letter.to_uppercase().flat_map(char::to_lowercase) {
        if !is_accent(lower) {
            emit(lower);
        }
    }
}

/// What the letter looks like. Unicode takes `I` for `l`; a capital that looks like one is an `i` to a reader.
fn fold_looks(letter: char, emit: &mut impl FnMut(char)) {
    let mut buffer = [0; 4];
    let letter_text: &str = letter.encode_utf8(&mut buffer);
    for part in unicode_security::skeleton(letter_text) {
        match part {
            'l' if letter.is_uppercase() => emit('i'),
            part if part.is_ascii() => emit(part.to_ascii_lowercase()),
            part => match SMALL_CAPITALS.iter().find(|(small, _)| *small == part) {
                Some((_, plain)) => emit(*plain),
                None => fold_case(part, emit),
            },
        }
    }
}

/// Latin small capitals (by their names in the Unicode character database), which other scripts' small letters look like: Cyrillic
/// `к` and `т` to UTS 39, and which ornamental writing uses.
const SMALL_CAPITALS: [(char, char); 26] = [
    ('ᴀ', 'a'),
    ('ʙ', 'b'),
    ('ᴄ', 'c'),
    ('ᴅ', 'd'),
    ('ᴇ', 'e'),
    ('ꜰ', 'f'),
    ('ɢ', 'g'),
    ('ʜ', 'h'),
    ('ɪ', 'i'),
    ('ᴊ', 'j'),
    ('ᴋ', 'k'),
    ('ĸ', 'k'),
    ('ʟ', 'l'),
    ('ᴍ', 'm'),
    ('ʍ', 'm'),
    ('ɴ', 'n'),
    ('ᴏ', 'o'),
    ('ᴘ', 'p'),
    ('ʀ', 'r'),
    ('ꜱ', 's'),
    ('ᴛ', 't'),
    ('ᴜ', 'u'),
    ('ᴠ', 'v'),
    ('ᴡ', 'w'),
    ('ʏ', 'y'),
    ('ᴢ', 'z'),
];

/// Marks that sit on a letter of any script, and the vowel points of Hebrew and Arabic, which may be left out. Signs
/// that change which letter it is (viramas, nuktas, voicing marks, Thai vowels) stay.
pub(super) fn is_accent(letter: char) -> bool {
    matches!(canonical_combining_class(letter), 1 | 10..=36 | 202..=240)
}

/// Characters without a look of their own: joiners, direction marks, variation selectors, tags, controls, and accents.
pub(super) fn is_invisible(letter: char) -> bool {
    matches!(
        letter,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fff8}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}'
    ) || letter.is_control()
        || is_accent(letter)
}

/// Whether words of these letters stand apart from each other. Scripts without blanks, and Korean with its particles, have no
/// such words: a phrase in them is found wherever it stands.
fn is_word_letter(letter: char) -> bool {
    let has_no_blanks = matches!(
        letter,
        '\u{e00}'..='\u{eff}' | '\u{1000}'..='\u{11ff}' | '\u{1780}'..='\u{17ff}' | '\u{3040}'..='\u{30ff}'
            | '\u{3130}'..='\u{318f}' | '\u{3400}'..='\u{9fff}' | '\u{a960}'..='\u{a97f}' | '\u{ac00}'..='\u{d7ff}'
            | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}'
    );
    letter.is_alphanumeric() && !has_no_blanks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use unicode_normalization::UnicodeNormalization as _;

    use super::*;

    fn shown(view: View, text: &str) -> String {
        let bytes: Vec<u8> = fold_whole(view, text).into_iter().filter(|byte| *byte != BOUNDARY).collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn tricks_fold_to_the_plain_word() {
        for trick in
            ["ＢＯＭＢ", "b\u{200b}o\u{ad}m\u{200d}b", "bömb", "bo\u{301}mb", "𝐛𝐨𝐦𝐛", "ⓑⓞⓜⓑ", "BOMB", "b\u{e0041}omb"]
        {
            assert_eq!(shown(View::Meant, trick), "bomb", "{trick}");
            assert_eq!(shown(View::Looks, trick), "bomb", "{trick}");
        }
        // Cyrillic а, е, о, р, с, х and Greek ο.
        assert_eq!(shown(View::Looks, "раssроrt ехсеl οк"), "passport excel ok");
        assert_eq!(shown(View::Looks, "ʙᴏᴍʙ"), "bomb");
        assert_eq!(shown(View::Looks, "ВОМВ"), "bomb", "Cyrillic capitals");
        assert_eq!(shown(View::Meant, "Straße ΣΟΦΟΣ σοφος"), "strasse σοφοσ σοφοσ");
    }

    #[test]
    fn ascii_is_never_taken_for_something_else() {
        assert_eq!(shown(View::Looks, "modern modem 10 lIO"), "modern modem 10 lio");
    }

    #[test]
    fn words_have_edges_and_scripts_without_blanks_have_none() {
        let edges = |text: &str| fold_whole(View::Meant, text).split(|byte| *byte == BOUNDARY).count() - 1;
        assert_eq!((edges("one two"), edges("one, two."), edges(""), edges("爆弾を"), edges("a爆")), (4, 4, 0, 0, 2));
    }

    proptest! {
        #[test]
        fn pieces_fold_like_the_whole(text in "[aB1 \n\u{200b}éßЖ爆\u{301}ﬃ]{0,40}", cut in 0_usize..40) {
            let cut = text.char_indices().map(|(at, _)| at).nth(cut).unwrap_or(text.len());
            for view in [View::Meant, View::Looks] {
                let mut folded = Folded::default();
                let before = fold(view, &text[..cut], (0, Before::default()), End::Open, &mut folded);
                fold(view, &text, (cut, before), End::Last, &mut folded);
                prop_assert_eq!(folded.bytes(), fold_whole(view, &text));
            }
        }

        #[test]
        fn unicodes_own_normal_forms_and_cases_fold_alike(text in "[a-zA-Z0-9 À-ÿĀ-žΑ-Ωα-ωА-я가-힣ぁ-んァ-ンｦ-ﾝＡ-Ｚﬀ-ﬆ①-⑳]{0,20}") {
            let expected = fold_whole(View::Meant, &text);
            prop_assert_eq!(&fold_whole(View::Meant, &text.nfkc().collect::<String>()), &expected);
            prop_assert_eq!(&fold_whole(View::Meant, &text.nfd().collect::<String>()), &expected);
            prop_assert_eq!(&fold_whole(View::Meant, &text.to_uppercase()), &expected);
        }
    }
}
