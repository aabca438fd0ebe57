//! Stored blocks: what each of ggml's formats keeps where, to neutral codes and scales, and to f32.
//!
//! It must not know tensors or files. Its invariant: `bytes` and `out` cover the same whole blocks (asserted), and every
//! bit pattern gives some number: a bad scale gives NaN or infinity here and an error in `import`.
//!
//! Source: the block structures of `ggml-common.h`, drawn above each reader. Dequantised values have ggml's order of float
//! operations (upper scale by sub-scale, by code, plus minimum), so they agree exactly with the files' other readers
//! (tested against candle's).

use bindery_kernels::{GROUP, QuantFormat, QuantRow, SUPER_GROUP, Scaling};
use half::{bf16, f16};

use super::WeightFormat;

/// Groups of the K formats that have the shorter ones.
const SHORT_GROUPS: usize = SUPER_GROUP / 16;

/// One block as a kernel wants it: a weight is `scale * sub_scale * value + min * sub_min`, where the value is what the
/// code stands for. What a format does not have
/// is left as it was.
pub(super) struct Block {
    /// `[block elements]`
    pub(super) codes: [i8; SUPER_GROUP],
    pub(super) scale: f16,
    /// What is added: the sign is turned where ggml takes minimums off.
    pub(super) min: f16,
    /// `[groups]`
    pub(super) sub_scales: [i8; SHORT_GROUPS],
    pub(super) sub_mins: [i8; SHORT_GROUPS],
}

impl Block {
    pub(super) fn new() -> Self {
        Self {
            codes: [0; SUPER_GROUP],
            scale: f16::ZERO,
            min: f16::ZERO,
            sub_scales: [0; SHORT_GROUPS],
            sub_mins: [0; SHORT_GROUPS],
        }
    }

    /// Reads one block of a format that is not dense.
    fn read(&mut self, format: WeightFormat, bytes: &[u8]) {
        match format {
            WeightFormat::Q4_0 => self.q4_0(bytes),
            WeightFormat::Q4_1 => self.q4_1(bytes),
            WeightFormat::Q5_0 => self.q5_0(bytes),
            WeightFormat::Q5_1 => self.q5_1(bytes),
            WeightFormat::Q8_0 => self.q8_0(bytes),
            WeightFormat::Q2K => self.q2_k(bytes),
            WeightFormat::Q3K => self.q3_k(bytes),
            WeightFormat::Q4K => self.q4_k(bytes),
            WeightFormat::Q5K => self.q5_k(bytes),
            WeightFormat::Q6K => self.q6_k(bytes),
            WeightFormat::Iq4Nl => self.iq4_nl(bytes),
            WeightFormat::Iq4Xs => self.iq4_xs(bytes),
            WeightFormat::Mxfp4 => self.mxfp4(bytes),
            WeightFormat::Tq2_0 => self.tq2_0(bytes),
            WeightFormat::Tq1_0 => self.tq1_0(bytes),
            WeightFormat::Iq3S => self.iq3_s(bytes),
            WeightFormat::Iq3Xxs => self.iq3_xxs(bytes),
            WeightFormat::Iq2S => self.iq2_s(bytes),
            WeightFormat::Iq2Xs => self.iq2_xs(bytes),
            WeightFormat::Iq2Xxs => self.iq2_xxs(bytes),
            WeightFormat::Iq1M => self.iq1_m(bytes),
            WeightFormat::Iq1S => self.iq1_s(bytes),
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Gptq { .. }
            | WeightFormat::Awq
            | WeightFormat::CompressedInt { .. }
            | WeightFormat::Bindery { .. } => unreachable!("{format} has no blocks"),
        }
    }

    /// Writes codes from what the file stores, less the value that stands for zero.
    pub(super) fn set_codes<const N: usize>(&mut self, zero: i8, stored: impl Fn(usize) -> u8) {
        for (i, code) in self.codes[..N].iter_mut().enumerate() {
            *code = stored(i).cast_signed() - zero;
        }
    }

    // scale f16 | 32 nibbles
    fn q4_0(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        self.set_codes::<GROUP>(8, |i| nibble(&block[2..18], i));
    }

