//! `bindery quantize MODEL OUT`: a folder of quantised weights that loads at once.
//!
//! It finds the files and prints; the making is the engine's. The table goes to stdout, bars and notes to stderr. A signal
//! ends the work between two tensors and leaves nothing behind.

use std::{
    fmt::Write as _,
    ops::ControlFlow,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context as _;
use bindery_engine::{
    EngineError,
    quantize::{Calibration, Progress, QuantizeOutcome, QuantizeRequest, quantize},
};
use bindery_model::{Quantize, weights::QuantizedGroup};
use comfy_table::{Cell, CellAlignment};
use serde_json::{Value, json};

use crate::{
    args::{AheadArg, Chunks, EngineArgs, LoadArgs, LogFormat, QuantizeArgs},
    commands::{
        models::{plain_table, show},
        perplexity::read_text,
    },
    failure::{Failure, Interrupted},
    local,
    settings::ModelSettings,
    signals::StopSignals,
    terminal::{self, thousands},
};

pub(crate) async fn run(args: QuantizeArgs) -> anyhow::Result<()> {
    let mut signals = StopSignals::listen()?;
    if args.out.symlink_metadata().is_ok() {
        let what = format!("{} is there already, and nothing is overwritten", args.out.display());
        return Err(Failure::new(what).hint("name another folder, or remove this one").into());
    }
    let text = args.calibrate.as_deref().map(read_text).transpose()?;
    let engine = EngineArgs {
        load: LoadArgs { threads: args.threads, ..LoadArgs::default() },
        offline: Some(args.offline),
        ..EngineArgs::default()
    };
    if args.bits_per_weight.is_some() && args.quantize == AheadArg::Int8 {
        let what = "--bits-per-weight mixes formats of four to eight bits, and --quantize int8 has one";
        return Err(Failure::usage(what).hint("say --quantize int4").into());
    }
    let settings = ModelSettings::new(Some(args.model.clone()), &engine)?;
    let files =
        signals.unless_stopped(Box::pin(local::fetch(&settings, LogFormat::Text))).await.ok_or(Interrupted)??;
    let job = Job {
        source: files.path.clone(),
        target: args.out.clone(),
        quantize: match args.quantize {
            AheadArg::Int8 => Quantize::Int8,
            AheadArg::Int4 => Quantize::Int4,
        },
        bits_per_weight: args.bits_per_weight,
        text,
        context_len: args.ctx_size as usize,
        max_windows: match args.chunks {
            Chunks::All => None,
            Chunks::First(count) => Some(count),
        },
        threads: args.threads.map(|threads| threads as usize),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let mut made = tokio::task::spawn_blocking(move || job.run(&told));
    let Some(outcome) = signals.unless_stopped(&mut made).await else {
        stop.store(true, Ordering::Relaxed);
        // Until the temporary folder is gone; a second signal does not wait for that.
        let _ = signals.unless_stopped(made).await;
        return Err(Interrupted.into());
    };
    let outcome = outcome.context("the thread that quantises failed")?;
    let outcome = outcome.with_context(|| format!("cannot quantise {}", files.path.display()))?;
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&as_json(&outcome, &args))?)
    } else {
        table(&outcome, &args)
    };
    terminal::print(&text)?;
    Ok(())
}

/// All that the making needs, so that a thread can own it.
struct Job {
    source: PathBuf,
    target: PathBuf,
    quantize: Quantize,
    bits_per_weight: Option<f64>,
    text: Option<String>,
    context_len: usize,
    max_windows: Option<usize>,
    threads: Option<usize>,
}

impl Job {
    fn run(&self, stop: &AtomicBool) -> Result<QuantizeOutcome, EngineError> {
        let calibration = self.text.as_deref().map(|text| Calibration {
            text,
            context_len: self.context_len,
            max_windows: self.max_windows,
        });
        let request = QuantizeRequest {
            source: &self.source,
            target: &self.target,
            quantize: self.quantize,
            bits_per_weight: self.bits_per_weight,
            calibration,
            threads: self.threads,
        };
        let mut shown = None;
        let result = quantize(&request, &mut |progress| {
            let (what, done, total) = match progress {
                Progress::Loading { done, total } => ("loading weights", done, total),
                Progress::Calibrating { done, total } => ("calibrating", done as u64, total as u64),
                Progress::Quantizing { done, total } => ("quantising", done, total),
            };
            if shown.as_ref().is_none_or(|(shown, _)| *shown != what) {
                if let Some((_, bar)) = shown.take() {
                    finish(&bar);
                }
                let bar = match progress {
                    Progress::Loading { .. } => terminal::byte_bar(what, Some(total), LogFormat::Text),
                    Progress::Calibrating { .. } | Progress::Quantizing { .. } => terminal::count_bar(what, total),
                };
                shown = Some((what, bar));
            }
            if let Some((_, bar)) = &shown {
                bar.set_position(done);
            }
            if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        if let Some((_, bar)) = shown {
            finish(&bar);
        }
        result
    }
}

fn finish(bar: &indicatif::ProgressBar) {
    bar.finish_and_clear();
}

fn table(outcome: &QuantizeOutcome, args: &QuantizeArgs) -> String {
    let mut table = plain_table();
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    table.set_header(["", "STORED AS", "WEIGHTS", "SIZE", "BITS PER WEIGHT", "RELATIVE SQUARED ERROR"]);
    let report = &outcome.report;
    for group in report.groups.iter().chain([&report.total]) {
        let QuantizedGroup { name, formats, num_parameters, num_bytes, relative_error } = group;
        table.add_row([
            Cell::new(name),
            Cell::new(formats),
            right(thousands(*num_parameters)),
            right(terminal::size(*num_bytes)),
            right(format!("{:.3}", group.bits_per_weight())),
            right(relative_error.map_or_else(String::new, |error| format!("{error:.3e}"))),
        ]);
    }
    let mut text = format!("{}\n\n", show(&mut table));
    let calibrated = outcome
        .calibration_time
        .map_or_else(String::new, |time| format!(", after {:.1} s of calibration", time.as_secs_f64()));
    let _ = writeln!(
        text,
        "{}: {} from {}, in {:.1} s{calibrated}",
        args.out.display(),
        terminal::size(report.total.num_bytes),
        terminal::size(report.source_bytes),
        outcome.quantize_time.as_secs_f64()
    );
    text
}

fn as_json(outcome: &QuantizeOutcome, args: &QuantizeArgs) -> Value {
    let group = |group: &QuantizedGroup| {
        json!({
            "name": group.name, "formats": group.formats, "parameters": group.num_parameters, "bytes": group.num_bytes,
            "bits_per_weight": group.bits_per_weight(), "relative_squared_error": group.relative_error,
        })
    };
    let report = &outcome.report;
    json!({
        "path": args.out.display().to_string(),
        "groups": report.groups.iter().map(group).collect::<Vec<_>>(),
        "total": group(&report.total),
        "source_bytes": report.source_bytes,
        "calibration_seconds": outcome.calibration_time.map(|time| time.as_secs_f64()),
        "quantize_seconds": outcome.quantize_time.as_secs_f64(),
    })
}
