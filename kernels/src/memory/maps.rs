//! Memory from the system, in maps of its own or shared: what [`Buffer`](super::Buffer) asks before the allocator.
//!
//! A model's matrices are mostly smaller than a large page (2 MiB), so each in a map of its own would lie in small ones,
//! and a step would look up tens of thousands of them. [`pack_together`] lets them share maps. It knows bytes, not what is in
//! them. Invariant: what is handed out lies in a map that lives as long as its [`Hold`].

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{SMALL_ALIGN, Use};

/// Buffers of at least this many bytes come from the system directly; smaller ones from the allocator.
pub(super) const MAP_FROM_BYTES: usize = 256 * 1024;

/// What keeps a buffer's memory: a map of its own, or one that it shares and that outlives it.
pub(super) type Hold = Arc<Map>;

/// Bytes of a map that buffers share, unless one of them needs more. Address space: pages cost when they are touched.
const SHARED_MAP_BYTES: usize = 64 << 20;
/// A large page on the machines in question.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// Gives memory that the allocator keeps for later back to the system: what loading needed for a while, above all. Allocators
/// other than glibc's do so by themselves, or cannot be asked.
///
/// A tokenizer of 262,144 tokens leaves some 100 MiB behind, in pages that hold a little else.
pub fn give_back_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes the allocator's own locks and touches only what nobody holds.
    unsafe {
        libc::malloc_trim(0);
    }
}

thread_local! {
    /// The map that weights packed now share; none outside of `pack_together`.
    static SHARED: RefCell<Option<Shared>> = const { RefCell::new(None) };
}

/// A map being filled.
struct Shared {
    map: Option<Arc<Map>>,
    /// Bytes of it given away.
    used: usize,
    /// Of each, unless a buffer needs more.
    map_bytes: usize,
    usage: Use,
}

impl Default for Shared {
    fn default() -> Self {
        Self { map: None, used: 0, map_bytes: SHARED_MAP_BYTES, usage: Use::Whole }
    }
}

/// `bytes` zeroed bytes, none of them touched yet, with what keeps them; none where the allocator should serve.
pub(super) fn take(bytes: usize, usage: Use) -> std::io::Result<Option<(NonNull<u8>, Hold)>> {
    let shared = SHARED.with_borrow_mut(|shared| match shared {
        Some(shared) if usage == Use::Whole => Some(shared.take(bytes)),
        _ => None,
    });
    match shared {
        Some(taken) => taken.map(Some),
        None if bytes < MAP_FROM_BYTES => Ok(None),
        None => {
            let map = Map::new(bytes, usage)?;
            Ok(Some((map.start, Arc::new(map))))
        }
    }
}

/// Weights that `work` packs on this thread lie together, in large pages where the system has them. Memory goes back
/// when the last of those that share a map is dropped, so pack together what goes together: one model.
pub fn pack_together<R>(work: impl FnOnce() -> R) -> R {
    pack_in(Shared::default(), work)
}

/// The same of something small that comes and goes, about this large in all: one adapter. From the allocator its memory would hardly
/// go back to the system. It lies in large pages only where they are filled.
pub fn pack_together_within<R>(bytes: usize, work: impl FnOnce() -> R) -> R {
    let usage = if bytes < SHARED_MAP_BYTES / 4 { Use::Sparse } else { Use::Whole };
    pack_in(Shared { map_bytes: bytes.clamp(1, SHARED_MAP_BYTES), usage, ..Shared::default() }, work)
}

fn pack_in<R>(shared: Shared, work: impl FnOnce() -> R) -> R {
    /// Puts back what was there, on a panic too.
    struct Restore(Option<Shared>);
    impl Drop for Restore {
        fn drop(&mut self) {
            SHARED.set(self.0.take());
        }
    }
    let _restore = Restore(SHARED.replace(Some(shared)));
    work()
}

/// Asks the system for large pages in memory that is going to be written whole. Those it would fill in part stay small.
pub(super) fn prefer_large_pages<T>(memory: &mut [MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    {
        let range = memory.as_mut_ptr_range();
        let first = range.start.addr().next_multiple_of(LARGE_PAGE_BYTES);
        let end = range.end.addr() / LARGE_PAGE_BYTES * LARGE_PAGE_BYTES;
        if first < end {
            let start = range.start.cast::<libc::c_void>().wrapping_byte_add(first - range.start.addr());
            // SAFETY: the range lies within the caller's. The advice changes nothing that it holds, and may be refused.
            let _ = unsafe { libc::madvise(start, end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// An anonymous map.
pub(super) struct Map {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a map is memory alone; who may touch which part is up to the buffers in it.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

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
                Use::Whole | Use::Blocks => libc::MADV_HUGEPAGE,
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

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this very size, unmapped once; buffers in it hold it.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.bytes);
        }
    }
}

impl Shared {
    /// The next `bytes` of the map, or of a new one.
    fn take(&mut self, bytes: usize) -> std::io::Result<(NonNull<u8>, Arc<Map>)> {
        let bytes = bytes.next_multiple_of(SMALL_ALIGN);
        let map = if let Some(map) = self.map.take().filter(|map| map.bytes - self.used >= bytes) {
            map
        } else {
            let spare = if self.usage == Use::Whole { LARGE_PAGE_BYTES } else { 0 };
            let map = Map::new(bytes.max(self.map_bytes) + spare, self.usage)?;
            self.used = if self.usage == Use::Whole { map.large_page_offset() } else { 0 };
            Arc::new(map)
        };
        // SAFETY: `used + bytes` lies within the map, by the filter or by the size it was made with.
        let start = unsafe { map.start.add(self.used) };
        self.used += bytes;
        self.map = Some(Arc::clone(&map));
        Ok((start, map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Buffer;

    #[test]
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
}
