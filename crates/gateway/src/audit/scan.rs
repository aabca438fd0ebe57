//! Reads segments line by line and follows the chain through them.
//!
//! Used by whoever reads the log: to verify all of it, to take it up again at its end, to export it. Memory: one line. **Invariant**: a line is
//! handed on only if this key has signed it and it stands where it was written.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
};

use super::{
    AuditError, Head,
    folder::Segment,
    key::AuditKey,
    line::{self, Line, MAX_LINE_BYTES, Mac, Next, NoLine},
    verify::{Problem, What},
};

/// The most problems that are told; a log that was written anew would have one a line.
const MAX_PROBLEMS: usize = 20;

/// Bytes at the end that a crash has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Torn {
    /// In this file.
    pub segment: String,
    /// After this many complete lines.
    pub line: u64,
    /// From this byte on.
    pub offset: u64,
    /// So many.
    pub bytes: u64,
}

/// Follows the chain.
#[derive(Debug)]
pub(super) struct Scanner<'a> {
    key: &'a AuditKey,
    /// What has to come; none before the first line.
    next: Option<Next>,
    /// What the first line followed.
    pub(super) start: Option<Next>,
    pub(super) last: Option<Head>,
    pub(super) num_records: u64,
    pub(super) problems: Vec<Problem>,
    pub(super) torn: Option<Torn>,
}

/// Whether more segments follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Position {
    Inner,
    Last,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(key: &'a AuditKey) -> Self {
        Self { key, next: None, start: None, last: None, num_records: 0, problems: Vec::new(), torn: None }
    }

    /// Reads a segment; `visit` gets its lines.
    pub(super) fn read(
        &mut self,
        segment: &Segment,
        position: Position,
        visit: &mut dyn FnMut(&Line) -> Result<(), AuditError>,
    ) -> Result<(), AuditError> {
        let file = File::open(&segment.path).map_err(AuditError::io("open", &segment.path))?;
        let mut reader = BufReader::with_capacity(64 * 1024, file);
        let mut bytes = Vec::new();
        let (mut number, mut offset) = (0, 0);
        loop {
            bytes.clear();
            let limit = MAX_LINE_BYTES as u64 + 1;
            reader.by_ref().take(limit).read_until(b'\n', &mut bytes).map_err(AuditError::io("read", &segment.path))?;
            if bytes.is_empty() || self.problems.len() >= MAX_PROBLEMS {
                break;
            }
            number += 1;
            let at = (segment, number);
            match bytes.split_last() {
                Some((b'\n', line)) => {
                    if let Some(line) = self.check(at, line) {
                        visit(&line)?;
                    }
                }
                _ if position == Position::Last => self.end_in_pieces(at, offset, &bytes),
                _ => self.report(at, What::Form),
            }
            offset += bytes.len() as u64;
        }
        if number == 0 && position == Position::Inner {
            self.report((segment, 1), What::Empty);
        }
        Ok(())
    }

    pub(super) fn key(&self) -> &'a AuditKey {
        self.key
    }

    /// What the next record will follow.
    pub(super) fn next(&self) -> Next {
        self.next.unwrap_or(Next { seq: 1, prev: Mac::NONE })
    }

    fn check(&mut self, at: (&Segment, u64), bytes: &[u8]) -> Option<Line> {
        let line = match line::read(self.key, bytes) {
            Ok(line) => line,
            Err(NoLine::Form) => {
                self.report(at, What::Form);
                return None;
            }
            Err(NoLine::Signature) => {
                self.report(at, What::Signature);
                return None;
            }
        };
        let next = *self.next.get_or_insert(Next { seq: line.seq, prev: line.prev });
        self.start.get_or_insert(next);
        let mut is_good = true;
        if line.seq != next.seq {
            self.report(at, What::Number { expected: next.seq, found: line.seq });
            is_good = false;
        } else if line.prev != next.prev {
            self.report(at, What::Chain);
            is_good = false;
        }
        let begins = line.kind == "segment";
        let named = line.data.get("segment").and_then(serde_json::Value::as_u64);
        if begins != (at.1 == 1) || (begins && named != Some(at.0.number)) {
            self.report(at, What::Misplaced);
            is_good = false;
        }
        // The chain goes on from what is there, so that one change is told once.
        self.next = Some(Next { seq: line.seq.saturating_add(1), prev: line.mac });
        self.last = Some(Head { seq: line.seq, mac: line.mac });
        self.num_records += 1;
        is_good.then_some(line)
    }

    fn end_in_pieces(&mut self, at: (&Segment, u64), offset: u64, bytes: &[u8]) {
        if line::could_be_torn(self.next(), bytes) {
            let (segment, number) = at;
            self.torn = Some(Torn { segment: segment.name(), line: number - 1, offset, bytes: bytes.len() as u64 });
        } else {
            self.report(at, What::Form);
        }
    }

    pub(super) fn report(&mut self, (segment, line): (&Segment, u64), what: What) {
        self.problems.push(Problem { segment: segment.name(), line, what });
    }

    /// A head that is newer than the log, or another record than the log has under its number.
    pub(super) fn compare_with_head(&mut self, head: Option<Head>, at_head: Option<Mac>, segment: &Segment) {
        let Some(head) = head else { return };
        let last = self.last.map_or(0, |last| last.seq);
        if head.seq > last {
            // What looks torn was acknowledged: it has been cut.
            let line = self.torn.take().map_or(0, |torn| torn.line + 1);
            self.report((segment, line), What::Truncated { head: head.seq, last });
        } else if at_head != Some(head.mac) {
            self.report((segment, 0), What::OtherHead { head: head.seq });
        }
    }
}
