//! `[[upstreams]]`: who is asked, how, for how much, and what its models can.
//!
//! Opens nothing and asks nobody. Invariant: no text of it repeats what may be a key or a password.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use toml::Spanned;

use super::{Builder, CredentialSource, Upstream, UpstreamConfig};
use crate::{
    config::{Patience, tables::Described},
    ledger::BudgetScope,
    providers::{AzureForm, Catalogue, ModelEntry, Provider, catalogue::ModelOverride},
};

impl Builder<'_> {
    pub(super) fn upstreams(&mut self, tables: &[Spanned<Upstream>], catalogue: &Catalogue) -> Vec<UpstreamConfig> {
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        let mut built = Vec::new();
        for table in tables {
            let name = &table.get_ref().name;
            let line = self.line(&name.span());
            if let Some(first) = seen.insert(name.get_ref(), line) {
                let message = format!("the upstream {:?} is in line {first} already", name.get_ref());
                self.problem(&name.span(), message, "give each a name of its own");
            }
            built.extend(self.upstream(table, catalogue));
        }
        built
    }

    fn upstream(&mut self, table: &Spanned<Upstream>, catalogue: &Catalogue) -> Option<UpstreamConfig> {
        let upstream = table.get_ref();
        let name = upstream.name.get_ref();
        let is_plain = |text: &str| {
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if !is_plain(name) || name == "local" {
            let message = format!("{name:?} cannot name an upstream");
            self.problem(&upstream.name.span(), message, "use letters, digits, -, _ and ., and not the word local");
        }
        let mut models = self.models(upstream, catalogue);
        let provider = self.provider(upstream);
        for model in &mut models {
            if let Some(provider) = &provider {
                model.capabilities = model.capabilities.clone().carried_by(provider);
            }
            self.upstream_models.insert(format!("{name}/{}", model.id));
        }
        let budgets = self.budgets(upstream.budget.as_ref(), &BudgetScope::Upstream(name.clone()));
        let credential = self.credential(table);
        let provider = provider?;
        self.check_base_url(upstream);
        if upstream.base_url.is_none() && provider.default_base_url().is_none() {
            let message = format!("the upstream {name:?} of kind {:?} has no base_url", upstream.kind.get_ref());
            self.problem(&table.span(), message, "add base_url: where the server answers");
        }
        let patience = self.patience(upstream)?;
        Some(UpstreamConfig {
            name: name.as_str().into(),
            provider,
            base_url: upstream.base_url.as_ref().map(|url| url.get_ref().clone()),
            credential: credential?,
            account: (upstream.organization.clone(), upstream.project.clone()),
            models,
            budgets,
            patience,
        })
    }

    fn check_base_url(&mut self, upstream: &Upstream) {
        let Some(base_url) = &upstream.base_url else { return };
        let span = base_url.span();
        match url::Url::parse(base_url.get_ref()) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => {}
            // What stands there may hold a password, so it is not repeated.
            Ok(_) | Err(_) => {
                self.problem(&span, "base_url is no URL of a server", "write it with its scheme: https://HOST/v1");
            }
        }
    }

    /// Ours where nothing is said.
    fn patience(&mut self, upstream: &Upstream) -> Option<Patience> {
        let ours = Patience::default();
        let mut read = |asked: &Option<Spanned<String>>, ours| match asked {
            None => Some(ours),
            Some(text) => {
                let time = self.duration(text)?;
                if time.is_zero() {
                    self.problem(&text.span(), "no time at all", "write how long to wait, as 30s");
                    return None;
                }
                Some(time)
            }
        };
        let connect = read(&upstream.connect_timeout, ours.connect);
        let first_byte = read(&upstream.first_byte_timeout, ours.first_byte);
        let idle = read(&upstream.idle_timeout, ours.idle);
        let max_attempts = upstream.max_attempts.as_ref().map_or(ours.max_attempts, |count| *count.get_ref());
        if let Some(count) = upstream.max_attempts.as_ref().filter(|count| !(1..=10).contains(count.get_ref())) {
            let message = format!("max_attempts is {}, the limits are 1 and 10", count.get_ref());
            self.problem(&count.span(), message, "1 tries nothing again");
        }
        Some(Patience { connect: connect?, first_byte: first_byte?, idle: idle?, max_attempts })
    }

    fn provider(&mut self, upstream: &Upstream) -> Option<Provider> {
        let azure = || {
            let dated = upstream.api_version.clone();
            Provider::Azure(dated.map_or(AzureForm::V1, |api_version| AzureForm::Dated { api_version }))
        };
        let provider = match upstream.kind.get_ref().as_str() {
            "openai" => Provider::OpenAi,
            "anthropic" => Provider::Anthropic,
            "gemini" => Provider::Gemini,
            "azure" => azure(),
            "openai-compatible" => Provider::Compatible,
            other => {
                let message = format!("{other:?} is no kind of upstream");
                let hint = "it must be openai, anthropic, gemini, azure or openai-compatible";
                self.problem(&upstream.kind.span(), message, hint);
                return None;
            }
        };
        if upstream.api_version.is_some() && !matches!(provider, Provider::Azure(_)) {
            self.problem(&upstream.kind.span(), "api_version belongs to the kind azure alone", "remove it");
        }
        Some(provider)
    }

    fn credential(&mut self, table: &Spanned<Upstream>) -> Option<CredentialSource> {
        let upstream = table.get_ref();
        let mut given = Vec::new();
        for (name, source) in [(&upstream.api_key_env, true), (&upstream.token_env, false)] {
            let Some(name) = name else { continue };
            self.check_variable(name);
            let variable = name.get_ref().clone();
            given.push(if source { CredentialSource::KeyEnv(variable) } else { CredentialSource::TokenEnv(variable) });
        }
        given.extend(upstream.api_key_file.as_ref().map(|path| CredentialSource::KeyFile(PathBuf::from(path))));
        given.extend(upstream.token_file.as_ref().map(|path| CredentialSource::TokenFile(PathBuf::from(path))));
        if given.len() > 1 {
            let message = format!("the upstream {:?} has several credentials", upstream.name.get_ref());
            self.problem(&table.span(), message, "keep one of api_key_env, api_key_file, token_env, token_file");
            return None;
        }
        Some(given.pop().unwrap_or(CredentialSource::None))
    }

    /// What stands there may be the key itself, so it is not repeated.
    pub(super) fn check_variable(&mut self, name: &Spanned<String>) {
        let text = name.get_ref();
        let is_variable = !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && !text.starts_with(|first: char| first.is_ascii_digit());
        if !is_variable {
            let hint = "put the key into the environment, and the variable's name here, like OPENAI_API_KEY";
            self.problem(&name.span(), "this is no name of an environment variable", hint);
        }
    }

    fn models(&mut self, upstream: &Upstream, catalogue: &Catalogue) -> Vec<ModelEntry> {
        if upstream.models.get_ref().is_empty() {
            let message = format!("the upstream {:?} offers no model", upstream.name.get_ref());
            self.problem(&upstream.models.span(), message, "list the models that may be asked of it");
        }
        let listed: BTreeSet<&str> = upstream.models.get_ref().iter().map(|name| name.get_ref().as_str()).collect();
        for name in upstream.prices.keys().chain(upstream.deployments.keys()).chain(upstream.describe.keys()) {
            if !listed.contains(name.as_str()) {
                let message = format!(
                    "{name:?} has a price, a deployment or a description, and is not among the models of this upstream"
                );
                self.problem(&upstream.models.span(), message, "add it to models, or correct the name");
            }
        }
        let changes: Vec<ModelOverride> = listed
            .iter()
            .map(|&name| {
                let Described { like, max_input, max_output } =
                    upstream.describe.get(name).cloned().unwrap_or_default();
                ModelOverride {
                    id: name.to_owned(),
                    like,
                    deployment: upstream.deployments.get(name).cloned(),
                    max_input,
                    max_output,
                    price: upstream.prices.get(name).copied(),
                }
            })
            .collect();
        match catalogue.clone().with_overrides(&changes) {
            Ok(catalogue) => listed
                .iter()
                .map(|name| catalogue.find_ever(name).cloned().unwrap_or_else(|| ModelEntry::open(name)))
                .collect(),
            Err(error) => {
                self.problem(&upstream.models.span(), error.to_string(), "correct the model's entry");
                Vec::new()
            }
        }
    }
}
