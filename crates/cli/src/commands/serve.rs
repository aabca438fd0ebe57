//! `bindery serve [MODEL]`: port, weights, server, in this order.
//!
//! The port is bound first, so that a port in use is told before a download, but listens only once the files are here:
//! until then clients are refused at once instead of being kept waiting. While the weights load, `/health` answers and
//! `/ready` says not yet.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context as _;
use bindery_engine::{
    LocalModel,
    adapters::{AdapterFolder, IsTaken},
    local_model::LoadReport,
};
use bindery_gateway::{
    clock::UnixMillis,
    config::GatewayConfig,
    gateway::{Gateway, Surroundings},
    names::NodeId,
};
use bindery_hub::{LocalFiles, ModelRef, SharedProgress, digest::weights_digest};
use bindery_model::declared_licence;
use bindery_server::{ModelSlot, ServerConfig};
use tokio::net::TcpSocket;
use tokio_util::sync::CancellationToken;

use crate::{
    adapters,
    args::{LogFormat, ServeArgs},
    failure::{Failure, Interrupted},
    gateway::host_name,
    local, logging,
    settings::Settings,
    signals::StopSignals,
    terminal::{self, FetchProgress, Style},
};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;
/// Adapters that the start page lists one by one.
const MAX_LISTED: usize = 16;

pub(crate) async fn run(args: ServeArgs) -> anyhow::Result<()> {
    let settings = Settings::resolve(args)?;
    logging::init(settings.log_format);
    let mut signals = StopSignals::listen()?;
    let (socket, address) = match bind(&settings).await? {
        Address::Reserved(socket, address) => (socket, address),
        Address::InUse(_) => {
            return Err(Failure::new(format!("{} is in use by another program", settings.host_and_port()))
                .hint("choose another port with --port, or 0 for any free one")
                .into());
        }
    };
    warn_if_open(&settings, address.ip());
    settings.adapters.check_names(&served_names(&settings)?)?;
    // Before anything is fetched: what is wrong with it is told at once.
    let gateway = start_gateway(&settings, address).await?;
    let files = signals.unless_stopped(fetch(&settings)).await.ok_or(Interrupted)??;

    let names = served_names(&settings)?;
    let digest = Arc::new(files.digest.clone().map_or_else(OnceLock::new, OnceLock::from));
    let config = ServerConfig {
        served_model_names: names.clone(),
        api_keys: settings.api_keys.clone(),
        tenants: settings.adapters.tenants.clone(),
        admin_key: settings.admin_key.clone(),
        max_body_bytes: settings.max_body_bytes,
        shutdown_timeout: settings.shutdown_timeout,
        digest: Arc::clone(&digest),
        license: files.license.clone().or_else(|| declared_licence(&files.path)),
        adapter_roots: settings.adapters.roots.clone(),
        gateway: gateway.clone(),
    };
    let listener = socket.listen(BACKLOG).with_context(|| format!("cannot listen on {address}"))?;
    let (slot, stop) = (ModelSlot::default(), CancellationToken::new());
    let mut server = tokio::spawn(bindery_server::run(listener, config, slot.clone(), stop.clone().cancelled_owned()));

    let identified = async {
        // A log names weights by what they are; elsewhere nobody waits for that.
        if gateway.as_ref().is_some_and(Gateway::keeps_log) && digest.get().is_none() {
            let path = files.path.clone();
            tracing::info!("reading {} once more, for the audit log to name it by its digest", path.display());
            let work = tokio::task::spawn_blocking(move || weights_digest(&path)).await?;
            let found = work.with_context(|| format!("cannot read {} to identify it", files.path.display()))?;
            let _nobody_else_sets_it = digest.set(found);
        }
        anyhow::Ok(())
    };
    let loading = async {
        let (loaded, identified) =
            tokio::join!(load(&files, &settings, is_taken(&names, gateway.as_ref())), identified);
        identified.and(loaded)
    };
    let loaded = tokio::select! {
        biased;
        name = signals.next() => {
            tracing::info!("{name}: stopped while the weights were loading");
            return Ok(());
        }
        // The server ends by itself only when its listener fails.
        ended = &mut server => { ended??; None }
        loaded = loading => Some(loaded),
    };
    let Some(loaded) = loaded else {
        return Err(Failure::new("the server ended while the weights were loading").into());
    };
    let (model, report, folders) = loaded?;
    slot.set(model.clone());
    let watch = adapters::watch(folders);
    let start = Start { settings: &settings, files: &files, name: &names[0], model: &model, report: &report, address };
    start.announce();

    tokio::select! {
        ended = &mut server => {
            ended??;
            return Err(Failure::new("the server ended by itself").into());
        }
        name = signals.next() => {
            tracing::info!("{name}: finishing running requests, at most {}", humantime::format_duration(settings.shutdown_timeout));
        }
    }
    stop.cancel();
    for watch in &watch {
        watch.abort();
    }
    let outcome = tokio::select! {
        ended = &mut server => ended?.context("the server failed while stopping"),
        name = signals.next() => {
            // Exit code 1: requests were cut that a clean stop would have finished.
            Err(Failure::new(format!("stopped at once by a second signal ({name})")).into())
        }
    };
    if let Some(gateway) = &gateway {
        gateway.close().await;
    }
    if outcome.is_ok() {
        tokio::task::spawn_blocking(move || model.stop()).await?;
        tracing::info!("stopped");
    }
    outcome
}

