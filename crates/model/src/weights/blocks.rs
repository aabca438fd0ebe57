//! Stored blocks to f32, one function a format, bit for bit what ggml's own dequantisation gives.
//!
//! It must not know tensors or files. Its invariant: `bytes` and `out` cover the same whole blocks (asserted), and every
//! bit pattern gives some number: a bad scale gives NaN or infinity here and an error in `import`.
//!
//! Source: the block structures of `ggml-common.h`; the order of the float operations is ggml's, so that results agree
//! exactly with the files' other readers (tested against candle's).

use half::{bf16, f16};

use super::WeightFormat;

/// Blocks of the K formats have this many elements.
const SUPER_BLOCK: usize = 256;

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
        WeightFormat::Q4_0 => blocks(bytes, out, q4_0),
        WeightFormat::Q4_1 => blocks(bytes, out, q4_1),
        WeightFormat::Q5_0 => blocks(bytes, out, q5_0),
        WeightFormat::Q5_1 => blocks(bytes, out, q5_1),
        WeightFormat::Q8_0 => blocks(bytes, out, q8_0),
        WeightFormat::Q2K => blocks(bytes, out, q2_k),
        WeightFormat::Q3K => blocks(bytes, out, q3_k),
        WeightFormat::Q4K => blocks(bytes, out, q4_k),
        WeightFormat::Q5K => blocks(bytes, out, q5_k),
        WeightFormat::Q6K => blocks(bytes, out, q6_k),
    }
}

fn dense<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = convert(bytes);
    }
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    one: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    for (block, out) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<ELEMENTS>().0) {
        one(block, out);
    }
}

/// The f16 at byte `at`.
pub(super) fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// 16 bytes of nibbles to 32 codes: low nibbles are elements 0 to 15, high nibbles 16 to 31.
pub(super) fn nibbles(packed: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(packed) {
        *low = byte & 0xF;
        *high = byte >> 4;
    }
}

/// Codes 0 to 31 of the five-bit formats: nibbles, and a word whose bit i is the fifth bit of element i.
pub(super) fn five_bits(fifth: &[u8], packed: &[u8], codes: &mut [u8]) {
    nibbles(packed, codes);
    let fifth = u32::from_le_bytes([fifth[0], fifth[1], fifth[2], fifth[3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((fifth >> i) as u8 & 1) << 4;
    }
}

// scale f16 | 32 nibbles
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(block, 0).to_f32();
    let mut codes = [0; 32];
    nibbles(&block[2..], &mut codes);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = f32::from(code as i8 - 8) * scale;
    }
}

// scale f16 | minimum f16 | 32 nibbles
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, min) = (half_at(block, 0).to_f32(), half_at(block, 2).to_f32());
    let mut codes = [0; 32];
    nibbles(&block[4..], &mut codes);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = f32::from(code) * scale + min;
    }
}

// scale f16 | fifth bits u32 | 32 nibbles
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let scale = half_at(block, 0).to_f32();
    let mut codes = [0; 32];
    five_bits(&block[2..6], &block[6..], &mut codes);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = f32::from(code as i8 - 16) * scale;
    }
}

// scale f16 | minimum f16 | fifth bits u32 | 32 nibbles
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, min) = (half_at(block, 0).to_f32(), half_at(block, 2).to_f32());
    let mut codes = [0; 32];
    five_bits(&block[4..8], &block[8..], &mut codes);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = f32::from(code) * scale + min;
    }
}

// scale f16 | 32 int8
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(block, 0).to_f32();
    for (out, &code) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(code as i8) * scale;
    }
}

/// Element `i` of a super-block lies in the byte `32 * (i / 128) + i % 32` of its 2-bit field, at bit pair `i / 32 % 4`.
fn two_bits(packed: &[u8], i: usize) -> u8 {
    packed[32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4)) & 3
}

// 16 x (scale, minimum) nibbles | 256 x 2 bits | scale f16 | minimum f16
fn q2_k(block: &[u8; 84], out: &mut [f32; SUPER_BLOCK]) {
    let (scales, packed) = (&block[..16], &block[16..80]);
    let (scale, min) = (half_at(block, 80).to_f32(), half_at(block, 82).to_f32());
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let group_scale = scale * f32::from(scales[group] & 0xF);
        let group_min = min * f32::from(scales[group] >> 4);
        for (i, out) in out.iter_mut().enumerate() {
            *out = group_scale * f32::from(two_bits(packed, group * 16 + i)) - group_min;
        }
    }
}

