//! The flags of adapters, and `bindery adapters`.
//!
//! `--adapter` takes one NAME=PATH, so that MODEL can follow it; `--lora-modules` is vLLM's and takes what vLLM's takes:
//! several after one flag, each NAME=PATH or a JSON object. It must not look at the disk.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

/// `NAME=PATH` as it was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AdapterArg {
    pub(crate) name: String,
    /// A path or a repository.
    pub(crate) source: String,
}

/// Flags of `serve`.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Adapters")]
pub(crate) struct AdapterArgs {
    // Not a doc comment: to rustdoc the brackets would be a link.
    #[arg(long, value_name = "NAME=PATH", env = "BINDERY_ADAPTER", value_delimiter = ',', value_parser = parse_adapter,
        help = "A LoRA adapter that requests call NAME: a folder as peft saves it, a .gguf file, or org/repo[@revision] on \
                the hub; repeatable, loaded at the start")]
    pub(crate) adapter: Vec<AdapterArg>,
    /// The same in vLLM's form: several after one flag, each NAME=PATH or {"name": …, "path": …}
    #[arg(long, value_name = "NAME=PATH", num_args = 1.., value_parser = parse_lora_module)]
    pub(crate) lora_modules: Vec<AdapterArg>,
    /// Folder that adapters may be loaded from while the server runs; repeatable [default: the folders that the adapters
    /// given at the start lie in]
    #[arg(long, value_name = "DIR", env = "BINDERY_ADAPTER_ROOT", value_delimiter = ',')]
    pub(crate) adapter_root: Vec<PathBuf>,
    /// Taken from vLLM's command lines: adapters are always on here, and cost nothing where there are none
    #[arg(long, hide = true)]
    pub(crate) enable_lora: bool,
}

impl AdapterArgs {
    /// Of both flags.
    pub(crate) fn all(&self) -> impl Iterator<Item = &AdapterArg> {
        self.adapter.iter().chain(&self.lora_modules)
    }
}

/// `adapters`
#[derive(Args, Debug)]
pub(crate) struct AdaptersArgs {
    #[command(subcommand)]
    pub(crate) action: AdaptersAction,
    /// The running server
    #[arg(long, global = true, env = "BINDERY_URL", default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Its admin key
    #[arg(long, global = true, value_name = "KEY", env = "BINDERY_ADMIN_KEY", hide_env_values = true)]
    pub(crate) admin_key: Option<String>,
    /// JSON instead of the table or the sentence
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AdaptersAction {
    /// List the server's adapters: versions, where they are, who uses them
    List,
    /// Load an adapter into the running server
    Load(AdapterLoadArgs),
    /// Take an adapter's name away; its memory is freed with the last request that uses it
    Unload(AdapterUnloadArgs),
}

/// `adapters load`
#[derive(Args, Debug)]
pub(crate) struct AdapterLoadArgs {
    /// What requests will call it
    pub(crate) name: String,
    /// Where it lies on the server's machine: in one of the folders it may load from. ./ and ../ are taken from here, other
    /// relative paths from those folders
    pub(crate) path: String,
    /// Replace what has the name: running requests finish on the old version
    #[arg(long)]
    pub(crate) inplace: bool,
    /// Only this tenant sees it; repeatable [default: everyone]
    #[arg(long, value_name = "NAME")]
    pub(crate) tenant: Vec<String>,
    /// It never gives way to others
    #[arg(long)]
    pub(crate) pinned: bool,
}

/// `adapters unload`
#[derive(Args, Debug)]
pub(crate) struct AdapterUnloadArgs {
    /// Of the adapter
    pub(crate) name: String,
    /// wait: until the last request that uses it has ended; refuse: where one does
    #[arg(long, value_enum, default_value_t = UnloadMode::Wait)]
    pub(crate) mode: UnloadMode,
    /// How long to wait at most, in seconds [default: as long as it takes]
    #[arg(long, value_name = "N", value_parser = parse_seconds, allow_hyphen_values = true)]
    pub(crate) timeout_s: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum UnloadMode {
    Wait,
    Refuse,
}

pub(super) fn parse_adapter(text: &str) -> Result<AdapterArg, String> {
    match text.trim().split_once('=') {
        Some((name, source)) if !name.trim().is_empty() && !source.trim().is_empty() => {
            Ok(AdapterArg { name: name.trim().to_owned(), source: source.trim().to_owned() })
        }
        _ => Err("expected NAME=PATH".to_owned()),
    }
}

/// vLLM's objects may also name the base, which is for people only.
fn parse_lora_module(text: &str) -> Result<AdapterArg, String> {
    if !text.trim_start().starts_with('{') {
        return parse_adapter(text);
    }
    let expected = |why: String| format!("expected NAME=PATH or {{\"name\": …, \"path\": …}}: {why}");
    let object: Value = serde_json::from_str(text).map_err(|error| expected(format!("no JSON ({error})")))?;
    for key in object.as_object().into_iter().flat_map(|object| object.keys()) {
        if !["name", "path", "base_model_name"].contains(&key.as_str()) {
            return Err(expected(format!("{key:?} is not known")));
        }
    }
    let text_of = |key: &str| {
        let value = object[key].as_str().map(str::trim).filter(|value| !value.is_empty());
        value.map(str::to_owned).ok_or_else(|| expected(format!("{key:?} is missing or no text")))
    };
    Ok(AdapterArg { name: text_of("name")?, source: text_of("path")? })
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a number of seconds, 0 or more".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arg(name: &str, source: &str) -> AdapterArg {
        AdapterArg { name: name.to_owned(), source: source.to_owned() }
    }

    #[test]
    fn both_forms_of_vllm_are_read() {
        assert_eq!(parse_adapter("fr=/srv/fr"), Ok(arg("fr", "/srv/fr")));
        assert_eq!(parse_adapter("fr=org/repo@a=b"), Ok(arg("fr", "org/repo@a=b")), "the first = parts them");
        assert_eq!(parse_lora_module("fr=x"), Ok(arg("fr", "x")));
        let object = r#"{"name": "fr", "path": "/srv/f,r", "base_model_name": "llama"}"#;
        assert_eq!(parse_lora_module(object), Ok(arg("fr", "/srv/f,r")));
        for wrong in ["fr", "=x", "fr=", ""] {
            assert_eq!(parse_adapter(wrong), Err("expected NAME=PATH".to_owned()), "{wrong}");
        }
        for (wrong, expected) in [
            (r#"{"name": "fr"}"#, "\"path\" is missing"),
            (r#"{"name": 3, "path": "x"}"#, "\"name\" is missing or no text"),
            (r#"{"name": "a", "path": "x", "rank": 3}"#, "\"rank\" is not known"),
            ("{name", "no JSON"),
        ] {
            assert!(parse_lora_module(wrong).unwrap_err().contains(expected), "{wrong}");
        }
    }
}
