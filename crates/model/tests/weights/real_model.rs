//! The default model (SmolLM2-135M-Instruct, Q4_1 GGUF), where the test command has it: its path in BINDERY_TEST_MODEL.

use std::{fs::File, path::PathBuf};

use bindery_kernels::{Cpu, Matrix};
use bindery_model::{
    Dtype, Quantize,
    config::{RopeScaling, RopeStyle},
    weights::{LayerTensor, TensorRole, WeightStore},
};
use candle_core::{Device, quantized::gguf_file::Content};

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn model_path() -> Option<PathBuf> {
    let path = std::env::var_os("BINDERY_TEST_MODEL").map(PathBuf::from);
    if path.is_none() {
        eprintln!("SKIPPED: BINDERY_TEST_MODEL is not set, so the default model is not tested");
    }
    path
}

#[test]
fn the_default_model_is_what_its_card_says() {
    let Some(path) = model_path() else { return };
    let store = WeightStore::open(&path).unwrap();
    let config = store.config();
    assert_eq!(
        (config.num_layers(), config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
        (30, 576, 9, 3, 64)
    );
    assert_eq!((config.vocab_size, config.max_position_embeddings), (49152, 8192));
    assert_eq!((config.mlp.intermediate_size, config.norm.eps), (1536, 1e-5));
    assert_eq!((config.rotaries[0].style, config.rotaries[0].base), (RopeStyle::Interleaved, 100_000.0));
    assert_eq!((&config.rotaries[0].scaling, config.tied_embeddings), (&RopeScaling::None, true));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    assert_eq!(store.describe_formats(), "Q4_1 (210), F32 (61), Q8_0 (1)");
    assert_eq!(store.num_quantized_by(Quantize::Int4), 0, "its embedding is stored as Q8_0 and stays so");
    assert_eq!(store.num_parameters(), 134_515_008);
    let dummy = WeightStore::dummy(&path).unwrap();
    assert_eq!(dummy.config(), config);
    assert_eq!(dummy.describe_formats(), "BF16 (272)", "made up, none of them read");
    let gguf = store.gguf().unwrap();
    assert_eq!(gguf.strings("tokenizer.ggml.tokens").unwrap().len(), 49152);
    assert_eq!(gguf.strings("tokenizer.ggml.merges").unwrap().len(), 48900);
}

#[test]
fn the_default_model_imports_exactly() {
    let Some(path) = model_path() else { return };
    let store = WeightStore::open(&path).unwrap();
    let mut file = File::open(&path).unwrap();
    let candle = Content::read(&mut file).unwrap();
    let cpu = Cpu::new(Cpu::detect(), 2);
    for role in [
        TensorRole::Embedding,
        TensorRole::FinalNorm,
        TensorRole::Layer(0, LayerTensor::Q),
        TensorRole::Layer(17, LayerTensor::K),
        TensorRole::Layer(29, LayerTensor::Down),
    ] {
        let view = store.tensor(role).unwrap().unwrap();
        let ours = view.to_f32().unwrap();
        let theirs = candle.tensor(&mut file, view.name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        assert!(ours == theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap(), "{}", view.name);
        let matrix = view.import(&cpu, Dtype::Auto, Quantize::None).unwrap();
        assert!(!matches!((role, &matrix), (TensorRole::Embedding, Matrix::F32(_))), "quantised stays quantised");
        let mut row = vec![0.0; view.cols];
        for (i, ours) in ours.chunks_exact(view.cols).enumerate() {
            matrix.row(i, &mut row);
            assert!(row == ours, "{} row {i}", view.name);
        }
    }
}
