//! The decision: which places to try, in order, and why.
//!
//! **Invariant**: the same facts give the same route; every target of a route may be used by the tenant and allowed by the
//! privacy class, and a route has at least one.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use super::{PrivacyClass, Target, VirtualModel, target::fits};
use crate::{
    keys::{KeyGrant, NameOf},
    money::Money,
};

/// What decides about a tenant's requests.
#[derive(Clone, Debug, PartialEq)]
pub struct TenantRouting {
    /// As it is configured.
    pub name: Arc<str>,
    /// The loosest class a request of it can have.
    pub privacy: PrivacyClass,
    /// Models it may name or be sent to: names, or beginnings with `*`.
    pub models: Vec<String>,
    /// Where requests go that would wait too long here.
    pub overflow: Option<Overflow>,
}

/// Where requests go that would wait too long here.
#[derive(Clone, Debug, PartialEq)]
pub struct Overflow {
    /// The longest predicted time to first token that is waited for.
    pub when_ttft_over: Duration,
    /// Where to instead.
    pub to: Target,
    /// Adapters whose requests the upstream answers as well: names, or beginnings with `*`. None by default, since an
    /// adapter is there because its base (or another model) answers otherwise.
    pub adapters: Vec<String>,
    /// What happens where the overflow is closed.
    pub otherwise: Otherwise,
}

/// What happens to a request that should overflow and cannot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Otherwise {
    /// It waits here.
    #[default]
    Wait,
    /// 429, with the time after which it would have been answered in time.
    Refuse,
}

/// A moment, as rules ask for it; UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// 0..1440
    pub minute_of_day: u16,
    /// Monday is 0.
    pub weekday: u8,
}

/// As days are written, by number.
pub const WEEKDAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// What this process could do with the request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalState {
    /// Tokens a prompt may have and still be answered.
    pub max_prompt_tokens: usize,
    /// None: not known yet.
    pub predicted_ttft: Option<Duration>,
    /// What is wanting here for the moment.
    pub shortage: Option<Shortage>,
    /// What the local model cannot take of it.
    pub cannot: Option<CannotTake>,
}

/// What this process is short of, so that a request would wait whatever its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// No block of the cache is free and others wait already.
    Blocks,
    /// The model is not loaded yet, or could not be.
    Model,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocks => "the cache has no free block here",
            Self::Model => "the model is not loaded here",
        })
    }
}

/// A part of a request that a place cannot take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CannotTake {
    /// Its field, as `messages[0].content[1]`.
    pub field: String,
    /// What stands there, and why that is too much.
    pub why: String,
}

/// What is known of a request.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own, and rules ask for any of them")]
pub struct Facts<'a> {
    /// Whose it is.
    pub tenant: &'a TenantRouting,
    /// What its key takes away of what the tenant may; None: nothing.
    pub grant: Option<&'a KeyGrant>,
    /// The tenant's class, tightened by the request.
    pub privacy: PrivacyClass,
    /// `x-bindery-task`.
    pub task: Option<&'a str>,
    /// As the request says.
    pub reasoning_effort: Option<&'a str>,
    /// Tools are offered.
    pub has_tools: bool,
    /// Images are among the parts.
    pub has_images: bool,
    /// About: before a tokenizer has counted.
    pub prompt_tokens: usize,
    /// Personal data was found in it.
    pub has_personal_data: bool,
    /// A guardrail says that it must stay here.
    pub must_stay: bool,
    /// ISO 639-3, where it was recognised.
    pub language: Option<&'a str>,
    /// Of the tenant's budget; None where it has none.
    pub budget_left: Option<Money>,
    /// What would happen here.
    pub local: LocalState,
    /// Now.
    pub now: Moment,
    /// Evenly spread over 0..1 and fixed for the request: decides draws by weight.
    pub draw: f64,
}

/// Places to try in order, the next where one fails before its first byte.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// At least one.
    pub targets: Vec<Target>,
    /// What led there, a sentence each, without anything of the request's text.
    pub why: Vec<String>,
    /// The tenant's overflow among the places, where it is there: what goes to it is paid from the overflow's budget, too.
    pub overflow: Option<Overflowing>,
}

