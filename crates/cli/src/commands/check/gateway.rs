//! What the gateway's sections mean, in sentences: who may ask, where it may run, what it may cost, what is checked and
//! kept.
//!
//! It reads what was parsed, and of the environment only whether a variable is set. Invariant: no secret is shown, and no
//! value of a variable.

use std::path::Path;

use bindery_gateway::{
    audit::config::{AuditConfig, KeepContents},
    clock::UnixMillis,
    config::{CredentialSource, GatewayConfig, StoreConfig, TenantConfig, UpstreamConfig},
    failure::OnFailure,
    guardrails::{
        Action, Side,
        config::{GuardrailConfig, Kind},
    },
    keys::{IssuerOptions, KeyInfo, TenantFrom, table::list},
    ledger::{Budget, Period},
    limits::RateLimits,
    policy::{
        Choice, Condition, PrivacyClass, Rule, Target, VirtualModel,
        route::{Otherwise, WEEKDAYS},
        target::fits,
    },
    providers::{ModelEntry, Provider},
    store::{Durability, StoreKind},
};
use chrono::Utc;

use crate::{gateway::ConfigFile, terminal::thousands};

/// The variable of the audit log's key, unless another is named.
const AUDIT_KEY_ENV: &str = "BINDERY_AUDIT_KEY";

/// One sentence a thing, in the order of the file's contract; nothing where there is nothing.
pub(super) fn meaning(config: &GatewayConfig) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(config.store.as_ref().map(store));
    lines.extend(local(config));
    for upstream in &config.upstreams {
        lines.push(self::upstream(upstream));
        if upstream.is_in_the_clear() {
            lines.push(format!(
                "Warning: the upstream {} is asked over http://, so its key, prompts and answers can be read on the way: use \
                 https://, unless you trust all of that network.",
                upstream.name
            ));
        }
    }
    for tenant in &config.tenants {
        lines.push(self::tenant(tenant, config));
        if tenant.api_key_env.is_none() && config.store.is_none() && config.issuers.is_empty() {
            lines.push(format!(
                "Warning: the tenant {} can have no key: name a variable in api_key_env, or add a [store] for `bindery keys create`.",
                tenant.id
            ));
        }
    }
    for model in config.router.virtual_models.values() {
        lines.extend(virtual_model(model));
        lines.extend(turned_round(model, &config.tenants));
    }
    for guardrail in &config.guardrails {
        lines.push(self::guardrail(guardrail, &config.tenants));
        lines.extend(asked_outside(guardrail, config));
    }
    lines.extend(config.audit.as_ref().map(audit));
    lines.extend(config.issuers.iter().map(issuer));
    lines
}

/// Patterns of tenants' lists that fit nothing known: neither `local` names nor what the file offers. An adapter of that name
/// may still come, so it is no mistake.
pub(super) fn lost_patterns(config: &GatewayConfig, local: &[String]) -> Vec<String> {
    let upstream: Vec<String> = config.router.upstream_models.iter().map(ToString::to_string).collect();
    let rules = config.router.virtual_models.keys().map(AsRef::as_ref);
    let known: Vec<&str> = local.iter().chain(&upstream).map(String::as_str).chain(rules).collect();
    let mut lines = Vec::new();
    for TenantConfig { id, routing, .. } in &config.tenants {
        for pattern in routing.models.iter().filter(|pattern| !known.iter().any(|name| fits(pattern, name))) {
            lines.push(format!(
                "Warning: {pattern:?} among the models of the tenant {id} fits no model, adapter or rule that is known now."
            ));
        }
    }
    lines
}

