//! GGUF adapters: what llama.cpp's converter made of the committed ones is what they were, in whatever order it put rows.

use bindery_model::{
    AdapterFormat, AdapterTarget, LowRank, ModelError, OpenedAdapter,
    config::{DecoderConfig, RopeStyle},
    weights::{LayerTensor, TensorRole, WeightStore, gguf::GgufFile},
};

use crate::{
    builder::{Gguf, on_disk, value},
    folder::{LIMITS, adapter, base, checkpoint},
    goldens::{ADAPTERS, golden, open, read},
};

fn open_gguf(name: &str, base: &DecoderConfig) -> Result<OpenedAdapter, ModelError> {
    OpenedAdapter::open(&adapter(name).join("adapter.gguf"), base, &LIMITS)
}

#[test]
fn converted_adapters_are_what_they_were() {
    let converted: Vec<&&str> = ADAPTERS.iter().filter(|name| adapter(name).join("adapter.gguf").exists()).collect();
    assert!(converted.len() >= 7, "{converted:?}");
    for name in converted {
        let original = open(name);
        let base_name = golden(name).base;
        let twin = GgufFile::open(&checkpoint(&base_name).join("model.gguf")).unwrap();
        // A base is a base, whichever file it came from.
        for base in [base(&base_name), DecoderConfig::from_gguf(&twin).unwrap()] {
            let converted = open_gguf(name, &base).unwrap();
            assert_eq!(converted.info().format, AdapterFormat::Gguf);
            assert_eq!((converted.info().rank, converted.info().alpha), (original.info().rank, original.info().alpha));
            assert_eq!(converted.info().num_parameters, original.info().num_parameters, "{name}");
            assert!(original.targets().eq(converted.targets()), "{name}");
            for (layer, target) in original.targets() {
                let [original, converted] =
                    [&original, &converted].map(|adapter| read(adapter, layer, target, RopeStyle::Neox));
                assert!(original == converted, "{name}: layer {layer:?}, {target}");
            }
        }
    }
}

/// Rows of a base's own file, and which rows of the checkpoint they are, by what is in them.
fn order_of_the_twin(base: &str, tensor: LayerTensor) -> Vec<usize> {
    let rows = |file: &str| {
        let store = WeightStore::open(&checkpoint(base).join(file)).unwrap();
        let view = store.tensor(TensorRole::Layer(0, tensor)).unwrap().unwrap();
        view.to_f32().unwrap().chunks_exact(view.cols).map(<[f32]>::to_vec).collect::<Vec<_>>()
    };
    let (stored, original) = (rows("model.gguf"), rows(""));
    stored.iter().map(|row| original.iter().position(|original| original == row).unwrap()).collect()
}

#[test]
fn rows_in_pairs_follow_those_of_the_base() {
    for (name, target, tensor) in [
        ("llama-qv", AdapterTarget::Query, LayerTensor::Q),
        ("mistral-layers", AdapterTarget::Key, LayerTensor::K),
        ("mixtral-attention", AdapterTarget::Query, LayerTensor::Q),
    ] {
        let base_name = golden(name).base;
        let order = order_of_the_twin(&base_name, tensor);
        assert!(order.iter().enumerate().any(|(row, &original)| row != original), "the converter reorders {base_name}");
        for adapter in [open(name), open_gguf(name, &base(&base_name)).unwrap()] {
            let [LowRank { rank, b: halves, .. }, LowRank { b: pairs, .. }] =
                [RopeStyle::Neox, RopeStyle::Interleaved].map(|order| read(&adapter, Some(0), target, order));
            for (row, &original) in order.iter().enumerate() {
                assert_eq!(pairs[row * rank..][..rank], halves[original * rank..][..rank], "{name}: row {row}");
            }
        }
    }
}

/// A pair of ones for the queries of the tiny Llama (64 to 64).
fn made() -> Gguf {
    let ones = |count: usize| 1.0_f32.to_le_bytes().repeat(count);
    Gguf::new()
        .key("general.type", value::string(b"adapter"))
        .key("general.architecture", value::string(b"llama"))
        .key("adapter.type", value::string(b"lora"))
        .key("adapter.lora.alpha", value::f32(4.0))
        .tensor("blk.1.attn_q.weight.lora_a", &[64, 2], 0, ones(128))
        .tensor("blk.1.attn_q.weight.lora_b", &[2, 64], 0, ones(128))
}

fn open_made(file: &Gguf) -> Result<OpenedAdapter, ModelError> {
    OpenedAdapter::open(&on_disk("made.gguf", &file.bytes()).path, &base("tiny-llama"), &LIMITS)
}

