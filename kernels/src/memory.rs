//! Zeroed buffers for weights and caches.
//!
//! They exist because `Vec` cannot promise three things at once: alignment to cache lines, pages that cost nothing until
//! they are touched, and an error (not an abort) when the system refuses. Knows nothing of what is stored.
//!
//! A model's matrices are mostly smaller than a large page (2 MiB), so each in a map of its own would lie in small ones,
//! and a step would look up tens of thousands of them. [`pack_together`] lets them share maps.
//! Invariant: `ptr` is valid for `len` initialised elements for the buffer's whole life.

#[cfg(all(unix, not(miri)))]
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
#[cfg(all(unix, not(miri)))]
use std::sync::Arc;

use bytemuck::Pod;

use crate::KernelError;

/// Buffers of at least this many bytes come from the system directly; smaller ones from the allocator.
const MAP_FROM_BYTES: usize = 256 * 1024;
/// Alignment of the small ones: a cache line, the widest vector.
const SMALL_ALIGN: usize = 64;

/// Whether a buffer is going to be touched whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Weights: every page will be read in every step, so large pages are asked for.
    Whole,
    /// Caches: pages are touched as requests come, so only small pages keep untouched parts free.
    Sparse,
}

enum Origin {
    Empty,
    Allocator(std::alloc::Layout),
    /// Held until the buffer is dropped.
    #[cfg(all(unix, not(miri)))]
    Map(#[expect(dead_code, reason = "dropped with the buffer")] Map),
    /// A part of a map, which outlives it.
    #[cfg(all(unix, not(miri)))]
    Shared(#[expect(dead_code, reason = "dropped with the buffer")] Arc<Map>),
}

/// Bytes of a map that buffers share, unless one of them needs more. Address space: pages cost when they are touched.
#[cfg(all(unix, not(miri)))]
const SHARED_MAP_BYTES: usize = 64 << 20;
/// A large page on the machines in question.
#[cfg(all(unix, not(miri)))]
const LARGE_PAGE_BYTES: usize = 2 << 20;

#[cfg(all(unix, not(miri)))]
thread_local! {
    /// The map that weights packed now share; none outside of `pack_together`.
    static SHARED: RefCell<Option<Shared>> = const { RefCell::new(None) };
}

/// A map being filled.
#[cfg(all(unix, not(miri)))]
#[derive(Default)]
struct Shared {
    map: Option<Arc<Map>>,
    /// Bytes of it given away.
    used: usize,
}

/// Weights that `work` packs on this thread lie together, in large pages where the system has them. Memory goes back
/// when the last of those that share a map is dropped, so pack together what goes together: one model.
pub fn pack_together<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(all(unix, not(miri)))]
    {
        /// Puts back what was there, on a panic too.
        struct Restore(Option<Shared>);
        impl Drop for Restore {
            fn drop(&mut self) {
                SHARED.set(self.0.take());
            }
        }
        let _restore = Restore(SHARED.replace(Some(Shared::default())));
        work()
    }
    #[cfg(not(all(unix, not(miri))))]
    work()
}

/// An anonymous map.
#[cfg(all(unix, not(miri)))]
struct Map {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a map is memory alone; who may touch which part is up to the buffers in it.
#[cfg(all(unix, not(miri)))]
unsafe impl Send for Map {}
// SAFETY: as above.
#[cfg(all(unix, not(miri)))]
unsafe impl Sync for Map {}

#[cfg(all(unix, not(miri)))]
impl Map {
    /// Zeroed pages, none of them touched yet.
    fn new(bytes: usize, usage: Use) -> std::io::Result<Self> {
        // SAFETY: an anonymous private map at an address of the system's choice touches nothing that exists.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        #[cfg(target_os = "linux")]
        {
            let advice = match usage {
                Use::Whole => libc::MADV_HUGEPAGE,
                Use::Sparse => libc::MADV_NOHUGEPAGE,
            };
            // SAFETY: the range is the map made above. The advice may be refused; nothing depends on it.
            let _ = unsafe { libc::madvise(raw, bytes, advice) };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = usage;
        Ok(Self { start: NonNull::new(raw.cast()).expect("a successful map is never at address zero"), bytes })
    }

    /// Bytes before the first address that begins a large page.
    fn large_page_offset(&self) -> usize {
        self.start.addr().get().next_multiple_of(LARGE_PAGE_BYTES) - self.start.addr().get()
    }
}

#[cfg(all(unix, not(miri)))]
impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this very size, unmapped once; buffers in it hold it.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.bytes);
        }
    }
}

