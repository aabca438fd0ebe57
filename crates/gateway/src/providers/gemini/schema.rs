//! Which JSON schemas generateContent promises to follow.
//!
//! Its subset is smaller than OpenAI's. Where a caller said `strict`, a keyword outside it would be a promise nobody
//! keeps. Invariant: what is not known to be kept is named by its path.

use serde_json::{Map, Value};

/// Keywords it keeps, and those that only describe.
const KEPT: [&str; 22] = [
    "$schema",
    "$id",
    "$anchor",
    "$defs",
    "$ref",
    "type",
    "title",
    "description",
    "default",
    "enum",
    "format",
    "properties",
    "required",
    "additionalProperties",
    "propertyOrdering",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
    "anyOf",
];

/// The path of the first keyword that would not be kept.
pub(super) fn first_unkept(schema: &Map<String, Value>) -> Option<String> {
    in_schema(schema, "")
}

fn in_schema(schema: &Map<String, Value>, path: &str) -> Option<String> {
    schema.iter().find_map(|(name, value)| {
        let here = format!("{path}.{name}");
        if !KEPT.contains(&name.as_str()) {
            return Some(here);
        }
        match (name.as_str(), value) {
            // Names of properties and definitions are no keywords.
            ("properties" | "$defs", Value::Object(named)) => named.iter().find_map(|(name, inner)| {
                inner.as_object().and_then(|inner| in_schema(inner, &format!("{here}.{name}")))
            }),
            ("items" | "additionalProperties", Value::Object(inner)) => in_schema(inner, &here),
            ("prefixItems" | "anyOf", Value::Array(list)) => list.iter().enumerate().find_map(|(index, inner)| {
                inner.as_object().and_then(|inner| in_schema(inner, &format!("{here}[{index}]")))
            }),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn unkept(schema: &Value) -> Option<String> {
        first_unkept(schema.as_object().unwrap())
    }

    #[test]
    fn a_keyword_outside_the_subset_is_named_wherever_it_is() {
        assert_eq!(unkept(&json!({"type": "object", "properties": {"pattern": {"type": "string"}}})), None);
        let deep = json!({"properties": {"a": {"items": {"anyOf": [{"type": "null"}, {"pattern": "x"}]}}}});
        assert_eq!(unkept(&deep).unwrap(), ".properties.a.items.anyOf[1].pattern");
        assert_eq!(unkept(&json!({"$defs": {"b": {"minLength": 1}}})).unwrap(), ".$defs.b.minLength");
        assert_eq!(unkept(&json!({"allOf": []})).unwrap(), ".allOf");
    }
}
