//! WHAT a step computes: weights, one decoder over a few coarse operations, paged KV.
//!
//! It must not know a request, a tenant or a clock: a batch of token ids with block tables comes in, logits go out.
//!
//! Reading order: [`batch`] what comes in, [`model`] the door, `decoder` the computation written once, `backend` who
//! carries it out, `rope` and `alibi` what positions do, [`config`] what a family is, [`weights`] where tensors come from,
//! [`adapter`] what is added to them for one request and not for another, [`report`] what all that takes, `attention_work` what is
//! compared with roofs, [`threads`] and [`memory`] what the machine has.

pub mod adapter;
pub mod batch;
pub mod model;

mod alibi;
mod attention_work;
mod backend;
mod caches;
mod decoder;
mod licence;
mod rope;

pub mod config;
pub mod error;
pub mod machine;
pub mod memory;
pub mod report;
pub mod threads;
pub mod weights;

pub use adapter::{
    Adapter, AdapterFormat, AdapterInfo, AdapterLimits, AdapterLoader, AdapterTarget, LowRank, OpenedAdapter,
};
pub use attention_work::{AttentionShape, AttentionWork};
pub use batch::{BatchLimits, BatchSequence, ForwardBatch};
pub use error::ModelError;
pub use licence::declared_licence;
pub use machine::{Gauge, Machine, Passes, Roofs};
pub use model::{
    BackendKind, Dtype, KvCacheDtype, LoadOptions, Model, ModelInfo, ModelPhase, OpenedModel, ProductWeights, Quantize,
    StepModel, make_room,
};
pub use report::{ModelReport, TensorGroup, TensorPart};
pub use rope::RopeRegimes;
