//! What an operator sets, and every bound of this crate in one place.
//!
//! No defaults for what has a flag: `cli` chooses. Keys never show in `Debug`.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bindery_engine::adapters::AdapterRoots;
use bindery_gateway::gateway::Gateway;

/// What the server is told at start.
#[derive(Clone)]
pub struct ServerConfig {
    /// First is the one `/v1/models` lists first; all name the base model.
    pub served_model_names: Vec<String>,
    /// With no key here and none of a tenant, model routes are open.
    pub api_keys: Vec<String>,
    /// Who has keys of its own: it sees its own adapters besides everybody's.
    pub tenants: Vec<Tenant>,
    /// For the routes that change the server. It opens no model route.
    pub admin_key: Option<String>,
    /// `--max-body-size`: largest request body.
    pub max_body_bytes: usize,
    /// How long running requests may go on after the signal to stop.
    pub shutdown_timeout: Duration,
    /// sha256 of the weights, from the card, for `/v1/models`.
    pub digest: Arc<OnceLock<String>>,
    /// The weights' licence, from the card, for `/v1/models`.
    pub license: Option<String>,
    /// Where adapters may be loaded from at run time.
    pub adapter_roots: AdapterRoots,
    /// Who may ask for what, where else it may run, what it costs; None: everything is local and nobody is counted.
    pub gateway: Option<Gateway>,
}

/// A tenant, as far as this version knows one.
#[derive(Clone)]
pub struct Tenant {
    /// As adapters name it.
    pub name: String,
    /// Each opens the model routes in its name.
    pub api_keys: Vec<String>,
}

impl fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("ServerConfig")
            .field("served_model_names", &self.served_model_names)
            .field("num_api_keys", &self.api_keys.len())
            .field("tenants", &self.tenants.iter().map(|tenant| &tenant.name).collect::<Vec<_>>())
            .field("has_admin_key", &self.admin_key.is_some())
            .field("max_body_bytes", &self.max_body_bytes)
            .field("shutdown_timeout", &self.shutdown_timeout)
            .field("digest", &self.digest)
            .field("license", &self.license)
            .field("adapter_roots", &self.adapter_roots)
            .field("gateway", &self.gateway)
            .finish()
    }
}

impl ServerConfig {
    /// The name that stands for the model where a request names none, and in the metrics.
    pub(crate) fn primary_model_name(&self) -> &str {
        self.served_model_names.first().map_or("model", String::as_str)
    }
}

/// Every bound of this crate, and what happens at it.
#[derive(Clone, Debug)]
pub struct Limits {
    /// A larger body is refused with 413; it is never held in memory.
    pub max_body_bytes: usize,
    /// Bytes of a refused body that are read and dropped, so that the client can finish writing and see the answer;
    /// after them the connection closes.
    pub max_discarded_bytes: usize,
    /// A body that has not arrived by then is refused with 408.
    pub body_read_timeout: Duration,
    /// A larger body is parsed on a blocking thread, so that others' streams do not wait for it.
    pub max_inline_parse_bytes: usize,
    /// Large bodies parsed at one time; as many conversations rendered, and texts tokenised for `/tokenize`. More wait their
    /// turn.
    pub max_blocking_jobs: usize,
    /// More prompts in one request are refused with 400.
    pub max_prompts: usize,
    /// More choices (prompts times `n`, or times `best_of`) in one request are refused with 400.
    pub max_choices: usize,
    /// More log-probabilities of prompt tokens in one answer (tokens times choices times `logprobs` + 1) are refused with
    /// 400: they are held until the answer is whole.
    pub max_prompt_scores: usize,
    /// A longer `timeout_s` of `/v1/unload_lora_adapter` is refused with 400.
    pub max_unload_timeout: Duration,
    /// More messages in one conversation are refused with 400.
    pub max_messages: usize,
    /// A longer text given to `/tokenize` or rendered for it, or more tokens given to `/detokenize` than this many
    /// bytes could be, are refused with 400.
    pub max_tokenize_bytes: usize,
    /// A longer `x-request-timeout` is refused with 400.
    pub max_request_timeout: Duration,
    /// Further connections wait in the system's backlog until one ends.
    pub max_connections: usize,
    /// A connection whose next request head has not arrived whole by then is closed; an idle one, too.
    pub header_read_timeout: Duration,
    /// A larger request head is refused with 431.
    pub max_head_bytes: usize,
    /// A connection that takes no byte of its response for so long is closed.
    pub write_timeout: Duration,
    /// After the shutdown timeout: time to write out the error events, and then again to close the connections.
    pub flush_timeout: Duration,
}

impl Limits {
    /// The bounds `run` uses.
    pub fn new(config: &ServerConfig) -> Self {
        Self {
            max_body_bytes: config.max_body_bytes,
            max_discarded_bytes: 64 << 20,
            body_read_timeout: Duration::from_mins(1),
            max_inline_parse_bytes: 256 << 10,
            max_blocking_jobs: 4,
            max_prompts: 1024,
            max_choices: 1024,
            max_prompt_scores: 1 << 19,
            max_unload_timeout: Duration::from_hours(1),
            max_messages: 16384,
            max_tokenize_bytes: 4 << 20,
            max_request_timeout: Duration::from_hours(24),
            max_connections: 4096,
            header_read_timeout: Duration::from_secs(75),
            max_head_bytes: 64 << 10,
            write_timeout: Duration::from_mins(1),
            flush_timeout: Duration::from_secs(1),
        }
    }
}
