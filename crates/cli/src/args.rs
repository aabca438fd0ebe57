//! What can be typed. Flags hold an Option each: what is absent here may come from the config file or a default, and
//! [`crate::settings`] alone decides.

mod adapters;
mod gateway;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use bytesize::ByteSize;
use clap::{
    Args, CommandFactory as _, Parser, Subcommand, ValueEnum,
    builder::styling,
    error::{ContextKind, ContextValue},
};

use self::adapters::{AdapterArg, parse_adapter};
pub(crate) use self::adapters::{
    AdapterArgs, AdapterLoadArgs, AdapterUnloadArgs, AdaptersAction, AdaptersArgs, UnloadMode,
};
pub(crate) use self::gateway::{
    AuditAction, AuditArgs, AuditExportArgs, ConfigArg, CostColumnArg, CostsArgs, KeyCreateArgs, KeyRotateArgs,
    KeysAction, KeysArgs, PrivacyArg, RouteAction, RouteArgs, RouteExplainArgs,
};
use crate::config::tables::FileTables;

const STYLES: styling::Styles = styling::Styles::styled()
    .header(styling::AnsiColor::Green.on_default().bold())
    .usage(styling::AnsiColor::Green.on_default().bold())
    .literal(styling::AnsiColor::Cyan.on_default().bold())
    .placeholder(styling::AnsiColor::Cyan.on_default());

const MODEL_HELP: &str = "A card's name (`bindery models` lists them), org/repo[@revision][:file.gguf] on the hub, a folder with \
                          config.json and safetensors, or a .gguf file";

/// A self-hosted LLM inference server.
#[derive(Debug, Parser)]
#[command(name = "bindery", version, styles = STYLES, max_term_width = 110, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the server
    Serve(Box<ServeArgs>),
    /// Talk in the terminal, with a model in this process or with a running server
    Chat(Box<ChatArgs>),
    /// Load-test a server (or a model in this process) and print the table
    Bench(Box<BenchArgs>),
    /// Score a text: perplexity, and KL divergence to the same model in f32
    Perplexity(Box<PerplexityArgs>),
    /// Quantise a model ahead: a folder that loads at once
    Quantize(QuantizeArgs),
    /// Fetch a model's weights and print where they are
    Pull(PullArgs),
    /// List known models and what is cached
    Models(ModelsArgs),
    /// List, load and unload the adapters of a running server
    Adapters(AdaptersArgs),
    /// Make, list, replace and end tenants' keys
    Keys(KeysArgs),
    /// Say what requests cost, and what running them here has saved
    Costs(CostsArgs),
    /// Explain where requests run
    Route(RouteArgs),
    /// Check and export the audit log
    Audit(AuditArgs),
    /// Validate a config file, by the checks that `serve` starts with, and say what it means
    Check(CheckArgs),
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `serve`
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ServeArgs {
    #[arg(value_name = "MODEL", help = MODEL_HELP)]
    pub(crate) model: Option<String>,
    /// The same as MODEL
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "model")]
    pub(crate) model_flag: Option<String>,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) adapters: AdapterArgs,
    /// What has no flag: the tables of the config file.
    #[arg(skip)]
    pub(crate) tables: FileTables,
    /// Config file (TOML); `bindery check --explain` lists its keys. Flags and environment win over it
    #[arg(long, value_name = "FILE", env = "BINDERY_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

/// Flags of the HTTP side.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerArgs {
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, env = "BINDERY_HOST", value_parser = parse_host)]
    pub(crate) host: Option<String>,
    /// Port to listen on; 0 picks a free one [default: 8000]
    #[arg(long, env = "BINDERY_PORT")]
    pub(crate) port: Option<u16>,
    /// Name clients use for the model; repeatable, the first is listed first [default: the card's or repository's name]
    #[arg(long, value_name = "NAME", env = "BINDERY_SERVED_MODEL_NAME", value_delimiter = ',', value_parser = parse_name)]
    pub(crate) served_model_name: Vec<String>,
    /// Key that clients must send; repeatable, or comma-separated in the environment [default: none asked for]
    #[arg(long, value_name = "KEY", env = "BINDERY_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub(crate) api_key: Vec<String>,
    /// Key of the administration routes [default: they are closed]
    #[arg(long, value_name = "KEY", env = "BINDERY_ADMIN_KEY", hide_env_values = true)]
    pub(crate) admin_key: Option<String>,
    /// Largest request body, like 32MiB; a larger one is answered 413 [default: 10MiB]
    #[arg(long, value_name = "SIZE", env = "BINDERY_MAX_BODY_SIZE", value_parser = parse_size)]
    pub(crate) max_body_size: Option<ByteSize>,
    /// Form of the logs on stderr [default: text]
    #[arg(long, value_enum, env = "BINDERY_LOG_FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
    /// How long running requests may go on after SIGTERM or ctrl-c [default: 30s]
    #[arg(long, value_name = "TIME", env = "BINDERY_SHUTDOWN_TIMEOUT", value_parser = parse_duration)]
    pub(crate) shutdown_timeout: Option<Duration>,
}

