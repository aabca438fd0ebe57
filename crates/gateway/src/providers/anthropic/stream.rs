//! Events of the Messages API, one by one.
//!
//! Blocks are numbered by the provider, calls by us: `tool_calls[].index` counts calls alone. Invariant: arguments of a
//! call are sent as they come; a call without any gets `{}` when its block stops; thoughts are kept with their signatures
//! and sent once, before the end.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    Format,
    answer::{answer_id, carried, read_usage, refusal, told},
};
use crate::providers::{
    answer::{ChunkChoice, Delta, Finish, ToolCallDelta},
    error::UpstreamError,
    reader::{Ending, Facts, MAX_TOOL_CALLS, Piece, SseEvent, cut, malformed, unfit},
    usage::Usage,
};

/// Blocks of one message, of all kinds.
const MAX_BLOCKS: usize = 4096;
/// Thoughts kept for the end of the stream.
const MAX_THOUGHT_BYTES: usize = 16 << 20;

/// Reads whole answers and streams.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    pub(super) format: Format,
    /// As on the wire: thoughts are bound to it.
    pub(super) model: String,
    id: String,
    usage: Option<Usage>,
    has_opened: bool,
    blocks: BTreeMap<u64, Block>,
    num_calls: u32,
    thoughts: Vec<Value>,
    thought_bytes: usize,
    finish: Option<Finish>,
    refusal: Option<String>,
    is_done: bool,
}

/// A block that has begun.
#[derive(Clone, Debug)]
enum Block {
    Text,
    Call {
        index: u32,
        has_arguments: bool,
    },
    /// A call whose input is the answer.
    Answer {
        has_arguments: bool,
    },
    Thought(Value),
    Other,
}

impl Reader {
    pub(super) fn new(format: Format, model: &str) -> Self {
        Self {
            format,
            model: model.to_owned(),
            id: String::new(),
            usage: None,
            has_opened: false,
            blocks: BTreeMap::new(),
            num_calls: 0,
            thoughts: Vec::new(),
            thought_bytes: 0,
            finish: None,
            refusal: None,
            is_done: false,
        }
    }

    pub(crate) fn id(&self) -> String {
        answer_id(&self.id)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.is_done
    }

    pub(crate) fn usage(&self) -> Option<Usage> {
        self.usage
    }

    pub(crate) fn must_be_json(&self) -> bool {
        self.format == Format::CheckedJson
    }

    pub(crate) fn event(&mut self, facts: &Facts, event: &SseEvent) -> Result<Vec<Piece>, UpstreamError> {
        if self.is_done || event.data.trim().is_empty() {
            return Ok(Vec::new());
        }
        let value: Value = serde_json::from_str(&event.data).map_err(|_| malformed("an event is not JSON"))?;
        let deltas = match value["type"].as_str().unwrap_or(&event.event) {
            "message_start" => self.start(&value["message"])?,
            "content_block_start" => self.block_start(&value)?,
            "content_block_delta" => self.block_delta(&value)?,
            "content_block_stop" => self.block_stop(&value)?,
            "message_delta" => {
                self.message_delta(&value);
                Vec::new()
            }
            "message_stop" => {
                self.is_done = true;
                self.last_deltas()
            }
            "error" => return Err(told(facts, None, Some(&value))),
            // `ping`, and what comes later.
            _ => Vec::new(),
        };
        Ok(deltas.into_iter().map(|delta| Piece::of(0, delta)).collect())
    }

    pub(crate) fn end(&mut self) -> Result<Ending, UpstreamError> {
        let Some(finish) = self.finish.take().filter(|_| self.is_done) else { return Err(cut()) };
        let choices = vec![ChunkChoice { index: 0, finish: Some(finish), ..ChunkChoice::default() }];
        Ok(Ending { choices, usage: self.usage, usage_json: None })
    }

    fn start(&mut self, message: &Value) -> Result<Vec<Delta>, UpstreamError> {
        if self.has_opened {
            return Err(malformed("a message began twice"));
        }
        self.has_opened = true;
        message["id"].as_str().unwrap_or_default().clone_into(&mut self.id);
        self.usage = Some(read_usage(&message["usage"], Usage::default()));
        Ok(vec![Delta { opens: true, content: Some(String::new()), ..Delta::default() }])
    }

