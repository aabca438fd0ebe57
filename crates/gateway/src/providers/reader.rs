//! Understands one reply: whole, or event by event.
//!
//! What the providers differ in lies behind [`Wire`]; here is what they share: heads of chunks, the usage chunk, the
//! promise about endings. Knows no socket. Invariant: finish reasons are held back until [`AnswerReader::end`]; after an
//! error nothing else comes out.

use serde_json::{Map, Value};

use super::{
    Call, Secret,
    answer::{Answer, Choice, Chunk, ChunkChoice, Delta, Finish, Head, Shape},
    anthropic,
    chat::Delivery,
    error::{Cause, Spent, UpstreamError},
    gemini, openai_wire,
    reply::Reply,
    usage::Usage,
};

/// Most answers a reply may hold: 128 for each of 2048 prompts.
pub(crate) const MAX_CHOICES: usize = 128 * 2048;
/// Most calls in one turn.
pub(crate) const MAX_TOOL_CALLS: usize = 1024;
/// Text that is kept to see whether it is JSON.
const MAX_CHECKED_BYTES: usize = 16 << 20;

/// Of proxies before a server: request timeout, client closed request (nginx), gateway timeout, a timeout occurred (Cloudflare).
const GAVE_UP_WAITING: [u16; 4] = [408, 499, 504, 524];

/// One server-sent event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SseEvent {
    /// Its name; empty where it has none.
    pub event: String,
    /// Its data.
    pub data: String,
}

/// What the request said that matters for the answer.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) shape: Shape,
    pub(crate) model: String,
    pub(crate) created: i64,
    pub(crate) usage_chunk: UsageChunk,
    pub(crate) is_streamed: bool,
    pub(crate) max_prompt_tokens: u64,
    /// As the upstream was told.
    pub(crate) max_output_tokens: Option<u64>,
    pub(crate) secret: Option<Secret>,
}

/// Whether the client asked for the totals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UsageChunk {
    /// As a last chunk, and `null` in the others.
    Asked,
    /// Not at all.
    NotAsked,
}

impl UsageChunk {
    pub(crate) fn of(delivery: &Delivery) -> Self {
        match delivery {
            Delivery::Stream(options) if options.include_usage == Some(true) => Self::Asked,
            Delivery::Stream(_) | Delivery::Whole => Self::NotAsked,
        }
    }
}

impl Facts {
    pub(crate) fn of(call: &Call) -> Self {
        Self {
            shape: Shape::Chat,
            model: call.model.id.clone(),
            created: call.at.timestamp(),
            usage_chunk: UsageChunk::NotAsked,
            is_streamed: false,
            max_prompt_tokens: call.max_prompt_tokens,
            max_output_tokens: None,
            secret: call.endpoint.secret().cloned(),
        }
    }

    pub(crate) fn head(&self, id: &str) -> Head {
        Head { shape: self.shape, id: id.to_owned(), created: self.created, model: self.model.clone() }
    }

    /// Where nobody counted; an answer is no longer than the upstream was told.
    fn estimate(&self, answer_bytes: u64) -> Usage {
        let estimate = Usage::estimate(self.max_prompt_tokens, answer_bytes);
        let completion = estimate.completion.min(self.max_output_tokens.unwrap_or(u64::MAX));
        Usage { completion, ..estimate }
    }

    /// An error that the upstream reported.
    pub(crate) fn told(&self, cause: Cause, native: &super::error::Native) -> UpstreamError {
        UpstreamError::told(cause, native, self.secret.as_ref())
    }
}

/// The provider's own way to answer.
#[derive(Clone, Debug)]
pub(crate) enum Wire {
    OpenAi(Box<openai_wire::Reader>),
    Anthropic(Box<anthropic::Reader>),
    Gemini(Box<gemini::Reader>),
}

/// New pieces of an answer, before they get their head.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Piece {
    pub(crate) choices: Vec<ChunkChoice>,
    pub(crate) extra: Map<String, Value>,
}