/// Places of rules, of overflows' adapters and of judges that are nothing known: a mistyped upstream looks like an adapter of some
/// day. And virtual models that hide a local name.
pub(super) fn lost_places(config: &GatewayConfig, local: &[String]) -> Vec<String> {
    let mut lines = Vec::new();
    let is_known = |name: &str| local.iter().any(|known| known == name);
    let hint = |name: &str| match name.split_once('/') {
        Some((upstream, _)) => {
            format!("there is no upstream {upstream:?}, and no model or adapter of that name is known now")
        }
        None => "no model or adapter of that name is known now".to_owned(),
    };
    for model in config.router.virtual_models.values() {
        if is_known(&model.name) {
            lines.push(format!(
                "Warning: the virtual model {} hides the local model or adapter of that name.",
                model.name
            ));
        }
        for (at, rule) in model.rules.iter().enumerate() {
            for target in rule.to.iter().flat_map(Choice::targets) {
                if let Target::LocalModel(name) = target
                    && !is_known(name)
                {
                    lines.push(format!(
                        "Warning: rule {} of {} leads to {name:?}: {}.",
                        at + 1,
                        model.name,
                        hint(name)
                    ));
                }
            }
        }
    }
    for target in &config.router.upstream_models {
        if is_known(&target.to_string()) {
            lines
                .push(format!("Warning: the local model or adapter {target} hides the upstream's model of that name."));
        }
    }
    for TenantConfig { id, routing, .. } in &config.tenants {
        let patterns = routing.overflow.iter().flat_map(|overflow| &overflow.adapters);
        for pattern in patterns.filter(|pattern| !local.iter().any(|name| fits(pattern, name))) {
            lines.push(format!(
                "Warning: {pattern:?} among the adapters that overflow for the tenant {id} fits none that is known now."
            ));
        }
    }
    let upstream = |name: &str| config.router.upstream_models.iter().any(|known| known.to_string() == name);
    for guardrail in &config.guardrails {
        let Some(judge) = guardrail.model.as_ref().map(|model| model.get_ref().as_str()) else { continue };
        if !judge.is_empty() && judge != "local" && !is_known(judge) && !upstream(judge) {
            lines.push(format!("Warning: the guardrail {} asks {judge:?}: {}.", guardrail.name, hint(judge)));
        }
    }
    lines
}

/// Keys that open nothing, as nobody is configured whose they are. A store that is not there yet is not made, and no other
/// machine is asked.
pub(super) async fn strangers(file: &ConfigFile) -> anyhow::Result<Vec<String>> {
    let Some(store) = &file.gateway.store else { return Ok(Vec::new()) };
    if !store.url.is_file_here() {
        let is_elsewhere = matches!(store.url.kind(), StoreKind::Postgres);
        let not_checked =
            "Not checked, as that takes the database: whether its keys are of tenants that are configured.";
        return Ok(is_elsewhere.then(|| not_checked.to_owned()).into_iter().collect());
    }
    let open = file.open_store().await?;
    let listed = list(&open.store).await;
    open.close().await?;
    let now = UnixMillis::now().0;
    let is_live = |key: &KeyInfo| key.revoked_at.is_none() && key.expires_at.is_none_or(|end| end > now);
    let keys = listed?.into_iter().filter(|key| is_live(key) && file.tenant(&key.tenant).is_err());
    Ok(keys
        .map(|KeyInfo { id, tenant, .. }| {
            format!(
                "Warning: the key {id} is of the tenant {tenant:?}, which the file does not name, and opens nothing: add the \
                 tenant, or end the key with `bindery keys revoke {id}`."
            )
        })
        .collect())
}

fn store(store: &StoreConfig) -> String {
    let survives = match store.durability {
        Durability::ProcessKill => "the end of the process",
        Durability::PowerLoss => "the loss of power",
    };
    let max = store.max_bytes.map_or_else(String::new, |bytes| format!("; it grows to {} bytes", thousands(bytes)));
    let keep = store
        .keep
        .map_or_else(String::new, |keep| format!("; requests are kept for {} days", keep.as_secs() / (24 * 3600)));
    let failure = match store.on_failure {
        OnFailure::Closed => "while it takes no writes, nothing is answered",
        OnFailure::Open => "while it takes no writes, nothing goes upstream, and rows of local requests may be lost",
    };
    format!(
        "Keys, budgets and costs are kept in {}: what was answered survives {survives}{max}{keep}; {failure}.",
        store.url
    )
}

