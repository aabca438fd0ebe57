//! What can be known of a request from its body, for the server and for `route explain` alike.
//!
//! Knows OpenAI's bodies as far as routing and bounds ask for them. Invariant: whoever asks gets what the server decides by.

use serde_json::{Map, Value};

use super::call::{date, money};
use crate::{
    clock::UnixMillis,
    guardrails::{GuardrailConfig, GuardrailError, Policy, no_secrets},
    ledger::{self, PromptSize},
    money::Money,
    policy::{CannotTake, PrivacyClass, TenantRouting},
    providers::{
        ModelEntry,
        catalogue::{Bound, ServedTier},
        chat::ServiceTier,
        fields::Word,
    },
};

/// Parts of messages that carry something else than text.
const BEYOND_TEXT: [&str; 7] = ["image_url", "input_audio", "file", "video_url", "audio_url", "image", "audio"];

/// Everything that is sent: texts, names, schemas. Pictures and documents in parts of messages, where alone they are such, are
/// counted; anything of the same name elsewhere is text like any other.
pub fn size_of(body: &Value) -> PromptSize {
    let num_messages = body.get("messages").and_then(Value::as_array).map_or(1, |messages| messages.len() as u64);
    let mut size = PromptSize { num_messages, ..PromptSize::default() };
    match body {
        Value::Object(map) => {
            for (name, value) in map {
                size.num_bytes += name.len() as u64;
                match (name.as_str(), value) {
                    ("messages", Value::Array(messages)) => {
                        for message in messages {
                            measure_message(message, &mut size);
                        }
                    }
                    ("prompt", prompt) => measure(prompt, Written::Plain, &mut size),
                    (_, value) => measure(value, Written::AsJson, &mut size),
                }
            }
        }
        other => measure(other, Written::AsJson, &mut size),
    }
    size
}

/// How a provider shows its model a text.
#[derive(Clone, Copy)]
enum Written {
    Plain,
    /// A schema's: in quotes, with escapes.
    AsJson,
}

fn measure_message(message: &Value, size: &mut PromptSize) {
    let Value::Object(map) = message else { return measure(message, Written::Plain, size) };
    for (name, value) in map {
        size.num_bytes += name.len() as u64;
        match (name.as_str(), value) {
            ("content", Value::Array(parts)) => {
                for part in parts {
                    measure_part(part, size);
                }
            }
            (_, value) => measure(value, Written::Plain, size),
        }
    }
}

/// What is beside the picture or document is measured all the same.
fn measure_part(part: &Value, size: &mut PromptSize) {
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
    let Value::Object(map) = part else { return measure(part, Written::Plain, size) };
    for (name, value) in map {
        size.num_bytes += name.len() as u64;
        let picture = value.get("url").and_then(Value::as_str).filter(|url| kind == "image_url" && is_picture(url));
        match (name.as_str(), picture) {
            ("image_url", Some(url)) => {
                size.num_images += 1;
                let before = size.num_bytes;
                measure(value, Written::Plain, size);
                size.num_bytes = before + (size.num_bytes - before).saturating_sub(url.len() as u64);
            }
            ("file", _) => {
                size.num_documents += 1;
                measure(value, Written::Plain, size);
            }
            _ => measure(value, Written::Plain, size),
        }
    }
}

/// Whether a URL is one of a picture, whose length says nothing.
fn is_picture(url: &str) -> bool {
    let starts = |with: &str| url.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with));
    starts("data:image/") || starts("http://") || starts("https://")
}