/// Where a route leads to the tenant's overflow.
#[derive(Clone, Debug, PartialEq)]
pub struct Overflowing {
    /// Which of the places. The first: the request would wait too long here; the last: only if it is turned away here.
    pub at: usize,
    /// What the tenant wants to hear instead of waiting where its budget has no room for it; None: it waits.
    pub or: Option<Refused>,
}

impl Route {
    /// Whether a place is the tenant's overflow.
    pub fn overflows(&self, at: usize) -> bool {
        self.overflow.as_ref().is_some_and(|overflow| overflow.at == at)
    }

    /// What to say instead of trying the next place where the budget has no room for this one.
    pub fn refused_instead(&self, at: usize) -> Option<&Refused> {
        self.overflow.as_ref().filter(|overflow| overflow.at == at)?.or.as_ref()
    }
}

/// Why there is no route.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refused {
    /// 404: nothing of this name, or not for this tenant to know.
    #[error("the model {asked:?} is not offered here")]
    UnknownModel {
        /// As it was asked for.
        asked: String,
    },
    /// 403: it exists, and something forbids it.
    #[error("{why}")]
    NotAllowed {
        /// What forbids it, and the next step.
        why: String,
    },
    /// 400: something in it that no place takes which it may go to.
    #[error("{}; no other place that this request may go to takes it: leave it out, or name a model that takes it", .0.why)]
    CannotTake(CannotTake),
    /// 400: no place that is allowed can answer it.
    #[error("{why}")]
    NoPlace {
        /// What it needs, and the next step.
        why: String,
    },
    /// 429: it would wait too long.
    #[error("{pressed}, and the overflow is closed: {why}")]
    TooSlow {
        /// What makes it wait here.
        pressed: String,
        /// Why it does not go up.
        why: String,
        /// When it would be answered in time, as far as can be said now.
        retry_after: Duration,
    },
}

/// The configured part of the decision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Router {
    /// By name.
    pub virtual_models: BTreeMap<Arc<str>, VirtualModel>,
    /// Models that upstreams offer, as `UPSTREAM/MODEL`.
    pub upstream_models: Vec<Target>,
}

/// What a name stands for in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalName {
    /// The base, by any of its names.
    Base,
    /// An adapter that the caller may see.
    Adapter,
    /// Nothing.
    Unknown,
}

impl Router {
    /// Where a request for `asked` goes. `local_name` says what a name stands for here, for this caller.
    ///
    /// # Errors
    /// [`Refused`], by what the caller can do about it.
    pub fn route(
        &self,
        asked: &str,
        facts: &Facts<'_>,
        local_name: &dyn Fn(&str) -> LocalName,
    ) -> Result<Route, Refused> {
        let (draft, kept) = if let Some(model) = self.virtual_models.get(asked) {
            Self::by_rules(model, facts, local_name)?
        } else {
            (self.by_name(asked, facts, local_name)?, None)
        };
        with_overflow(local_able(draft, facts)?, (asked, kept), facts, local_name)
    }

    fn by_name(
        &self,
        asked: &str,
        facts: &Facts<'_>,
        local_name: &dyn Fn(&str) -> LocalName,
    ) -> Result<Route, Refused> {
        let unknown = || Refused::UnknownModel { asked: asked.to_owned() };
        let upstream = self.upstream_models.iter().find(|target| target.to_string() == asked);
        let target = match (local_name(asked), upstream) {
            // What is served here comes before what is only named alike.
            (LocalName::Base | LocalName::Adapter, _) => Target::LocalModel(asked.into()),
            (LocalName::Unknown, Some(target)) => target.clone(),
            (LocalName::Unknown, None) => return Err(unknown()),
        };
        match forbidden(&target, facts, local_name) {
            // To a tenant that may not use it a model is as good as not there.
            Some(Forbidden::NotOffered) => Err(unknown()),
            Some(Forbidden::Leaves(why)) => Err(Refused::NotAllowed { why }),
            None => {
                let why = vec![format!("the request names {target}")];
                Ok(Route { why, targets: vec![target], overflow: None })
            }
        }
    }

