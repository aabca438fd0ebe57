//! A record's bytes.
//!
//! `{"seq":7,"at":"2026-11-28T23:05:36.123Z","prev":"…","kind":"request","data":{…},"mac":"…"}` and a newline. The HMAC is over
//! every byte before `,"mac":`, as it is written; what follows has one form only. So no byte of a line can change unseen,
//! and nothing is ever serialised again to be checked.
//!
//! **Invariant**: a line has no newline but its last byte, and is at most [`MAX_LINE_BYTES`] long.

use std::fmt;

use chrono::{DateTime, SecondsFormat, Utc};
use data_encoding::HEXLOWER;
use serde::Deserialize;
use serde_json::Value;

use super::{AuditError, key::AuditKey};

/// The longest line.
pub const MAX_LINE_BYTES: usize = 8 << 20;
/// `,"mac":"`, 64 digits, `"}`.
const TAIL_BYTES: usize = 8 + 64 + 2;
const MAC_MARK: &[u8] = b",\"mac\":\"";
/// How long a time is written.
const TIME_BYTES: usize = 24;

/// An HMAC-SHA256.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 32]);

impl Mac {
    /// What stands before the first record.
    pub const NONE: Self = Self([0; 32]);

    /// From 64 hex digits in small letters.
    pub fn parse(text: &str) -> Option<Self> {
        HEXLOWER.decode(text.as_bytes()).ok()?.try_into().ok().map(Self)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a line says.
#[derive(Clone, Debug, Deserialize)]
pub struct Line {
    /// Its number, from 1, without holes.
    pub seq: u64,
    /// When it was written.
    pub at: DateTime<Utc>,
    /// The HMAC of the line before.
    #[serde(deserialize_with = "mac_of")]
    pub prev: Mac,
    /// `request`, or what the log says of itself: `segment`, `repaired`, `gap`, `retired`.
    pub kind: String,
    /// The rest.
    pub data: Value,
    /// Its own HMAC.
    #[serde(deserialize_with = "mac_of")]
    pub mac: Mac,
}

fn mac_of<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
    let text = String::deserialize(deserializer)?;
    Mac::parse(&text).ok_or_else(|| serde::de::Error::custom("not 64 hex digits"))
}

/// Where a line will stand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Next {
    pub(super) seq: u64,
    pub(super) prev: Mac,
}

/// The line's bytes, and its HMAC.
pub(super) fn write(
    key: &AuditKey,
    next: Next,
    at: DateTime<Utc>,
    (kind, data): (&str, &Value),
) -> Result<(Vec<u8>, Mac), AuditError> {
    let at = at.to_rfc3339_opts(SecondsFormat::Millis, true);
    let mut line = format!(
        "{{\"seq\":{},\"at\":\"{at}\",\"prev\":\"{}\",\"kind\":\"{kind}\",\"data\":{data}",
        next.seq, next.prev
    )
    .into_bytes();
    let mac = key.sign(&line);
    line.extend_from_slice(MAC_MARK);
    line.extend_from_slice(mac.to_string().as_bytes());
    line.extend_from_slice(b"\"}\n");
    if line.len() > MAX_LINE_BYTES {
        return Err(AuditError::RecordTooLong { bytes: line.len(), max: MAX_LINE_BYTES });
    }
    Ok((line, mac))
}

/// Why bytes are no line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoLine {
    /// They have another form.
    Form,
    /// The HMAC is another.
    Signature,
}

/// Reads a line (without its newline) that this key has signed.
pub(super) fn read(key: &AuditKey, bytes: &[u8]) -> Result<Line, NoLine> {
    let body_bytes = bytes.len().checked_sub(TAIL_BYTES).ok_or(NoLine::Form)?;
    let (body, tail) = bytes.split_at(body_bytes);
    let digits = tail.strip_prefix(MAC_MARK).and_then(|rest| rest.strip_suffix(b"\"}")).ok_or(NoLine::Form)?;
    let mac = std::str::from_utf8(digits).ok().and_then(Mac::parse).ok_or(NoLine::Form)?;
    if !key.has_signed(body, &mac) {
        return Err(NoLine::Signature);
    }
    serde_json::from_slice(bytes).map_err(|_| NoLine::Form)
}

/// Whether bytes could be the begin of the line that comes next: what a crash in the middle of its write leaves. Blocks that a disk
/// had not written yet read as zeros.
pub(super) fn could_be_torn(next: Next, bytes: &[u8]) -> bool {
    let written = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count();
    let bytes = &bytes[..written];
    let begin = format!("{{\"seq\":{},\"at\":\"", next.seq).into_bytes();
    let after = format!("\",\"prev\":\"{}\",\"kind\":\"", next.prev).into_bytes();
    let agrees = |from: usize, expected: &[u8]| {
        bytes.get(from..).unwrap_or_default().iter().zip(expected).all(|(byte, expected)| byte == expected)
    };
    agrees(0, &begin) && agrees(begin.len() + TIME_BYTES, &after) && written < MAX_LINE_BYTES
}
