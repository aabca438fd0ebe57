//! What the machine itself can do, for whoever holds a model's speed against it.
//!
//! It times the kernels' measuring loops, which return the work they did, by the caller's clock, since nothing in this
//! crate may know one.

use std::time::Duration;

use bindery_kernels::{Cpu, Isa, ReadTarget};

use crate::{
    AttentionWork, ModelError, ProductWeights, caches, memory::available_memory_bytes, threads::physical_cores,
};

/// Each roof is taken in rounds of about this length (memory's in as long as it takes to read all), and the best of them
/// counts: other work on the machine only ever lowers a figure.
const ROUND: Duration = Duration::from_millis(40);
const ROUNDS: usize = 12;
/// Of a glance.
const GLANCE_ROUNDS: usize = 2;
/// How many times as much as the last caches hold is read: a part of it still comes from them, quicker than from memory. (480
/// MB of cache: 36 GB/s of 256 MB, 29 of 1.5 GB, 24 of 6 GB.)
const CACHE_MULTIPLE: usize = 4;
/// A quarter of the memory that is left is enough to take for that.
const MEMORY_DIVISOR: u64 = 4;
/// What is compared reads more than the caches' multiple where a model is large, and the more is read the slower it comes: half of
/// the memory that is left may be taken for as much.
const COMPARED_MEMORY_DIVISOR: u64 = 2;
/// Read at least, whatever the system says of caches and memory.
const MIN_READ_BYTES: usize = 512 << 20;
/// Beside the roofs of a machine that computes with its matrix unit.
const MATRIX_UNIT_NOTE: &str = "int8 is the peak of avx512vnni, which a share may pass: the matrix unit's own, several times as high, \
    is not to be had with weights in groups of 32";

/// What the machine does at best, a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofs {
    /// Bytes read from memory.
    pub read_bytes: f64,
    /// int8 operations, two a multiply-add.
    pub int8_operations: f64,
    /// f32 operations, two a multiply-add.
    pub f32_operations: f64,
    /// What a reader of `int8_operations` and of shares of it has to know, if anything.
    pub int8_note: Option<&'static str>,
}

/// How often weights are read, and how many rows meet them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Passes {
    /// Steps.
    pub num_steps: f64,
    /// Rows in all of them.
    pub num_rows: f64,
    /// Steps with rows whose logits could be asked for: in the others nothing goes through the head.
    pub num_logit_steps: f64,
    /// Those rows.
    pub num_logit_rows: f64,
}

impl Roofs {
    /// The higher of each: other work only ever lowers a figure.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            read_bytes: self.read_bytes.max(other.read_bytes),
            int8_operations: self.int8_operations.max(other.int8_operations),
            f32_operations: self.f32_operations.max(other.f32_operations),
            int8_note: self.int8_note.or(other.int8_note),
        }
    }

    /// Seconds that these weights take at least, once a step and once a row: reading them, and multiplying with them.
    pub fn seconds(&self, product: &ProductWeights, passes: Passes) -> (f64, f64) {
        let peak = if product.is_quantized { self.int8_operations } else { self.f32_operations };
        let Passes { num_steps, num_rows, num_logit_steps, num_logit_rows } = passes;
        let of =
            |all: u64, kept: u64, times: f64, kept_times: f64| times * (all - kept) as f64 + kept_times * kept as f64;
        let bytes = of(product.num_bytes, product.num_kept_bytes, num_steps, num_logit_steps);
        let macs = of(product.num_parameters, product.num_kept_parameters, num_rows, num_logit_rows);
        (bytes / self.read_bytes, 2.0 * macs / peak)
    }

    /// Seconds that attention takes at least: reading keys and values, and multiplying with them, which is done in f32.
    pub fn attention_seconds(&self, work: AttentionWork) -> (f64, f64) {
        (work.read_bytes as f64 / self.read_bytes, work.operations as f64 / self.f32_operations)
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
    int8_note: Option<&'static str>,
}

impl Machine {
    /// As a model loaded with the same `threads` (`None`: the physical cores) computes. An instruction set that
    /// `BINDERY_ISA` asks for and the machine lacks is [`ModelError::BadOption`].
    pub fn new(threads: Option<usize>) -> Result<Self, ModelError> {
        let isa = Isa::from_env().map_err(|error| ModelError::BadOption(error.to_string()))?;
        // All but products of many rows is the same there, so its roofs are, too.
        let (isa, int8_note) = match isa {
            Isa::Amx => (Isa::Avx512Vnni, Some(MATRIX_UNIT_NOTE)),
            isa => (isa, None),
        };
        Ok(Self { cpu: Cpu::new(isa, threads.unwrap_or_else(physical_cores)), int8_note })
    }

