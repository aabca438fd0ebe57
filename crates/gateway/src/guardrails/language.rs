//! Which languages a text may be in, and which one a request is in.
//!
//! Rules, guardrails and `route explain` read names and requests by these functions alone, so that they agree.
//!
//! Decided once, by the first [`SAMPLE_CHARS`] characters (or all, where the text is shorter): that many are held back, and
//! what follows is not looked at. A text too short to tell passes: whatlang says itself when it is not sure.

use serde_json::Value;
use whatlang::Lang;

use super::GuardrailError;

/// What the decision is made by.
pub(super) const SAMPLE_CHARS: usize = 240;
/// So much of a request's newest texts tells its language.
const MAX_SAMPLE_CHARS: usize = 1000;

/// ISO 639-1's names of the languages that can be told, and the names of a macrolanguage by which people mean one of them.
const SHORT_NAMES: [(&str, Lang); 80] = [
    ("af", Lang::Afr),
    ("ak", Lang::Aka),
    ("am", Lang::Amh),
    ("ar", Lang::Ara),
    ("az", Lang::Aze),
    ("be", Lang::Bel),
    ("bg", Lang::Bul),
    ("bn", Lang::Ben),
    ("ca", Lang::Cat),
    ("cs", Lang::Ces),
    ("cy", Lang::Cym),
    ("da", Lang::Dan),
    ("de", Lang::Deu),
    ("el", Lang::Ell),
    ("en", Lang::Eng),
    ("eo", Lang::Epo),
    ("es", Lang::Spa),
    ("et", Lang::Est),
    ("fa", Lang::Pes),
    ("fi", Lang::Fin),
    ("fr", Lang::Fra),
    ("gu", Lang::Guj),
    ("he", Lang::Heb),
    ("hi", Lang::Hin),
    ("hr", Lang::Hrv),
    ("hu", Lang::Hun),
    ("hy", Lang::Hye),
    ("id", Lang::Ind),
    ("it", Lang::Ita),
    ("ja", Lang::Jpn),
    ("jv", Lang::Jav),
    ("ka", Lang::Kat),
    ("km", Lang::Khm),
    ("kn", Lang::Kan),
    ("ko", Lang::Kor),
    ("la", Lang::Lat),
    ("lt", Lang::Lit),
    ("lv", Lang::Lav),
    ("mk", Lang::Mkd),
    ("ml", Lang::Mal),
    ("mr", Lang::Mar),
    ("my", Lang::Mya),
    ("nb", Lang::Nob),
    ("ne", Lang::Nep),
    ("nl", Lang::Nld),
    ("or", Lang::Ori),
    ("pa", Lang::Pan),
    ("pl", Lang::Pol),
    ("pt", Lang::Por),
    ("ro", Lang::Ron),
    ("ru", Lang::Rus),
    ("si", Lang::Sin),
    ("sk", Lang::Slk),
    ("sl", Lang::Slv),
    ("sn", Lang::Sna),
    ("sr", Lang::Srp),
    ("sv", Lang::Swe),
    ("ta", Lang::Tam),
    ("te", Lang::Tel),
    ("th", Lang::Tha),
    ("tk", Lang::Tuk),
    ("tl", Lang::Tgl),
    ("tr", Lang::Tur),
    ("uk", Lang::Ukr),
    ("ur", Lang::Urd),
    ("uz", Lang::Uzb),
    ("vi", Lang::Vie),
    ("yi", Lang::Yid),
    ("zh", Lang::Cmn),
    ("zu", Lang::Zul),
    ("no", Lang::Nob),
    ("nor", Lang::Nob),
    ("norwegian", Lang::Nob),
    ("zho", Lang::Cmn),
    ("chinese", Lang::Cmn),
    ("fas", Lang::Pes),
    ("farsi", Lang::Pes),
    ("filipino", Lang::Tgl),
    ("slovenian", Lang::Slv),
    ("sinhala", Lang::Sin),
];

