//! Whether the log is what was written.
//!
//! **Invariant**: a log passes only if every byte of it was written by the holder of the key, in this order, from the first
//! record (or one that a `retired` record says is the first that is left) to the head.

use std::{fmt, path::Path};

use super::{
    AuditError, AuditKey, Head,
    folder::{Segment, segments},
    line::{Line, Mac},
    scan::{Position, Scanner, Torn},
};

/// What is wrong with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It has not the form of a record.
    Form,
    /// Its bytes are not those that were signed.
    Signature,
    /// A record is missing, or stands here twice or in another place.
    Number {
        /// The number that has to come.
        expected: u64,
        /// The number that is there.
        found: u64,
    },
    /// The record before it was another one.
    Chain,
    /// It stands in another file, or at another place of the file, than where it was written.
    Misplaced,
    /// A file without records stands among others.
    Empty,
    /// The log ends too early.
    Truncated {
        /// The newest record, as the store knows.
        head: u64,
        /// The newest that is there.
        last: u64,
    },
    /// The log has another record than the store knows.
    OtherHead {
        /// Its number.
        head: u64,
    },
    /// Segments are gone, and no record says that they were retired.
    Beheaded {
        /// The first record that is there.
        first: u64,
    },
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Form => f.write_str("this is no record"),
            Self::Signature => f.write_str("the record was changed, or was signed with another key"),
            Self::Number { expected, found } => {
                write!(f, "record {expected} has to stand here and {found} does: one was removed, repeated or moved")
            }
            Self::Chain => f.write_str("the record follows another one than the one before it"),
            Self::Misplaced => f.write_str("the record was written to another file or place"),
            Self::Empty => f.write_str("the file is empty"),
            Self::Truncated { head, last } => write!(f, "the log ends with record {last}, and {head} was written"),
            Self::OtherHead { head } => write!(f, "record {head} is another one than was written"),
            Self::Beheaded { first } => {
                write!(f, "the log begins with record {first}, and no record says that older ones were retired")
            }
        }
    }
}

/// Where something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// In this file.
    pub segment: String,
    /// In this line, from 1; 0: the file as a whole.
    pub line: u64,
    /// What.
    pub what: What,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{}: {}", self.segment, self.what)
        } else {
            write!(f, "{}, line {}: {}", self.segment, self.line, self.what)
        }
    }
}

/// What the check says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Files read.
    pub num_segments: u64,
    /// Records that were signed with this key.
    pub num_records: u64,
    /// The oldest that is there.
    pub first: Option<u64>,
    /// The newest.
    pub last: Option<Head>,
    /// How many records come after the head: a crash came between writing them and saving it.
    pub num_after_head: u64,
    /// A last record that a crash has torn; not a sign of tampering, and repaired at the next start.
    pub torn: Option<Torn>,
    /// Repairs, gaps and retirements that the log tells of.
    pub events: Vec<String>,
    /// What is wrong; the first twenty.
    pub problems: Vec<Problem>,
}

impl Report {
    /// Nothing was touched.
    pub fn is_intact(&self) -> bool {
        self.problems.is_empty()
    }
}

/// The most events that are told.
const MAX_EVENTS: usize = 1000;

/// Reads all of the log. `head` is what the store knows; without it a log that was cut at its end passes.
pub fn verify(folder: &Path, key: &AuditKey, head: Option<Head>) -> Result<Report, AuditError> {
    let segments = segments(folder)?;
    let mut scanner = Scanner::new(key);
    let mut report = Report { num_segments: segments.len() as u64, ..Report::default() };
    let mut retired: Option<(u64, Mac)> = None;
    let mut at_head = None;
    for (index, segment) in segments.iter().enumerate() {
        let position = if index + 1 == segments.len() { Position::Last } else { Position::Inner };
        scanner.read(segment, position, &mut |line| {
            if head.is_some_and(|head| head.seq == line.seq) {
                at_head = Some(line.mac);
            }
            if let Some(through) = retired_through(line) {
                // They only ever reach further.
                retired = Some(through);
            }
            let tells = match line.kind.as_str() {
                "request" => false,
                "segment" => line.data.get("forgotten").is_some(),
                _ => true,
            };
            if tells && report.events.len() < MAX_EVENTS {
                report.events.push(format!(
                    "record {} of {}: {} {}",
                    line.seq,
                    line.at.to_rfc3339(),
                    line.kind,
                    line.data
                ));
            }
            Ok(())
        })?;
    }
    // A folder without files has a name for its first all the same.
    let none = Segment::new(folder, 1);
    let (first, last) = (segments.first().unwrap_or(&none), segments.last().unwrap_or(&none));
    if let Some(start) = scanner.start {
        report.first = Some(start.seq);
        let follows_retired =
            retired.is_some_and(|(seq, mac)| start.seq <= seq || (start.seq == seq + 1 && start.prev == mac));
        let is_first = start.seq == 1 && start.prev == Mac::NONE;
        if !is_first && !follows_retired {
            let what = What::Beheaded { first: start.seq };
            scanner.report((first, 1), what);
        }
    }
    // A head among retired records is older than the log.
    let is_retired = head.zip(scanner.start).is_some_and(|(head, start)| head.seq < start.seq);
    if !is_retired && scanner.problems.is_empty() {
        scanner.compare_with_head(head, at_head, last);
    }
    report.num_after_head = match (head, scanner.last) {
        (Some(head), Some(last)) => last.seq.saturating_sub(head.seq),
        _ => 0,
    };
    report.num_records = scanner.num_records;
    report.last = scanner.last;
    report.torn = scanner.torn;
    report.problems = scanner.problems;
    Ok(report)
}

/// The last record that this one says was retired.
fn retired_through(line: &Line) -> Option<(u64, Mac)> {
    if line.kind != "retired" {
        return None;
    }
    let seq = line.data.get("through_seq")?.as_u64()?;
    let mac = Mac::parse(line.data.get("through_mac")?.as_str()?)?;
    Some((seq, mac))
}