#[cfg(all(unix, not(miri)))]
impl Shared {
    /// The next `bytes` of the map, or of a new one.
    fn take(&mut self, bytes: usize) -> std::io::Result<(NonNull<u8>, Arc<Map>)> {
        let bytes = bytes.next_multiple_of(SMALL_ALIGN);
        let map = if let Some(map) = self.map.take().filter(|map| map.bytes - self.used >= bytes) {
            map
        } else {
            let map = Map::new(bytes.max(SHARED_MAP_BYTES) + LARGE_PAGE_BYTES, Use::Whole)?;
            self.used = map.large_page_offset();
            Arc::new(map)
        };
        // SAFETY: `used + bytes` lies within the map, by the filter or by the size it was made with.
        let start = unsafe { map.start.add(self.used) };
        self.used += bytes;
        self.map = Some(Arc::clone(&map));
        Ok((start, map))
    }
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
        #[cfg(all(unix, not(miri)))]
        {
            let shared = SHARED.with_borrow_mut(|shared| match shared {
                Some(shared) if usage == Use::Whole => Some(shared.take(bytes)),
                _ => None,
            });
            if let Some(taken) = shared {
                let (start, map) = taken.map_err(|error| refused(bytes, error.to_string()))?;
                return Ok(Self { ptr: start.cast(), len, origin: Origin::Shared(map), marker: PhantomData });
            }
            if bytes >= MAP_FROM_BYTES {
                let map = Map::new(bytes, usage).map_err(|error| refused(bytes, error.to_string()))?;
                return Ok(Self { ptr: map.start.cast(), len, origin: Origin::Map(map), marker: PhantomData });
            }
        }
        let _ = (usage, MAP_FROM_BYTES);
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
        match &self.origin {
            Origin::Empty => {}
            // SAFETY: allocated in `zeroed` with this very layout, freed once.
            Origin::Allocator(layout) => unsafe { std::alloc::dealloc(self.ptr.as_ptr().cast(), *layout) },
            // The map goes with its last owner.
            #[cfg(all(unix, not(miri)))]
            Origin::Map(_) | Origin::Shared(_) => {}
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
    use super::*;

    #[test]
    fn buffers_are_zeroed_aligned_and_writable() {
        // Miri, which interprets, has no maps anyway.
        let lens = [0, 1, 17, MAP_FROM_BYTES / 4, MAP_FROM_BYTES];
        for &len in if cfg!(miri) { &lens[..3] } else { &lens } {
            for usage in [Use::Whole, Use::Sparse] {
                let mut buffer = Buffer::<f32>::zeroed(len, usage).unwrap();
                assert!(buffer.iter().all(|&x| x == 0.0));
                assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(SMALL_ALIGN));
                buffer.fill(1.0);
                assert!(buffer.len() == len && buffer.iter().all(|&x| x == 1.0));
            }
        }
    }

    #[test]
    #[cfg(all(unix, not(miri)))]
    fn weights_packed_together_share_a_map_that_outlives_none_of_them() {
        let sizes = [1, 100, 3 * MAP_FROM_BYTES, SHARED_MAP_BYTES / 8, SHARED_MAP_BYTES / 4, 7];
        let mut buffers: Vec<Buffer<f32>> =
            pack_together(|| sizes.map(|len| Buffer::zeroed(len, Use::Whole).unwrap()).into());
        assert!(SHARED.with_borrow(Option::is_none));
        let starts: Vec<usize> = buffers.iter().map(|buffer| buffer.as_ptr().addr()).collect();
        assert!(starts[0].is_multiple_of(LARGE_PAGE_BYTES) && starts.iter().all(|at| at.is_multiple_of(SMALL_ALIGN)));
        // The first four follow each other; the fifth, of a whole map's size, begins another.
        for i in 1..4 {
            assert_eq!(starts[i], starts[i - 1] + (4 * sizes[i - 1]).next_multiple_of(SMALL_ALIGN));
        }
        assert!(starts[4].is_multiple_of(LARGE_PAGE_BYTES));
        for (number, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.iter().all(|&x| x == 0.0));
            buffer.fill(number as f32);
        }
        // Dropped one by one, the others stay as they are.
        while !buffers.is_empty() {
            for (number, buffer) in (sizes.len() - buffers.len()..).zip(&buffers) {
                assert!(buffer.iter().all(|&x| x == number as f32));
            }
            buffers.remove(0);
        }
    }

    #[test]
    fn absurd_sizes_are_errors() {
        // Miri ends the program where it has no memory left, so it is asked only for what no layout can hold.
        for len in if cfg!(miri) { &[usize::MAX][..] } else { &[usize::MAX, usize::MAX / 4, 1 << 60] }.iter().copied() {
            assert!(matches!(Buffer::<f32>::zeroed(len, Use::Sparse), Err(KernelError::OutOfMemory { .. })));
        }
    }
}
