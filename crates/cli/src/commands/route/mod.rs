//! `bindery route explain REQUEST.json`: where a request would go, and why. Nothing is sent.
//!
//! [`facts`] finds out what a server would know of the request, [`local`] what of this machine can be known without one;
//! the gateway's router decides on them as it does in a server, and what had to be assumed is said. Invariant: the
//! request goes nowhere, and no text of it is printed.

mod facts;
mod local;

use std::fmt::Write as _;

use bindery_gateway::{
    clock::UnixMillis,
    gateway::{GatewayError, facts::most_it_can_cost},
    policy::{Choice, Refused, Route, Router, Target},
};
use chrono::Utc;
use serde_json::{Value, json};

use self::{
    facts::{Known, RequestFacts},
    local::LocalNames,
};
use crate::{
    args::{RouteAction, RouteArgs, RouteExplainArgs},
    failure::Failure,
    gateway::ConfigFile,
    terminal::{self, Style},
};

/// Bytes of a request: more than any server takes.
const MAX_REQUEST_BYTES: u64 = 64 << 20;

pub(crate) async fn run(args: RouteArgs) -> anyhow::Result<()> {
    let RouteAction::Explain(args) = args.action;
    let file = ConfigFile::read(args.config.clone())?;
    let body = read(&args)?;
    let names = LocalNames::find(&file).await?;
    let facts = RequestFacts::find(&file, &args, &body, &names).await?;
    let explained = Explained::decide(&file, &facts, (&names, &body));
    terminal::print(&if args.json { explained.as_json() } else { explained.in_words() })?;
    Ok(())
}

fn read(args: &RouteExplainArgs) -> Result<Value, Failure> {
    let shown = args.request.display();
    let fail = |error: std::io::Error| {
        Failure::usage(format!("cannot read the request {shown}: {error}")).hint("check the path")
    };
    let size = std::fs::metadata(&args.request).map_err(fail)?.len();
    if size > MAX_REQUEST_BYTES {
        return Err(Failure::usage(format!("the request {shown} has {size} bytes, the limit is {MAX_REQUEST_BYTES}"))
            .hint("a server takes less, too"));
    }
    let bytes = std::fs::read(&args.request).map_err(fail)?;
    let body: Value = serde_json::from_slice(&bytes).map_err(|error| {
        Failure::usage(format!("the request {shown} is no JSON: {error}"))
            .hint("it is the body of a request to /v1/chat/completions or /v1/completions")
    })?;
    if body.get("model").is_some_and(|model| model.as_str().is_none_or(str::is_empty)) {
        return Err(Failure::usage(format!("the request {shown} has a model that is no name"))
            .hint("it is the base (also where there is none), an adapter, a virtual model or UPSTREAM/MODEL"));
    }
    Ok(body)
}

/// What a server would do.
enum Decision {
    /// It tries these places.
    Goes(Route),
    /// It answers with this status.
    Refused { status: u16, why: String },
}

/// A decision, and all that led there.
struct Explained<'a> {
    facts: &'a RequestFacts<'a>,
    decision: Decision,
    /// What may still stand in the way.
    notes: Vec<String>,
}

impl<'a> Explained<'a> {
    fn decide(file: &ConfigFile, facts: &'a RequestFacts<'a>, (names, body): (&LocalNames, &Value)) -> Self {
        let router = &file.gateway.router;
        let decision = if let Some(guardrail) = &facts.blocked_by {
            Decision::Refused { status: 400, why: format!("the guardrail {guardrail:?} blocks the prompt") }
        } else {
            let tenant = &facts.tenant.name;
            match router.route(&facts.asked, &facts.for_router(), &|name: &str| names.stands_for(name, tenant)) {
                Ok(route) => Decision::Goes(route),
                Err(refused) => Decision::Refused { status: status_of(&refused), why: refused.to_string() },
            }
        };
        let mut notes = without_price(file, facts, &decision);
        notes.extend(beyond_budget(file, facts, body, &decision));
        if draws(router, &facts.asked) {
            let draw = facts.draw;
            notes.push(format!("weights were drawn with {draw}; a server draws anew for each request (--draw)"));
        }
        Self { facts, decision, notes }
    }

