//! OpenAI's API as Azure hosts it: other URLs, another header, a filter that reports.
//!
//! The deployment's name takes the model's place: in the body (v1) or in the path (dated). The filter's reports pass
//! through as fields of the answer. Invariant: a dated api-version gets no field that came after it.

use url::Url;

use super::{
    AzureForm, Call, ChatRequest, CompletionRequest, Refusal, Translated,
    openai::{self, Dialect},
};

/// The last dated version that is no preview. Those up to it do not know [`LATER_FIELDS`]; what previews after it know
/// is left to them.
const LAST_DATED_VERSION: &str = "2024-10-21";
/// Fields that came after it; from memory of the changelogs, not from a vendor's list.
const LATER_FIELDS: [&str; 8] = [
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "moderation",
    "verbosity",
    "service_tier",
    "prediction",
];

/// `POST chat/completions` of a deployment.
pub(super) fn chat(form: &AzureForm, call: &Call, request: &ChatRequest) -> Result<Translated, Refusal> {
    let mut translated = openai::chat_to(Dialect::Azure, call, request, path(form, call, &["chat", "completions"]))?;
    if let AzureForm::Dated { api_version } = form
        && api_version.get(..10).unwrap_or(api_version) <= LAST_DATED_VERSION
    {
        for field in LATER_FIELDS {
            if translated.body.shift_remove(field).is_some() {
                translated.warnings.drop(field);
            }
        }
    }
    Ok(translated)
}

/// `POST completions` of a deployment.
pub(super) fn completion(form: &AzureForm, call: &Call, request: &CompletionRequest) -> Result<Translated, Refusal> {
    openai::completion_parts(Dialect::Azure, call, request, path(form, call, &["completions"]))
}

/// The address may be the resource's, or end in `/openai` or `/openai/v1` as the SDKs' do.
fn path(form: &AzureForm, call: &Call, route: &[&str]) -> Url {
    let base = call.endpoint.base();
    let mut segments = base.segments();
    if segments.last() == Some(&"v1") {
        segments.pop();
    }
    if segments.last() == Some(&"openai") {
        segments.pop();
    }
    segments.push("openai");
    match form {
        AzureForm::V1 => segments.push("v1"),
        AzureForm::Dated { .. } => segments.extend(["deployments", call.model.wire_name.as_str()]),
    }
    let mut url = base.with_path(segments.into_iter().chain(route.iter().copied()));
    if let AzureForm::Dated { api_version } = form {
        url.query_pairs_mut().append_pair("api-version", api_version);
    }
    url
}
