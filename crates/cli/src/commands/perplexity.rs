//! `bindery perplexity`: how well a setting predicts a text, and how far it is from a base.
//!
//! It finds the files and prints; the measuring is the engine's. Names and figures are llama-perplexity's, so that the
//! two can be laid side by side. Data goes to stdout, bars and notes to stderr.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use anyhow::Context as _;
use bindery_engine::{
    perplexity::{self, Comparison, Estimate, PerplexityReport, PerplexityRequest, Progress, Side},
    text::tokenizer::MAX_TEXT_BYTES,
};
use bindery_hub::LocalFiles;
use bindery_model::{BackendKind, Dtype, LoadOptions, ModelInfo};
use comfy_table::{Cell, CellAlignment};
use serde_json::{Value, json};

use crate::{
    args::{BaseArg, Chunks, EngineArgs, LogFormat, PerplexityArgs},
    commands::models::{plain_table, show},
    failure::{Failure, Interrupted},
    local,
    settings::{ModelSettings, model_from_environment},
    signals::StopSignals,
    terminal::{self, thousands},
};

pub(crate) async fn run(args: PerplexityArgs) -> anyhow::Result<()> {
    let mut signals = StopSignals::listen()?;
    signals.unless_stopped(Box::pin(measure(args))).await.ok_or(Interrupted)?
}

async fn measure(args: PerplexityArgs) -> anyhow::Result<()> {
    let text = read_text(&args.file)?;
    let settings = settings(&args, args.model.clone().or_else(model_from_environment))?;
    let files = local::fetch(&settings, LogFormat::Text).await?;
    let base = match base_of(&args, &settings.local.load) {
        Some(load) => {
            let files = match &args.base_model {
                Some(model) => local::fetch(&self::settings(&args, Some(model.clone()))?, LogFormat::Text).await?,
                None => files.clone(),
            };
            Some((files, load))
        }
        None => None,
    };
    let job = Job { text, files, load: settings.local.load.clone(), base, step: settings.local.max_num_batched_tokens };
    let (ctx_size, chunks) = (args.ctx_size as usize, args.chunks);
    let measured = tokio::task::spawn_blocking(move || (job.run(ctx_size, chunks), job));
    let (report, job) = measured.await.context("the thread that measures failed")?;
    let report = report.with_context(|| match &job.base {
        Some((base, _)) if base.path != job.files.path => {
            format!("cannot compare {} with {}", job.files.path.display(), base.path.display())
        }
        _ => format!("cannot score with {}", job.files.path.display()),
    })?;
    if args.json {
        terminal::print(&format!("{}\n", serde_json::to_string_pretty(&job.json(&report, &args))?))?;
    } else {
        terminal::print(&job.table(&report, &args))?;
    }
    Ok(())
}

/// A final line end is not part of the text, as for llama-perplexity.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    let cannot = |error: io::Error| Failure::new(format!("cannot read {shown}: {error}"));
    let file = File::open(path).map_err(cannot)?;
    let mut bytes = Vec::new();
    // A pipe has no length, so the limit holds while reading.
    file.take(MAX_TEXT_BYTES as u64 + 2).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    if bytes.len() > MAX_TEXT_BYTES {
        let limit = terminal::size(MAX_TEXT_BYTES as u64);
        return Err(Failure::new(format!("{shown} is longer than {limit}, the limit for a text"))
            .hint("cut it: --chunks scores only the first windows anyway")
            .into());
    }
    String::from_utf8(bytes).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        Failure::new(format!("{shown} is no UTF-8 from byte {place} on"))
            .hint("convert it, for example with iconv")
            .into()
    })
}

/// What the model is loaded with, by the checks of `serve`.
fn settings(args: &PerplexityArgs, model: Option<String>) -> Result<ModelSettings, Failure> {
    let engine = EngineArgs { load: args.load.clone(), offline: Some(args.offline), ..EngineArgs::default() };
    ModelSettings::new(model, &engine)
}

/// None where no comparison was asked for.
fn base_of(args: &PerplexityArgs, subject: &LoadOptions) -> Option<LoadOptions> {
    let base = args.base.or(args.base_model.as_ref().map(|_| BaseArg::default()))?;
    let same = |backend| LoadOptions { threads: subject.threads, dummy: subject.dummy, ..LoadOptions::new(backend) };
    Some(match base {
        BaseArg::F32 => LoadOptions { dtype: Dtype::F32, dequantize: true, ..same(BackendKind::Cpu) },
        BaseArg::Reference => same(BackendKind::Reference),
        BaseArg::Stored => same(BackendKind::Cpu),
    })
}

/// All that the measuring needs, so that a thread can own it.
struct Job {
    text: String,
    files: LocalFiles,
    load: LoadOptions,
    base: Option<(LocalFiles, LoadOptions)>,
    step: usize,
}

impl Job {
    fn run(&self, context_len: usize, chunks: Chunks) -> Result<PerplexityReport, bindery_engine::EngineError> {
        let request = PerplexityRequest {
            subject: Side { path: &self.files.path, load: &self.load },
            base: self.base.as_ref().map(|(files, load)| Side { path: &files.path, load }),
            text: &self.text,
            context_len,
            max_windows: match chunks {
                Chunks::All => None,
                Chunks::First(count) => Some(count),
            },
            max_num_batched_tokens: self.step,
        };
        let loading = terminal::byte_bar("loading weights", Some(0), LogFormat::Text);
        let mut scoring = None;
        let result = perplexity::measure(&request, &mut |progress| match progress {
            Progress::Loading { done, total } => {
                loading.set_length(total);
                loading.set_position(done);
            }
            Progress::Scoring { done, total, perplexity } => {
                loading.finish_and_clear();
                let bar = scoring.get_or_insert_with(|| terminal::count_bar("scoring", total as u64));
                bar.set_prefix(format!("scoring, perplexity {perplexity:.4}"));
                bar.set_position(done as u64);
            }
        });
        loading.finish_and_clear();
        if let Some(bar) = scoring {
            bar.finish_and_clear();
        }
        result
    }

