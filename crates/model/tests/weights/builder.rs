//! Writes GGUF and safetensors models byte by byte, right ones and wrong ones.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A GGUF file being written. Everything can be set wrong on purpose.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    pub(crate) keys: Vec<(String, Vec<u8>)>,
    pub(crate) tensors: Vec<Tensor>,
    /// Overrides of what the header announces.
    pub(crate) num_tensors: Option<u64>,
    pub(crate) num_keys: Option<u64>,
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Fastest first.
    pub(crate) dims: Vec<u64>,
    pub(crate) type_id: u32,
    pub(crate) bytes: Vec<u8>,
    /// Where the table says it is; None: where it is.
    pub(crate) offset: Option<u64>,
}

/// Value encoders: type id, then the value.
pub(crate) mod value {
    pub(crate) fn u32(value: u32) -> Vec<u8> {
        [4u32.to_le_bytes(), value.to_le_bytes()].concat()
    }
    pub(crate) fn f32(value: f32) -> Vec<u8> {
        [6u32.to_le_bytes(), value.to_le_bytes()].concat()
    }
    pub(crate) fn string(value: &[u8]) -> Vec<u8> {
        [&8u32.to_le_bytes()[..], &(value.len() as u64).to_le_bytes(), value].concat()
    }
    /// Element type, announced count, the elements' bytes.
    pub(crate) fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
        [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &count.to_le_bytes(), elements].concat()
    }
}

impl Gguf {
    pub(crate) fn new() -> Self {
        Self { version: 3, alignment: 32, keys: Vec::new(), tensors: Vec::new(), num_tensors: None, num_keys: None }
    }

    /// One layer, two heads of 16, one key/value head, hidden 32, inner 64, vocabulary 8; all f32, of small numbers.
    pub(crate) fn llama() -> Self {
        let mut file = Self::new()
            .key("general.architecture", value::string(b"llama"))
            .key("llama.block_count", value::u32(1))
            .key("llama.context_length", value::u32(64))
            .key("llama.embedding_length", value::u32(32))
            .key("llama.feed_forward_length", value::u32(64))
            .key("llama.attention.head_count", value::u32(2))
            .key("llama.attention.head_count_kv", value::u32(1))
            .key("llama.attention.layer_norm_rms_epsilon", value::f32(1e-5))
            .key("tokenizer.ggml.eos_token_id", value::u32(2));
        for (name, dims) in [
            ("token_embd.weight", vec![32, 8]),
            ("blk.0.attn_norm.weight", vec![32]),
            ("blk.0.attn_q.weight", vec![32, 32]),
            ("blk.0.attn_k.weight", vec![32, 16]),
            ("blk.0.attn_v.weight", vec![32, 16]),
            ("blk.0.attn_output.weight", vec![32, 32]),
            ("blk.0.ffn_norm.weight", vec![32]),
            ("blk.0.ffn_gate.weight", vec![32, 64]),
            ("blk.0.ffn_up.weight", vec![32, 64]),
            ("blk.0.ffn_down.weight", vec![64, 32]),
            ("output_norm.weight", vec![32]),
        ] {
            file = file.f32_tensor(name, &dims);
        }
        file
    }

    pub(crate) fn key(mut self, name: &str, value: Vec<u8>) -> Self {
        self.keys.retain(|(key, _)| key != name);
        self.keys.push((name.to_owned(), value));
        self
    }

    pub(crate) fn without_key(mut self, name: &str) -> Self {
        self.keys.retain(|(key, _)| key != name);
        self
    }

    pub(crate) fn without_tensor(mut self, name: &str) -> Self {
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], type_id: u32, bytes: Vec<u8>) -> Self {
        let tensor = Tensor { name: name.to_owned(), dims: dims.to_vec(), type_id, bytes, offset: None };
        // In place of one of that name, so that the order stays.
        match self.tensors.iter_mut().find(|tensor| tensor.name == name) {
            Some(old) => *old = tensor,
            None => self.tensors.push(tensor),
        }
        self
    }

    pub(crate) fn f32_tensor(self, name: &str, dims: &[u64]) -> Self {
        let count = dims.iter().product::<u64>() as usize;
        let bytes = (0..count).flat_map(|i| ((i % 7) as f32 / 8.0 - 0.25).to_le_bytes()).collect();
        self.tensor(name, dims, 0, bytes)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.num_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            out.extend((name.len() as u64).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            out.extend((tensor.name.len() as u64).to_le_bytes());
            out.extend(tensor.name.as_bytes());
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.type_id.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}

/// A temporary folder and a file in it.
pub(crate) struct OnDisk {
    pub(crate) path: PathBuf,
    /// Goes when this goes.
    _folder: TempDir,
}

pub(crate) fn on_disk(name: &str, bytes: &[u8]) -> OnDisk {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    OnDisk { path, _folder: folder }
}

/// The config of the safetensors models below: as `Gguf::llama`, untied.
pub(crate) fn config_json() -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32",
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
    })
}

/// Name, shape and f32 values of every tensor that `config_json` calls for.
pub(crate) fn named_tensors() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let layer = "model.layers.0.";
    [
        ("model.embed_tokens.weight".to_owned(), vec![8, 32]),
        (format!("{layer}input_layernorm.weight"), vec![32]),
        (format!("{layer}self_attn.q_proj.weight"), vec![32, 32]),
        (format!("{layer}self_attn.k_proj.weight"), vec![16, 32]),
        (format!("{layer}self_attn.v_proj.weight"), vec![16, 32]),
        (format!("{layer}self_attn.o_proj.weight"), vec![32, 32]),
        (format!("{layer}post_attention_layernorm.weight"), vec![32]),
        (format!("{layer}mlp.gate_proj.weight"), vec![64, 32]),
        (format!("{layer}mlp.up_proj.weight"), vec![64, 32]),
        (format!("{layer}mlp.down_proj.weight"), vec![32, 64]),
        ("model.norm.weight".to_owned(), vec![32]),
        ("lm_head.weight".to_owned(), vec![8, 32]),
    ]
    .into_iter()
    .map(|(name, shape)| {
        let count: usize = shape.iter().product();
        let seed = name.len();
        (name, shape, (0..count).map(|i| ((i * 31 + seed) % 97) as f32 / 64.0 - 0.75).collect())
    })
    .collect()
}

/// Bytes of a safetensors file, by the reference implementation.
pub(crate) fn safetensors_bytes(tensors: &[(String, Vec<usize>, Vec<f32>)], dtype: safetensors::Dtype) -> Vec<u8> {
    use safetensors::{Dtype, tensor::TensorView};
    let encoded: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let bytes = match dtype {
                Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
                Dtype::BF16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
                Dtype::F64 => values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect(),
                other => panic!("{other:?} is not written here"),
            };
            (name.clone(), shape.clone(), bytes)
        })
        .collect();
    let views = encoded
        .iter()
        .map(|(name, shape, bytes)| (name.clone(), TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// A model folder with one safetensors file.
pub(crate) fn model_folder(config: &serde_json::Value, weights: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_json(&folder.path().join("config.json"), config);
    std::fs::write(folder.path().join("model.safetensors"), weights).unwrap();
    folder
}

pub(crate) fn write_json(path: &Path, value: &serde_json::Value) {
    std::fs::write(path, serde_json::to_vec(value).unwrap()).unwrap();
}

/// A generator for test data, nothing more.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// -1 to 1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
