//! What can go wrong outside the caller's control; broken shapes are the caller's bug and assert instead.

/// Failures of the world around the kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// `BINDERY_ISA` holds a name nobody knows.
    #[error(
        "unknown instruction set '{name}' in BINDERY_ISA: use one of {known}, or unset it to take the best one here"
    )]
    UnknownIsa {
        /// What the variable held.
        name: String,
        /// The names it may hold.
        known: String,
    },
    /// The machine, or this build, lacks the instruction set that was asked for.
    #[error(
        "instruction set '{name}' is not available on this machine: it has {available}; set BINDERY_ISA to one of them or unset it"
    )]
    UnavailableIsa {
        /// What was asked for.
        name: &'static str,
        /// What there is.
        available: String,
    },
    /// A cache shape with a zero in it, or one whose size does not fit an address.
    #[error(
        "a KV cache of {num_blocks} blocks with {shape} cannot be laid out: every dimension must be at least 1 and the whole must fit the address space"
    )]
    KvShape {
        /// The shape, for people.
        shape: String,
        /// Blocks asked for.
        num_blocks: usize,
    },
    /// The system refused memory.
    #[error(
        "the system refused {bytes} bytes of memory: {reason}; ask for fewer KV blocks, or give the process more memory"
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        reason: String,
    },
}
