//! Files that are right, and every mistake with its line and its way out.

use std::time::Duration;

use super::*;
use crate::{
    ledger::{BudgetScope, Period},
    policy::{Choice, PrivacyClass, Target, TimeOfDay},
};

const WHOLE: &str = r#"
[server]
port = 1
[store]
url = "sqlite://bindery.db"
durability = "power-loss"
[local]
cost_per_hour = 2.10
compare_with = "openai/gpt-4.1"
[[upstreams]]
name = "openai"
kind = "openai"
api_key_env = "OPENAI_API_KEY"
models = ["gpt-4.1", "own-model"]
prices = { "own-model" = { input = 2.0, cached = 0.5, output = 8.0 } }
budget = { usd_per_month = 900.0 }
[[upstreams]]
name = "house"
kind = "openai-compatible"
base_url = "http://127.0.0.1:9/v1"
models = ["big"]
[[tenants]]
name = "acme"
api_key_env = "ACME_KEY"
privacy = "any"
models = ["*"]
weight = 2
limits = { requests_per_minute = 600, concurrent = 32 }
budget = { usd_per_day = 50.0 }
guardrails = ["pii-redact"]
overflow = { when_ttft_over = "2s", to = "openai/gpt-4.1", usd_per_day = 20.0 }
[[tenants]]
name = "vault"
privacy = "local-only"
[[routes]]
model = "auto"
rules = [
  { when = { pii = true }, to = "local" },
  { when = { reasoning_effort = ["medium", "high"], time = "22:00-06:00", weekdays = "sat" }, to = ["house/big", "openai/gpt-4.1"] },
  { to = [{ "local" = 9, "house/big" = 1 }, "local"] },
]
[[guardrails]]
name = "pii-redact"
kind = "pii"
action = "redact"
"#;

fn problems(text: &str) -> Vec<String> {
    let problems = GatewayConfig::parse(text).unwrap_err();
    let show = |problem: Problem| {
        format!("{}: {} ({})", problem.line.unwrap_or(0), problem.message, problem.hint.unwrap_or_default())
    };
    problems.into_iter().map(show).collect()
}

#[test]
fn a_whole_file_is_read() {
    let config = GatewayConfig::parse(WHOLE).unwrap();
    assert_eq!(config.local_cost_per_hour, Money::from_dollars(2.1));
    assert_eq!(config.reference.unwrap().id, "gpt-4.1");
    assert_eq!(config.store.unwrap().durability, Durability::PowerLoss);
    let [openai, house] = &config.upstreams[..] else { panic!("{:?}", config.upstreams) };
    assert_eq!((&*openai.name, &openai.provider), ("openai", &Provider::OpenAi));
    assert_eq!(openai.credential, CredentialSource::KeyEnv("OPENAI_API_KEY".to_owned()));
    assert_eq!(openai.models.iter().map(|model| model.id.as_str()).collect::<Vec<_>>(), ["gpt-4.1", "own-model"]);
    assert_eq!(openai.models[1].prices.len(), 1, "the operator's price");
    assert_eq!(
        (openai.budgets[0].per, &openai.budgets[0].scope),
        (Period::Month, &BudgetScope::Upstream("openai".to_owned()))
    );
    assert_eq!(
        (house.base_url.as_deref(), &house.credential),
        (Some("http://127.0.0.1:9/v1"), &CredentialSource::None)
    );
    let [acme, vault] = &config.tenants[..] else { panic!("{:?}", config.tenants) };
    assert_eq!((acme.routing.privacy, acme.weight, acme.limits.concurrent), (PrivacyClass::Any, 2, Some(32)));
    assert_eq!(acme.budgets[0].ceiling, Money::from_dollars(50.0).unwrap());
    let overflow = acme.routing.overflow.as_ref().unwrap();
    assert_eq!(
        (overflow.when_ttft_over, overflow.to.to_string()),
        (Duration::from_secs(2), "openai/gpt-4.1".to_owned())
    );
    assert_eq!(acme.overflow_budgets.len(), 1);
    assert_eq!((vault.routing.privacy, &vault.routing.models[..]), (PrivacyClass::LocalOnly, &["*".to_owned()][..]));
    let rules = &config.router.virtual_models["auto"].rules;
    assert_eq!(rules[0].to, [Choice::One(Target::Local)]);
    assert_eq!(rules[1].when.time, Some(TimeOfDay { from: 22 * 60, to: 6 * 60 }));
    assert_eq!(rules[1].when.weekdays, Some(vec![5]));
    assert!(matches!(&rules[2].to[..], [Choice::Weighted(both), Choice::One(Target::Local)] if both.len() == 2));
}

