//! Zeroed buffers for weights and caches.
//!
//! They exist because `Vec` cannot promise three things at once: alignment to cache lines, pages that cost nothing until
//! they are touched, and an error (not an abort) when the system refuses. Knows nothing of what is stored. `maps` is the
//! system's part. Invariant: `ptr` is valid for `len` initialised elements for the buffer's whole life.

#[cfg_attr(not(all(unix, not(miri))), path = "memory/no_maps.rs")]
mod maps;

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Pod;

pub use self::maps::{give_back_freed, pack_together, pack_together_within};
use crate::KernelError;

/// Alignment of the small ones: a cache line, the widest vector.
const SMALL_ALIGN: usize = 64;

/// Whether a buffer is going to be touched whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Weights: every page will be read in every step, so large pages are asked for.
    Whole,
    /// What is filled from the front, and may end up hardly filled: in large pages, of which all but the last are filled.
    Blocks,
    /// What is small, or filled here and there: only small pages keep untouched parts free.
    Sparse,
}

/// Makes `room` at least `len` elements long, in large pages where it fills them and the system has some. What it held is lost
/// where it grows.
///
/// For what a step writes anew each time: outputs of a product are written column by column, each row's in a page of its own, and
/// looking up where small pages are took half of the time of the default model's head for 32 rows on a virtual machine.
pub fn make_room<T: Copy + Default>(room: &mut Vec<T>, len: usize) -> Result<(), KernelError> {
    if room.len() >= len {
        return Ok(());
    }
    // So that not both are there at once.
    *room = Vec::new();
    room.try_reserve_exact(len).map_err(|error| KernelError::OutOfMemory {
        bytes: len.saturating_mul(size_of::<T>()),
        reason: error.to_string(),
    })?;
    maps::prefer_large_pages(room.spare_capacity_mut());
    room.resize(len, T::default());
    Ok(())
}

enum Origin {
    Empty,
    Allocator(std::alloc::Layout),
    /// A map, or a part of one, which lives as long as the buffer.
    Map {
        _held: maps::Hold,
    },
}

/// A zeroed slice of plain data at a vector-friendly address.
pub(crate) struct Buffer<T: Pod> {
    ptr: NonNull<T>,
    len: usize,
    origin: Origin,
    marker: PhantomData<T>,
}

// SAFETY: a buffer owns its memory alone, as a `Vec` does, and `T` is plain data.
unsafe impl<T: Pod> Send for Buffer<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Pod> Sync for Buffer<T> {}

impl<T: Pod> Buffer<T> {
    /// `len` zeroes. Fails with [`KernelError::OutOfMemory`]; touches no page of a large buffer.
    pub(crate) fn zeroed(len: usize, usage: Use) -> Result<Self, KernelError> {
        let refused = |bytes: usize, reason: String| KernelError::OutOfMemory { bytes, reason };
        let bytes = len
            .checked_mul(size_of::<T>())
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| refused(usize::MAX, "the size does not fit the address space".to_owned()))?;
        if bytes == 0 {
            return Ok(Self { ptr: NonNull::dangling(), len, origin: Origin::Empty, marker: PhantomData });
        }
        if let Some((start, map)) = maps::take(bytes, usage).map_err(|error| refused(bytes, error.to_string()))? {
            return Ok(Self { ptr: start.cast(), len, origin: Origin::Map { _held: map }, marker: PhantomData });
        }
        let layout = std::alloc::Layout::from_size_align(bytes, SMALL_ALIGN.max(align_of::<T>()))
            .map_err(|error| refused(bytes, error.to_string()))?;
        // SAFETY: the layout has a size above zero, checked just before.
        let raw = unsafe { std::alloc::alloc_zeroed(layout) };
        let ptr = NonNull::new(raw.cast::<T>()).ok_or_else(|| refused(bytes, "out of memory".to_owned()))?;
        Ok(Self { ptr, len, origin: Origin::Allocator(layout), marker: PhantomData })
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the type's invariant; zeroed memory is a valid `T` because `T: Pod`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        // A map goes with its last owner.
        if let Origin::Allocator(layout) = &self.origin {
            // SAFETY: allocated in `zeroed` with this very layout, freed once.
            unsafe { std::alloc::dealloc(self.ptr.as_ptr().cast(), *layout) }
        }
    }
}

impl<T: Pod> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{maps::MAP_FROM_BYTES, *};

    #[test]
    fn buffers_are_zeroed_aligned_and_writable() {
        // Miri, which interprets, has no maps anyway.
        let lens = [0, 1, 17, MAP_FROM_BYTES / 4, MAP_FROM_BYTES];
        for &len in if cfg!(miri) { &lens[..3] } else { &lens } {
            for usage in [Use::Whole, Use::Blocks, Use::Sparse] {
                let mut buffer = Buffer::<f32>::zeroed(len, usage).unwrap();
                assert!(buffer.iter().all(|&x| x == 0.0));
                assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(SMALL_ALIGN));
                buffer.fill(1.0);
                assert!(buffer.len() == len && buffer.iter().all(|&x| x == 1.0));
            }
        }
    }

    #[test]
    fn room_is_made_once_and_never_shrinks() {
        let large = if cfg!(miri) { 100 } else { 5 << 20 };
        let mut room = vec![1.0_f32; 3];
        make_room(&mut room, 2).unwrap();
        assert_eq!(room, [1.0; 3]);
        make_room(&mut room, large).unwrap();
        assert!(room.len() == large && room.iter().all(|&x| x == 0.0));
        room.fill(2.0);
        let place = room.as_ptr();
        make_room(&mut room, large - 1).unwrap();
        assert!(room.as_ptr() == place && room.len() == large && room.iter().all(|&x| x == 2.0));
        assert!(matches!(make_room(&mut room, usize::MAX / 4), Err(KernelError::OutOfMemory { .. })));
        make_room(&mut room, 4).unwrap();
        assert_eq!(room, [0.0; 4]);
    }

    #[test]
    fn absurd_sizes_are_errors() {
        // Miri ends the program where it has no memory left, so it is asked only for what no layout can hold.
        for len in if cfg!(miri) { &[usize::MAX][..] } else { &[usize::MAX, usize::MAX / 4, 1 << 60] }.iter().copied() {
            assert!(matches!(Buffer::<f32>::zeroed(len, Use::Blocks), Err(KernelError::OutOfMemory { .. })));
        }
    }
}