fn local(config: &GatewayConfig) -> Option<String> {
    let cost = config.local_cost_per_hour.map(|cost| format!("An hour of this node costs {cost}"));
    let reference = config.reference.as_ref().map(|entry| format!("local answers are compared with {}", entry.id));
    match (cost, reference) {
        (Some(cost), Some(reference)) => Some(format!("{cost}; {reference}.")),
        (Some(cost), None) => Some(format!("{cost}; it is compared with no upstream model (compare_with).")),
        (None, Some(reference)) => Some(format!("Local answers cost nothing (cost_per_hour); {reference}.")),
        (None, None) => None,
    }
}

fn upstream(upstream: &UpstreamConfig) -> String {
    let kind = match &upstream.provider {
        Provider::OpenAi => "OpenAI",
        Provider::Anthropic => "Anthropic",
        Provider::Gemini => "Gemini",
        Provider::Azure(_) => "Azure",
        Provider::Compatible => "speaks OpenAI's API",
    };
    let at = upstream.base_url.as_ref().map_or_else(String::new, |url| format!(" at {}", without_secrets(url)));
    let models: Vec<String> = upstream.models.iter().map(priced).collect();
    let credential = match &upstream.credential {
        CredentialSource::None => "no key".to_owned(),
        CredentialSource::KeyEnv(name) => format!("its key from {}", variable(name)),
        CredentialSource::TokenEnv(name) => format!("its token from {}", variable(name)),
        CredentialSource::KeyFile(path) => format!("its key from {}", file(path)),
        CredentialSource::TokenFile(path) => format!("its token from {}", file(path)),
    };
    let budgets = budgets(&upstream.budgets).map_or_else(String::new, |budgets| format!("; at most {budgets}"));
    format!("Upstream {} ({kind}{at}): {}; {credential}{budgets}.", upstream.name, models.join(", "))
}

/// A URL may hold a user and a password.
fn without_secrets(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let host = rest.split('/').next().unwrap_or(rest);
    let shown = host.rsplit('@').next().unwrap_or(host);
    let path = rest[host.len()..].split('?').next().unwrap_or_default();
    format!("{scheme}://{shown}{path}")
}

fn priced(entry: &ModelEntry) -> String {
    let today = Utc::now();
    let price = match entry.price_list(today) {
        Ok(price) => format!("${} in, ${} out for a million tokens", price.rates.input, price.rates.output),
        Err(_) => "no price known".to_owned(),
    };
    match entry.retired_on(today) {
        Some(on) => format!("{} ({price}; Warning: retired by its provider on {on})", entry.id),
        None => format!("{} ({price})", entry.id),
    }
}

fn variable(name: &str) -> String {
    let is_set = std::env::var_os(name).is_some_and(|value| !value.is_empty());
    format!("{name}, which is {}", if is_set { "set" } else { "not set now" })
}

fn file(path: &Path) -> String {
    let is_there = if path.is_file() { "there" } else { "not there now" };
    format!("{}, which is {is_there}", path.display())
}

fn budgets(budgets: &[Budget]) -> Option<String> {
    let shown: Vec<String> = budgets
        .iter()
        .map(|budget| {
            let per = match budget.per {
                Period::Day => "day",
                Period::Month => "month",
            };
            format!("{} a {per}", budget.ceiling)
        })
        .collect();
    (!shown.is_empty()).then(|| shown.join(" and "))
}

