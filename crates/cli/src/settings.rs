//! The one place where flags, environment, config file and defaults meet: flags > environment > file > defaults.
//! (clap has already put the environment behind the flags.)

use std::{net::IpAddr, sync::Arc, time::Duration};

use bindery_engine::{AdapterPoolConfig, local_model::LocalModelConfig};
use bindery_gateway::config::GatewayConfig;
use bindery_model::{AdapterLimits, BackendKind, Dtype, KvCacheDtype, LoadOptions, Quantize};

use crate::{
    adapters::AdapterSettings,
    args::{
        BackendArg, Device, DtypeArg, EngineArgs, KvCacheDtypeArg, LoadFormat, LogFormat, PrefillPacing, QuantizeArg,
        ServeArgs, ServerArgs,
    },
    config,
    failure::Failure,
};

/// Tokens of a step unless said otherwise: large enough that a prompt chunk runs at the speed of a full batch, small
/// enough that a stream beside it is not held up for long.
const DEFAULT_MAX_NUM_BATCHED_TOKENS: u32 = 512;
/// Tokens a reader may leave unread before its request is cancelled.
const MAX_BUFFERED_TOKENS: usize = 4096;
/// Of a request's body, unless said otherwise: ample for a prompt that fills a long context, and little enough that many
/// at once are no danger.
pub(crate) const DEFAULT_MAX_BODY_BYTES: usize = 10 << 20;

/// All that `serve` needs to know.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) served_model_names: Vec<String>,
    pub(crate) api_keys: Vec<String>,
    pub(crate) admin_key: Option<String>,
    pub(crate) max_body_bytes: usize,
    pub(crate) log_format: LogFormat,
    pub(crate) shutdown_timeout: Duration,
    pub(crate) model: ModelSettings,
    pub(crate) adapters: AdapterSettings,
    /// None where the file says nothing of it.
    pub(crate) gateway: Option<Arc<GatewayConfig>>,
}

/// What a model is loaded with, also by `chat` and `bench` in their own process.
#[derive(Clone, Debug)]
pub(crate) struct ModelSettings {
    pub(crate) source: String,
    pub(crate) offline: bool,
    pub(crate) local: LocalModelConfig,
}

macro_rules! prefer {
    ($first:expr, $second:expr; $($field:ident),+ $(,)?) => {
        $( if $first.$field.is_none() { $first.$field = $second.$field.take(); } )+
    };
}

/// Flags and environment in front of the file.
pub(crate) fn merge(mut flags: ServeArgs, mut file: ServeArgs) -> ServeArgs {
    flags.model = flags.model_flag.take().or(flags.model).or_else(model_from_environment).or(file.model.take());
    prefer!(flags.server, file.server; host, port, max_body_size, log_format, shutdown_timeout);
    if flags.server.served_model_name.is_empty() {
        flags.server.served_model_name = std::mem::take(&mut file.server.served_model_name);
    }
    if flags.adapters.adapter_root.is_empty() {
        flags.adapters.adapter_root = std::mem::take(&mut file.adapters.adapter_root);
    }
    flags.tables = file.tables;
    prefer!(flags.engine.load, file.engine.load; dtype, quantize, kv_cache_dtype, threads, load_format, backend);
    prefer!(flags.engine, file.engine; device, max_model_len, max_num_seqs, max_num_batched_tokens, prefill_pacing, block_size,
        kv_cache_memory, max_queued_requests, max_loras, max_lora_rank, max_cpu_loras, offline);
    flags
}

/// Read here and not by clap, which would let the variable conflict with `--model`.
pub(crate) fn model_from_environment() -> Option<String> {
    std::env::var("BINDERY_MODEL").ok().filter(|model| !model.is_empty())
}

