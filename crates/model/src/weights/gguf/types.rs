//! The tensor types of ggml: id, name and block size of every one in use, so that sizes can be checked even where the
//! arithmetic is not implemented.
//!
//! Source: `ggml.h` (ids) and `ggml-common.h` (block structures); checked in the tests against the Python `gguf` package's
//! table. Ids that ggml has given up (4, 5, 31 to 33, 36 to 38) are unknown here.

/// How one type stores its elements: blocks of `block_elements` consecutive elements in `block_bytes` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlType {
    /// As written in the file.
    pub id: u32,
    /// As people know it: "Q4_K".
    pub name: &'static str,
    /// Elements of a block; the first dimension is a multiple of it.
    pub block_elements: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
}

impl GgmlType {
    /// None for an id that this table does not hold.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().copied().find(|ty| ty.id == id)
    }
}

/// Every type in use.
pub const TYPES: &[GgmlType] = &[
    ty(0, "F32", 1, 4),
    ty(1, "F16", 1, 2),
    ty(2, "Q4_0", 32, 18),
    ty(3, "Q4_1", 32, 20),
    ty(6, "Q5_0", 32, 22),
    ty(7, "Q5_1", 32, 24),
    ty(8, "Q8_0", 32, 34),
    ty(9, "Q8_1", 32, 36),
    ty(10, "Q2_K", 256, 84),
    ty(11, "Q3_K", 256, 110),
    ty(12, "Q4_K", 256, 144),
    ty(13, "Q5_K", 256, 176),
    ty(14, "Q6_K", 256, 210),
    ty(15, "Q8_K", 256, 292),
    ty(16, "IQ2_XXS", 256, 66),
    ty(17, "IQ2_XS", 256, 74),
    ty(18, "IQ3_XXS", 256, 98),
    ty(19, "IQ1_S", 256, 50),
    ty(20, "IQ4_NL", 32, 18),
    ty(21, "IQ3_S", 256, 110),
    ty(22, "IQ2_S", 256, 82),
    ty(23, "IQ4_XS", 256, 136),
    ty(24, "I8", 1, 1),
    ty(25, "I16", 1, 2),
    ty(26, "I32", 1, 4),
    ty(27, "I64", 1, 8),
    ty(28, "F64", 1, 8),
    ty(29, "IQ1_M", 256, 56),
    ty(30, "BF16", 1, 2),
    ty(34, "TQ1_0", 256, 54),
    ty(35, "TQ2_0", 256, 66),
    ty(39, "MXFP4", 32, 17),
    ty(40, "NVFP4", 64, 36),
    ty(41, "Q1_0", 128, 18),
    ty(42, "Q2_0", 64, 18),
];

const fn ty(id: u32, name: &'static str, block_elements: u64, block_bytes: u64) -> GgmlType {
    GgmlType { id, name, block_elements, block_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_are_unique() {
        for (i, a) in TYPES.iter().enumerate() {
            for b in &TYPES[i + 1..] {
                assert!(a.id != b.id && a.name != b.name, "{a:?} and {b:?}");
            }
        }
    }

    #[test]
    fn sizes_agree_with_candle_where_it_knows_the_type() {
        use candle_core::quantized::GgmlDType as D;
        let known = [
            (D::F32, 0),
            (D::F16, 1),
            (D::Q4_0, 2),
            (D::Q4_1, 3),
            (D::Q5_0, 6),
            (D::Q5_1, 7),
            (D::Q8_0, 8),
            (D::Q8_1, 9),
            (D::Q2K, 10),
            (D::Q3K, 11),
            (D::Q4K, 12),
            (D::Q5K, 13),
            (D::Q6K, 14),
            (D::Q8K, 15),
            (D::BF16, 30),
        ];
        for (dtype, id) in known {
            let ours = GgmlType::from_id(id).unwrap();
            assert_eq!(
                (dtype.block_size() as u64, dtype.type_size() as u64),
                (ours.block_elements, ours.block_bytes),
                "{}",
                ours.name
            );
        }
    }
}
