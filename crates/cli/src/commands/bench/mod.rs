//! `bindery bench`: loads a server and prints what its clients saw.
//!
//! Every row is measured in rounds; with `--compare` the two servers take turns round by round (A B A B), so that what
//! drifts on the machine hits both. Prompts are random, distinct and the same for both.

mod load;
mod profile;
mod prompts;
mod report;
mod roofline;

use std::{
    fmt::Write as _,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use bindery_engine::{LocalModel, adapters::AdapterRoots};
use bindery_model::{Machine, ModelInfo, Roofs};
use bindery_server::{ModelSlot, ServerConfig};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    args::{BenchArgs, Endpoint, LogFormat},
    client::{Client, ClientError},
    failure::{Failure, Interrupted},
    local,
    settings::{DEFAULT_MAX_BODY_BYTES, ModelSettings, model_from_environment},
    signals::StopSignals,
    terminal,
};
use load::{Arrivals, Round, Shape, Target, round};
use profile::Profile;
use prompts::Prompts;
use report::{Report, Row};

pub(crate) async fn run(args: BenchArgs) -> anyhow::Result<()> {
    let mut signals = StopSignals::listen()?;
    signals.unless_stopped(Box::pin(measure(args))).await.ok_or(Interrupted)?
}

async fn measure(args: BenchArgs) -> anyhow::Result<()> {
    let own = match &args.url {
        Some(_) => None,
        None => Some(OwnServer::start(&args).await?),
    };
    let mut targets = vec![match &own {
        Some(own) => Target { client: Client::new(&own.url, None)?, models: vec![own.name.clone()] },
        None => target(args.url.as_deref().unwrap_or_default(), args.model.as_deref(), &args).await?,
    }];
    if !args.adapters.is_empty() {
        targets[0].models.clone_from(&args.adapters);
    }
    if let Some(url) = &args.compare {
        targets.push(target(url, args.compare_model.as_deref(), &args).await?);
    }
    let shape = Arc::new(Shape {
        endpoint: args.endpoint,
        prompts: Prompts::new(args.seed, args.input_words),
        output_tokens: args.output_tokens,
        temperature: args.temperature,
        ignore_eos: !args.no_ignore_eos,
        timeout: args.timeout,
        seed: args.seed,
    });
    // The first answers pay for cold caches and for reading adapters, and tell early whether the server understands us.
    for target in &targets {
        for number in 0..target.models.len() as u64 {
            shape.send(target, u64::MAX - number).await.map_err(|error| explain(&error, target.client.url()))?;
        }
    }
    let loads: Vec<Arrivals> = if args.rate.is_empty() {
        args.concurrency.iter().map(|clients| Arrivals::Clients(*clients)).collect()
    } else {
        args.rate.iter().map(|rate| Arrivals::Rate(*rate)).collect()
    };
    let mut next_number = 0;
    let mut rows = Vec::new();
    let mut profiles = Vec::new();
    let mut roofline = match own.as_ref().filter(|_| args.roofline) {
        Some(own) => Some(Roofline::begin(own.model.info.clone()).await?),
        None => None,
    };
    for arrivals in loads {
        let before = if args.profile || args.roofline { Some(profile_of(&targets[0]).await?) } else { None };
        rows.push(measure_load(&targets, &shape, arrivals, &args, &mut next_number).await);
        if let Some(before) = before {
            profiles.push((arrivals.name(), profile_of(&targets[0]).await?.since(&before)));
        }
        if let Some(roofline) = &mut roofline {
            roofline.load_ended().await?;
        }
    }
    if let Some(own) = own {
        own.stop().await?;
    }
    let report = Report {
        servers: ["A", "B"]
            .into_iter()
            .zip(&targets)
            .map(|(label, t)| (label, t.client.url().to_owned(), t.models.join(", ")))
            .collect(),
        rows,
        profiles,
        roofline: roofline.map(|roofline| (roofline.info, roofline.of_loads)),
        settings: settings_json(&args),
        output_tokens: args.output_tokens,
    };
    print(&report, &args)?;
    if report.rows.iter().flatten().all(|row| row.num_answered == 0) {
        return Err(Failure::new("no request was answered").into());
    }
    Ok(())
}

