//! Personal data and secrets, by name: the shapes they are written in, and which check tells them from look-alikes.
//!
//! A new kind is a row of [`PiiKind`] and of `rules`. **Invariant**: every shape's matches are bounded
//! ([`MAX_SECRET_BYTES`] for keys in PEM, some hundred bytes for everything else), which is what a stream holds back at most.

use serde::{Deserialize, Serialize};

use super::{
    anchored::{Engine, Outcome, Place, Rule, compile_dense},
    checks,
    scan::End,
};

/// The longest private key or token that is taken as one.
pub(super) const MAX_SECRET_BYTES: usize = 16 * 1024;

/// What to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PiiKind {
    /// Keys, tokens and passwords of known shapes.
    Secret,
    /// E-mail addresses.
    Email,
    /// Account numbers (mod 97).
    Iban,
    /// Payment cards (Luhn).
    Card,
    /// US social security numbers.
    UsSsn,
    /// UK national insurance numbers.
    UkNino,
    /// German tax numbers.
    DeTaxId,
    /// French social security numbers.
    FrNir,
    /// Spanish DNI and NIE.
    EsDni,
    /// Italian tax codes.
    ItCodiceFiscale,
    /// IP addresses, versions 4 and 6.
    Ip,
    /// Telephone numbers.
    Phone,
}

impl PiiKind {
    /// All, those first that win where two match the same text.
    pub const ALL: [Self; 12] = [
        Self::Secret,
        Self::Email,
        Self::Iban,
        Self::Card,
        Self::UsSsn,
        Self::UkNino,
        Self::DeTaxId,
        Self::FrNir,
        Self::EsDni,
        Self::ItCodiceFiscale,
        Self::Ip,
        Self::Phone,
    ];

    /// Its name in configs, verdicts and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::Email => "email",
            Self::Iban => "iban",
            Self::Card => "card",
            Self::UsSsn => "us-ssn",
            Self::UkNino => "uk-nino",
            Self::DeTaxId => "de-tax-id",
            Self::FrNir => "fr-nir",
            Self::EsDni => "es-dni",
            Self::ItCodiceFiscale => "it-codice-fiscale",
            Self::Ip => "ip",
            Self::Phone => "phone",
        }
    }

    fn shapes(self) -> Vec<Shape> {
        let number = |pattern, is_valid| Shape { pattern, may_follow: after_no_number, is_valid };
        let code = |pattern, is_valid| Shape { pattern, may_follow: after_no_word, is_valid };
        match self {
            Self::Secret => SECRETS
                .iter()
                .map(|pattern| Shape { pattern, may_follow: after_no_word, is_valid: checks::any })
                .collect(),
            Self::Email => vec![Shape {
                pattern: r"[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9\-\x80-\xff]{1,63}\.){1,5}(?:[A-Za-z]{2,24}\b|[\x80-\xff]{2,24})",
                may_follow: |previous| {
                    previous.is_none_or(|letter| !letter.is_ascii_alphanumeric() && !"._%+-".contains(letter))
                },
                is_valid: |text| !text.contains("..") && !text.contains("@-"),
            }],
            Self::Iban => vec![code(r"[A-Za-z]{2}[ \-]?[0-9]{2}(?:[ \-]?[A-Za-z0-9]){11,29}\b", checks::iban)],
            Self::Card => vec![
                number(r"[2-6](?:[ \-]?[0-9]){11,18}\b", checks::card),
                // In the groups that are on the card, whatever stands between them.
                number(
                    r"[2-6][0-9]{3}(?:[ \-./_\t\r\n]{1,3}[0-9]{4}){3}(?:[ \-./_\t\r\n]{1,3}[0-9]{1,3})?\b",
                    checks::card,
                ),
                number(r"3[47][0-9]{2}[ \-./_\t\r\n]{1,3}[0-9]{6}[ \-./_\t\r\n]{1,3}[0-9]{5}\b", checks::card),
            ],
            Self::UsSsn => vec![number(r"[0-9]{3}-[0-9]{2}-[0-9]{4}\b|[0-9]{3} [0-9]{2} [0-9]{4}\b", checks::us_ssn)],
            Self::UkNino => vec![code(
                r"(?i)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D]\b",
                checks::uk_nino,
            )],
            Self::DeTaxId => vec![number(r"[1-9][0-9](?: ?[0-9]{3}){3}\b", checks::de_tax_id)],
            Self::FrNir => vec![number(
                r"[123478] ?[0-9]{2} ?[0-9]{2} ?(?:[0-9]{2}|2[ABab]) ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}\b",
                checks::fr_nir,
            )],
            Self::EsDni => vec![code(r"(?i)(?:[0-9]{8}|[XYZ]-?[0-9]{7})-?[A-Z]\b", checks::es_dni)],
            Self::ItCodiceFiscale => vec![code(
                r"(?i)[A-Z]{6}[0-9LMNP-V]{2}[A-EHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z]\b",
                checks::it_codice_fiscale,
            )],
            Self::Ip => vec![
                Shape {
                    pattern: r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b",
                    may_follow: |previous| after_no_word(previous) && previous != Some('.'),
                    is_valid: checks::ipv4,
                },
                Shape {
                    pattern: r"[0-9A-Fa-f:][0-9A-Fa-f:.]{1,44}",
                    may_follow: |previous| {
                        after_no_word(previous) && previous.is_none_or(|letter| !".:".contains(letter))
                    },
                    is_valid: checks::ipv6,
                },
            ],
            Self::Phone => vec![
                number(r"\+[1-9](?:[ ./\-]{0,2}\(?[0-9]\)?){6,14}", checks::phone),
                number(r"0[0-9]{1,4}(?:[ /.\-]{1,3}[0-9]{2,8}){1,4}\b", checks::phone),
                number(r"(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .\-])[2-9][0-9]{2}[ .\-][0-9]{4}\b", checks::phone),
            ],
        }
    }
}

