//! Asks memory for a cache line before it is needed.
//!
//! Weights are read once a step, front to back; the processors' own prefetchers begin anew at every page and stay too
//! close, so a core alone gets little more than half of what memory gives (measured: `benches/RESULTS.md`). It knows
//! addresses, nothing of what lies there. Invariant: a hint changes no value and never faults, whatever the address.

/// Bytes that an aligned line has on every machine in question.
pub(crate) const LINE_BYTES: usize = 64;

/// More would drive out what it is asked for before it is read.
const MOST_TILE_BYTES: usize = 16 * 1024;

/// Into the first-level cache. The address may lie outside of any buffer.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of the architecture's base; a hint that never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) at, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", not(miri)))))]
    let _ = at;
}

/// Into the second-level cache, and not into the first. The address may lie outside of any buffer.
#[inline(always)]
pub(crate) fn prefetch_to_second(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of the architecture's base; a hint that never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) at, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", not(miri)))))]
    let _ = at;
}

/// A tile's part of a buffer that holds `num_tiles` of them, or the first `MOST_TILE_BYTES` of it.
pub(crate) fn prefetch_tile<T>(buffer: &[T], tile: usize, num_tiles: usize) {
    let len = buffer.len() / num_tiles.max(1);
    let bytes = (len * size_of::<T>()).min(MOST_TILE_BYTES);
    let from = buffer.as_ptr().wrapping_add(tile * len).cast::<u8>();
    for offset in (0..bytes).step_by(LINE_BYTES) {
        prefetch(from.wrapping_add(offset));
    }
}