fn tenant(tenant: &TenantConfig, config: &GatewayConfig) -> String {
    let mut parts = vec![match tenant.routing.privacy {
        PrivacyClass::LocalOnly => "local-only, nothing of it ever leaves this machine".to_owned(),
        PrivacyClass::LocalFirst => "local-first, an upstream is asked where this machine cannot answer".to_owned(),
        PrivacyClass::Any => "any, rules and names alone decide where it runs".to_owned(),
    }];
    let models = tenant.routing.models.join(", ");
    parts.push(if models == "*" { "all models".to_owned() } else { format!("the models {models}") });
    parts.extend(limits(&tenant.limits));
    parts.push(match budgets(&tenant.budgets) {
        Some(budgets) => format!("at most {budgets} upstream"),
        None if tenant.routing.privacy == PrivacyClass::LocalOnly || config.upstreams.is_empty() => {
            "no costs upstream".to_owned()
        }
        None => "no budget".to_owned(),
    });
    parts.extend(overflow(tenant));
    if !tenant.guardrails.is_empty() {
        parts.push(format!("checked by {}", tenant.guardrails.join(", ")));
    }
    if tenant.store_contents {
        parts.push("prompts and answers stored in the audit log".to_owned());
    }
    if tenant.weight != 1 {
        parts.push(format!("weight {}", tenant.weight));
    }
    parts.extend(tenant.max_output_tokens.map(|tokens| format!("answers of up to {} tokens", thousands(tokens))));
    parts.push(match (&tenant.api_key_env, config.store.is_some()) {
        (Some(name), true) => format!("keys from {name} and from the store"),
        (Some(name), false) => format!("keys from {name}"),
        (None, true) => "keys from the store".to_owned(),
        (None, false) => "no keys of its own".to_owned(),
    });
    format!("Tenant {}: {}.", tenant.id, parts.join("; "))
}

fn limits(limits: &RateLimits) -> Option<String> {
    let RateLimits { requests_per_minute, tokens_per_minute, concurrent } = *limits;
    let shown: Vec<String> = [
        requests_per_minute.map(|count| format!("{} requests a minute", thousands(count))),
        tokens_per_minute.map(|count| format!("{} tokens a minute", thousands(count))),
        concurrent.map(|count| format!("{} requests at once", thousands(count.into()))),
    ]
    .into_iter()
    .flatten()
    .collect();
    (!shown.is_empty()).then(|| shown.join(", "))
}

fn overflow(tenant: &TenantConfig) -> Option<String> {
    let overflow = tenant.routing.overflow.as_ref()?;
    let budgets =
        budgets(&tenant.overflow_budgets).map_or_else(String::new, |budgets| format!(", for at most {budgets}"));
    let adapters = match &overflow.adapters[..] {
        [] => ", not for adapters".to_owned(),
        names => format!(", for the adapters {}, too", names.join(", ")),
    };
    let otherwise = match overflow.otherwise {
        Otherwise::Wait => "it waits",
        Otherwise::Refuse => "it is refused",
    };
    Some(format!(
        "overflows to {} where the first token would take over {}{budgets}{adapters}; where that is closed, {otherwise}",
        overflow.to,
        humantime::format_duration(overflow.when_ttft_over)
    ))
}

fn virtual_model(model: &VirtualModel) -> Vec<String> {
    let rule = |(at, rule): (usize, &Rule)| {
        let chain: Vec<String> = rule.to.iter().map(choice).collect();
        format!("  {}. {}: {}.", at + 1, condition(&rule.when), chain.join(", then "))
    };
    let mut lines = vec![format!("Virtual model {}, the first rule that holds:", model.name)];
    lines.extend(model.rules.iter().enumerate().map(rule));
    if !model.rules.last().is_some_and(|rule| rule.when.is_always()) {
        lines.push("  Otherwise the request is refused.".to_owned());
    }
    lines
}

/// Rules whose order the class local-first changes, for those whom it surprises.
fn turned_round(model: &VirtualModel, tenants: &[TenantConfig]) -> Vec<String> {
    let warning = |(at, rule): (usize, &Rule)| {
        let first_out = rule.to.iter().position(|choice| choice.targets().any(|target| !target.is_local()))?;
        let last_local = rule.to.iter().rposition(|choice| choice.targets().any(Target::is_local))?;
        let is_for_class = rule.when.privacy.as_ref().is_none_or(|classes| classes.contains(&PrivacyClass::LocalFirst));
        if first_out >= last_local || !is_for_class {
            return None;
        }
        let is_turned = |tenant: &&TenantConfig| {
            let TenantConfig { routing, id, .. } = tenant;
            routing.privacy == PrivacyClass::LocalFirst
                && routing.models.iter().any(|pattern| fits(pattern, &model.name))
                && rule.when.tenants.as_ref().is_none_or(|names| names.iter().any(|name| name == id.as_str()))
        };
        let names: Vec<&str> = tenants.iter().filter(is_turned).map(|tenant| tenant.id.as_str()).collect();
        let whose = match &names[..] {
            // Requests that belong to nobody are local-first, too.
            [] if tenants.is_empty() => "requests here".to_owned(),
            [] => return None,
            names => format!("the local-first tenants {}", names.join(", ")),
        };
        Some(format!(
            "  Warning: rule {} names an upstream before the local model, but for {whose} the local model is tried first: put it \
             in front to say so, or choose the privacy class any.",
            at + 1
        ))
    };
    model.rules.iter().enumerate().filter_map(warning).collect()
}

