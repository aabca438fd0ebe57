//! What the tables mean, and where they contradict each other or themselves.
//!
//! Knows every name in the file; it must not know the world outside of it. Invariant: all mistakes of a file are reported,
//! in the order of their lines, not only the first. [`reach`] finds what is well-formed and leads nowhere.

mod reach;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use toml::Spanned;

use super::{
    CredentialSource, GatewayConfig, Patience, Problem, StoreConfig, TenantConfig, UpstreamConfig,
    tables::{Ceilings, Described, File, Identity, Link, Overflow, Rule, Tenant, To, Upstream, When, Words, line_of},
};
use crate::{
    audit::config::KeepContents,
    gateway::facts,
    guardrails::{Policy, language, no_secrets},
    keys::{IssuerOptions, SigningAlgorithm, TenantFrom},
    ledger::{Budget, BudgetScope, Period},
    money::Money,
    names::TenantId,
    policy::{
        Choice, Condition, PrivacyClass, Router, Target, TenantRouting, TimeOfDay, VirtualModel,
        route::{Otherwise, Overflow as OverflowRule, WEEKDAYS},
    },
    providers::{AzureForm, Catalogue, ModelEntry, Provider, UnmappedFields, catalogue::ModelOverride},
    store::Durability,
};

/// Clock skew that tokens are forgiven.
const LEEWAY: Duration = Duration::from_mins(1);

/// What has been found wrong so far, and the names that may be used.
struct Builder<'a> {
    text: &'a str,
    problems: Vec<Problem>,
    upstreams: BTreeSet<Arc<str>>,
    /// As `UPSTREAM/MODEL`.
    upstream_models: BTreeSet<String>,
    tenants: BTreeSet<String>,
    virtual_models: BTreeSet<String>,
    /// Of the tenants that could be read.
    routings: BTreeMap<String, TenantRouting>,
}

pub(super) fn build(file: File, text: &str) -> Result<GatewayConfig, Vec<Problem>> {
    let mut builder = Builder {
        text,
        problems: Vec::new(),
        upstreams: file.upstreams.iter().map(|table| table.get_ref().name.get_ref().as_str().into()).collect(),
        upstream_models: BTreeSet::new(),
        tenants: file.tenants.iter().map(|table| table.get_ref().name.get_ref().clone()).collect(),
        virtual_models: file.routes.iter().map(|table| table.get_ref().model.get_ref().clone()).collect(),
        routings: BTreeMap::new(),
    };
    let config = builder.file(file);
    builder.problems.sort_by_key(|problem| problem.line);
    match config {
        Some(config) if builder.problems.is_empty() => Ok(config),
        _ => Err(builder.problems),
    }
}

