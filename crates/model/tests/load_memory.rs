//! Loading takes little more memory than what is loaded: at most a tenth, and 96 MiB.
//!
//! A test binary of its own: it looks at the peak of the whole process's resident memory, which other tests would blur. The
//! kernel counts pages of mapped files too, as long as they are resident.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    io::{BufWriter, Write as _},
    path::Path,
};

use bindery_model::{BackendKind, Dtype, LoadOptions, Model, Quantize};
use serde_json::{Map, Value, json};

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 4096;
const VOCAB: usize = 32_000;
const NUM_LAYERS: usize = 6;

/// A figure of this process in bytes.
fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..NUM_LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN / 4, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN / 4, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTERMEDIATE]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    tensors
}

/// A quarter of a gigabyte in bf16, written piece by piece.
fn write_model(folder: &Path) {
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": VOCAB, "tie_word_embeddings": true, "max_position_embeddings": 256,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors() {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = BufWriter::new(fs::File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut random = 1_u32;
    // Numbers of either sign from 1/128 to 1/64.
    let mut piece = || -> Vec<u8> {
        let number = || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((random >> 16) as u16 & 0x807f | 0x3c00).to_le_bytes()
        };
        std::iter::repeat_with(number).take(1 << 19).flatten().collect()
    };
    for at in (0..end).step_by(1 << 20) {
        file.write_all(&piece()[..(end - at).min(1 << 20)]).unwrap();
    }
    file.flush().unwrap();
}

#[test]
#[allow(clippy::print_stderr, reason = "measured values are worth reading beside the bound (--nocapture)")]
fn the_peak_of_loading_is_close_to_what_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    let cpu = LoadOptions { threads: Some(2), ..LoadOptions::new(BackendKind::Cpu) };
    for options in [
        cpu.clone(),
        LoadOptions { quantize: Quantize::Int8, ..cpu.clone() },
        LoadOptions { quantize: Quantize::Int4, ..cpu.clone() },
        LoadOptions { dtype: Dtype::F32, ..cpu },
    ] {
        // The kernel then begins its peak anew.
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = status("VmRSS:");
        let model = Model::load(folder.path(), &options, &mut |_, _| ()).unwrap();
        let (peak, held) = (status("VmHWM:") - before, model.info().weight_bytes);
        eprintln!("measured {:?} {:?}: {} MiB of {}", options.dtype, options.quantize, peak >> 20, held >> 20);
        assert!(peak >= held, "{peak} of {held}: what is loaded is resident");
        assert!(peak <= held + held / 10 + (96 << 20), "{peak} for {held}");
    }
}