/// Opens the store, the upstreams and all else that the config file says of the gateway.
async fn start_gateway(settings: &Settings, address: SocketAddr) -> anyhow::Result<Option<Gateway>> {
    let Some(config) = &settings.gateway else { return Ok(None) };
    let env = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    // An address is one process's at a time, and the same one's after a restart.
    let host = host_name();
    let node = NodeId::new(&format!("{host} {address}").trim().replace(' ', "/"))?;
    let surroundings = Surroundings { env: &env, node, host: &host };
    let started = Gateway::start(GatewayConfig::clone(config), &surroundings, UnixMillis::now()).await;
    Ok(Some(
        started
            .map_err(|error| Failure::new(error.to_string()).hint("`bindery check` says what the config file means"))?,
    ))
}

/// What clients call the base, the first name first.
pub(super) fn served_names(settings: &Settings) -> anyhow::Result<Vec<String>> {
    if settings.served_model_names.is_empty() {
        Ok(vec![ModelRef::parse(&settings.model.source)?.served_name()])
    } else {
        Ok(settings.served_model_names.clone())
    }
}

/// The files of the model, and those of adapters that are read at the start.
async fn fetch(settings: &Settings) -> anyhow::Result<LocalFiles> {
    let files = local::fetch(&settings.model, settings.log_format).await?;
    let progress: SharedProgress = Arc::new(FetchProgress::new(settings.log_format));
    settings.adapters.fetch(&local::fetch_options(&settings.model)?, &progress).await?;
    Ok(files)
}

/// The model with its adapters, and the folders of them that are to be watched.
async fn load(
    files: &LocalFiles,
    settings: &Settings,
    is_taken: IsTaken,
) -> anyhow::Result<(Arc<LocalModel>, LoadReport, Vec<AdapterFolder>)> {
    let (model, report) = local::load(files, &settings.model.local, settings.log_format).await?;
    let options = local::fetch_options(&settings.model)?;
    let folders = settings.adapters.install(&model.adapters, &options, is_taken).await?;
    Ok((model, report, folders))
}

/// Names that requests reach something else by.
fn is_taken(of_base: &[String], gateway: Option<&Gateway>) -> IsTaken {
    let (of_base, gateway) = (of_base.to_vec(), gateway.cloned());
    Arc::new(move |name| {
        of_base.iter().any(|base| base == name) || gateway.as_ref().is_some_and(|gateway| gateway.has_name(name))
    })
}

/// What became of the address to listen on.
pub(super) enum Address {
    Reserved(TcpSocket, SocketAddr),
    /// Right, and taken by another program now.
    InUse(SocketAddr),
}

