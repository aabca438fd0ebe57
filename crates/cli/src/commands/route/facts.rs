//! What a server would know of a request: from its body, the tenant's guardrails and the store.
//!
//! It knows OpenAI's two forms of a request as far as routing asks for them. Invariant: every fact that a rule can ask for
//! is told with where it comes from, and none of them holds text of the request.

use std::sync::Arc;

use bindery_gateway::{
    clock::UnixMillis,
    config::TenantConfig,
    gateway::{facts, moment},
    guardrails::{
        Policy,
        config::{GuardrailConfig, Kind},
        no_secrets,
        policy::Decision,
    },
    ledger::{PromptSize, least_left},
    money::Money,
    policy::{Facts, LocalState, Moment, PrivacyClass, TenantRouting, route::WEEKDAYS},
};
use serde_json::Value;

use super::local::LocalNames;
use crate::{
    args::{PrivacyArg, RouteExplainArgs},
    failure::Failure,
    gateway::ConfigFile,
    terminal::{self, thousands},
};

/// One line of what was known.
pub(super) struct Known {
    pub(super) name: &'static str,
    pub(super) value: String,
}

/// All that the router asks for, and what is told of it.
pub(super) struct RequestFacts<'a> {
    pub(super) asked: String,
    pub(super) tenant: TenantRouting,
    pub(super) has_budget: bool,
    /// The longest answer where the request names no limit, by its tenant.
    pub(super) default_output: Option<u64>,
    pub(super) blocked_by: Option<Arc<str>>,
    pub(super) draw: f64,
    pub(super) known: Vec<Known>,
    privacy: PrivacyClass,
    task: Option<&'a str>,
    reasoning_effort: Option<&'a str>,
    shape: Shape,
    prompt_tokens: usize,
    checked: Checked,
    language: Option<&'static str>,
    pub(super) budget_left: Option<Money>,
    local: LocalState,
    now: Moment,
}

/// What stands in the body.
struct Shape {
    has_tools: bool,
    size: PromptSize,
}

/// What guardrails say.
#[derive(Default)]
struct Checked {
    has_personal_data: bool,
    must_stay: bool,
    blocked_by: Option<Arc<str>>,
    /// For people.
    verdicts: Vec<String>,
    not_asked: Vec<String>,
}

impl<'a> RequestFacts<'a> {
    pub(super) async fn find(
        file: &ConfigFile,
        args: &'a RouteExplainArgs,
        body: &'a Value,
        names: &LocalNames,
    ) -> anyhow::Result<Self> {
        let config = tenant_of(file, args.tenant.as_deref())?;
        let tenant = config.map_or_else(facts::nobodys_routing, |tenant| tenant.routing.clone());
        let asked = body["model"].as_str().unwrap_or_else(|| names.primary()).to_owned();
        let shape = Shape::of(body);
        let prompt_tokens = args.prompt_tokens.unwrap_or_else(|| facts::estimated_tokens(shape.size));
        let checked = Checked::of(file, config, body)?;
        let budget_left = match config {
            Some(config) => budget_left(file, config).await?,
            None => None,
        };
        let local = LocalState {
            max_prompt_tokens: names.max_model_len.unwrap_or(usize::MAX),
            predicted_ttft: args.ttft,
            cannot: body.as_object().and_then(facts::beyond_text),
            ..LocalState::default()
        };
        let at = args.at.map(|seconds| UnixMillis(i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1000)));
        let mut facts = Self {
            privacy: args.privacy.map_or(tenant.privacy, |class| tenant.privacy.tightened_by(class_of(class))),
            default_output: config.and_then(|config| config.max_output_tokens),
            has_budget: config.is_some_and(|config| !config.budgets.is_empty()),
            task: args.task.as_deref(),
            reasoning_effort: body["reasoning_effort"].as_str(),
            language: facts::language(body),
            blocked_by: checked.blocked_by.clone(),
            draw: args.draw,
            known: Vec::new(),
            now: moment(at.unwrap_or_else(UnixMillis::now)),
            asked,
            tenant,
            shape,
            prompt_tokens,
            checked,
            budget_left,
            local,
        };
        facts.tell(args, names);
        Ok(facts)
    }

    pub(super) fn for_router(&self) -> Facts<'_> {
        Facts {
            tenant: &self.tenant,
            grant: None,
            privacy: self.privacy,
            task: self.task,
            reasoning_effort: self.reasoning_effort,
            has_tools: self.shape.has_tools,
            has_images: self.shape.size.num_images > 0,
            prompt_tokens: self.prompt_tokens,
            has_personal_data: self.checked.has_personal_data,
            must_stay: self.checked.must_stay,
            language: self.language,
            budget_left: self.budget_left,
            local: self.local.clone(),
            now: self.now,
            draw: self.draw,
        }
    }

    fn tell(&mut self, args: &RouteExplainArgs, names: &LocalNames) {
        let word = |word: Option<&str>| word.map_or_else(|| "none".to_owned(), |word| format!("{word:?}"));
        let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
        let tightened = if args.privacy.is_some() { ", the tenant's tightened by the request" } else { "" };
        let tokens = thousands(self.prompt_tokens as u64);
        let context = match names.max_model_len {
            Some(tokens) => format!("{} tokens of prompt and answer", thousands(tokens as u64)),
            None => "not known, as the model's files are not here: assumed to be enough".to_owned(),
        };
        let Moment { minute_of_day, weekday } = self.now;
        let day = WEEKDAYS[usize::from(weekday) % 7];
        let list = |words: &[String]| if words.is_empty() { "nothing found".to_owned() } else { words.join("; ") };
        self.known = [
            ("tenant", self.tenant.name.to_string()),
            ("privacy", format!("{}{tightened}", self.privacy.as_str())),
            ("task", word(self.task)),
            ("reasoning_effort", word(self.reasoning_effort)),
            ("tools", yes(self.shape.has_tools)),
            ("images", self.shape.size.num_images.to_string()),
            (
                "prompt",
                match args.prompt_tokens {
                    Some(_) => format!("{tokens} tokens (--prompt-tokens)"),
                    None => format!("about {tokens} tokens, by its bytes (--prompt-tokens)"),
                },
            ),
            ("personal data", yes(self.checked.has_personal_data)),
            ("guardrails", list(&self.checked.verdicts)),
            ("language", self.language.unwrap_or("not recognised").to_owned()),
            ("budget left", self.budget_left.map_or_else(|| "no budget".to_owned(), |left| left.to_string())),
            ("local model", names.described()),
            ("local context", context),
            (
                "predicted local time to first token",
                match args.ttft {
                    Some(time) => format!("{time:?} (--ttft)"),
                    None => "not known, as no server is asked: assumed to be within limits (--ttft)".to_owned(),
                },
            ),
            ("time", format!("{day} {:02}:{:02} UTC", minute_of_day / 60, minute_of_day % 60)),
        ]
        .map(|(name, value)| Known { name, value })
        .into();
        if !self.checked.not_asked.is_empty() {
            let value = format!("{}: nothing is sent", self.checked.not_asked.join(", "));
            self.known.push(Known { name: "guardrails not asked", value });
        }
    }
}

