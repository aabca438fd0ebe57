//! `bindery check CONFIG`: what a config file means, with the environment as it is now; `--explain` documents every key.
//!
//! It goes the way of `serve`, by the same functions, until something would be fetched, read in bulk or listened on. What
//! `serve` would refuse on this machine is refused here with the same words; what could not be looked at is named.

mod explain;
mod gateway;

use std::{fmt::Write as _, net::SocketAddr, path::PathBuf};

use bindery_engine::local_model::CheckReport;
use bindery_hub::{Cards, ModelRef, inventory, locate_adapter};

use crate::{
    adapters::{AdapterSettings, ReadWhen},
    args::{CheckArgs, ServeArgs, variable_behind},
    commands::{
        models::{plain_table, show},
        serve::{Address, bind, served_names},
    },
    config::{self, keys::KEYS},
    failure::Failure,
    gateway::ConfigFile,
    local,
    settings::{Settings, merge, model_from_environment},
    terminal::{self, Style, thousands},
};

pub(crate) async fn run(args: CheckArgs) -> anyhow::Result<()> {
    if args.explain {
        terminal::print(&explain::explain())?;
    } else if args.config.is_none() {
        return Err(Failure::usage("no config file was named: `bindery check FILE` says what a file means")
            .hint("`bindery check --explain` documents every key of one")
            .into());
    }
    let Some(path) = &args.config else { return Ok(()) };
    let file = config::read(path)?;
    let environment = environment()?;
    let flags = ServeArgs { config: Some(path.clone()), ..environment.clone() };
    let settings = Settings::resolve(flags)?;
    settings.adapters.check_names(&served_names(&settings)?)?;
    let effective = merge(environment.clone(), file.clone());
    let address = bind(&settings).await?;
    let model = Model::find(&settings).await?;

    let style = Style::for_stdout();
    let mut table = plain_table();
    table.set_header(["KEY", "VALUE", "FROM"]);
    for key in KEYS {
        let origin = match ((key.get)(&environment), (key.get)(&file)) {
            (Some(_), Some(_)) => format!("environment ({}), over the file", key.variable()),
            (Some(_), None) => format!("environment ({})", key.variable()),
            (None, Some(_)) => "file".to_owned(),
            (None, None) => "default".to_owned(),
        };
        let value = (key.get)(&effective).unwrap_or_else(|| key.default.to_owned());
        table.add_row([format!("{}.{}", key.section, key.name), value, origin]);
    }
    let mut text = format!("{}\n\n", show(&mut table));
    let mut gateway_lines = file.tables.gateway.as_deref().map(gateway::meaning).unwrap_or_default();
    if let Some(config) = &file.tables.gateway {
        let local = local_names(&settings)?;
        gateway_lines.extend(gateway::lost_patterns(config, &local));
        gateway_lines.extend(gateway::lost_places(config, &local));
    }
    let strangers = match file.tables.gateway.clone() {
        Some(gateway) => {
            gateway::strangers(&ConfigFile { path: path.clone(), gateway, settings: file.clone() }).await?
        }
        None => Vec::new(),
    };
    let lines = listening(&settings, &address).into_iter().chain(model.meaning(&settings));
    for line in lines.chain(adapters(&settings)?).chain(gateway_lines).chain(strangers) {
        let _ = writeln!(text, "{line}");
    }
    let so_far = if model.report.is_some() { "" } else { ", as far as could be seen without the model's files" };
    let _ = writeln!(text, "{}", style.good(&format!("{} is valid{so_far}", path.display())));
    terminal::print(&text)?;
    Ok(())
}

/// The base's names and those of the adapters that are known before the start.
fn local_names(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let mut names = served_names(settings)?;
    names.extend(settings.adapters.adapters.iter().map(|adapter| adapter.name.clone()));
    names.extend(settings.adapters.in_folders()?.into_iter().map(|(name, ..)| name));
    Ok(names)
}

/// What the environment alone says.
pub(super) fn environment() -> Result<ServeArgs, Failure> {
    let mut environment = ServeArgs::from_environment().map_err(|error| {
        let variable = variable_behind(&error).map_or_else(String::new, |variable| format!(" variable {variable}"));
        Failure::usage(first_line(&error.to_string())).hint(format!("the value comes from the environment{variable}"))
    })?;
    environment.model = model_from_environment();
    Ok(environment)
}

/// Where it would listen and who could connect, in sentences.
fn listening(settings: &Settings, address: &Address) -> Vec<String> {
    let mut lines = vec![format!("It would listen on {}.", settings.host_and_port())];
    let (Address::Reserved(_, resolved) | Address::InUse(resolved)) = address;
    if let Address::InUse(_) = address {
        lines.push("Another program is using this port now: a start would fail until it ends.".to_owned());
    }
    lines.push(who_could_connect(settings, *resolved));
    lines
}

