//! GGUF: a file by an independent writer, read by us and by candle; hand-made files with one thing wrong each.

use std::{fs::File, path::PathBuf};

use bindery_model::{
    ModelError,
    weights::{
        LayerTensor, TensorRole, WeightFormat, WeightStore,
        gguf::{GgmlType, GgufFile, MetadataValue},
    },
};
use candle_core::{Device, quantized::gguf_file::Content};

use crate::builder::{Gguf, on_disk, value};

fn tiny() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/weights/tiny.gguf")
}

#[test]
fn every_tensor_of_an_independent_writer_is_read_as_candle_reads_it() {
    let store = WeightStore::open(&tiny()).unwrap();
    let mut file = File::open(tiny()).unwrap();
    let theirs = Content::read(&mut file).unwrap();
    let mut seen = 0;
    for role in roles(2) {
        let Some(ours) = store.tensor(role).unwrap() else { continue };
        let tensor = theirs.tensor(&mut file, ours.name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        assert_eq!(tensor.elem_count(), ours.rows * ours.cols, "{}", ours.name);
        let tensor = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(ours.to_f32().unwrap(), tensor, "{}", ours.name);
        let mut row = vec![0.0; ours.cols];
        ours.dequantize_row(ours.rows - 1, &mut row).unwrap();
        assert_eq!(row, tensor[tensor.len() - ours.cols..]);
        seen += 1;
    }
    // All but rope_freqs and the tensor that no role uses.
    assert_eq!(seen, theirs.tensor_infos.len() - 2);
    assert_eq!(
        store.describe_formats(),
        "F32 (5), F16 (3), Q4_1 (3), Q4_0 (2), Q5_0 (2), Q5_1 (2), Q8_0 (2), BF16 (1)"
    );
}

fn roles(num_layers: usize) -> Vec<TensorRole> {
    use LayerTensor as L;
    let in_layer = [
        L::AttentionNorm,
        L::Q,
        L::K,
        L::V,
        L::O,
        L::QBias,
        L::KBias,
        L::VBias,
        L::OBias,
        L::MlpNorm,
        L::Gate,
        L::Up,
        L::Down,
    ];
    let layers = (0..num_layers).flat_map(|layer| in_layer.map(|tensor| TensorRole::Layer(layer, tensor)));
    [TensorRole::Embedding, TensorRole::FinalNorm, TensorRole::Head].into_iter().chain(layers).collect()
}

#[test]
fn counts_are_those_of_the_tensors_in_use() {
    let store = WeightStore::open(&tiny()).unwrap();
    let per_layer = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 32 + 2 * 32;
    assert_eq!(store.num_parameters(), 24 * 32 + 2 * per_layer + 32);
    let q4_0 = store.tensor(TensorRole::Layer(0, LayerTensor::Q)).unwrap().unwrap();
    assert_eq!((q4_0.format, q4_0.num_bytes()), (WeightFormat::Q4_0, 32 * 18));
    let all: u64 =
        roles(2).into_iter().filter_map(|role| store.tensor(role).unwrap()).map(|view| view.num_bytes()).sum();
    assert_eq!(store.num_bytes(), all);
    assert!(store.tensor(TensorRole::Head).unwrap().is_none(), "tied");
    assert!(store.tensor(TensorRole::Layer(2, LayerTensor::Q)).is_err(), "two layers");
}

#[test]
fn metadata_of_every_kind_is_read() {
    let file = GgufFile::open(&tiny()).unwrap();
    assert_eq!(file.str("general.architecture"), Some("llama"));
    assert_eq!(file.u64("test.u8"), Some(255));
    assert_eq!(file.get("test.i8"), Some(&MetadataValue::Signed(-128)));
    assert_eq!(file.u64("test.i8"), None, "negative");
    assert_eq!(file.u64("test.u16"), Some(65535));
    assert_eq!(file.get("test.i16"), Some(&MetadataValue::Signed(-32768)));
    assert_eq!(file.get("test.i32"), Some(&MetadataValue::Signed(-5)));
    assert_eq!(file.u64("test.u64"), Some(u64::MAX));
    assert_eq!(file.get("test.i64"), Some(&MetadataValue::Signed(i64::MIN)));
    assert_eq!(file.f64("test.f64"), Some(0.1));
    assert_eq!(file.f32("llama.attention.layer_norm_rms_epsilon"), Some(1e-5));
    assert_eq!(file.bool("test.bool"), Some(true));
    assert_eq!(
        file.get("test.bools"),
        Some(&MetadataValue::Array(vec![MetadataValue::Bool(true), MetadataValue::Bool(false)]))
    );
    let tokens = file.strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!((tokens.len(), tokens[23].as_str()), (24, "token 23 é"));
    assert_eq!(file.ints("tokenizer.ggml.token_type").unwrap()[..3], [3, 3, 1]);
    assert_eq!(file.floats("tokenizer.ggml.scores").unwrap()[3], 0.75);
    assert!(file.keys().contains(&"test.bools") && !file.keys().contains(&"absent"));
    assert_eq!(file.get("absent"), None);
    assert_eq!(file.str("test.u8"), None, "another kind");
    assert_eq!(file.path(), &tiny());
}

#[test]
fn versions_two_and_three_and_other_alignments_are_read() {
    for (version, alignment) in [(2, 32), (3, 32), (3, 64), (3, 8), (3, 1)] {
        let mut file = Gguf::llama().key("general.alignment", value::u32(alignment as u32));
        file.version = version;
        file.alignment = alignment;
        let disk = on_disk("m.gguf", &file.bytes());
        let store = WeightStore::open(&disk.path).unwrap();
        let norm = store.tensor(TensorRole::FinalNorm).unwrap().unwrap().to_f32().unwrap();
        assert_eq!(norm[..3], [-0.25, -0.125, 0.0], "version {version}, alignment {alignment}");
    }
}

#[test]
fn arrays_nest_and_large_integers_survive() {
    let inner = [&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat();
    let file = Gguf::new()
        .key("nested", value::array(9, 2, &[inner.clone(), inner].concat()))
        .key("large", value::array(10, 1, &u64::MAX.to_le_bytes()))
        .key("empty", value::array(8, 0, &[]))
        .key("bytes", value::array(0, 3, &[1, 2, 255]));
    let disk = on_disk("m.gguf", &file.bytes());
    let file = GgufFile::open(&disk.path).unwrap();
    let seven = MetadataValue::Ints(vec![7]);
    assert_eq!(file.get("nested"), Some(&MetadataValue::Array(vec![seven.clone(), seven])));
    assert_eq!(file.get("large"), Some(&MetadataValue::Array(vec![MetadataValue::Unsigned(u64::MAX)])));
    assert_eq!(file.strings("empty"), Some(&[][..]));
    assert_eq!(file.ints("bytes"), Some(&[1, 2, 255][..]));
}

/// An unused tensor of an unknown type does no harm; a needed one is named with its type.
#[test]
fn unknown_types_matter_only_when_needed() {
    let unused = Gguf::llama().tensor("extra.weight", &[32], 999, vec![0; 8]);
    let disk = on_disk("m.gguf", &unused.bytes());
    WeightStore::open(&disk.path).unwrap();
    assert_eq!(GgufFile::open(&disk.path).unwrap().tensor("extra.weight").unwrap().type_id, 999);

    let unknown = Gguf::llama().tensor("blk.0.attn_q.weight", &[32, 32], 999, vec![0; 8]);
    fails(&unknown, &["blk.0.attn_q.weight", "type id 999", "Q4_0"]);
    for (id, name, bytes) in [(40, "NVFP4", 64 * 36), (41, "Q1_0", 32 * 18), (42, "Q2_0", 64 * 18)] {
        let file = Gguf::llama()
            .key("llama.feed_forward_length", value::u32(128))
            .f32_tensor("blk.0.ffn_gate.weight", &[32, 128])
            .f32_tensor("blk.0.ffn_up.weight", &[32, 128])
            .tensor("blk.0.ffn_down.weight", &[128, 32], id, vec![0; bytes]);
        let error = WeightStore::open(&on_disk("m.gguf", &file.bytes()).path).unwrap_err();
        assert!(matches!(&error, ModelError::Unsupported(text) if text.contains(name)), "{name}: {error}");
    }
}

/// The store refuses the file, and the error holds every one of `words`.
fn fails(file: &Gguf, words: &[&str]) {
    bytes_fail(&file.bytes(), words);
}

fn bytes_fail(bytes: &[u8], words: &[&str]) {
    let disk = on_disk("m.gguf", bytes);
    let error = WeightStore::open(&disk.path).expect_err(&format!("{words:?}")).to_string();
    for word in words.iter().chain(&["m.gguf"]) {
        assert!(error.contains(word), "{error:?} lacks {word:?}");
    }
}

#[test]
fn other_containers_and_versions_are_refused_by_name() {
    bytes_fail(b"", &["empty"]);
    bytes_fail(b"GG", &["only 2 are left"]);
    bytes_fail(b"PK\x03\x04 a zip", &["not a GGUF file", "PK"]);
    let version = |version: u32| Gguf { version, ..Gguf::llama() };
    fails(&version(1), &["version 1"]);
    fails(&version(4), &["version 4"]);
    fails(&version(3u32.swap_bytes()), &["big-endian"]);
    fails(&Gguf::llama().key("split.count", value::u32(3)), &["one of 3 parts", "--merge"]);
}

#[test]
fn impossible_counts_are_refused_before_anything_is_allocated() {
    for count in [u64::MAX, 1 << 40, 1 << 20] {
        fails(&Gguf { num_tensors: Some(count), ..Gguf::llama() }, &["tensors are announced"]);
        fails(&Gguf { num_keys: Some(count), ..Gguf::llama() }, &["metadata keys are announced"]);
        for kind in [0, 4, 6, 7, 8, 9, 10, 12] {
            let key = value::array(kind, count, &[0; 16]);
            fails(&Gguf::llama().key("evil", key), &["\"evil\"", "elements are announced"]);
        }
        let text = [&8u32.to_le_bytes()[..], &count.to_le_bytes()].concat();
        fails(&Gguf::llama().key("evil", text), &["\"evil\"", "announced"]);
    }
    // One more than there are runs into what follows.
    let tensors = Gguf::llama().tensors.len() as u64;
    let mut more = Gguf { num_tensors: Some(tensors + 1), ..Gguf::llama() };
    more.tensors.truncate(tensors as usize);
    assert!(WeightStore::open(&on_disk("m.gguf", &more.bytes()).path).is_err());
}

#[test]
fn damaged_metadata_names_the_key() {
    fails(&Gguf::llama().key("odd", [99u32.to_le_bytes()].concat()), &["\"odd\"", "value type 99"]);
    fails(&Gguf::llama().key("odd", value::array(99, 0, &[])), &["\"odd\"", "element type 99"]);
    fails(&Gguf::llama().key("odd", value::string(b"\xff\xfe")), &["\"odd\"", "UTF-8"]);
    fails(&Gguf::llama().key("odd", [&7u32.to_le_bytes()[..], &[2]].concat()), &["\"odd\"", "truth value"]);
    let mut twice = Gguf::llama();
    twice.keys.push(("llama.block_count".to_owned(), value::u32(1)));
    fails(&twice, &["llama.block_count", "twice"]);
    let mut deep = value::array(4, 0, &[]);
    for _ in 0..200 {
        deep = [&9u32.to_le_bytes()[..], &9u32.to_le_bytes(), &1u64.to_le_bytes(), &deep[4..]].concat();
    }
    fails(&Gguf::llama().key("deep", deep), &["\"deep\"", "nested"]);
}

#[test]
fn bad_alignment_is_refused() {
    for alignment in [0, 3, 24, 1 << 30] {
        fails(&Gguf::llama().key("general.alignment", value::u32(alignment)), &["general.alignment", "power of two"]);
    }
    fails(&Gguf::llama().key("general.alignment", value::string(b"32")), &["general.alignment"]);
}

#[test]
fn tensors_that_cannot_be_are_named() {
    let with = |change: fn(&mut crate::builder::Tensor)| {
        let mut file = Gguf::llama();
        let q = file.tensors.iter_mut().find(|tensor| tensor.name == "blk.0.attn_q.weight").unwrap();
        change(q);
        file
    };
    let q = "blk.0.attn_q.weight";
    fails(&with(|t| t.dims = vec![32, 32, 1, 1, 1]), &[q, "5 dimensions"]);
    fails(&with(|t| t.dims = vec![1 << 33, 1 << 33]), &[q, "overflow"]);
    fails(&with(|t| t.dims = vec![1 << 62, 1]), &[q, "overflow"]);
    fails(&with(|t| t.dims = vec![32, 1 << 40]), &[q, "cut short"]);
    fails(&with(|t| t.offset = Some(1 << 50)), &[q, "cut short"]);
    fails(&with(|t| t.offset = Some(u64::MAX - 31)), &[q, "overflows"]);
    fails(&with(|t| t.offset = Some(8)), &[q, "multiple of the alignment"]);
    fails(&with(|t| t.offset = Some(0)), &[q, "overlap"]);
    fails(&with(|t| (t.dims, t.type_id) = (vec![48, 32], 2)), &[q, "multiple of 32", "Q4_0"]);
    fails(&with(|t| t.dims = vec![32, 16]), &[q, "[16, 32]", "[32, 32]"]);
    fails(&with(|t| t.dims = vec![1024]), &[q, "[1024]", "[32, 32]"]);
    fails(&with(|t| t.dims = vec![0, 32]), &[q, "[32, 0]"]);
    fails(&with(|t| t.name = "blk.0.attn_norm.weight".to_owned()), &["blk.0.attn_norm.weight", "twice"]);
    fails(&Gguf::llama().without_tensor(q), &[q, "missing"]);
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let whole = Gguf::llama().bytes();
    for len in (0..1_000).step_by(7).chain((1_000..whole.len()).step_by(1_999)).chain([whole.len() - 1]) {
        let disk = on_disk("m.gguf", &whole[..len]);
        assert!(WeightStore::open(&disk.path).is_err(), "cut to {len} of {}", whole.len());
    }
}

/// Tensors inside a layer that the decoder would leave out would make answers wrong in silence.
#[test]
fn foreign_tensors_in_a_layer_are_refused() {
    fails(&Gguf::llama().f32_tensor("blk.0.attn_q_norm.weight", &[16]), &["blk.0.attn_q_norm.weight", "llama"]);
    // Layers beyond the count (kept for speculation by some models) and tensors outside of layers are left alone.
    let harmless = Gguf::llama().f32_tensor("blk.1.nextn.weight", &[16]).f32_tensor("other.weight", &[4]);
    WeightStore::open(&on_disk("m.gguf", &harmless.bytes()).path).unwrap();
}

#[test]
fn what_is_no_file_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(WeightStore::open(&folder.path().join("absent.gguf")), Err(ModelError::Io { .. })));
    let error = WeightStore::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
    assert!(GgufFile::open(folder.path()).is_err());
}

