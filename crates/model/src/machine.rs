//! What the machine itself can do, for whoever holds a model's speed against it.
//!
//! It times the kernels' measuring loops, which return the work they did, by the caller's clock, since nothing in this
//! crate may know one.

use std::time::Duration;

use bindery_kernels::{Cpu, Isa, ReadTarget};

use crate::{ModelError, ProductWeights, threads::physical_cores};

/// Each roof is taken in rounds of about this length, and the best of them counts: other work on the machine only ever
/// lowers a figure.
const ROUND: Duration = Duration::from_millis(40);
const ROUNDS: usize = 12;
/// Larger than the caches of every machine in question.
const READ_BYTES: usize = 512 << 20;

/// What the machine does at best, a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofs {
    /// Bytes read from memory.
    pub read_bytes: f64,
    /// int8 operations, two a multiply-add.
    pub int8_operations: f64,
    /// f32 operations, two a multiply-add.
    pub f32_operations: f64,
}

impl Roofs {
    /// Seconds that these weights take at least, once a step and once a row: reading them, and multiplying with them.
    pub fn seconds(&self, product: &ProductWeights, num_steps: f64, num_rows: f64) -> (f64, f64) {
        let peak = if product.is_quantized { self.int8_operations } else { self.f32_operations };
        let reading = num_steps * product.num_bytes as f64 / self.read_bytes;
        (reading, num_rows * 2.0 * product.num_parameters as f64 / peak)
    }
}

/// The larger of two times below which work cannot go, and what it is called.
pub fn bound(reading: f64, computing: f64) -> (f64, &'static str) {
    if reading > computing { (reading, "memory") } else { (computing, "compute") }
}

/// The kernels' instruction set and threads, without a model.
#[derive(Debug)]
pub struct Machine {
    cpu: Cpu,
}

impl Machine {
    /// As a model loaded with the same `threads` (`None`: the physical cores) computes. An instruction set that
    /// `BINDERY_ISA` asks for and the machine lacks is [`ModelError::BadOption`].
    pub fn new(threads: Option<usize>) -> Result<Self, ModelError> {
        let isa = Isa::from_env().map_err(|error| ModelError::BadOption(error.to_string()))?;
        Ok(Self { cpu: Cpu::new(isa, threads.unwrap_or_else(physical_cores)) })
    }

    /// Takes about two seconds of all threads. `clock` tells the time since some moment, always the same one.
    /// [`ModelError::OutOfMemory`] where there is no half a gigabyte to read.
    pub fn roofs(&self, clock: impl Fn() -> Duration) -> Result<Roofs, ModelError> {
        let timed = |work: &dyn Fn() -> u64| {
            let start = clock();
            let done = work();
            (done as f64, clock().saturating_sub(start))
        };
        let rate = |work: &dyn Fn() -> u64| {
            let (done, elapsed) = timed(work);
            done / elapsed.as_secs_f64().max(1e-9)
        };
        // The best round of work that grows with its argument.
        let best = |work: &dyn Fn(usize) -> u64| {
            let mut rounds = 1000;
            while timed(&|| work(rounds)).1 < ROUND / 2 {
                rounds *= 2;
            }
            (0..ROUNDS).map(|_| rate(&|| work(rounds))).fold(0.0, f64::max)
        };
        let target = ReadTarget::new(READ_BYTES).map_err(|error| ModelError::OutOfMemory(error.to_string()))?;
        Ok(Roofs {
            read_bytes: (0..ROUNDS / 2).map(|_| rate(&|| self.cpu.read(&target))).fold(0.0, f64::max),
            int8_operations: best(&|rounds| self.cpu.spin_int8(rounds)),
            f32_operations: best(&|rounds| self.cpu.spin_f32(rounds)),
        })
    }
}
