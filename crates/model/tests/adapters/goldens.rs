//! What is read, held against peft: each matrix of a base into which peft has merged the adapter, times a fixed vector, is the
//! base's own product and the pair's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use bindery_model::{
    AdapterTarget, LowRank, OpenedAdapter,
    config::{DecoderConfig, RopeStyle},
    weights::{LayerTensor, TensorRole, WeightStore},
};

use crate::folder::{LIMITS, adapter, base, checkpoint, tests_folder};

/// Every folder of tests/adapters.
pub(crate) const ADAPTERS: &[&str] = &[
    "falcon-40b",
    "falcon-7b",
    "falcon-rw",
    "gemma3-all",
    "llama-all-rslora",
    "llama-bias",
    "llama-patterns",
    "llama-qv",
    "llama-scattered",
    "mistral-layers",
    "mixtral-attention",
    "phi3-fused",
    "phi4-mini-fused",
    "qwen3-moe-attention",
    "qwen3-tied-head",
];

/// peft adds in f32, and the goldens have six digits; products are of the order of 1 to 100.
const TOLERANCE: f64 = 1e-4;

/// The part of a golden that is of interest here.
#[derive(serde::Deserialize)]
pub(crate) struct Golden {
    pub(crate) base: String,
    /// "0.query": every output.
    merged: BTreeMap<String, Vec<f64>>,
}

pub(crate) fn golden(name: &str) -> Golden {
    serde_json::from_slice(&fs::read(adapter(name).join("golden.json")).unwrap()).unwrap()
}

pub(crate) fn open(name: &str) -> OpenedAdapter {
    OpenedAdapter::open(&adapter(name), &base(&golden(name).base), &LIMITS).unwrap()
}

/// As in adapters.py.
fn probe(inputs: usize) -> Vec<f64> {
    (0..inputs).map(|i| ((i * 37 + 11) % 101) as f64 / 50.0 - 1.0).collect()
}

fn product(matrix: &[f32], x: &[f64]) -> Vec<f64> {
    let row = |row: &[f32]| row.iter().zip(x).map(|(&weight, x)| f64::from(weight) * x).sum();
    matrix.chunks_exact(x.len()).map(row).collect()
}

fn role(layer: Option<usize>, target: AdapterTarget, config: &DecoderConfig) -> TensorRole {
    let tensor = match target {
        AdapterTarget::Head if config.tied_embeddings => return TensorRole::Embedding,
        AdapterTarget::Head => return TensorRole::Head,
        AdapterTarget::Query => LayerTensor::Q,
        AdapterTarget::Key => LayerTensor::K,
        AdapterTarget::Value => LayerTensor::V,
        AdapterTarget::Output => LayerTensor::O,
        AdapterTarget::Gate => LayerTensor::Gate,
        AdapterTarget::Up => LayerTensor::Up,
        AdapterTarget::Down => LayerTensor::Down,
    };
    TensorRole::Layer(layer.unwrap(), tensor)
}

pub(crate) fn read(adapter: &OpenedAdapter, layer: Option<usize>, target: AdapterTarget, order: RopeStyle) -> LowRank {
    adapter.read(layer, target, order).unwrap().unwrap()
}

/// The targets as the goldens name them.
fn names(adapter: &OpenedAdapter) -> Vec<String> {
    let name = |(layer, target): (Option<usize>, AdapterTarget)| match layer {
        Some(layer) => format!("{layer}.{target}"),
        None => target.to_string(),
    };
    adapter.targets().map(name).collect()
}

#[test]
fn every_adapter_is_listed() {
    let folders = fs::read_dir(tests_folder().join("adapters")).unwrap();
    let folders: BTreeSet<String> = folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(folders.iter().map(String::as_str).collect::<Vec<_>>(), ADAPTERS);
}

