//! How a tensor's elements may be stored: names, sizes and where the arithmetic is.

use std::fmt;

use bindery_kernels::{CodeBits, CodeBook, GROUP, QuantFormat, Scaling};

use super::gguf::GgmlType;

/// How a tensor's elements are stored. The block formats are ggml's; the last four are of safetensors checkpoints, whose
/// scales and zero points are tensors of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum WeightFormat {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of a single.
    Bf16,
    /// 32 elements: f16 scale, 4-bit codes; scale * (code - 8).
    Q4_0,
    /// 32 elements: f16 scale, f16 minimum, 4-bit codes; scale * code + minimum.
    Q4_1,
    /// 32 elements: f16 scale, 5-bit codes; scale * (code - 16).
    Q5_0,
    /// 32 elements: f16 scale, f16 minimum, 5-bit codes; scale * code + minimum.
    Q5_1,
    /// 32 elements: f16 scale, int8 codes; scale * code.
    Q8_0,
    /// 256 elements: 2-bit codes, 4-bit scale and minimum a 16.
    Q2K,
    /// 256 elements: 3-bit codes, 6-bit scale a 16.
    Q3K,
    /// 256 elements: 4-bit codes, 6-bit scale and minimum a 32.
    Q4K,
    /// 256 elements: 5-bit codes, 6-bit scale and minimum a 32.
    Q5K,
    /// 256 elements: 6-bit codes, 8-bit scale a 16.
    Q6K,
    /// 32 elements: f16 scale, 4-bit numbers of values from a list.
    Iq4Nl,
    /// 256 elements: likewise, 6-bit scale a 32.
    Iq4Xs,
    /// 32 elements: a power of two, 4-bit floats (OCP's MX specification).
    Mxfp4,
    /// 256 elements: f16 scale, 2 bits each; scale * (code - 1).
    Tq2_0,
    /// 256 elements: likewise -1, 0 or 1, five of them a byte. Kept in 2 bits each, 1.2 times the file.
    Tq1_0,
    /// 256 elements: points of a grid in four dimensions, signs, 4-bit scale a 32. Kept in 4 bits each, 1.3 times the file.
    Iq3S,
    /// 256 elements: likewise with fewer points and signs. 1.4 times the file.
    Iq3Xxs,
    /// 256 elements: points of a grid in eight dimensions, signs, 4-bit scale a 16. Kept in 3 bits each, 1.4 times the file.
    Iq2S,
    /// 256 elements: likewise with fewer points and signs. 1.5 times the file.
    Iq2Xs,
    /// 256 elements: likewise with fewer yet, 4-bit scale a 32. 1.7 times the file.
    Iq2Xxs,
    /// 256 elements: points of -1, 0, 1 in eight dimensions, shifted by an eighth; 3-bit scale a 16. Kept in 3 bits each,
    /// twice the file.
    Iq1M,
    /// 256 elements: likewise, 3-bit scale and shift a 32. 2.3 times the file.
    Iq1S,
    /// AutoGPTQ's and GPTQModel's, of 2, 3, 4 or 8 bits.
    Gptq {
        /// Of a code.
        bits: u8,
    },
    /// AutoAWQ's, of 4 bits.
    Awq,
    /// compressed-tensors', of 4 or 8 bits.
    CompressedInt {
        /// Of a code.
        bits: u8,
    },
    /// Our own, see [`native`](super::native); of 4 to 8 bits.
    Bindery {
        /// Of a code.
        bits: u8,
    },
}