#[test]
fn an_empty_file_says_nothing_and_is_right() {
    let config = GatewayConfig::parse("[server]\nport = 1").unwrap();
    assert!(
        config.upstreams.is_empty() && config.tenants.is_empty() && config.store.is_none() && config.audit.is_none()
    );
}

#[test]
fn every_mistake_is_found_with_its_line_and_a_way_out() {
    let upstream = "[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = [\"gpt-4.1\"]\n";
    for (text, expected) in [
        (
            "[[upstreams]]\nname = \"up\"\nkind = \"opnai\"\nmodels = [\"a\"]".to_owned(),
            "3: \"opnai\" is no kind of upstream (it must be openai, anthropic",
        ),
        (
            "[[upstreams]]\nname = \"local\"\nkind = \"openai\"\nmodels = [\"a\"]".to_owned(),
            "2: \"local\" cannot name an upstream",
        ),
        (
            "[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = []".to_owned(),
            "4: the upstream \"up\" offers no model",
        ),
        (
            "[[upstreams]]\nname = \"up\"\nkind = \"azure\"\nmodels = [\"a\"]".to_owned(),
            "1: the upstream \"up\" of kind \"azure\" has no base_url",
        ),
        (format!("{upstream}colour = 1"), "5: unknown field `colour`, expected one of"),
        (format!("{upstream}{upstream}"), "6: the upstream \"up\" is in line 2 already"),
        (
            format!("{upstream}prices = {{ \"gpt-9\" = {{ input = 1.0, output = 1.0 }} }}"),
            "4: \"gpt-9\" has a price, a deployment or a description, and is not among",
        ),
        (
            "[[tenants]]\nname = \"a\"\nprivacy = \"open\"".to_owned(),
            "3: \"open\" is no privacy class (it must be local-only",
        ),
        ("[[tenants]]\nname = \"a\"\n[[tenants]]\nname = \"a\"".to_owned(), "4: the tenant \"a\" is in line 2 already"),
        (
            "[[tenants]]\nname = \"a\"\nguardrails = [\"pi\"]".to_owned(),
            "3: the guardrail \"pi\" is not there (add a [[guardrails]] with name = \"pi\"",
        ),
        ("[[tenants]]\nname = \"a\"\nweight = 0".to_owned(), "3: a weight of 0"),
        (
            "[[tenants]]\nname = \"a\"\nlimits = { concurrent = 0 }".to_owned(),
            "3: concurrent is 0, so the tenant \"a\" could ask for nothing (use 1 or more",
        ),
        ("[[tenants]]\nname = \"a\"\nmax_output_tokens = 0".to_owned(), "3: answers of 0 tokens"),
        (
            format!("{upstream}base_url = \"127.0.0.1:9/v1\""),
            "5: base_url is no URL of a server (write it with its scheme",
        ),
        (
            format!(
                "{upstream}[[tenants]]\nname = \"a\"\nmodels = [\"base\"]\noverflow = {{ when_ttft_over = \"1s\", to = \"up/gpt-4.1\" }}"
            ),
            "8: the overflow of the tenant \"a\" is closed for ever: up/gpt-4.1 is not among its models",
        ),
        ("[[routes]]\nmodel = \"auto\"\nrules = []".to_owned(), "2: the virtual model \"auto\" has no rule"),
        (
            "[[routes]]\nmodel = \"auto\"\nrules = [{ when = { prompt_tokens_over = 5 }, to = \"local\" }, \
             { when = { prompt_tokens_over = 50, tools = true }, to = \"local\" }]"
                .to_owned(),
            "3: rule 2 is never asked: rule 1, before it, applies wherever this one would",
        ),
        (
            "[[routes]]\nmodel = \"auto\"\nrules = [{ when = { budget_left_under = 1.0 }, to = \"local\" }]".to_owned(),
            "2: a rule of \"auto\" asks for budget_left_under, and no tenant has a budget",
        ),
        (
            "[audit]\npath = \"log\"\ncontents = \"encrypted\"".to_owned(),
            "1: audit log: `contents = \"encrypted\"` needs `contents_key_env`",
        ),
        ("[audit]\npath = \"log\"\nfsync_ms = 5".to_owned(), "1: audit log: `fsync_ms` means nothing"),
        ("[audit]\npath = \"log\"\nkeep_days = 0".to_owned(), "1: audit log: `keep_days` is 0"),
        ("[audit]\npath = \"log\"\nmax_segment_bytes = 10".to_owned(), "1: audit log: `max_segment_bytes` is 10"),
        ("[[tenants]]\nname = \"a\"\nbudget = { usd_per_day = 1.0 }".to_owned(), "1: a budget needs a store"),
        (
            format!(
                "{upstream}[[tenants]]\nname = \"a\"\nprivacy = \"local-only\"\noverflow = {{ when_ttft_over = \"2s\", to = \"up/gpt-4.1\" }}"
            ),
            "8: a local-only tenant sends nothing out, and has an overflow (remove overflow",
        ),
        (
            format!(
                "{upstream}[[tenants]]\nname = \"a\"\noverflow = {{ when_ttft_over = \"soon\", to = \"up/gpt-4.1\" }}"
            ),
            "7: \"soon\" is no length of time (write it as 500ms",
        ),
        (
            format!("{upstream}[[tenants]]\nname = \"a\"\noverflow = {{ when_ttft_over = \"1s\", to = \"local\" }}"),
            "7: an overflow leads to an upstream, and \"local\" is none",
        ),
        (
            format!("{upstream}[[routes]]\nmodel = \"auto\"\nrules = [{{ to = \"up/gpt-5\" }}]"),
            "7: no upstream offers \"up/gpt-5\" (known: up/gpt-4.1",
        ),
        (
            "[[routes]]\nmodel = \"auto\"\nrules = [{ to = \"auto\" }]".to_owned(),
            "3: \"auto\" is a virtual model itself",
        ),
        (
            "[[routes]]\nmodel = \"auto\"\nrules = [{ to = \"local\" }, { when = { tools = true }, to = \"local\" }]"
                .to_owned(),
            "3: rule 2 is never asked",
        ),
        (
            "[[routes]]\nmodel = \"auto\"\nrules = [{ when = { tenant = \"b\" }, to = \"local\" }]".to_owned(),
            "3: the tenant \"b\" is not there",
        ),
        (
            "[[routes]]\nmodel = \"auto\"\nrules = [{ when = { time = \"night\" }, to = \"local\" }]".to_owned(),
            "3: \"night\" is no time of day",
        ),
        (
            "[[guardrails]]\nname = \"g\"\nkind = \"webhook\"\naction = \"block\"\nurl = \"file://a\"".to_owned(),
            "1: guardrail `g`: it needs `url`",
        ),
        (
            format!(
                "{upstream}[[guardrails]]\nname = \"g\"\nkind = \"model\"\naction = \"block\"\nmodel = \"up/gpt-5\""
            ),
            "9: no upstream offers \"up/gpt-5\" (known: up/gpt-4.1",
        ),
        (
            "[[guardrails]]\nname = \"g\"\nkind = \"language\"\naction = \"block\"\nallow = [\n\"en\",\n\"klingon\"]"
                .to_owned(),
            "7: no language that can be told is called `klingon` (use a code of ISO 639-1 or 639-3 or the English name",
        ),
        (
            "[[routes]]\nmodel = \"auto\"\nrules = [\n{ when = { language = \"xx\" }, to = \"local\" }]".to_owned(),
            "4: no language that can be told is called `xx`",
        ),
        ("[store]\nurl = \"mysql://x\"".to_owned(), "2: "),
        (format!("{UP}max_attempts = 11"), "5: max_attempts is 11, the limits are 1 and 10"),
        (format!("{UP}idle_timeout = \"0s\""), "5: no time at all"),
        (format!("{UP}describe = {{ \"gpt-4.1\" = {{ like = \"gpt-77\" }} }}"), "4: "),
        ("[local]\ncost_per_hour = -1.0".to_owned(), "2: -1 is no amount of dollars"),
        ("[[identity]]\nissuer = \"https://a\"\naudience = \"b\"".to_owned(), "1: an issuer's tokens need a tenant"),
    ] {
        let found = problems(&text);
        assert!(
            found.iter().any(|problem| problem.starts_with(expected)),
            "{text}\nexpected {expected}\nfound {found:#?}"
        );
    }
}

