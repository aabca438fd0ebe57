//! Mutated and truncated files: every reader answers Ok or Err and never panics. Whatever opens can be read whole.
//! `PROPTEST_CASES` sets how many (256).

use std::path::Path;

use bindery_model::{
    config::DecoderConfig,
    weights::{LayerTensor, TensorRole, WeightStore},
};
use proptest::prelude::*;
use safetensors::Dtype;

use crate::{
    builder::{Gguf, config_json, model_folder, named_tensors, on_disk, safetensors_bytes, value},
    mutations::{mutate, mutation},
};

fn read_everything(store: &WeightStore) {
    for role in [
        TensorRole::Embedding,
        TensorRole::FinalNorm,
        TensorRole::Layer(0, LayerTensor::Q),
        TensorRole::Layer(0, LayerTensor::Down),
        TensorRole::Layer(0, LayerTensor::V),
        TensorRole::Layer(0, LayerTensor::ExpertUp(1)),
        TensorRole::Layer(0, LayerTensor::ExpertDown(0)),
    ] {
        if let Some(view) = store.tensor(role).unwrap() {
            let mut row = vec![0.0; view.cols];
            view.dequantize_row(view.rows - 1, &mut row).unwrap();
        }
    }
}

proptest! {
    #[test]
    fn mutated_gguf_files_never_panic(mutations in prop::collection::vec(mutation(), 1..6)) {
        let file = Gguf::llama();
        let head = file.bytes().len() - file.tensors.iter().map(|tensor| tensor.bytes.len()).sum::<usize>();
        let disk = on_disk("m.gguf", &mutate(file.bytes(), head, &mutations));
        if let Ok(store) = WeightStore::open(&disk.path) {
            read_everything(&store);
        }
    }

    /// Blocks of every type whose bits point into tables.
    #[test]
    fn mutated_blocks_of_code_books_never_panic(
        mutations in prop::collection::vec(mutation(), 1..6), noise in prop::collection::vec(any::<u8>(), 4096),
    ) {
        // Types with the bytes of 256 elements.
        let types = [(20, 8 * 18), (23, 136), (39, 8 * 17), (35, 66), (34, 54), (21, 110), (18, 98), (22, 82), (17, 74)];
        let mut file = Gguf::llama().key("llama.feed_forward_length", value::u32(256));
        for (id, bytes) in types.into_iter().chain([(16, 66), (29, 56), (19, 50)]) {
            let data = noise.iter().cycle().copied().take(32 * bytes).collect();
            file = file
                .f32_tensor("blk.0.ffn_gate.weight", &[32, 256])
                .f32_tensor("blk.0.ffn_up.weight", &[32, 256])
                .tensor("blk.0.ffn_down.weight", &[256, 32], id, data);
            let head = file.bytes().len() - file.tensors.iter().map(|tensor| tensor.bytes.len()).sum::<usize>();
            for bytes in [file.bytes(), mutate(file.bytes(), head, &mutations)] {
                let disk = on_disk("m.gguf", &bytes);
                if let Ok(store) = WeightStore::open(&disk.path)
                    && let Some(down) = store.tensor(TensorRole::Layer(0, LayerTensor::Down)).unwrap()
                {
                    // What is not finite is refused; the rest is read.
                    let read = down.to_f32();
                    prop_assert!(read.is_err() || read.unwrap().iter().all(|x| x.is_finite()));
                }
            }
        }
    }

    /// Fused projections and stacked experts: roles that are some rows of a tensor.
    #[test]
    fn mutated_gguf_files_of_experts_never_panic(mutations in prop::collection::vec(mutation(), 1..6)) {
        let mut file = Gguf::llama()
            .key("llama.expert_count", value::u32(3))
            .key("llama.expert_used_count", value::u32(2))
            .f32_tensor("blk.0.attn_qkv.weight", &[32, 64])
            .f32_tensor("blk.0.ffn_gate_inp.weight", &[32, 3])
            .f32_tensor("blk.0.ffn_gate_up_exps.weight", &[32, 128, 3])
            .f32_tensor("blk.0.ffn_down_exps.weight", &[64, 32, 3]);
        for name in ["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down"] {
            file = file.without_tensor(&format!("blk.0.{name}.weight"));
        }
        prop_assert!(WeightStore::open(&on_disk("m.gguf", &file.bytes()).path).is_ok());
        let head = file.bytes().len() - file.tensors.iter().map(|tensor| tensor.bytes.len()).sum::<usize>();
        let disk = on_disk("m.gguf", &mutate(file.bytes(), head, &mutations));
        if let Ok(store) = WeightStore::open(&disk.path) {
            read_everything(&store);
        }
    }

    #[test]
    fn mutated_safetensors_files_never_panic(mutations in prop::collection::vec(mutation(), 1..6)) {
        let bytes = safetensors_bytes(&named_tensors(), Dtype::F16);
        let folder = model_folder(&config_json(), &mutate(bytes, 1500, &mutations));
        if let Ok(store) = WeightStore::open(folder.path()) {
            read_everything(&store);
        }
    }

    #[test]
    fn mutated_quantised_checkpoints_never_panic(
        name in prop::sample::select(vec!["gptq4-asymmetric", "gptq3", "gptq4-act-order", "awq", "w4a16-asymmetric", "w8a8"]),
        mutations in prop::collection::vec(mutation(), 1..6),
    ) {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/quantized").join(name);
        let config = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
        let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
        let head = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let folder = model_folder(&config, &mutate(bytes, head, &mutations));
        if let Ok(store) = WeightStore::open(folder.path()) {
            read_everything(&store);
        }
    }

    /// Any key of a quantisation with any kind of value.
    #[test]
    fn strange_quantizations_never_panic(
        method in prop::sample::select(vec!["gptq", "awq", "compressed-tensors"]),
        key in prop::sample::select(vec![
            "quant_method", "bits", "w_bit", "group_size", "q_group_size", "desc_act", "checkpoint_format", "pack_dtype",
            "is_marlin_format", "version", "backend", "format", "config_groups", "sparsity_config", "quantization_status",
        ]),
        value in prop_oneof![
            Just(serde_json::json!(null)), Just(serde_json::json!([])), Just(serde_json::json!({"group_0": {"weights": 4}})),
            Just(serde_json::json!("é")), any::<i64>().prop_map(|x| serde_json::json!(x)),
            any::<f64>().prop_map(|x| serde_json::json!(x)), Just(serde_json::json!(0)), Just(serde_json::json!(true)),
        ],
    ) {
        let mut config = config_json();
        let mut quantization = serde_json::json!({
            "quant_method": method, "bits": 4, "group_size": 32, "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
        });
        quantization[key] = value;
        config["quantization_config"] = quantization;
        let folder = model_folder(&config, &safetensors_bytes(&named_tensors(), Dtype::F16));
        if let Ok(store) = WeightStore::open(folder.path()) {
            read_everything(&store);
        }
    }

    #[test]
    fn mutated_configs_never_panic(mutations in prop::collection::vec(mutation(), 1..6)) {
        let bytes = serde_json::to_vec(&config_json()).unwrap();
        let head = bytes.len();
        let disk = on_disk("config.json", &mutate(bytes, head, &mutations));
        if let Ok(config) = DecoderConfig::from_json_file(&disk.path) {
            prop_assert!(config.num_heads.is_multiple_of(config.num_kv_heads));
        }
    }

    /// Any key with any kind of value.
    #[test]
    fn strange_config_values_never_panic(
        key in 0usize..80, value in prop_oneof![
            Just(serde_json::json!(null)), Just(serde_json::json!([])), Just(serde_json::json!({})),
            Just(serde_json::json!([[1]])), Just(serde_json::json!(true)), Just(serde_json::json!("é\u{0}")),
            any::<i64>().prop_map(|x| serde_json::json!(x)), any::<u64>().prop_map(|x| serde_json::json!(x)),
            any::<f64>().prop_map(|x| serde_json::json!(x)),
        ],
    ) {
        let keys = [
            "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
            "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
            "layer_types", "no_rope_layers", "no_rope_layer_interval", "max_window_layers", "torch_dtype",
            "quantization_config", "partial_rotary_factor", "use_mrope", "num_local_experts", "num_experts",
            "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_only_layers",
            "decoder_sparse_step", "norm_topk_prob", "qkv_bias", "hidden_activation", "query_pre_attn_scalar",
            "attn_logit_softcapping", "final_logit_softcapping", "sliding_window_pattern", "rope_local_base_freq",
            "original_max_position_embeddings", "text_config", "alibi", "bias", "multi_query", "parallel_attn",
            "new_decoder_architecture", "num_kv_heads", "num_ln_in_parallel_attn", "ffn_hidden_size", "activation",
            "ff_intermediate_size", "ff_dim_multiplier", "gegelu_limit", "gegelu_pad_to_256", "blocksparse_block_size",
            "blocksparse_num_local_blocks", "blocksparse_vert_stride", "blocksparse_homo_head_pattern",
            "dense_attention_every_n_layers", "dummy_token_indices", "mup_use_scaling", "mup_attn_multiplier",
            "mup_embedding_multiplier", "mup_width_multiplier", "rope_embedding_base", "rope_position_scale",
        ];
        for family in [
            "llama", "mistral", "mixtral", "falcon", "gemma", "gemma2", "gemma3_text", "gemma3", "phi3", "qwen2", "qwen3",
            "qwen2_moe", "qwen3_moe", "smollm3", "phi3small",
        ] {
            let mut config = config_json();
            config["model_type"] = serde_json::json!(family);
            config[keys[key % keys.len()]] = value.clone();
            let disk = on_disk("config.json", &serde_json::to_vec(&config).unwrap());
            if let Ok(config) = DecoderConfig::from_json_file(&disk.path) {
                prop_assert!(config.num_layers() > 0 && config.num_layers() <= 1024);
            }
        }
    }

    /// Any rotary parameter with any number or a list.
    #[test]
    fn strange_rotary_parameters_never_panic(
        kind in prop::sample::select(vec!["default", "linear", "dynamic", "llama3", "yarn", "longrope", "su"]),
        key in prop::sample::select(vec![
            "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
            "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor",
            "long_factor", "partial_rotary_factor", "short_mscale", "long_mscale",
        ]),
        value in prop_oneof![
            Just(serde_json::json!(null)), Just(serde_json::json!([])), Just(serde_json::json!([1e300])),
            Just(serde_json::json!({})), any::<i64>().prop_map(|x| serde_json::json!(x)),
            any::<f64>().prop_map(|x| serde_json::json!(x)), Just(serde_json::json!(1)), Just(serde_json::json!(0)),
        ],
    ) {
        let mut scaling = serde_json::json!({
            "rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "short_factor": vec![1.0; 8], "long_factor": vec![2.0; 8], "original_max_position_embeddings": 16,
        });
        scaling[key] = value;
        for family in ["llama", "phi3", "phi3small", "gemma3_text", "falcon"] {
            if family == "phi3small" {
                (scaling["short_mscale"], scaling["long_mscale"]) = match key {
                    "short_mscale" => (scaling[key].clone(), serde_json::json!(1.5)),
                    "long_mscale" => (serde_json::json!(1.5), scaling[key].clone()),
                    _ => (serde_json::json!(1.0), serde_json::json!(1.5)),
                };
            }
            let mut config = config_json();
            config["model_type"] = serde_json::json!(family);
            config["rope_scaling"] = scaling.clone();
            let disk = on_disk("config.json", &serde_json::to_vec(&config).unwrap());
            if let Ok(config) = DecoderConfig::from_json_file(&disk.path) {
                prop_assert!(config.rotaries.iter().all(|rotary| rotary.dim > 0 && rotary.base > 0.0));
            }
        }
    }
}
