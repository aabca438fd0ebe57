//! What the machine can do at best, for a roofline (Williams, Waterman and Patterson 2009): work without a purpose, whose
//! amount is returned. The clock is the caller's.

use super::Cpu;
use super::prefetch::{LINE_BYTES, prefetch};
use crate::KernelError;
use crate::memory::{Buffer, Use};

/// Tasks a thread: a late one is helped out.
const TASKS_PER_THREAD: usize = 8;
/// How far ahead lines are asked for, where they are.
const READ_AHEAD_BYTES: usize = 4096;
/// Bytes that one task reads.
const READ_BYTES: usize = 1 << 20;

/// Bytes to read that lie as weights do: in large pages where the system has them, or looking pages up would be measured.
#[derive(Debug)]
pub struct ReadTarget(Buffer<u8>);

impl ReadTarget {
    /// Touches all of them. [`KernelError::OutOfMemory`] where the system refuses.
    pub fn new(num_bytes: usize) -> Result<Self, KernelError> {
        let mut bytes = Buffer::zeroed(num_bytes, Use::Whole)?;
        bytes.fill(1);
        Ok(Self(bytes))
    }
}

impl Cpu {
    /// Multiply-adds of f32 on registers, on all threads; more `rounds` take longer. Returns operations, two a
    /// multiply-add.
    pub fn spin_f32(&self, rounds: usize) -> u64 {
        // SAFETY: the table fits the machine.
        self.spin(|| unsafe { (self.kernels.spin_f32)(rounds) })
    }

    /// The inner loop of a product of 4-bit codes with int8 activations, on registers, on all threads. Returns
    /// operations, two a multiply-add.
    pub fn spin_int8(&self, rounds: usize) -> u64 {
        // SAFETY: the table fits the machine.
        self.spin(|| unsafe { (self.kernels.spin_int8)(rounds) })
    }

    fn spin(&self, kernel: impl Fn() -> u64 + Sync) -> u64 {
        let num_tasks = self.threads() * TASKS_PER_THREAD;
        let total = std::sync::atomic::AtomicU64::new(0);
        self.pool.run(num_tasks, |_| {
            total.fetch_add(kernel(), std::sync::atomic::Ordering::Relaxed);
        });
        total.into_inner()
    }

    /// Reads all of the target once, on all threads. `asks_ahead`: lines are asked for before they are read; some cores are
    /// quicker so, others if that is left to them. Returns the number of bytes.
    pub fn read(&self, target: &ReadTarget, asks_ahead: bool) -> u64 {
        let bytes = &*target.0;
        let pieces: Vec<&[u8]> = bytes.chunks(READ_BYTES).collect();
        self.pool.run(pieces.len(), |index| {
            // Sixteen sums of eight bytes: as many loads under way as the machine takes.
            let mut sums = [0_u64; 16];
            for line in pieces[index].chunks_exact(2 * LINE_BYTES) {
                for next in 0..if asks_ahead { 2 } else { 0 } {
                    prefetch(line.as_ptr().wrapping_add(READ_AHEAD_BYTES + next * LINE_BYTES));
                }
                for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                    *sum = sum.wrapping_add(u64::from_le_bytes(*word));
                }
            }
            std::hint::black_box(sums);
        });
        bytes.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::ReadTarget;
    use crate::{Cpu, Isa};

    #[test]
    fn every_set_returns_the_work_it_did() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let cpu = Cpu::new(isa, 2);
            for spin in [Cpu::spin_f32, Cpu::spin_int8] {
                let (one, ten) = (spin(&cpu, 1), spin(&cpu, 10));
                assert!(one > 0 && ten == 10 * one, "{isa}: {one} and {ten}");
            }
            let num_bytes = if cfg!(miri) { 3_000 } else { 3_000_000 };
            for asks_ahead in [false, true] {
                assert_eq!(cpu.read(&ReadTarget::new(num_bytes).unwrap(), asks_ahead), num_bytes as u64);
            }
        }
    }
}