/// Where a guardrail's questions go, and for whom nobody is asked.
fn asked_outside(guardrail: &GuardrailConfig, config: &GatewayConfig) -> Vec<String> {
    let judge = guardrail.model.as_ref().map(|model| model.get_ref().as_str());
    let upstream = judge.and_then(|judge| {
        let (upstream, _) = judge.split_once('/')?;
        config.upstreams.iter().find(|known| *known.name == *upstream)
    });
    let whom = match (guardrail.kind, &guardrail.url, judge, upstream) {
        (Kind::Webhook, Some(url), ..) => format!("the web hook at {}", without_secrets(url)),
        (Kind::Model, _, Some(judge), Some(_)) => format!("the model {judge}, paid by the tenant whose request it is"),
        (Kind::Model, _, Some(judge), None) => {
            return vec![format!("  It asks the model {judge} on this machine, for every privacy class.")];
        }
        _ => return Vec::new(),
    };
    let silence = match (guardrail.on_failure.unwrap_or_default(), guardrail.action) {
        (OnFailure::Open, _) => "counts as nothing found",
        (OnFailure::Closed, Action::Block) => "blocks the request",
        (OnFailure::Closed, Action::RouteLocal) => "keeps the request on this machine",
        (OnFailure::Closed, Action::Flag | Action::Redact) => "counts as found",
    };
    let mut lines = vec![format!("  It asks {whom}; silence {silence} (on_failure).")];
    let never_asked = |tenant: &&TenantConfig| {
        tenant.routing.privacy == PrivacyClass::LocalOnly && tenant.guardrails.contains(&guardrail.name)
    };
    let names: Vec<&str> = config.tenants.iter().filter(never_asked).map(|tenant| tenant.id.as_str()).collect();
    if !names.is_empty() {
        let so = match (guardrail.on_failure.unwrap_or_default(), guardrail.action) {
            (OnFailure::Closed, Action::Block) => {
                "so all their requests are blocked: ask a local model instead, or set on_failure = \"open\""
            }
            (OnFailure::Closed, _) => "which counts as found in every request: ask a local model instead",
            (OnFailure::Open, _) => "so it checks nothing of theirs: ask a local model instead",
        };
        lines.push(format!(
            "  Warning: of the local-only tenants {} it is never sent a byte, on a loopback address neither, {so}.",
            names.join(", ")
        ));
    }
    lines
}

fn choice(choice: &Choice) -> String {
    match choice {
        Choice::One(target) => target.to_string(),
        Choice::Weighted(targets) => {
            let total: u64 = targets.iter().map(|(_, weight)| u64::from(*weight)).sum();
            let shares = targets.iter().map(|(target, weight)| format!("{target} ({weight} of {total})"));
            shares.collect::<Vec<_>>().join(" or ")
        }
    }
}

