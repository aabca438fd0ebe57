//! Decisions, held against sentences of the contract; and what no configuration may ever do, against random ones.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{
    route::{LocalName, Otherwise, Overflow},
    *,
};
use crate::money::Money;

fn target(text: &str) -> Target {
    let upstreams: BTreeSet<Arc<str>> = ["openai", "claude"].map(Arc::from).into();
    Target::parse(text, &upstreams)
}

fn tenant() -> TenantRouting {
    TenantRouting { name: "acme".into(), privacy: PrivacyClass::Any, models: vec!["*".to_owned()], overflow: None }
}

fn facts(tenant: &TenantRouting) -> Facts<'_> {
    Facts {
        grant: None,
        tenant,
        privacy: tenant.privacy,
        task: None,
        reasoning_effort: None,
        has_tools: false,
        has_images: false,
        prompt_tokens: 100,
        has_personal_data: false,
        must_stay: false,
        language: None,
        budget_left: None,
        local: LocalState { max_prompt_tokens: 8000, ..LocalState::default() },
        now: Moment::default(),
        draw: 0.0,
    }
}

fn rule(when: Condition, to: &[&str]) -> Rule {
    Rule { when, to: to.iter().map(|text| Choice::One(target(text))).collect() }
}

fn router(rules: Vec<Rule>) -> Router {
    let auto = VirtualModel { name: "auto".into(), rules };
    Router {
        virtual_models: [(auto.name.clone(), auto)].into(),
        upstream_models: vec![target("openai/gpt-4.1"), target("claude/opus")],
    }
}

fn local(name: &str) -> LocalName {
    match name {
        "base" => LocalName::Base,
        "support-fr" => LocalName::Adapter,
        _ => LocalName::Unknown,
    }
}

fn names(route: &Result<Route, Refused>) -> Vec<String> {
    route.as_ref().map(|route| route.targets.iter().map(ToString::to_string).collect()).unwrap_or_default()
}

fn overflow(adapters: &[&str], otherwise: Otherwise) -> Overflow {
    Overflow {
        when_ttft_over: Duration::from_secs(2),
        to: target("openai/gpt-4.1"),
        adapters: adapters.iter().map(|&name| name.to_owned()).collect(),
        otherwise,
    }
}

#[test]
fn a_name_leads_to_what_it_names_and_a_strangers_name_to_nothing() {
    let (router, tenant) = (router(vec![]), tenant());
    for (asked, expected) in [("base", "base"), ("support-fr", "support-fr"), ("openai/gpt-4.1", "openai/gpt-4.1")] {
        assert_eq!(names(&router.route(asked, &facts(&tenant), &local)), [expected]);
    }
    for asked in ["openai/gpt-9", "other", "local", ""] {
        let refused = router.route(asked, &facts(&tenant), &local).unwrap_err();
        assert_eq!(refused, Refused::UnknownModel { asked: asked.to_owned() });
    }
}

#[test]
fn a_model_that_a_tenant_may_not_use_is_as_good_as_not_there() {
    let router = router(vec![rule(Condition::default(), &["base"])]);
    let tenant = TenantRouting { models: vec!["claude/*".to_owned(), "base".to_owned()], ..tenant() };
    for (asked, is_there) in
        [("base", true), ("claude/opus", true), ("openai/gpt-4.1", false), ("support-fr", false), ("auto", false)]
    {
        let route = router.route(asked, &facts(&tenant), &local);
        let expected = Refused::UnknownModel { asked: asked.to_owned() };
        assert!(if is_there { route.is_ok() } else { route.unwrap_err() == expected }, "{asked}");
    }
}

#[test]
fn a_local_only_request_that_names_an_upstream_is_told_so() {
    let tenant = TenantRouting { privacy: PrivacyClass::LocalOnly, ..tenant() };
    let refused = router(vec![]).route("openai/gpt-4.1", &facts(&tenant), &local).unwrap_err();
    assert!(matches!(&refused, Refused::NotAllowed { why } if why.contains("local-only")), "{refused}");
}

