//! What can be known of a request from its body, for the server and for `route explain` alike.
//!
//! Knows OpenAI's bodies as far as routing and bounds ask for them. Invariant: whoever asks gets what the server decides by.

use serde_json::{Map, Value};

use crate::{
    guardrails::{GuardrailConfig, GuardrailError, Policy, no_secrets},
    ledger::PromptSize,
    policy::{CannotTake, PrivacyClass, TenantRouting},
};

/// Parts of messages that carry something else than text.
const BEYOND_TEXT: [&str; 7] = ["image_url", "input_audio", "file", "video_url", "audio_url", "image", "audio"];

/// Everything that is text, names and schemas included; images are counted, not measured.
pub fn size_of(body: &Value) -> PromptSize {
    let num_messages = body.get("messages").and_then(Value::as_array).map_or(1, |messages| messages.len() as u64);
    let mut size = PromptSize { num_messages, ..PromptSize::default() };
    measure(body, &mut size);
    size
}

/// The parser has bounded the depth.
fn measure(value: &Value, size: &mut PromptSize) {
    match value {
        Value::String(text) => size.num_bytes += text.len() as u64,
        Value::Array(items) => items.iter().for_each(|item| measure(item, size)),
        Value::Object(map) => {
            for (name, value) in map {
                size.num_bytes += name.len() as u64;
                if name == "image_url" {
                    size.num_images += 1;
                } else {
                    measure(value, size);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => size.num_bytes += 8,
    }
}

/// Tokens of a prompt, by people's languages: decides where to, not what may be spent, which takes a bound.
pub fn estimated_tokens(size: PromptSize) -> usize {
    usize::try_from(size.num_bytes / 4).unwrap_or(usize::MAX)
}

/// Whether tools are offered.
pub fn has_tools(body: &Value) -> bool {
    body.get("tools").and_then(Value::as_array).is_some_and(|tools| !tools.is_empty())
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
