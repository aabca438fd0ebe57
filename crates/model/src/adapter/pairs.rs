//! Tensors to pairs, and pairs to the base's matrices, every size checked.
//!
//! A module is one matrix of the base or several in one (fused projections): of those each takes its own rows of B, and all
//! share A. It must not know numbers. Its invariant: a [`Part`] in the table lies within its pair's B, whose columns are the
//! rows of its A.

use std::collections::BTreeMap;

use super::{
    AdapterLimits, AdapterTarget, Described,
    names::{self, Half, Named},
};
use crate::{
    ModelError,
    config::DecoderConfig,
    weights::{
        LayerTensor, RowsAt, TensorRole,
        loose::LooseTensors,
        modules::{Module, ModuleNames, Parts},
    },
};

/// A place of the table: layers in order, the head behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot(usize, AdapterTarget);

/// Where the head stands.
const AFTER_LAYERS: usize = usize::MAX;

impl Slot {
    /// None for a head in a layer, or anything else outside of one.
    pub(super) fn new(layer: Option<usize>, target: AdapterTarget) -> Option<Self> {
        match (layer, target) {
            (None, AdapterTarget::Head) => Some(Self(AFTER_LAYERS, target)),
            (Some(AFTER_LAYERS) | None, _) | (Some(_), AdapterTarget::Head) => None,
            (Some(layer), _) => Some(Self(layer, target)),
        }
    }

    pub(super) fn layer(self) -> Option<usize> {
        (self.0 != AFTER_LAYERS).then_some(self.0)
    }

    pub(super) fn target(self) -> AdapterTarget {
        self.1
    }

    fn of_role(role: TensorRole) -> Option<Self> {
        use LayerTensor as T;
        let (layer, target) = match role {
            TensorRole::Head => (None, AdapterTarget::Head),
            TensorRole::Layer(layer, tensor) => {
                let target = match tensor {
                    T::Q => AdapterTarget::Query,
                    T::K => AdapterTarget::Key,
                    T::V => AdapterTarget::Value,
                    T::O => AdapterTarget::Output,
                    T::Gate => AdapterTarget::Gate,
                    T::Up => AdapterTarget::Up,
                    T::Down => AdapterTarget::Down,
                    _ => return None,
                };
                (Some(layer), target)
            }
            _ => return None,
        };
        Self::new(layer, target)
    }
}

/// A and B of one module.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) module: String,
    /// Names of its tensors.
    pub(super) a: String,
    pub(super) b: String,
    pub(super) rank: usize,
    pub(super) inputs: usize,
    /// Of the whole module.
    pub(super) outputs: usize,
    pub(super) scaling: f64,
}

/// The rows of a pair's B that are one matrix of the base.
#[derive(Debug)]
pub(super) struct Part {
    pair: usize,
    pub(super) rows: usize,
    pub(super) rows_at: RowsAt,
}

/// All pairs, and which matrix each part of them changes.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    pairs: Vec<Pair>,
    slots: BTreeMap<Slot, Part>,
}

impl Pairs {
    pub(super) fn get(&self, slot: Slot) -> Option<(&Pair, &Part)> {
        self.slots.get(&slot).map(|part| (&self.pairs[part.pair], part))
    }

    /// In order.
    pub(super) fn slots(&self) -> impl Iterator<Item = (Slot, &Part)> {
        self.slots.iter().map(|(&slot, part)| (slot, part))
    }

    pub(super) fn max_rank(&self) -> usize {
        self.pairs.iter().map(|pair| pair.rank).max().unwrap_or(0)
    }

    /// "query, value".
    pub(super) fn describe(&self) -> String {
        let targets: std::collections::BTreeSet<_> = self.slots.keys().map(|slot| slot.target()).collect();
        targets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }

    pub(super) fn num_parameters(&self) -> u64 {
        self.pairs.iter().map(|pair| pair.rank as u64 * (pair.inputs as u64 + pair.outputs as u64)).sum()
    }

    pub(super) fn num_bytes(&self, tensors: &LooseTensors) -> Result<u64, ModelError> {
        let names = self.pairs.iter().flat_map(|pair| [&pair.a, &pair.b]);
        names.map(|name| tensors.matrix(name).map(|view| view.num_bytes())).sum()
    }