    /// And why it may not overflow: whoever sends personal data to a place has not said that it may go to another.
    fn by_rules(
        model: &VirtualModel,
        facts: &Facts<'_>,
        local_name: &dyn Fn(&str) -> LocalName,
    ) -> Result<(Route, Option<String>), Refused> {
        if !is_allowed(&model.name, NameOf::Model, facts) || !model.leads_somewhere(local_name) {
            return Err(Refused::UnknownModel { asked: model.name.to_string() });
        }
        let mut why = Vec::new();
        for (at, rule) in model.rules.iter().enumerate() {
            let number = at + 1;
            if !rule.when.holds(facts) {
                why.push(format!("rule {number} of {} does not apply", model.name));
                continue;
            }
            let may = |target: &Target| {
                let is_there = match target {
                    Target::LocalModel(name) => local_name(name) != LocalName::Unknown,
                    Target::Local | Target::Upstream { .. } => true,
                };
                is_there && forbidden(target, facts, local_name).is_none()
            };
            let mut targets: Vec<Target> = Vec::new();
            for choice in &rule.to {
                match choice.draw(facts.draw, may) {
                    Some(target) if !targets.contains(target) => targets.push(target.clone()),
                    _ => {}
                }
            }
            if targets.is_empty() {
                why.push(format!(
                    "rule {number} of {} applies, but the tenant may use none of its targets",
                    model.name
                ));
                continue;
            }
            if facts.privacy == PrivacyClass::LocalFirst
                && !targets[0].is_local()
                && targets.iter().any(Target::is_local)
            {
                // A stable sort: false (local) before true.
                targets.sort_by_key(|target| !target.is_local());
                why.push("the privacy class local-first puts what runs here in front".to_owned());
            }
            why.push(format!("rule {number} of {} applies", model.name));
            let kept = (rule.when.personal_data == Some(true))
                .then(|| format!("rule {number} of {} says where personal data goes", model.name));
            return Ok((Route { targets, why, overflow: None }, kept));
        }
        let reasons = why.join("; ");
        Err(Refused::NotAllowed {
            why: format!("no rule of the model {:?} leads anywhere for this request: {reasons}", &*model.name),
        })
    }
}

/// Why a target may not be used.
enum Forbidden {
    /// The tenant's list of models, or its key's, does not hold it.
    NotOffered,
    /// It is an upstream's, and the request must stay here.
    Leaves(String),
}

fn forbidden(target: &Target, facts: &Facts<'_>, local_name: &dyn Fn(&str) -> LocalName) -> Option<Forbidden> {
    let Target::Upstream { .. } = target else {
        let Target::LocalModel(name) = target else { return None };
        let of = if local_name(name) == LocalName::Adapter { NameOf::Adapter } else { NameOf::Model };
        return (!is_allowed(name, of, facts)).then_some(Forbidden::NotOffered);
    };
    if !is_allowed(&target.to_string(), NameOf::Model, facts) {
        return Some(Forbidden::NotOffered);
    }
    if facts.privacy.leave().is_none() {
        let why = format!(
            "{target} is not on these premises, and the privacy class of this request is {}: name a local model",
            facts.privacy.as_str()
        );
        return Some(Forbidden::Leaves(why));
    }
    facts.must_stay.then(|| {
        let why =
            format!("a guardrail keeps this request on the premises, and {target} is not there: name a local model");
        Forbidden::Leaves(why)
    })
}

/// By the tenant's list and by its key's.
fn is_allowed(name: &str, of: NameOf, facts: &Facts<'_>) -> bool {
    facts.tenant.models.iter().any(|pattern| fits(pattern, name))
        && facts.grant.is_none_or(|grant| grant.admits(name, of))
}

/// Takes out local targets that cannot answer the request, where others can.
fn local_able(mut route: Route, facts: &Facts<'_>) -> Result<Route, Refused> {
    let local = &facts.local;
    let too_long = (facts.prompt_tokens > local.max_prompt_tokens).then(|| {
        format!(
            "the prompt has about {} tokens, the local model takes {}",
            facts.prompt_tokens, local.max_prompt_tokens
        )
    });
    let cannot = local.cannot.as_ref().map(|cannot| cannot.why.clone());
    let Some(cannot) = cannot.or(too_long) else { return Ok(route) };
    if route.targets.iter().all(Target::is_local) {
        // Of a prompt that is too long the local route itself says how much, in tokens that it has counted.
        return Ok(route);
    }
    let before = route.targets.len();
    route.targets.retain(|target| !target.is_local());
    if route.targets.len() < before {
        route.why.push(format!("it cannot run here: {cannot}"));
    }
    if route.targets.is_empty() {
        return Err(Refused::NoPlace { why: cannot });
    }
    Ok(route)
}

