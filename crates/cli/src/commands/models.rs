//! `bindery models`: the cards and what is cached; `verify` reads it again, `remove` makes room. (`inspect` has a file of its
//! own.)

use std::sync::Arc;

use bindery_hub::{
    Cards, FetchOptions, SharedProgress,
    cache::Checked,
    inventory::{self, CardRow},
};
use comfy_table::{Table, presets::NOTHING};
use serde_json::json;

use crate::{
    args::{ModelsAction, ModelsArgs},
    commands::inspect,
    failure::{Failure, Interrupted},
    signals::StopSignals,
    terminal::{self, FetchProgress, Style},
};

pub(crate) async fn run(args: ModelsArgs) -> anyhow::Result<()> {
    let options = FetchOptions::from_env(true)?;
    match args.action {
        None => list(&inventory::list(&options)?, args.json),
        Some(ModelsAction::Inspect(inspected)) => inspect::run(*inspected).await,
        Some(ModelsAction::Verify { name }) => {
            let mut signals = StopSignals::listen()?;
            signals.unless_stopped(verify(name.as_deref(), &options)).await.ok_or(Interrupted)?
        }
        Some(ModelsAction::Remove { name }) => remove(&name, &options),
    }
}

fn list(rows: &[CardRow], as_json: bool) -> anyhow::Result<()> {
    if as_json {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                json!({
                    "name": row.card.name, "title": row.card.title, "architecture": row.card.architecture,
                    "parameters": row.card.parameters, "context": row.card.context, "license": row.card.license,
                    "bytes": row.card.file.as_ref().map(|file| file.size), "note": row.card.note, "path": row.path,
                })
            })
            .collect();
        terminal::print(&format!("{}\n", serde_json::to_string_pretty(&rows)?))?;
        return Ok(());
    }
    let style = Style::for_stdout();
    let mut table = plain_table();
    table.set_header(["NAME", "MODEL", "SIZE", "LICENCE", "CACHED"]);
    for CardRow { card, path } in rows {
        let name = if card.name == bindery_hub::DEFAULT_MODEL { format!("{} *", card.name) } else { card.name.clone() };
        table.add_row([
            name,
            card.title.clone(),
            card.file.as_ref().map_or_else(|| "-".to_owned(), |file| terminal::size(file.size)),
            card.license.clone(),
            path.as_ref().map_or_else(|| "no".to_owned(), |path| path.display().to_string()),
        ]);
    }
    let mut text = format!("{}\n", show(&mut table));
    for CardRow { card, .. } in rows {
        if let Some(note) = &card.note {
            text.push_str(&style.dim(&format!("{}: {note}\n", card.name)));
        }
    }
    text.push_str(&style.dim(
        "* served when no model is named. Others: org/repo[@revision][:file.gguf] on the hub, a folder, or a .gguf file\n",
    ));
    terminal::print(&text)?;
    Ok(())
}

async fn verify(name: Option<&str>, options: &FetchOptions) -> anyhow::Result<()> {
    let cards = Cards::load(options.cards_dir.as_deref())?;
    let chosen: Vec<_> = match name {
        Some(name) => vec![cards.find(name)?],
        None => cards.iter().collect(),
    };
    let progress: SharedProgress = Arc::new(FetchProgress::default());
    let (mut num_good, mut broken) = (0, Vec::new());
    for card in chosen {
        match inventory::verify(card, options, &progress).await? {
            Checked::Good => {
                num_good += 1;
                terminal::print(&format!("{}: good\n", card.name))?;
            }
            Checked::Broken(why) => {
                terminal::print(&format!("{}: broken: {why}\n", card.name))?;
                broken.push(card.name.clone());
            }
            Checked::Missing if name.is_some() => {
                return Err(Failure::new(format!("{} is not cached", card.name))
                    .hint(format!("fetch it: bindery pull {}", card.name))
                    .into());
            }
            Checked::Missing => {}
        }
    }
    if let Some(first) = broken.first() {
        return Err(Failure::new(format!("{} of {} cached models broken", broken.len(), broken.len() + num_good))
            .hint(format!("fetch it again: bindery pull {first}"))
            .into());
    }
    if num_good == 0 {
        terminal::note("no model of a card is cached");
    }
    Ok(())
}

fn remove(name: &str, options: &FetchOptions) -> anyhow::Result<()> {
    let cards = Cards::load(options.cards_dir.as_deref())?;
    let card = cards.find(name)?;
    let removed = inventory::remove(card, options)?;
    if let Some(path) = inventory::locate(card, options) {
        terminal::note(&format!("a copy that other tools may use stays at {}", path.display()));
    }
    if removed {
        terminal::print(&format!("{} removed from {}\n", card.name, options.cache_dir.display()))?;
        Ok(())
    } else {
        Err(Failure::new(format!("{} is not in Bindery's cache {}", card.name, options.cache_dir.display())).into())
    }
}

/// The table's text, its columns two blanks apart and none in front.
pub(crate) fn show(table: &mut Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// A table without lines: readable anywhere, easy to cut into columns.
pub(crate) fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table
}
