//! How a [`LocalModel`] comes into being: weights, tokenizer and template from disk, and how much KV
//! cache there is room for.
//!
//! The sizing is a pure function of numbers ([`size_cache`]), so that it can be tested without memory. It must not know
//! what is served afterwards. Its invariant: a sequence of `max_model_len` tokens always fits the cache alone.

use std::{path::Path, time::Instant};

use bindery_model::{
    Model, ModelInfo, OpenedModel, Quantize,
    memory::{TotalMemory, available_memory_bytes, give_back_freed, total_memory},
    weights::gguf::GgufFile,
};
use bindery_scheduler::Limits;

use crate::{
    ChatTemplate, EngineError, ReadAdapter, Tokenizer,
    local_model::{CheckReport, LoadReport, LocalModel, LocalModelConfig, LocalModelParts},
    text::gguf_vocabulary::GgufVocabulary,
};

/// Left free for activations, requests and the rest of the machine, whatever the share.
const MARGIN_BYTES_MIN: u64 = 512 << 20;
/// Share of the free memory that is left free: one tenth.
const MARGIN_SHARE: u64 = 10;
/// Slots are numbered in 32 bits.
const SLOTS_MAX: u64 = u32::MAX as u64;

/// See [`LocalModel::load`].
pub(crate) fn load(
    path: &Path,
    config: &LocalModelConfig,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(LocalModel, LoadReport), EngineError> {
    let start = Instant::now();
    let Opened { model, tokenizer, template, needs } = open(path, config)?;
    let mut model = model.load(progress)?;
    let info = model.info().clone();
    let mut notes = Vec::new();
    if tokenizer.vocab_size() > info.vocab_size {
        notes.push(format!(
            "the tokenizer knows {} tokens, the model only the first {}: prompts with others are refused",
            tokenizer.vocab_size(),
            info.vocab_size
        ));
    }
    if tokenizer.eos_token_ids().is_empty() {
        notes.push("the model names no end token: answers end at max_tokens or at a stop string".to_owned());
    }
    notes.extend(nothing_to_quantize(&info, config.load.quantize));
    let memory = CacheMemory::of(config, available_memory_bytes());
    let wanted = CacheWanted::new(config);
    let size = size_cache(needs, &wanted, memory)?;
    notes.extend(size.note);
    model.allocate_kv(size.num_blocks)?;
    let limits = Limits {
        block_size: wanted.block_size,
        num_blocks: size.num_blocks,
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_model_len: size.max_model_len,
        max_queued_requests: config.max_queued_requests,
    };
    let reader: Box<dyn ReadAdapter> = Box::new(model.adapter_loader());
    let parts = LocalModelParts {
        tokenizer,
        template,
        info,
        limits,
        max_buffered_tokens: config.max_buffered_tokens,
        paces_prompts: config.paces_prompts,
        adapters: (config.adapters.clone(), reader),
    };
    let local_model = LocalModel::from_parts(Box::new(model), parts)?;
    // What reading a vocabulary took for a while would stay with the process.
    give_back_freed();
    let kv_tokens = size.num_blocks * wanted.block_size;
    let report = LoadReport {
        load_time: start.elapsed(),
        num_blocks: size.num_blocks,
        kv_tokens,
        full_length_requests: kv_tokens as f64 / size.max_model_len as f64,
        notes,
    };
    Ok((local_model, report))
}

/// See [`LocalModel::check`].
pub(crate) fn check(path: &Path, config: &LocalModelConfig) -> Result<CheckReport, EngineError> {
    let Opened { model, needs, .. } = open(path, config)?;
    let max_model_len = match config.kv_cache_memory {
        Some(bytes) => size_cache(needs, &CacheWanted::new(config), CacheMemory::Given(bytes))?.max_model_len,
        None => config.max_model_len.unwrap_or(needs.model_len),
    };
    Ok(CheckReport { architecture: model.config().architecture.clone(), max_model_len })
}

/// All that comes before the weights.
struct Opened {
    model: OpenedModel,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    needs: CacheNeeds,
}

/// The one way in, for [`load`] and [`check`]: whatever can be refused without reading a weight is refused here.
fn open(path: &Path, config: &LocalModelConfig) -> Result<Opened, EngineError> {
    config.check()?;
    let model = Model::open(path, &config.load)?;
    let needs =
        CacheNeeds { model_len: model.config().max_position_embeddings, bytes_per_token: model.kv_bytes_per_token() };
    check_max_model_len(needs, config.max_model_len)?;
    if let Some(bytes) = config.kv_cache_memory {
        size_cache(needs, &CacheWanted::new(config), CacheMemory::Given(bytes))?;
    }
    let (tokenizer, template) = load_text(path, config.load.dummy)?;
    Ok(Opened { model, tokenizer, template, needs })
}

/// Who asks for int4 and gets none should not have to find out from the memory used.
fn nothing_to_quantize(info: &ModelInfo, quantize: Quantize) -> Option<String> {
    (quantize != Quantize::None && info.num_quantized_tensors == 0).then(|| {
        format!(
            "--quantize changed nothing: it is for dense matrices, and those of this model are quantised in the file already, \
             or no multiple of 32 wide; stored are {}",
            info.weight_format
        )
    })
}

/// Tokenizer and template of a model's file or folder.
pub(crate) fn load_text(path: &Path, is_dummy: bool) -> Result<(Tokenizer, Option<ChatTemplate>), EngineError> {
    if path.is_file() && path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        let file = GgufFile::open(path)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let template = ChatTemplate::from_gguf(&file, &tokenizer)?;
        return Ok((tokenizer, template));
    }
    if is_dummy && !path.join("tokenizer.json").exists() {
        return Ok((byte_tokenizer()?, None));
    }
    let tokenizer = Tokenizer::from_dir(path)?;
    let template = ChatTemplate::from_dir(path, &tokenizer)?;
    Ok((tokenizer, template))
}