    // scale f16 | minimum f16 | 32 nibbles
    fn q4_1(&mut self, block: &[u8]) {
        (self.scale, self.min) = (half_at(block, 0), half_at(block, 2));
        self.set_codes::<GROUP>(0, |i| nibble(&block[4..20], i));
    }

    // scale f16 | fifth bits u32 | 32 nibbles
    fn q5_0(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        self.set_codes::<GROUP>(16, |i| nibble(&block[6..22], i) | fifth_bit(&block[2..6], i));
    }

    // scale f16 | minimum f16 | fifth bits u32 | 32 nibbles
    fn q5_1(&mut self, block: &[u8]) {
        (self.scale, self.min) = (half_at(block, 0), half_at(block, 2));
        self.set_codes::<GROUP>(0, |i| nibble(&block[8..24], i) | fifth_bit(&block[4..8], i));
    }

    // scale f16 | 32 int8
    fn q8_0(&mut self, block: &[u8]) {
        self.scale = half_at(block, 0);
        self.set_codes::<GROUP>(0, |i| block[2..34][i]);
    }

    // 16 x (scale, minimum) nibbles | 256 x 2 bits | scale f16 | minimum f16
    fn q2_k(&mut self, block: &[u8]) {
        (self.scale, self.min) = (half_at(block, 80), -half_at(block, 82));
        for (group, &both) in block[..SHORT_GROUPS].iter().enumerate() {
            self.sub_scales[group] = (both & 0xF).cast_signed();
            self.sub_mins[group] = (both >> 4).cast_signed();
        }
        self.set_codes::<SUPER_GROUP>(0, |i| two_bits(&block[16..80], i));
    }

    // 256 x third bit | 256 x 2 bits | 16 x 6-bit scale, packed in 12 bytes | scale f16
    fn q3_k(&mut self, block: &[u8]) {
        self.scale = half_at(block, 108);
        let scales = &block[96..108];
        for (group, sub_scale) in self.sub_scales.iter_mut().enumerate() {
            // Low four bits: nibbles of bytes 0 to 7; high two: bit pairs of bytes 8 to 11.
            let low = scales[group % 8] >> (4 * (group / 8)) & 0xF;
            let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
            *sub_scale = (low | high << 4).cast_signed() - 32;
        }
        let third_bit = |i: usize| block[i % 32] >> (i / 32) & 1;
        self.set_codes::<SUPER_GROUP>(4, |i| two_bits(&block[32..96], i) | third_bit(i) << 2);
    }

    // scale f16 | minimum f16 | 8 x 6-bit (scale, minimum) | 256 nibbles
    fn q4_k(&mut self, block: &[u8]) {
        self.six_bit_pairs(block);
        self.set_codes::<SUPER_GROUP>(0, |i| paired_nibble(&block[16..144], i));
    }

    // scale f16 | minimum f16 | 8 x 6-bit (scale, minimum) | 256 x fifth bit | 256 nibbles
    fn q5_k(&mut self, block: &[u8]) {
        self.six_bit_pairs(block);
        let fifth_bit = |i: usize| block[16 + i % 32] >> (i / 32) & 1;
        self.set_codes::<SUPER_GROUP>(0, |i| paired_nibble(&block[48..176], i) | fifth_bit(i) << 4);
    }

    /// What Q4_K and Q5_K begin with: two f16, then 8 scales and 8 minimums of six bits each in 12 bytes.
    fn six_bit_pairs(&mut self, block: &[u8]) {
        (self.scale, self.min) = (half_at(block, 0), -half_at(block, 2));
        let packed = &block[4..16];
        for group in 0..8 {
            let (scale, min) = if group < 4 {
                (packed[group] & 63, packed[group + 4] & 63)
            } else {
                let low = packed[group + 4];
                (low & 0xF | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
            };
            (self.sub_scales[group], self.sub_mins[group]) = (scale.cast_signed(), min.cast_signed());
        }
    }

    // 256 nibbles | 256 x upper 2 bits | 16 x int8 scale | scale f16
    fn q6_k(&mut self, block: &[u8]) {
        self.scale = half_at(block, 208);
        for (sub_scale, &byte) in self.sub_scales.iter_mut().zip(&block[192..208]) {
            *sub_scale = byte.cast_signed();
        }
        let nibble = |i: usize| block[64 * (i / 128) + i % 64] >> (4 * (i / 64 % 2)) & 0xF;
        self.set_codes::<SUPER_GROUP>(32, |i| nibble(i) | two_bits(&block[128..192], i) << 4);
    }
}

/// The f16 at byte `at`.
pub(super) fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// Of 16 bytes: low nibbles are elements 0 to 15, high nibbles 16 to 31.
pub(super) fn nibble(packed: &[u8], i: usize) -> u8 {
    packed[i % 16] >> (4 * (i / 16)) & 0xF
}

/// Bit i of a 32-bit word, where the fifth bit of a code belongs.
fn fifth_bit(word: &[u8], i: usize) -> u8 {
    (word[i / 8] >> (i % 8) & 1) << 4
}

/// Element `i` of 256 lies in the byte `32 * (i / 128) + i % 32` of its 2-bit field, at bit pair `i / 32 % 4`.
pub(super) fn two_bits(packed: &[u8], i: usize) -> u8 {
    packed[32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4)) & 3
}