    fn table(&self, report: &PerplexityReport, args: &PerplexityArgs) -> String {
        let mut text = format!("{}\n", setting(&self.files, &self.load, &report.subject));
        if let (Some(base), Some((files, load))) = (&report.base, &self.base) {
            let _ = writeln!(text, "base: {}", setting(files, load, base));
        }
        let _ = writeln!(
            text,
            "{}: {} tokens, {} windows of {}, {} tokens scored\n",
            args.file.display(),
            thousands(report.num_text_tokens as u64),
            thousands(report.num_windows as u64),
            args.ctx_size,
            thousands(report.num_scored_tokens as u64)
        );
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let mut table = plain_table();
        for (name, figure) in rows(report) {
            table.add_row([Cell::new(name), right(figure)]);
        }
        let _ = writeln!(text, "{}", show(&mut table));
        text
    }

    fn json(&self, report: &PerplexityReport, args: &PerplexityArgs) -> Value {
        let base = report.base.as_ref().zip(self.base.as_ref());
        json!({
            "model": setting_json(&self.files, &self.load, &report.subject),
            "base": base.map(|(info, (files, load))| setting_json(files, load, info)),
            "file": args.file.display().to_string(),
            "ctx_size": args.ctx_size,
            "chunks": report.num_windows,
            "tokens": report.num_text_tokens,
            "scored_tokens": report.num_scored_tokens,
            "perplexity": estimate_json(report.perplexity),
            "comparison": report.comparison.as_ref().map(comparison_json),
        })
    }
}

fn kv_cache_name(info: &ModelInfo) -> String {
    format!("{:?}", info.kv_cache_dtype).to_lowercase()
}

/// Whether quantised weights are computed with as f32.
fn is_widened(load: &LoadOptions) -> bool {
    load.dequantize || load.backend == BackendKind::Reference
}

fn setting(files: &LocalFiles, load: &LoadOptions, info: &ModelInfo) -> String {
    let widened = if is_widened(load) { " widened to f32" } else { "" };
    format!(
        "{}: {}{widened}, {}, {} threads, KV cache in {}",
        files.name,
        info.weight_format,
        info.device,
        info.threads,
        kv_cache_name(info)
    )
}

fn setting_json(files: &LocalFiles, load: &LoadOptions, info: &ModelInfo) -> Value {
    json!({
        "name": files.name, "path": files.path.display().to_string(), "weights": info.weight_format,
        "widened_to_f32": is_widened(load), "device": info.device, "threads": info.threads,
        "kv_cache_dtype": kv_cache_name(info),
    })
}

/// Names as llama-perplexity's readers know them.
fn rows(report: &PerplexityReport) -> Vec<(&'static str, String)> {
    let plain = |estimate: Estimate| format!("{:.6} ± {:.6}", estimate.value, estimate.standard_error);
    let percent =
        |estimate: Estimate| format!("{:.3} ± {:.3} %", estimate.value * 100.0, estimate.standard_error * 100.0);
    let mut rows = vec![("perplexity", plain(report.perplexity))];
    if let Some(comparison) = &report.comparison {
        let spread = &comparison.kl_divergence;
        let nats = |value: f64| format!("{value:.6}");
        rows.extend([
            ("perplexity of the base", plain(comparison.base_perplexity)),
            ("ratio", plain(comparison.perplexity_ratio)),
            ("ln of the ratio", plain(comparison.ln_perplexity_ratio)),
            ("KL divergence, mean", plain(spread.mean)),
            ("  maximum", nats(spread.max)),
            ("  99.9 %", nats(spread.p99_9)),
            ("  99 %", nats(spread.p99)),
            ("  95 %", nats(spread.p95)),
            ("  90 %", nats(spread.p90)),
            ("  median", nats(spread.median)),
            ("  minimum", nats(spread.min)),
            ("same top token", percent(comparison.same_top)),
            ("Δp, mean", percent(comparison.mean_delta_p)),
            ("Δp, RMS", percent(comparison.rms_delta_p)),
        ]);
    }
    rows
}

fn estimate_json(estimate: Estimate) -> Value {
    json!({"value": estimate.value, "standard_error": estimate.standard_error})
}

/// Probabilities as fractions, divergences in nats.
fn comparison_json(comparison: &Comparison) -> Value {
    let spread = &comparison.kl_divergence;
    json!({
        "base_perplexity": estimate_json(comparison.base_perplexity),
        "perplexity_ratio": estimate_json(comparison.perplexity_ratio),
        "ln_perplexity_ratio": estimate_json(comparison.ln_perplexity_ratio),
        "kl_divergence": {
            "mean": estimate_json(spread.mean), "max": spread.max, "p99_9": spread.p99_9, "p99": spread.p99,
            "p95": spread.p95, "p90": spread.p90, "median": spread.median, "min": spread.min,
        },
        "same_top": estimate_json(comparison.same_top),
        "mean_delta_p": estimate_json(comparison.mean_delta_p),
        "rms_delta_p": estimate_json(comparison.rms_delta_p),
    })
}
