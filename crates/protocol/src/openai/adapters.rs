//! `POST /v1/load_lora_adapter`, `/v1/unload_lora_adapter` (vLLM's) and `GET /v1/adapters` (ours).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An adapter to load.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct LoadAdapterRequest {
    /// What requests will call it.
    pub lora_name: String,
    /// A folder as peft saves it or a `.gguf` file, in one of the folders that are open to loading; a relative one is looked for
    /// in each of them.
    pub lora_path: String,
    /// Where the name is taken: a new version takes it over, and running requests finish on the old one.
    #[serde(default)]
    pub load_inplace: Option<bool>,
    /// Who may see it; absent: everyone, or in another's place those who might see that (ours).
    #[serde(default)]
    pub tenants: Option<Vec<String>>,
    /// Never gives way to others; absent: it may, or in another's place as that (ours).
    #[serde(default)]
    pub pinned: Option<bool>,
}

/// An adapter to let go.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct UnloadAdapterRequest {
    /// Of the adapter.
    pub lora_name: String,
    /// `wait` (the default): answers when the last request that uses it has ended. `refuse`: 409 where one does.
    #[serde(default)]
    pub mode: Option<String>,
    /// How long to wait; absent: as long as it takes.
    #[serde(default)]
    pub timeout_s: Option<f64>,
}

/// What was done.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct AdapterChanged {
    /// For people.
    pub message: String,
}

/// All adapters.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct AdapterList {
    /// `list`.
    pub object: String,
    /// In the order of their names; of each the newest version, then older ones that requests are finishing on.
    pub data: Vec<AdapterEntry>,
}

/// One adapter.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct AdapterEntry {
    /// What `model` in a request says.
    pub name: String,
    /// Counts from 1 with every load under this name; 0 before the first.
    pub version: u32,
    /// `disk`, `loading`, `host`, `resident` or `draining`.
    pub state: String,
    /// Where it came from.
    pub source: String,
    /// sha256 over its files as they were read.
    pub digest: Option<String>,
    /// Who may see it; null: everyone.
    pub tenants: Option<Vec<String>>,
    /// It never gives way to others.
    pub pinned: bool,
    /// Requests that hold it.
    pub users: usize,
    /// Memory of its weights.
    pub memory_bytes: u64,
    /// The largest rank of any matrix.
    pub rank: Option<usize>,
    /// For people: "query, value".
    pub targets: Option<String>,
    /// What it was trained over, as its files say; never compared.
    pub base_model_name_or_path: Option<String>,
    /// Why the last attempt to read it failed, where it did.
    pub failure: Option<String>,
}
