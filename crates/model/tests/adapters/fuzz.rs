//! Mutated and truncated adapters: Ok or Err and never a panic; whatever opens can be read whole, and is finite.
//! `PROPTEST_CASES` sets how many (256).

use bindery_model::{OpenedAdapter, config::RopeStyle};
use proptest::prelude::*;
use serde_json::json;

use crate::{
    builder::on_disk,
    folder::{Draft, LIMITS, adapter, base, written},
    mutations::{mutate, mutation},
};

fn read_everything(adapter: &OpenedAdapter) {
    for (layer, target) in adapter.targets() {
        for order in [RopeStyle::Neox, RopeStyle::Interleaved] {
            if let Ok(pair) = adapter.read(layer, target, order) {
                let pair = pair.unwrap();
                assert!(pair.a.iter().chain(&pair.b).all(|value| value.is_finite()));
            }
        }
    }
}

proptest! {
    #[test]
    fn mutated_weights_never_panic(mutations in prop::collection::vec(mutation(), 1..6)) {
        let copy = Draft::of("phi3-fused");
        let (config, weights) = (serde_json::to_vec(&copy.config).unwrap(), copy.weights());
        let head = 8 + u64::from_le_bytes(*weights.first_chunk().unwrap()) as usize;
        let folder = written(&config, &mutate(weights, head, &mutations));
        if let Ok(opened) = OpenedAdapter::open(folder.path(), &base("tiny-phi3"), &LIMITS) {
            read_everything(&opened);
        }
    }

    #[test]
    fn mutated_configs_never_panic(mutations in prop::collection::vec(mutation(), 1..4)) {
        let copy = Draft::of("llama-patterns");
        let config = serde_json::to_vec(&copy.config).unwrap();
        let head = config.len();
        let folder = written(&mutate(config, head, &mutations), &copy.weights());
        if let Ok(opened) = OpenedAdapter::open(folder.path(), &base("tiny-llama"), &LIMITS) {
            read_everything(&opened);
        }
    }

    #[test]
    fn mutated_gguf_adapters_never_panic(mutations in prop::collection::vec(mutation(), 1..6)) {
        let bytes = std::fs::read(adapter("falcon-40b").join("adapter.gguf")).unwrap();
        let head = bytes.len() / 4;
        let disk = on_disk("m.gguf", &mutate(bytes, head, &mutations));
        if let Ok(opened) = OpenedAdapter::open(&disk.path, &base("tiny-falcon-40b"), &LIMITS) {
            read_everything(&opened);
        }
    }

    /// Any key with any kind of value.
    #[test]
    fn strange_values_never_panic(
        key in prop::sample::select(vec![
            "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
            "layers_to_transform", "layers_pattern", "bias", "init_lora_weights", "base_model_name_or_path", "modules_to_save",
        ]),
        value in prop_oneof![
            Just(json!(null)), Just(json!([])), Just(json!({})), Just(json!([[1]])), Just(json!(true)), Just(json!("é\u{0}")),
            Just(json!({"": 1})), Just(json!({"q_proj": -1.5})), Just(json!({"[": 1})), Just(json!([""])), Just(json!(".*")),
            any::<i64>().prop_map(|x| json!(x)), any::<u64>().prop_map(|x| json!(x)), any::<f64>().prop_map(|x| json!(x)),
            "[a-z_.*+()\\[\\]|^$?]{0,12}".prop_map(|x| json!(x)),
            "[a-z_.*+()\\[\\]|^$?]{0,12}".prop_map(|x| json!({x: 8})),
        ],
    ) {
        if let Ok(opened) = Draft::of("llama-qv").set(key, value).open_on(&base("tiny-llama")) {
            read_everything(&opened);
        }
    }
}