/// The parser has bounded the depth.
fn measure(value: &Value, written: Written, size: &mut PromptSize) {
    match value {
        Value::String(text) => {
            size.num_bytes += text.len() as u64;
            size.num_wide_bytes += text.bytes().filter(|byte| !byte.is_ascii()).count() as u64;
            if matches!(written, Written::AsJson) {
                size.num_overhead_bytes += escapes(text);
            }
        }
        Value::Array(items) => {
            size.num_overhead_bytes += 2 + items.len() as u64;
            for item in items {
                measure(item, written, size);
            }
        }
        Value::Object(map) => {
            // Braces; and for each member quotes, a colon, a comma and blanks.
            size.num_overhead_bytes += 2 + 6 * map.len() as u64;
            for (name, value) in map {
                size.num_bytes += name.len() as u64;
                size.num_overhead_bytes += escapes(name);
                measure(value, written, size);
            }
        }
        Value::Number(number) => size.num_bytes += number.to_string().len() as u64,
        Value::Null | Value::Bool(_) => size.num_bytes += 8,
    }
}

/// What quotes and escapes add to a text, where everything beyond ASCII is one, too.
fn escapes(text: &str) -> u64 {
    let of = |c: char| match c {
        '"' | '\\' => 1,
        c if c.is_ascii_control() => 5,
        c if c.is_ascii() => 0,
        c => 6 * c.len_utf16() - c.len_utf8(),
    };
    2 + text.chars().map(of).sum::<usize>() as u64
}

/// The most tokens a prompt can be for a model; None: nobody can tell, for it holds documents, of which a few bytes may be
/// thousands of tokens, and how much the model takes at most is not known.
pub fn max_prompt_tokens(size: PromptSize, model: &ModelEntry) -> Option<u64> {
    let counted = ledger::max_prompt_tokens(size, ledger::max_image_tokens(&model.id));
    if size.num_documents == 0 {
        return Some(counted);
    }
    model.max_input_tokens.map(|most| most.max(counted))
}

/// The longest answer that a request asks for by either of its names.
pub fn named_output(body: &Value) -> Option<u64> {
    ["max_completion_tokens", "max_tokens"].iter().find_map(|name| body.get(name)?.as_u64())
}

/// How many answers a request asks for.
pub fn num_answers(body: &Value) -> u64 {
    body.get("n").and_then(Value::as_u64).unwrap_or(1).max(1)
}

/// What a call can cost at most; None: nobody can tell, as its answer has no limit or its model no price.
pub fn most_it_can_cost(
    body: &Value,
    model: &ModelEntry,
    default_output: Option<u64>,
    now: UnixMillis,
) -> Option<Money> {
    let most = model.max_output_tokens;
    let output = named_output(body).or(default_output).or(most)?.min(most.unwrap_or(u64::MAX));
    let bound = Bound {
        max_prompt_tokens: max_prompt_tokens(size_of(body), model)?,
        max_output_tokens: output.saturating_mul(num_answers(body)),
        tier: asked_tier(body),
    };
    model.upper_bound(&bound, date(now)).ok().map(money)
}

/// The dearest service that a request's `service_tier` may lead to.
pub fn asked_tier(body: &Value) -> ServedTier {
    let word = body.get("service_tier").and_then(Value::as_str);
    ServedTier::asked(word.and_then(<ServiceTier as Word>::from_word))
}

/// Tokens of a prompt, about: decides where to, not what may be spent, which takes a bound. Four bytes of ASCII are a token, as of
/// English texts, and two of anything else, as where a vocabulary has few words of a script. Where it is too low, and the local
/// model finds a prompt too long, the next place of its route is tried.
pub fn estimated_tokens(size: PromptSize) -> usize {
    let num_tokens = size.num_bytes.saturating_sub(size.num_wide_bytes) / 4 + size.num_wide_bytes / 2;
    usize::try_from(num_tokens).unwrap_or(usize::MAX)
}

/// Whether tools are offered.
pub fn has_tools(body: &Value) -> bool {
    body.get("tools").and_then(Value::as_array).is_some_and(|tools| !tools.is_empty())
}

/// Whether a prompt is, or holds, numbers of tokens.
pub fn has_token_ids(body: &Value) -> bool {
    let is_ids = |prompt: &Value| prompt.is_number() || prompt.is_array();
    body.get("prompt").and_then(Value::as_array).is_some_and(|prompts| prompts.iter().any(is_ids))
}