/// None where the config has no tenants.
fn tenant_of<'a>(file: &'a ConfigFile, name: Option<&str>) -> Result<Option<&'a TenantConfig>, Failure> {
    let tenants = &file.gateway.tenants;
    match (name, &tenants[..]) {
        (Some(name), _) => file.tenant(name).map(Some),
        (None, []) => Ok(None),
        (None, [only]) => Ok(Some(only)),
        (None, _) => {
            let known: Vec<&str> = tenants.iter().map(|tenant| tenant.id.as_str()).collect();
            Err(Failure::usage("the config has several tenants, and rules may tell them apart")
                .hint(format!("give --tenant, one of {}", known.join(", "))))
        }
    }
}

fn class_of(class: PrivacyArg) -> PrivacyClass {
    match class {
        PrivacyArg::LocalOnly => PrivacyClass::LocalOnly,
        PrivacyArg::LocalFirst => PrivacyClass::LocalFirst,
        PrivacyArg::Any => PrivacyClass::Any,
    }
}

/// The smallest of what is left of the tenant's budgets, as the store has it.
async fn budget_left(file: &ConfigFile, tenant: &TenantConfig) -> anyhow::Result<Option<Money>> {
    if tenant.budgets.is_empty() {
        return Ok(None);
    }
    if let Some(store) = file.gateway.store.as_ref().filter(|store| !store.url.is_there()) {
        terminal::note(&format!("there is no store yet at {}: nothing of the budget is spent", store.url));
        return Ok(tenant.budgets.iter().map(|budget| budget.ceiling).min());
    }
    let open = file.open_store_to_read().await?;
    let left = least_left(&open.store, &tenant.budgets, UnixMillis::now()).await?;
    open.close().await?;
    Ok(left)
}

impl Checked {
    fn of(file: &ConfigFile, tenant: Option<&TenantConfig>, body: &Value) -> anyhow::Result<Self> {
        let mut checked = Self {
            has_personal_data: !facts::personal_data()?.check_prompt(&mut body.clone()).verdicts.is_empty(),
            ..Self::default()
        };
        let Some(tenant) = tenant else { return Ok(checked) };
        let all = &file.gateway.guardrails;
        let outcome =
            Policy::named(&Policy::compile(all, &no_secrets)?, &tenant.guardrails)?.check_prompt(&mut body.clone());
        checked.verdicts = outcome
            .verdicts
            .iter()
            .map(|verdict| {
                let found = verdict.findings.iter().map(|finding| format!("{} {}", finding.count, finding.label));
                format!("{}: {}", verdict.guardrail, found.collect::<Vec<_>>().join(", "))
            })
            .collect();
        match outcome.decision {
            Decision::Pass => {}
            Decision::RouteLocal => checked.must_stay = true,
            Decision::Block { guardrail } => checked.blocked_by = Some(guardrail),
        }
        let asks_others = |guardrail: &&GuardrailConfig| {
            matches!(guardrail.kind, Kind::Webhook | Kind::Model) && tenant.guardrails.contains(&guardrail.name)
        };
        checked.not_asked = all.iter().filter(asks_others).map(|guardrail| guardrail.name.clone()).collect();
        Ok(checked)
    }
}

impl Shape {
    fn of(body: &Value) -> Self {
        Self { has_tools: facts::has_tools(body), size: facts::size_of(body) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_size_counts_all_that_a_model_reads_and_pictures_by_the_piece() {
        let url = format!("data:image/png;base64,{}", "x".repeat(100_000));
        let picture = json!({"type": "image_url", "image_url": {"url": url}});
        let body = json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "y".repeat(500)}, picture]},
            {"role": "user", "content": "z".repeat(500)},
        ], "tools": [{"function": {"description": "w".repeat(500)}}]});
        let Shape { has_tools, size } = Shape::of(&body);
        assert_eq!((has_tools, size.num_messages, size.num_images), (true, 2, 1));
        assert!((1500..1800).contains(&size.num_bytes), "{}", size.num_bytes);
    }
}
