//! The metadata of a GGUF adapter: what it is made for, and what scales it.
//!
//! Source: llama.cpp's convert_lora_to_gguf.py, which writes one alpha for all matrices (rank-stabilised scaling and patterns
//! are lost there), and src/llama-adapter.cpp, which divides it by each pair's rank. It must not know tensors. Its invariant:
//! a file of another architecture than the base's is refused.

use crate::{
    ModelError,
    config::{DecoderConfig, RopeStyle, gguf_rope_style},
    licence,
    weights::gguf::GgufFile,
};

/// What a GGUF adapter's metadata says.
#[derive(Debug)]
pub(super) struct GgufAdapter {
    /// 0 where the file has none.
    pub(super) alpha: f64,
    pub(super) base: Option<String>,
    pub(super) licence: Option<String>,
    /// Which order the rows of queries and keys have in the file.
    pub(super) style: RopeStyle,
}

impl GgufAdapter {
    pub(super) fn read(file: &GgufFile, base: &DecoderConfig) -> Result<Self, ModelError> {
        let path = file.path();
        match file.str("general.type") {
            Some("adapter") => {}
            kind => {
                let what = format!(
                    "general.type is {:?}; an adapter's is \"adapter\" (this file may be a whole model)",
                    kind.unwrap_or("absent")
                );
                return Err(ModelError::bad_file(path, what));
            }
        }
        match file.str("adapter.type") {
            Some("lora") => {}
            kind => {
                let what =
                    format!("adapter.type is {:?}, which is not supported; \"lora\" is", kind.unwrap_or("absent"));
                return Err(ModelError::unsupported(path, what));
            }
        }
        if file.get("adapter.alora.invocation_tokens").is_some() {
            let what = "this is an activated LoRA, which begins in the middle of a prompt; that is not supported";
            return Err(ModelError::unsupported(path, what));
        }
        let architecture = file.str("general.architecture").unwrap_or("absent");
        let style = gguf_rope_style(architecture).filter(|_| fits(architecture, base)).ok_or_else(|| {
            let what = format!(
                "general.architecture is {architecture:?}, the base's is {:?}: this adapter was made for another model",
                base.gguf_architecture()
            );
            ModelError::bad_file(path, what)
        })?;
        let alpha = match (file.get("adapter.lora.alpha"), file.f64("adapter.lora.alpha")) {
            (None, _) => 0.0,
            (Some(_), Some(alpha)) if alpha.is_finite() => alpha,
            (Some(value), _) => {
                return Err(ModelError::bad_file(
                    path,
                    format!("adapter.lora.alpha is {value:?}; a number is expected"),
                ));
            }
        };
        let base = ["general.base_model.0.repo_url", "general.base_model.0.name"].iter().find_map(|key| file.str(key));
        Ok(Self { alpha, base: base.map(str::to_owned), licence: licence::of_gguf(file), style })
    }

    /// What `b a x` of a pair is multiplied with. Without an alpha llama.cpp multiplies with nothing.
    pub(super) fn scaling(&self, rank: usize) -> f64 {
        if self.alpha == 0.0 { 1.0 } else { self.alpha / rank as f64 }
    }
}

/// Newer Mistral models have a name of their own in llama.cpp, and are Mistral to transformers.
fn fits(architecture: &str, base: &DecoderConfig) -> bool {
    architecture == base.gguf_architecture() || (architecture == "mistral3" && base.architecture == "mistral")
}
