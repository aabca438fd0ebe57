//! `bindery audit verify|export|forget-head`: the log of who asked what of whom, checked, handed on, begun anew.
//!
//! The gateway reads the log; here the key, the head and the words for people come together. Invariant: `verify` ends
//! with code 0 only where the log is what was written.

use std::{
    fmt::Write as _,
    io::{self, BufWriter, Write as _},
};

use bindery_gateway::{
    audit::{
        AuditConfig, ExportFilter, ExportFormat, Head, Journal, Report, config::KeepContents, export,
        export::ExportKeys, verify,
    },
    store::{LogWriter, Store, StoreHeads},
};
use chrono::{DateTime, Utc};
use serde_json::json;

use crate::{
    args::{AuditAction, AuditArgs, AuditExportArgs},
    failure::Failure,
    gateway::{ConfigFile, host_name},
    terminal::{self, Style, thousands},
};

/// Repairs and the like that are told; the rest is counted.
const MAX_EVENTS_SHOWN: usize = 20;

pub(crate) async fn run(args: AuditArgs) -> anyhow::Result<()> {
    let AuditArgs { action, config } = args;
    let file = ConfigFile::read(config)?;
    let Some(audit) = file.gateway.audit.clone() else {
        return Err(Failure::usage(format!("{} keeps no audit log", file.path.display()))
            .hint("add [audit] with path = \"bindery-audit\"")
            .into());
    };
    if let AuditAction::ForgetHead { reason } = action {
        return forget_head(&file, &audit, reason).await;
    }
    if !audit.path.is_dir() {
        return Err(Failure::new(format!("there is no audit log at {}", audit.path.display()))
            .hint("a server makes it at its first start; a relative path is taken from the folder that this runs in")
            .into());
    }
    match action {
        AuditAction::Verify { json } => check(&file, &audit, json).await,
        AuditAction::ForgetHead { .. } => Ok(()),
        AuditAction::Export(args) => tokio::task::spawn_blocking(move || hand_out(&audit, &args)).await?,
    }
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// What is known of the log's end.
enum KnownHead {
    /// As the store has it; None: the store knows no such log.
    Stored(Option<Head>),
    NoStore,
}

/// Where the store keeps how far this log went.
fn heads(store: &Store, audit: &AuditConfig) -> StoreHeads {
    let log = audit.log_name(&host_name());
    let writer = LogWriter { log: &log, writer: "bindery audit" };
    StoreHeads::new(store.clone(), tokio::runtime::Handle::current(), writer)
}

async fn forget_head(file: &ConfigFile, audit: &AuditConfig, reason: String) -> anyhow::Result<()> {
    if file.gateway.store.is_none() {
        return Err(Failure::usage(format!("{} names no store, so no head is kept", file.path.display()))
            .hint("without [store] a server begins a log anew by itself")
            .into());
    }
    // What it writes holds no contents, so their key is not asked for.
    let plain = AuditConfig { contents: KeepContents::None, contents_key_env: None, ..audit.clone() };
    let config = plain.journal(&env)?;
    let open = file.open_store_to_read().await?;
    let heads = heads(&open.store, audit);
    let begun = tokio::task::spawn_blocking(move || Journal::begin_anew(config, Box::new(heads), &reason)).await?;
    open.close().await?;
    let head = begun?;
    terminal::note(&format!(
        "the log in {} begins anew; its first record tells that {} records before it are not there",
        audit.path.display(),
        thousands(head.seq)
    ));
    Ok(())
}

async fn check(file: &ConfigFile, audit: &AuditConfig, is_json: bool) -> anyhow::Result<()> {
    let key = audit.key(&env)?;
    let head = if file.gateway.store.is_some() {
        let open = file.open_store_to_read().await?;
        let heads = heads(&open.store, audit);
        let newest = heads.newest().await;
        drop(heads);
        open.close().await?;
        KnownHead::Stored(newest?)
    } else {
        KnownHead::NoStore
    };
    let (path, stored) = (audit.path.clone(), if let KnownHead::Stored(head) = head { head } else { None });
    let report = tokio::task::spawn_blocking(move || verify(&path, &key, stored)).await??;
    terminal::print(&if is_json { as_json(&report) } else { in_words(audit, &report) })?;
    match head {
        KnownHead::Stored(Some(_)) => {}
        KnownHead::Stored(None) => {
            terminal::warn("the store knows no end of this log: one that was cut at its end would pass");
        }
        KnownHead::NoStore => terminal::warn(
            "without [store] nothing outside the folder says how far the log went: one that was cut at its end would pass",
        ),
    }
    if report.is_intact() {
        return Ok(());
    }
    Err(Failure::new(format!("the audit log {} was touched", audit.path.display()))
        .hint("keep the folder as it is and compare it with a copy; records before the first problem are good")
        .into())
}

fn in_words(audit: &AuditConfig, report: &Report) -> String {
    let style = Style::for_stdout();
    let mut text = String::new();
    for problem in &report.problems {
        let _ = writeln!(text, "{} {problem}", style.error("touched:"));
    }
    if let Some(torn) = &report.torn {
        let _ = writeln!(
            text,
            "a crash has torn the last record, in line {}; the next start sets it aside and says so in the log",
            torn.line + 1
        );
    }
    for event in report.events.iter().take(MAX_EVENTS_SHOWN) {
        let _ = writeln!(text, "the log tells: {event}");
    }
    if let Some(more) = report.events.len().checked_sub(MAX_EVENTS_SHOWN).filter(|more| *more > 0) {
        let _ = writeln!(text, "and {} more; --json has them", thousands(more as u64));
    }
    let range = match (report.first, report.last) {
        (Some(first), Some(last)) => format!(", numbers {first} to {}", last.seq),
        _ => String::new(),
    };
    let (records, files) = (thousands(report.num_records), thousands(report.num_segments));
    let counts = format!("{records} records in {files} files{range}");
    let path = audit.path.display();
    let _ = if report.is_intact() {
        writeln!(text, "{}", style.good(&format!("{path} is what was written: {counts}")))
    } else {
        writeln!(text, "{path}: {counts} were signed with this key")
    };
    text
}

fn as_json(report: &Report) -> String {
    let problem = |problem: &bindery_gateway::audit::Problem| json!({"file": problem.segment, "line": problem.line, "problem": problem.what.to_string()});
    let value = json!({
        "intact": report.is_intact(),
        "files": report.num_segments,
        "records": report.num_records,
        "first": report.first,
        "last": report.last.map(|head| head.seq),
        "after_head": report.num_after_head,
        "torn_line": report.torn.as_ref().map(|torn| torn.line + 1),
        "events": report.events,
        "problems": report.problems.iter().map(problem).collect::<Vec<_>>(),
    });
    format!("{value:#}\n")
}

fn hand_out(audit: &AuditConfig, args: &AuditExportArgs) -> anyhow::Result<()> {
    let key = audit.key(&env)?;
    let contents = if args.contents { audit.opening_keys(&env)? } else { None };
    if args.contents && contents.is_none() {
        return Err(Failure::usage("--contents opens prompts and answers, and the config names no key of theirs")
            .hint("name its variable as contents_key_env in [audit], or in contents_old_key_envs; or leave --contents out")
            .into());
    }
    let time = |seconds: Option<u64>| -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(i64::try_from(seconds?).unwrap_or(i64::MAX), 0)
    };
    let filter = ExportFilter {
        tenant: args.tenant.clone(),
        request_id: args.request_id.clone(),
        from: time(args.from),
        until: time(args.until),
    };
    let format = if args.csv { ExportFormat::Csv } else { ExportFormat::JsonLines };
    let mut out = BufWriter::new(io::stdout().lock());
    let keys = ExportKeys { key: &key, contents: contents.as_ref() };
    let exported = export(&audit.path, keys, (&filter, format), &mut out);
    out.flush()?;
    terminal::note(&format!("{} records", thousands(exported?)));
    Ok(())
}