/// Reserves the address without listening yet.
pub(super) async fn bind(settings: &Settings) -> anyhow::Result<Address> {
    let shown = settings.host_and_port();
    let resolved = tokio::net::lookup_host((settings.host.as_str(), settings.port)).await;
    let address = resolved
        .ok()
        .and_then(|mut addresses| addresses.next())
        .ok_or_else(|| Failure::new(format!("the host {} has no address", settings.host)).hint("check the host (--host, BINDERY_HOST, or host in [server]): an address, or a name that this machine resolves"))?;
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A port whose last server has just ended is free.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    match socket.bind(address) {
        Ok(()) => {
            let address = socket.local_addr()?;
            Ok(Address::Reserved(socket, address))
        }
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(Address::InUse(address)),
        Err(error) => Err(match error.kind() {
            std::io::ErrorKind::PermissionDenied => Failure::new(format!("this user may not listen on {shown}"))
                .hint("ports below 1024 often need privileges; try --port 8000"),
            std::io::ErrorKind::AddrNotAvailable => {
                Failure::new(format!("this machine has no address {}", settings.host))
                    .hint("0.0.0.0 listens on every address")
            }
            _ => Failure::new(format!("cannot listen on {shown}: {error}")),
        }
        .into()),
    }
}

fn warn_if_open(settings: &Settings, address: IpAddr) {
    if settings.is_open_to_others(address) {
        let text = format!(
            "{address} can be reached from other machines and no key is configured: anyone there can use this server. \
             Set BINDERY_API_KEY (or --api-key), or listen on 127.0.0.1"
        );
        match settings.log_format {
            LogFormat::Text => terminal::warn(&text),
            LogFormat::Json => tracing::warn!("{text}"),
        }
    }
}

/// What is known when the server is ready.
struct Start<'a> {
    settings: &'a Settings,
    files: &'a LocalFiles,
    name: &'a str,
    model: &'a LocalModel,
    report: &'a LoadReport,
    address: SocketAddr,
}

