//! Where the model appears once it is loaded.
//!
//! The port opens before the weights load, so that a probe can tell "loading" from "dead". Invariant: a slot changes
//! once, from loading to ready or to failed.

use std::sync::{Arc, OnceLock};

use bindery_engine::LocalModel;

use crate::error::ApiError;

/// Where `serve` puts the model once it is loaded; until then `/ready` and the model routes answer 503. Clones share it.
#[derive(Clone, Default)]
pub struct ModelSlot {
    content: Arc<OnceLock<Result<Arc<LocalModel>, String>>>,
}

/// What a slot holds.
pub(crate) enum SlotState<'a> {
    Loading,
    Ready(&'a Arc<LocalModel>),
    Failed(&'a str),
}

impl ModelSlot {
    /// Opens the model routes. A slot that is no longer loading stays as it is.
    pub fn set(&self, model: Arc<LocalModel>) {
        let _ = self.content.set(Ok(model));
    }

    /// The model will not come: `message` says why, to whoever asks. A slot that is no longer loading stays as it is.
    pub fn fail(&self, message: String) {
        let _ = self.content.set(Err(message));
    }

    pub(crate) fn state(&self) -> SlotState<'_> {
        match self.content.get() {
            None => SlotState::Loading,
            Some(Ok(model)) => SlotState::Ready(model),
            Some(Err(message)) => SlotState::Failed(message),
        }
    }

    /// The model, or what a request that needs it is told.
    pub(crate) fn ready(&self) -> Result<&Arc<LocalModel>, ApiError> {
        match self.state() {
            SlotState::Ready(model) => Ok(model),
            SlotState::Loading => Err(ApiError::Loading),
            SlotState::Failed(message) => Err(ApiError::LoadFailed { message: message.to_owned() }),
        }
    }

    pub(crate) fn model(&self) -> Option<&Arc<LocalModel>> {
        match self.state() {
            SlotState::Ready(model) => Some(model),
            SlotState::Loading | SlotState::Failed(_) => None,
        }
    }
}
