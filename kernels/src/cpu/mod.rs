//! The CPU's operations: safe functions over slices that check shapes, split work and call the chosen kernels.
//!
//! They know buffers and shapes, nothing of layers or requests. Invariant: splitting never changes a result; the pieces
//! of an operation write disjoint parts of its output, and no sum is ever divided between two pieces.

pub(crate) mod activations;
pub(crate) mod arranged;
pub(crate) mod attention;
pub(crate) mod dispatch;
pub(crate) mod embed;
pub(crate) mod experts;
pub(crate) mod gated;
pub(crate) mod logits;
pub(crate) mod low_rank;
pub(crate) mod matmul;
pub(crate) mod peak;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod write_kv;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod generic;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pool;
pub(crate) mod prefetch;
mod scalar;
mod task;

use std::ops::Range;

use dispatch::{Isa, Kernels};
use pool::{Pool, share_of};

/// More threads than this are never made.
pub const MAX_THREADS: usize = 256;
/// Pieces a thread should find on average, so that a slow one is helped out by the others.
const PIECES_PER_THREAD: usize = 4;

/// Chosen kernels and one worker pool. Cheap to share behind an `Arc`; calls from several threads take turns.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    kernels: &'static Kernels,
    pool: Pool,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernels").finish_non_exhaustive()
    }
}

impl Cpu {
    /// `threads` counts the calling one; it is brought into 1..=[`MAX_THREADS`], and fewer are made where the system
    /// refuses more ([`Cpu::threads`] tells). Panics if the machine lacks `isa`: [`Isa::from_env`] and [`Isa::parse`]
    /// give only what it has.
    pub fn new(isa: Isa, threads: usize) -> Self {
        let Some(kernels) = Kernels::of(isa) else { panic!("this machine has no {isa}: ask Isa::is_available first") };
        Self { isa, kernels, pool: Pool::new(threads.clamp(1, MAX_THREADS)) }
    }

    /// The best instruction set of this machine; [`Isa::from_env`] also honours `BINDERY_ISA`.
    pub fn detect() -> Isa {
        Isa::best()
    }

    /// The instruction set in use; matrices must be packed for it.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that take part, the caller included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs `task(0)` to `task(num_tasks - 1)`, each once, on any thread.
    pub fn run(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        self.pool.run(num_tasks, task);
    }

    /// Runs `piece` over consecutive ranges that cover `0..len`, each of at least `min_piece`.
    fn split(&self, len: usize, min_piece: usize, piece: impl Fn(Range<usize>) + Sync) {
        let pieces = (self.threads() * PIECES_PER_THREAD).min(len / min_piece.max(1)).max(1);
        if self.threads() == 1 || pieces == 1 {
            piece(0..len);
            return;
        }
        self.pool.run(pieces, |index| piece(share_of(len, pieces, index)));
    }
}
