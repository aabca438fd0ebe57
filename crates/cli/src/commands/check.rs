//! `bindery check CONFIG`: what a config file means, with the environment as it is now; `--explain` documents every key.

use std::fmt::Write as _;

use bindery_hub::{Cards, FetchOptions, ModelRef, inventory};

use crate::{
    args::{CheckArgs, ServeArgs},
    commands::models::{plain_table, show},
    config::{
        self,
        keys::{KEYS, Kind},
    },
    failure::Failure,
    settings::{Settings, merge, model_from_environment},
    terminal::{self, Style},
};

pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<()> {
    if args.explain {
        terminal::print(&explain())?;
    }
    let Some(path) = &args.config else { return Ok(()) };
    let file = config::read(path)?;
    let mut environment =
        ServeArgs::from_environment().map_err(|error| Failure::usage(first_line(&error.to_string())))?;
    environment.model = model_from_environment();
    let flags = ServeArgs { config: Some(path.clone()), ..environment.clone() };
    let settings = Settings::resolve(flags)?;
    let effective = merge(environment.clone(), file.clone());

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
    for line in meaning(&settings) {
        let _ = writeln!(text, "{line}");
    }
    let _ = writeln!(text, "{}", style.good(&format!("{} is valid", path.display())));
    terminal::print(&text)?;
    Ok(())
}

/// The settings in sentences.
fn meaning(settings: &Settings) -> Vec<String> {
    let source = &settings.model.source;
    let mut lines =
        vec![format!("It would listen on {}:{} and serve {source}.", settings.host, settings.port), model_line(source)];
    let is_loopback =
        settings.host == "localhost" || settings.host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    lines.push(match (settings.api_keys.len(), is_loopback) {
        (0, true) => "No key would be asked for; only this machine could connect.".to_owned(),
        (0, false) => {
            "Warning: no key would be asked for, and other machines could connect. Set BINDERY_API_KEY before you start it.".to_owned()
        }
        (1, _) => "Clients would have to send the key of BINDERY_API_KEY.".to_owned(),
        (count, _) => format!("Clients would have to send one of the {count} keys of BINDERY_API_KEY."),
    });
    lines
}

fn model_line(source: &str) -> String {
    let described = ModelRef::parse(source).and_then(|reference| {
        Ok(match reference {
            ModelRef::Card(name) => {
                let options = FetchOptions::from_env(true)?;
                let cards = Cards::load(options.cards_dir.as_deref())?;
                let card = cards.find(&name)?;
                let cached = match inventory::locate(card, &options) {
                    Some(path) => format!("it is cached at {}", path.display()),
                    None => "it is not cached and would be fetched first".to_owned(),
                };
                format!("{name} is the card of {} ({}); {cached}.", card.title, card.license)
            }
            ModelRef::Hub { repo, file: Some(file), .. } => {
                format!("The model is the file {file} of {repo} on the hub.")
            }
            ModelRef::Hub { repo, file: None, .. } => format!("The model is the repository {repo} on the hub."),
            ModelRef::Directory(path) => format!("The model is the folder {}.", path.display()),
            ModelRef::File(path) => format!("The model is the file {}.", path.display()),
        })
    });
    described.unwrap_or_else(|error| format!("Warning: {error}."))
}

fn explain() -> String {
    let mut text = String::from(
        "# Every key of the config file, with its default. Flags win over the environment, the environment over the file.\n\
         # Keys for clients never stand here: BINDERY_API_KEY (several: comma-separated) and BINDERY_ADMIN_KEY hold them.\n",
    );
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            let _ = writeln!(text, "\n[{section}]");
        }
        let example = match key.kind {
            Kind::Text | Kind::Texts => format!("{:?}", key.example),
            Kind::Integer | Kind::Boolean => key.example.to_owned(),
        };
        let _ = writeln!(text, "# {}: {}; for example {} = {example}", key.name, key.explain, key.name);
        let _ = writeln!(
            text,
            "#   {}; default: {}; flag: {}; environment: {}",
            key.kind.describe(),
            key.default,
            key.flag(),
            key.variable()
        );
    }
    text
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}