/// Flags of the model and the engine.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model and engine")]
pub(crate) struct EngineArgs {
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    // Not a doc comment: to rustdoc the brackets would be a link.
    #[arg(long, env = "BINDERY_DEVICE", value_parser = parse_device,
        help = "Where to compute: auto, cpu or cuda[:N] [default: auto]")]
    pub(crate) device: Option<Device>,
    /// Tokens of prompt and answer together [default: the model's, or what fits]
    #[arg(long, value_name = "TOKENS", env = "BINDERY_MAX_MODEL_LEN", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_model_len: Option<u32>,
    /// Requests computed at once [default: 256]
    #[arg(long, value_name = "N", env = "BINDERY_MAX_NUM_SEQS", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) max_num_seqs: Option<u32>,
    /// Tokens computed in one step: longer prompts are computed in chunks of this size [default: 512]
    #[arg(long, value_name = "TOKENS", env = "BINDERY_MAX_NUM_BATCHED_TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) max_num_batched_tokens: Option<u32>,
    /// Long prompts beside running streams: even (they get as much of the time) or none (streams wait) [default: even]
    #[arg(long, value_enum, value_name = "PACING", env = "BINDERY_PREFILL_PACING")]
    pub(crate) prefill_pacing: Option<PrefillPacing>,
    /// Tokens in a block of the KV cache [default: 16]
    #[arg(long, value_name = "TOKENS", env = "BINDERY_BLOCK_SIZE", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) block_size: Option<u32>,
    /// Memory for the KV cache, like 4GiB [default: what is free, with a margin]
    #[arg(long, value_name = "SIZE", env = "BINDERY_KV_CACHE_MEMORY", value_parser = parse_size)]
    pub(crate) kv_cache_memory: Option<ByteSize>,
    /// Requests that may wait; more are answered 503 [default: 1024]
    #[arg(long, value_name = "N", env = "BINDERY_MAX_QUEUED_REQUESTS", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) max_queued_requests: Option<u32>,
    /// Adapters that one batch may mix; further ones wait in memory for a place [default: 8]
    #[arg(long, value_name = "N", env = "BINDERY_MAX_LORAS", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) max_loras: Option<u32>,
    /// Largest rank of an adapter; a larger one is refused [default: 64]
    #[arg(long, value_name = "RANK", env = "BINDERY_MAX_LORA_RANK", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) max_lora_rank: Option<u32>,
    /// Adapters in memory; further ones are read from disk when asked for [default: 64]
    #[arg(long, value_name = "N", env = "BINDERY_MAX_CPU_LORAS", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) max_cpu_loras: Option<u32>,
    /// Never touch the network
    #[arg(long, env = "BINDERY_OFFLINE", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub(crate) offline: Option<bool>,
}

/// How a model is read and computed with, whatever it is loaded for.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct LoadArgs {
    /// Type of dense weights and activations [default: auto: as stored]
    #[arg(long, value_enum, env = "BINDERY_DTYPE")]
    pub(crate) dtype: Option<DtypeArg>,
    /// Quantise dense weights at load; what is quantised in the file stays as it is [default: none: as stored]
    #[arg(long, value_enum, env = "BINDERY_QUANTIZE")]
    pub(crate) quantize: Option<QuantizeArg>,
    /// Type of the KV cache [default: auto: f32 under --dtype f32, else f16]
    #[arg(long, value_enum, env = "BINDERY_KV_CACHE_DTYPE")]
    pub(crate) kv_cache_dtype: Option<KvCacheDtypeArg>,
    /// Threads that compute [default: physical cores]
    #[arg(long, value_name = "N", env = "BINDERY_THREADS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// Where the weights come from; dummy: random ones of the model's shapes, for benchmarks [default: auto]
    #[arg(long, value_enum, env = "BINDERY_LOAD_FORMAT")]
    pub(crate) load_format: Option<LoadFormat>,
    /// Who computes: our kernels, or the slow and obviously right reference [default: cpu]
    #[arg(long, value_enum, env = "BINDERY_BACKEND")]
    pub(crate) backend: Option<BackendArg>,
}