struct Shape {
    pattern: &'static str,
    may_follow: fn(Option<char>) -> bool,
    is_valid: fn(&str) -> bool,
}

fn after_no_word(previous: Option<char>) -> bool {
    previous.is_none_or(|letter| !letter.is_alphanumeric() && letter != '_')
}

/// A number that goes on to the left is another number.
fn after_no_number(previous: Option<char>) -> bool {
    previous.is_none_or(|letter| !letter.is_alphanumeric() && !"_+".contains(letter))
}

/// Shapes that the issuers document, or that their own scanners look for.
const SECRETS: [&str; 20] = [
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b", // AWS, key ids
    r#"(?i)aws_?secret(?:_access)?_?key["' ]{0,3}[:=]["' ]{0,3}[A-Za-z0-9/+]{40}"#, // AWS, the secret beside its name
    r"gh[pousr]_[A-Za-z0-9]{36,255}",         // GitHub
    r"github_pat_[A-Za-z0-9_]{22,255}",       // GitHub, fine-grained
    r"sk-[A-Za-z0-9_\-]{20,250}",             // OpenAI, Anthropic (sk-ant-), and many after them
    r"AIza[A-Za-z0-9_\-]{35}",                // Google, API keys
    r"ya29\.[A-Za-z0-9_\-]{20,250}",          // Google, access tokens
    r"GOCSPX-[A-Za-z0-9_\-]{28}",             // Google, client secrets
    r"xox[abeoprs]-[A-Za-z0-9\-]{10,250}",    // Slack
    r"xapp-[0-9]-[A-Za-z0-9\-]{10,250}",      // Slack, app level
    r"hooks\.slack\.com/services/T[A-Za-z0-9_]{6,12}/B[A-Za-z0-9_]{6,12}/[A-Za-z0-9]{20,30}", // Slack, web hooks
    r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,250}", // Stripe
    r"glpat-[A-Za-z0-9_\-]{20,100}",          // GitLab
    r"npm_[A-Za-z0-9]{36}\b",                 // npm
    r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_\-]{50,250}", // PyPI
    r"hf_[A-Za-z0-9]{34,50}",                 // Hugging Face
    r"SG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}", // SendGrid
    r"AccountKey=[A-Za-z0-9+/]{86}==",        // Azure storage
    r"gsk_[A-Za-z0-9]{40,100}",               // Groq
    r"dop_v1_[a-f0-9]{64}\b",                 // DigitalOcean
];

