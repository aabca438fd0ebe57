//! Tools, the choice among them, and the shape of an answer.
//!
//! Knows no provider. Invariant: a named choice names a tool that was offered, so that no translation has to ask again.

use serde_json::{Map, Value, json};

use crate::providers::{
    fields::{Fields, Word, shorten, words, wrong_type},
    refusal::Refusal,
};

words! {
    /// How long a model thinks.
    pub enum Effort {
        /// Not at all.
        None = "none",
        /// Hardly.
        Minimal = "minimal",
        /// Little.
        Low = "low",
        /// The usual.
        Medium = "medium",
        /// Long.
        High = "high",
        /// Longer.
        XHigh = "xhigh",
        /// As long as it can.
        Max = "max",
    }
}

impl Effort {
    /// All words there are.
    pub fn words() -> impl Iterator<Item = &'static str> {
        <Self as Word>::ALL.iter().map(|effort| effort.as_str())
    }
}

words! {
    /// How fast an answer comes, at which price.
    pub enum ServiceTier {
        /// What the account says.
        Auto = "auto",
        /// The list price.
        Default = "default",
        /// Slower, cheaper.
        Flex = "flex",
        /// Capacity bought ahead.
        Scale = "scale",
        /// Faster, dearer.
        Priority = "priority",
        /// A newer word for the same.
        Fast = "fast",
    }
}

words! {
    /// How much a model says.
    pub(crate) enum Verbosity {
        /// Little.
        Low = "low",
        /// The usual.
        Medium = "medium",
        /// Much.
        High = "high",
    }
}

/// Something a model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// What it is.
    pub kind: ToolKind,
    /// Fields not known here.
    pub extra: Map<String, Value>,
}

/// Kinds of tools.
#[derive(Clone, Debug, PartialEq)]
pub enum ToolKind {
    /// A function with JSON arguments.
    Function {
        /// Its name.
        name: String,
        /// For the model.
        description: Option<String>,
        /// JSON schema of its arguments.
        parameters: Option<Map<String, Value>>,
        /// Whether arguments must follow the schema.
        strict: Option<bool>,
    },
    /// A tool that takes free text, or text of a grammar.
    Custom {
        /// Its name.
        name: String,
        /// All of its object.
        custom: Map<String, Value>,
    },
}

impl Tool {
    /// What a choice calls it.
    pub fn name(&self) -> &str {
        match &self.kind {
            ToolKind::Function { name, .. } | ToolKind::Custom { name, .. } => name,
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let mut map = Map::new();
        match &self.kind {
            ToolKind::Function { name, description, parameters, strict } => {
                let mut inner = Map::new();
                inner.insert("name".to_owned(), name.as_str().into());
                if let Some(description) = description {
                    inner.insert("description".to_owned(), description.as_str().into());
                }
                if let Some(parameters) = parameters {
                    inner.insert("parameters".to_owned(), Value::Object(parameters.clone()));
                }
                if let Some(strict) = strict {
                    inner.insert("strict".to_owned(), (*strict).into());
                }
                map.insert("type".to_owned(), "function".into());
                map.insert("function".to_owned(), Value::Object(inner));
            }
            ToolKind::Custom { custom, .. } => {
                map.insert("type".to_owned(), "custom".into());
                map.insert("custom".to_owned(), Value::Object(custom.clone()));
            }
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }
}

words! {
    /// Whether to call.
    pub enum Mode {
        /// Never.
        None = "none",
        /// As the model sees fit.
        Auto = "auto",
        /// At least one.
        Required = "required",
    }
}

/// What is to be called.
#[derive(Clone, Debug, PartialEq)]
pub enum ToolChoice {
    /// In general.
    Mode(Mode),
    /// This function.
    Function(String),
    /// This free-text tool.
    Custom(String),
    /// Among these alone.
    Allowed {
        /// `auto` or `required`.
        mode: Mode,
        /// Their names.
        names: Vec<String>,
    },
}

impl ToolChoice {
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Mode(mode) => mode.as_str().into(),
            Self::Function(name) => json!({"type": "function", "function": {"name": name}}),
            Self::Custom(name) => json!({"type": "custom", "custom": {"name": name}}),
            Self::Allowed { mode, names } => {
                let tools: Vec<Value> =
                    names.iter().map(|name| json!({"type": "function", "function": {"name": name}})).collect();
                json!({"type": "allowed_tools", "allowed_tools": {"mode": mode.as_str(), "tools": tools}})
            }
        }
    }
}

/// The shape of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema(Box<JsonSchema>),
}

/// `json_schema`.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonSchema {
    /// What the caller calls it.
    pub name: String,
    /// For the model.
    pub description: Option<String>,
    /// The schema.
    pub schema: Option<Map<String, Value>>,
    /// Whether the answer must follow it.
    pub strict: Option<bool>,
}

impl ResponseFormat {
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Text => json!({"type": "text"}),
            Self::JsonObject => json!({"type": "json_object"}),
            Self::JsonSchema(format) => {
                let mut inner = Map::new();
                inner.insert("name".to_owned(), format.name.as_str().into());
                if let Some(description) = &format.description {
                    inner.insert("description".to_owned(), description.as_str().into());
                }
                if let Some(schema) = &format.schema {
                    inner.insert("schema".to_owned(), Value::Object(schema.clone()));
                }
                if let Some(strict) = format.strict {
                    inner.insert("strict".to_owned(), strict.into());
                }
                json!({"type": "json_schema", "json_schema": inner})
            }
        }
    }
}