/// One token a byte, then `<|endoftext|>` (which ends a generation), `<|begin|>` and `<|special|>`: what random weights
/// without a tokenizer of their own are served with.
pub(crate) fn byte_tokenizer() -> Result<Tokenizer, EngineError> {
    let mut tokens: Vec<String> = (0..=u8::MAX).map(|byte| byte_level_char(byte).to_string()).collect();
    tokens.extend(["<|endoftext|>", "<|begin|>", "<|special|>"].map(str::to_owned));
    const NORMAL: i64 = 1;
    const CONTROL: i64 = 3;
    let mut types = vec![NORMAL; 256];
    types.extend([CONTROL; 3]);
    Tokenizer::from_vocabulary(&GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens,
        types,
        bos: Some(257),
        eos: Some(256),
        add_bos: Some(false),
        ..GgufVocabulary::default()
    })
}

/// GPT-2's visible character for a byte: itself where it is printable Latin-1, else the next free one from U+0100 on.
fn byte_level_char(byte: u8) -> char {
    let is_visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if is_visible(byte) {
        return char::from(byte);
    }
    let num_hidden_before = (0..byte).filter(|&byte| !is_visible(byte)).count() as u32;
    char::from_u32(0x100 + num_hidden_before).expect("U+0100 to U+0143 are characters")
}

/// Where the bytes of the cache come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheMemory {
    /// `--kv-cache-memory`
    Given(u64),
    /// What the system says is free.
    Free(u64),
}

impl CacheMemory {
    pub(crate) fn of(config: &LocalModelConfig, free_bytes: u64) -> Self {
        config.kv_cache_memory.map_or(Self::Free(free_bytes), Self::Given)
    }
}

impl LocalModelConfig {
    /// Refuses what no model could be loaded with on this machine, before there is one to look at.
    ///
    /// # Errors
    /// The value, the limit and the next step.
    pub fn check(&self) -> Result<(), EngineError> {
        self.load.check()?;
        self.adapters.check()?;
        check_cache_memory(self.kv_cache_memory, total_memory())
    }
}

/// Pages of the cache are taken from the system when they are first written to, so without this a size that no machine
/// has would be found out late, or in the middle of serving. Where the system names no total, nothing can be said.
fn check_cache_memory(given: Option<u64>, total: Option<TotalMemory>) -> Result<(), EngineError> {
    let (Some(given), Some(total)) = (given, total) else { return Ok(()) };
    if given <= total.bytes {
        return Ok(());
    }
    let whose = if total.is_of_group { "the limit of this process's control group," } else { "this machine's" };
    Err(invalid(
        "kv_cache_memory",
        format!(
            "--kv-cache-memory {} is more than {whose} {}: give less, or leave it out to take what is free",
            in_units(given, f64::ceil),
            in_units(total.bytes, f64::floor)
        ),
    ))
}

/// Bytes for people, with one decimal where it is not zero; `round` says to which side.
fn in_units(bytes: u64, round: fn(f64) -> f64) -> String {
    const UNITS: [(&str, u32); 6] = [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let (name, bits) = UNITS.into_iter().find(|&(_, bits)| bytes >> bits > 0).unwrap_or(("KiB", 10));
    let size = round(bytes as f64 / (1_u64 << bits) as f64 * 10.0) / 10.0;
    format!("{size} {name}")
}

/// What the model is, as far as its cache goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheNeeds {
    /// Tokens that it was made for.
    pub(crate) model_len: usize,
    pub(crate) bytes_per_token: usize,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CacheWanted {
    max_model_len: Option<usize>,
    max_num_seqs: usize,
    block_size: usize,
}

impl CacheWanted {
    pub(crate) fn new(config: &LocalModelConfig) -> Self {
        Self {
            max_model_len: config.max_model_len,
            max_num_seqs: config.max_num_seqs,
            block_size: config.load.block_size,
        }
    }
}

/// What there will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CacheSize {
    pub(crate) num_blocks: usize,
    pub(crate) max_model_len: usize,
    pub(crate) note: Option<String>,
}

