//! A conversation as Anthropic and Gemini see one: instructions apart, turns that alternate, calls and their results
//! matched.
//!
//! Knows neither provider's field names. Invariant: two turns of one role never follow each other; every result names a
//! call made before it and stands at the front of the next user turn; every call has its result.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{
    Refusal, Warnings,
    chat::{AssistantTurn, AudioFormat, ChatRequest, Content, MessageBody, PartKind, ToolCallKind},
    fields::shorten,
    media::MediaUrl,
};

/// What is sent, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Conversation<'a> {
    /// All instructions, joined by newlines; empty: none.
    pub(crate) system: String,
    pub(crate) turns: Vec<Turn<'a>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Turn<'a> {
    User(Vec<UserPart<'a>>),
    Assistant(Vec<AssistantPart<'a>>),
}

/// One part of a user's turn, with its place in the request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct UserPart<'a> {
    pub(crate) kind: UserKind<'a>,
    pub(crate) param: String,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum UserKind<'a> {
    Text(&'a str),
    Image(MediaUrl<'a>),
    Audio {
        data: &'a str,
        format: AudioFormat,
    },
    File {
        data: MediaUrl<'a>,
        filename: Option<&'a str>,
    },
    /// A file that OpenAI keeps.
    FileId,
    ToolResult {
        id: &'a str,
        name: &'a str,
        text: String,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum AssistantPart<'a> {
    Text(&'a str),
    Call {
        id: &'a str,
        name: &'a str,
        arguments: Map<String, Value>,
        extra: &'a Map<String, Value>,
    },
    /// What a provider wants back: signed thoughts.
    Carried(&'a Map<String, Value>),
}

impl<'a> Conversation<'a> {
    /// Reads a request's messages. What is dropped on the way is named.
    pub(crate) fn of(request: &'a ChatRequest, warnings: &mut Warnings) -> Result<Self, Refusal> {
        let mut builder = Builder { conversation: Self::default(), calls: BTreeMap::new(), open: BTreeMap::new() };
        for (index, message) in request.messages.iter().enumerate() {
            let param = format!("messages[{index}]");
            if message.name.is_some() && !matches!(message.body, MessageBody::Function(_)) {
                warnings.drop("messages[].name");
            }
            for name in message.extra.keys() {
                warnings.drop(format!("messages[].{name}"));
            }
            builder.message(&message.body, &param, warnings)?;
        }
        builder.all_answered("messages")?;
        if builder.conversation.turns.is_empty() {
            return Err(Refusal::invalid("messages", "there are only instructions; send a user message, too"));
        }
        Ok(builder.conversation)
    }
}

struct Builder<'a> {
    conversation: Conversation<'a>,
    /// Every call so far: its name.
    calls: BTreeMap<&'a str, &'a str>,
    /// Those without a result, and where they were made.
    open: BTreeMap<&'a str, String>,
}

impl<'a> Builder<'a> {
    fn message(&mut self, body: &'a MessageBody, param: &str, warnings: &mut Warnings) -> Result<(), Refusal> {
        match body {
            MessageBody::Developer(content) | MessageBody::System(content) => {
                let text = content.text();
                if !text.is_empty() {
                    if !self.conversation.system.is_empty() {
                        self.conversation.system.push('\n');
                    }
                    self.conversation.system.push_str(&text);
                }
            }
            MessageBody::User(content) => {
                self.all_answered(param)?;
                let parts = user_parts(content, param, warnings);
                self.user(parts);
            }
            MessageBody::Assistant(turn) => {
                self.all_answered(param)?;
                self.assistant(turn, param)?;
            }
            MessageBody::Tool { tool_call_id, content } => {
                let Some((id, name)) = self.calls.get_key_value(tool_call_id.as_str()) else {
                    let message = format!("no call `{}` was made before it", shorten(tool_call_id));
                    return Err(Refusal::invalid(format!("{param}.tool_call_id"), message));
                };
                let (id, name) = (*id, *name);
                if self.open.remove(id).is_none() {
                    let message = format!("the call `{}` has its result already", shorten(tool_call_id));
                    return Err(Refusal::invalid(format!("{param}.tool_call_id"), message));
                }
                let kind = UserKind::ToolResult { id, name, text: content.text() };
                self.user(vec![UserPart { kind, param: format!("{param}.content") }]);
            }
            MessageBody::Function(_) => {
                return Err(Refusal::unsupported(
                    format!("{param}.role"),
                    "send the role `tool` with its `tool_call_id`",
                ));
            }
        }
        Ok(())
    }

    fn user(&mut self, parts: Vec<UserPart<'a>>) {
        if parts.is_empty() {
            return;
        }
        match self.conversation.turns.last_mut() {
            Some(Turn::User(before)) => before.extend(parts),
            Some(Turn::Assistant(_)) | None => self.conversation.turns.push(Turn::User(parts)),
        }
    }

    fn assistant(&mut self, turn: &'a AssistantTurn, param: &str) -> Result<(), Refusal> {
        if turn.audio.is_some() {
            return Err(Refusal::unsupported(format!("{param}.audio"), "send what was said as `content`"));
        }
        if turn.function_call.is_some() {
            return Err(Refusal::unsupported(format!("{param}.function_call"), "send it as `tool_calls`"));
        }
        let mut parts: Vec<AssistantPart> = turn.extra_content.iter().map(AssistantPart::Carried).collect();
        match &turn.content {
            Some(Content::Text(text)) => parts.push(AssistantPart::Text(text)),
            Some(Content::Parts(all)) => parts.extend(all.iter().filter_map(|part| match &part.kind {
                PartKind::Text(text) | PartKind::Refusal(text) => Some(AssistantPart::Text(text)),
                PartKind::Image { .. } | PartKind::Audio { .. } | PartKind::File { .. } => None,
            })),
            None => {}
        }
        parts.extend(turn.refusal.iter().map(|text| AssistantPart::Text(text)));
        parts.retain(|part| !matches!(part, AssistantPart::Text("")));
        for (index, call) in turn.tool_calls.iter().enumerate() {
            let param = format!("{param}.tool_calls[{index}]");
            let ToolCallKind::Function { name, arguments } = &call.kind else {
                return Err(Refusal::unsupported(format!("{param}.type"), "only calls of functions can be passed on"));
            };
            if self.calls.insert(&call.id, name).is_some() {
                let message = format!("the id `{}` stands for two calls", shorten(&call.id));
                return Err(Refusal::invalid(format!("{param}.id"), message));
            }
            self.open.insert(&call.id, param.clone());
            let arguments = read_arguments(arguments, &param)?;
            parts.push(AssistantPart::Call { id: &call.id, name, arguments, extra: &call.extra });
        }
        let says_nothing = parts.iter().all(|part| matches!(part, AssistantPart::Carried(_)));
        if says_nothing {
            return Ok(());
        }
        match self.conversation.turns.last_mut() {
            Some(Turn::Assistant(before)) => before.extend(parts),
            Some(Turn::User(_)) | None => self.conversation.turns.push(Turn::Assistant(parts)),
        }
        Ok(())
    }

    fn all_answered(&self, param: &str) -> Result<(), Refusal> {
        match self.open.iter().next() {
            None => Ok(()),
            Some((id, made)) => {
                let message = format!("the call `{}` of `{made}` needs a `tool` message with its result", shorten(id));
                Err(Refusal::invalid(param, message))
            }
        }
    }
}

fn user_parts<'a>(content: &'a Content, param: &str, warnings: &mut Warnings) -> Vec<UserPart<'a>> {
    let parts = match content {
        Content::Text(text) if text.is_empty() => return Vec::new(),
        Content::Text(text) => {
            return vec![UserPart { kind: UserKind::Text(text), param: format!("{param}.content") }];
        }
        Content::Parts(parts) => parts,
    };
    let mut found = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        for name in part.extra.keys() {
            warnings.drop(format!("messages[].content[].{name}"));
        }
        let kind = match &part.kind {
            PartKind::Text(text) | PartKind::Refusal(text) if text.is_empty() => continue,
            PartKind::Text(text) | PartKind::Refusal(text) => UserKind::Text(text),
            PartKind::Image { url, detail, .. } => {
                if detail.as_deref().is_some_and(|detail| detail != "auto") {
                    warnings.drop("messages[].content[].image_url.detail");
                }
                UserKind::Image(MediaUrl::parse(url))
            }
            PartKind::Audio { data, format, .. } => UserKind::Audio { data, format: *format },
            PartKind::File { file_data: Some(data), filename, .. } => {
                UserKind::File { data: MediaUrl::parse(data), filename: filename.as_deref() }
            }
            PartKind::File { file_data: None, .. } => UserKind::FileId,
        };
        found.push(UserPart { kind, param: format!("{param}.content[{index}]") });
    }
    found
}

/// OpenAI's arguments are text; elsewhere they are an object.
fn read_arguments(arguments: &str, param: &str) -> Result<Map<String, Value>, Refusal> {
    if arguments.trim().is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_str(arguments)
        .map_err(|_| Refusal::invalid(format!("{param}.function.arguments"), "it is not the text of a JSON object"))
}