#[test]
fn what_can_lead_nowhere_is_a_mistake() {
    let upstream = "[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = [\"gpt-4.1\"]\n";
    let tenant = |rest: &str| format!("{upstream}[[tenants]]\nname = \"t\"\n{rest}\n");
    let rule = |rule: &str, rest: &str| format!("{}[[routes]]\nmodel = \"auto\"\nrules = [{rule}]\n", tenant(rest));
    let local_only = "privacy = \"local-only\"";
    for (text, expected) in [
        (
            rule("{ when = { tenant = \"t\" }, to = \"up/gpt-4.1\" }", local_only),
            "10: rule 1 leads nowhere: t may use none of its places (add a place",
        ),
        (
            rule("{ when = { tenant = \"t\" }, to = [\"up/gpt-4.1\", \"other\"] }", "models = [\"mine*\"]"),
            "10: rule 1 leads nowhere: t may use none of its places (add a place",
        ),
        (
            rule("{ when = { privacy = \"local-only\" }, to = [{ \"up/gpt-4.1\" = 1 }] }", ""),
            "10: rule 1 leads nowhere: what is local-only stays here",
        ),
        (
            rule("{ when = { privacy = \"any\", tenant = \"t\" }, to = \"local\" }", local_only),
            "10: rule 1 never applies: no request of t has such a privacy class",
        ),
        (rule("{ when = { time = \"10:00-10:00\" }, to = \"local\" }", ""), "10: \"10:00-10:00\" ends where it begins"),
        (
            rule("{ when = { reasoning_effort = [\"high\", \"hihg\"] }, to = \"local\" }", ""),
            "10: \"hihg\" is no reasoning_effort, so the rule never applies to it (it must be one of none, minimal,",
        ),
        (
            rule("{ when = { language = \"zz\" }, to = \"local\" }", ""),
            "10: no language that can be told is called `zz`",
        ),
        (
            format!("{upstream}[[routes]]\nmodel = \"up/gpt-4.1\"\nrules = [{{ to = \"local\" }}]\n"),
            "6: the virtual model \"up/gpt-4.1\" hides the model of an upstream",
        ),
        (tenant("models = [\"*\", \"up/gpt-9*\"]"), "7: \"up/gpt-9*\" fits no model of its upstream (correct it"),
        (tenant("models = []"), "7: the tenant \"t\" may use no model at all"),
        (
            tenant(&format!("models = [\"up/*\"]\n{local_only}")),
            "7: the local-only tenant \"t\" may use models of upstreams alone",
        ),
        ("[[tenants]]\nname = \"default\"\n".to_owned(), "2: \"default\" is what requests without a tenant count as"),
    ] {
        let found = problems(&text);
        assert!(found.len() == 1 && found[0].starts_with(expected), "{text}\nexpected {expected}\nfound {found:#?}");
    }
    // Each of these some request can use.
    for right in [
        rule("{ when = { tenant = \"t\" }, to = [\"up/gpt-4.1\", \"local\"] }", local_only),
        rule("{ when = { privacy = [\"local-only\", \"any\"] }, to = \"up/gpt-4.1\" }", ""),
        rule("{ when = { privacy = \"local-only\", tenant = \"t\" }, to = \"local\" }", "privacy = \"any\""),
        rule("{ when = { time = \"00:00-24:00\", language = \"fra\" }, to = \"local\" }", ""),
        tenant("models = [\"up/gpt-4*\", \"org/model-of-tomorrow\"]"),
    ] {
        assert!(GatewayConfig::parse(&right).is_ok(), "{right}: {:?}", GatewayConfig::parse(&right));
    }
}