/// `chat`
#[derive(Args, Debug)]
pub(crate) struct ChatArgs {
    #[arg(value_name = "MODEL", help = MODEL_HELP)]
    pub(crate) model: Option<String>,
    /// Talk to this server instead of loading the model here; MODEL is then its name there
    #[arg(long, env = "BINDERY_URL")]
    pub(crate) url: Option<String>,
    /// Key for --url
    #[arg(long, value_name = "KEY", env = "BINDERY_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    // Not a doc comment: to rustdoc the brackets would be a link.
    #[arg(long, value_name = "NAME=PATH", conflicts_with = "url", value_parser = parse_adapter,
        help = "Talk through this LoRA adapter: a folder as peft saves it, a .gguf file, or org/repo[@revision] on the hub")]
    pub(crate) adapter: Option<AdapterArg>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.7, value_parser = parse_temperature)]
    pub(crate) temperature: f32,
    /// Tokens of one answer [default: what fits the context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// Same seed, same answers
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// `bench`
#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
pub(crate) struct BenchArgs {
    #[arg(
        value_name = "MODEL",
        help = "Without --url: the model to load here. With --url: its name there [default: the first it lists]"
    )]
    pub(crate) model: Option<String>,
    /// The server to test, any that speaks OpenAI's API; without it a model is served in this process
    #[arg(long, env = "BINDERY_URL")]
    pub(crate) url: Option<String>,
    /// Spread the requests to the first server over these names in turns, its adapters' or the base's
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', requires = "url", conflicts_with = "model", value_parser = parse_name)]
    pub(crate) adapters: Vec<String>,
    /// Test a second server in turns with the first and print ratios
    #[arg(long, value_name = "OTHER_URL")]
    pub(crate) compare: Option<String>,
    /// Name of the model on the server of --compare [default: the first it lists]
    #[arg(long, value_name = "NAME", requires = "compare")]
    pub(crate) compare_model: Option<String>,
    /// Key sent to the servers
    #[arg(long, value_name = "KEY", env = "BINDERY_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Closed loop: this many clients, each sending its next request when its last is answered; a row each
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,32", conflicts_with = "rate",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) concurrency: Vec<u32>,
    /// Open loop: this many requests a second at random times (Poisson), answered or not; a row each
    #[arg(long, value_name = "R,…", value_delimiter = ',', value_parser = parse_rate)]
    pub(crate) rate: Vec<f64>,
    /// Requests in a round [default: twice the clients, at least 8; open loop: 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) num_requests: Option<u32>,
    /// Rounds of each row; their spread tells whether the figures can be trusted
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// Words in a prompt
    #[arg(long, value_name = "N", default_value_t = 110, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) input_words: u32,
    /// Tokens in an answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) output_tokens: u32,
    /// 0 always takes the likeliest token; most applications send none, which is 1
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = parse_temperature)]
    pub(crate) temperature: f32,
    /// Which route to test
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    pub(crate) endpoint: Endpoint,
    /// Let the model end its answers early; also for servers that refuse `ignore_eos`
    #[arg(long)]
    pub(crate) no_ignore_eos: bool,
    /// Of the prompts and the arrival times
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// A request that takes longer has failed
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
    /// Also print where the steps of the first server spent their time, a column a row; it must be a Bindery
    #[arg(long)]
    pub(crate) profile: bool,
    /// Also measure what this machine's memory and cores can do, and print the share that each part of a step reaches;
    /// for a model served in this process
    #[arg(long, conflicts_with = "url")]
    pub(crate) roofline: bool,
    /// JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// `perplexity`; what it shares with `serve` has the same names there.
#[derive(Args, Debug)]
pub(crate) struct PerplexityArgs {
    #[arg(value_name = "MODEL", help = MODEL_HELP)]
    pub(crate) model: Option<String>,
    /// The text (UTF-8)
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) file: PathBuf,
    /// Tokens in a window; those of its second half are scored
    #[arg(short, long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(8..))]
    pub(crate) ctx_size: u32,
    /// Windows to score; -1: all of the text's
    #[arg(long, value_name = "N", default_value = "-1", allow_negative_numbers = true, value_parser = parse_chunks)]
    pub(crate) chunks: Chunks,
    /// Also compare with a base (KL divergence and what goes with it) [default without a value: f32]
    #[arg(long, value_enum, value_name = "SETTING", num_args = 0..=1, require_equals = true, default_missing_value = "f32")]
    pub(crate) base: Option<BaseArg>,
    /// Take the base from other weights with the same vocabulary; where --base is not given, in f32
    #[arg(long, value_name = "MODEL")]
    pub(crate) base_model: Option<String>,
    /// JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    /// Never touch the network
    #[arg(long, env = "BINDERY_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub(crate) offline: bool,
}

