//! What the tables mean, and where they contradict each other or themselves.
//!
//! Knows every name in the file; it must not know the world outside of it. Invariant: all mistakes of a file are reported,
//! in the order of their lines, not only the first. [`reach`] finds what is well-formed and leads nowhere.

mod reach;
mod routes;
mod upstreams;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use toml::Spanned;

use super::{
    CredentialSource, GatewayConfig, Problem, StoreConfig, TenantConfig, UpstreamConfig,
    tables::{Ceilings, File, Identity, Overflow, Rule, Tenant, Upstream, When, line_of},
};
use crate::{
    audit::config::KeepContents,
    gateway::facts,
    guardrails::{Policy, language, no_secrets},
    keys::{IssuerOptions, SigningAlgorithm, TenantFrom},
    ledger::{Budget, BudgetScope, Period},
    limits::RateLimits,
    money::Money,
    names::TenantId,
    policy::{
        PrivacyClass, Target, TenantRouting,
        route::{Otherwise, Overflow as OverflowRule},
    },
    providers::{Catalogue, ModelEntry, UnmappedFields},
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
        self.audit(&file);
        self.contents(&file);
        let router = self.router(&file, &upstreams, &tenants);
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
            audit: file.audit.map(Spanned::into_inner),
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
        if let Some(limits) = &table.limits {
            let RateLimits { requests_per_minute, tokens_per_minute, concurrent } = *limits.get_ref();
            let fields = [
                ("requests_per_minute", requests_per_minute),
                ("tokens_per_minute", tokens_per_minute),
                ("concurrent", concurrent.map(u64::from)),
            ];
            for (field, _) in fields.into_iter().filter(|(_, limit)| *limit == Some(0)) {
                let message = format!("{field} is 0, so the tenant {name:?} could ask for nothing");
                self.problem(&limits.span(), message, "use 1 or more, or leave it out for no limit");
            }
        }
        if let Some(tokens) = table.max_output_tokens.as_ref().filter(|tokens| *tokens.get_ref() == 0) {
            self.problem(&tokens.span(), "answers of 0 tokens", "use 1 or more, or leave it out");
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
        if let (Some(rule), Some(table)) = (&routing.overflow, &table.overflow) {
            self.check_overflow(&table.get_ref().to.span(), &rule.to, &routing);
        }
        if class.is_some() {
            self.routings.insert(name.clone(), routing.clone());
        }
        TenantConfig {
            routing,
            api_key_env: table.api_key_env.as_ref().map(|name| name.get_ref().clone()),
            limits: table.limits.as_ref().map(|limits| *limits.get_ref()).unwrap_or_default(),
            budgets: self.budgets(table.budget.as_ref(), &BudgetScope::Tenant(id.clone())),
            overflow_budgets,
            guardrails: table.guardrails.iter().map(|name| name.get_ref().clone()).collect(),
            max_output_tokens: table.max_output_tokens.as_ref().map(|tokens| *tokens.get_ref()),
            fields: if table.strict_params { UnmappedFields::Refuse } else { UnmappedFields::Drop },
            weight: table.weight.as_ref().map_or(1, |weight| *weight.get_ref()),
            store_contents: table.store_contents.as_ref().is_some_and(|stores| *stores.get_ref()),
            id,
        }
    }

    fn audit(&mut self, file: &File) {
        if let Some(audit) = &file.audit
            && let Err(error) = audit.get_ref().check()
        {
            self.problem(&audit.span(), error.to_string(), "correct [audit]");
        }
    }

    /// What a tenant has stored must be kept somewhere, and encrypted.
    fn contents(&mut self, file: &File) {
        if file.audit.as_ref().is_some_and(|audit| audit.get_ref().contents == KeepContents::Encrypted) {
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
