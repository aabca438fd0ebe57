//! The table of config keys: one row a key drives parsing, `check --explain` and the settings that `check` shows.

use clap::ValueEnum;

use crate::args::{
    BackendArg, Device, DtypeArg, KvCacheDtypeArg, LoadFormat, LogFormat, PrefillPacing, QuantizeArg, ServeArgs,
    parse_device, parse_duration, parse_host, parse_name, parse_size,
};

/// The TOML type of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    /// A string or a list of them.
    Texts,
    Integer,
    Boolean,
}

impl Kind {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Text => "a string in quotes",
            Self::Texts => "a string in quotes, or a list of them",
            Self::Integer => "a whole number",
            Self::Boolean => "true or false",
        }
    }
}

/// One key. `set` takes the words that the flag would be given and checks them as the flag does.
pub(crate) struct Key {
    pub(crate) section: &'static str,
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// In the words of the flag; valid.
    pub(crate) example: &'static str,
    /// For people.
    pub(crate) default: &'static str,
    pub(crate) explain: &'static str,
    pub(crate) set: fn(&mut ServeArgs, &str) -> Result<(), String>,
    pub(crate) get: fn(&ServeArgs) -> Option<String>,
}

impl Key {
    /// `--max-model-len`; the model itself is MODEL.
    pub(crate) fn flag(&self) -> String {
        if self.name == "source" { "MODEL".to_owned() } else { format!("--{}", self.name.replace('_', "-")) }
    }

    /// `BINDERY_MAX_MODEL_LEN`.
    pub(crate) fn variable(&self) -> String {
        let name = if self.name == "source" { "model" } else { self.name };
        format!("BINDERY_{}", name.to_uppercase())
    }
}

/// One of an enum's names, or the list of them.
fn choice<T: ValueEnum>(text: &str) -> Result<T, String> {
    T::from_str(text, false).map_err(|_| {
        let names: Vec<String> =
            T::value_variants().iter().filter_map(|v| v.to_possible_value().map(|v| v.get_name().to_owned())).collect();
        format!("expected one of {}", names.join(", "))
    })
}