impl Builder<'_> {
    fn line(&self, span: &Range<usize>) -> usize {
        line_of(self.text, span.start)
    }

    fn problem(&mut self, span: &Range<usize>, message: impl Into<String>, hint: impl Into<String>) {
        let line = Some(self.line(span));
        self.problems.push(Problem { line, message: message.into(), hint: Some(hint.into()) });
    }

    fn file(&mut self, file: File) -> Option<GatewayConfig> {
        let catalogue = match Catalogue::built_in() {
            Ok(catalogue) => catalogue,
            Err(error) => {
                self.problem(&(0..0), format!("the built-in table of models is broken: {error}"), "report this");
                return None;
            }
        };
        let store = file.store.as_ref().and_then(|table| self.store(table));
        let upstreams = self.upstreams(&file.upstreams, &catalogue);
        let (cost, reference) = self.local(file.local.as_ref(), &upstreams);
        self.guardrails(&file);
        let tenants = self.tenants(&file);
        self.contents(&file);
        let router = self.router(&file, &upstreams);
        if store.is_none()
            && tenants.iter().any(|tenant| !tenant.budgets.is_empty() || !tenant.overflow_budgets.is_empty())
        {
            let span = file.tenants.first().map_or(0..0, Spanned::span);
            self.problem(
                &span,
                "a budget needs a store, and there is no [store]",
                "add [store] with url = \"sqlite://bindery.db\"",
            );
        }
        let issuers = file.identity.iter().filter_map(|table| self.issuer(table)).collect();
        Some(GatewayConfig {
            store,
            local_cost_per_hour: cost,
            reference,
            upstreams,
            tenants,
            router,
            guardrails: file.guardrails.into_iter().map(Spanned::into_inner).collect(),
            audit: file.audit,
            issuers,
        })
    }

    fn store(&mut self, table: &Spanned<super::tables::Store>) -> Option<StoreConfig> {
        let store = table.get_ref();
        match store.url.get_ref().parse() {
            Ok(url) => Some(StoreConfig {
                url,
                durability: store.durability.unwrap_or(Durability::PowerLoss),
                max_bytes: store.max_bytes,
                keep: store.keep_days.map(|days| Duration::from_secs(days * 24 * 3600)),
                on_failure: store.on_failure,
            }),
            Err(error) => {
                self.problem(
                    &store.url.span(),
                    error.to_string(),
                    "write it as sqlite://FILE or postgres://USER@HOST/DATABASE",
                );
                None
            }
        }
    }

    fn local(
        &mut self,
        table: Option<&Spanned<super::tables::Local>>,
        upstreams: &[UpstreamConfig],
    ) -> (Option<Money>, Option<ModelEntry>) {
        let Some(local) = table.map(Spanned::get_ref) else { return (None, None) };
        let cost = local.cost_per_hour.as_ref().and_then(|cost| self.money(*cost.get_ref(), &cost.span()));
        let reference = local.compare_with.as_ref().and_then(|name| {
            let found = upstreams.iter().find_map(|upstream| {
                let model = name.get_ref().strip_prefix(&*upstream.name)?.strip_prefix('/')?;
                upstream.models.iter().find(|entry| entry.id == model).cloned()
            });
            if found.is_none() {
                self.no_target(name.get_ref(), &name.span());
            }
            found
        });
        (cost, reference)
    }

    fn money(&mut self, dollars: f64, span: &Range<usize>) -> Option<Money> {
        let money = Money::from_dollars(dollars).filter(|money| *money >= Money::ZERO);
        if money.is_none() {
            self.problem(span, format!("{dollars} is no amount of dollars"), "write a number from 0 on, as 12.50");
        }
        money
    }

    fn budgets(&mut self, table: Option<&Spanned<Ceilings>>, scope: &BudgetScope) -> Vec<Budget> {
        let Some(table) = table else { return Vec::new() };
        let Ceilings { usd_per_day, usd_per_month } = *table.get_ref();
        let both = [(Period::Day, usd_per_day), (Period::Month, usd_per_month)];
        both.into_iter()
            .filter_map(|(per, dollars)| {
                let ceiling = self.money(dollars?, &table.span())?;
                Some(Budget { scope: scope.clone(), per, ceiling })
            })
            .collect()
    }

    // --- upstreams ---

    fn upstreams(&mut self, tables: &[Spanned<Upstream>], catalogue: &Catalogue) -> Vec<UpstreamConfig> {
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
        let models = self.models(upstream, catalogue);
        for model in &models {
            self.upstream_models.insert(format!("{name}/{}", model.id));
        }
        let budgets = self.budgets(upstream.budget.as_ref(), &BudgetScope::Upstream(name.clone()));
        let credential = self.credential(table);
        let provider = self.provider(upstream)?;
        if upstream.base_url.is_none() && provider.default_base_url().is_none() {
            let message = format!("the upstream {name:?} of kind {:?} has no base_url", upstream.kind.get_ref());
            self.problem(&table.span(), message, "add base_url: where the server answers");
        }
        let patience = self.patience(upstream)?;
        Some(UpstreamConfig {
            name: name.as_str().into(),
            provider,
            base_url: upstream.base_url.clone(),
            credential: credential?,
            account: (upstream.organization.clone(), upstream.project.clone()),
            models,
            budgets,
            patience,
        })
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
    fn check_variable(&mut self, name: &Spanned<String>) {
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

    // --- tenants ---

    fn guardrails(&mut self, file: &File) {
        let mut seen = BTreeSet::new();
        for table in &file.guardrails {
            let config = table.get_ref();
            if !seen.insert(&config.name) {
                let message = format!("the guardrail {:?} is there already", config.name);
                self.problem(&table.span(), message, "give each a name of its own");
            }
            let names = config.allow.iter().chain(&config.deny);
            let num_unknown = names.filter(|name| self.language(name.get_ref(), &name.span()).is_none()).count();
            if let Some(model) = config.model.as_ref().filter(|model| !model.get_ref().is_empty()) {
                self.target(model.get_ref(), &model.span());
            }
            if num_unknown == 0
                && let Err(error) = Policy::compile(std::slice::from_ref(config), &no_secrets)
            {
                self.problem(&table.span(), error.to_string(), "correct the guardrail");
            }
        }
        let names: BTreeSet<&str> = file.guardrails.iter().map(|table| table.get_ref().name.as_str()).collect();
        for tenant in &file.tenants {
            for name in &tenant.get_ref().guardrails {
                if !names.contains(name.get_ref().as_str()) {
                    let message = format!("the guardrail {:?} is not there", name.get_ref());
                    let hint = format!("add a [[guardrails]] with name = {:?}, or correct the name", name.get_ref());
                    self.problem(&name.span(), message, hint);
                }
            }
        }
    }

    /// As ISO 639-3 calls it.
    fn language(&mut self, name: &str, span: &Range<usize>) -> Option<String> {
        match language::parse(name) {
            Ok(lang) => Some(lang.code().to_owned()),
            Err(why) => {
                let (message, hint) = why.split_once("; ").unwrap_or((&why, "use a code of ISO 639"));
                self.problem(span, message, hint);
                None
            }
        }
    }

    fn tenants(&mut self, file: &File) -> Vec<TenantConfig> {
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        let mut built = Vec::new();
        for table in &file.tenants {
            let name = &table.get_ref().name;
            let line = self.line(&name.span());
            if let Some(first) = seen.insert(name.get_ref(), line) {
                let message = format!("the tenant {:?} is in line {first} already", name.get_ref());
                self.problem(&name.span(), message, "give each a name of its own");
            }
            built.push(self.tenant(table.get_ref()));
        }
        built
    }

    fn tenant(&mut self, table: &Tenant) -> TenantConfig {
        let name = table.name.get_ref();
        let id = TenantId::new(name);
        if let Err(error) = &id {
            self.problem(&table.name.span(), error.to_string(), "choose another name");
        }
        if *name == *facts::nobodys_routing().name {
            let message = format!("{name:?} is what requests without a tenant count as, and cannot name one");
            self.problem(&table.name.span(), message, "choose another name");
        }
        // What follows is looked at for its own mistakes.
        let id = id.unwrap_or_else(|_| TenantId::new("unnamed").expect("a plain word is a name"));
        if let Some(variable) = &table.api_key_env {
            self.check_variable(variable);
        }
        let class = table.privacy.as_ref().map_or(Some(PrivacyClass::LocalFirst), |word| self.privacy(word));
        let privacy = class.unwrap_or(PrivacyClass::LocalFirst);
        if let Some(weight) = table.weight.as_ref().filter(|weight| *weight.get_ref() == 0) {
            self.problem(&weight.span(), "a weight of 0 would leave the tenant nothing", "use 1 or more");
        }
        let overflow = table.overflow.as_ref().and_then(|overflow| self.overflow(overflow, privacy));
        let overflow_budgets = table.overflow.as_ref().map_or_else(Vec::new, |overflow| {
            let Overflow { usd_per_day, usd_per_month, .. } = *overflow.get_ref();
            let ceilings = Spanned::new(overflow.span(), Ceilings { usd_per_day, usd_per_month });
            self.budgets(Some(&ceilings), &BudgetScope::Overflow(id.clone()))
        });
        let routing = TenantRouting {
            name: name.as_str().into(),
            privacy,
            models: table.models.as_ref().map_or_else(|| vec!["*".to_owned()], |models| models.get_ref().clone()),
            overflow,
        };
        if let Some(models) = &table.models {
            self.check_models(models, &routing);
        }
        if class.is_some() {
            self.routings.insert(name.clone(), routing.clone());
        }
        TenantConfig {
            routing,
            api_key_env: table.api_key_env.as_ref().map(|name| name.get_ref().clone()),
            limits: table.limits,
            budgets: self.budgets(table.budget.as_ref(), &BudgetScope::Tenant(id.clone())),
            overflow_budgets,
            guardrails: table.guardrails.iter().map(|name| name.get_ref().clone()).collect(),
            max_output_tokens: table.max_output_tokens,
            fields: if table.strict_params { UnmappedFields::Refuse } else { UnmappedFields::Drop },
            weight: table.weight.as_ref().map_or(1, |weight| *weight.get_ref()),
            store_contents: table.store_contents.as_ref().is_some_and(|stores| *stores.get_ref()),
            id,
        }
    }

    /// What a tenant has stored must be kept somewhere, and encrypted.
    fn contents(&mut self, file: &File) {
        if file.audit.as_ref().is_some_and(|audit| audit.contents == KeepContents::Encrypted) {
            return;
        }
        for tenant in &file.tenants {
            let stores = tenant.get_ref().store_contents.as_ref().filter(|stores| *stores.get_ref());
            if let Some(stores) = stores {
                let name = tenant.get_ref().name.get_ref();
                let message =
                    format!("the tenant {name:?} has its prompts and answers stored, and no audit log keeps any");
                let hint = "set contents = \"encrypted\" and contents_key_env in [audit], or remove store_contents";
                self.problem(&stores.span(), message, hint);
            }
        }
    }

    fn privacy(&mut self, word: &Spanned<String>) -> Option<PrivacyClass> {
        let class = PrivacyClass::parse(word.get_ref());
        if class.is_none() {
            let message = format!("{:?} is no privacy class", word.get_ref());
            self.problem(&word.span(), message, "it must be local-only, local-first or any");
        }
        class
    }

    fn overflow(&mut self, table: &Spanned<Overflow>, privacy: PrivacyClass) -> Option<OverflowRule> {
        let overflow = table.get_ref();
        if privacy == PrivacyClass::LocalOnly {
            let hint = "remove overflow, or choose the class local-first";
            self.problem(&table.span(), "a local-only tenant sends nothing out, and has an overflow", hint);
        }
        let to = self.target(overflow.to.get_ref(), &overflow.to.span());
        let when_ttft_over = self.duration(&overflow.when_ttft_over);
        if to.as_ref().is_some_and(Target::is_local) {
            let message = format!("an overflow leads to an upstream, and {:?} is none", overflow.to.get_ref());
            self.problem(&overflow.to.span(), message, "write UPSTREAM/MODEL");
        }
        let otherwise = match overflow.otherwise.as_ref().map(|word| (word.get_ref().as_str(), word.span())) {
            None | Some(("wait", _)) => Otherwise::Wait,
            Some(("refuse", _)) => Otherwise::Refuse,
            Some((other, span)) => {
                self.problem(&span, format!("otherwise = {other:?} is not known"), "it must be wait or refuse");
                return None;
            }
        };
        let (when_ttft_over, to) = (when_ttft_over?, to?);
        Some(OverflowRule { when_ttft_over, to, adapters: overflow.adapters.clone(), otherwise })
    }

    fn duration(&mut self, text: &Spanned<String>) -> Option<Duration> {
        let duration = humantime::parse_duration(text.get_ref());
        if duration.is_err() {
            let message = format!("{:?} is no length of time", text.get_ref());
            self.problem(&text.span(), message, "write it as 500ms, 2s or 1m");
        }
        duration.ok()
    }

    // --- routes ---

    /// A place that the file knows; what is neither `local` nor an upstream's is a name that is looked up when it is asked for.
    fn target(&mut self, text: &str, span: &Range<usize>) -> Option<Target> {
        let target = Target::parse(text, &self.upstreams);
        let is_known = match &target {
            Target::Local => true,
            Target::Upstream { .. } => self.upstream_models.contains(text),
            // A slash is in hub names, too; one that looks like an upstream's and is not there is a mistake.
            Target::LocalModel(name) => !name.is_empty() && !self.virtual_models.contains(name.as_ref()),
        };
        if !is_known {
            self.no_target(text, span);
            return None;
        }
        Some(target)
    }

    fn no_target(&mut self, text: &str, span: &Range<usize>) {
        if self.virtual_models.contains(text) {
            let message = format!("{text:?} is a virtual model itself, and rules lead to real ones");
            self.problem(span, message, "name a local model or UPSTREAM/MODEL");
            return;
        }
        let known: Vec<&str> = self.upstream_models.iter().map(String::as_str).take(8).collect();
        let known = if known.is_empty() {
            "there are no [[upstreams]]".to_owned()
        } else {
            format!("known: {}", known.join(", "))
        };
        self.problem(span, format!("no upstream offers {text:?}"), known);
    }

    fn router(&mut self, file: &File, upstreams: &[UpstreamConfig]) -> Router {
        let mut virtual_models = BTreeMap::new();
        for table in &file.routes {
            let route = table.get_ref();
            let name: Arc<str> = route.model.get_ref().as_str().into();
            if virtual_models.contains_key(&name) || name.is_empty() || &*name == "local" {
                let message = format!("the virtual model {name:?} is there already, or is no name");
                self.problem(&route.model.span(), message, "give each a name of its own");
                continue;
            }
            if self.upstream_models.contains(&*name) {
                let message = format!("the virtual model {name:?} hides the model of an upstream that has this name");
                self.problem(&route.model.span(), message, "give it another name");
            }
            let rules = self.rules(&route.rules);
            virtual_models.insert(Arc::clone(&name), VirtualModel { name, rules });
        }
        let upstream_models = upstreams
            .iter()
            .flat_map(|upstream| {
                let target = |model: &ModelEntry| Target::Upstream {
                    upstream: Arc::clone(&upstream.name),
                    model: model.id.as_str().into(),
                };
                upstream.models.iter().map(target).collect::<Vec<_>>()
            })
            .collect();
        Router { virtual_models, upstream_models }
    }

    fn rules(&mut self, tables: &[Spanned<Rule>]) -> Vec<crate::policy::Rule> {
        let mut rules: Vec<crate::policy::Rule> = Vec::new();
        for (at, table) in tables.iter().enumerate() {
            let rule = table.get_ref();
            if rules.last().is_some_and(|before| before.when.is_always()) {
                let message = format!("rule {} is never asked: the one before it applies to every request", at + 1);
                self.problem(&table.span(), message, "put it in front, or remove it");
            }
            let (when, to) = (self.condition(&rule.when), self.choices(&rule.to));
            let (Some(when), Some(to)) = (when, to) else { continue };
            let rule = crate::policy::Rule { when, to };
            self.check_rule(at + 1, &table.span(), &rule);
            rules.push(rule);
        }
        rules
    }

    fn choices(&mut self, to: &Spanned<To>) -> Option<Vec<Choice>> {
        let span = to.span();
        let links = match to.get_ref() {
            To::One(text) => return Some(vec![Choice::One(self.target(text, &span)?)]),
            To::Chain(links) => links,
        };
        if links.is_empty() {
            self.problem(&span, "a rule leads nowhere", "name at least one place in to");
        }
        let mut choices = Vec::new();
        for link in links {
            choices.push(match link {
                Link::One(text) => self.target(text, &span).map(Choice::One),
                Link::Weighted(weights) => {
                    if weights.values().all(|&weight| weight == 0) {
                        self.problem(&span, "all weights are 0", "give at least one place a weight above it");
                    }
                    let targets: Vec<_> =
                        weights.iter().map(|(text, &weight)| Some((self.target(text, &span)?, weight))).collect();
                    targets.into_iter().collect::<Option<Vec<_>>>().map(Choice::Weighted)
                }
            });
        }
        choices.into_iter().collect()
    }

    fn condition(&mut self, when: &When) -> Option<Condition> {
        let words = |words: &Option<Spanned<Words>>| words.as_ref().map(|words| words.get_ref().list());
        let mut tenants = None;
        if let Some(names) = &when.tenant {
            let list = names.get_ref().list();
            for name in &list {
                if !self.tenants.contains(name) {
                    let message = format!("the tenant {name:?} is not there, so the rule cannot apply to it");
                    self.problem(&names.span(), message, "add it to [[tenants]], or correct the name");
                }
            }
            tenants = Some(list);
        }
        let mut privacy = None;
        if let Some(names) = &when.privacy {
            let spanned = |word: String| Spanned::new(names.span(), word);
            let classes: Vec<_> = names.get_ref().list().into_iter().map(|word| self.privacy(&spanned(word))).collect();
            privacy = Some(classes.into_iter().collect::<Option<Vec<_>>>());
        }
        // All are read before the first mistake ends it.
        let ttft_over = when.ttft_over.as_ref().map(|text| self.duration(text));
        let budget_left_under =
            when.budget_left_under.as_ref().map(|dollars| self.money(*dollars.get_ref(), &dollars.span()));
        let time = when.time.as_ref().map(|text| self.time_of_day(text));
        let weekdays = when.weekdays.as_ref().map(|words| self.weekdays(words));
        let languages = when.language.as_ref().map(|names| {
            let list = names.get_ref().list();
            let codes: Vec<_> = list.iter().map(|name| self.language(name, &names.span())).collect();
            codes.into_iter().collect::<Option<Vec<String>>>()
        });
        self.check_words(when);
        Some(Condition {
            tenants,
            privacy: all_or_none(privacy)?,
            tasks: when.task.as_ref().map(Words::list),
            reasoning_effort: words(&when.reasoning_effort),
            tools: when.tools,
            images: when.images,
            over_local_context: when.over_local_context,
            prompt_tokens_over: when.prompt_tokens_over,
            personal_data: when.pii,
            languages: all_or_none(languages)?,
            ttft_over: all_or_none(ttft_over)?,
            budget_left_under: all_or_none(budget_left_under)?,
            time: all_or_none(time)?,
            weekdays: all_or_none(weekdays)?,
        })
    }

    /// `22:00-06:00`, UTC.
    fn time_of_day(&mut self, text: &Spanned<String>) -> Option<TimeOfDay> {
        let minute = |text: &str| {
            let (hours, minutes) = text.trim().split_once(':')?;
            let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
            (hours <= 24 && minutes < 60 && hours * 60 + minutes <= 1440).then_some(hours * 60 + minutes)
        };
        let time = text
            .get_ref()
            .split_once('-')
            .and_then(|(from, to)| Some(TimeOfDay { from: minute(from)?, to: minute(to)? }));
        if time.is_none() {
            let message = format!("{:?} is no time of day", text.get_ref());
            self.problem(&text.span(), message, "write it as 22:00-06:00, in UTC");
        }
        if time.is_some_and(|time| time.from == time.to) {
            let message = format!("{:?} ends where it begins, so it is no time at all", text.get_ref());
            self.problem(&text.span(), message, "leave it out for the whole day");
        }
        time
    }

    fn weekdays(&mut self, words: &Spanned<Words>) -> Option<Vec<u8>> {
        let mut days = Vec::new();
        for word in words.get_ref().list() {
            let Some(day) = WEEKDAYS.iter().position(|day| *day == word) else {
                let message = format!("{word:?} is no day of the week");
                self.problem(&words.span(), message, format!("it must be one of {}", WEEKDAYS.join(", ")));
                return None;
            };
            days.push(day as u8);
        }
        Some(days)
    }

    // --- identity ---

    fn issuer(&mut self, table: &Spanned<Identity>) -> Option<IssuerOptions> {
        let identity = table.get_ref();
        let tenant = |builder: &mut Self, name: &Spanned<String>| {
            if !builder.tenants.contains(name.get_ref()) {
                let message = format!("the tenant {:?} is not there", name.get_ref());
                builder.problem(&name.span(), message, "add it to [[tenants]], or correct the name");
                return None;
            }
            TenantId::new(name.get_ref()).ok()
        };
        let from = match (&identity.tenant, &identity.tenant_claim) {
            (Some(name), None) => TenantFrom::Fixed(tenant(self, name)?),
            (None, Some(claim)) if identity.tenants.is_empty() => TenantFrom::Claim(claim.clone()),
            (None, Some(claim)) => {
                let mut tenants = BTreeMap::new();
                for (value, name) in &identity.tenants {
                    tenants.insert(value.clone(), tenant(self, name)?);
                }
                TenantFrom::Map { claim: claim.clone(), tenants }
            }
            _ => {
                let hint = "give it tenant (one for all its tokens), or tenant_claim (the claim that names one)";
                self.problem(&table.span(), "an issuer's tokens need a tenant", hint);
                return None;
            }
        };
        Some(IssuerOptions {
            issuer: identity.issuer.clone(),
            audiences: identity.audience.list(),
            jwks_url: identity.jwks_url.clone(),
            algorithms: SigningAlgorithm::ALL.to_vec(),
            tenant: from,
            leeway: LEEWAY,
        })
    }
}

/// `None` where the file says nothing; nothing at all where what it says is a mistake, which is told already.
#[allow(clippy::option_option, reason = "absent and wrong are two things")]
fn all_or_none<T>(read: Option<Option<T>>) -> Option<Option<T>> {
    match read {
        None => Some(None),
        Some(value) => value.map(Some),
    }
}
