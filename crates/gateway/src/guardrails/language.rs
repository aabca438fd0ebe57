//! Which languages a text may be in.
//!
//! Decided once, by the first [`SAMPLE_CHARS`] characters (or all, where the text is shorter): that many are held back, and
//! what follows is not looked at. A text too short to tell passes: whatlang says itself when it is not sure.

use whatlang::Lang;

use super::GuardrailError;

/// What the decision is made by.
pub(super) const SAMPLE_CHARS: usize = 240;

/// The two-letter names of the languages that people write into configs.
const SHORT_NAMES: [(&str, Lang); 30] = [
    ("en", Lang::Eng),
    ("de", Lang::Deu),
    ("fr", Lang::Fra),
    ("es", Lang::Spa),
    ("it", Lang::Ita),
    ("pt", Lang::Por),
    ("nl", Lang::Nld),
    ("sv", Lang::Swe),
    ("da", Lang::Dan),
    ("nb", Lang::Nob),
    ("no", Lang::Nob),
    ("fi", Lang::Fin),
    ("pl", Lang::Pol),
    ("cs", Lang::Ces),
    ("sk", Lang::Slk),
    ("hu", Lang::Hun),
    ("ro", Lang::Ron),
    ("bg", Lang::Bul),
    ("el", Lang::Ell),
    ("ru", Lang::Rus),
    ("uk", Lang::Ukr),
    ("tr", Lang::Tur),
    ("ar", Lang::Ara),
    ("he", Lang::Heb),
    ("hi", Lang::Hin),
    ("zh", Lang::Cmn),
    ("ja", Lang::Jpn),
    ("ko", Lang::Kor),
    ("vi", Lang::Vie),
    ("th", Lang::Tha),
];

/// The rule.
#[derive(Clone, Debug)]
pub(super) enum Languages {
    /// These and no others.
    Allowed(Vec<Lang>),
    /// All but these.
    Denied(Vec<Lang>),
}

impl Languages {
    pub(super) fn new(guardrail: &str, allow: &[String], deny: &[String]) -> Result<Self, GuardrailError> {
        let bad = |why: String| GuardrailError::Config { guardrail: guardrail.to_owned(), why };
        let parse = |names: &[String]| {
            let lang = |name: &String| {
                let short = SHORT_NAMES.iter().find(|(short, _)| short == name).map(|(_, lang)| *lang);
                short.or_else(|| Lang::from_code(name)).ok_or_else(|| {
                    bad(format!("no language is called `{name:.20}`; use a code of ISO 639, like `en` or `deu`"))
                })
            };
            names.iter().map(lang).collect::<Result<Vec<_>, _>>()
        };
        match (allow.is_empty(), deny.is_empty()) {
            (false, true) => Ok(Self::Allowed(parse(allow)?)),
            (true, false) => Ok(Self::Denied(parse(deny)?)),
            _ => Err(bad("it needs either `allow` or `deny`, with codes like `en`".to_owned())),
        }
    }

    /// Whether a text like this may pass.
    pub(super) fn admit(&self, sample: &str) -> bool {
        let Some(found) = whatlang::detect(sample).filter(whatlang::Info::is_reliable) else { return true };
        match self {
            Self::Allowed(allowed) => allowed.contains(&found.lang()),
            Self::Denied(denied) => !denied.contains(&found.lang()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GERMAN: &str =
        "Die Bundesregierung hat gestern beschlossen, dass die neuen Regeln erst im nächsten Jahr gelten sollen.";
    const ENGLISH: &str =
        "The government decided yesterday that the new rules should not come into force before next year.";

    #[test]
    fn languages_are_told_apart_and_doubt_passes() {
        let only_english = Languages::new("l", &["en".to_owned()], &[]).unwrap();
        let no_german = Languages::new("l", &[], &["deu".to_owned()]).unwrap();
        assert!(only_english.admit(ENGLISH) && !only_english.admit(GERMAN));
        assert!(no_german.admit(ENGLISH) && !no_german.admit(GERMAN));
        assert!(only_english.admit("ok 123") && only_english.admit(""));
    }

    #[test]
    fn a_rule_says_one_thing_and_names_languages_that_exist() {
        for (allow, deny) in
            [(vec![], vec![]), (vec!["en".to_owned()], vec!["de".to_owned()]), (vec!["klingon".to_owned()], vec![])]
        {
            assert!(Languages::new("l", &allow, &deny).is_err());
        }
    }
}
