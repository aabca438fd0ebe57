//! Adapters as backends compute with them, and who makes them so away from the thread that computes.
//!
//! It knows which products of a layer read the same activations; it must not know files (the opened adapter's part) nor
//! kernels. Invariant: an [`Adapter`] that exists fits the model whose [`AdapterLoader`] made it.

use std::{fmt, sync::Arc};

use bindery_kernels::pack_together_within;

use super::{AdapterInfo, AdapterLimits, AdapterTarget, OpenedAdapter};
use crate::{
    backend::{Backend, cpu::CpuBackend, reference::ReferenceBackend},
    config::{DecoderConfig, RopeStyle},
    error::ModelError,
};

/// `x -> up (down x)`, as a backend holds it.
pub(crate) struct LowRankWeights<B: Backend> {
    /// `[rank, inputs]`
    pub(crate) down: B::Matrix,
    /// `[outputs, rank]`
    pub(crate) up: B::Matrix,
}

/// What is added to a product; None where nothing is.
pub(crate) type Addend<B> = Option<LowRankWeights<B>>;

/// One adapter's weights, by the products they stand beside.
pub(crate) struct AdapterWeights<B: Backend> {
    pub(crate) layers: Vec<AdapterLayer<B>>,
    pub(crate) head: [Addend<B>; 1],
    num_bytes: u64,
}

/// Those of a layer.
pub(crate) struct AdapterLayer<B: Backend> {
    /// Queries, keys, values.
    pub(crate) qkv: [Addend<B>; 3],
    pub(crate) output: [Addend<B>; 1],
    /// What the activation is a function of, and what it is multiplied with: gate and up, or up alone.
    pub(crate) gated: [Addend<B>; 2],
    pub(crate) down: [Addend<B>; 1],
}

impl<B: Backend> AdapterLayer<B> {
    fn empty() -> Self {
        Self { qkv: [None, None, None], output: [None], gated: [None, None], down: [None] }
    }
}

/// How a model holds the matrix that an adapter's product stands beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BaseForm {
    /// In f32.
    F32,
    /// In sixteen bits, or in codes that take their inputs in an order of their own: its activations are f32.
    Dense,
    /// In codes: its activations are int8.
    Quantized,
}

/// An adapter in memory, ready to be put beside the model it was loaded for. Shared, never changed.
pub struct Adapter {
    pub(crate) weights: AnyAdapter,
    info: AdapterInfo,
    num_bytes: u64,
}

/// On the backend of its model.
pub(crate) enum AnyAdapter {
    Cpu(Arc<AdapterWeights<CpuBackend>>),
    Reference(Arc<AdapterWeights<ReferenceBackend>>),
    /// Of a test's double.
    Nothing,
}

impl Adapter {
    /// What the file says of it.
    pub fn info(&self) -> &AdapterInfo {
        &self.info
    }

    /// Memory that its weights take.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// One without weights, for doubles of models.
    pub fn without_weights(info: AdapterInfo, num_bytes: u64) -> Self {
        Self { weights: AnyAdapter::Nothing, info, num_bytes }
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter").field("info", &self.info).field("num_bytes", &self.num_bytes).finish_non_exhaustive()
    }
}

/// Reads adapters for one model, on any thread.
#[derive(Clone)]
pub struct AdapterLoader(Arc<AnyLoader>);

pub(crate) enum AnyLoader {
    Cpu(BackendLoader<CpuBackend>),
    Reference(BackendLoader<ReferenceBackend>),
}

/// What a loader has to know of the model.
pub(crate) struct BackendLoader<B: Backend> {
    pub(crate) config: DecoderConfig,
    pub(crate) import: B::AdapterImport,
    /// Of each layer, by target; None where there is no such matrix.
    pub(crate) layer_forms: Vec<[Option<BaseForm>; NUM_LAYER_TARGETS]>,
    pub(crate) head_form: BaseForm,
}

/// Targets inside a layer: all but the head.
pub(crate) const NUM_LAYER_TARGETS: usize = 7;

impl fmt::Debug for AdapterLoader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdapterLoader").finish_non_exhaustive()
    }
}

impl AdapterLoader {
    pub(crate) fn new(loader: AnyLoader) -> Self {
        Self(Arc::new(loader))
    }

    /// Opens a PEFT directory or a GGUF file, checks it against the model and brings it into memory.
    pub fn load(&self, path: &std::path::Path, limits: &AdapterLimits) -> Result<Adapter, ModelError> {
        match &*self.0 {
            AnyLoader::Cpu(loader) => loader.load(path, limits, AnyAdapter::Cpu),
            AnyLoader::Reference(loader) => loader.load(path, limits, AnyAdapter::Reference),
        }
    }
}

impl<B: Backend> BackendLoader<B> {
    fn load(
        &self,
        path: &std::path::Path,
        limits: &AdapterLimits,
        any: impl FnOnce(Arc<AdapterWeights<B>>) -> AnyAdapter,
    ) -> Result<Adapter, ModelError> {
        let opened = OpenedAdapter::open(path, &self.config, limits)?;
        let bytes = usize::try_from(opened.info().num_bytes_in_f32).unwrap_or(usize::MAX);
        let weights = pack_together_within(bytes, || self.weights(&opened))?;
        let num_bytes = weights.num_bytes;
        Ok(Adapter { weights: any(Arc::new(weights)), info: opened.info().clone(), num_bytes })
    }

    fn weights(&self, opened: &OpenedAdapter) -> Result<AdapterWeights<B>, ModelError> {
        let num_layers = self.config.num_layers();
        let base_order = self.config.rotaries.first().map_or(RopeStyle::Neox, |rotary| rotary.style);
        let order = if B::ROTATES_HALVES { RopeStyle::Neox } else { base_order };
        let layers = std::iter::repeat_with(AdapterLayer::empty).take(num_layers).collect();
        let mut weights = AdapterWeights::<B> { layers, head: [None], num_bytes: 0 };
        for (layer, target) in opened.targets() {
            let Some(low_rank) = opened.read(layer, target, order)? else { continue };
            let (form, place) = match layer {
                None => (self.head_form, &mut weights.head[0]),
                Some(layer) => {
                    let form = self.layer_forms[layer][target as usize].ok_or_else(|| {
                        ModelError::Unsupported(format!(
                            "layer {layer} has no matrix that {target:?} could stand beside"
                        ))
                    })?;
                    (form, self.place(&mut weights.layers[layer], target))
                }
            };
            let imported = B::import_low_rank(&self.import, low_rank, form)?;
            weights.num_bytes += (B::matrix_bytes(&imported.down) + B::matrix_bytes(&imported.up)) as u64;
            *place = Some(imported);
        }
        Ok(weights)
    }

    fn place<'a>(&self, layer: &'a mut AdapterLayer<B>, target: AdapterTarget) -> &'a mut Addend<B> {
        match target {
            AdapterTarget::Query => &mut layer.qkv[0],
            AdapterTarget::Key => &mut layer.qkv[1],
            AdapterTarget::Value => &mut layer.qkv[2],
            AdapterTarget::Output => &mut layer.output[0],
            AdapterTarget::Up if self.config.mlp.gated => &mut layer.gated[1],
            AdapterTarget::Gate | AdapterTarget::Up => &mut layer.gated[0],
            AdapterTarget::Down => &mut layer.down[0],
            AdapterTarget::Head => unreachable!("the head belongs to no layer"),
        }
    }
}