/// A language by a code of ISO 639-1 or 639-3 or by its English name, whatever the case.
///
/// # Errors
/// What is wrong and what to write, for a name that no language has that can be told.
pub fn parse(name: &str) -> Result<Lang, String> {
    let wanted = name.trim().to_lowercase();
    let short = SHORT_NAMES.iter().find(|(short, _)| *short == wanted).map(|(_, lang)| *lang);
    let by_name = || Lang::all().iter().copied().find(|lang| lang.eng_name().to_lowercase() == wanted);
    short.or_else(|| Lang::from_code(wanted.as_str())).or_else(by_name).ok_or_else(|| {
        format!(
            "no language that can be told is called `{name:.20}`; use a code of ISO 639-1 or 639-3 or the English name, like \
             `de`, `deu` or `german`"
        )
    })
}

/// What a request's language is told by: its newest texts of the user, as far as they are needed; of a completion, its prompt. What an
/// operator wrote into system messages and what models answered does not count.
pub fn sample_of(body: &Value) -> String {
    let mut texts = Vec::new();
    for message in body["messages"].as_array().into_iter().flatten().filter(|message| message["role"] == "user") {
        collect(&message["content"], &mut texts);
    }
    collect(&body["prompt"], &mut texts);
    let mut num_chars = 0;
    let newest = texts.iter().rev().map_while(|text| {
        let left = MAX_SAMPLE_CHARS.checked_sub(num_chars).filter(|left| *left > 0)?;
        let end = text.char_indices().nth(left).map_or(text.len(), |(end, _)| end);
        num_chars += text[..end].chars().count();
        Some(&text[..end])
    });
    let mut sample: Vec<&str> = newest.collect();
    sample.reverse();
    sample.join("\n")
}

fn collect<'a>(content: &'a Value, texts: &mut Vec<&'a str>) {
    match content {
        Value::String(text) => texts.push(text),
        Value::Array(parts) => {
            for part in parts {
                texts.extend(part.as_str().or_else(|| part["text"].as_str()));
            }
        }
        _ => {}
    }
}

/// A request's language, where it is sure.
pub fn of_request(body: &Value) -> Option<Lang> {
    whatlang::detect(&sample_of(body)).filter(whatlang::Info::is_reliable).map(|found| found.lang())
}

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
        let parse =
            |names: &[String]| names.iter().map(|name| parse(name).map_err(&bad)).collect::<Result<Vec<_>, _>>();
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
    fn every_language_has_its_two_letters_its_three_and_its_name() {
        for lang in Lang::all() {
            let two = SHORT_NAMES.iter().filter(|(name, known)| name.len() == 2 && known == lang).count();
            assert!(two == 1 || *lang == Lang::Nob, "{lang:?}");
            assert_eq!(parse(lang.code()), Ok(*lang));
            assert_eq!(parse(&lang.eng_name().to_uppercase()), Ok(*lang));
        }
        for (name, lang) in [("de", Lang::Deu), (" DEU ", Lang::Deu), ("German", Lang::Deu), ("Chinese", Lang::Cmn)] {
            assert_eq!(parse(name), Ok(lang));
        }
        assert!(parse("klingon").unwrap_err().contains("`klingon`"));
    }

    #[test]
    fn a_requests_language_is_that_of_its_newest_texts_of_the_user() {
        let chat = serde_json::json!({"messages": [
            {"role": "system", "content": ENGLISH},
            {"role": "user", "content": ENGLISH.repeat(20)},
            {"role": "assistant", "content": ENGLISH},
            {"role": "user", "content": [{"type": "text", "text": GERMAN.repeat(8)}, {"type": "image_url"}]},
        ]});
        assert_eq!(of_request(&chat), Some(Lang::Deu));
        assert!(sample_of(&chat).chars().count() <= MAX_SAMPLE_CHARS + 1);
        let short = serde_json::json!({"messages": [
            {"role": "user", "content": GERMAN},
            {"role": "assistant", "content": ENGLISH},
            {"role": "user", "content": "ok"},
        ]});
        assert_eq!(of_request(&short), Some(Lang::Deu), "what is too short to tell goes on with what stands before");
        assert_eq!(of_request(&serde_json::json!({"prompt": [GERMAN]})), Some(Lang::Deu));
        assert_eq!(of_request(&serde_json::json!({"prompt": "ok 12"})), None);
        assert_eq!(of_request(&serde_json::json!({"prompt": [1, 2]})), None);
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
