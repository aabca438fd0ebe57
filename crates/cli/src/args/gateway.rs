//! The verbs of the gateway: `keys`, `costs`, `route`, `audit`. They work on a config file and its store, with or without
//! a running server. It must not open anything.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use super::{parse_duration, parse_name};

/// The config file, which names the store, the tenants and the log.
#[derive(Args, Clone, Debug)]
pub(crate) struct ConfigArg {
    /// Config file (TOML) whose `[store]`, tenants and rules count
    #[arg(long, global = true, value_name = "FILE", env = "BINDERY_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

/// `keys`
#[derive(Args, Debug)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    pub(crate) action: KeysAction,
    #[command(flatten)]
    pub(crate) config: ConfigArg,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysAction {
    /// Make a key for a tenant; it alone goes to stdout, and is shown this once
    Create(KeyCreateArgs),
    /// List keys: whose they are, and what opens and what does not
    List {
        /// JSON instead of the table
        #[arg(long)]
        json: bool,
    },
    /// End a key; every running server knows within a second
    Revoke {
        /// Of the key, as `keys list` shows it
        id: String,
    },
    /// Replace a key by a new one of the same tenant, name, limits and lists
    Rotate(KeyRotateArgs),
}

/// `keys create`
#[derive(Args, Debug)]
pub(crate) struct KeyCreateArgs {
    /// Whose key, as the config names the tenant
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(crate) tenant: String,
    /// What people call the key
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) name: String,
    /// How long it opens, like 90d [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) expires: Option<Duration>,
    /// Requests a minute by this key alone, beside the tenant's limit [default: no limit of its own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) requests_per_minute: Option<u64>,
    /// Tokens a minute, of prompts and answers, likewise
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) tokens_per_minute: Option<u64>,
    /// Requests at once, likewise
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) concurrent: Option<u32>,
    /// Models it may name or be sent to, of those the tenant may: names, or beginnings with * [default: all of the tenant's]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub(crate) models: Vec<String>,
    /// Adapters it may name, likewise [default: as --models says, since an adapter is a model's name]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub(crate) adapters: Vec<String>,
}

/// `keys rotate`
#[derive(Args, Debug)]
pub(crate) struct KeyRotateArgs {
    /// Of the old key, as `keys list` shows it
    pub(crate) id: String,
    /// How long the old key opens beside the new one
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_duration)]
    pub(crate) overlap: Duration,
    /// How long the new one opens, like 90d [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) expires: Option<Duration>,
}

/// `costs`
#[derive(Args, Debug)]
pub(crate) struct CostsArgs {
    /// What rows are grouped by
    #[arg(long, value_enum, value_name = "COLUMN,…", value_delimiter = ',', default_value = "tenant,model,day")]
    pub(crate) by: Vec<CostColumnArg>,
    /// First day, like 2026-11-28 (UTC) [default: the ledger's first]
    #[arg(long, value_name = "DAY")]
    pub(crate) from: Option<String>,
    /// Last day [default: today]
    #[arg(long, value_name = "DAY")]
    pub(crate) to: Option<String>,
    /// Only this tenant's requests
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(crate) tenant: Option<String>,
    /// JSON instead of the table
    #[arg(long, conflicts_with = "csv")]
    pub(crate) json: bool,
    /// CSV instead of the table
    #[arg(long)]
    pub(crate) csv: bool,
    #[command(flatten)]
    pub(crate) config: ConfigArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CostColumnArg {
    Tenant,
    Model,
    Day,
}

/// `route`
#[derive(Args, Debug)]
pub(crate) struct RouteArgs {
    #[command(subcommand)]
    pub(crate) action: RouteAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum RouteAction {
    /// Say where a request would go and why; nothing is sent
    Explain(Box<RouteExplainArgs>),
}

/// `route explain`
#[derive(Args, Debug)]
pub(crate) struct RouteExplainArgs {
    /// The body of a request to /v1/chat/completions or /v1/completions
    #[arg(value_name = "REQUEST.json")]
    pub(crate) request: PathBuf,
    /// Whose request [default: the config's only tenant]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(crate) tenant: Option<String>,
    /// The header x-bindery-task
    #[arg(long, value_name = "TASK")]
    pub(crate) task: Option<String>,
    /// The header x-bindery-privacy: it tightens the tenant's class and never loosens it
    #[arg(long, value_enum, value_name = "CLASS")]
    pub(crate) privacy: Option<PrivacyArg>,
    /// The predicted local time to the first token [default: not known, as no server is asked]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) ttft: Option<Duration>,
    /// Tokens of the prompt [default: by its bytes, as a server estimates]
    #[arg(long, value_name = "N")]
    pub(crate) prompt_tokens: Option<usize>,
    /// The moment that rules with a time of day see, like 2026-11-28T22:30:00Z [default: now]
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    pub(crate) at: Option<u64>,
    /// Where draws by weight fall, from 0 to 1
    #[arg(long, value_name = "N", default_value_t = 0.5, value_parser = parse_draw)]
    pub(crate) draw: f64,
    /// JSON instead of sentences
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) config: ConfigArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrivacyArg {
    LocalOnly,
    LocalFirst,
    Any,
}

/// `audit`
#[derive(Args, Debug)]
pub(crate) struct AuditArgs {
    #[command(subcommand)]
    pub(crate) action: AuditAction,
    #[command(flatten)]
    pub(crate) config: ConfigArg,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AuditAction {
    /// Read all of the log and say whether it is what was written: no edit, deletion, reordering or truncation
    Verify {
        /// JSON instead of sentences
        #[arg(long)]
        json: bool,
    },
    /// Write the log's requests to stdout, for other tools
    Export(AuditExportArgs),
    /// Begin a log anew whose folder was moved away; its first record says so
    ForgetHead {
        /// Why, for whoever reads the new log
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

/// `audit export`
#[derive(Args, Debug)]
pub(crate) struct AuditExportArgs {
    /// An object a line (what there is unless told otherwise)
    #[arg(long, conflicts_with = "csv")]
    pub(crate) json: bool,
    /// CSV with a header
    #[arg(long)]
    pub(crate) csv: bool,
    /// Only this tenant's requests
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(crate) tenant: Option<String>,
    /// Only the request of this id
    #[arg(long, value_name = "ID")]
    pub(crate) request_id: Option<String>,
    /// Not before this time, like 2026-11-28 or 2026-11-28T12:00:00Z (UTC)
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    pub(crate) from: Option<u64>,
    /// Before this time
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    pub(crate) until: Option<u64>,
    /// Also open prompts and answers that the log keeps encrypted, with the key that the config names
    #[arg(long)]
    pub(crate) contents: bool,
}

/// Seconds since 1970.
fn parse_moment(text: &str) -> Result<u64, String> {
    let whole = if text.len() == "2026-11-28".len() { format!("{text}T00:00:00Z") } else { text.to_owned() };
    let since = |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).ok();
    let parsed = humantime::parse_rfc3339_weak(&whole).ok().and_then(since);
    parsed.map(|since| since.as_secs()).ok_or_else(|| "expected a time like 2026-11-28T22:30:00Z".to_owned())
}

fn parse_draw(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}