/// Sizes and names as the Python `gguf` package (0.19.0) has them: id, name, elements and bytes of a block. Q8_1 is left
/// out: the package counts its two scales as f32, ggml's header as f16, and it never stands in files.
#[test]
fn the_type_table_agrees_with_the_python_package() {
    let table = "0 F32 1 4,1 F16 1 2,2 Q4_0 32 18,3 Q4_1 32 20,6 Q5_0 32 22,7 Q5_1 32 24,8 Q8_0 32 34,10 Q2_K 256 84,\
                 11 Q3_K 256 110,12 Q4_K 256 144,13 Q5_K 256 176,14 Q6_K 256 210,15 Q8_K 256 292,16 IQ2_XXS 256 66,\
                 17 IQ2_XS 256 74,18 IQ3_XXS 256 98,19 IQ1_S 256 50,20 IQ4_NL 32 18,21 IQ3_S 256 110,22 IQ2_S 256 82,\
                 23 IQ4_XS 256 136,24 I8 1 1,25 I16 1 2,26 I32 1 4,27 I64 1 8,28 F64 1 8,29 IQ1_M 256 56,30 BF16 1 2,\
                 34 TQ1_0 256 54,35 TQ2_0 256 66,39 MXFP4 32 17,40 NVFP4 64 36,41 Q1_0 128 18";
    for row in table.split(',') {
        let fields: Vec<&str> = row.split(' ').collect();
        let number = |i: usize| fields[i].parse::<u64>().unwrap();
        let ours = GgmlType::from_id(number(0) as u32).unwrap();
        assert_eq!((ours.name, ours.block_elements, ours.block_bytes), (fields[1], number(2), number(3)));
    }
    // And Q2_0, which is younger.
    assert_eq!(table.split(',').count() + 2, bindery_model::weights::gguf::TYPES.len());
}

/// Values small in the file and large in memory: 64 MiB of empty texts would be 192 MiB, of truth values 2 GiB.
#[test]
fn arrays_that_swell_in_memory_are_bounded() {
    let bools = value::array(7, 64 << 20, &vec![1; 64 << 20]);
    fails(&Gguf::llama().key("bools", bools), &["\"bools\"", "limit for metadata"]);
}