impl Piece {
    pub(crate) fn of(index: u32, delta: Delta) -> Self {
        Self { choices: vec![ChunkChoice { index, delta, ..ChunkChoice::default() }], extra: Map::new() }
    }
}

/// What the provider says at its end mark.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ending {
    /// Every answer's end.
    pub(crate) choices: Vec<ChunkChoice>,
    /// Where it counted.
    pub(crate) usage: Option<Usage>,
    /// Its own `usage` object, where it is OpenAI's.
    pub(crate) usage_json: Option<Value>,
}

/// A stream that is complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// What is still to be sent: finish reasons, and the totals where asked for. `[DONE]` follows.
    pub chunks: Vec<Chunk>,
    /// What it used.
    pub usage: Usage,
}

/// Understands one reply.
#[derive(Clone, Debug)]
pub struct AnswerReader {
    facts: Facts,
    wire: Wire,
    state: State,
    answer_bytes: u64,
    /// Of a stream whose answer must be JSON.
    checked: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Ended,
    Failed,
}

impl AnswerReader {
    pub(crate) fn new(facts: Facts, wire: Wire) -> Self {
        let checked = wire.must_be_json().then(String::new);
        Self { facts, wire, state: State::Open, answer_bytes: 0, checked }
    }

    /// Of a reply to a request that carried another credential than the one it was made with.
    #[must_use]
    pub(crate) fn with_secret(mut self, secret: Option<Secret>) -> Self {
        self.facts.secret = secret;
        self
    }

    /// Whether the request asked for a stream.
    pub fn is_streamed(&self) -> bool {
        self.facts.is_streamed
    }

    /// Reads a reply that is not a stream: the answer, or what went wrong and what it cost. A success that is none costs
    /// what the upstream counted, or as much as it can.
    pub fn whole(&self, reply: &Reply) -> Result<Answer, UpstreamError> {
        let body = reply.json();
        if !(200..300).contains(&reply.status) {
            let error = self.wire.error(&self.facts, reply, body.as_ref());
            // Somebody in between has stopped waiting; who was asked may be at it still, and will bill it.
            let is_impatience = GAVE_UP_WAITING.contains(&reply.status);
            return Err(if is_impatience { error.having_spent(Spent::Unknown) } else { error });
        }
        let Some(body) = body else {
            let error = UpstreamError::new(Cause::Malformed, "the upstream's answer is not JSON");
            return Err(error.having_spent(Spent::Unknown));
        };
        let counted = self.wire.counted(&body);
        self.success(reply, body).map_err(|error| error.having_spent(counted))
    }

    fn success(&self, reply: &Reply, body: Value) -> Result<Answer, UpstreamError> {
        if body.get("error").is_some_and(|error| !error.is_null()) {
            return Err(self.wire.error(&self.facts, reply, Some(&body)));
        }
        let mut answer = match &self.wire {
            Wire::OpenAi(_) => openai_wire::whole(&self.facts, body),
            Wire::Anthropic(reader) => reader.whole(&self.facts, &body),
            Wire::Gemini(reader) => reader.whole(&self.facts, &body),
        }?;
        if answer.choices.is_empty() {
            return Err(UpstreamError::new(Cause::Malformed, "the upstream's answer has no choices"));
        }
        if self.checked.is_some() {
            for choice in answer.choices.iter().filter(|choice| ends_by_itself(&choice.finish)) {
                check_json(choice.message.content.as_deref().unwrap_or_default())?;
            }
        }
        if answer.usage == Usage::default() {
            let bytes: usize = answer.choices.iter().map(|choice| choice.message.num_bytes()).sum();
            answer.usage = self.facts.estimate(bytes as u64);
        }
        Ok(answer)
    }

