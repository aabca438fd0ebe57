//! Adapters of random numbers in the shapes of a loaded model, as peft would save them.
//!
//! It knows the names of LLaMA's modules and safetensors' layout; what an adapter costs does not depend on its numbers.

use std::{collections::BTreeMap, path::Path};

use bindery_model::ModelInfo;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

/// Modules by name, outputs and inputs.
fn modules(info: &ModelInfo, targets: &str) -> Vec<(&'static str, usize, usize)> {
    let (hidden, inner) = (info.hidden_size, info.intermediate_size);
    let (queries, keys) = (info.num_heads * info.head_dim, info.num_kv_heads * info.head_dim);
    let all = [
        ("self_attn.q_proj", queries, hidden),
        ("self_attn.v_proj", keys, hidden),
        ("self_attn.k_proj", keys, hidden),
        ("self_attn.o_proj", hidden, queries),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    ];
    match targets {
        "all" => all.to_vec(),
        "qv" => all[..2].to_vec(),
        other => panic!("--targets {other}: all or qv"),
    }
}

/// Writes one; `seed` tells it from others.
pub(crate) fn write(folder: &Path, info: &ModelInfo, targets: &str, rank: usize, seed: u64) {
    std::fs::create_dir_all(folder).expect("a temporary folder");
    let modules = modules(info, targets);
    let names: Vec<&str> = modules.iter().map(|(name, ..)| name.rsplit('.').next().unwrap_or(name)).collect();
    let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names});
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).expect("a temporary file");
    let mut state = seed.wrapping_mul(2) + 1;
    let mut bytes = |len: usize, scale: f32| -> Vec<u8> {
        (0..len)
            .flat_map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let unit = (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0;
                (unit * scale).to_le_bytes()
            })
            .collect()
    };
    let mut data: BTreeMap<String, ([usize; 2], Vec<u8>)> = BTreeMap::new();
    for layer in 0..info.num_layers {
        for &(module, outputs, inputs) in &modules {
            let name = |half| format!("base_model.model.model.layers.{layer}.{module}.{half}.weight");
            data.insert(name("lora_A"), ([rank, inputs], bytes(rank * inputs, (inputs as f32).sqrt().recip())));
            data.insert(name("lora_B"), ([outputs, rank], bytes(outputs * rank, 0.01)));
        }
    }
    let views = data.iter().map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("the shape's bytes"))
    });
    let file = folder.join("adapter_model.safetensors");
    safetensors::serialize_to_file(views, None, &file).expect("a temporary file");
}