#[test]
fn all_mistakes_of_one_table_are_told_at_once() {
    let found = problems(
        "[[tenants]]\nname = \"\"\nprivacy = \"x\"\nweight = 0\noverflow = { when_ttft_over = \"soon\", to = \"no/where\" }\n\
         [[upstreams]]\nname = \"local\"\nkind = \"y\"\nmodels = []\napi_key_env = \"a b\"\n\
         [[routes]]\nmodel = \"auto\"\nrules = [{ when = { privacy = \"y\", time = \"z\", weekdays = \"w\" }, to = [\"a/b\", \"no/c\"] }]\n\
         [[upstreams]]\nname = \"no\"\nkind = \"openai\"\nmodels = [\"m\"]\n",
    );
    let lines: Vec<&str> = found.iter().map(|problem| problem.split(':').next().unwrap()).collect();
    assert_eq!(lines, ["2", "3", "4", "5", "5", "7", "8", "9", "10", "13", "13", "13", "13"], "{found:#?}");
}

#[test]
fn a_key_that_would_cross_a_network_in_the_clear_is_known() {
    let is_in_the_clear = |url: &str, key: &str| {
        let text = format!(
            "[[upstreams]]\nname = \"up\"\nkind = \"openai-compatible\"\nbase_url = \"{url}\"\nmodels = [\"m\"]\n{key}"
        );
        GatewayConfig::parse(&text).unwrap().upstreams[0].is_in_the_clear()
    };
    let key = "api_key_env = \"KEY\"";
    for (url, key, expected) in [
        ("http://vllm:8000/v1", key, true),
        ("http://10.0.0.1/v1", "token_file = \"t\"", true),
        ("http://10.0.0.1/v1", "", false),
        ("https://api.example/v1", key, false),
        ("http://localhost:1/v1", key, false),
        ("http://127.0.0.2/v1", key, false),
        ("http://[::1]:1/v1", key, false),
    ] {
        assert_eq!(is_in_the_clear(url, key), expected, "{url} {key}");
    }
}