/// What language a request is in, as an ISO 639-3 code, where its newest texts show it.
pub fn language(body: &Value) -> Option<&'static str> {
    crate::guardrails::language::of_request(body).map(|lang| lang.code())
}

/// The first part of a message that is no text, which no model of this process reads.
pub fn beyond_text(body: &Map<String, Value>) -> Option<CannotTake> {
    let messages = body.get("messages")?.as_array()?;
    messages.iter().enumerate().find_map(|(message, content)| {
        let parts = content.get("content")?.as_array()?;
        parts.iter().enumerate().find_map(|(part, content)| {
            let kind = content.get("type")?.as_str()?;
            let kind = BEYOND_TEXT.iter().find(|known| **known == kind)?;
            let field = format!("messages[{message}].content[{part}]");
            let why = format!("{field} is {kind}: the model served here reads text only");
            Some(CannotTake { field, why })
        })
    })
}

/// Looks for everything that is personal data and leaves it as it is: `when.pii` works without a guardrail of the tenant's.
///
/// # Errors
/// None that a working program would give: the table is its own.
pub fn personal_data() -> Result<Policy, GuardrailError> {
    let table = "name = \"personal data\"\nkind = \"pii\"\naction = \"flag\"";
    let config: GuardrailConfig = toml::from_str(table).expect("a table of this very program");
    Policy::named(&Policy::compile(std::slice::from_ref(&config), &no_secrets)?, &[config.name])
}

/// Of requests that belong to no tenant: everything is open, and nothing overflows.
pub fn nobodys_routing() -> TenantRouting {
    TenantRouting {
        name: "default".into(),
        privacy: PrivacyClass::LocalFirst,
        models: vec!["*".to_owned()],
        overflow: None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn most(body: &Value) -> u64 {
        ledger::max_prompt_tokens(size_of(body), 1000)
    }

    #[test]
    fn a_picture_counts_where_it_is_one_and_no_text_hides_behind_its_name() {
        let text = "x".repeat(100_000);
        let url = format!("data:image/png;base64,{text}");
        let user = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
        let picture = user(json!({"type": "image_url", "image_url": {"url": url, "detail": "high"}}));
        assert_eq!(size_of(&picture).num_images, 1);
        assert!(most(&picture) < 2_000, "{}", most(&picture));
        for hidden in [
            user(json!({"type": "image_url", "image_url": {"url": url, "detail": text}})),
            user(json!({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}, "more": text})),
            user(json!({"type": "image_url", "image_url": {"url": text}})),
            user(json!({"type": "text", "text": "", "image_url": {"url": url}})),
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"image_url": {"description": text}}}}}]}),
            json!({"image_url": {"url": url}}),
            json!({"messages": [{"role": "user", "image_url": {"url": url}}]}),
        ] {
            assert!(most(&hidden) > 100_000, "{} of {}", most(&hidden), hidden.to_string().len());
        }
    }

    #[test]
    fn a_schema_counts_as_it_is_written_out() {
        for schema in [
            json!(vec![json!({}); 1000]),
            json!({"enum": [1.234_567_890_123_456_7, "\u{1}\u{1}\u{1}", "\"\"\"\"\"", true, null]}),
        ] {
            let body = json!({"tools": [schema]});
            let written = schema.to_string().len() as u64;
            assert!(most(&body) >= written + 512, "{} for {written}", most(&body));
        }
    }

    #[test]
    fn documents_are_bounded_by_their_model_or_not_at_all() {
        let body = json!({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]});
        let mut model = ModelEntry::open("m");
        assert_eq!(max_prompt_tokens(size_of(&body), &model), None);
        model.max_input_tokens = Some(200_000);
        assert_eq!(max_prompt_tokens(size_of(&body), &model), Some(200_000));
    }
}
