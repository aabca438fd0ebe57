//! Any server with OpenAI's API: another Bindery, vLLM, llama.cpp, a proxy.
//!
//! Every field that came is passed on, vLLM's included: the server knows best what it takes. Invariant: the address is
//! what OpenAI's own SDK would be given; a bare host is taken to mean its `/v1`.

use url::Url;

use super::{
    Call, ChatRequest, CompletionRequest, Refusal, Translated,
    openai::{self, Dialect},
};

/// `POST /chat/completions`.
pub(super) fn chat(call: &Call, request: &ChatRequest) -> Result<Translated, Refusal> {
    openai::chat_to(Dialect::Compatible, call, request, path(call, &["chat", "completions"]))
}

/// `POST /completions`.
pub(super) fn completion(call: &Call, request: &CompletionRequest) -> Result<Translated, Refusal> {
    openai::completion_parts(Dialect::Compatible, call, request, path(call, &["completions"]))
}

fn path(call: &Call, route: &[&'static str]) -> Url {
    let base = call.endpoint.base();
    let mut segments = base.segments();
    if segments.is_empty() {
        segments.push("v1");
    }
    base.with_path(segments.into_iter().chain(route.iter().copied()))
}