    fn block_start(&mut self, value: &Value) -> Result<Vec<Delta>, UpstreamError> {
        let index = block_index(value)?;
        if !self.has_opened || self.blocks.contains_key(&index) || self.blocks.len() >= MAX_BLOCKS {
            return Err(malformed("a block began out of turn"));
        }
        let begun = &value["content_block"];
        let text = |name: &str| begun[name].as_str().unwrap_or_default().to_owned();
        let (block, deltas) = match begun["type"].as_str().unwrap_or_default() {
            "text" => (Block::Text, said(text("text"))),
            "thinking" => (Block::Thought(begun.clone()), thought(text("thinking"))),
            "redacted_thinking" => (Block::Thought(begun.clone()), Vec::new()),
            "tool_use" => match &self.format {
                Format::ForcedTool(name) if *name == text("name") => {
                    (Block::Answer { has_arguments: false }, Vec::new())
                }
                Format::ForcedTool(_) | Format::Text | Format::CheckedJson => {
                    let index = self.num_calls;
                    if index as usize >= MAX_TOOL_CALLS {
                        return Err(unfit("it has more tool calls than anyone runs"));
                    }
                    self.num_calls += 1;
                    let call = ToolCallDelta {
                        index,
                        id: Some(text("id")),
                        kind: Some("function".to_owned()),
                        name: Some(text("name")),
                        arguments: Some(String::new()),
                        ..ToolCallDelta::default()
                    };
                    (Block::Call { index, has_arguments: false }, vec![called(call)])
                }
            },
            _ => (Block::Other, Vec::new()),
        };
        self.blocks.insert(index, block);
        Ok(deltas)
    }

    fn block_delta(&mut self, value: &Value) -> Result<Vec<Delta>, UpstreamError> {
        let index = block_index(value)?;
        let delta = &value["delta"];
        let text = |name: &str| delta[name].as_str().unwrap_or_default().to_owned();
        let Some(block) = self.blocks.get_mut(&index) else {
            return Err(malformed("a block went on that had not begun"));
        };
        match (delta["type"].as_str().unwrap_or_default(), block) {
            ("text_delta", Block::Text) => Ok(said(text("text"))),
            ("input_json_delta", Block::Call { index, has_arguments }) => {
                let arguments = text("partial_json");
                if arguments.is_empty() {
                    return Ok(Vec::new());
                }
                *has_arguments = true;
                let (index, arguments) = (*index, Some(arguments));
                Ok(vec![called(ToolCallDelta { index, arguments, ..ToolCallDelta::default() })])
            }
            ("input_json_delta", Block::Answer { has_arguments }) => {
                let arguments = text("partial_json");
                *has_arguments |= !arguments.is_empty();
                Ok(said(arguments))
            }
            ("thinking_delta", Block::Thought(kept)) => {
                let more = text("thinking");
                self.thought_bytes += more.len();
                if self.thought_bytes > MAX_THOUGHT_BYTES {
                    return Err(unfit("its thoughts are longer than anything it could think"));
                }
                append(kept, "thinking", &more);
                Ok(thought(more))
            }
            ("signature_delta", Block::Thought(kept)) => {
                append(kept, "signature", &text("signature"));
                Ok(Vec::new())
            }
            // Citations, and what comes later.
            _ => Ok(Vec::new()),
        }
    }

    fn block_stop(&mut self, value: &Value) -> Result<Vec<Delta>, UpstreamError> {
        let index = block_index(value)?;
        let Some(block) = self.blocks.insert(index, Block::Other) else {
            return Err(malformed("a block stopped that had not begun"));
        };
        match block {
            Block::Call { index, has_arguments: false } => {
                let arguments = Some("{}".to_owned());
                Ok(vec![called(ToolCallDelta { index, arguments, ..ToolCallDelta::default() })])
            }
            Block::Answer { has_arguments: false } => Ok(said("{}".to_owned())),
            Block::Thought(kept) => {
                self.thoughts.push(kept);
                Ok(Vec::new())
            }
            Block::Call { .. } | Block::Answer { .. } | Block::Text | Block::Other => Ok(Vec::new()),
        }
    }

    fn message_delta(&mut self, value: &Value) {
        if let Some(stop) = value["delta"]["stop_reason"].as_str() {
            let finish = self.finish(stop);
            self.refusal = refusal(&finish, value["delta"].get("stop_details"));
            self.finish = Some(finish);
        }
        self.usage = Some(read_usage(&value["usage"], self.usage.unwrap_or_default()));
    }

    /// What goes out before the finish reason.
    fn last_deltas(&mut self) -> Vec<Delta> {
        let mut deltas = Vec::new();
        if !self.thoughts.is_empty() {
            let extra = carried(&self.model, &std::mem::take(&mut self.thoughts));
            deltas.push(Delta { extra, ..Delta::default() });
        }
        if let Some(refusal) = self.refusal.take() {
            deltas.push(Delta { refusal: Some(refusal), ..Delta::default() });
        }
        deltas
    }
}

fn said(text: String) -> Vec<Delta> {
    if text.is_empty() { Vec::new() } else { vec![Delta { content: Some(text), ..Delta::default() }] }
}

fn block_index(value: &Value) -> Result<u64, UpstreamError> {
    value["index"].as_u64().ok_or_else(|| malformed("a block has no `index`"))
}

fn thought(text: String) -> Vec<Delta> {
    if text.is_empty() { Vec::new() } else { vec![Delta { reasoning: Some(text), ..Delta::default() }] }
}

fn called(call: ToolCallDelta) -> Delta {
    Delta { tool_calls: vec![call], ..Delta::default() }
}

/// More of a text inside a kept block.
fn append(block: &mut Value, name: &str, more: &str) {
    let mut text = block[name].as_str().unwrap_or_default().to_owned();
    text.push_str(more);
    block[name] = json!(text);
}