/// The machine's roofs right before and right after each load, while the server has nothing to do: a virtual machine's change by
/// the minute, so a share says something only beside the roofs of its own time.
struct Roofline {
    info: ModelInfo,
    last: Roofs,
    /// The higher of both for each load: other work only ever lowers a figure.
    of_loads: Vec<Roofs>,
}

impl Roofline {
    /// Right before the first load.
    async fn begin(info: ModelInfo) -> anyhow::Result<Self> {
        let last = Self::now(&info).await?;
        Ok(Self { info, last, of_loads: Vec::new() })
    }

    /// Right after a load, which is right before the next.
    async fn load_ended(&mut self) -> anyhow::Result<()> {
        let now = Self::now(&self.info).await?;
        self.of_loads.push(self.last.max(now));
        self.last = now;
        Ok(())
    }

    /// Memory's over as many bytes as a step reads of the weights (of keys and values, nobody knows before). What they are read
    /// from is not kept: under load the server's cache may want that memory.
    async fn now(info: &ModelInfo) -> anyhow::Result<Roofs> {
        let machine = Machine::new(Some(info.threads))?;
        let step_bytes = info.products.iter().map(|product| product.num_bytes).sum();
        let start = Instant::now();
        Ok(tokio::task::spawn_blocking(move || machine.roofs(step_bytes, || start.elapsed())).await??)
    }
}

/// What the server has counted so far.
async fn profile_of(target: &Target) -> anyhow::Result<Profile> {
    let url = target.client.url();
    let metrics = match target.client.metrics().await {
        Err(ClientError::Refused { .. }) => String::new(),
        answer => answer.map_err(|error| explain(&error, url))?,
    };
    Profile::parse(&metrics).ok_or_else(|| {
        Failure::new(format!("{url} does not say where its steps spend their time"))
            .hint("--profile needs a Bindery as the first server: leave it out, or swap --url and --compare")
            .into()
    })
}

async fn measure_load(
    targets: &[Target],
    shape: &Arc<Shape>,
    arrivals: Arrivals,
    args: &BenchArgs,
    next_number: &mut u64,
) -> Vec<Row> {
    let num_requests = args.num_requests.unwrap_or(match arrivals {
        Arrivals::Clients(clients) => (2 * clients).max(8),
        Arrivals::Rate(_) => 32,
    });
    let name = arrivals.name();
    let total = u64::from(num_requests) * u64::from(args.rounds) * targets.len() as u64;
    let bar = terminal::count_bar(&name, total);
    let mut rounds: Vec<Vec<Round>> = vec![Vec::new(); targets.len()];
    for _ in 0..args.rounds {
        for (target, rounds) in targets.iter().zip(&mut rounds) {
            rounds.push(round(target, shape, arrivals, num_requests, *next_number, &|| bar.inc(1)).await);
        }
        *next_number += u64::from(num_requests);
    }
    bar.finish_and_clear();
    rounds.iter().enumerate().map(|(server, rounds)| Row::of(server, arrivals, rounds)).collect()
}

fn print(report: &Report, args: &BenchArgs) -> anyhow::Result<()> {
    if args.json {
        terminal::print(&format!("{}\n", serde_json::to_string_pretty(&report.json())?))?;
    } else {
        let mut text = report.table();
        let prompt_tokens = report.rows.iter().flatten().map(|row| row.mean_prompt_tokens).find(|tokens| *tokens > 0.0);
        let tokens = prompt_tokens.map_or_else(String::new, |tokens| format!(" ({tokens:.0} tokens)"));
        let draws = match args.temperature {
            0.0 => "greedy".to_owned(),
            temperature => format!("drawn at temperature {temperature}"),
        };
        let _ = write!(
            text,
            "\n{} words in{tokens}, {} tokens out, {draws}; {} rounds, rates are their medians\n",
            args.input_words, args.output_tokens, args.rounds
        );
        terminal::print(&text)?;
    }
    for warning in report.warnings() {
        terminal::warn(&warning);
    }
    Ok(())
}