fn name_of<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn number(text: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32, String> {
    let digits = text.replace('_', "");
    match digits.parse::<u32>() {
        Ok(value) if range.contains(&value) => Ok(value),
        _ => Err(format!("expected {} to {}", range.start(), range.end())),
    }
}

fn show_device(device: Device) -> String {
    match device {
        Device::Auto => "auto",
        Device::Cpu => "cpu",
    }
    .to_owned()
}

/// A key of a table that has no flags.
pub(crate) struct TableKey {
    /// As it is written: `[[adapters]]`.
    pub(crate) header: &'static str,
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// As it is written.
    pub(crate) example: &'static str,
    pub(crate) default: &'static str,
    pub(crate) explain: &'static str,
}

/// Those of a table stand together.
pub(crate) const TABLE_KEYS: &[TableKey] = &[
    TableKey {
        header: "[[adapters]]",
        name: "name",
        kind: Kind::Text,
        example: "\"support-fr\"",
        default: "none, it must be given",
        explain: "what requests call the adapter; it is read when one first does",
    },
    TableKey {
        header: "[[adapters]]",
        name: "source",
        kind: Kind::Text,
        example: "\"/srv/adapters/support-fr\"",
        default: "none, it must be given",
        explain: "a folder as peft saves it, a .gguf file, or org/repo[@revision] on the hub",
    },
    TableKey {
        header: "[[adapters]]",
        name: "tenants",
        kind: Kind::Texts,
        example: "[\"acme\"]",
        default: "everyone",
        explain: "who may see and use it; to others it does not exist",
    },
    TableKey {
        header: "[[adapters]]",
        name: "pinned",
        kind: Kind::Boolean,
        example: "true",
        default: "false",
        explain: "read at the start, and never gives way to others",
    },
    TableKey {
        header: "[adapter_dir]",
        name: "path",
        kind: Kind::Text,
        example: "\"/srv/adapters\"",
        default: "none, it must be given",
        explain: "every adapter in this folder is known by its name and read on first use",
    },
    TableKey {
        header: "[adapter_dir]",
        name: "watch",
        kind: Kind::Boolean,
        example: "false",
        default: "true",
        explain: "adapters that are put there later, new versions and removals count too; else it is looked at once",
    },
    TableKey {
        header: "[adapter_dir]",
        name: "tenants",
        kind: Kind::Texts,
        example: "[\"acme\"]",
        default: "everyone",
        explain: "who may see and use what is in it; several folders are written as [[adapter_dir]]",
    },
];

/// Rows are in the order of `check`'s output; those of a section stand together.
pub(crate) const KEYS: &[Key] = &[
    Key {
        section: "server",
        name: "host",
        kind: Kind::Text,
        example: "0.0.0.0",
        default: "127.0.0.1",
        explain: "address to listen on; any but a loopback address should come with a key",
        set: |args, text| parse_host(text).map(|value| args.server.host = Some(value)),
        get: |args| args.server.host.clone(),
    },
    Key {
        section: "server",
        name: "port",
        kind: Kind::Integer,
        example: "9000",
        default: "8000",
        explain: "port to listen on; 0 picks a free one",
        set: |args, text| number(text, 0..=65535).map(|value| args.server.port = Some(value as u16)),
        get: |args| args.server.port.map(|value| value.to_string()),
    },
    Key {
        section: "server",
        name: "served_model_name",
        kind: Kind::Texts,
        example: "assistant",
        default: "the model's own name",
        explain: "what clients call the model; of several, the first is listed first",
        set: |args, text| parse_name(text).map(|value| args.server.served_model_name.push(value)),
        get: |args| (!args.server.served_model_name.is_empty()).then(|| args.server.served_model_name.join(", ")),
    },
    Key {
        section: "server",
        name: "max_body_size",
        kind: Kind::Text,
        example: "32.0 MiB",
        default: "10.0 MiB",
        explain: "largest request body, like \"32MiB\"; a larger one is answered 413",
        set: |args, text| parse_size(text).map(|value| args.server.max_body_size = Some(value)),
        get: |args| args.server.max_body_size.map(|value| value.display().iec().to_string()),
    },
    Key {
        section: "server",
        name: "log_format",
        kind: Kind::Text,
        example: "json",
        default: "text",
        explain: "form of the logs on stderr: text or json",
        set: |args, text| choice::<LogFormat>(text).map(|value| args.server.log_format = Some(value)),
        get: |args| args.server.log_format.as_ref().map(name_of),
    },
    Key {
        section: "server",
        name: "shutdown_timeout",
        kind: Kind::Text,
        example: "45s",
        default: "30s",
        explain: "how long running requests may go on after SIGTERM or ctrl-c",
        set: |args, text| parse_duration(text).map(|value| args.server.shutdown_timeout = Some(value)),
        get: |args| args.server.shutdown_timeout.map(|value| humantime::format_duration(value).to_string()),
    },
    Key {
        section: "server",
        name: "adapter_root",
        kind: Kind::Texts,
        example: "/srv/adapters",
        default: "the folders that the adapters known at the start lie in",
        explain: "folders that adapters may be loaded from while the server runs",
        set: |args, text| parse_name(text).map(|value| args.adapters.adapter_root.push(value.into())),
        get: |args| {
            let roots: Vec<String> = args.adapters.adapter_root.iter().map(|root| root.display().to_string()).collect();
            (!roots.is_empty()).then(|| roots.join(", "))
        },
    },
    Key {
        section: "model",
        name: "source",
        kind: Kind::Text,
        example: "smollm2-135m",
        default: bindery_hub::DEFAULT_MODEL,
        explain: "a card's name, org/repo[@revision][:file.gguf] on the hub, a folder with config.json and safetensors, or a .gguf file",
        set: |args, text| parse_name(text).map(|value| args.model = Some(value)),
        get: |args| args.model.clone(),
    },
    Key {
        section: "model",
        name: "dtype",
        kind: Kind::Text,
        example: "f32",
        default: "auto",
        explain: "type of dense weights and activations: auto, f32, bf16 or f16",
        set: |args, text| choice::<DtypeArg>(text).map(|value| args.engine.load.dtype = Some(value)),
        get: |args| args.engine.load.dtype.as_ref().map(name_of),
    },
    Key {
        section: "model",
        name: "quantize",
        kind: Kind::Text,
        example: "int4",
        default: "none",
        explain: "quantise dense weights at load: none (as stored), int8 or int4; what is quantised in the file stays as it is",
        set: |args, text| choice::<QuantizeArg>(text).map(|value| args.engine.load.quantize = Some(value)),
        get: |args| args.engine.load.quantize.as_ref().map(name_of),
    },
    Key {
        section: "model",
        name: "kv_cache_dtype",
        kind: Kind::Text,
        example: "f16",
        default: "auto",
        explain: "type of the KV cache: auto, f32, f16, bf16 or int8",
        set: |args, text| choice::<KvCacheDtypeArg>(text).map(|value| args.engine.load.kv_cache_dtype = Some(value)),
        get: |args| args.engine.load.kv_cache_dtype.as_ref().map(name_of),
    },
    Key {
        section: "model",
        name: "device",
        kind: Kind::Text,
        example: "cpu",
        default: "auto",
        explain: "where to compute: auto or cpu (cuda[:N] comes later)",
        set: |args, text| parse_device(text).map(|value| args.engine.device = Some(value)),
        get: |args| args.engine.device.map(show_device),
    },
    Key {
        section: "model",
        name: "backend",
        kind: Kind::Text,
        example: "reference",
        default: "cpu",
        explain: "who computes: cpu (our kernels) or reference (slow and obviously right)",
        set: |args, text| choice::<BackendArg>(text).map(|value| args.engine.load.backend = Some(value)),
        get: |args| args.engine.load.backend.as_ref().map(name_of),
    },
    Key {
        section: "model",
        name: "threads",
        kind: Kind::Integer,
        example: "4",
        default: "physical cores",
        explain: "threads that compute",
        set: |args, text| number(text, 1..=1024).map(|value| args.engine.load.threads = Some(value)),
        get: |args| args.engine.load.threads.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "load_format",
        kind: Kind::Text,
        example: "dummy",
        default: "auto",
        explain: "where weights come from: auto (the files) or dummy (random, for benchmarks)",
        set: |args, text| choice::<LoadFormat>(text).map(|value| args.engine.load.load_format = Some(value)),
        get: |args| args.engine.load.load_format.as_ref().map(name_of),
    },
    Key {
        section: "model",
        name: "max_model_len",
        kind: Kind::Integer,
        example: "4096",
        default: "the model's, or what fits",
        explain: "tokens of prompt and answer together",
        set: |args, text| number(text, 1..=u32::MAX).map(|value| args.engine.max_model_len = Some(value)),
        get: |args| args.engine.max_model_len.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "max_num_seqs",
        kind: Kind::Integer,
        example: "64",
        default: "256",
        explain: "requests computed at once",
        set: |args, text| number(text, 1..=65536).map(|value| args.engine.max_num_seqs = Some(value)),
        get: |args| args.engine.max_num_seqs.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "max_num_batched_tokens",
        kind: Kind::Integer,
        example: "256",
        default: "512",
        explain: "tokens computed in one step; longer prompts are computed in chunks of this size",
        set: |args, text| number(text, 1..=1_048_576).map(|value| args.engine.max_num_batched_tokens = Some(value)),
        get: |args| args.engine.max_num_batched_tokens.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "prefill_pacing",
        kind: Kind::Text,
        example: "none",
        default: "even",
        explain: "long prompts beside running streams: even (they get as much of the time) or none (streams wait)",
        set: |args, text| choice::<PrefillPacing>(text).map(|value| args.engine.prefill_pacing = Some(value)),
        get: |args| args.engine.prefill_pacing.as_ref().map(name_of),
    },
    Key {
        section: "model",
        name: "block_size",
        kind: Kind::Integer,
        example: "32",
        default: "16",
        explain: "tokens in a block of the KV cache",
        set: |args, text| number(text, 1..=1024).map(|value| args.engine.block_size = Some(value)),
        get: |args| args.engine.block_size.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "kv_cache_memory",
        kind: Kind::Text,
        example: "4.0 GiB",
        default: "what is free, with a margin",
        explain: "memory for the KV cache, like \"4GiB\"",
        set: |args, text| parse_size(text).map(|value| args.engine.kv_cache_memory = Some(value)),
        get: |args| args.engine.kv_cache_memory.map(|value| value.display().iec().to_string()),
    },
    Key {
        section: "model",
        name: "max_queued_requests",
        kind: Kind::Integer,
        example: "100",
        default: "1024",
        explain: "requests that may wait; more are answered 503",
        set: |args, text| number(text, 1..=1_048_576).map(|value| args.engine.max_queued_requests = Some(value)),
        get: |args| args.engine.max_queued_requests.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "max_loras",
        kind: Kind::Integer,
        example: "16",
        default: "8",
        explain: "adapters that one batch may mix; further ones wait in memory for a place",
        set: |args, text| number(text, 1..=65536).map(|value| args.engine.max_loras = Some(value)),
        get: |args| args.engine.max_loras.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "max_lora_rank",
        kind: Kind::Integer,
        example: "128",
        default: "64",
        explain: "largest rank of an adapter; a larger one is refused",
        set: |args, text| number(text, 1..=65536).map(|value| args.engine.max_lora_rank = Some(value)),
        get: |args| args.engine.max_lora_rank.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "max_cpu_loras",
        kind: Kind::Integer,
        example: "100",
        default: "64, or max_loras where that is more",
        explain: "adapters in memory; further ones are read from disk when asked for",
        set: |args, text| number(text, 1..=65536).map(|value| args.engine.max_cpu_loras = Some(value)),
        get: |args| args.engine.max_cpu_loras.map(|value| value.to_string()),
    },
    Key {
        section: "model",
        name: "offline",
        kind: Kind::Boolean,
        example: "true",
        default: "false",
        explain: "never touch the network",
        set: |args, text| {
            text.parse().map(|value| args.engine.offline = Some(value)).map_err(|_| "expected true or false".to_owned())
        },
        get: |args| args.engine.offline.map(|value| value.to_string()),
    },
];
