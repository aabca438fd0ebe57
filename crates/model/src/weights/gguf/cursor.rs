//! Reads little-endian values out of a byte slice, every read checked against what is left.
//!
//! It must not know what the values mean. Its invariants: `position <= bytes.len()`, and nothing is allocated for a
//! count before the count is known to fit both the bytes left and the budget for decoded values.

/// Where in the bytes we are, and how much may still be decoded into memory.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
    budget: u64,
}

/// What is wrong, for people. The caller adds the file and the key.
pub(super) type Outcome<T> = Result<T, String>;

impl<'a> Cursor<'a> {
    /// Reads `bytes`; decoded arrays may take `budget` bytes of memory altogether.
    pub(super) fn new(bytes: &'a [u8], budget: u64) -> Self {
        Self { bytes, position: 0, budget }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: u64) -> Outcome<&'a [u8]> {
        let left = self.left();
        let count = usize::try_from(count).ok().filter(|&count| count <= left).ok_or_else(|| {
            format!("{count} bytes are announced at byte {}, where only {left} are left", self.position)
        })?;
        let taken = &self.bytes[self.position..self.position + count];
        self.position += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let taken = self.take(N as u64)?;
        Ok(taken.try_into().expect("take returns as many bytes as asked for"))
    }

    /// A count of things of at least `min_bytes` in the file and `memory_bytes` each in memory.
    pub(super) fn count(&mut self, what: &str, min_bytes: u64, memory_bytes: u64) -> Outcome<usize> {
        let count = self.u64()?;
        let left = self.left() as u64;
        if count.checked_mul(min_bytes).is_none_or(|bytes| bytes > left) {
            return Err(format!("{count} {what} are announced, which cannot fit the {left} bytes left"));
        }
        self.spend(what, count.saturating_mul(memory_bytes))?;
        usize::try_from(count).map_err(|_| format!("{count} {what} are announced, more than this machine can address"))
    }

    fn spend(&mut self, what: &str, bytes: u64) -> Outcome<()> {
        self.budget = self.budget.checked_sub(bytes).ok_or_else(|| {
            format!("{what} would take {bytes} bytes of memory; {} are left of the limit for metadata", self.budget)
        })?;
        Ok(())
    }

    pub(super) fn u8(&mut self) -> Outcome<u8> {
        Ok(self.array::<1>()?[0])
    }
    pub(super) fn i8(&mut self) -> Outcome<i8> {
        Ok(i8::from_le_bytes(self.array()?))
    }
    pub(super) fn u16(&mut self) -> Outcome<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    pub(super) fn i16(&mut self) -> Outcome<i16> {
        Ok(i16::from_le_bytes(self.array()?))
    }
    pub(super) fn u32(&mut self) -> Outcome<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    pub(super) fn i32(&mut self) -> Outcome<i32> {
        Ok(i32::from_le_bytes(self.array()?))
    }
    pub(super) fn u64(&mut self) -> Outcome<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    pub(super) fn i64(&mut self) -> Outcome<i64> {
        Ok(i64::from_le_bytes(self.array()?))
    }
    pub(super) fn f32(&mut self) -> Outcome<f32> {
        Ok(f32::from_le_bytes(self.array()?))
    }
    pub(super) fn f64(&mut self) -> Outcome<f64> {
        Ok(f64::from_le_bytes(self.array()?))
    }

    /// One byte, 0 or 1.
    pub(super) fn bool(&mut self) -> Outcome<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("a truth value is {other} instead of 0 or 1")),
        }
    }

    /// A length and as many bytes of UTF-8.
    pub(super) fn string(&mut self) -> Outcome<String> {
        let count = self.u64()?;
        let bytes = self.take(count)?;
        self.spend("a text", count)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| "a text is not UTF-8".to_owned())
    }
}