#[test]
fn what_is_read_adds_up_to_what_peft_merges() {
    for name in ADAPTERS {
        let (adapter, golden) = (open(name), golden(name));
        let store = WeightStore::open(&checkpoint(&golden.base)).unwrap();
        let expected: BTreeSet<&String> = golden.merged.keys().collect();
        assert_eq!(names(&adapter).iter().collect::<BTreeSet<_>>(), expected, "{name}");
        for ((layer, target), key) in adapter.targets().zip(names(&adapter)) {
            let weight = store.tensor(role(layer, target, store.config())).unwrap().unwrap();
            let LowRank { rank, a, b } = read(&adapter, layer, target, RopeStyle::Neox);
            assert_eq!((a.len(), b.len()), (rank * weight.cols, weight.rows * rank), "{name}: {key}");
            let x = probe(weight.cols);
            let base = product(&weight.to_f32().unwrap(), &x);
            let delta = product(&b, &product(&a, &x));
            let merged = &golden.merged[&key];
            assert_eq!(merged.len(), base.len(), "{name}: {key}");
            let largest = delta.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
            assert!(largest > 100.0 * TOLERANCE, "{name}: {key} is hardly felt: {largest}");
            for (row, (expected, (base, delta))) in merged.iter().zip(base.iter().zip(&delta)).enumerate() {
                let off = (expected - base - delta).abs();
                assert!(off < TOLERANCE * largest.max(1.0), "{name}: {key}, row {row} is off by {off:.2e}");
            }
        }
    }
}

#[test]
fn an_opened_adapter_may_go_to_another_thread() {
    let adapter = open("llama-qv");
    let here: Vec<_> = adapter.targets().collect();
    let there = std::thread::spawn(move || adapter.targets().collect::<Vec<_>>()).join().unwrap();
    assert_eq!(here, there);
}

#[test]
fn targets_ascend_and_what_is_not_there_is_none() {
    let adapter = open("llama-scattered");
    assert_eq!(names(&adapter), ["0.query", "0.key", "1.up", "1.down", "head"]);
    for (layer, target) in [
        (Some(0), AdapterTarget::Value),
        (Some(1), AdapterTarget::Query),
        (Some(0), AdapterTarget::Head),
        (None, AdapterTarget::Query),
        (Some(usize::MAX), AdapterTarget::Query),
        (Some(7), AdapterTarget::Query),
    ] {
        assert_eq!(adapter.read(layer, target, RopeStyle::Neox).unwrap(), None, "{layer:?} {target}");
    }
}

#[test]
fn the_info_says_what_the_files_hold() {
    let adapter = open("llama-patterns");
    let info = adapter.info();
    // rank_pattern has 2 for keys, 3 for layer 0's gate and down, 8 for layer 1's down; all else has 4.
    assert_eq!((info.rank, info.alpha), (8, 6.0));
    assert_eq!(info.targets, "query, key, value, output, gate, down");
    assert_eq!(info.base_model_name_or_path.as_deref(), Some("somewhere/tiny-llama"));
    let config = base("tiny-llama");
    let (hidden, inner) = (config.hidden_size, config.mlp.intermediate_size);
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let of_attention = 4 * (hidden + q) + 2 * (hidden + kv) + 4 * (hidden + kv) + 4 * (q + hidden);
    let elements = 2 * of_attention + (3 + 3 + 4 + 8) * (hidden + inner);
    assert_eq!(info.num_parameters, elements as u64);
    assert_eq!((info.num_bytes, info.num_bytes_in_f32), (4 * elements as u64, 4 * elements as u64));
    // Half as wide in the file, and A is handed out for each matrix that has it.
    let half = open("mistral-layers");
    assert_eq!(half.info().num_bytes, 2 * half.info().num_parameters);
    assert_eq!(half.info().num_bytes_in_f32, 4 * half.info().num_parameters);
    let fused = open("phi3-fused");
    assert!(fused.info().num_bytes_in_f32 > fused.info().num_bytes);
    assert_eq!(fused.info().targets, "query, key, value, output, gate, up, down");
    let handed_out: usize = fused
        .targets()
        .map(|(layer, target)| read(&fused, layer, target, RopeStyle::Neox))
        .map(|pair| 4 * (pair.a.len() + pair.b.len()))
        .sum();
    assert_eq!(fused.info().num_bytes_in_f32, handed_out as u64);
}