    /// A is counted once for each matrix that has it.
    pub(super) fn num_bytes_in_f32(&self) -> u64 {
        let bytes = |part: &Part| {
            let pair = &self.pairs[part.pair];
            pair.rank as u64 * (pair.inputs as u64 + part.rows as u64) * size_of::<f32>() as u64
        };
        self.slots.values().map(bytes).sum()
    }
}

/// The two halves of a module, by the names of their tensors.
#[derive(Default)]
struct Halves<'a> {
    a: Option<&'a str>,
    b: Option<&'a str>,
}

/// All pairs of a file, checked against the base.
pub(super) fn collect(
    tensors: &LooseTensors,
    described: &Described,
    names: ModuleNames,
    base: &DecoderConfig,
    limits: &AdapterLimits,
) -> Result<Pairs, ModelError> {
    let collector = Collector { tensors, described, names, base, limits };
    let mut pairs = Pairs::default();
    for (module, halves) in collector.modules()? {
        collector.add(&mut pairs, module, &halves)?;
    }
    if pairs.pairs.is_empty() {
        return Err(collector.bad("there is no lora_A and lora_B in this file, so it changes nothing".to_owned()));
    }
    let bytes = pairs.num_bytes_in_f32();
    if bytes > limits.max_bytes {
        let what = format!(
            "the adapter takes {bytes} bytes in f32, the limit is {}; raise the limit, or train it with a smaller rank or \
             fewer target modules",
            limits.max_bytes
        );
        return Err(collector.bad(what));
    }
    Ok(pairs)
}

struct Collector<'a> {
    tensors: &'a LooseTensors,
    described: &'a Described,
    names: ModuleNames,
    base: &'a DecoderConfig,
    limits: &'a AdapterLimits,
}

impl<'a> Collector<'a> {
    fn bad(&self, what: String) -> ModelError {
        ModelError::bad_file(self.tensors.path(), what)
    }

    /// What this base is called in messages.
    fn base_name(&self) -> String {
        format!("the base ({}, {} layers)", self.base.architecture, self.base.num_layers())
    }

    /// The halves of every module.
    fn modules(&self) -> Result<BTreeMap<&'a str, Halves<'a>>, ModelError> {
        let mut modules: BTreeMap<&str, Halves<'_>> = BTreeMap::new();
        let mut adapter = None;
        for name in self.tensors.names() {
            let named = match self.names {
                ModuleNames::HuggingFace => names::in_peft(name),
                ModuleNames::Gguf => names::in_gguf(name),
            };
            let (module, half, of_adapter) = match named {
                Named::Half { module, half, adapter } => (module, half, adapter),
                Named::BaseCopy { module } => {
                    self.check_copy(name, module)?;
                    continue;
                }
                Named::Other(why) => {
                    return Err(ModelError::unsupported(self.tensors.path(), format!("tensor {name:?} is {why}")));
                }
            };
            if let (Some(first), Some(second)) = (adapter, of_adapter)
                && first != second
            {
                let what =
                    format!("tensors of two adapters are in this file, {first:?} and {second:?}; save them apart");
                return Err(self.bad(what));
            }
            adapter = adapter.or(of_adapter);
            let halves = modules.entry(module).or_default();
            let place = match half {
                Half::A => &mut halves.a,
                Half::B => &mut halves.b,
            };
            if let Some(first) = place.replace(name) {
                return Err(self.bad(format!("tensors {first:?} and {name:?} are the same half of {module:?}")));
            }
        }
        Ok(modules)
    }

    /// peft saves the head's own weight beside its pair. It is the base's, so it is left alone, unless it has another size.
    fn check_copy(&self, name: &str, module: &str) -> Result<(), ModelError> {
        let shape = self.tensors.shape(name).unwrap_or_default();
        let fits = match self.names.find(self.base, module) {
            Module::Known(ways) => ways.iter().any(|way| way.shape == shape.as_slice()),
            // What stands beside it is refused for what it is.
            Module::Embedding => shape == [self.base.vocab_size, self.base.hidden_size],
            _ => false,
        };
        if fits {
            return Ok(());
        }
        let what = format!(
            "tensor {name:?} of shape {shape:?} is a weight of the base that {} does not have in this shape (a vocabulary \
             resized in training?)",
            self.base_name()
        );
        Err(self.bad(what))
    }