fn settings_json(args: &BenchArgs) -> serde_json::Value {
    json!({
        "input_words": args.input_words, "output_tokens": args.output_tokens, "rounds": args.rounds, "seed": args.seed,
        "temperature": args.temperature,
        "ignore_eos": !args.no_ignore_eos,
        "endpoint": match args.endpoint { Endpoint::Completions => "completions", Endpoint::Chat => "chat" },
    })
}

async fn target(url: &str, model: Option<&str>, args: &BenchArgs) -> anyhow::Result<Target> {
    let client = Client::new(url, args.api_key.as_deref())?;
    let model = match model {
        Some(model) => model.to_owned(),
        None => client.first_model().await.map_err(|error| explain(&error, url))?,
    };
    Ok(Target { client, models: vec![model] })
}

fn explain(error: &ClientError, url: &str) -> Failure {
    match error {
        ClientError::Connect { .. } => Failure::new(error.to_string()).hint("start the server first, or check the URL"),
        ClientError::Refused { status: 401 | 403, .. } => Failure::new(format!("{url} answered {error}"))
            .hint("give the server's key with --api-key or BINDERY_API_KEY"),
        ClientError::Refused { status: 400, code, message } => {
            let failure = Failure::new(format!("{url} answered {error}"));
            // Servers other than ours say it in OpenAI's words, under a code of their own.
            let is_too_long = code.as_deref() == Some("context_length_exceeded")
                || message.to_lowercase().contains("maximum context length");
            if is_too_long {
                failure.hint("ask for less with --input-words or --output-tokens")
            } else if message.contains("ignore_eos") {
                failure.hint("a server that refuses ignore_eos is tested with --no-ignore-eos")
            } else {
                failure
            }
        }
        _ => Failure::new(format!("{url}: {error}")),
    }
}

/// A model served in this process on a free loopback port: the whole way of a request, without a second command.
struct OwnServer {
    url: String,
    name: String,
    model: Arc<LocalModel>,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl OwnServer {
    async fn start(args: &BenchArgs) -> anyhow::Result<Self> {
        let settings = ModelSettings::new(args.model.clone().or_else(model_from_environment), &args.engine)?;
        let files = local::fetch(&settings, LogFormat::Text).await?;
        let (model, report) = local::load(&files, &settings.local, LogFormat::Text).await?;
        report.notes.iter().for_each(|note| terminal::note(note));
        eprintln!(
            "{}: {}, {}, {} threads, {} KV blocks",
            files.name, model.info.weight_format, model.info.device, model.info.threads, report.num_blocks
        );
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let config = ServerConfig {
            served_model_names: vec![files.name.clone()],
            api_keys: Vec::new(),
            tenants: Vec::new(),
            admin_key: None,
            max_body_bytes: DEFAULT_MAX_BODY_BYTES,
            shutdown_timeout: Duration::from_secs(1),
            digest: Arc::new(files.digest.clone().map_or_else(OnceLock::new, OnceLock::from)),
            license: files.license.clone(),
            adapter_roots: AdapterRoots::default(),
            gateway: None,
        };
        let (slot, stop) = (ModelSlot::default(), CancellationToken::new());
        slot.set(model.clone());
        let server = tokio::spawn(bindery_server::run(listener, config, slot, stop.clone().cancelled_owned()));
        Ok(Self { url, name: files.name, model, stop, server })
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.server.await??;
        let model = self.model;
        tokio::task::spawn_blocking(move || model.stop()).await?;
        Ok(())
    }
}
