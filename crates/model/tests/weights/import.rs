//! Import into the packed families: exact for quantised sources, bounded for weights quantised at load.

use std::{fs::OpenOptions, sync::LazyLock};

use bindery_kernels::{CodeBits, Cpu, Isa, Matrix, Scaling};
use bindery_model::{
    Dtype, Quantize,
    weights::{LayerTensor, TensorRole, TensorView, WeightFormat, WeightStore, gguf::GgufFile},
};
use candle_core::quantized::GgmlDType;
use half::f16;
use proptest::prelude::*;
use safetensors::Dtype as StoredDtype;
use serde_json::json;

use crate::builder::{
    Gguf, OnDisk, Random, config_json, model_folder, named_tensors, on_disk, safetensors_bytes, value, write_json,
};

const DOWN: TensorRole = TensorRole::Layer(0, LayerTensor::Down);
const DOWN_NAME: &str = "model.layers.0.mlp.down_proj.weight";

/// One thread and several, each layout.
static CPUS: LazyLock<[Cpu; 2]> = LazyLock::new(|| [Cpu::new(Isa::Scalar, 1), Cpu::new(Cpu::detect(), 3)]);

fn rows_of(matrix: &Matrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    for (row, out) in values.chunks_exact_mut(matrix.cols()).enumerate() {
        matrix.row(row, out);
    }
    values
}

fn family(matrix: &Matrix) -> &'static str {
    match matrix {
        Matrix::Quantized(w) => match w.format().bits {
            CodeBits::Two => "w2",
            CodeBits::Three => "w3",
            CodeBits::Four => "w4",
            CodeBits::Five => "w5",
            CodeBits::Six => "w6",
            CodeBits::Eight => "w8",
        },
        Matrix::F32(_) => "f32",
        Matrix::F16(_) => "f16",
        Matrix::Bf16(_) => "bf16",
    }
}

