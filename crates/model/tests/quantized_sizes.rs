//! What matrices of GPTQ, AWQ and compressed-tensors checkpoints take in memory, beside their files.
//!
//! The checkpoints are made here, all codes alike, since sizes alone are looked at; what they mean is `quantized_checkpoints`'
//! business. Invariant: every matrix of a checkpoint has one shape and one layout.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;

use bindery_kernels::{Cpu, Isa};
use bindery_model::{
    Dtype, Quantize,
    weights::{LayerTensor as T, TensorRole, WeightStore},
};
use safetensors::{Dtype as Stored, tensor::TensorView};
use serde_json::{Value, json};

/// What padding and alignment may cost, and zero points in a byte each.
const MAX_RATIO: f64 = 1.05;
/// Outputs and inputs of every matrix.
const WIDTH: usize = 640;

const PROJECTIONS: [(&str, T); 7] = [
    ("self_attn.q_proj", T::Q),
    ("self_attn.k_proj", T::K),
    ("self_attn.v_proj", T::V),
    ("self_attn.o_proj", T::O),
    ("mlp.gate_proj", T::Gate),
    ("mlp.up_proj", T::Up),
    ("mlp.down_proj", T::Down),
];

/// A tensor: the end of its name, type, shape, bytes.
type Part = (&'static str, Stored, Vec<usize>, Vec<u8>);

fn words(name: &'static str, shape: [usize; 2], word: u32) -> Part {
    (name, Stored::I32, shape.to_vec(), word.to_le_bytes().repeat(shape[0] * shape[1]))
}

fn halves(name: &'static str, shape: [usize; 2]) -> Part {
    (name, Stored::F16, shape.to_vec(), half::f16::ONE.to_le_bytes().repeat(shape[0] * shape[1]))
}

/// `zeros` is a word of zero points less one.
fn gptq(bits: usize, group: usize, zeros: u32) -> (Value, Vec<Part>) {
    let groups = WIDTH / group;
    let config = json!({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": false});
    let parts = vec![
        words("qweight", [WIDTH * bits / 32, WIDTH], 0x3210_3210),
        words("qzeros", [groups, WIDTH * bits / 32], zeros),
        halves("scales", [groups, WIDTH]),
    ];
    (config, parts)
}

fn act_order(bits: usize, group: usize, zeros: u32) -> (Value, Vec<Part>) {
    let (config, mut parts) = gptq(bits, group, zeros);
    // Every input's group is another one than its neighbours'.
    let groups = (0..WIDTH).flat_map(|input| ((input % (WIDTH / group)) as i32).to_le_bytes()).collect();
    parts.push(("g_idx", Stored::I32, vec![WIDTH], groups));
    (config, parts)
}

fn awq(group: usize) -> (Value, Vec<Part>) {
    let config = json!({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"});
    let parts = vec![
        words("qweight", [WIDTH, WIDTH / 8], 0x3210_3210),
        words("qzeros", [WIDTH / group, WIDTH / 8], 0x7654_7654),
        halves("scales", [WIDTH / group, WIDTH]),
    ];
    (config, parts)
}

fn compressed(bits: usize, group: usize) -> (Value, Vec<Part>) {
    let weights = json!({"num_bits": bits, "type": "int", "strategy": "group", "group_size": group});
    let config = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"weights": weights}},
    });
    let shape = [WIDTH as i64; 2].into_iter().flat_map(i64::to_le_bytes).collect();
    let parts = vec![
        words("weight_packed", [WIDTH, WIDTH * bits / 32], 0x3210_3210),
        halves("weight_scale", [WIDTH, WIDTH / group]),
        ("weight_shape", Stored::I64, vec![2], shape),
    ];
    (config, parts)
}

fn checkpoint(quantization: &Value, parts: &[Part]) -> tempfile::TempDir {
    let dense = |name: &str, shape: Vec<usize>| {
        let bytes = half::f16::ONE.to_le_bytes().repeat(shape.iter().product());
        (name.to_owned(), Stored::F16, shape, bytes)
    };
    let mut tensors = vec![
        dense("model.embed_tokens.weight", vec![32, WIDTH]),
        dense("model.norm.weight", vec![WIDTH]),
        dense("model.layers.0.input_layernorm.weight", vec![WIDTH]),
        dense("model.layers.0.post_attention_layernorm.weight", vec![WIDTH]),
    ];
    for (projection, _) in PROJECTIONS {
        tensors.extend(parts.iter().map(|(part, dtype, shape, bytes)| {
            (format!("model.layers.0.{projection}.{part}"), *dtype, shape.clone(), bytes.clone())
        }));
    }
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    let config = json!({
        "model_type": "llama", "vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 10, "num_key_value_heads": 10, "max_position_embeddings": 64, "tie_word_embeddings": true,
        "quantization_config": quantization,
    });
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn matrices_are_at_most_a_twentieth_larger_than_in_their_files() {
    let layouts = [
        ("int4, groups of 128", gptq(4, 128, 0x7777_7777)),
        ("int4, groups of 64, asymmetric", gptq(4, 64, 0x1234_5678)),
        ("int4, groups of 32, asymmetric", gptq(4, 32, 0x1234_5678)),
        ("int4, a row, asymmetric", gptq(4, WIDTH, 0x1234_5678)),
        ("int4, groups of 128, act-order", act_order(4, 128, 0x7777_7777)),
        ("int4, groups of 64, asymmetric, act-order", act_order(4, 64, 0x1234_5678)),
        ("int8, groups of 128", gptq(8, 128, 0x7f7f_7f7f)),
        ("int8, groups of 32, asymmetric", gptq(8, 32, 0x1234_5678)),
        ("int8, groups of 64, asymmetric, act-order", act_order(8, 64, 0x1234_5678)),
        ("int3, groups of 64", gptq(3, 64, 0)),
        ("int2, groups of 64", gptq(2, 64, 0x1111_1111)),
        ("AWQ, groups of 128", awq(128)),
        ("AWQ, groups of 32", awq(32)),
        ("w4a16, groups of 32", compressed(4, 32)),
        ("w4a16, groups of 128", compressed(4, 128)),
        ("w8a16, a row", compressed(8, WIDTH)),
    ];
    let cpus = [Cpu::new(Isa::Scalar, 1), Cpu::new(Cpu::detect(), 1)];
    for (name, (config, parts)) in layouts {
        let folder = checkpoint(&config, &parts);
        let store = WeightStore::open(folder.path()).unwrap();
        for (_, role) in PROJECTIONS {
            let view = store.tensor(TensorRole::Layer(0, role)).unwrap().unwrap();
            for cpu in &cpus {
                let matrix = view.import(cpu, Dtype::Auto, Quantize::None).unwrap();
                let ratio = matrix.size_bytes() as f64 / view.num_bytes() as f64;
                assert!(matrix.is_quantized() && ratio <= MAX_RATIO, "{name} {role:?}: {ratio}");
            }
        }
    }
}