/// Element `i` of 256 lies in the byte `32 * (i / 64) + i % 32`, in the low nibble for the first 32 of each 64.
fn paired_nibble(packed: &[u8], i: usize) -> u8 {
    packed[32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2)) & 0xF
}

/// Whole blocks of a row to neutral codes and scales, `bytes: [blocks, block_bytes]`, for a format that is not dense.
pub(super) fn unpack(format: WeightFormat, bytes: &[u8], out: &mut QuantRow<'_>) {
    let quant = format.quant_format().expect("the caller keeps dense formats away");
    let elements = quant.scale_span();
    let groups = quant.group().map_or(0, |group| elements / group);
    let mut block = Block::new();
    for (i, bytes) in bytes.chunks_exact(format.block_bytes()).enumerate() {
        block.read(format, bytes);
        out.codes[i * elements..][..elements].copy_from_slice(&block.codes[..elements]);
        if quant.scaling != Scaling::Exponents {
            out.scales[i] = block.scale;
        }
        if quant.with_mins {
            out.mins[i] = block.min;
        }
        if quant.has_sub_scales() {
            out.sub_scales[i * groups..][..groups].copy_from_slice(&block.sub_scales[..groups]);
            if quant.with_mins {
                out.sub_mins[i * groups..][..groups].copy_from_slice(&block.sub_mins[..groups]);
            }
        }
    }
}

/// Dequantises whole blocks: `bytes: [blocks, block_bytes]`, `out: [blocks, block_elements]`.
pub(super) fn dequantize(format: WeightFormat, bytes: &[u8], out: &mut [f32]) {
    let (block_bytes, block_elements) = (format.block_bytes(), format.block_elements());
    assert!(
        bytes.len() / block_bytes * block_elements == out.len() && bytes.len().is_multiple_of(block_bytes),
        "{} bytes of {format} are not {} elements",
        bytes.len(),
        out.len()
    );
    match format {
        WeightFormat::F32 => dense(bytes, out, f32::from_le_bytes),
        WeightFormat::F16 => dense(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        WeightFormat::Bf16 => dense(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        _ => {
            let mut block = Block::new();
            for (bytes, out) in bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(block_elements)) {
                block.read(format, bytes);
                block.dequantize(format, out);
            }
        }
    }
}

fn dense<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = convert(bytes);
    }
}

impl Block {
    /// `out: [block elements]`
    fn dequantize(&self, format: WeightFormat, out: &mut [f32]) {
        let quant = format.quant_format().expect("a block format");
        let group = quant.group().expect("the kernels know it, as the formats' test shows");
        for (index, (out, codes)) in out.chunks_mut(group).zip(self.codes.chunks(group)).enumerate() {
            let scale = times(quant, self.scale, self.sub_scales[index]);
            let min = times(quant, self.min, self.sub_mins[index]);
            for (out, &code) in out.iter_mut().zip(codes) {
                let product = scale * f32::from(quant.book.value(code));
                *out = if quant.with_mins { product + min } else { product };
            }
        }
    }
}