fn who_could_connect(settings: &Settings, address: SocketAddr) -> String {
    let num_of_tenants = settings.num_keys() - settings.api_keys.len();
    match settings.api_keys.len() {
        0 if num_of_tenants > 0 => format!("Clients would have to send one of {num_of_tenants} keys of tenants."),
        count if num_of_tenants > 0 => {
            format!("Clients would have to send one of {count} keys of BINDERY_API_KEY or {num_of_tenants} keys of tenants.")
        }
        0 if !settings.adapters.tenants.is_empty() => {
            "Clients would have to send a tenant's key, which `bindery keys create` makes.".to_owned()
        }
        0 if settings.is_open_to_others(address.ip()) => {
            "Warning: no key would be asked for, and other machines could connect. Set BINDERY_API_KEY before you start it."
                .to_owned()
        }
        0 => "No key would be asked for; only this machine could connect.".to_owned(),
        1 => "Clients would have to send the key of BINDERY_API_KEY.".to_owned(),
        count => format!("Clients would have to send one of the {count} keys of BINDERY_API_KEY."),
    }
}

/// The model that a config names.
struct Model {
    /// What it is, in a sentence without its full stop.
    described: String,
    path: Option<PathBuf>,
    /// None where its files are not here.
    report: Option<CheckReport>,
    may_fetch: bool,
}

impl Model {
    async fn find(settings: &Settings) -> anyhow::Result<Self> {
        let options = local::fetch_options(&settings.model)?;
        let reference = ModelRef::parse(&settings.model.source)?;
        let path = inventory::locate_model(&reference, &options)?;
        let described = match reference {
            ModelRef::Card(name) => {
                let cards = Cards::load(options.cards_dir.as_deref())?;
                let card = cards.find(&name)?;
                format!("{name}, the card of {} ({})", card.title, card.license)
            }
            ModelRef::Hub { repo, file: Some(file), .. } => format!("the file {file} of {repo} on the hub"),
            ModelRef::Hub { repo, file: None, .. } => format!("the repository {repo} on the hub"),
            ModelRef::Directory(path) => format!("the folder {}", path.display()),
            ModelRef::File(path) => format!("the file {}", path.display()),
        };
        let report = match path.clone() {
            Some(path) => Some(local::check(path, &settings.model.local).await?),
            None => None,
        };
        Ok(Self { described, path, report, may_fetch: !options.offline })
    }

    /// In sentences.
    fn meaning(&self, settings: &Settings) -> Vec<String> {
        let mut lines = vec![format!("It would serve {}.", self.described)];
        if let (Some(report), Some(path)) = (&self.report, &self.path) {
            lines.push(format!(
                "Its files are at {}: {}, contexts of up to {} tokens.",
                path.display(),
                report.architecture,
                thousands(report.max_model_len as u64)
            ));
            if settings.model.local.kv_cache_memory.is_none() {
                let not_checked = "Not checked: whether the memory that is free at the start holds such a context \
                                   (kv_cache_memory is not set).";
                lines.push(not_checked.to_owned());
            }
        } else {
            lines.push(if self.may_fetch {
                "Its files are not on this machine and would be fetched first.".to_owned()
            } else {
                "Warning: its files are not on this machine and the network may not be used: a start would fail until \
                     they are here."
                    .to_owned()
            });
            lines.push(
                "Not checked, as that takes the files: the model's format, max_model_len and kv_cache_memory."
                    .to_owned(),
            );
        }
        lines
    }
}

/// Adapters and tenants, in sentences.
fn adapters(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let AdapterSettings { adapters, folders, roots, tenants } = &settings.adapters;
    let audience =
        |tenants: &Option<Vec<String>>| tenants.as_ref().map_or("everyone".to_owned(), |them| them.join(", "));
    let options = local::fetch_options(&settings.model)?;
    let mut lines: Vec<String> = adapters
        .iter()
        .map(|adapter| {
            let who = audience(&adapter.tenants);
            let when = match (adapter.read, adapter.pinned) {
                (ReadWhen::AtStart, true) => "read at the start and kept",
                (ReadWhen::AtStart, false) => "read at the start",
                (ReadWhen::FirstAskedFor, _) => "read when first asked for",
            };
            let here = if locate_adapter(&adapter.source, &options).is_some() { "" } else { ", to be fetched first" };
            format!("Adapter {}: {}{here}; for {who}; {when}.", adapter.name, adapter.source)
        })
        .collect();
    let found = settings.adapters.in_folders()?;
    for folder in folders {
        let of_it = found.iter().filter(|(_, _, of)| of.path == folder.path);
        let names: Vec<String> = of_it.map(|(name, ..)| name.clone()).collect();
        let watched = if folder.watch { "watched" } else { "looked at once" };
        let (path, who) = (folder.path.display(), audience(&folder.tenants));
        lines.push(match names.len() {
            0 => format!("Adapters in {path} ({watched}; for {who}): none yet."),
            count => format!("Adapters in {path} ({watched}; for {who}): {count}, {}.", shortened(&names)),
        });
    }
    if !lines.is_empty() {
        lines.push("Not checked, as that takes the weights: whether the adapters fit the model.".to_owned());
    }
    let have_keys = tenants.iter().filter(|tenant| !tenant.api_keys.is_empty());
    let names: Vec<String> = have_keys.map(|tenant| tenant.name.clone()).collect();
    if !names.is_empty() {
        lines.push(format!("Tenants with keys of their own: {}.", shortened(&names)));
    }
    if settings.admin_key.is_some() && roots.is_empty() {
        lines.push("No folder is open to loading adapters at run time (--adapter-root).".to_owned());
    }
    Ok(lines)
}

fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let more = names.len().saturating_sub(SHOWN);
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}
