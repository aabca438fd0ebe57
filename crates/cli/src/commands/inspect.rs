//! `bindery models inspect MODEL`: what a model is made of and what it takes, without loading it.
//!
//! It finds the files and prints; the figures are the engine's, by the functions that loading goes by. It never fetches:
//! what is not on this machine is named as such. Data goes to stdout.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use anyhow::Context as _;
use bindery_engine::{
    LocalModelConfig,
    inspect::{Fit, Inspection, Workload, inspect},
};
use bindery_hub::{ModelRef, inventory};
use bindery_model::{
    Dtype, KvCacheDtype, LoadOptions, Quantize, TensorGroup, TensorPart,
    config::{DecoderConfig, FeedForward, NormKind, RopeScaling, Rotary},
    weights::HeldAs,
};
use comfy_table::{Cell, CellAlignment};
use serde_json::{Value, json};

use crate::{
    args::{EngineArgs, InspectArgs},
    commands::models::{plain_table, show},
    failure::Failure,
    local,
    settings::{ModelSettings, model_from_environment},
    terminal::{self, Style, thousands},
};

pub(crate) async fn run(args: InspectArgs) -> anyhow::Result<()> {
    let engine = EngineArgs { load: args.load, offline: Some(true), ..EngineArgs::default() };
    let settings = ModelSettings::new(args.model.or_else(model_from_environment), &engine)?;
    let options = local::fetch_options(&settings)?;
    let name = &settings.source;
    let reference = ModelRef::parse(name)?;
    let Some(path) = inventory::locate_model(&reference, &options)? else {
        return Err(Failure::new(format!("{name} is not on this machine"))
            .hint(format!("fetch it: bindery pull {name}"))
            .into());
    };
    let workload =
        Workload { num_requests: args.num_requests as usize, length: args.length.map(|length| length as usize) };
    let (file, local) = (path.clone(), settings.local.clone());
    let inspected = tokio::task::spawn_blocking(move || inspect(&file, &local, workload)).await;
    let inspected = inspected.context("the thread that inspects the model failed")?;
    let inspection = inspected.with_context(|| format!("cannot inspect {}", path.display()))?;
    let name = match reference {
        ModelRef::File(_) | ModelRef::Directory(_) => std::path::absolute(&path)?
            .file_name()
            .map_or_else(|| name.clone(), |name| name.to_string_lossy().into_owned()),
        ModelRef::Card(_) | ModelRef::Hub { .. } => name.clone(),
    };
    let LocalModelConfig { load, max_num_seqs, .. } = &settings.local;
    let page = Page { name: &name, path: &path, inspection: &inspection, load, max_num_seqs: *max_num_seqs };
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(&page.json())?) } else { page.text() };
    terminal::print(&text)?;
    Ok(())
}

/// All that is shown.
struct Page<'a> {
    name: &'a str,
    path: &'a Path,
    inspection: &'a Inspection,
    load: &'a LoadOptions,
    max_num_seqs: usize,
}