    /// A whole answer in the pieces of a stream, for a client that waits for those.
    pub fn in_pieces(&self, answer: Answer) -> Ended {
        let Answer { head, choices, usage, usage_json, extra } = answer;
        let asked = self.facts.usage_chunk == UsageChunk::Asked;
        let chunk = |choices: Vec<ChunkChoice>| Chunk {
            head: head.clone(),
            choices,
            usage: asked.then_some(Value::Null),
            extra: extra.clone(),
        };
        let (texts, ends): (Vec<_>, Vec<_>) = choices.into_iter().map(Choice::in_pieces).unzip();
        let mut chunks: Vec<Chunk> = texts.into_iter().chain(ends).map(|piece| chunk(vec![piece])).collect();
        if asked {
            let usage = Some(usage_json.unwrap_or_else(|| usage.to_json()));
            chunks.push(Chunk { usage, ..chunk(Vec::new()) });
        }
        Ended { chunks, usage }
    }

    /// Reads one event of a stream.
    pub fn event(&mut self, event: &SseEvent) -> Result<Vec<Chunk>, UpstreamError> {
        if self.state != State::Open {
            // What follows an end mark is nobody's answer.
            return if self.state == State::Ended { Ok(Vec::new()) } else { Err(cut()) };
        }
        let pieces = match &mut self.wire {
            Wire::OpenAi(reader) => reader.event(&self.facts, event),
            Wire::Anthropic(reader) => reader.event(&self.facts, event),
            Wire::Gemini(reader) => reader.event(&self.facts, event),
        };
        let pieces = pieces.and_then(|pieces| self.account(&pieces).map(|()| pieces));
        match pieces {
            Ok(pieces) => {
                let id = self.wire.id();
                Ok(pieces.into_iter().map(|piece| self.chunk(&id, piece)).collect())
            }
            Err(error) => {
                self.state = State::Failed;
                Err(error)
            }
        }
    }

    /// Whether the provider's end mark has come, so that nothing need be waited for. Gemini has none: its streams just
    /// end.
    pub fn is_done(&self) -> bool {
        match &self.wire {
            Wire::OpenAi(reader) => reader.is_done(),
            Wire::Anthropic(reader) => reader.is_done(),
            Wire::Gemini(_) => false,
        }
    }

    /// The connection has ended in good order: was that the answer's end?
    pub fn end(&mut self) -> Result<Ended, UpstreamError> {
        if self.state != State::Open {
            return Err(cut());
        }
        let ended = match &mut self.wire {
            Wire::OpenAi(reader) => reader.end(),
            Wire::Anthropic(reader) => reader.end(),
            Wire::Gemini(reader) => reader.end(),
        };
        let ending = ended.and_then(|ending| self.check(&ending).map(|()| ending)).inspect_err(|_| {
            self.state = State::Failed;
        })?;
        self.state = State::Ended;
        let usage = ending.usage.unwrap_or_else(|| self.partial_usage());
        let id = self.wire.id();
        let mut chunks: Vec<Chunk> = ending
            .choices
            .into_iter()
            .map(|choice| self.chunk(&id, Piece { choices: vec![choice], extra: Map::new() }))
            .collect();
        if self.facts.usage_chunk == UsageChunk::Asked {
            let mut last = self.chunk(&id, Piece::default());
            last.usage = Some(ending.usage_json.unwrap_or_else(|| usage.to_json()));
            chunks.push(last);
        }
        Ok(Ended { chunks, usage })
    }

    /// What was used so far by the provider's own counts, else estimated: for a stream that was cut or given up.
    pub fn partial_usage(&self) -> Usage {
        let known = match &self.wire {
            Wire::OpenAi(reader) => reader.usage(),
            Wire::Anthropic(reader) => reader.usage(),
            Wire::Gemini(reader) => reader.usage(),
        };
        let estimate = self.facts.estimate(self.answer_bytes);
        match known {
            // Counts in the middle of a stream lag behind what came.
            Some(known) => Usage { completion: known.completion.max(estimate.completion), estimated: true, ..known },
            None => estimate,
        }
    }

