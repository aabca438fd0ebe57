//! What every detector has in common: it reads a text that may still grow, and says what it found and up to where nothing
//! that comes later can change that.
//!
//! Knows no actions and no policies. **Invariant**: a detector that was asked piece by piece has reported the same spans as one
//! that saw the whole text at once; what it has called settled stays so.

/// Whether a text goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// More may come.
    Open,
    /// This is all.
    Last,
}

/// Something found, in bytes of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) end: usize,
    /// What it is: `email`, `phrase`. Never the text.
    pub(super) label: &'static str,
}

/// The text in sight. What stands before the detector's own cursor is context.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window<'a> {
    pub(super) text: &'a str,
    pub(super) end: End,
}
