//! `bindery adapters list|load|unload`: the adapters of a running server, by its administration routes.
//!
//! It shows what the server answers and holds no rule of its own but one: a path that begins with a dot is taken from the
//! folder the command runs in, as in a shell.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::{
    args::{AdapterLoadArgs, AdapterUnloadArgs, AdaptersAction, AdaptersArgs, UnloadMode},
    client::{Client, ClientError},
    commands::models::{plain_table, show},
    failure::{Failure, Interrupted},
    signals::StopSignals,
    terminal,
};

/// Of a name in the table, and of the tenants, so that a row fits 80 columns.
const MAX_NAME_CHARS: usize = 18;
const MAX_TENANTS_CHARS: usize = 10;

pub(crate) async fn run(args: AdaptersArgs) -> anyhow::Result<()> {
    let mut signals = StopSignals::listen()?;
    signals.unless_stopped(Box::pin(ask(args))).await.ok_or(Interrupted)?
}

async fn ask(args: AdaptersArgs) -> anyhow::Result<()> {
    let Some(key) = args.admin_key.as_deref().filter(|key| !key.trim().is_empty()) else {
        return Err(Failure::usage("no admin key was given, and the server's adapters are for whoever holds it")
            .hint("set BINDERY_ADMIN_KEY, or give --admin-key, the same as the server has")
            .into());
    };
    let client = Client::with_key(&args.url, key)?;
    let (path, body) = match &args.action {
        AdaptersAction::List => ("/v1/adapters", None),
        AdaptersAction::Load(load) => ("/v1/load_lora_adapter", Some(load_body(load)?)),
        AdaptersAction::Unload(unload) => ("/v1/unload_lora_adapter", Some(unload_body(unload)?)),
    };
    let answer = client.json(path, body.as_ref()).await.map_err(|error| explain(&error, client.url()))?;
    let text = match &args.action {
        _ if args.json => format!("{}\n", serde_json::to_string_pretty(&answer)?),
        AdaptersAction::List => table(&answer),
        AdaptersAction::Load(_) | AdaptersAction::Unload(_) => {
            format!("{}\n", answer["message"].as_str().unwrap_or("done"))
        }
    };
    terminal::print(&text)?;
    Ok(())
}

fn load_body(load: &AdapterLoadArgs) -> anyhow::Result<Value> {
    let AdapterLoadArgs { name, path, inplace, tenant, pinned } = load;
    let is_from_here =
        ["./", "../"].iter().any(|prefix| path.starts_with(prefix)) || matches!(path.as_str(), "." | "..");
    let path = if is_from_here { std::path::absolute(path)?.to_string_lossy().into_owned() } else { path.clone() };
    let mut body = json!({"lora_name": name, "lora_path": path});
    // What is not asked for is not sent: the server's own defaults count.
    if *inplace {
        body["load_inplace"] = json!(true);
    }
    if !tenant.is_empty() {
        body["tenants"] = json!(tenant);
    }
    if *pinned {
        body["pinned"] = json!(true);
    }
    Ok(body)
}

fn unload_body(unload: &AdapterUnloadArgs) -> anyhow::Result<Value> {
    let AdapterUnloadArgs { name, mode, timeout_s } = unload;
    let mut body = json!({"lora_name": name});
    match (mode, timeout_s) {
        (UnloadMode::Refuse, Some(_)) => {
            return Err(Failure::usage("--timeout-s says how long to wait, and --mode refuse does not wait")
                .hint("leave one of them out")
                .into());
        }
        (UnloadMode::Refuse, None) => body["mode"] = json!("refuse"),
        (UnloadMode::Wait, Some(seconds)) => body["timeout_s"] = json!(seconds),
        (UnloadMode::Wait, None) => {}
    }
    Ok(body)
}