impl Settings {
    /// Reads the config file, if there is one, and fills what is left with defaults.
    pub(crate) fn resolve(flags: ServeArgs) -> anyhow::Result<Self> {
        let file = match &flags.config {
            Some(path) => config::read(path)?,
            None => ServeArgs::default(),
        };
        let ServeArgs { model, server, engine, adapters, tables, config, .. } = merge(flags, file);
        let ServerArgs {
            host,
            port,
            served_model_name,
            api_key,
            admin_key,
            max_body_size,
            log_format,
            shutdown_timeout,
        } = server;
        refuse_empty_keys(&api_key, admin_key.as_deref())?;
        let model = ModelSettings::new(model, &engine)?;
        let gateway = tables.gateway.clone().filter(|gateway| !gateway.is_empty());
        let adapters = AdapterSettings::resolve(&adapters, tables, config.as_deref(), &model.local.adapters)?;
        refuse_shared_keys(&api_key, &adapters)?;
        Ok(Self {
            host: host.unwrap_or_else(|| "127.0.0.1".to_owned()),
            port: port.unwrap_or(8000),
            served_model_names: served_model_name,
            api_keys: api_key,
            admin_key,
            // More than can be addressed is as good as no limit.
            max_body_bytes: max_body_size
                .map_or(DEFAULT_MAX_BODY_BYTES, |size| usize::try_from(size.as_u64()).unwrap_or(usize::MAX)),
            log_format: log_format.unwrap_or_default(),
            shutdown_timeout: shutdown_timeout.unwrap_or(Duration::from_secs(30)),
            model,
            adapters,
            gateway,
        })
    }

