//! Where there are no maps (no Unix, or Miri, which interprets): everything comes from the allocator.
//!
//! It has the face of `maps.rs` and must not know more than that. Invariant: nothing is ever handed out, so nothing is held.

use std::convert::Infallible;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use super::Use;

/// As in `maps.rs`, where tests ask for buffers on both sides of it.
#[cfg(test)]
pub(super) const MAP_FROM_BYTES: usize = 256 * 1024;

/// There is none.
pub(super) type Hold = Infallible;

/// The allocator serves.
pub(super) fn take(_bytes: usize, _usage: Use) -> std::io::Result<Option<(NonNull<u8>, Hold)>> {
    Ok(None)
}

/// There are none.
pub(super) fn prefer_large_pages<T>(_memory: &mut [MaybeUninit<T>]) {}

/// The allocator cannot be asked.
pub fn give_back_freed() {}

/// As in `maps.rs`, without anything to share.
pub fn pack_together<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// Likewise.
pub fn pack_together_within<R>(_bytes: usize, work: impl FnOnce() -> R) -> R {
    work()
}