/// The rules of these kinds. Compiling takes some milliseconds, once a policy.
pub(super) fn rules(kinds: &[PiiKind]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for kind in PiiKind::ALL.into_iter().filter(|kind| kinds.contains(kind)) {
        for Shape { pattern, may_follow, is_valid } in kind.shapes() {
            rules.push(Rule { label: kind.name(), engine: compile_dense(pattern), may_follow, is_valid });
        }
        if kind == PiiKind::Secret {
            for (code, bytes) in [(pem as fn(Place<'_>) -> Outcome, b"-"), (jwt, b"e")] {
                let engine = Engine::Code(code, bytes);
                rules.push(Rule { label: kind.name(), engine, may_follow: |_| true, is_valid: checks::any });
            }
        }
    }
    rules
}

/// A private key in PEM, as far as it is there: one that is cut off, or too long, is a key all the same.
fn pem(place: Place<'_>) -> Outcome {
    const HEADS: [&str; 6] = [
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----",
        "-----BEGIN EC PRIVATE KEY-----",
        "-----BEGIN DSA PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "-----BEGIN ENCRYPTED PRIVATE KEY-----",
    ];
    let rest = &place.text[place.start..];
    let Some(head) = HEADS.iter().find(|head| rest.starts_with(**head)) else {
        let is_begun = place.end == End::Open && HEADS.iter().any(|head| head.starts_with(rest));
        return if is_begun { Outcome::Unsettled } else { Outcome::Nothing };
    };
    let is_body = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=\\\r\n\t :,.".contains(&byte);
    let body = rest.as_bytes()[head.len()..].iter().take(MAX_SECRET_BYTES).take_while(|byte| is_body(**byte)).count();
    let body_end = head.len() + body;
    if body < MAX_SECRET_BYTES && body_end == rest.len() && place.end == End::Open {
        return Outcome::Unsettled;
    }
    let tail = head.replace("BEGIN", "END");
    let after = &rest[body_end..];
    if after.starts_with(&tail) {
        return Outcome::Match(place.start + body_end + tail.len());
    }
    if place.end == End::Open && tail.starts_with(after) {
        return Outcome::Unsettled;
    }
    Outcome::Match(place.start + body_end)
}

/// A JSON web token: three parts in base64url, the first two objects (`{"` is `eyJ`).
fn jwt(place: Place<'_>) -> Outcome {
    let rest = &place.text.as_bytes()[place.start..];
    let previous = place.text[..place.start].chars().next_back();
    if !after_no_word(previous) || !rest.starts_with(b"eyJ") {
        let is_begun = after_no_word(previous) && place.end == End::Open && b"eyJ".starts_with(rest);
        return if is_begun { Outcome::Unsettled } else { Outcome::Nothing };
    }
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let mut end = 0;
    for part in 0..3 {
        let length = rest[end..].iter().take(MAX_SECRET_BYTES / 4).take_while(|byte| is_part(**byte)).count();
        if end + length == rest.len() && place.end == End::Open {
            return Outcome::Unsettled;
        }
        if length < 8 {
            return Outcome::Nothing;
        }
        end += length;
        match (part, rest.get(end)) {
            (2, _) => return Outcome::Match(place.start + end),
            (_, Some(b'.')) => end += 1,
            (_, _) => return Outcome::Nothing,
        }
        if part == 0 && end == rest.len() && place.end == End::Open {
            return Outcome::Unsettled;
        }
    }
    Outcome::Nothing
}