impl Page<'_> {
    fn text(&self) -> String {
        let style = Style::for_stdout();
        let Inspection { model, .. } = self.inspection;
        let mut text = format!("{}\n\n", style.bold(self.name));
        let mut rows = vec![("file", self.path.display().to_string())];
        rows.extend(structure(&model.config));
        rows.push(("parameters", parameters(model.num_parameters, model.num_active_parameters)));
        add_rows(&mut text, style, &rows);
        let _ = write!(text, "\n{}\n\n", tensor_table(&model.groups));
        add_rows(&mut text, style, &self.memory());
        text
    }

    /// What it takes when served.
    fn memory(&self) -> Vec<(&'static str, String)> {
        let Inspection { model, needs, machine, fit } = self.inspection;
        let size = terminal::size;
        let mut rows = vec![("weights", format!("{} as served{}", size(model.weight_bytes), self.how()))];
        let (mut served, mut others) = (String::new(), Vec::new());
        for &(dtype, bytes) in &model.kv_bytes_per_token {
            let (bytes, name) = (thousands(bytes as u64), kv_name(dtype));
            if dtype == model.kv_cache_dtype {
                served = format!("{bytes} bytes a token in {name}, as served");
            } else {
                others.push(format!("{bytes} in {name}"));
            }
        }
        rows.push(("kv cache", served));
        if !others.is_empty() {
            rows.push(("", others.join(", ")));
        }
        if model.config.layers.iter().any(|layer| layer.window.is_some()) {
            rows.push(("", "layers with a window keep all tokens, too".to_owned()));
        }
        let requests = |count: usize| format!("{} request{}", thousands(count as u64), plural(count));
        rows.push((
            "needed",
            format!(
                "{} for {} of {} tokens at a time:",
                size(needs.total_bytes),
                requests(needs.num_requests),
                thousands(needs.length as u64)
            ),
        ));
        rows.push((
            "",
            format!(
                "{} of weights, {} of KV cache, {} kept free beside",
                size(model.weight_bytes),
                size(needs.kv_bytes),
                size(needs.margin_bytes)
            ),
        ));
        let of_total = machine.total.map_or_else(String::new, |total| {
            let whose = if total.is_of_group { " (the limit of this process's control group)" } else { "" };
            format!(" of {}{whose}", size(total.bytes))
        });
        rows.push(("here", format!("{}{of_total} free now", size(machine.free_bytes))));
        rows.extend(self.fitting(*fit));
        rows
    }

    fn fitting(&self, fit: Option<Fit>) -> Vec<(&'static str, String)> {
        let Inspection { model, needs, .. } = self.inspection;
        let length = thousands(needs.length as u64);
        let Some(fit) = fit else {
            return vec![("fits", "no: these weights leave no room for a KV cache".to_owned())];
        };
        let mut rows = Vec::new();
        let at_once = match fit.num_requests {
            0 => format!("no request of {length} tokens"),
            count => {
                let limit = if count == self.max_num_seqs { ", the default limit of `serve`" } else { "" };
                format!("{} request{} of {length} tokens at a time{limit}", thousands(count as u64), plural(count))
            }
        };
        rows.push(("fits", at_once));
        rows.push((
            "",
            format!("in a KV cache of {} tokens, as `serve` would make it now", thousands(fit.kv_tokens as u64)),
        ));
        if fit.max_model_len < model.config.max_position_embeddings {
            let most = thousands(fit.max_model_len as u64);
            rows.push(("", format!("contexts would end at {most} tokens")));
        }
        rows
    }

    /// The options that make a difference to weights.
    fn how(&self) -> String {
        let mut how = Vec::new();
        match self.load.quantize {
            Quantize::None => {}
            Quantize::Int8 => how.push("--quantize int8"),
            Quantize::Int4 => how.push("--quantize int4"),
        }
        match self.load.dtype {
            Dtype::Auto => {}
            Dtype::F32 => how.push("--dtype f32"),
            Dtype::Bf16 => how.push("--dtype bf16"),
            Dtype::F16 => how.push("--dtype f16"),
        }
        if how.is_empty() { String::new() } else { format!(" under {}", how.join(" ")) }
    }

    fn json(&self) -> Value {
        let Inspection { model, needs, machine, fit } = self.inspection;
        let config = &model.config;
        let kv: BTreeMap<_, _> =
            model.kv_bytes_per_token.iter().map(|&(dtype, bytes)| (kv_name(dtype), bytes)).collect();
        let groups: Vec<Value> = model
            .groups
            .iter()
            .map(|group| {
                json!({
                    "part": part_name(group.part), "parameters": group.num_parameters,
                    "stored_as": group.stored.to_string(), "stored_bytes": group.stored_bytes,
                    "stored_bits": bits(group.stored_bytes, group.num_parameters),
                    "served_as": held_name(group.held), "served_bytes": group.held_bytes,
                    "served_bits": bits(group.held_bytes, group.num_parameters),
                })
            })
            .collect();
        json!({
            "name": self.name, "path": self.path.display().to_string(), "architecture": config.architecture,
            "num_layers": config.num_layers(), "hidden_size": config.hidden_size, "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim,
            "intermediate_size": config.mlp.intermediate_size, "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings, "tied_embeddings": config.tied_embeddings,
            "windows": config.layers.iter().map(|layer| layer.window).collect::<Vec<_>>(),
            "rotation": rotation(config), "experts": config.experts.as_ref().map(|experts| json!({
                "num_experts": experts.num_experts, "num_experts_per_token": experts.num_experts_per_token,
                "intermediate_size": experts.intermediate_size,
                "shared_intermediate_size": experts.shared_intermediate_size,
            })),
            "parameters": model.num_parameters, "active_parameters": model.num_active_parameters,
            "tensors": groups, "stored_bytes": model.stored_bytes, "weight_bytes": model.weight_bytes,
            "kv_cache_dtype": kv_name(model.kv_cache_dtype), "kv_bytes_per_token": kv,
            "needs": {
                "num_requests": needs.num_requests, "length": needs.length, "kv_bytes": needs.kv_bytes,
                "margin_bytes": needs.margin_bytes, "total_bytes": needs.total_bytes,
            },
            "machine": {"total_bytes": machine.total.map(|total| total.bytes), "free_bytes": machine.free_bytes},
            "fits": fit.map(|fit| json!({
                "num_requests": fit.num_requests, "kv_tokens": fit.kv_tokens, "kv_blocks": fit.num_blocks,
                "max_model_len": fit.max_model_len,
            })),
        })
    }
}