fn condition(when: &Condition) -> String {
    if when.is_always() {
        return "always".to_owned();
    }
    let words =
        |what: &str, words: &Option<Vec<String>>| words.as_ref().map(|words| format!("{what} {}", words.join(" or ")));
    let with = |what: &str, is: Option<bool>| is.map(|is| format!("{} {what}", if is { "with" } else { "without" }));
    let privacy = when.privacy.as_ref().map(|classes| {
        let classes: Vec<&str> = classes.iter().map(|class| class.as_str()).collect();
        format!("privacy {}", classes.join(" or "))
    });
    let context = when.over_local_context.map(|is_over| {
        let than = if is_over { "longer than" } else { "no longer than" };
        format!("a prompt {than} the local context")
    });
    let time = when.time.map(|minutes| {
        let shown = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
        format!("from {} to {} UTC", shown(minutes.from), shown(minutes.to))
    });
    let days = when.weekdays.as_ref().map(|days| {
        let days: Vec<&str> = days.iter().map(|day| WEEKDAYS[usize::from(*day) % 7]).collect();
        format!("on {}", days.join(" or "))
    });
    let all = [
        words("tenant", &when.tenants),
        privacy,
        words("task", &when.tasks),
        words("reasoning effort", &when.reasoning_effort),
        with("tools", when.tools),
        with("images", when.images),
        context,
        when.prompt_tokens_over.map(|tokens| format!("a prompt of over {} tokens", thousands(tokens as u64))),
        with("personal data", when.personal_data),
        words("language", &when.languages),
        when.ttft_over.map(|time| format!("a first token here after over {}", humantime::format_duration(time))),
        when.budget_left_under.map(|money| format!("less than {money} left of the budget")),
        time,
        days,
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join(" and ")
}

fn guardrail(guardrail: &GuardrailConfig, tenants: &[TenantConfig]) -> String {
    let action = match guardrail.action {
        Action::Block => "blocks",
        Action::Redact if guardrail.restore == Some(true) => "redacts, and restores in answers",
        Action::Redact => "redacts",
        Action::RouteLocal => "keeps the request on this machine",
        Action::Flag => "counts",
    };
    let on = guardrail.on.as_ref().map_or_else(String::new, |sides| {
        let sides: Vec<&str> = sides
            .iter()
            .map(|side| match side {
                Side::Prompt => "prompts",
                Side::Answer => "answers",
            })
            .collect();
        format!(", in {}", sides.join(" and "))
    });
    let users: Vec<&str> = tenants
        .iter()
        .filter(|tenant| tenant.guardrails.contains(&guardrail.name))
        .map(|tenant| tenant.id.as_str())
        .collect();
    let users = if users.is_empty() { "no tenant".to_owned() } else { users.join(", ") };
    format!("Guardrail {} ({}): {action}{on}; for {users}.", guardrail.name, guardrail.kind.name())
}

fn audit(audit: &AuditConfig) -> String {
    let key = match (&audit.key_file, &audit.key_env) {
        (Some(path), _) => file(path),
        (None, name) => variable(name.as_deref().unwrap_or(AUDIT_KEY_ENV)),
    };
    let contents = match (audit.contents, &audit.contents_key_env) {
        (KeepContents::None, _) => "no prompts or answers".to_owned(),
        (KeepContents::Encrypted, Some(name)) => format!("prompts and answers encrypted with {}", variable(name)),
        (KeepContents::Encrypted, None) => "Warning: prompts and answers, and no contents_key_env".to_owned(),
    };
    let failure = match audit.on_failure {
        OnFailure::Closed => "a request whose record cannot be kept fails",
        OnFailure::Open => "a request whose record cannot be kept goes on, and is counted",
    };
    format!("Audit log in {}: signed with the key from {key}; {contents}; {failure}.", audit.path.display())
}

fn issuer(issuer: &IssuerOptions) -> String {
    let whose = match &issuer.tenant {
        TenantFrom::Fixed(tenant) => format!("the tenant {tenant}"),
        TenantFrom::Claim(claim) => format!("the tenant that their claim {claim} names"),
        TenantFrom::Map { claim, tenants } => format!("one of {} tenants, by their claim {claim}", tenants.len()),
    };
    format!("Tokens of {} for {} count as {whose}.", issuer.issuer, issuer.audiences.join(" or "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_what_may_be_secret() {
        for (url, shown) in [
            ("https://u:p@host:1/v1?key=s", "https://host:1/v1"),
            ("http://host", "http://host"),
            ("http://host/a@b", "http://host/a@b"),
        ] {
            assert_eq!(without_secrets(url), shown);
        }
    }
}
