//! Which names a caller may use, and what they stand for.
//!
//! Invariant: what a caller may not use (an adapter of other tenants, a name that its tenant's or its key's list does not
//! hold) is to it as if it did not exist: in listings, in errors, in what a name resolves to.

use std::time::Duration;

use bindery_engine::{AdapterError, AdapterLease, AdapterPool, adapters::AdapterSpec};
use bindery_gateway::{gateway::ListedModel, keys::NameOf, policy::route::LocalName};

use crate::{auth::Caller, error::ApiError, generation::Deadline, router::Serving, state::AppState};

/// Names listed in an error at most.
const MAX_OFFERED: usize = 32;

/// What `model` in a request stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    /// The name a request is answered under.
    pub(crate) name: String,
    pub(crate) kind: NamedKind,
}

/// The base or something beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NamedKind {
    Base,
    Adapter,
}

impl Caller {
    /// Adapters that the caller may name, in the order of their names; none before the model is loaded.
    pub(crate) fn adapters(&self, state: &AppState) -> Vec<AdapterSpec> {
        let mut specs = state.slot.model().map(|model| model.adapters.specs()).unwrap_or_default();
        specs.retain(|spec| spec.is_for(self.tenant.as_ref()) && self.may_name(state, &spec.name, NameOf::Adapter));
        specs
    }

    /// The base's names that the caller may use.
    pub(crate) fn bases<'a>(&'a self, state: &'a AppState) -> impl Iterator<Item = &'a String> {
        state.config.served_model_names.iter().filter(move |name| self.may_name(state, name, NameOf::Model))
    }

    /// Models beside the local ones that the caller may name.
    pub(crate) fn elsewhere(&self, state: &AppState) -> Vec<ListedModel> {
        let Some(gateway) = &state.config.gateway else { return Vec::new() };
        gateway.models(self.tenant.as_deref(), self.grant.as_deref(), &|name| self.local_name(state, name))
    }

    /// Likewise for the router.
    pub(crate) fn local_name(&self, state: &AppState, name: &str) -> LocalName {
        match self.kind_of(state, name) {
            Some(NamedKind::Base) => LocalName::Base,
            Some(NamedKind::Adapter) => LocalName::Adapter,
            None => LocalName::Unknown,
        }
    }

    /// By the lists of its tenant and of its key.
    fn may_name(&self, state: &AppState, name: &str, of: NameOf) -> bool {
        state
            .config
            .gateway
            .as_ref()
            .is_none_or(|gateway| gateway.may_name(self.tenant.as_deref(), self.grant.as_deref(), (name, of)))
    }

    /// What a name stands for to the caller; None: nothing, or nothing yet.
    pub(crate) fn kind_of(&self, state: &AppState, name: &str) -> Option<NamedKind> {
        if state.config.served_model_names.iter().any(|base| base == name) {
            return self.may_name(state, name, NameOf::Model).then_some(NamedKind::Base);
        }
        let spec = state.slot.model()?.adapters.spec(name)?;
        let is_seen = spec.is_for(self.tenant.as_ref()) && self.may_name(state, name, NameOf::Adapter);
        is_seen.then_some(NamedKind::Adapter)
    }

    pub(crate) fn unknown(&self, state: &AppState, asked: String) -> ApiError {
        let adapters = self.adapters(state).into_iter().map(|spec| spec.name);
        let elsewhere = self.elsewhere(state).into_iter().map(|model| model.name);
        let names = self.bases(state).cloned().chain(adapters).chain(elsewhere);
        let offered = names.take(MAX_OFFERED).collect();
        ApiError::UnknownModel { asked, offered }
    }
}

impl Serving {
    /// What a request names: the first of the base's names where it names nothing. The base's own names come before
    /// adapters'.
    pub(crate) fn resolve(&self, state: &AppState, asked: Option<String>) -> Result<Named, ApiError> {
        let Some(asked) = asked else {
            return Ok(Named { name: state.config.primary_model_name().to_owned(), kind: NamedKind::Base });
        };
        match self.caller.kind_of(state, &asked) {
            Some(kind) => Ok(Named { name: asked, kind }),
            None => Err(self.caller.unknown(state, asked)),
        }
    }

    /// Likewise for the routes that no router stands before: the base, too, has to be one that the caller may use.
    pub(crate) fn resolve_or_base(&self, state: &AppState, asked: Option<String>) -> Result<Named, ApiError> {
        self.resolve(state, Some(asked.unwrap_or_else(|| state.config.primary_model_name().to_owned())))
    }

    /// A hold on the newest version of what was named, when it is there; None for the base.
    pub(crate) async fn lease(
        &self,
        state: &AppState,
        named: &Named,
        timeout: Option<Duration>,
    ) -> Result<Option<AdapterLease>, ApiError> {
        if named.kind == NamedKind::Base {
            return Ok(None);
        }
        let pool: &AdapterPool = &self.model.adapters;
        let lease = pool.acquire(&named.name, self.caller.tenant.as_ref());
        let lease = match timeout {
            None => lease.await,
            Some(timeout) => tokio::time::timeout(timeout, lease).await.map_err(|_| Deadline::error(timeout))?,
        };
        match lease {
            Ok(lease) => Ok(Some(lease)),
            // Unloaded a moment ago.
            Err(AdapterError::Unknown { name }) => Err(self.caller.unknown(state, name)),
            // Which file, and what is wrong with it, is for whoever runs the server: it is in the log, and in /v1/adapters.
            Err(AdapterError::Unreadable { name, .. }) => {
                let message = format!(
                    "the adapter {name:?} cannot be loaded: its files are missing, broken or being replaced; whoever runs this \
                     server finds the reason in its log and at GET /v1/adapters"
                );
                Err(ApiError::AdapterUnreadable { message })
            }
            Err(AdapterError::NoRoom { .. }) => {
                let message = format!(
                    "the adapter {:?} finds no room beside those that are pinned: unpin one, or start the server with a \
                     higher --max-loras",
                    named.name
                );
                Err(ApiError::AdapterUnreadable { message })
            }
            Err(error) => Err(ApiError::from_adapter(&error, "model")),
        }
    }
}