/// Both levels of a scale.
fn times(quant: QuantFormat, upper: f16, sub: i8) -> f32 {
    match quant.scaling {
        // No type of ggml's comes in spans.
        Scaling::Single | Scaling::Wide | Scaling::Spans(_) => upper.to_f32(),
        Scaling::TwoLevel | Scaling::Nibbles => upper.to_f32() * f32::from(sub),
        Scaling::Eighths => upper.to_f32() * (f32::from(sub) / 8.0),
        Scaling::Exponents => Scaling::power(sub.cast_unsigned()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{
        Device,
        quantized::{GgmlDType, ggml_file::qtensor_from_ggml},
    };
    use proptest::prelude::*;

    use super::*;

    /// None for what candle does not read.
    fn candle_type(format: WeightFormat) -> Option<GgmlDType> {
        Some(match format {
            WeightFormat::F32 => GgmlDType::F32,
            WeightFormat::F16 => GgmlDType::F16,
            WeightFormat::Bf16 => GgmlDType::BF16,
            WeightFormat::Q4_0 => GgmlDType::Q4_0,
            WeightFormat::Q4_1 => GgmlDType::Q4_1,
            WeightFormat::Q5_0 => GgmlDType::Q5_0,
            WeightFormat::Q5_1 => GgmlDType::Q5_1,
            WeightFormat::Q8_0 => GgmlDType::Q8_0,
            WeightFormat::Q2K => GgmlDType::Q2K,
            WeightFormat::Q3K => GgmlDType::Q3K,
            WeightFormat::Q4K => GgmlDType::Q4K,
            WeightFormat::Q5K => GgmlDType::Q5K,
            WeightFormat::Q6K => GgmlDType::Q6K,
            _ => return None,
        })
    }

    proptest! {
        /// Random bytes, NaN scales included: every format, bit for bit (NaN as NaN).
        #[test]
        fn dequantises_as_candle_does(seed in prop::collection::vec(any::<u8>(), 3 * 1024)) {
            for &format in WeightFormat::ALL {
                let Some(candle_type) = candle_type(format) else { continue };
                let bytes = &seed[..3 * 256 / format.block_elements() * format.block_bytes()];
                let mut ours = vec![0.0; 3 * 256];
                dequantize(format, bytes, &mut ours);
                let theirs = qtensor_from_ggml(candle_type, bytes, vec![3, 256], &Device::Cpu).unwrap();
                let theirs = theirs.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                    prop_assert!(
                        ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                        "{format} element {i}: {ours} and {theirs}"
                    );
                }
            }
        }
    }

    /// The bytes of `ggml_blocks.py`: SplitMix64's, with each block's f16 made finite.
    fn made_up_blocks(format: WeightFormat) -> Vec<u8> {
        let mut state = u64::from(format.ggml_id().unwrap());
        let mut bytes = vec![0; NUM_BLOCKS * format.block_bytes()];
        for byte in &mut bytes {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            *byte = (z ^ (z >> 31)) as u8;
        }
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            match format {
                WeightFormat::Mxfp4 => block[0] %= 253,
                WeightFormat::Tq2_0 | WeightFormat::Tq1_0 | WeightFormat::Iq1M => block[block.len() - 1] &= 0xBF,
                _ => block[1] &= 0xBF,
            }
        }
        bytes
    }

    /// So many that every point of every grid is met.
    const NUM_BLOCKS: usize = 1024;

    #[test]
    fn dequantises_as_the_gguf_package_does() {
        let expected = include_str!("../../tests/weights/ggml_blocks.json");
        let expected: std::collections::BTreeMap<String, (String, [f32; 4])> = serde_json::from_str(expected).unwrap();
        let without_candle = WeightFormat::ALL.iter().filter(|&&format| candle_type(format).is_none());
        assert_eq!(without_candle.clone().count(), expected.len());
        for &format in without_candle {
            let mut values = vec![0.0; NUM_BLOCKS * format.block_elements()];
            dequantize(format, &made_up_blocks(format), &mut values);
            let (hash, first) = &expected[&format.to_string()];
            assert_eq!(values[..4], *first, "{format}");
            // Zeros lose their signs, which mean nothing.
            let bytes = values.iter().flat_map(|value| (value + 0.0).to_le_bytes());
            let fnv1a = bytes
                .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
            assert_eq!(format!("{fnv1a:016x}"), *hash, "{format}");
        }
    }
}