impl WeightFormat {
    /// Every format that can be read from one tensor.
    pub const ALL: &'static [Self] = &[
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Mxfp4,
        Self::Tq2_0,
        Self::Tq1_0,
        Self::Iq3S,
        Self::Iq3Xxs,
        Self::Iq2S,
        Self::Iq2Xs,
        Self::Iq2Xxs,
        Self::Iq1M,
        Self::Iq1S,
    ];

    /// The id in GGUF files; none for what they never hold.
    pub(crate) fn ggml_id(self) -> Option<u32> {
        Some(match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Iq2Xxs => 16,
            Self::Iq2Xs => 17,
            Self::Iq3Xxs => 18,
            Self::Iq1S => 19,
            Self::Iq4Nl => 20,
            Self::Iq3S => 21,
            Self::Iq2S => 22,
            Self::Iq4Xs => 23,
            Self::Iq1M => 29,
            Self::Bf16 => 30,
            Self::Tq1_0 => 34,
            Self::Tq2_0 => 35,
            Self::Mxfp4 => 39,
            Self::Gptq { .. } | Self::Awq | Self::CompressedInt { .. } | Self::Bindery { .. } => return None,
        })
    }

    /// None where ggml has the type and we do not compute it, or nobody knows it.
    pub(crate) fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|format| format.ggml_id() == Some(id))
    }

    fn ggml(self) -> Option<GgmlType> {
        self.ggml_id().map(|id| GgmlType::from_id(id).expect("every format is in the type table, as its test shows"))
    }

    /// Bits of a code whose scales and zero points are tensors of their own.
    fn grouped_bits(self) -> usize {
        match self {
            Self::Gptq { bits } | Self::CompressedInt { bits } | Self::Bindery { bits } => usize::from(bits),
            _ => 4,
        }
    }

    /// Elements that are stored together.
    pub fn block_elements(self) -> usize {
        self.ggml().map_or(GROUP, |ty| ty.block_elements as usize)
    }

    /// Bytes of such a block, without scales that are tensors of their own.
    pub fn block_bytes(self) -> usize {
        self.ggml().map_or(GROUP / 8 * self.grouped_bits(), |ty| ty.block_bytes as usize)
    }

    /// f32, f16 or bf16: no blocks, no scales.
    pub fn is_dense(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// What the weights of a block are made of; none for dense formats, and for those whose zero points decide it. With [`blocks`](super::blocks), this is all there is to say
    /// about a block format.
    pub(crate) fn quant_format(self) -> Option<QuantFormat> {
        let from_book = |book, bits, scaling| Some(QuantFormat { bits, scaling, with_mins: false, book });
        let (bits, scaling, with_mins) = match self {
            Self::F32
            | Self::F16
            | Self::Bf16
            | Self::Gptq { .. }
            | Self::Awq
            | Self::CompressedInt { .. }
            | Self::Bindery { .. } => return None,
            Self::Q4_0 => (CodeBits::Four, Scaling::Single, false),
            Self::Q4_1 => (CodeBits::Four, Scaling::Single, true),
            Self::Q5_0 => (CodeBits::Five, Scaling::Single, false),
            Self::Q5_1 => (CodeBits::Five, Scaling::Single, true),
            Self::Q8_0 => (CodeBits::Eight, Scaling::Single, false),
            Self::Q2K => (CodeBits::Two, Scaling::Nibbles, true),
            Self::Q3K => (CodeBits::Three, Scaling::TwoLevel, false),
            Self::Q4K => (CodeBits::Four, Scaling::TwoLevel, true),
            Self::Q5K => (CodeBits::Five, Scaling::TwoLevel, true),
            Self::Q6K => (CodeBits::Six, Scaling::TwoLevel, false),
            Self::Tq2_0 | Self::Tq1_0 => (CodeBits::Two, Scaling::Wide, false),
            Self::Iq4Nl => return from_book(CodeBook::Iq4, CodeBits::Four, Scaling::Single),
            Self::Iq4Xs => return from_book(CodeBook::Iq4, CodeBits::Four, Scaling::TwoLevel),
            Self::Mxfp4 => return from_book(CodeBook::Fp4, CodeBits::Four, Scaling::Exponents),
            Self::Iq3S => return from_book(CodeBook::Iq3S, CodeBits::Four, Scaling::TwoLevel),
            Self::Iq3Xxs => return from_book(CodeBook::Iq3Xxs, CodeBits::Four, Scaling::Eighths),
            Self::Iq2S | Self::Iq2Xs | Self::Iq2Xxs => {
                return from_book(CodeBook::Iq2, CodeBits::Three, Scaling::Eighths);
            }
            Self::Iq1M | Self::Iq1S => return from_book(CodeBook::Iq1, CodeBits::Three, Scaling::Eighths),
        };
        Some(QuantFormat { bits, scaling, with_mins, book: CodeBook::Linear })
    }

    /// All names, for messages.
    pub(crate) fn list(formats: &[Self]) -> String {
        formats.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.ggml(), self) {
            (Some(ty), _) => f.write_str(ty.name),
            (None, Self::Gptq { bits }) => write!(f, "GPTQ int{bits}"),
            (None, Self::Bindery { bits }) => write!(f, "Bindery int{bits}"),
            (None, Self::CompressedInt { bits }) => write!(f, "compressed-tensors int{bits}"),
            (None, _) => f.write_str("AWQ int4"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_is_in_the_type_table_under_its_own_id() {
        for &format in WeightFormat::ALL {
            let id = format.ggml_id().unwrap();
            assert_eq!(WeightFormat::from_ggml_id(id), Some(format));
            assert!(GgmlType::from_id(id).is_some());
            // A block is what shares the upper scale, and the kernels compute it.
            if let Some(quant) = format.quant_format() {
                assert_eq!(format.block_elements(), quant.scale_span());
                assert!(quant.group().is_some());
            }
        }
    }
}