fn add_rows(text: &mut String, style: Style, rows: &[(&str, String)]) {
    for (name, value) in rows {
        let mut name = *name;
        for line in if name == "file" { vec![value.as_str()] } else { wrapped(value) } {
            let _ = writeln!(text, "{} {line}", style.dim(&format!("{name:<10}")));
            name = "";
        }
    }
}

/// Lines of a value that fit a terminal of 80 columns beside the name, broken at commas.
fn wrapped(value: &str) -> Vec<&str> {
    const WIDTH: usize = 69;
    let mut lines = Vec::new();
    let mut rest = value;
    while let Some((end, _)) = rest.char_indices().nth(WIDTH) {
        let Some(comma) = rest[..end].rfind(", ") else { break };
        lines.push(&rest[..=comma]);
        rest = &rest[comma + 2..];
    }
    lines.push(rest);
    lines
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn parameters(all: u64, active: u64) -> String {
    let counted = |count: u64| if count < 1_000_000 { thousands(count) } else { terminal::parameters(count) };
    let exactly = if all < 1_000_000 { String::new() } else { format!(" ({})", thousands(all)) };
    let a_token = if active == all { String::new() } else { format!(", {} of them a token", counted(active)) };
    format!("{}{exactly}{a_token}", counted(all))
}

/// What the configuration says, for people.
fn structure(config: &DecoderConfig) -> Vec<(&'static str, String)> {
    let number = |count: usize| thousands(count as u64);
    let norm = match config.norm.kind {
        NormKind::Rms => "RMS",
        NormKind::Layer => "layer",
    };
    let mut rows = vec![
        ("family", format!("{}, {norm} norms", config.architecture)),
        ("layers", format!("{} of width {}", config.num_layers(), number(config.hidden_size))),
        (
            "attention",
            format!(
                "{} heads of {} over {} key/value head{}",
                config.num_heads,
                config.head_dim,
                config.num_kv_heads,
                plural(config.num_kv_heads)
            ),
        ),
    ];
    let is_dense = |feed_forward| feed_forward == FeedForward::Dense;
    let num_dense = config.layers.iter().filter(|layer| is_dense(layer.feed_forward)).count();
    if num_dense > 0 {
        let gated = if config.mlp.gated { ", gated" } else { "" };
        let some = if num_dense < config.num_layers() { format!(", in {num_dense} layers") } else { String::new() };
        rows.push(("mlp", format!("of width {}{gated}{some}", number(config.mlp.intermediate_size))));
    }
    if let (Some(experts), true) = (&config.experts, num_dense < config.num_layers()) {
        let shared = experts
            .shared_intermediate_size
            .map_or_else(String::new, |width| format!(", and one of width {} for all", number(width)));
        rows.push((
            "experts",
            format!(
                "{} of width {}, {} a token{shared}",
                experts.num_experts,
                number(experts.intermediate_size),
                experts.num_experts_per_token
            ),
        ));
    }
    rows.push(("context", format!("{} tokens{}", number(config.max_position_embeddings), windows(config))));
    rows.extend(
        rotation(config).into_iter().enumerate().map(|(i, text)| (if i == 0 { "positions" } else { "" }, text)),
    );
    let tied = if config.tied_embeddings { ", the head is the embedding" } else { "" };
    rows.push(("vocabulary", format!("{} tokens{tied}", number(config.vocab_size))));
    rows
}

/// How many of a model's layers, where it is not all.
fn in_layers(count: usize, config: &DecoderConfig) -> String {
    if count == config.num_layers() { String::new() } else { format!(" in {count} of {} layers", config.num_layers()) }
}

fn windows(config: &DecoderConfig) -> String {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for window in config.layers.iter().filter_map(|layer| layer.window) {
        *counts.entry(window).or_default() += 1;
    }
    let windows = counts
        .into_iter()
        .map(|(window, count)| format!(", a window of {}{}", thousands(window as u64), in_layers(count, config)));
    windows.collect::<Vec<_>>().concat()
}

/// How layers know positions, a line for each way.
fn rotation(config: &DecoderConfig) -> Vec<String> {
    let mut lines = Vec::new();
    for (index, rotary) in config.rotaries.iter().enumerate() {
        let count = config.layers.iter().filter(|layer| layer.rotary == Some(index)).count();
        if count > 0 {
            lines.push(format!("{}{}", in_words(rotary, config.head_dim), in_layers(count, config)));
        }
    }
    let num_without = config.layers.iter().filter(|layer| layer.rotary.is_none()).count();
    if config.alibi.is_some() {
        lines.push("ALiBi".to_owned());
    } else if num_without > 0 {
        lines.push(format!("none{}", in_layers(num_without, config)));
    }
    lines
}

fn in_words(rotary: &Rotary, head_dim: usize) -> String {
    let part = if rotary.dim < head_dim { format!(" of {} of {head_dim} elements", rotary.dim) } else { String::new() };
    let tokens = |count: usize| format!("{} tokens", thousands(count as u64));
    let scaling = match &rotary.scaling {
        RopeScaling::None => String::new(),
        RopeScaling::Linear { factor } => format!(", linear scaling by {factor}"),
        RopeScaling::Llama3 { factor, original_max_position_embeddings, .. } => {
            format!(", llama3 scaling by {factor} from {}", tokens(*original_max_position_embeddings))
        }
        RopeScaling::Factors(_) => ", scaled by factors in the file".to_owned(),
        RopeScaling::LongRope { original_max_position_embeddings, .. } => {
            format!(", longrope with other factors beyond {}", tokens(*original_max_position_embeddings))
        }
        RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
            format!(", dynamic scaling by {factor} beyond {}", tokens(*original_max_position_embeddings))
        }
        RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
            format!(", YaRN by {factor} from {}", tokens(*original_max_position_embeddings))
        }
    };
    format!("rotation{part}, base {}{scaling}", thousands(rotary.base as u64))
}