fn check_max_model_len(needs: CacheNeeds, wanted: Option<usize>) -> Result<(), EngineError> {
    let model_len = needs.model_len;
    match wanted {
        Some(0) => Err(invalid("max_model_len", "--max-model-len is 0, it must be at least 1".to_owned())),
        Some(len) if len > model_len => Err(invalid(
            "max_model_len",
            format!("--max-model-len is {len}, this model was made for at most {model_len} tokens"),
        )),
        _ => Ok(()),
    }
}

/// Of memory that is free, what a cache may take.
fn without_margin(free_bytes: u64) -> u64 {
    free_bytes.saturating_sub(MARGIN_BYTES_MIN.max(free_bytes / MARGIN_SHARE))
}

/// The least memory that has to be free for a cache of so many bytes.
pub(crate) fn free_for(cache_bytes: u64) -> u64 {
    // Of what is free, nine tenths are for the cache.
    let with_share = cache_bytes.saturating_add(cache_bytes.div_ceil(MARGIN_SHARE - 1));
    cache_bytes.saturating_add(MARGIN_BYTES_MIN).max(with_share)
}

/// As many blocks as the memory holds, but not more than all sequences of a step could ever use.
pub(crate) fn size_cache(
    needs: CacheNeeds,
    wanted: &CacheWanted,
    memory: CacheMemory,
) -> Result<CacheSize, EngineError> {
    let block_size = wanted.block_size;
    if block_size == 0 {
        return Err(invalid("block_size", "--block-size is 0, it must be at least 1".to_owned()));
    }
    check_max_model_len(needs, wanted.max_model_len)?;
    let model_len = needs.model_len;
    let budget_bytes = match memory {
        CacheMemory::Given(bytes) => bytes,
        CacheMemory::Free(bytes) => without_margin(bytes),
    };
    let block_bytes = (needs.bytes_per_token as u64).saturating_mul(block_size as u64).max(1);
    let num_affordable = (budget_bytes / block_bytes).min(SLOTS_MAX / block_size as u64) as usize;
    let wanted_len = wanted.max_model_len.unwrap_or(model_len);
    let num_needed = wanted_len.div_ceil(block_size);
    let mut note = None;
    let max_model_len = if num_needed <= num_affordable {
        wanted_len
    } else if let (None, 1..) = (wanted.max_model_len, num_affordable) {
        let len = num_affordable * block_size;
        note = Some(format!(
            "the KV cache has room for {len} tokens, so contexts end there instead of at the model's {model_len}: raise \
             --kv-cache-memory for more"
        ));
        len
    } else {
        let needed_mib = (block_bytes.saturating_mul(num_needed as u64)).div_ceil(1 << 20);
        let budget_mib = budget_bytes >> 20;
        return Err(invalid(
            "kv_cache_memory",
            format!(
                "one sequence of {wanted_len} tokens needs {needed_mib} MiB of KV cache and there are {budget_mib} MiB: \
                 lower --max-model-len, raise --kv-cache-memory, or free memory"
            ),
        ));
    };
    let num_useful = max_model_len.div_ceil(block_size).saturating_mul(wanted.max_num_seqs.max(1));
    Ok(CacheSize { num_blocks: num_affordable.min(num_useful), max_model_len, note })
}

