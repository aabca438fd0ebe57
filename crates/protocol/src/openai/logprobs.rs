//! Log-probabilities in the three shapes in use: chat's, completions', and vLLM's for prompts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `logprobs` of a chat choice.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry a token.
    pub content: Option<Vec<ChatTokenLogprob>>,
}

/// One token of a chat answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatTokenLogprob {
    /// Its text; half characters are replaced.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its text's bytes.
    pub bytes: Option<Vec<u8>>,
    /// The most likely tokens here, best first.
    pub top_logprobs: Vec<ChatTopLogprob>,
}

/// One of the most likely tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatTopLogprob {
    /// Its text; half characters are replaced.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its text's bytes.
    pub bytes: Option<Vec<u8>>,
}

/// `logprobs` of a completion choice: four lists of equal length, one entry a token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Where each token begins, in characters, counted from the start of the choice's text.
    pub text_offset: Vec<usize>,
    /// Its log-probability; null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The tokens.
    pub tokens: Vec<String>,
    /// The most likely tokens at each place.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
}

/// vLLM's `prompt_logprobs`: for each token of the prompt the candidates by token id; null for the first.
// Not an alias, which would stand in the API's description under the name of what it is an alias of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
pub struct PromptLogprobs(pub Vec<Option<BTreeMap<String, PromptLogprob>>>);

/// One candidate at one place of the prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PromptLogprob {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 is the most likely.
    pub rank: Option<u32>,
    /// Its text.
    pub decoded_token: Option<String>,
}