impl Start<'_> {
    fn announce(&self) {
        for note in &self.report.notes {
            terminal::note_in(self.settings.log_format, note);
        }
        match self.settings.log_format {
            LogFormat::Text => eprint!("{}", self.page()),
            LogFormat::Json => {
                let (info, report) = (&self.model.info, self.report);
                tracing::info!(
                    model = self.name,
                    path = %self.files.path.display(),
                    architecture = info.architecture,
                    weights = info.weight_format,
                    weight_bytes = info.weight_bytes,
                    device = info.device,
                    threads = info.threads,
                    kv_blocks = report.num_blocks,
                    kv_tokens = report.kv_tokens,
                    full_length_requests = report.full_length_requests,
                    max_model_len = self.model.max_model_len,
                    adapters = self.model.adapters.specs().len(),
                    url = self.url(self.address.ip()),
                    "ready"
                );
            }
        }
    }

    /// What a person wants to know. The last line is read by programs: `ready: ` and the URL.
    fn page(&self) -> String {
        let (info, report) = (&self.model.info, self.report);
        let limits = &self.settings.model.local;
        let style = Style::for_stderr();
        let licence = self.files.license.as_ref().map_or_else(String::new, |licence| format!(", {licence}"));
        let kv_dtype = format!("{:?}", info.kv_cache_dtype).to_lowercase();
        let kv_bytes = info.kv_bytes_per_token as u64 * report.kv_tokens as u64;
        let block_size = limits.load.block_size;
        let rows = [
            (
                "model",
                format!(
                    "{} ({}, {} parameters{licence})",
                    self.name,
                    info.architecture,
                    terminal::parameters(info.num_parameters)
                ),
            ),
            (
                "weights",
                format!(
                    "{}; {}, loaded in {}",
                    info.weight_format,
                    terminal::size(info.weight_bytes),
                    seconds(report.load_time)
                ),
            ),
            ("device", format!("{}, {} thread{}", info.device, info.threads, if info.threads == 1 { "" } else { "s" })),
            (
                "kv cache",
                format!(
                    "{} blocks of {block_size} tokens ({kv_dtype}, up to {}): {} tokens, {:.1} requests of the full {}",
                    terminal::thousands(report.num_blocks as u64),
                    terminal::size(kv_bytes),
                    terminal::thousands(report.kv_tokens as u64),
                    report.full_length_requests,
                    terminal::thousands(self.model.max_model_len as u64),
                ),
            ),
            (
                "limits",
                format!(
                    "{} requests at once, {} tokens a step, {} requests waiting",
                    limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_queued_requests
                ),
            ),
        ];
        let rows = rows.into_iter().chain(self.adapters().into_iter().map(|line| ("adapter", line)));
        let rows = rows.chain([("keys", self.keys()), ("try", self.curl())]);
        let mut page = format!("\n{} {}\n\n", style.bold("Bindery"), env!("CARGO_PKG_VERSION"));
        for (name, value) in rows {
            let _ = writeln!(page, "  {} {value}", style.dim(&format!("{name:<9}")));
        }
        let _ = writeln!(page, "\nready: {}", self.url(self.address.ip()));
        page
    }

    /// Those in memory one by one, the others by number; nothing where there are none.
    fn adapters(&self) -> Vec<String> {
        let all = self.model.adapters.list();
        let mut lines: Vec<String> = all
            .iter()
            .filter_map(|adapter| {
                let info = adapter.info.as_ref()?;
                let (name, size) = (&adapter.name, terminal::size(adapter.num_bytes));
                Some(format!("{name} (rank {}; {}; {size})", info.rank, info.targets))
            })
            .collect();
        let num_loaded = lines.len();
        if num_loaded > MAX_LISTED {
            lines.truncate(MAX_LISTED);
            lines.push(format!("and {} more in memory", num_loaded - MAX_LISTED));
        }
        if all.len() > num_loaded {
            lines.push(format!("{} more known by name, each read when first asked for", all.len() - num_loaded));
        }
        for folder in self.settings.adapters.folders.iter().filter(|folder| folder.watch) {
            lines.push(format!("what appears in {} (watched)", folder.path.display()));
        }
        lines
    }

    fn keys(&self) -> String {
        match (self.settings.num_keys(), self.address.ip().is_loopback()) {
            (0, _) if self.settings.has_tenants() => {
                "clients must send a tenant's key (`bindery keys create --tenant NAME` makes one)".to_owned()
            }
            (0, true) => "none asked for (only this machine can connect)".to_owned(),
            (0, false) => "none asked for, and other machines can connect".to_owned(),
            (1, _) => "clients must send the configured key".to_owned(),
            (count, _) => format!("clients must send one of {count} configured keys"),
        }
    }

    fn url(&self, ip: IpAddr) -> String {
        format!("http://{}", SocketAddr::new(ip, self.address.port()))
    }

    fn curl(&self) -> String {
        let reachable = match self.address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let key = if self.settings.num_keys() == 0 && !self.settings.has_tenants() {
            ""
        } else {
            " -H \"authorization: Bearer $BINDERY_API_KEY\""
        };
        // A base model has no chat template, and would refuse what this page tells people to try.
        let (route, body) = if self.model.template.is_some() {
            let messages = serde_json::json!([{"role": "user", "content": "What does a bookbinder do?"}]);
            ("chat/completions", serde_json::json!({"model": self.name, "stream": true, "messages": messages}))
        } else {
            let body = serde_json::json!({
                "model": self.name, "stream": true, "prompt": "A bookbinder is a person who", "max_tokens": 40,
            });
            ("completions", body)
        };
        format!("curl -N {}/v1/{route}{key} -H \"content-type: application/json\" -d '{body}'", self.url(reachable))
    }
}

fn seconds(time: Duration) -> String {
    if time.as_secs() < 10 { format!("{:.2} s", time.as_secs_f64()) } else { format!("{:.0} s", time.as_secs_f64()) }
}