#[test]
fn the_first_rule_that_holds_and_may_be_used_decides() {
    let hard = Condition { reasoning_effort: Some(vec!["high".to_owned()]), ..Condition::default() };
    let personal = Condition { personal_data: Some(true), ..Condition::default() };
    let router = router(vec![
        rule(personal, &["local"]),
        rule(hard, &["openai/gpt-4.1", "claude/opus"]),
        rule(Condition::default(), &["local"]),
    ]);
    let tenant = tenant();
    let plain = facts(&tenant);
    let hard = Facts { reasoning_effort: Some("high"), ..plain.clone() };
    let hard_and_personal = Facts { has_personal_data: true, ..hard.clone() };
    assert_eq!(names(&router.route("auto", &plain, &local)), ["local"]);
    assert_eq!(names(&router.route("auto", &hard, &local)), ["openai/gpt-4.1", "claude/opus"]);
    assert_eq!(names(&router.route("auto", &hard_and_personal, &local)), ["local"]);
    // A rule whose targets are closed to the tenant is skipped.
    let poor = TenantRouting { models: vec!["auto".to_owned()], ..tenant.clone() };
    assert_eq!(names(&router.route("auto", &Facts { tenant: &poor, ..hard }, &local)), ["local"]);
}

#[test]
fn where_no_rule_is_left_the_refusal_says_what_was_tried() {
    let router = router(vec![rule(Condition { tools: Some(true), ..Condition::default() }, &["local"])]);
    let refused = router.route("auto", &facts(&tenant()), &local).unwrap_err();
    assert!(refused.to_string().contains("rule 1 of auto does not apply"), "{refused}");
}

#[test]
fn local_first_puts_what_runs_here_in_front() {
    let router = router(vec![rule(Condition::default(), &["openai/gpt-4.1", "base", "claude/opus"])]);
    let tenant = tenant();
    let first = Facts { privacy: PrivacyClass::LocalFirst, ..facts(&tenant) };
    assert_eq!(names(&router.route("auto", &first, &local)), ["base", "openai/gpt-4.1", "claude/opus"]);
    assert_eq!(names(&router.route("auto", &facts(&tenant), &local))[0], "openai/gpt-4.1");
}

#[test]
fn what_cannot_run_here_goes_where_it_can() {
    let router = router(vec![rule(Condition::default(), &["local", "openai/gpt-4.1"])]);
    let tenant = tenant();
    let long = Facts { prompt_tokens: 9000, ..facts(&tenant) };
    assert_eq!(names(&router.route("auto", &long, &local)), ["openai/gpt-4.1"]);
    // Named outright, the local route itself says what is wrong.
    assert_eq!(names(&router.route("base", &long, &local)), ["base"]);
}

fn picture() -> CannotTake {
    CannotTake { field: "messages[0].content[1]".to_owned(), why: "messages[0].content[1] is image_url".to_owned() }
}

#[test]
fn a_picture_goes_where_it_is_taken_or_is_refused_by_its_field() {
    let router = router(vec![rule(Condition::default(), &["local", "openai/gpt-4.1"])]);
    let plain = tenant();
    fn with_picture(tenant: &TenantRouting) -> Facts<'_> {
        let mut facts = facts(tenant);
        facts.local.cannot = Some(picture());
        facts
    }
    let seen = with_picture(&plain);
    assert_eq!(names(&router.route("auto", &seen, &local)), ["openai/gpt-4.1"]);
    assert_eq!(names(&router.route("claude/opus", &seen, &local)), ["claude/opus"]);
    let refused = |facts: &Facts<'_>, asked: &str| match router.route(asked, facts, &local) {
        Err(Refused::CannotTake(what)) => what.field,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&seen, "base"), "messages[0].content[1]");
    let private = Facts { privacy: PrivacyClass::LocalOnly, ..with_picture(&plain) };
    assert_eq!(refused(&private, "auto"), "messages[0].content[1]");
    // An overflow is where requests go that cannot be answered here in time, and never is not in time.
    for otherwise in [Otherwise::Wait, Otherwise::Refuse] {
        let overflowing = TenantRouting { overflow: Some(overflow(&[], otherwise)), ..tenant() };
        assert_eq!(names(&router.route("base", &with_picture(&overflowing), &local)), ["openai/gpt-4.1"]);
        let kept = Facts { must_stay: true, ..with_picture(&overflowing) };
        assert_eq!(refused(&kept, "base"), "messages[0].content[1]");
        assert_eq!(refused(&with_picture(&overflowing), "support-fr"), "messages[0].content[1]");
    }
}