    fn add(&self, pairs: &mut Pairs, module: &str, halves: &Halves<'_>) -> Result<(), ModelError> {
        let (a, b) = match (halves.a, halves.b) {
            (Some(a), Some(b)) => (a, b),
            (Some(only), None) => {
                return Err(self.bad(format!("tensor {only:?} has no lora_B beside it; save the adapter again")));
            }
            (None, only) => {
                return Err(self.bad(format!(
                    "tensor {:?} has no lora_A beside it; save the adapter again",
                    only.unwrap_or(module)
                )));
            }
        };
        let ways = self.find(a, module)?;
        let [rank, inputs] = self.shape(a)?;
        let [outputs, columns] = self.shape(b)?;
        self.limits.check_rank(rank).map_err(|what| self.bad(format!("tensor {a:?}: {what}")))?;
        if columns != rank {
            return Err(self.bad(format!(
                "tensor {a:?} of shape [{rank}, {inputs}] and tensor {b:?} of shape [{outputs}, {columns}] do not fit each other: \
                 rows of the first are columns of the second"
            )));
        }
        let Some(way) = ways.iter().find(|way| way.shape == [outputs, inputs]) else {
            let shapes = ways.iter().map(|way| format!("{} x {}", way.shape[0], way.shape[1])).collect::<Vec<_>>();
            return Err(self.bad(format!(
                "tensors {a:?} of shape [{rank}, {inputs}] and {b:?} of shape [{outputs}, {columns}] change a matrix of {outputs} x \
                 {inputs}; in {} it is {}: this adapter was made for another model",
                self.base_name(),
                shapes.join(" or ")
            )));
        };
        let scaling = self.scaling(module, rank, way)?;
        let pair = pairs.pairs.len();
        for part in &way.parts {
            let slot = Slot::of_role(part.role).expect("modules hold nothing but an adapter's targets");
            let new = Part { pair, rows: part.rows, rows_at: part.rows_at };
            if let Some(other) = pairs.slots.insert(slot, new) {
                return Err(self.bad(format!(
                    "{module:?} and {:?} both change the {} of one layer",
                    pairs.pairs[other.pair].module,
                    slot.target()
                )));
            }
        }
        pairs.pairs.push(Pair {
            module: module.to_owned(),
            a: a.to_owned(),
            b: b.to_owned(),
            rank,
            inputs,
            outputs,
            scaling,
        });
        Ok(())
    }

    /// What the module of tensor `name` is on this base.
    fn find(&self, name: &str, module: &str) -> Result<Vec<Parts>, ModelError> {
        match self.names.find(self.base, module) {
            Module::Known(ways) => Ok(ways),
            Module::NoSuchLayer(layer) => {
                let base = self.base_name();
                Err(self.bad(format!(
                    "tensor {name:?} is of layer {layer}, which {base} does not have: this adapter was made \
                                      for another model"
                )))
            }
            Module::Experts => Err(ModelError::unsupported(
                self.tensors.path(),
                format!(
                    "tensor {name:?} changes a router or experts, which is not supported yet; adapters of the attention of \
                     mixtures are, and others can be merged into the base with peft's merge_and_unload"
                ),
            )),
            Module::Embedding => Err(ModelError::unsupported(
                self.tensors.path(),
                format!("tensor {name:?} changes the embeddings, which is not supported; train without them"),
            )),
            Module::Unknown => Err(self.bad(format!(
                "tensor {name:?} changes {module:?}, which {} does not have; what an adapter may change in it: {}",
                self.base_name(),
                self.names.known(self.base)
            ))),
        }
    }

    /// Of a matrix in a format that can be read.
    fn shape(&self, name: &str) -> Result<[usize; 2], ModelError> {
        let view = self.tensors.matrix(name)?;
        Ok([view.rows, view.cols])
    }

    fn scaling(&self, module: &str, rank: usize, way: &Parts) -> Result<f64, ModelError> {
        let scaling = match self.described {
            Described::Gguf(file) => file.scaling(rank),
            Described::Peft(config) => {
                let layer = match way.parts[0].role {
                    TensorRole::Layer(layer, _) => Some(layer),
                    _ => None,
                };
                config.check_targeted(module, layer).map_err(|what| self.bad(what))?;
                config.scaling(module, rank).map_err(|what| self.bad(what))?
            }
        };
        if (scaling as f32).is_finite() {
            return Ok(scaling);
        }
        Err(self.bad(format!("{module:?} is scaled by {scaling:e}, which f32 does not hold; lower lora_alpha")))
    }
}