// 256 x third bit | 256 x 2 bits | 16 x 6-bit scale, packed in 12 bytes | scale f16
fn q3_k(block: &[u8; 110], out: &mut [f32; SUPER_BLOCK]) {
    let (third, packed, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let scale = half_at(block, 108).to_f32();
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Low four bits: nibbles of bytes 0 to 7; high two: bit pairs of bytes 8 to 11.
        let low = scales[group % 8] >> (4 * (group / 8)) & 0xF;
        let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        let group_scale = scale * (f32::from(low | high << 4) - 32.0);
        for (i, out) in out.iter_mut().enumerate() {
            let element = group * 16 + i;
            // The third bit counts negatively: where it is clear, 4 is taken off.
            let offset = if third[element % 32] >> (element / 32) & 1 == 0 { 4 } else { 0 };
            *out = group_scale * f32::from(two_bits(packed, element) as i8 - offset);
        }
    }
}

/// Scale and minimum number `group` (0 to 7), six bits each, of the 12 bytes that Q4_K and Q5_K share.
fn six_bit_pair(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (low & 0xF | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// Element `i` lies in the byte `32 * (i / 64) + i % 32`, in the low nibble for the first 32 of each 64.
fn paired_nibble(packed: &[u8], i: usize) -> u8 {
    packed[32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2)) & 0xF
}

// scale f16 | minimum f16 | 8 x 6-bit (scale, minimum) | 256 nibbles
fn q4_k(block: &[u8; 144], out: &mut [f32; SUPER_BLOCK]) {
    let (scale, min) = (half_at(block, 0).to_f32(), half_at(block, 2).to_f32());
    let packed = &block[16..];
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (group_scale, group_min) = six_bit_pair(&block[4..16], group);
        let (group_scale, group_min) = (scale * group_scale, min * group_min);
        for (i, out) in out.iter_mut().enumerate() {
            *out = group_scale * f32::from(paired_nibble(packed, group * 32 + i)) - group_min;
        }
    }
}

// scale f16 | minimum f16 | 8 x 6-bit (scale, minimum) | 256 x fifth bit | 256 nibbles
fn q5_k(block: &[u8; 176], out: &mut [f32; SUPER_BLOCK]) {
    let (scale, min) = (half_at(block, 0).to_f32(), half_at(block, 2).to_f32());
    let (fifth, packed) = (&block[16..48], &block[48..]);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (group_scale, group_min) = six_bit_pair(&block[4..16], group);
        let (group_scale, group_min) = (scale * group_scale, min * group_min);
        for (i, out) in out.iter_mut().enumerate() {
            let code = paired_nibble(packed, group * 32 + i) | (fifth[i] >> group & 1) << 4;
            *out = group_scale * f32::from(code) - group_min;
        }
    }
}

// 256 nibbles | 256 x upper 2 bits | 16 x int8 scale | scale f16
fn q6_k(block: &[u8; 210], out: &mut [f32; SUPER_BLOCK]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = half_at(block, 208).to_f32();
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let group_scale = scale * f32::from(scales[group] as i8);
        for (i, out) in out.iter_mut().enumerate() {
            let element = group * 16 + i;
            let nibble = low[64 * (element / 128) + element % 64] >> (4 * (element / 64 % 2)) & 0xF;
            *out = group_scale * f32::from((nibble | two_bits(high, element) << 4) as i8 - 32);
        }
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

    fn candle_type(format: WeightFormat) -> GgmlDType {
        match format {
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
        }
    }

    proptest! {
        /// Random bytes, NaN scales included: every format, bit for bit (NaN as NaN).
        #[test]
        fn dequantises_as_candle_does(seed in prop::collection::vec(any::<u8>(), 3 * 1024)) {
            for &format in WeightFormat::ALL {
                let bytes = &seed[..3 * 256 / format.block_elements() * format.block_bytes()];
                let mut ours = vec![0.0; 3 * 256];
                dequantize(format, bytes, &mut ours);
                let theirs = qtensor_from_ggml(candle_type(format), bytes, vec![3, 256], &Device::Cpu).unwrap();
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
}