#[test]
fn languages_are_named_in_three_ways_and_mean_one() {
    let rules = "[[routes]]\nmodel = \"auto\"\nrules = [{ when = { language = [\"de\", \"fra\", \"Italian\"] }, to = \"local\" }]\n\
                 [[guardrails]]\nname = \"g\"\nkind = \"language\"\naction = \"block\"\nallow = [\"german\", \"en\"]\n";
    let config = GatewayConfig::parse(rules).unwrap_or_else(|problems| panic!("{problems:?}"));
    let when = &config.router.virtual_models["auto"].rules[0].when;
    assert_eq!(when.languages.as_deref(), Some(&["deu", "fra", "ita"].map(str::to_owned)[..]));
}

#[test]
fn guardrails_that_ask_are_read_and_nothing_of_the_environment_is() {
    let text = "[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = [\"gpt-4.1\"]\n\
                [[guardrails]]\nname = \"hook\"\nkind = \"webhook\"\naction = \"block\"\nurl = \"http://127.0.0.1:1/x\"\n\
                token_env = \"NOBODY_HAS_SET_THIS\"\n\
                [[guardrails]]\nname = \"here\"\nkind = \"model\"\naction = \"flag\"\nmodel = \"local\"\n\
                [[guardrails]]\nname = \"there\"\nkind = \"model\"\naction = \"block\"\nmodel = \"up/gpt-4.1\"\n";
    let config = GatewayConfig::parse(text).unwrap_or_else(|problems| panic!("{problems:?}"));
    assert_eq!(config.guardrails.len(), 3);
}

#[test]
fn several_mistakes_are_told_at_once_in_the_order_of_their_lines() {
    let found = problems(
        "[[tenants]]\nname = \"a\"\nprivacy = \"x\"\n[[upstreams]]\nname = \"up\"\nkind = \"y\"\nmodels = [\"m\"]",
    );
    assert_eq!(found.iter().map(|problem| &problem[..2]).collect::<Vec<_>>(), ["3:", "6:"]);
}

#[test]
fn a_key_in_the_file_is_refused_and_not_repeated() {
    for table in ["[[tenants]]\nname = \"a\"\n", "[[upstreams]]\nname = \"a\"\nkind = \"openai\"\nmodels = [\"m\"]\n"] {
        for line in ["api_key = \"sk-s3cret\"", "api_key_env = \"sk-s3cret\""] {
            let found = problems(&format!("{table}{line}")).join("\n");
            assert!(!found.contains("s3cret") && found.contains("environment"), "{found}");
        }
    }
}

const UP: &str = "[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = [\"gpt-4.1\"]\n";

#[test]
fn an_upstream_is_waited_for_and_its_models_are_as_the_file_says() {
    let text = "[[upstreams]]\nname = \"up\"\nkind = \"anthropic\"\nmodels = [\"claude-next\", \"claude-sonnet-5\"]\n\
                first_byte_timeout = \"30s\"\nmax_attempts = 1\n\
                describe = { claude-next = { like = \"claude-sonnet-5\", max_output = 1000 }, \"claude-sonnet-5\" = { max_input = 9 } }";
    let config = GatewayConfig::parse(text).unwrap();
    let Patience { connect, first_byte, max_attempts, .. } = config.upstreams[0].patience;
    assert_eq!((connect, first_byte, max_attempts), (Duration::from_secs(10), Duration::from_secs(30), 1));
    let [next, known] = &config.upstreams[0].models[..] else { panic!("two models") };
    assert_eq!(
        (next.id.as_str(), next.wire_name.as_str(), next.max_output_tokens),
        ("claude-next", "claude-next", Some(1000))
    );
    assert_eq!((next.capabilities.thinking, &next.prices), (known.capabilities.thinking, &known.prices));
    assert_eq!((known.wire_name.as_str(), known.max_input_tokens), ("claude-sonnet-5", Some(9)));
}