#[test]
fn a_request_overflows_before_it_waits_too_long() {
    let router = router(vec![]);
    let tenant = TenantRouting { overflow: Some(overflow(&[], Otherwise::Wait)), ..tenant() };
    let slow = |seconds| {
        let mut facts = facts(&tenant);
        facts.local.predicted_ttft = Some(Duration::from_secs(seconds));
        facts
    };
    // Fast enough: overflow is for what is turned away here all the same, by a full queue for one.
    assert_eq!(names(&router.route("base", &slow(1), &local)), ["base", "openai/gpt-4.1"]);
    // The local model stays as what is tried when the upstream fails.
    assert_eq!(names(&router.route("base", &slow(3), &local)), ["openai/gpt-4.1", "base"]);
    assert!(router.route("base", &slow(3), &local).unwrap().overflows(0));
    let quick = router.route("base", &slow(1), &local).unwrap();
    assert_eq!([0, 1].map(|at| quick.overflows(at)), [false, true]);
    let named = Facts { local: LocalState::default(), ..slow(3) };
    assert!(
        router.route("openai/gpt-4.1", &named, &local).unwrap().overflow.is_none(),
        "it goes where it was asked to go"
    );
    let mut full = facts(&tenant);
    full.local.shortage = Some(Shortage::Blocks);
    assert_eq!(names(&router.route("base", &full, &local)), ["openai/gpt-4.1", "base"]);
    full.local.shortage = Some(Shortage::Model);
    let route = router.route("base", &full, &local).unwrap();
    assert!(
        route.why.iter().any(|why| why.starts_with("the model is not loaded here: it overflows")),
        "{:?}",
        route.why
    );
    // Not for an adapter, unless it is declared equal; not for what must stay.
    assert_eq!(names(&router.route("support-fr", &slow(3), &local)), ["support-fr"]);
    let private = Facts { privacy: PrivacyClass::LocalOnly, ..slow(3) };
    assert_eq!(names(&router.route("base", &private, &local)), ["base"]);
    let kept = Facts { must_stay: true, ..slow(3) };
    assert_eq!(names(&router.route("base", &kept, &local)), ["base"]);
    let declared = TenantRouting { overflow: Some(overflow(&["support-*"], Otherwise::Wait)), ..tenant.clone() };
    let declared = Facts { tenant: &declared, ..slow(3) };
    assert_eq!(names(&router.route("support-fr", &declared, &local))[0], "openai/gpt-4.1");
}

#[test]
fn what_a_rule_about_personal_data_keeps_here_does_not_overflow() {
    let rule = |personal| Rule {
        when: Condition { personal_data: personal, ..Condition::default() },
        to: vec![Choice::One(target("base"))],
    };
    let router = router(vec![rule(Some(true)), rule(None)]);
    let tenant = TenantRouting { overflow: Some(overflow(&[], Otherwise::Wait)), ..tenant() };
    for (has_personal_data, predicted, expected) in [
        (true, 7, vec!["base"]),
        (true, 1, vec!["base"]),
        (false, 7, vec!["openai/gpt-4.1", "base"]),
        (false, 1, vec!["base", "openai/gpt-4.1"]),
    ] {
        let mut facts = Facts { has_personal_data, ..facts(&tenant) };
        facts.local.predicted_ttft = Some(Duration::from_secs(predicted));
        let route = router.route("auto", &facts, &local);
        assert_eq!(names(&route), expected, "{has_personal_data} {predicted}");
        if has_personal_data && predicted == 7 {
            assert!(route.unwrap().why.last().unwrap().contains("rule 1 of auto says where personal data goes"));
        }
    }
}

#[test]
fn what_a_budget_keeps_from_overflowing_is_refused_where_waiting_is() {
    for (otherwise, is_refused) in [(Otherwise::Refuse, true), (Otherwise::Wait, false)] {
        let tenant = TenantRouting { overflow: Some(overflow(&[], otherwise)), ..tenant() };
        let mut facts = facts(&tenant);
        facts.local.predicted_ttft = Some(Duration::from_secs(7));
        let route = router(vec![]).route("base", &facts, &local).unwrap();
        assert_eq!(route.refused_instead(0).is_some(), is_refused);
        assert!(route.refused_instead(1).is_none());
        if let Some(refused) = route.refused_instead(0) {
            assert!(refused.to_string().contains("the budget has no room for openai/gpt-4.1"), "{refused}");
        }
    }
}

