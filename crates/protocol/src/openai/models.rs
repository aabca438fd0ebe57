//! `GET /v1/models`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The models a caller may name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// The served base first.
    pub data: Vec<ModelCard>,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelCard {
    /// What `model` in a request says.
    pub id: String,
    /// `model`.
    pub object: String,
    /// Unix seconds: when this server began to serve it.
    pub created: u64,
    /// Who offers it.
    pub owned_by: String,
    /// The base model's id that this one names or stands on (vLLM).
    pub root: Option<String>,
    /// The base of an adapter (vLLM).
    pub parent: Option<String>,
    /// Prompt and generated tokens of one sequence (vLLM); of a model elsewhere its context, absent where nobody knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<usize>,
    /// sha256 of the weights, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The weights' licence, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
}
