//! What this machine would answer to, and how long a prompt its model takes, without loading it.
//!
//! It must not know the request. Invariant: an adapter that a tenant may not see stands for nothing to it.

use bindery_engine::adapters::adapters_in;
use bindery_gateway::policy::route::LocalName;
use bindery_hub::{ModelRef, inventory};

use crate::{
    commands::check::environment,
    gateway::ConfigFile,
    local,
    settings::{ModelSettings, merge},
};

/// Names that this machine serves, as the config and the environment say.
pub(super) struct LocalNames {
    base: Vec<String>,
    adapters: Vec<Adapter>,
    /// Tokens of prompt and answer; None where the model's files are not here and nothing limits it.
    pub(super) max_model_len: Option<usize>,
}

struct Adapter {
    name: String,
    tenants: Option<Vec<String>>,
}

impl LocalNames {
    pub(super) async fn find(file: &ConfigFile) -> anyhow::Result<Self> {
        let settings = merge(environment()?, file.settings.clone());
        let model = ModelSettings::new(settings.model.clone(), &settings.engine)?;
        let reference = ModelRef::parse(&model.source)?;
        let base = if settings.server.served_model_name.is_empty() {
            vec![reference.served_name()]
        } else {
            settings.server.served_model_name.clone()
        };
        let path = inventory::locate_model(&reference, &local::fetch_options(&model)?).ok().flatten();
        let max_model_len = match path {
            // What is wrong with a model's files is `check`'s to say.
            Some(path) => local::check(path, &model.local).await.ok().map(|report| report.max_model_len),
            None => None,
        };
        let given = settings.adapters.all().map(|adapter| Adapter { name: adapter.name.clone(), tenants: None });
        let tables = settings.tables.adapters.iter();
        let tables = tables.map(|table| Adapter { name: table.name.clone(), tenants: table.tenants.clone() });
        let found = settings.tables.folders.iter().flat_map(|folder| {
            let found = adapters_in(std::path::Path::new(&folder.path)).unwrap_or_default();
            found.into_iter().map(|(name, _)| Adapter { name, tenants: folder.tenants.clone() })
        });
        let adapters = given.chain(tables).chain(found).collect();
        Ok(Self { base, adapters, max_model_len: max_model_len.or(model.local.max_model_len) })
    }

    /// What a request that names no model gets.
    pub(super) fn primary(&self) -> &str {
        self.base.first().map_or("", String::as_str)
    }

    /// What a name stands for to a tenant.
    pub(super) fn stands_for(&self, name: &str, tenant: &str) -> LocalName {
        if self.base.iter().any(|base| base == name) {
            return LocalName::Base;
        }
        // The first of a name counts: what a folder has is behind what was named.
        match self.adapters.iter().find(|adapter| adapter.name == name) {
            Some(adapter) if adapter.tenants.as_ref().is_none_or(|all| all.iter().any(|one| one == tenant)) => {
                LocalName::Adapter
            }
            _ => LocalName::Unknown,
        }
    }

    /// For people.
    pub(super) fn described(&self) -> String {
        self.base.join(", ")
    }
}