/// The tiny model with an inner width of 256, its down projection `[32, 256]` of random blocks of a format. f16 fields
/// (at `halves`) get finite values.
fn with_blocks(type_id: u32, block: (usize, usize), halves: &[usize], seed: u64) -> OnDisk {
    let (elements, bytes) = block;
    let mut random = Random(seed | 1);
    let mut data: Vec<u8> = (0..32 * 256 / elements * bytes).map(|_| (random.next() >> 32) as u8).collect();
    for block in data.chunks_exact_mut(bytes) {
        for &at in halves {
            let half = f16::from_f32(random.unit() * 0.1);
            block[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
    let file = Gguf::llama()
        .key("llama.feed_forward_length", value::u32(256))
        .f32_tensor("blk.0.ffn_gate.weight", &[32, 256])
        .f32_tensor("blk.0.ffn_up.weight", &[32, 256])
        .tensor("blk.0.ffn_down.weight", &[256, 32], type_id, data);
    on_disk("m.gguf", &file.bytes())
}

/// A quantised format: where its f16 fields are, and the family it imports into.
struct Stored {
    type_id: u32,
    /// Elements and bytes.
    block: (usize, usize),
    halves: &'static [usize],
    family: &'static str,
}

const QUANTIZED: [Stored; 10] = [
    Stored { type_id: 2, block: (32, 18), halves: &[0], family: "w4" },
    Stored { type_id: 3, block: (32, 20), halves: &[0, 2], family: "w4" },
    Stored { type_id: 6, block: (32, 22), halves: &[0], family: "w5" },
    Stored { type_id: 7, block: (32, 24), halves: &[0, 2], family: "w5" },
    Stored { type_id: 8, block: (32, 34), halves: &[0], family: "w8" },
    Stored { type_id: 10, block: (256, 84), halves: &[80, 82], family: "w2" },
    Stored { type_id: 11, block: (256, 110), halves: &[108], family: "w3" },
    Stored { type_id: 12, block: (256, 144), halves: &[0, 2], family: "w4" },
    Stored { type_id: 13, block: (256, 176), halves: &[0, 2], family: "w5" },
    Stored { type_id: 14, block: (256, 210), halves: &[208], family: "w6" },
];

/// Formats that candle does not read, and how many times the file's bytes they may take: weights that share points of a
/// grid, or trits, are written out one by one. MXFP4, without an f16, is below.
const FROM_BOOKS: [(Stored, f64); 11] = [
    (Stored { type_id: 20, block: (32, 18), halves: &[0], family: "w4" }, MAX_OVERHEAD),
    (Stored { type_id: 23, block: (256, 136), halves: &[0], family: "w4" }, MAX_OVERHEAD),
    (Stored { type_id: 35, block: (256, 66), halves: &[64], family: "w2" }, MAX_OVERHEAD),
    (Stored { type_id: 34, block: (256, 54), halves: &[52], family: "w2" }, 1.23),
    (Stored { type_id: 21, block: (256, 110), halves: &[0], family: "w4" }, 1.26),
    (Stored { type_id: 18, block: (256, 98), halves: &[0], family: "w4" }, 1.42),
    (Stored { type_id: 22, block: (256, 82), halves: &[0], family: "w3" }, 1.4),
    (Stored { type_id: 17, block: (256, 74), halves: &[0], family: "w3" }, 1.55),
    (Stored { type_id: 16, block: (256, 66), halves: &[0], family: "w3" }, 1.73),
    (Stored { type_id: 19, block: (256, 50), halves: &[0], family: "w3" }, 2.29),
    // Its f16 lies in four pieces; the last holds the sign and the exponent's upper bits.
    (Stored { type_id: 29, block: (256, 56), halves: &[], family: "w3" }, 2.04),
];

/// What layout and padding may cost beside the bytes of the file.
const MAX_OVERHEAD: f64 = 1.05;

/// The down projection of `with_blocks` as candle reads its bytes.
fn dequantized_by_candle(type_id: u32, down: &TensorView<'_>, disk: &OnDisk) -> Vec<f32> {
    use candle_core::{Device, quantized::ggml_file::qtensor_from_ggml};
    let ty = CANDLE_TYPES.iter().find(|(id, _)| *id == type_id).unwrap().1;
    let file = GgufFile::open(&disk.path).unwrap();
    let range = file.tensor(down.name).unwrap().range.clone();
    let bytes = &std::fs::read(&disk.path).unwrap()[range];
    let tensor = qtensor_from_ggml(ty, bytes, vec![down.rows, down.cols], &Device::Cpu).unwrap();
    tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

const CANDLE_TYPES: [(u32, GgmlDType); 10] = [
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
];

fn import(view: &TensorView<'_>, dtype: Dtype, quantize: Quantize) -> Matrix {
    view.import(&CPUS[0], dtype, quantize).unwrap()
}

/// More under `cargo xtask test --full`.
fn num_cases(usual: u32, full: u32) -> u32 {
    if std::env::var_os("BINDERY_TEST_FULL").is_some() { full } else { usual }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(num_cases(32, 1000)))]

    /// Codes, scales and minimums as stored: packed rows equal candle's dequantised rows bit for bit, and take no more
    /// memory than the file.
    #[test]
    fn quantised_sources_keep_every_bit(seed in any::<u64>()) {
        for Stored { type_id, block, halves, family: expected_family } in QUANTIZED {
            let disk = with_blocks(type_id, block, halves, seed);
            let store = WeightStore::open(&disk.path).unwrap();
            let down = store.tensor(DOWN).unwrap().unwrap();
            let dequantized = dequantized_by_candle(type_id, &down, &disk);
            for cpu in &*CPUS {
                let matrix = down.import(cpu, Dtype::Auto, Quantize::None).unwrap();
                let ratio = matrix.size_bytes() as f64 / down.num_bytes() as f64;
                prop_assert!(ratio <= MAX_OVERHEAD, "{}: {ratio}", down.format);
                prop_assert_eq!((matrix.rows(), matrix.cols()), (32, 256));
                prop_assert_eq!(family(&matrix), expected_family);
                for (packed, stored) in rows_of(&matrix).iter().zip(&dequantized) {
                    prop_assert!(packed == stored, "{}: {packed} and {stored}", down.format);
                }
            }
        }
    }
}

/// As above. What a block means is held against the `gguf` package where it is read (`weights/blocks.rs`); here, that the
/// packed rows are the same bit for bit.
#[test]
fn code_books_keep_every_bit() {
    for (Stored { type_id, block, halves, family: expected_family }, max_ratio) in FROM_BOOKS {
        let mut disk = with_blocks(type_id, block, halves, 11);
        if type_id == 29 {
            disk = change_blocks(&disk, block, |block| block[55] &= 0x9F);
        }
        check_kept(&disk, expected_family, max_ratio);
    }
    let exponents = |block: &mut [u8]| block[0] %= Scaling::MAX_EXPONENT + 1;
    check_kept(&change_blocks(&with_blocks(39, (32, 17), &[], 11), (32, 17), exponents), "w4", MAX_OVERHEAD);
}

fn check_kept(disk: &OnDisk, expected_family: &str, max_ratio: f64) {
    let store = WeightStore::open(&disk.path).unwrap();
    let down = store.tensor(DOWN).unwrap().unwrap();
    let stored = down.to_f32().unwrap();
    for cpu in &*CPUS {
        for (dtype, quantize) in [(Dtype::Auto, Quantize::None), (Dtype::F32, Quantize::Int8)] {
            let matrix = down.import(cpu, dtype, quantize).unwrap();
            let ratio = matrix.size_bytes() as f64 / down.num_bytes() as f64;
            assert!(ratio <= max_ratio, "{}: {ratio}", down.format);
            assert_eq!(family(&matrix), expected_family, "{}", down.format);
            assert_eq!(rows_of(&matrix), stored, "{}", down.format);
        }
    }
}

/// A copy of `with_blocks` whose down projection's blocks are changed.
fn change_blocks(disk: &OnDisk, block: (usize, usize), change: impl Fn(&mut [u8])) -> OnDisk {
    let mut bytes = std::fs::read(&disk.path).unwrap();
    let range = GgufFile::open(&disk.path).unwrap().tensor("blk.0.ffn_down.weight").unwrap().range.clone();
    bytes[range].chunks_exact_mut(block.1).for_each(change);
    on_disk("m.gguf", &bytes)
}

#[test]
fn exponents_that_leave_the_range_of_floats_are_named() {
    let exponents = |block: &mut [u8]| block[0] = 120;
    let disk = change_blocks(&with_blocks(39, (32, 17), &[], 3), (32, 17), exponents);
    for byte in [253, 254, 255] {
        let mut bytes = std::fs::read(&disk.path).unwrap();
        let range = GgufFile::open(&disk.path).unwrap().tensor("blk.0.ffn_down.weight").unwrap().range.clone();
        // The first block of row 2, all of whose weights are the largest.
        bytes[range.start + 2 * 8 * 17] = byte;
        bytes[range.start + 2 * 8 * 17 + 1..][..16].fill(0x77);
        let changed = on_disk("m.gguf", &bytes);
        let store = WeightStore::open(&changed.path).unwrap();
        let down = store.tensor(DOWN).unwrap().unwrap();
        let error = down.import(&CPUS[0], Dtype::Auto, Quantize::None).err().unwrap().to_string();
        assert!(error.contains(&byte.to_string()) && error.contains("row 2"), "{error}");
        assert!(down.to_f32().err().unwrap().to_string().contains("row 2"));
    }
}

#[test]
fn dtype_and_quantise_leave_quantised_sources_as_they_are() {
    for Stored { type_id, block, halves, family: expected_family } in QUANTIZED {
        let disk = with_blocks(type_id, block, halves, 7);
        let store = WeightStore::open(&disk.path).unwrap();
        let down = store.tensor(DOWN).unwrap().unwrap();
        let stored = down.to_f32().unwrap();
        for quantize in [Quantize::Int8, Quantize::Int4] {
            let matrix = import(&down, Dtype::F32, quantize);
            assert_eq!(family(&matrix), expected_family, "{} under {quantize:?}", down.format);
            assert_eq!(rows_of(&matrix), stored, "{} under {quantize:?}", down.format);
        }
    }
}

#[test]
fn scales_that_are_not_finite_are_named() {
    let from_books = FROM_BOOKS.into_iter().map(|(stored, _)| stored);
    for Stored { type_id, block, halves, .. } in QUANTIZED.into_iter().chain(from_books) {
        for &at in halves {
            for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
                let disk = with_blocks(type_id, block, halves, 5);
                let mut bytes = std::fs::read(&disk.path).unwrap();
                // The last tensor but one is the down projection; its third row's first block is changed.
                let norm_bytes = 32 * 4;
                let row_bytes = 256 / block.0 * block.1;
                let start = bytes.len() - norm_bytes - 32 * row_bytes;
                bytes[start + 2 * row_bytes + at..][..2].copy_from_slice(&bad.to_le_bytes());
                std::fs::write(&disk.path, &bytes).unwrap();
                let store = WeightStore::open(&disk.path).unwrap();
                let down = store.tensor(DOWN).unwrap().unwrap();
                for error in
                    [down.import(&CPUS[0], Dtype::Auto, Quantize::None).err().unwrap(), down.to_f32().err().unwrap()]
                {
                    let text = error.to_string();
                    assert!(text.contains("blk.0.ffn_down.weight") && text.contains("row 2"), "{text}");
                }
            }
        }
    }
}

/// A safetensors model whose down projection has these values in its first row.
fn with_first_values(values: &[f32], dtype: StoredDtype) -> tempfile::TempDir {
    let mut tensors = named_tensors();
    let down = tensors.iter_mut().find(|tensor| tensor.0 == DOWN_NAME).unwrap();
    down.2[..values.len()].copy_from_slice(values);
    model_folder(&config_json(), &safetensors_bytes(&tensors, dtype))
}

#[test]
fn dense_sources_take_the_dtype_asked_for() {
    for (stored, own) in [(StoredDtype::F32, "f32"), (StoredDtype::F16, "f16"), (StoredDtype::BF16, "bf16")] {
        let folder = with_first_values(&[], stored);
        let store = WeightStore::open(folder.path()).unwrap();
        let down = store.tensor(DOWN).unwrap().unwrap();
        let source = down.to_f32().unwrap();
        for (dtype, expected_family) in
            [(Dtype::Auto, own), (Dtype::F32, "f32"), (Dtype::F16, "f16"), (Dtype::Bf16, "bf16")]
        {
            for cpu in &*CPUS {
                let matrix = down.import(cpu, dtype, Quantize::None).unwrap();
                assert_eq!(family(&matrix), expected_family);
                for (packed, &source) in rows_of(&matrix).into_iter().zip(&source) {
                    let rounded = match expected_family {
                        "f16" => f16::from_f32(source).to_f32(),
                        "bf16" => half::bf16::from_f32(source).to_f32(),
                        _ => source,
                    };
                    assert_eq!(packed, rounded);
                }
            }
        }
    }
}

#[test]
fn norms_and_biases_stay_f32() {
    let folder = with_first_values(&[], StoredDtype::BF16);
    let store = WeightStore::open(folder.path()).unwrap();
    let norm = store.tensor(TensorRole::FinalNorm).unwrap().unwrap();
    for quantize in [Quantize::None, Quantize::Int8, Quantize::Int4] {
        let matrix = import(&norm, Dtype::F16, quantize);
        assert_eq!((family(&matrix), matrix.rows(), matrix.cols()), ("f32", 1, 32));
        assert_eq!(rows_of(&matrix), norm.to_f32().unwrap());
    }
}

#[test]
fn values_that_a_target_cannot_hold_are_named() {
    let check = |value: f32, dtype: Dtype, quantize: Quantize, words: &[&str]| {
        let folder = with_first_values(&[value], StoredDtype::F32);
        let store = WeightStore::open(folder.path()).unwrap();
        let down = store.tensor(DOWN).unwrap().unwrap();
        let error = down.import(&CPUS[0], dtype, quantize).err().unwrap().to_string();
        assert!(words.iter().chain(&[DOWN_NAME, "row 0"]).all(|word| error.contains(word)), "{error}");
    };
    check(70_000.0, Dtype::F16, Quantize::None, &["70000", "f16"]);
    check(f32::MAX, Dtype::Bf16, Quantize::None, &["bf16"]);
    check(1e8, Dtype::Auto, Quantize::Int8, &["quantised"]);
    check(1e8, Dtype::Auto, Quantize::Int4, &["quantised"]);
    for (dtype, quantize) in [
        (Dtype::Auto, Quantize::None),
        (Dtype::F16, Quantize::None),
        (Dtype::Bf16, Quantize::None),
        (Dtype::Auto, Quantize::Int8),
        (Dtype::Auto, Quantize::Int4),
    ] {
        check(f32::NAN, dtype, quantize, &["NaN"]);
        check(f32::NEG_INFINITY, dtype, quantize, &["inf"]);
    }
}

/// A matrix of such weights is refused; a row of them beside larger ones becomes nothing, as the matrix hardly changes.
#[test]
fn weights_too_small_for_scales_are_refused_where_they_matter() {
    let tensors = named_tensors();
    let down = tensors.iter().find(|tensor| tensor.0 == DOWN_NAME).unwrap();
    let largest = down.2.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let small: Vec<f32> = down.2.iter().map(|value| value * 2e-7 / largest).collect();
    for quantize in [Quantize::Int8, Quantize::Int4] {
        let folder = with_first_values(&small, StoredDtype::F32);
        let store = WeightStore::open(folder.path()).unwrap();
        let error =
            store.tensor(DOWN).unwrap().unwrap().import(&CPUS[0], Dtype::Auto, quantize).err().unwrap().to_string();
        assert!(
            [DOWN_NAME, "too small for f16 scales", "as it is stored"].iter().all(|word| error.contains(word)),
            "{error}"
        );

        let folder = with_first_values(&small[..32], StoredDtype::F32);
        let store = WeightStore::open(folder.path()).unwrap();
        let matrix = store.tensor(DOWN).unwrap().unwrap().import(&CPUS[0], Dtype::Auto, quantize).unwrap();
        let rows = rows_of(&matrix);
        assert!(
            rows[..32].iter().all(|&value| value.abs() < 1e-6) && rows[32..].iter().any(|value| value.abs() > 1e-3)
        );
    }
}

/// int8 within half a step of the group's largest element; int4 (five bits around zero, since 256 does not divide the inputs)
/// closer on average than the plain scale would be.
#[test]
fn quantising_at_load_is_close() {
    let mut random = Random(99);
    // Products of three: tails heavy enough for the search to matter.
    let values: Vec<f32> = (0..2048).map(|_| random.unit() * random.unit() * random.unit()).collect();
    let folder = with_first_values(&values, StoredDtype::F32);
    let store = WeightStore::open(folder.path()).unwrap();
    let down = store.tensor(DOWN).unwrap().unwrap();

    let int8 = import(&down, Dtype::Auto, Quantize::Int8);
    let int4 = import(&down, Dtype::Auto, Quantize::Int4);
    assert_eq!((family(&int8), family(&int4)), ("w8", "w5"));
    let (int8, int4) = (rows_of(&int8), rows_of(&int4));
    let (mut searched, mut plain) = (0.0, 0.0);
    for (group, values) in values.chunks_exact(32).enumerate() {
        let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        // The element that is farthest from zero gets the code that is.
        let farthest = values.iter().fold(0.0f32, |far, &x| if x.abs() > far.abs() { x } else { far });
        let step = farthest / -16.0;
        for (i, &x) in values.iter().enumerate() {
            assert!((int8[group * 32 + i] - x).abs() <= 0.502 * largest / 127.0);
            searched += f64::from(int4[group * 32 + i] - x).powi(2);
            plain += f64::from((x / step).round().clamp(-16.0, 15.0) * step - x).powi(2);
        }
    }
    assert!(searched < 0.95 * plain, "{searched} {plain}");
}

#[test]
fn inputs_that_are_no_multiple_of_the_group_stay_dense() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config_json();
    config["intermediate_size"] = json!(48);
    write_json(&folder.path().join("config.json"), &config);
    let store = WeightStore::dummy(folder.path()).unwrap();
    let down = store.tensor(DOWN).unwrap().unwrap();
    for quantize in [Quantize::Int8, Quantize::Int4] {
        let matrix = import(&down, Dtype::Bf16, quantize);
        assert_eq!((family(&matrix), matrix.cols()), ("bf16", 48));
    }
    let gate = store.tensor(TensorRole::Layer(0, LayerTensor::Gate)).unwrap().unwrap();
    assert_eq!(family(&import(&gate, Dtype::Auto, Quantize::Int4)), "w5");
}