#[test]
fn where_waiting_is_refused_the_wait_is_told_honestly() {
    let tenant = TenantRouting { overflow: Some(overflow(&[], Otherwise::Refuse)), ..tenant() };
    let mut facts = Facts { privacy: PrivacyClass::LocalOnly, ..facts(&tenant) };
    facts.local.predicted_ttft = Some(Duration::from_secs(7));
    let refused = router(vec![]).route("base", &facts, &local).unwrap_err();
    let Refused::TooSlow { retry_after, .. } = &refused else { panic!("{refused}") };
    assert_eq!(*retry_after, Duration::from_secs(5));
    let told = refused.to_string();
    assert!(told.starts_with("the first token would take about 7.0s here, the limit is 2.0s, and"), "{told}");
    // Fast enough, were there room: no word of a time that is within the limit.
    facts.local = LocalState {
        predicted_ttft: Some(Duration::from_millis(1500)),
        shortage: Some(Shortage::Blocks),
        ..facts.local
    };
    let refused = router(vec![]).route("base", &facts, &local).unwrap_err();
    let Refused::TooSlow { retry_after, .. } = &refused else { panic!("{refused}") };
    assert_eq!(*retry_after, Duration::from_millis(1500));
    let told = refused.to_string();
    assert!(told.starts_with("the cache has no free block here, and the overflow is closed"), "{told}");
}

#[test]
fn weights_share_requests_out_and_skip_what_is_closed() {
    let weighted = Rule {
        when: Condition::default(),
        to: vec![Choice::Weighted(vec![(target("openai/gpt-4.1"), 1), (target("base"), 3)])],
    };
    let router = router(vec![weighted]);
    let tenant = tenant();
    let draw = |draw, privacy| Facts { privacy, draw, ..facts(&tenant) };
    let count = (0..1000)
        .filter(|at| {
            let facts = draw(f64::from(*at) / 1000.0, PrivacyClass::Any);
            names(&router.route("auto", &facts, &local)) == ["openai/gpt-4.1"]
        })
        .count();
    assert_eq!(count, 250);
    for at in [0.0, 0.5, 1.0] {
        assert_eq!(names(&router.route("auto", &draw(at, PrivacyClass::LocalOnly), &local)), ["base"]);
    }
}

#[test]
fn conditions_hold_where_all_that_is_set_does() {
    let tenant = tenant();
    let at = |hour: u16, weekday| Facts { now: Moment { minute_of_day: hour * 60, weekday }, ..facts(&tenant) };
    let night = Condition { time: Some(TimeOfDay { from: 22 * 60, to: 6 * 60 }), ..Condition::default() };
    assert_eq!([21, 22, 0, 5, 6].map(|hour| night.holds(&at(hour, 0))), [false, true, true, true, false]);
    let weekend = Condition { weekdays: Some(vec![5, 6]), ..Condition::default() };
    assert_eq!([0, 5, 6].map(|day| weekend.holds(&at(12, day))), [false, true, true]);
    let poor = Condition { budget_left_under: Money::from_dollars(1.0), ..Condition::default() };
    assert!(!poor.holds(&facts(&tenant)), "who has no budget has no little of it left");
    assert!(poor.holds(&Facts { budget_left: Money::from_dollars(0.5), ..facts(&tenant) }));
    let slow = Condition { ttft_over: Some(Duration::ZERO), ..Condition::default() };
    assert!(!slow.holds(&facts(&tenant)), "what is not known makes no rule fire");
    let both = Condition { tools: Some(true), images: Some(false), ..Condition::default() };
    assert!(both.holds(&Facts { has_tools: true, ..facts(&tenant) }));
    assert!(!both.holds(&Facts { has_tools: true, has_images: true, ..facts(&tenant) }));
}

fn any_target() -> impl Strategy<Value = Target> {
    select(vec!["local", "base", "support-fr", "nothing", "openai/gpt-4.1", "claude/opus", "claude/other"])
        .prop_map(target)
}

fn any_choice() -> impl Strategy<Value = Choice> {
    prop_oneof![any_target().prop_map(Choice::One), vec((any_target(), 0_u32..4), 1..4).prop_map(Choice::Weighted),]
}

fn any_condition() -> impl Strategy<Value = Condition> {
    (option::of(any::<bool>()), option::of(any::<bool>()), option::of(0_usize..20_000)).prop_map(
        |(tools, personal_data, prompt_tokens_over)| Condition {
            tools,
            prompt_tokens_over,
            personal_data,
            ..Condition::default()
        },
    )
}