    /// Takes two seconds of all threads, and longer where caches are large. `compared_bytes`, `clock` and errors as for
    /// [`Gauge::new`]; the memory is given back.
    pub fn roofs(self, compared_bytes: u64, clock: impl Fn() -> Duration) -> Result<Roofs, ModelError> {
        Ok(Gauge::new(self, compared_bytes, &clock)?.take(&clock, ROUNDS))
    }
}

/// A machine whose roofs are looked at again and again: a virtual machine is moved between cores while it runs, and two cores
/// that share a cache share its way to memory, too (on a Zen 4 with two cores, 33 GB/s together or 50 apart, by the second).
/// A share of a roof says something only if the roof was taken beside what it is a share of.
#[derive(Debug)]
pub struct Gauge {
    machine: Machine,
    target: ReadTarget,
    int8_rounds: usize,
    f32_rounds: usize,
}

impl Gauge {
    /// For what reads `compared_bytes` again and again, as a model that is loaded already does its weights: memory's roof is read
    /// from as many if half of what is left of memory holds them. Keeps that memory: half a gigabyte at least, more where caches
    /// are large; [`ModelError::OutOfMemory`] where there is none. `clock` tells the time since some moment, always the same one.
    pub fn new(machine: Machine, compared_bytes: u64, clock: impl Fn() -> Duration) -> Result<Self, ModelError> {
        let num_bytes = read_bytes(caches::last_level_bytes(), compared_bytes, available_memory_bytes());
        let target = ReadTarget::new(num_bytes).map_err(|error| ModelError::OutOfMemory(error.to_string()))?;
        let cpu = &machine.cpu;
        let rounds_of = |work: &dyn Fn(usize) -> u64| {
            let mut rounds = 1000;
            while timed(&clock, || work(rounds)).1 < ROUND / 2 {
                rounds *= 2;
            }
            rounds
        };
        let int8_rounds = rounds_of(&|rounds| cpu.spin_int8(rounds));
        let f32_rounds = rounds_of(&|rounds| cpu.spin_f32(rounds));
        Ok(Self { machine, target, int8_rounds, f32_rounds })
    }

    /// The roofs of this moment, in two rounds of each.
    pub fn glance(&self, clock: impl Fn() -> Duration) -> Roofs {
        self.take(&clock, GLANCE_ROUNDS)
    }

    /// The best of some rounds of each.
    fn take(&self, clock: &impl Fn() -> Duration, rounds: usize) -> Roofs {
        let best = |work: &dyn Fn(usize) -> u64| {
            let rate = |round| {
                let (done, elapsed) = timed(clock, || work(round));
                done / elapsed.as_secs_f64().max(1e-9)
            };
            (0..rounds).map(rate).fold(0.0, f64::max)
        };
        let cpu = &self.machine.cpu;
        Roofs {
            read_bytes: best(&|round| cpu.read(&self.target, round % 2 == 0)),
            int8_operations: best(&|_| cpu.spin_int8(self.int8_rounds)),
            f32_operations: best(&|_| cpu.spin_f32(self.f32_rounds)),
            int8_note: self.machine.int8_note,
        }
    }
}

/// How much to read: beyond the last caches, and as much as is read by what the roof is compared with.
fn read_bytes(last_cache_bytes: Option<usize>, compared_bytes: u64, available_bytes: u64) -> usize {
    let at_most = |bytes: u64, divisor| usize::try_from(bytes.min(available_bytes / divisor)).unwrap_or(usize::MAX);
    let beyond_caches = last_cache_bytes.unwrap_or(0).saturating_mul(CACHE_MULTIPLE);
    let beyond_caches = at_most(beyond_caches as u64, MEMORY_DIVISOR);
    beyond_caches.max(at_most(compared_bytes, COMPARED_MEMORY_DIVISOR)).max(MIN_READ_BYTES)
}

/// What was done, and in what time.
fn timed(clock: impl Fn() -> Duration, work: impl Fn() -> u64) -> (f64, Duration) {
    let start = clock();
    let done = work();
    (done as f64, clock().saturating_sub(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_is_read_as_the_weights_have_but_half_of_what_is_left_at_most() {
        const GB: u64 = 1_000_000_000;
        let read = |caches: Option<usize>, compared, available| read_bytes(caches, compared, available) as u64;
        let caches = Some(480_000_000);
        assert_eq!(read(caches, 97_000_000, 20 * GB), 1_920_000_000, "a small model: four times the caches");
        assert_eq!(read(caches, 97_000_000, 4 * GB), GB, "of which a quarter of the memory is enough");
        assert_eq!(read(caches, 5 * GB, 17 * GB), 5 * GB);
        assert_eq!(read(caches, 9 * GB, 12 * GB), 6 * GB);
        assert_eq!(read(None, 0, 20 * GB), MIN_READ_BYTES as u64);
        assert_eq!(read(None, 5 * GB, 0), MIN_READ_BYTES as u64, "what the system says is not to be trusted so far");
        assert_eq!(read(Some(usize::MAX), u64::MAX, u64::MAX), u64::MAX / 2);
    }
}
