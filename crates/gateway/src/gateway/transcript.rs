//! What is kept of a prompt and its answer where the tenant's policy stores them, gathered on the answer's way to the client.
//!
//! Knows OpenAI's bodies as far as texts stand in them. Invariant: it never holds more than its bound of a prompt and of an
//! answer, however long they are, and counts what it leaves out.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Map, Value, json};

use crate::audit::Contents;

/// What an entry costs beside its text: many empty ones are bounded, too.
const ENTRY_BYTES: usize = 32;

/// Prompt and answer of one request. Clones are the same one.
#[derive(Clone)]
pub(super) struct Transcript(Arc<Mutex<Gathered>>);

struct Gathered {
    prompt: Bounded,
    answer: Room,
    choices: BTreeMap<u64, Choice>,
}

/// What a client got of one choice.
#[derive(Default)]
struct Choice {
    content: String,
    reasoning: String,
    refusal: String,
    /// By index: name and arguments.
    tool_calls: BTreeMap<u64, (String, String)>,
    finish_reason: Option<String>,
}

/// How much more is taken.
struct Room {
    left: usize,
    num_cut: u64,
}

impl Room {
    fn take(&mut self, into: &mut String, text: &str) {
        let end = text.floor_char_boundary(self.left);
        into.push_str(&text[..end]);
        self.left -= end;
        self.num_cut += (text.len() - end) as u64;
    }

    fn entry(&mut self) -> bool {
        let fits = self.left >= ENTRY_BYTES;
        self.left -= if fits { ENTRY_BYTES } else { 0 };
        fits
    }
}

/// Takes bytes up to a bound and counts the rest.
struct Bounded {
    bytes: Vec<u8>,
    max_bytes: usize,
    num_cut: u64,
}

impl Bounded {
    fn keep(&mut self, piece: &[u8]) {
        let taken = piece.len().min(self.max_bytes - self.bytes.len());
        self.bytes.extend_from_slice(&piece[..taken]);
        self.num_cut += (piece.len() - taken) as u64;
    }
}

