//! What the machine itself can do, for whoever holds a model's speed against it.
//!
//! It hands out the kernels' measuring loops, which return the work they did; the clock is the caller's, since nothing
//! in this crate may know one.

use bindery_kernels::{Cpu, Isa};

use crate::{ModelError, threads::physical_cores};

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

    /// f32 multiply-adds on registers; returns operations, two a multiply-add.
    pub fn spin_f32(&self, rounds: usize) -> u64 {
        self.cpu.spin_f32(rounds)
    }

    /// The inner loop of a product of 4-bit codes with int8 activations, on registers; returns operations.
    pub fn spin_int8(&self, rounds: usize) -> u64 {
        self.cpu.spin_int8(rounds)
    }

    /// Reads `bytes` once with all threads; returns their number.
    pub fn read(&self, bytes: &[u8]) -> u64 {
        self.cpu.read(bytes)
    }
}
