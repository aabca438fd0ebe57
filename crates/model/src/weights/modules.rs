//! Modules by name: which of a base's matrices, or which rows of several, an adapter's module is.
//!
//! It reads the table of names from the other end: `names` says where a matrix may be, here a name asks which matrices it
//! holds. It must not know what an adapter is. Its invariant: parts that it hands out are of the base's own shapes and
//! together lie within a module of [`Parts::shape`].

use super::{
    LayerTensor, RowsAt, TensorRole,
    names::{Expected, Naming, Place, TensorKind, is_falcon, is_phi3_small, projections},
};
use crate::config::DecoderConfig;

/// Who named the modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ModuleNames {
    /// transformers' classes: `model.layers.0.self_attn.q_proj`.
    HuggingFace,
    /// llama.cpp's converter: `blk.0.attn_q`.
    Gguf,
}

/// One matrix in a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) role: TensorRole,
    /// Outputs.
    pub(crate) rows: usize,
    /// Which of the module's outputs they are.
    pub(crate) rows_at: RowsAt,
}

/// What a module is on this base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    /// `[outputs, inputs]` of the whole module.
    pub(crate) shape: [usize; 2],
    /// At least one.
    pub(crate) parts: Vec<Part>,
}

/// What a name turns out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Module {
    /// A matrix or several, in one way, or in several that differ in shape (llama.cpp names Phi 3's gate and up together
    /// as it names an up alone).
    Known(Vec<Parts>),
    /// In a layer that the base does not have.
    NoSuchLayer(String),
    /// Router or experts of a mixture.
    Experts,
    /// The table of embeddings.
    Embedding,
    /// Nothing that this base has.
    Unknown,
}

impl ModuleNames {
    fn namings(self, config: &DecoderConfig) -> Vec<Naming> {
        match self {
            Self::HuggingFace => Naming::of_the_family(config).collect(),
            Self::Gguf => vec![Naming::Gguf],
        }
    }

    /// Falcon's and Phi-3-small's modules have names of their own, or rows in an order of their own, and the table of places does
    /// not ask whose they are.
    fn is_of_the_family(self, config: &DecoderConfig, place: &Place) -> bool {
        let has = |part: &str| place.name.contains(part);
        let is_falcons = has("self_attention.") || has("mlp.dense_");
        let is_by_turns = has("mlp.") && matches!(place.rows_at, RowsAt::Runs { .. });
        let is_phi3_smalls = has("self_attn.query_key_value") || has("self_attn.dense.") || is_by_turns;
        self == Self::Gguf || is_falcons == is_falcon(config) && (!is_phi3_smalls || is_phi3_small(config))
    }

    /// What `module` is.
    pub(crate) fn find(self, config: &DecoderConfig, module: &str) -> Module {
        let tensor = format!("{module}.weight");
        for naming in self.namings(config) {
            let (role, cols) = (TensorRole::Head, config.hidden_size);
            let head = Expected { role, rows: config.vocab_size, cols, kind: TensorKind::Matrix };
            if naming.places(config, &head).iter().any(|place| place.name == tensor) {
                let parts = vec![Part { role, rows: config.vocab_size, rows_at: RowsAt::WHOLE }];
                return Module::Known(vec![Parts { shape: [config.vocab_size, cols], parts }]);
            }
            let embedding = Expected { role: TensorRole::Embedding, ..head };
            if naming.places(config, &embedding)[0].name == tensor {
                return Module::Embedding;
            }
            let Some((layer, local)) = naming.split_layer(module) else { continue };
            let Some(layer) = layer.parse().ok().filter(|&layer| layer < config.num_layers()) else {
                return Module::NoSuchLayer(layer.to_owned());
            };
            let ways =
                ways(config, naming, layer, |place| place.name == tensor && self.is_of_the_family(config, place));
            return match ways.is_empty() {
                false => Module::Known(ways),
                true if is_of_experts(local) => Module::Experts,
                true => Module::Unknown,
            };
        }
        Module::Unknown
    }

    /// The last parts of the names that [`Self::find`] knows, for messages.
    pub(crate) fn known(self, config: &DecoderConfig) -> String {
        let mut names: Vec<String> = Vec::new();
        for naming in self.namings(config) {
            let places = projections(config, 0).into_iter().flat_map(|tensor| naming.places(config, &tensor));
            for place in places.filter(|place| self.is_of_the_family(config, place)) {
                let name = place.name.trim_end_matches(".weight");
                let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
                if !names.iter().any(|name| name == last) {
                    names.push(last.to_owned());
                }
            }
        }
        names.push(match self {
            Self::HuggingFace => "lm_head".to_owned(),
            Self::Gguf => "output".to_owned(),
        });
        names.join(", ")
    }
}

/// The matrices of a layer that some place may hold, together where they have one shape.
fn ways(config: &DecoderConfig, naming: Naming, layer: usize, is_it: impl Fn(&Place) -> bool) -> Vec<Parts> {
    let mut ways: Vec<Parts> = Vec::new();
    for expected in projections(config, layer) {
        let fits = |place: &Place| {
            // Without a gate there is nothing to be fused with.
            let is_fused = place.shape[0] != expected.rows;
            let is_up = expected.role == TensorRole::Layer(layer, LayerTensor::Up);
            is_it(place) && (config.mlp.gated || !is_fused || !is_up)
        };
        for place in naming.places(config, &expected).into_iter().filter(fits) {
            let part = Part { role: expected.role, rows: expected.rows, rows_at: place.rows_at };
            let shape = [place.shape[0], expected.cols];
            match ways.iter_mut().find(|way| way.shape == shape) {
                Some(way) => way.parts.push(part),
                None => ways.push(Parts { shape, parts: vec![part] }),
            }
        }
    }
    ways
}

/// Names of routers and experts, stacked or one by one, shared or not.
fn is_of_experts(local: &str) -> bool {
    ["experts", "block_sparse_moe", "shared_expert", "_exps", "_shexp", "ffn_gate_inp"]
        .iter()
        .any(|part| local.contains(part))
        || local == "mlp.gate"
}