impl io::Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.keep(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transcript {
    /// Of a request with this body, as its guardrails left it.
    pub(super) fn of(body: &Value, max_bytes: usize) -> Self {
        let mut prompt = Bounded { bytes: Vec::new(), max_bytes, num_cut: 0 };
        let written = match (body.get("messages"), body.get("prompt")) {
            (Some(messages), _) => serde_json::to_writer(&mut prompt, messages),
            (None, Some(Value::String(text))) => {
                prompt.keep(text.as_bytes());
                Ok(())
            }
            (None, Some(prompts)) => serde_json::to_writer(&mut prompt, prompts),
            (None, None) => Ok(()),
        };
        // Memory takes all that is written to it, and a parsed body can be written.
        debug_assert!(written.is_ok());
        let answer = Room { left: max_bytes, num_cut: 0 };
        Self(Arc::new(Mutex::new(Gathered { prompt, answer, choices: BTreeMap::new() })))
    }

    /// Adds a whole answer, or a chunk of a stream, as the client gets it.
    pub(super) fn add(&self, answer: &Value) {
        let mut gathered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for choice in answer.get("choices").and_then(Value::as_array).into_iter().flatten() {
            gathered.add(choice);
        }
    }

    /// All of it so far.
    pub(super) fn contents(&self) -> Contents {
        let gathered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Bounded { bytes, num_cut, .. } = &gathered.prompt;
        // A bound may cut a character in two.
        let whole = std::str::from_utf8(bytes).map_or_else(|error| error.valid_up_to(), str::len);
        Contents {
            prompt: String::from_utf8_lossy(&bytes[..whole]).into_owned(),
            answer: gathered.answer(),
            prompt_bytes_cut: num_cut + (bytes.len() - whole) as u64,
            answer_bytes_cut: gathered.answer.num_cut,
        }
    }
}

impl Gathered {
    fn add(&mut self, choice: &Value) {
        let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
        let room = &mut self.answer;
        if !self.choices.contains_key(&index) && !room.entry() {
            room.num_cut += choice.to_string().len() as u64;
            return;
        }
        let kept = self.choices.entry(index).or_default();
        let part = choice.get("message").or_else(|| choice.get("delta")).unwrap_or(choice);
        let text = |name: &str| part.get(name).and_then(Value::as_str).unwrap_or_default();
        room.take(&mut kept.content, text("content"));
        room.take(&mut kept.content, text("text"));
        // Two names of one thing, of which an answer has one or both.
        let reasoning = if text("reasoning_content").is_empty() { "reasoning" } else { "reasoning_content" };
        room.take(&mut kept.reasoning, text(reasoning));
        room.take(&mut kept.refusal, text("refusal"));
        let calls = part.get("tool_calls").and_then(Value::as_array);
        for (at, call) in calls.into_iter().flatten().enumerate() {
            let at = call.get("index").and_then(Value::as_u64).unwrap_or(at as u64);
            if !kept.tool_calls.contains_key(&at) && !room.entry() {
                room.num_cut += call.to_string().len() as u64;
                continue;
            }
            let (name, arguments) = kept.tool_calls.entry(at).or_default();
            let text = |place: &str| call.pointer(place).and_then(Value::as_str).unwrap_or_default();
            room.take(name, text("/function/name"));
            room.take(name, text("/custom/name"));
            room.take(arguments, text("/function/arguments"));
            room.take(arguments, text("/custom/input"));
        }
        if let Some(reason) = choice.get("finish_reason").and_then(Value::as_str) {
            kept.finish_reason = Some(reason.chars().take(ENTRY_BYTES).collect());
        }
    }

    /// The text where there is one and nothing else; else what each choice has.
    fn answer(&self) -> String {
        let mut choices = self.choices.iter();
        match (choices.next(), choices.next()) {
            (None, _) => String::new(),
            (Some((_, only)), None) if only.is_text() => only.content.clone(),
            _ => Value::Array(self.choices.iter().map(|(index, choice)| choice.to_json(*index)).collect()).to_string(),
        }
    }
}

impl Choice {
    fn is_text(&self) -> bool {
        self.reasoning.is_empty() && self.refusal.is_empty() && self.tool_calls.is_empty()
    }

    fn to_json(&self, index: u64) -> Value {
        let mut object = Map::from_iter([("index".to_owned(), json!(index))]);
        for (name, text) in [("content", &self.content), ("reasoning", &self.reasoning), ("refusal", &self.refusal)] {
            if !text.is_empty() {
                object.insert(name.to_owned(), json!(text));
            }
        }
        if !self.tool_calls.is_empty() {
            let calls = self.tool_calls.values().map(|(name, arguments)| json!({"name": name, "arguments": arguments}));
            object.insert("tool_calls".to_owned(), calls.collect());
        }
        if let Some(reason) = &self.finish_reason {
            object.insert("finish_reason".to_owned(), json!(reason));
        }
        Value::Object(object)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn delta(index: u64, delta: &Value) -> Value {
        json!({"choices": [{"index": index, "delta": delta, "finish_reason": null}]})
    }

    #[test]
    fn one_text_is_kept_as_it_is_whole_and_in_pieces() {
        let body = json!({"messages": [{"role": "user", "content": "who?"}], "model": "m"});
        let whole = Transcript::of(&body, 1000);
        whole.add(&json!({"choices": [{"index": 0, "message": {"content": "nobody"}, "finish_reason": "stop"}]}));
        let pieces = Transcript::of(&json!({"prompt": "who?"}), 1000);
        for piece in [json!({"role": "assistant"}), json!({"content": "no"}), json!({"content": "body"}), json!({})] {
            pieces.add(&delta(0, &piece));
        }
        assert_eq!(whole.contents().prompt, r#"[{"role":"user","content":"who?"}]"#);
        assert_eq!((whole.contents().answer.as_str(), pieces.contents().answer.as_str()), ("nobody", "nobody"));
        assert_eq!(pieces.contents().prompt, "who?");
        let completion = Transcript::of(&json!({"prompt": ["a", "b"]}), 1000);
        completion.add(&json!({"choices": [{"index": 0, "text": "x"}, {"index": 1, "text": "y"}]}));
        assert_eq!(completion.contents().prompt, r#"["a","b"]"#);
        let choices: Value = serde_json::from_str(&completion.contents().answer).unwrap();
        assert_eq!(choices, json!([{"index": 0, "content": "x"}, {"index": 1, "content": "y"}]));
    }

    #[test]
    fn calls_of_tools_are_joined_from_their_pieces() {
        let transcript = Transcript::of(&json!({}), 1000);
        let call =
            |index: u64, function: Value| delta(0, &json!({"tool_calls": [{"index": index, "function": function}]}));
        transcript.add(&delta(0, &json!({"reasoning_content": "hm", "reasoning": "hm"})));
        transcript.add(&call(0, json!({"name": "look", "arguments": ""})));
        transcript.add(&call(1, json!({"name": "go", "arguments": "{}"})));
        transcript.add(&call(0, json!({"arguments": "{\"at\":"})));
        transcript.add(&call(0, json!({"arguments": "1}"})));
        transcript.add(&json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}));
        let answer: Value = serde_json::from_str(&transcript.contents().answer).unwrap();
        let calls = json!([{"name": "look", "arguments": "{\"at\":1}"}, {"name": "go", "arguments": "{}"}]);
        assert_eq!(
            answer,
            json!([{"index": 0, "reasoning": "hm", "tool_calls": calls, "finish_reason": "tool_calls"}])
        );
    }

    proptest! {
        /// Whatever comes, and in whatever pieces: a beginning of each text, and the length of the rest.
        #[test]
        fn what_is_kept_and_what_is_cut_are_all_there_was(
            prompt in "\\PC{0,60}", pieces in prop::collection::vec("\\PC{0,20}", 0..8), max_bytes in 32_usize..80
        ) {
            let transcript = Transcript::of(&json!({"prompt": prompt}), max_bytes);
            for piece in &pieces {
                transcript.add(&delta(0, &json!({"content": piece})));
            }
            let contents = transcript.contents();
            let answer = pieces.concat();
            prop_assert!(contents.prompt.len() <= max_bytes && contents.answer.len() <= max_bytes);
            prop_assert!(prompt.starts_with(&contents.prompt));
            prop_assert_eq!(contents.prompt.len() as u64 + contents.prompt_bytes_cut, prompt.len() as u64);
            prop_assert_eq!(contents.answer.len() as u64 + contents.answer_bytes_cut, answer.len() as u64);
        }
    }
}