#[test]
fn alpha_is_divided_by_the_rank_and_may_be_absent() {
    for (file, expected) in [
        (made(), 2.0),
        (made().without_key("adapter.lora.alpha"), 1.0),
        (made().without_key("adapter.lora.alpha").key("adapter.lora.alpha", value::f32(0.0)), 1.0),
    ] {
        let adapter = open_made(&file).unwrap();
        let pair = read(&adapter, Some(1), AdapterTarget::Query, RopeStyle::Neox);
        assert_eq!(pair, LowRank { rank: 2, a: vec![1.0; 128], b: vec![expected; 128] });
    }
}

#[test]
fn a_rank_of_one_is_a_matrix_all_the_same() {
    let ones = 1.0_f32.to_le_bytes().repeat(64);
    let file = made()
        .without_tensor("blk.1.attn_q.weight.lora_a")
        .without_tensor("blk.1.attn_q.weight.lora_b")
        .tensor("blk.0.attn_q.weight.lora_a", &[64], 0, ones.clone())
        .tensor("blk.0.attn_q.weight.lora_b", &[1, 64], 0, ones);
    let pair = read(&open_made(&file).unwrap(), Some(0), AdapterTarget::Query, RopeStyle::Neox);
    assert_eq!(pair, LowRank { rank: 1, a: vec![1.0; 64], b: vec![4.0; 64] });
}

#[test]
fn wrong_files_are_refused_by_name() {
    let replaced = |key: &str, text: &[u8]| made().without_key(key).key(key, value::string(text));
    let ones = |count: usize| 1.0_f32.to_le_bytes().repeat(count);
    for (file, expected) in [
        (made().without_key("general.type"), "general.type is \"absent\""),
        (replaced("general.type", b"model"), "may be a whole model"),
        (replaced("adapter.type", b"lokr"), "adapter.type is \"lokr\""),
        (replaced("general.architecture", b"qwen2"), "general.architecture is \"qwen2\", the base's is \"llama\""),
        (replaced("general.architecture", b"bert"), "general.architecture is \"bert\""),
        (replaced("adapter.lora.alpha", b"4"), "adapter.lora.alpha is String"),
        (
            made().without_key("adapter.lora.alpha").key("adapter.lora.alpha", value::f32(f32::NAN)),
            "adapter.lora.alpha is Float(NaN); a number is expected",
        ),
        (made().key("adapter.alora.invocation_tokens", value::array(4, 1, &[1, 0, 0, 0])), "activated LoRA"),
        (made().without_tensor("blk.1.attn_q.weight.lora_b"), "\"blk.1.attn_q.weight.lora_a\" has no lora_B"),
        (made().f32_tensor("blk.1.attn_norm.weight", &[64]), "\"blk.1.attn_norm.weight\" is neither lora_a nor lora_b"),
        (made().f32_tensor("token_embd.weight.lora_a", &[64, 2]), "an adapter of the embeddings"),
        (
            made()
                .f32_tensor("blk.1.ffn_up_exps.weight.lora_a", &[64, 2])
                .f32_tensor("blk.1.ffn_up_exps.weight.lora_b", &[2, 64]),
            "changes a router or experts",
        ),
        (
            made()
                .f32_tensor("blk.2.attn_q.weight.lora_a", &[64, 2])
                .f32_tensor("blk.2.attn_q.weight.lora_b", &[2, 64]),
            "is of layer 2, which the base (llama, 2 layers) does not have",
        ),
        (
            made()
                .f32_tensor("blk.0.attn_k.weight.lora_a", &[64, 2])
                .f32_tensor("blk.0.attn_k.weight.lora_b", &[2, 64]),
            "change a matrix of 64 x 64; in the base (llama, 2 layers) it is 32 x 64: this adapter was made for another model",
        ),
        (
            made()
                .tensor("blk.0.attn_v.weight.lora_a", &[64, 2], 24, vec![0; 128])
                .f32_tensor("blk.0.attn_v.weight.lora_b", &[2, 32]),
            "is stored as I8, which is not supported",
        ),
        (
            made().without_tensor("blk.1.attn_q.weight.lora_b").tensor(
                "blk.1.attn_q.weight.lora_b",
                &[3, 64],
                0,
                ones(192),
            ),
            "do not fit each other",
        ),
    ] {
        let error = open_made(&file).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        assert!(error.contains("made.gguf"), "{error}");
    }
}