pub(crate) fn invalid(param: &'static str, message: String) -> EngineError {
    EngineError::Invalid { param, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{fake_info, small_limits};

    fn needs() -> CacheNeeds {
        CacheNeeds { model_len: 8192, bytes_per_token: 1024 }
    }

    fn wanted(max_model_len: Option<usize>, max_num_seqs: usize) -> CacheWanted {
        CacheWanted { max_model_len, max_num_seqs, block_size: 16 }
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_cache_takes_what_is_given() {
        let size = size_cache(needs(), &wanted(None, 256), CacheMemory::Given(GIB)).unwrap();
        assert_eq!(size, CacheSize { num_blocks: 65536, max_model_len: 8192, note: None });
    }

    #[test]
    fn the_cache_is_no_larger_than_all_sequences_together() {
        let size = size_cache(needs(), &wanted(Some(100), 2), CacheMemory::Given(GIB)).unwrap();
        assert_eq!(size, CacheSize { num_blocks: 14, max_model_len: 100, note: None });
    }

    #[test]
    fn a_margin_of_free_memory_stays_free() {
        let size = size_cache(needs(), &wanted(None, 256), CacheMemory::Free(2 * GIB)).unwrap();
        assert_eq!(size.num_blocks, 98304, "1.5 GiB of 2");
        let size = size_cache(needs(), &wanted(None, 256), CacheMemory::Free(20 * GIB)).unwrap();
        assert_eq!(size.num_blocks, 131_072, "256 sequences of 8192 tokens, less than nine tenths of 20 GiB");
    }

    #[test]
    fn what_has_to_be_free_for_a_cache_is_just_enough() {
        for bytes in [0, 1, GIB - 1, 4 * GIB, 9 * (512 << 20), 9 * (512 << 20) + 1, 5 * GIB + 7, 100 * GIB] {
            let free = free_for(bytes);
            assert!(without_margin(free) >= bytes, "{bytes}");
            // Rounding takes a byte at most.
            assert!(without_margin(free - 2) < bytes || bytes == 0, "{bytes}");
        }
        assert_eq!(free_for(u64::MAX), u64::MAX);
    }

    #[test]
    fn the_context_shrinks_to_what_fits_unless_it_was_asked_for() {
        let size = size_cache(needs(), &wanted(None, 256), CacheMemory::Given(1 << 20)).unwrap();
        assert_eq!((size.num_blocks, size.max_model_len), (64, 1024));
        assert!(size.note.unwrap().contains("1024 tokens"));
        let error = size_cache(needs(), &wanted(Some(2048), 256), CacheMemory::Given(1 << 20)).unwrap_err();
        assert!(error.to_string().contains("needs 2 MiB of KV cache and there are 1 MiB"), "{error}");
        assert!(size_cache(needs(), &wanted(None, 256), CacheMemory::Given(100)).is_err());
        assert!(size_cache(needs(), &wanted(None, 256), CacheMemory::Free(100)).is_err());
    }

    #[test]
    fn a_context_beyond_the_models_is_refused_with_the_number() {
        let error = size_cache(needs(), &wanted(Some(8193), 256), CacheMemory::Given(GIB)).unwrap_err();
        assert!(matches!(error, EngineError::Invalid { param: "max_model_len", .. }));
        assert!(error.to_string().contains("8192"), "{error}");
        assert!(size_cache(needs(), &wanted(Some(0), 256), CacheMemory::Given(GIB)).is_err());
    }

    #[test]
    fn a_cache_beyond_all_memory_is_refused_with_both_figures() {
        let machine = TotalMemory { bytes: 24 * GIB - 1, is_of_group: false };
        for fine in [None, Some(1), Some(machine.bytes)] {
            check_cache_memory(fine, Some(machine)).unwrap();
        }
        check_cache_memory(Some(u64::MAX), None).unwrap();
        let refused = |bytes, total| check_cache_memory(Some(bytes), Some(total)).unwrap_err();
        let error = refused(10 << 40, machine);
        assert!(matches!(error, EngineError::Invalid { param: "kv_cache_memory", .. }));
        assert_eq!(
            error.to_string(),
            "--kv-cache-memory 10 TiB is more than this machine's 23.9 GiB: give less, or leave it out to take what is free"
        );
        // Rounded apart, so that the text never says that a number is more than itself.
        let text = refused(machine.bytes + 1, machine).to_string();
        assert!(text.contains("24 GiB is more than this machine's 23.9 GiB"), "{text}");
        let text = refused(GIB, TotalMemory { bytes: GIB / 2, is_of_group: true }).to_string();
        assert!(
            text.contains("1 GiB is more than the limit of this process's control group, 512 MiB: give less"),
            "{text}"
        );
    }

    #[test]
    fn nothing_to_quantise_is_said() {
        let stored = ModelInfo { weight_format: "Q4_1 (210), F32 (61)".to_owned(), ..fake_info(&small_limits()) };
        assert_eq!(nothing_to_quantize(&stored, Quantize::None), None);
        let note = nothing_to_quantize(&stored, Quantize::Int4).unwrap();
        assert!(note.starts_with("--quantize changed nothing") && note.ends_with("Q4_1 (210), F32 (61)"), "{note}");
        let changed = ModelInfo { num_quantized_tensors: 1, ..stored };
        assert_eq!(nothing_to_quantize(&changed, Quantize::Int4), None);
    }

    #[test]
    fn the_byte_tokenizer_spells_everything() {
        let tokenizer = byte_tokenizer().unwrap();
        let text = "Grüße, 世界 \u{1f600}\n\0";
        let tokens = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokens.iter().map(|token| token.0 as u8).collect::<Vec<_>>(), text.as_bytes());
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), text);
        assert_eq!(tokenizer.eos_token_ids(), [bindery_scheduler::TokenId(256)]);
    }
}