#[test]
fn made_up_weights_import_into_every_family() {
    let folder = tempfile::tempdir().unwrap();
    write_json(&folder.path().join("config.json"), &config_json());
    let store = WeightStore::dummy(folder.path()).unwrap();
    let down = store.tensor(DOWN).unwrap().unwrap();
    assert_eq!(down.format, WeightFormat::F32);
    let source = down.to_f32().unwrap();
    assert_eq!(rows_of(&import(&down, Dtype::Auto, Quantize::None)), source);
    for (dtype, quantize, expected_family, bound) in [
        (Dtype::Bf16, Quantize::None, "bf16", 0.001),
        (Dtype::Auto, Quantize::Int8, "w8", 0.001),
        // A step: codes reach one further on the side of the element that is farthest from zero.
        (Dtype::Auto, Quantize::Int4, "w5", 0.0145),
    ] {
        let matrix = import(&down, dtype, quantize);
        assert_eq!(family(&matrix), expected_family);
        for (packed, source) in rows_of(&matrix).iter().zip(&source) {
            // Values lie in ± sqrt(3 / 64), 0.22.
            assert!((packed - source).abs() < bound, "{expected_family}: {packed} {source}");
        }
    }
}

#[test]
fn a_file_that_shrinks_after_opening_is_an_error() {
    let disk = on_disk("m.gguf", &Gguf::llama().bytes());
    let store = WeightStore::open(&disk.path).unwrap();
    OpenOptions::new().write(true).open(&disk.path).unwrap().set_len(100).unwrap();
    let down = store.tensor(DOWN).unwrap().unwrap();
    for error in [
        down.import(&CPUS[0], Dtype::Auto, Quantize::None).err().unwrap().to_string(),
        down.to_f32().err().unwrap().to_string(),
    ] {
        assert!(error.contains("changed while it was read") && error.contains("100 now"), "{error}");
    }
}