    fn chunk(&self, id: &str, piece: Piece) -> Chunk {
        let usage = (self.facts.usage_chunk == UsageChunk::Asked).then_some(Value::Null);
        Chunk { head: self.facts.head(id), choices: piece.choices, usage, extra: piece.extra }
    }

    fn account(&mut self, pieces: &[Piece]) -> Result<(), UpstreamError> {
        for choice in pieces.iter().flat_map(|piece| &piece.choices) {
            debug_assert!(choice.finish.is_none(), "finish reasons come at the end");
            self.answer_bytes += choice.delta.num_bytes() as u64;
            if let (Some(checked), Some(content)) = (&mut self.checked, &choice.delta.content) {
                if checked.len() + content.len() > MAX_CHECKED_BYTES {
                    let message = format!("the upstream's JSON is longer than {MAX_CHECKED_BYTES} bytes");
                    return Err(UpstreamError::new(Cause::Unfit, message));
                }
                checked.push_str(content);
            }
        }
        Ok(())
    }

    fn check(&self, ending: &Ending) -> Result<(), UpstreamError> {
        match &self.checked {
            Some(text) if ending.choices.iter().filter_map(|choice| choice.finish.as_ref()).all(ends_by_itself) => {
                check_json(text)
            }
            _ => Ok(()),
        }
    }
}

impl Wire {
    fn id(&self) -> String {
        match self {
            Self::OpenAi(reader) => reader.id().to_owned(),
            Self::Anthropic(reader) => reader.id(),
            Self::Gemini(reader) => reader.id(),
        }
    }

    /// Whether the answer must be a JSON object that the provider does not promise.
    fn must_be_json(&self) -> bool {
        match self {
            Self::OpenAi(_) | Self::Gemini(_) => false,
            Self::Anthropic(reader) => reader.must_be_json(),
        }
    }

    /// What the provider counted in a whole answer, whatever else is wrong with it.
    fn counted(&self, body: &Value) -> Option<Usage> {
        match self {
            Self::OpenAi(_) => openai_wire::counted(body),
            Self::Anthropic(_) => anthropic::counted(body),
            Self::Gemini(_) => gemini::counted(body),
        }
    }

    fn error(&self, facts: &Facts, reply: &Reply, body: Option<&Value>) -> UpstreamError {
        match self {
            Self::OpenAi(_) => openai_wire::error(facts, reply, body),
            Self::Anthropic(_) => anthropic::error(facts, reply, body),
            Self::Gemini(_) => gemini::error(facts, reply, body),
        }
        .after_reply(reply)
    }
}

impl UpstreamError {
    /// With what the reply's headers say, unless the body said it already.
    fn after_reply(self, reply: &Reply) -> Self {
        let wait = self.retry_after.or_else(|| reply.retry_after());
        self.after(wait)
    }
}

/// A stream without its end.
pub(crate) fn cut() -> UpstreamError {
    UpstreamError::new(Cause::Cut, "the upstream's stream stopped before its end; what came is not the whole answer")
}

/// Something that is no part of this provider's wire.
pub(crate) fn malformed(what: &str) -> UpstreamError {
    UpstreamError::new(Cause::Malformed, format!("the upstream's answer cannot be read: {what}"))
}

/// Something that the provider's wire can carry, and that a model made of a request at its own pleasure.
pub(crate) fn unfit(what: &str) -> UpstreamError {
    UpstreamError::new(Cause::Unfit, format!("the upstream's answer cannot be used: {what}"))
}

fn ends_by_itself(finish: &Finish) -> bool {
    finish.reason == super::answer::FinishReason::Stop
}

fn check_json(text: &str) -> Result<(), UpstreamError> {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(_)) => Ok(()),
        Ok(_) | Err(_) => {
            Err(UpstreamError::new(Cause::Unfit, "the model was asked for a JSON object and gave something else"))
        }
    }
}