/// A row for each part and format, and their sum.
fn tensor_table(groups: &[TensorGroup]) -> String {
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let mut table = plain_table();
    let header = ["TENSORS", "STORED AS", "BYTES", "BITS", "SERVED AS", "BYTES", "BITS"];
    table.set_header(header.map(|name| match name {
        "BYTES" | "BITS" => right(name.to_owned()),
        _ => Cell::new(name),
    }));
    let figures = |bytes: u64, count: u64| [right(terminal::size(bytes)), right(format!("{:.2}", bits(bytes, count)))];
    for group in groups {
        let mut row = vec![Cell::new(part_name(group.part)), Cell::new(group.stored.to_string())];
        row.extend(figures(group.stored_bytes, group.num_parameters));
        row.push(Cell::new(held_name(group.held)));
        row.extend(figures(group.held_bytes, group.num_parameters));
        table.add_row(row);
    }
    let sum = |figure: fn(&TensorGroup) -> u64| groups.iter().map(figure).sum::<u64>();
    let count = sum(|group| group.num_parameters);
    let mut row = vec![Cell::new("all"), Cell::new("")];
    row.extend(figures(sum(|group| group.stored_bytes), count));
    row.push(Cell::new(""));
    row.extend(figures(sum(|group| group.held_bytes), count));
    table.add_row(row);
    show(&mut table)
}

/// Bits that a weight takes, scales and padding counted.
fn bits(bytes: u64, num_parameters: u64) -> f64 {
    let bits = bytes as f64 * 8.0 / num_parameters.max(1) as f64;
    (bits * 100.0).round() / 100.0
}

fn part_name(part: TensorPart) -> &'static str {
    match part {
        TensorPart::Embedding => "embedding",
        TensorPart::Attention => "attention",
        TensorPart::Mlp => "mlp",
        TensorPart::Router => "router",
        TensorPart::Experts => "experts",
        TensorPart::SharedExpert => "shared",
        TensorPart::Head => "head",
        TensorPart::Norms => "norms",
        _ => "other",
    }
}

fn held_name(held: HeldAs) -> &'static str {
    match held {
        HeldAs::Stored => "as stored",
        HeldAs::Codes { bits: 4 } => "4 bits",
        HeldAs::Codes { bits: 5 } => "5 bits",
        HeldAs::Codes { .. } => "8 bits",
        HeldAs::F32 => "f32",
        HeldAs::F16 => "f16",
        HeldAs::Bf16 => "bf16",
        HeldAs::Int8 => "int8",
        HeldAs::Int4 => "int4",
        _ => "other",
    }
}

fn kv_name(dtype: KvCacheDtype) -> &'static str {
    match dtype {
        KvCacheDtype::Auto => "auto",
        KvCacheDtype::F32 => "f32",
        KvCacheDtype::F16 => "f16",
        KvCacheDtype::Bf16 => "bf16",
        KvCacheDtype::Int8 => "int8",
    }
}