    /// As it is written in a URL.
    pub(crate) fn host_and_port(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// Reachable from other machines, without a key.
    pub(crate) fn is_open_to_others(&self, address: IpAddr) -> bool {
        self.num_keys() == 0 && !self.has_tenants() && !address.is_loopback()
    }

    /// Whether there is someone whose key is asked for, be it in the store or nowhere yet.
    pub(crate) fn has_tenants(&self) -> bool {
        self.gateway.as_ref().is_some_and(|gateway| !gateway.tenants.is_empty() || !gateway.issuers.is_empty())
    }

    /// Keys that open the model routes, those of tenants among them.
    pub(crate) fn num_keys(&self) -> usize {
        self.api_keys.len() + self.adapters.tenants.iter().map(|tenant| tenant.api_keys.len()).sum::<usize>()
    }
}

/// An empty variable would otherwise open a server whose operator meant to close it.
fn refuse_empty_keys(api_keys: &[String], admin_key: Option<&str>) -> Result<(), Failure> {
    if api_keys.iter().any(|key| key.trim().is_empty()) {
        return Err(Failure::usage("an API key is empty").hint("give --api-key a value, or unset BINDERY_API_KEY"));
    }
    if admin_key.is_some_and(|key| key.trim().is_empty()) {
        return Err(
            Failure::usage("the admin key is empty").hint("give --admin-key a value, or unset BINDERY_ADMIN_KEY")
        );
    }
    Ok(())
}

/// A key must say whose it is.
fn refuse_shared_keys(api_keys: &[String], adapters: &AdapterSettings) -> Result<(), Failure> {
    let mut owners: Vec<(&str, &str)> = Vec::new();
    for tenant in &adapters.tenants {
        for key in &tenant.api_keys {
            let other =
                owners.iter().find(|(known, _)| *known == key).map(|(_, owner)| format!("the tenant {owner:?}"));
            let other = other.or_else(|| api_keys.contains(key).then(|| "everybody (BINDERY_API_KEY)".to_owned()));
            if let Some(other) = other {
                return Err(Failure::usage(format!("a key of the tenant {:?} is a key of {other}, too", tenant.name))
                    .hint("give each tenant keys of its own"));
            }
            owners.push((key, &tenant.name));
        }
    }
    Ok(())
}

impl ModelSettings {
    /// `model`: as typed or configured; None is the default card. What no model could be loaded with is refused here,
    /// before one is fetched.
    pub(crate) fn new(model: Option<String>, engine: &EngineArgs) -> Result<Self, Failure> {
        match engine.device.unwrap_or_default() {
            // This version computes on the CPU alone; cuda is refused where the flag is parsed.
            Device::Auto | Device::Cpu => {}
        }
        let load = LoadOptions {
            backend: match engine.load.backend.unwrap_or_default() {
                BackendArg::Cpu => BackendKind::Cpu,
                BackendArg::Reference => BackendKind::Reference,
            },
            dtype: match engine.load.dtype.unwrap_or_default() {
                DtypeArg::Auto => Dtype::Auto,
                DtypeArg::F32 => Dtype::F32,
                DtypeArg::Bf16 => Dtype::Bf16,
                DtypeArg::F16 => Dtype::F16,
            },
            quantize: match engine.load.quantize.unwrap_or_default() {
                QuantizeArg::None => Quantize::None,
                QuantizeArg::Int8 => Quantize::Int8,
                QuantizeArg::Int4 => Quantize::Int4,
            },
            kv_cache_dtype: match engine.load.kv_cache_dtype.unwrap_or_default() {
                KvCacheDtypeArg::Auto => KvCacheDtype::Auto,
                KvCacheDtypeArg::F32 => KvCacheDtype::F32,
                KvCacheDtypeArg::F16 => KvCacheDtype::F16,
                KvCacheDtypeArg::Bf16 => KvCacheDtype::Bf16,
                KvCacheDtypeArg::Int8 => KvCacheDtype::Int8,
            },
            block_size: engine.block_size.unwrap_or(16) as usize,
            threads: engine.load.threads.map(|threads| threads as usize),
            dummy: engine.load.load_format.unwrap_or_default() == LoadFormat::Dummy,
            dequantize: false,
        };
        let max_loras = engine.max_loras.map_or(AdapterPoolConfig::DEFAULT_MAX_LORAS, |count| count as usize);
        let adapters = AdapterPoolConfig {
            max_loras,
            max_cpu_loras: engine
                .max_cpu_loras
                .map_or(AdapterPoolConfig::DEFAULT_MAX_CPU_LORAS.max(max_loras), |count| count as usize),
            limits: AdapterLimits {
                max_rank: engine.max_lora_rank.map_or(AdapterLimits::default().max_rank, |rank| rank as usize),
                ..AdapterLimits::default()
            },
        };
        let local = LocalModelConfig {
            load,
            max_model_len: engine.max_model_len.map(|tokens| tokens as usize),
            max_num_seqs: engine.max_num_seqs.unwrap_or(256) as usize,
            max_num_batched_tokens: engine.max_num_batched_tokens.unwrap_or(DEFAULT_MAX_NUM_BATCHED_TOKENS) as usize,
            paces_prompts: engine.prefill_pacing.unwrap_or_default() == PrefillPacing::Even,
            kv_cache_memory: engine.kv_cache_memory.map(|size| size.as_u64()),
            max_queued_requests: engine.max_queued_requests.unwrap_or(1024) as usize,
            max_buffered_tokens: MAX_BUFFERED_TOKENS,
            adapters,
        };
        local.check().map_err(|error| Failure::usage(error.to_string()))?;
        Ok(Self {
            source: model.unwrap_or_else(|| bindery_hub::DEFAULT_MODEL.to_owned()),
            offline: engine.offline.unwrap_or(false),
            local,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::KEYS;

    /// Whatever key is added, its flag wins over the file.
    #[test]
    fn every_flag_wins_over_the_file_and_every_file_key_over_the_default() {
        for key in KEYS {
            let (mut flags, mut file) = (ServeArgs::default(), ServeArgs::default());
            (key.set)(&mut file, key.example).unwrap();
            let from_file = merge(ServeArgs::default(), file.clone());
            assert_eq!((key.get)(&from_file).as_deref(), Some(key.example), "{}", key.name);
            // A flag with another value where the key has one; the same value shows nothing but does no harm.
            for other in ["::1", "1", "none", "f16", "2 GiB", "auto", "cpu", "text", "false", "7s", "else"] {
                if (key.set)(&mut flags, other).is_ok() {
                    break;
                }
            }
            let expected = (key.get)(&flags);
            assert!(expected.is_some(), "{}", key.name);
            assert_eq!((key.get)(&merge(flags, file)), expected, "{}", key.name);
        }
    }
}