/// Sends what would wait too long here, or could never be answered, to the tenant's overflow, where that is open to it.
fn with_overflow(
    mut route: Route,
    (asked, kept): (&str, Option<String>),
    facts: &Facts<'_>,
    local_name: &dyn Fn(&str) -> LocalName,
) -> Result<Route, Refused> {
    let Some(Target::Local | Target::LocalModel(_)) = route.targets.first() else { return Ok(route) };
    let cannot = &facts.local.cannot;
    let stays = |route: Route| match cannot {
        Some(cannot) => Err(Refused::CannotTake(cannot.clone())),
        None => Ok(route),
    };
    let Some(overflow) = &facts.tenant.overflow else { return stays(route) };
    let limit = overflow.when_ttft_over;
    let predicted = facts.local.predicted_ttft;
    let is_slow = predicted.is_some_and(|time| time > limit);
    let shortage = facts.local.shortage;
    let is_pressed = is_slow || shortage.is_some() || cannot.is_some();
    let name = match &route.targets[0] {
        Target::LocalModel(name) => name.as_ref(),
        _ => asked,
    };
    let is_equal =
        local_name(name) != LocalName::Adapter || overflow.adapters.iter().any(|pattern| fits(pattern, name));
    let closed = match forbidden(&overflow.to, facts, local_name) {
        _ if kept.is_some() => kept,
        Some(Forbidden::NotOffered) => Some(format!("the tenant, or its key, may not use {}", overflow.to)),
        Some(Forbidden::Leaves(why)) => Some(why),
        None if cannot.is_some() && overflow.to.is_local() => Some(format!("{} is here, too", overflow.to)),
        None if !is_equal => Some(format!("{} is not declared to answer like the adapter {name:?}", overflow.to)),
        None => None,
    };
    if !is_pressed {
        // Nobody can predict everything: what is turned away here (a full queue, say) may still go there.
        if closed.is_none() && !route.targets.contains(&overflow.to) {
            route.targets.push(overflow.to.clone());
            route.overflow = Some(Overflowing { at: route.targets.len() - 1, or: None });
        }
        return Ok(route);
    }
    let pressed = match (cannot, predicted, shortage) {
        (Some(cannot), ..) => cannot.why.clone(),
        (None, Some(time), _) if is_slow => {
            format!("the first token would take about {time:.1?} here, the limit is {limit:.1?}")
        }
        (None, _, shortage) => shortage.map(|shortage| shortage.to_string()).unwrap_or_default(),
    };
    // Where time is not what is short, all that waits has to be done first.
    let wait = predicted.unwrap_or_default();
    let wait = if is_slow { wait.saturating_sub(limit) } else { wait };
    let refused =
        |why| Refused::TooSlow { pressed: pressed.clone(), why, retry_after: wait.max(Duration::from_secs(1)) };
    match (closed, overflow.otherwise) {
        (None, otherwise) => {
            route.why.push(format!("{pressed}: it overflows to {}", overflow.to));
            route.targets.retain(|target| *target != overflow.to && (cannot.is_none() || !target.is_local()));
            route.targets.insert(0, overflow.to.clone());
            let or = (otherwise == Otherwise::Refuse && cannot.is_none())
                .then(|| refused(format!("the budget has no room for {}", overflow.to)));
            route.overflow = Some(Overflowing { at: 0, or });
            Ok(route)
        }
        // Neither waiting nor coming back would help.
        (Some(_), _) if cannot.is_some() => stays(route),
        (Some(why), Otherwise::Wait) => {
            route.why.push(format!("{pressed}, and it waits: {why}"));
            Ok(route)
        }
        (Some(why), Otherwise::Refuse) => Err(refused(why)),
    }
}