/// Of every field, in few values, so that many are alike.
fn any_full_condition() -> impl Strategy<Value = Condition> {
    let some = |words: &'static [&'static str]| option::of(vec(select(words).prop_map(str::to_owned), 1..3));
    let flags = (option::of(any::<bool>()), option::of(any::<bool>()), option::of(any::<bool>()));
    let days = option::of(vec(0_u8..3, 1..3));
    let limits = (option::of(0_usize..3), option::of(0_u64..3), option::of(0_i64..3));
    let classes = option::of(vec(select(vec![PrivacyClass::LocalFirst, PrivacyClass::Any]), 1..3));
    (some(&["chat", "code"]), some(&["eng", "fra"]), flags, days, limits, classes).prop_map(
        |(tasks, languages, (tools, images, over), weekdays, (tokens, ttft, left), privacy)| Condition {
            privacy,
            tasks,
            languages,
            tools,
            images,
            over_local_context: over,
            weekdays,
            prompt_tokens_over: tokens,
            ttft_over: ttft.map(Duration::from_secs),
            budget_left_under: left.map(Money::from_nanos),
            ..Condition::default()
        },
    )
}

proptest! {
    /// What `check` calls a rule that is never asked would never have been.
    #[test]
    fn what_a_condition_covers_never_holds_without_it(
        (one, other) in (any_full_condition(), any_full_condition()),
        (task, language) in (select(vec![None, Some("chat"), Some("code")]), select(vec![None, Some("eng"), Some("fra")])),
        (has_tools, has_images, weekday) in (any::<bool>(), any::<bool>(), 0_u8..3),
        (prompt_tokens, ttft, left) in (0_usize..5, option::of(0_u64..5), option::of(0_i64..5)),
        privacy in select(vec![PrivacyClass::LocalFirst, PrivacyClass::Any]),
    ) {
        prop_assert!(one.covers(&one) && Condition::default().covers(&one));
        let tenant = tenant();
        let facts = Facts {
            privacy,
            task,
            language,
            has_tools,
            has_images,
            prompt_tokens,
            budget_left: left.map(Money::from_nanos),
            now: Moment { minute_of_day: 0, weekday },
            local: LocalState { max_prompt_tokens: 2, predicted_ttft: ttft.map(Duration::from_secs), ..LocalState::default() },
            ..facts(&tenant)
        };
        if one.covers(&other) && other.holds(&facts) {
            prop_assert!(one.holds(&facts), "{one:?} does not hold where {other:?} does");
        }
    }

    #[test]
    fn what_is_local_only_or_kept_never_gets_an_upstream(
        rules in vec((any_condition(), vec(any_choice(), 0..4)).prop_map(|(when, to)| Rule { when, to }), 0..5),
        overflow_to in option::of(any_target()),
        patterns in vec(select(vec!["*", "openai/*", "base", "auto", "support-fr"]), 0..4),
        asked in select(vec!["auto", "base", "support-fr", "openai/gpt-4.1", "claude/opus", "nothing"]),
        (has_tools, has_personal_data, must_stay, is_exhausted, cannot) in any::<(bool, bool, bool, bool, bool)>(),
        prompt_tokens in 0_usize..20_000,
        ttft in option::of(0_u64..10),
        draw in 0.0_f64..=1.0,
        class in select(vec![PrivacyClass::LocalOnly, PrivacyClass::LocalFirst, PrivacyClass::Any]),
    ) {
        let router = router(rules);
        let tenant = TenantRouting {
            models: patterns.iter().map(|&pattern| pattern.to_owned()).collect(),
            overflow: overflow_to.map(|to| Overflow { to, ..overflow(&["*"], Otherwise::Wait) }),
            ..tenant()
        };
        let facts = Facts {
            privacy: class,
            has_tools,
            has_personal_data,
            must_stay,
            prompt_tokens,
            draw,
            local: LocalState {
                max_prompt_tokens: 8000,
                predicted_ttft: ttft.map(Duration::from_secs),
                shortage: is_exhausted.then_some(Shortage::Blocks),
                cannot: cannot.then(picture),
            },
            ..facts(&tenant)
        };
        let route = router.route(asked, &facts, &local);
        prop_assert_eq!(&route, &router.route(asked, &facts, &local));
        if let (true, Ok(route)) = (cannot, &route) {
            prop_assert!(!route.targets.iter().any(Target::is_local), "{route:?}");
        }
        if let Ok(route) = route {
            prop_assert!(!route.targets.is_empty());
            for target in &route.targets {
                if class == PrivacyClass::LocalOnly || must_stay {
                    prop_assert!(target.is_local(), "{target}");
                }
                let name = target.to_string();
                let is_allowed = patterns.iter().any(|pattern| target::fits(pattern, &name));
                prop_assert!(is_allowed || *target == Target::Local, "{target}");
            }
        }
    }
}
