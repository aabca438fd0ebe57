//! The log's rows for other tools: JSON lines or CSV.
//!
//! **Invariant**: a row is written only if its record was signed with the key and stands where it was written; contents are told only to
//! whoever brings their key.

use std::{io::Write, path::Path};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::{
    AuditError, AuditKey, Contents, ContentsKeys,
    folder::segments,
    key::{Sealed, SealedFor},
    line::Line,
    scan::{Position, Scanner},
};

/// What rows are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// One object a line.
    JsonLines,
    /// A table with a header, quoted by RFC 4180.
    Csv,
}

/// Which requests; what is absent does not matter.
#[derive(Clone, Debug, Default)]
pub struct ExportFilter {
    /// Of this tenant.
    pub tenant: Option<String>,
    /// The one of this id.
    pub request_id: Option<String>,
    /// Not before.
    pub from: Option<DateTime<Utc>>,
    /// Before.
    pub until: Option<DateTime<Utc>>,
}

impl ExportFilter {
    fn admits(&self, line: &Line) -> bool {
        let is = |name: &str, wanted: &Option<String>| {
            wanted.as_ref().is_none_or(|wanted| line.data.get(name).and_then(Value::as_str) == Some(wanted))
        };
        line.kind == "request"
            && is("tenant", &self.tenant)
            && is("request_id", &self.request_id)
            && self.from.is_none_or(|from| line.at >= from)
            && self.until.is_none_or(|until| line.at < until)
    }
}

/// The keys that an export takes.
#[derive(Clone, Copy, Debug)]
pub struct ExportKeys<'a> {
    /// Signs records.
    pub key: &'a AuditKey,
    /// Opens contents; none: they stay closed.
    pub contents: Option<&'a ContentsKeys>,
}

/// Columns of the table, each a path into the row.
const COLUMNS: [(&str, &str); 22] = [
    ("seq", "/seq"),
    ("at", "/at"),
    ("request_id", "/request_id"),
    ("tenant", "/tenant"),
    ("key_id", "/key_id"),
    ("model", "/model/name"),
    ("model_digest", "/model/digest"),
    ("model_licence", "/model/licence"),
    ("adapter", "/model/adapter/name"),
    ("adapter_digest", "/model/adapter/digest"),
    ("route", "/route/to"),
    ("route_why", "/route/why"),
    ("prompt_tokens", "/tokens/prompt"),
    ("cached_tokens", "/tokens/cached"),
    ("completion_tokens", "/tokens/completion"),
    ("reasoning_tokens", "/tokens/reasoning"),
    ("outcome", "/outcome"),
    ("verdicts", "/verdicts"),
    ("prompt", "/contents/prompt"),
    ("answer", "/contents/answer"),
    ("prompt_bytes_cut", "/contents/prompt_bytes_cut"),
    ("answer_bytes_cut", "/contents/answer_bytes_cut"),
];

/// Writes the rows of requests that the filter admits, and says how many. The first record that was touched ends it.
pub fn export(
    folder: &Path,
    keys: ExportKeys<'_>,
    (filter, format): (&ExportFilter, ExportFormat),
    out: &mut dyn Write,
) -> Result<u64, AuditError> {
    let segments = segments(folder)?;
    let mut scanner = Scanner::new(keys.key);
    let mut table = csv::Writer::from_writer(Vec::new());
    let mut num_rows = 0;
    if format == ExportFormat::Csv {
        table.write_record(COLUMNS.map(|(name, _)| name)).map_err(not_written)?;
    }
    for (index, segment) in segments.iter().enumerate() {
        let position = if index + 1 == segments.len() { Position::Last } else { Position::Inner };
        scanner.read(segment, position, &mut |line| {
            if !filter.admits(line) {
                return Ok(());
            }
            num_rows += 1;
            let row = row(line, keys.contents)?;
            match format {
                ExportFormat::JsonLines => writeln!(out, "{row}").map_err(AuditError::io("write", "the export")),
                ExportFormat::Csv => {
                    table.write_record(COLUMNS.map(|(_, path)| cell(row.pointer(path)))).map_err(not_written)?;
                    flush(&mut table, out)
                }
            }
        })?;
        if let Some(problem) = scanner.problems.first() {
            return Err(AuditError::Touched { problem: problem.clone() });
        }
    }
    flush(&mut table, out)?;
    Ok(num_rows)
}

fn row(line: &Line, keys: Option<&ContentsKeys>) -> Result<Value, AuditError> {
    let mut row = json!({"seq": line.seq, "at": line.at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)});
    if let (Some(row), Some(data)) = (row.as_object_mut(), line.data.as_object()) {
        row.extend(
            data.iter().filter(|(name, _)| *name != "contents").map(|(name, value)| (name.clone(), value.clone())),
        );
    }
    if let (Some(keys), Some(sealed)) = (keys, line.data.get("contents")) {
        let bad = |error: serde_json::Error| AuditError::Key(format!("the contents of record {}: {error}", line.seq));
        let sealed: Sealed = serde_json::from_value(sealed.clone()).map_err(bad)?;
        let text = |name: &str| line.data.get(name).and_then(Value::as_str).unwrap_or_default();
        let of = SealedFor { seq: line.seq, tenant: text("tenant"), request_id: text("request_id") };
        let contents: Contents = serde_json::from_slice(&keys.open(of, &sealed)?).map_err(bad)?;
        row["contents"] = json!(contents);
    }
    Ok(row)
}

/// A text that a spreadsheet would take for a formula gets a quote in front.
fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) if text.starts_with(['=', '+', '-', '@', '\t', '\r']) => format!("'{text}"),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn flush(table: &mut csv::Writer<Vec<u8>>, out: &mut dyn Write) -> Result<(), AuditError> {
    table.flush().map_err(AuditError::io("write", "the export"))?;
    let rows = std::mem::replace(table, csv::Writer::from_writer(Vec::new()))
        .into_inner()
        .map_err(|error| AuditError::Config(error.to_string()))?;
    out.write_all(&rows).map_err(AuditError::io("write", "the export"))
}

fn not_written(error: csv::Error) -> AuditError {
    AuditError::io("write", "the export")(std::io::Error::other(error))
}
