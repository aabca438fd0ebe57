//! What a model takes and how much of it fits this machine, before any of it is loaded.
//!
//! The sizing is that of a start (`load`), with the memory that the weights would have taken counted off. It must not know
//! who asks or how it is shown. Invariant: no weight is read, and no tokenizer is needed.

use std::path::Path;

use bindery_model::{
    Model, ModelReport,
    memory::{TotalMemory, available_memory_bytes, total_memory},
};

use crate::{
    EngineError, LocalModelConfig,
    load::{CacheMemory, CacheNeeds, CacheSize, CacheWanted, free_for, invalid, size_cache},
};

/// Tokens of a request unless said otherwise, or as many as the model was made for.
const DEFAULT_LENGTH: usize = 4096;

/// What there is to be room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// That run at a time.
    pub num_requests: usize,
    /// Tokens of prompt and answer together. None: 4096, or the model's context where that is less.
    pub length: Option<usize>,
}

/// What [`inspect`] finds. Sizes in bytes unless named otherwise.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// The model, and what it takes by itself.
    pub model: ModelReport,
    /// What the load that was asked about takes.
    pub needs: Needs,
    /// What there is.
    pub machine: MachineMemory,
    /// What a start would make of that; none where the weights leave no room for a block of keys and values.
    pub fit: Option<Fit>,
}

/// The memory for some requests at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// At a time.
    pub num_requests: usize,
    /// Tokens of each.
    pub length: usize,
    /// Keys and values of all, in whole blocks.
    pub kv_bytes: u64,
    /// What a start keeps free beside such a cache, for activations and the rest of the machine.
    pub margin_bytes: u64,
    /// All of it, weights included.
    pub total_bytes: u64,
}

/// This process's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineMemory {
    /// None where the system does not say.
    pub total: Option<TotalMemory>,
    /// Now, for this process.
    pub free_bytes: u64,
}

/// The KV cache that a start would make now, with the limits that were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Of the KV cache.
    pub num_blocks: usize,
    /// Tokens they hold.
    pub kv_tokens: usize,
    /// Tokens of one request at most.
    pub max_model_len: usize,
    /// How many requests of the length asked about run at a time; 0 where one does not fit. At most
    /// [`LocalModelConfig::max_num_seqs`].
    pub num_requests: usize,
}

/// Reads the metadata of a model's files and says what serving it under `config` takes.
///
/// # Errors
/// What loading would refuse of the files and options, and a length beyond the model's context or of no requests.
pub fn inspect(path: &Path, config: &LocalModelConfig, workload: Workload) -> Result<Inspection, EngineError> {
    config.check()?;
    let opened = Model::open(path, &config.load)?;
    let model = opened.report()?;
    let cache =
        CacheNeeds { model_len: model.config.max_position_embeddings, bytes_per_token: opened.kv_bytes_per_token() };
    let needs = needs(cache, config, model.weight_bytes, workload)?;
    let machine = MachineMemory { total: total_memory(), free_bytes: available_memory_bytes() };
    let memory = CacheMemory::of(config, machine.free_bytes.saturating_sub(model.weight_bytes));
    let size = size_cache(cache, &CacheWanted::new(config), memory).ok();
    let fit = size.map(|size| fit(&size, config, needs.length));
    Ok(Inspection { model, needs, machine, fit })
}

fn needs(
    cache: CacheNeeds,
    config: &LocalModelConfig,
    weight_bytes: u64,
    workload: Workload,
) -> Result<Needs, EngineError> {
    let length = workload.length.unwrap_or(DEFAULT_LENGTH.min(cache.model_len));
    if length == 0 || length > cache.model_len {
        let message = format!("--length is {length}; this model takes 1 to {} tokens", cache.model_len);
        return Err(invalid("length", message));
    }
    if workload.num_requests == 0 {
        return Err(invalid("num_requests", "--num-requests is 0, it must be at least 1".to_owned()));
    }
    let block_size = config.load.block_size;
    let num_tokens = (length.div_ceil(block_size) * block_size) as u64;
    let kv_bytes =
        [cache.bytes_per_token as u64, workload.num_requests as u64].into_iter().fold(num_tokens, u64::saturating_mul);
    let with_margin = free_for(kv_bytes);
    Ok(Needs {
        num_requests: workload.num_requests,
        length,
        kv_bytes,
        margin_bytes: with_margin - kv_bytes,
        total_bytes: weight_bytes.saturating_add(with_margin),
    })
}

fn fit(size: &CacheSize, config: &LocalModelConfig, length: usize) -> Fit {
    let block_size = config.load.block_size;
    let fitting = if length > size.max_model_len { 0 } else { size.num_blocks / length.div_ceil(block_size) };
    Fit {
        num_blocks: size.num_blocks,
        kv_tokens: size.num_blocks * block_size,
        max_model_len: size.max_model_len,
        num_requests: fitting.min(config.max_num_seqs),
    }
}

#[cfg(test)]
mod tests {
    use bindery_model::{BackendKind, LoadOptions};

    use super::*;

    fn config() -> LocalModelConfig {
        LocalModelConfig {
            load: LoadOptions::new(BackendKind::Cpu),
            max_model_len: None,
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            kv_cache_memory: None,
            max_queued_requests: 1,
            max_buffered_tokens: 1,
            paces_prompts: false,
            adapters: crate::AdapterPoolConfig::default(),
        }
    }

    const CACHE: CacheNeeds = CacheNeeds { model_len: 8192, bytes_per_token: 1000 };

    #[test]
    fn requests_take_whole_blocks_and_a_margin_beside_them() {
        let load = |num_requests, length| Workload { num_requests, length };
        let of = |load| needs(CACHE, &config(), 5_000, load);
        let three = of(load(3, Some(17))).unwrap();
        assert_eq!((three.length, three.kv_bytes, three.margin_bytes), (17, 3 * 32 * 1000, 512 << 20));
        assert_eq!(three.total_bytes, 5_000 + 96_000 + (512 << 20));
        assert_eq!(of(load(1, None)).unwrap().length, 4096);
        let short = CacheNeeds { model_len: 256, ..CACHE };
        assert_eq!(needs(short, &config(), 0, load(1, None)).unwrap().length, 256);
        // A margin of a tenth of what is free.
        let many = of(load(9000, Some(1000))).unwrap();
        assert_eq!(many.kv_bytes, 9000 * 1008 * 1000);
        assert_eq!(many.margin_bytes, 1008 * 1000 * 1000);
        for (load, expected) in [
            (load(1, Some(8193)), "--length is 8193; this model takes 1 to 8192 tokens"),
            (load(1, Some(0)), "--length is 0"),
            (load(0, None), "--num-requests is 0"),
        ] {
            let error = of(load).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let huge = of(load(usize::MAX, None)).unwrap();
        assert_eq!((huge.kv_bytes, huge.total_bytes), (u64::MAX, u64::MAX));
    }

    #[test]
    fn as_many_requests_fit_as_have_blocks_up_to_the_limit() {
        let size = CacheSize { num_blocks: 10, max_model_len: 160, note: None };
        let requests = |length| fit(&size, &config(), length).num_requests;
        assert_eq!([requests(160), requests(80), requests(48), requests(1), requests(161)], [1, 2, 3, 4, 0]);
        assert_eq!(fit(&size, &config(), 1).kv_tokens, 160);
    }
}