/// `quantize`
#[derive(Args, Debug)]
pub(crate) struct QuantizeArgs {
    #[arg(value_name = "MODEL", help = MODEL_HELP)]
    pub(crate) model: String,
    /// The folder to make; it must not be there yet
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,
    /// What dense matrices become
    #[arg(long, value_enum, value_name = "QUANTIZE")]
    pub(crate) quantize: AheadArg,
    /// With int4: choose each matrix' format, of 4.5, 5.5 and 8.5 bits, so that all weights together take no more than this and
    /// lose least, e.g. 6.0
    #[arg(long, value_name = "BITS", value_parser = parse_bits)]
    pub(crate) bits_per_weight: Option<f64>,
    /// Run the model over this text (UTF-8) in f32 and weigh errors by what goes into each matrix
    #[arg(long, value_name = "FILE")]
    pub(crate) calibrate: Option<PathBuf>,
    /// Tokens in a window of the text
    #[arg(long, value_name = "TOKENS", default_value_t = 512, requires = "calibrate", value_parser = clap::value_parser!(u32).range(8..))]
    pub(crate) ctx_size: u32,
    /// Windows of the text to run over; -1: all
    #[arg(long, value_name = "N", default_value = "128", requires = "calibrate", allow_negative_numbers = true,
          value_parser = parse_chunks)]
    pub(crate) chunks: Chunks,
    /// JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
    /// Threads that compute [default: physical cores]
    #[arg(long, value_name = "N", env = "BINDERY_THREADS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// Never touch the network
    #[arg(long, env = "BINDERY_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub(crate) offline: bool,
}

/// `pull`
#[derive(Args, Debug)]
pub(crate) struct PullArgs {
    #[arg(value_name = "MODEL", help = MODEL_HELP)]
    pub(crate) model: String,
    /// Never touch the network: only look whether it is here, and check it
    #[arg(long, env = "BINDERY_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub(crate) offline: bool,
}

/// `models`
#[derive(Args, Debug)]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    pub(crate) action: Option<ModelsAction>,
    /// JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelsAction {
    /// Say what a model is made of, what it takes when it is served, and how much of that fits here; nothing is loaded
    Inspect(Box<InspectArgs>),
    /// Read cached weights again and compare their digests
    Verify {
        /// A card's name [default: all that are cached]
        name: Option<String>,
    },
    /// Remove a card's weights from Bindery's cache
    Remove {
        /// A card's name
        name: String,
    },
}