pub(super) fn read_tools(fields: &mut Fields) -> Result<Vec<Tool>, Refusal> {
    let list = fields.list("tools")?.unwrap_or_default();
    list.into_iter().enumerate().map(|(index, tool)| read_tool(tool, format!("tools[{index}]"))).collect()
}

fn read_tool(value: Value, path: String) -> Result<Tool, Refusal> {
    let mut fields = Fields::object(value, path)?;
    let kind = match fields.required_text("type")?.as_str() {
        "function" => {
            let mut inner = fields.required_nested("function")?;
            ToolKind::Function {
                name: inner.required_text("name")?,
                description: inner.text("description")?,
                parameters: inner.free_object("parameters")?,
                strict: inner.flag("strict")?,
            }
        }
        "custom" => {
            let mut inner = fields.required_nested("custom")?;
            let name = inner.required_text("name")?;
            let mut custom = Map::new();
            custom.insert("name".to_owned(), name.as_str().into());
            custom.extend(inner.rest());
            ToolKind::Custom { name, custom }
        }
        other => {
            let message = format!("`{}` is not `function` or `custom`", shorten(other));
            return Err(Refusal::invalid(fields.path("type"), message));
        }
    };
    Ok(Tool { kind, extra: fields.rest() })
}

pub(super) fn read_tool_choice(fields: &mut Fields, tools: &[Tool]) -> Result<Option<ToolChoice>, Refusal> {
    const PARAM: &str = "tool_choice";
    let choice = match fields.value(PARAM) {
        None => return Ok(None),
        Some(Value::String(word)) => {
            let mode = <Mode as crate::providers::fields::Word>::from_word(&word)
                .ok_or_else(|| crate::providers::fields::unknown_word::<Mode>(PARAM.to_owned(), &word))?;
            ToolChoice::Mode(mode)
        }
        Some(value @ Value::Object(_)) => read_named_choice(Fields::object(value, PARAM.to_owned())?)?,
        Some(other) => return Err(wrong_type(PARAM.to_owned(), "a string or an object", &other)),
    };
    let names: Vec<&str> = match &choice {
        ToolChoice::Mode(Mode::None | Mode::Auto) => return Ok(Some(choice)),
        ToolChoice::Mode(Mode::Required) => {
            if tools.is_empty() {
                return Err(Refusal::invalid(PARAM, "`required` needs `tools` beside it"));
            }
            return Ok(Some(choice));
        }
        ToolChoice::Function(name) | ToolChoice::Custom(name) => vec![name],
        ToolChoice::Allowed { names, .. } => names.iter().map(String::as_str).collect(),
    };
    match names.iter().find(|name| !tools.iter().any(|tool| tool.name() == **name)) {
        Some(name) => Err(Refusal::invalid(PARAM, format!("`{}` is not among `tools`", shorten(name)))),
        None => Ok(Some(choice)),
    }
}

fn read_named_choice(mut fields: Fields) -> Result<ToolChoice, Refusal> {
    match fields.required_text("type")?.as_str() {
        "function" => Ok(ToolChoice::Function(fields.required_nested("function")?.required_text("name")?)),
        "custom" => Ok(ToolChoice::Custom(fields.required_nested("custom")?.required_text("name")?)),
        "allowed_tools" => {
            let mut inner = fields.required_nested("allowed_tools")?;
            let mode: Mode = inner.word("mode")?.ok_or_else(|| inner.missing("mode"))?;
            if mode == Mode::None {
                return Err(Refusal::invalid(inner.path("mode"), "`none` is none of `auto`, `required`"));
            }
            let list = inner.list("tools")?.ok_or_else(|| inner.missing("tools"))?;
            let path = inner.path("tools");
            let names = list.into_iter().enumerate().map(|(index, tool)| {
                let mut tool = Fields::object(tool, format!("{path}[{index}]"))?;
                tool.required_nested("function")?.required_text("name")
            });
            Ok(ToolChoice::Allowed { mode, names: names.collect::<Result<_, _>>()? })
        }
        other => {
            let message = format!("`{}` is not `function`, `custom` or `allowed_tools`", shorten(other));
            Err(Refusal::invalid(fields.path("type"), message))
        }
    }
}

pub(super) fn read_response_format(fields: &mut Fields) -> Result<Option<ResponseFormat>, Refusal> {
    let Some(mut format) = fields.nested("response_format")? else { return Ok(None) };
    match format.required_text("type")?.as_str() {
        "text" => Ok(Some(ResponseFormat::Text)),
        "json_object" => Ok(Some(ResponseFormat::JsonObject)),
        "json_schema" => {
            let mut inner = format.required_nested("json_schema")?;
            Ok(Some(ResponseFormat::JsonSchema(Box::new(JsonSchema {
                name: inner.required_text("name")?,
                description: inner.text("description")?,
                schema: inner.free_object("schema")?,
                strict: inner.flag("strict")?,
            }))))
        }
        other => {
            let message = format!("`{}` is not `text`, `json_object` or `json_schema`", shorten(other));
            Err(Refusal::invalid(format.path("type"), message))
        }
    }
}