    fn in_words(&self) -> String {
        let style = Style::for_stdout();
        let mut text = String::new();
        match &self.decision {
            Decision::Goes(route) => {
                let _ = writeln!(text, "{}", style.bold(&format!("A request for {} goes to:", self.facts.asked)));
                for (at, target) in route.targets.iter().enumerate() {
                    let otherwise = if at == 0 { "" } else { ", where the one before fails before its first byte" };
                    let _ = writeln!(text, "  {}. {}{otherwise}", at + 1, place(target));
                }
                let _ = writeln!(text, "{}", style.bold("Because:"));
                for why in &route.why {
                    let _ = writeln!(text, "  {why}");
                }
            }
            Decision::Refused { status, why } => {
                let head = format!("A request for {} is refused with {status}:", self.facts.asked);
                let _ = writeln!(text, "{}\n  {why}", style.bold(&head));
            }
        }
        let _ = writeln!(text, "{}", style.bold("What was known:"));
        for Known { name, value } in &self.facts.known {
            let _ = writeln!(text, "  {name}: {value}");
        }
        for note in &self.notes {
            let _ = writeln!(text, "{} {note}", style.dim("note:"));
        }
        text
    }

    fn as_json(&self) -> String {
        let known: serde_json::Map<String, Value> =
            self.facts.known.iter().map(|known| (known.name.to_owned(), json!(known.value))).collect();
        let (targets, why, refused) = match &self.decision {
            Decision::Goes(route) => {
                (route.targets.iter().map(ToString::to_string).collect(), route.why.clone(), Value::Null)
            }
            Decision::Refused { status, why } => (Vec::new(), Vec::new(), json!({"status": status, "why": why})),
        };
        let value = json!({
            "model": self.facts.asked, "targets": targets, "why": why, "refused": refused, "known": known,
            "notes": self.notes,
        });
        format!("{value:#}\n")
    }
}

fn place(target: &Target) -> String {
    match target {
        Target::Local => "the model served here (local)".to_owned(),
        Target::LocalModel(name) => format!("{name}, here (local)"),
        Target::Upstream { upstream, model } => format!("{model} at the upstream {upstream}"),
    }
}

/// As a server would answer.
fn status_of(refused: &Refused) -> u16 {
    GatewayError::from(refused.clone()).shown().0
}

/// Whether a virtual model draws by weight.
fn draws(router: &Router, asked: &str) -> bool {
    let choices = router.virtual_models.get(asked).into_iter().flat_map(|model| &model.rules).flat_map(|rule| &rule.to);
    choices.into_iter().any(|choice| matches!(choice, Choice::Weighted(_)))
}

/// Targets that the tenant's budget has no room for.
fn beyond_budget(file: &ConfigFile, facts: &RequestFacts<'_>, body: &Value, decision: &Decision) -> Vec<String> {
    let (Decision::Goes(route), Some(left)) = (decision, facts.budget_left) else { return Vec::new() };
    let note = |target: &Target| {
        let Target::Upstream { upstream, model } = target else { return None };
        let upstream = file.gateway.upstreams.iter().find(|known| known.name == *upstream)?;
        let entry = upstream.models.iter().find(|entry| entry.id == **model)?;
        let most = most_it_can_cost(body, entry, facts.default_output, UnixMillis::now())?;
        (most > left).then(|| {
            format!("{target} may cost up to {most} and {left} of the budget is left, so the call would be refused there: ask for fewer tokens")
        })
    };
    route.targets.iter().filter_map(note).collect()
}

/// Targets that a budget would close, as nobody knows what they cost.
fn without_price(file: &ConfigFile, facts: &RequestFacts<'_>, decision: &Decision) -> Vec<String> {
    let Decision::Goes(route) = decision else { return Vec::new() };
    let note = |target: &Target| {
        let Target::Upstream { upstream, model } = target else { return None };
        let upstream = file.gateway.upstreams.iter().find(|known| known.name == *upstream)?;
        let entry = upstream.models.iter().find(|entry| entry.id == **model)?;
        let has_budget = facts.has_budget || !upstream.budgets.is_empty();
        (has_budget && entry.price_list(Utc::now()).is_err()).then(|| {
            format!("{target} has no price, so a budget would refuse the call: give it one in the upstream's prices")
        })
    };
    route.targets.iter().filter_map(note).collect()
}