fn explain(error: &ClientError, url: &str) -> Failure {
    match error {
        ClientError::Connect { .. } => {
            Failure::new(error.to_string()).hint("start the server first, or give its URL with --url or BINDERY_URL")
        }
        ClientError::Refused { status: 401, .. } => Failure::new(format!("{url} answered {error}"))
            .hint("give the server's admin key with --admin-key or BINDERY_ADMIN_KEY"),
        ClientError::Refused { code: Some(code), .. } if code == "admin_key_required" => {
            Failure::new(format!("{url} answered {error}"))
                .hint("the key must be the server's admin key: that of its --admin-key or BINDERY_ADMIN_KEY")
        }
        _ => Failure::new(format!("{url} answered {error}")),
    }
}

/// A row an adapter; what does not fit 80 columns is in `--json`.
fn table(answer: &Value) -> String {
    let rows = answer["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    if rows.is_empty() {
        return "no adapters\n".to_owned();
    }
    let mut table = plain_table();
    table.set_header(["NAME", "VERSION", "STATE", "USERS", "RANK", "SIZE", "FOR"]);
    let mut failures = String::new();
    for row in rows {
        let text = |key: &str| row[key].as_str().unwrap_or_default();
        let number = |key: &str| row[key].as_u64().map_or_else(|| "-".to_owned(), |number| number.to_string());
        let size =
            row["memory_bytes"].as_u64().filter(|&bytes| bytes > 0).map_or_else(|| "-".to_owned(), terminal::size);
        let tenants = match row["tenants"].as_array() {
            None => "everyone".to_owned(),
            Some(tenants) => tenants.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
        };
        let pinned = if row["pinned"] == true { ", pinned" } else { "" };
        let name = shorten(text("name"), MAX_NAME_CHARS);
        table.add_row([
            name.clone(),
            number("version"),
            format!("{}{pinned}", text("state")),
            number("users"),
            number("rank"),
            size,
            shorten(&tenants, MAX_TENANTS_CHARS),
        ]);
        if let Some(failure) = row["failure"].as_str() {
            let _ = writeln!(failures, "{name}: could not be read: {failure}");
        }
    }
    format!("{}\n{failures}", show(&mut table))
}

fn shorten(text: &str, max_chars: usize) -> String {
    if text.chars().count() <= max_chars {
        return text.to_owned();
    }
    text.chars().take(max_chars - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(path: &str) -> AdapterLoadArgs {
        AdapterLoadArgs { name: "x".into(), path: path.into(), inplace: false, tenant: Vec::new(), pinned: false }
    }

    #[test]
    fn what_is_asked_for_is_sent_and_nothing_else() {
        assert_eq!(load_body(&load("fr/new")).unwrap(), json!({"lora_name": "x", "lora_path": "fr/new"}));
        let all = AdapterLoadArgs { inplace: true, tenant: vec!["a".into()], pinned: true, ..load("/srv/fr") };
        assert_eq!(
            load_body(&all).unwrap(),
            json!({"lora_name": "x", "lora_path": "/srv/fr", "load_inplace": true, "tenants": ["a"], "pinned": true})
        );
        let here = std::env::current_dir().unwrap();
        assert_eq!(load_body(&load("./fr")).unwrap()["lora_path"], here.join("fr").to_str().unwrap());
    }

    #[test]
    fn a_row_fits_80_columns_whatever_the_names() {
        let long = "n".repeat(100);
        let answer = json!({"data": [{
            "name": long, "version": 12_345, "state": "resident", "pinned": true, "users": 4096, "rank": 512,
            "memory_bytes": 1_234_567_890_u64, "tenants": [long], "failure": null,
        }, {"name": "b", "version": 0, "state": "disk", "pinned": false, "users": 0, "rank": null, "memory_bytes": 0,
            "tenants": null, "failure": "no such file"}]});
        let text = table(&answer);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains("nn…") && text.contains("b: could not be read: no such file"), "{text}");
        assert_eq!(table(&json!({"data": []})), "no adapters\n");
    }
}