/// `models inspect`
#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    #[arg(value_name = "MODEL", help = MODEL_HELP)]
    pub(crate) model: Option<String>,
    /// Requests at a time that there is to be memory for
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) num_requests: u32,
    /// Tokens of prompt and answer of each [default: 4096, or the model's context where that is less]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) length: Option<u32>,
    /// JSON instead of the tables
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// `check`
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// The config file
    #[arg(value_name = "CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Document every key
    #[arg(long)]
    pub(crate) explain: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    #[default]
    Text,
    /// One object a line, for machines
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrefillPacing {
    /// Long prompts get as much of the time as running streams have, and more where many wait
    #[default]
    Even,
    /// Prompts are computed at once; streams wait
    None,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum QuantizeArg {
    #[default]
    None,
    Int8,
    Int4,
}

/// `--quantize` of the verb of that name
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AheadArg {
    Int8,
    Int4,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvCacheDtypeArg {
    #[default]
    Auto,
    F32,
    F16,
    Bf16,
    Int8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadFormat {
    /// As the model is stored
    #[default]
    Auto,
    /// Random weights of its shapes
    Dummy,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    #[default]
    Cpu,
    Reference,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Endpoint {
    /// /v1/completions
    Completions,
    /// /v1/chat/completions
    Chat,
}

/// `--base`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BaseArg {
    /// Quantised weights widened to f32, KV cache in f32, our kernels
    #[default]
    F32,
    /// The same on the reference backend
    Reference,
    /// Weights as stored, KV cache in f16, our kernels: what `serve` does unless told otherwise
    Stored,
}

/// `--chunks`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chunks {
    All,
    First(usize),
}

/// `--device`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Device {
    #[default]
    Auto,
    Cpu,
}

/// Flags of the contract that come with a later version: asking for one is answered by its name.
const LATER: [&str; 4] =
    ["--enable-prefix-caching", "--no-enable-prefix-caching", "--tensor-parallel-size", "--gpu-memory-utilization"];

fn said(error: &clap::Error, kind: ContextKind) -> Option<&str> {
    match error.get(kind)? {
        ContextValue::String(text) => Some(text),
        _ => None,
    }
}

/// The environment variable that a wrong value comes from. None where it was typed: a flag that is there is read in place
/// of its variable.
pub(crate) fn variable_behind(error: &clap::Error) -> Option<String> {
    let (flag, value) = (said(error, ContextKind::InvalidArg)?, said(error, ContextKind::InvalidValue)?);
    let name = flag.split([' ', '[', '=']).next()?.strip_prefix("--")?;
    let is_flag = |word: &str| word.strip_prefix("--").and_then(|word| word.split('=').next()) == Some(name);
    if std::env::args_os().any(|word| is_flag(&word.to_string_lossy())) {
        return None;
    }
    let command = Cli::command();
    let mut arguments = command.get_subcommands().flat_map(clap::Command::get_arguments);
    let variable = arguments.find(|argument| argument.get_long() == Some(name) && argument.get_env().is_some());
    let variable = variable?.get_env()?;
    let held = std::env::var(variable).ok()?;
    // One variable may hold several names.
    held.split(',').chain([held.as_str()]).any(|held| held == value).then(|| variable.to_string_lossy().into_owned())
}

/// Prints why the command line is wrong and ends with code 2 (or 0, after `--help`).
pub(crate) fn refuse(error: &clap::Error) -> ! {
    let asked = said(error, ContextKind::InvalidArg).or(said(error, ContextKind::InvalidSubcommand)).map(str::to_owned);
    if let Some(name) = asked.filter(|name| LATER.contains(&name.split(['=', ' ']).next().unwrap_or(name))) {
        eprintln!("error: {name} is not in this version yet");
        eprintln!("hint: leave it out; `bindery --help` and `bindery serve --help` list what there is");
        std::process::exit(2);
    }
    if let Some(variable) = variable_behind(error) {
        // Nothing is left to do where stderr cannot be written to.
        let _ = error.print();
        eprintln!("hint: the value comes from the environment variable {variable}");
        std::process::exit(error.exit_code());
    }
    error.exit()
}

pub(crate) fn parse_device(text: &str) -> Result<Device, String> {
    match text {
        "auto" => Ok(Device::Auto),
        "cpu" => Ok(Device::Cpu),
        _ if text == "cuda" || text.strip_prefix("cuda:").is_some_and(|index| index.parse::<u32>().is_ok()) => {
            Err("CUDA is not in this version yet: use cpu".to_owned())
        }
        _ => Err("expected auto, cpu or cuda[:N]".to_owned()),
    }
}

pub(crate) fn parse_host(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let is_name = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
    if bare.parse::<std::net::IpAddr>().is_ok() || is_name(bare) {
        Ok(bare.to_owned())
    } else {
        Err("expected an address or a host name, without a scheme or a port".to_owned())
    }
}

pub(crate) fn parse_name(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("a name must not be empty".to_owned()),
        name => Ok(name.to_owned()),
    }
}

pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "expected a time like 30s or 2m".to_owned())
}

pub(crate) fn parse_size(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(ByteSize(0)) => Err("expected more than nothing".to_owned()),
        Ok(size) => Ok(size),
        Err(_) => Err("expected a size like 4GiB or 512MB".to_owned()),
    }
}

fn parse_bits(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (4.5..=8.6).contains(&value) => Ok(value),
        _ => Err("expected a number of bits from 4.5 to 8.6".to_owned()),
    }
}

/// As llama-perplexity takes it.
fn parse_chunks(text: &str) -> Result<Chunks, String> {
    match text.parse::<i32>() {
        Ok(-1) => Ok(Chunks::All),
        Ok(count @ 1..) => Ok(Chunks::First(count as usize)),
        _ => Err("expected a number of windows, at least 1, or -1 for all".to_owned()),
    }
}

fn parse_temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (0.0..=2.0).contains(&value) => Ok(value),
        _ => Err("expected a number from 0 to 2".to_owned()),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 100_000.0 => Ok(value),
        _ => Err("expected requests per second, more than 0 and at most 100000".to_owned()),
    }
}

impl ServeArgs {
    /// What the environment alone says, for verbs that show settings without having `serve`'s flags.
    pub(crate) fn from_environment() -> Result<Self, clap::Error> {
        let words: [OsString; 2] = ["bindery".into(), "serve".into()];
        match Cli::try_parse_from(words)?.command {
            Command::Serve(args) => Ok(*args),
            _ => unreachable!("`bindery serve` is the verb serve"),
        }
    }
}