#[test]
fn rows_that_are_not_there_are_errors() {
    let disk = on_disk("m.gguf", &Gguf::llama().bytes());
    let store = WeightStore::open(&disk.path).unwrap();
    let down = store.tensor(DOWN).unwrap().unwrap();
    assert!(down.dequantize_row(32, &mut [0.0; 64]).is_err());
    assert!(down.dequantize_row(0, &mut [0.0; 63]).is_err());
    assert!(down.dequantize_row(31, &mut [0.0; 64]).is_ok());
}

/// The kernel's own account of how much of a mapped file is resident.
#[cfg(target_os = "linux")]
#[test]
fn source_pages_are_released_after_import() {
    let config = json!({
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1,
        "num_attention_heads": 8, "vocab_size": 32, "tie_word_embeddings": true
    });
    let tensors: Vec<_> = named_tensors()
        .into_iter()
        .map(|(name, shape, _)| {
            let shape: Vec<usize> = match (name.as_str(), shape.len()) {
                ("model.embed_tokens.weight" | "lm_head.weight", _) => vec![32, 1024],
                (_, 1) => vec![1024],
                _ => vec![1024, 1024],
            };
            let values = vec![0.5; shape.iter().product()];
            (name, shape, values)
        })
        .collect();
    let folder = model_folder(&config, &safetensors_bytes(&tensors, StoredDtype::F32));
    let file = folder.path().join("model.safetensors");
    let store = WeightStore::open(folder.path()).unwrap();
    let down = store.tensor(DOWN).unwrap().unwrap();
    let mut row = vec![0.0; 1024];
    (0..1024).for_each(|i| down.dequantize_row(i, &mut row).unwrap());
    let before = resident_kib(file.to_str().unwrap());
    import(&down, Dtype::Auto, Quantize::Int8);
    let after = resident_kib(file.to_str().unwrap());
    assert!(before >= 4096, "the tensor's 4 MiB were read: {before} KiB");
    // Pages at the edges of other tensors may stay.
    assert!(after <= before - 4000, "{before} KiB before, {after} KiB after");
    assert_eq!(down.to_f32().unwrap(), vec![0.5; 1 << 20], "and can be read again");
}

#[cfg(target_os = "linux")]
fn resident_kib(file: &str) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.ends_with(file));
    lines.next().unwrap();
    let resident = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
    resident.trim().trim_end_matches(" kB").trim().parse().unwrap()
}
