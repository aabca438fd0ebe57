//! From the wire's three ways to ask for a form of the answer (OpenAI's `response_format`, vLLM's `structured_outputs`
//! and its older `guided_…`) to one grammar.
//!
//! Whether a schema or grammar is usable is the engine's to say; here is only which one is meant.

use std::sync::Arc;

use bindery_engine::Grammar;
use bindery_protocol::{
    json::FreeValue,
    openai::{ResponseFormat, SamplingFields, StructuredOutputs},
};
use serde_json::Value;

use crate::error::{ApiError, quote};

/// The grammar, and the field to name where it is unusable.
pub(crate) type Wanted = (Arc<Grammar>, &'static str);

/// What the request asks for, if it asks for a form at all.
pub(crate) fn grammar(fields: &mut SamplingFields) -> Result<Option<Wanted>, ApiError> {
    let mut wanted: Vec<(Grammar, &'static str)> = Vec::new();
    if let Some(format) = fields.response_format.take() {
        wanted.extend(of_response_format(format)?.map(|grammar| (grammar, "response_format")));
    }
    if let Some(outputs) = fields.structured_outputs.take() {
        wanted.push((of_structured_outputs(outputs)?, "structured_outputs"));
    }
    if let Some(FreeValue(schema)) = fields.guided_json.take() {
        wanted.push((json_schema("guided_json", schema, &Whitespace::Any)?, "guided_json"));
    }
    wanted.extend(fields.guided_regex.take().map(|source| (Grammar::Regex(source), "guided_regex")));
    wanted.extend(fields.guided_choice.take().map(|choices| (Grammar::Choice(choices), "guided_choice")));
    wanted.extend(fields.guided_grammar.take().map(|source| (Grammar::Lark(source), "guided_grammar")));
    match &wanted[..] {
        [(_, first), (_, second), ..] => Err(ApiError::invalid(
            *second,
            format!("{first} and {second} each ask for a form of the answer: leave one of them out"),
        )),
        _ => Ok(wanted.pop().map(|(grammar, param)| (Arc::new(grammar), param))),
    }
}

fn of_response_format(format: ResponseFormat) -> Result<Option<Grammar>, ApiError> {
    match (format.kind.as_str(), format.json_schema) {
        ("text", _) => Ok(None),
        ("json_object", _) => Ok(Some(Grammar::json_object())),
        ("json_schema", Some(format)) => match format.schema {
            Some(FreeValue(schema)) => {
                Ok(Some(json_schema("response_format.json_schema.schema", schema, &Whitespace::Any)?))
            }
            None => Err(ApiError::invalid(
                "response_format.json_schema.schema",
                "response_format.json_schema.schema is missing: give the JSON schema, or use json_object for any object",
            )),
        },
        ("json_schema", None) => Err(ApiError::invalid(
            "response_format.json_schema",
            "response_format.json_schema is missing: give {\"name\": …, \"schema\": …}",
        )),
        ("structural_tag", _) => Err(ApiError::unsupported(
            "response_format",
            "response_format structural_tag is not supported: use text, json_object or json_schema",
        )),
        (other, _) => Err(ApiError::invalid(
            "response_format.type",
            format!("response_format.type is {}, it must be text, json_object or json_schema", quote(other)),
        )),
    }
}

fn of_structured_outputs(outputs: StructuredOutputs) -> Result<Grammar, ApiError> {
    for (param, present) in [
        ("structured_outputs.structural_tag", outputs.structural_tag.is_some()),
        ("structured_outputs.disable_additional_properties", outputs.disable_additional_properties == Some(true)),
    ] {
        if present {
            let hint = "say it in the schema, or leave it out";
            return Err(ApiError::unsupported(param, format!("{param} is not supported: {hint}")));
        }
    }
    let whitespace = match (outputs.disable_any_whitespace, outputs.whitespace_pattern) {
        (Some(true), _) => Whitespace::None,
        (_, Some(pattern)) => Whitespace::Pattern(pattern),
        _ => Whitespace::Any,
    };
    let wants_object = outputs.json_object == Some(true);
    let mut wanted = Vec::new();
    if let Some(FreeValue(schema)) = outputs.json {
        wanted.push(json_schema("structured_outputs.json", schema, &whitespace)?);
    } else if wants_object {
        wanted.push(json_schema("structured_outputs.json_object", serde_json::json!({"type": "object"}), &whitespace)?);
    }
    wanted.extend(outputs.regex.map(Grammar::Regex));
    wanted.extend(outputs.choice.map(Grammar::Choice));
    wanted.extend(outputs.grammar.map(Grammar::Lark));
    match (wanted.pop(), wanted.is_empty()) {
        (Some(grammar), true) => Ok(grammar),
        (None, _) => Err(ApiError::invalid(
            "structured_outputs",
            "structured_outputs asks for nothing: give one of json, json_object, regex, choice, grammar, or leave it out",
        )),
        (Some(_), false) => Err(ApiError::invalid(
            "structured_outputs",
            "structured_outputs has more than one of json, json_object, regex, choice and grammar: keep one of them",
        )),
    }
}

/// White space between the tokens of JSON.
enum Whitespace {
    Any,
    None,
    Pattern(String),
}

/// A schema as an object or, as vLLM takes it, as its text.
fn json_schema(param: &str, schema: Value, whitespace: &Whitespace) -> Result<Grammar, ApiError> {
    let mut schema = match schema {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::invalid(param.to_owned(), format!("{param} is no valid JSON: {error}")))?,
        other => other,
    };
    if let (Whitespace::Pattern(pattern), Some(schema)) = (whitespace, schema.as_object_mut()) {
        schema.insert("x-guidance".to_owned(), serde_json::json!({"whitespace_pattern": pattern}));
    }
    Ok(Grammar::JsonSchema { schema, any_whitespace: !matches!(whitespace, Whitespace::None) })
}
