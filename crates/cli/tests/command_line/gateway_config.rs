//! The gateway's sections of the config file: what `check` says of them, and all that is wrong at once.

use bindery_gateway::{
    clock::UnixMillis,
    keys::{KeyGrant, NewKey, table},
    names::TenantId,
};

use crate::{gateway::Home, support::run};

const WHOLE: &str = r#"
[store]
url = "postgres://bindery:s3cret@db.example/ledger"
durability = "power-loss"
[local]
cost_per_hour = 2.10
compare_with = "openai/gpt-4.1"
[[upstreams]]
name = "openai"
kind = "openai"
api_key_env = "OPENAI_API_KEY"
models = ["gpt-4.1", "own-model"]
budget = { usd_per_month = 900.0 }
[[upstreams]]
name = "house"
kind = "openai-compatible"
base_url = "http://user:s3cret@127.0.0.1:9/v1"
models = ["big"]
[[tenants]]
name = "acme"
api_key_env = "ACME_KEY"
privacy = "any"
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
  { when = { pii = true, tenant = "acme" }, to = "local" },
  { when = { reasoning_effort = ["medium", "high"], time = "22:00-06:00", weekdays = "sat" }, to = ["house/big", "openai/gpt-4.1"] },
  { to = [{ "local" = 9, "house/big" = 1 }, "local"] },
]
[[guardrails]]
name = "pii-redact"
kind = "pii"
action = "redact"
[audit]
path = "bindery-audit"
[[identity]]
issuer = "https://login.example"
audience = "bindery"
tenant_claim = "team"
"#;

#[test]
fn check_says_what_the_gateways_sections_mean_and_shows_no_secret() {
    let home = Home::new(WHOLE);
    let ended = home.run_in(&["check", "bindery.toml"], &[("ACME_KEY", "k3y"), ("OPENAI_API_KEY", "k3y")]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for expected in [
        "Keys, budgets and costs are kept in postgres://",
        "survives the loss of power; while it takes no writes, nothing is answered.",
        "An hour of this node costs $2.10; local answers are compared with gpt-4.1.",
        "Upstream openai (OpenAI): gpt-4.1 ($2 in, $8 out for a million tokens), own-model (no price known); its key from \
         OPENAI_API_KEY, which is set; at most $900.00 a month.",
        "Upstream house (speaks OpenAI's API at http://127.0.0.1:9/v1): big (no price known); no key.",
        "Tenant acme: any, rules and names alone decide where it runs; all models; 600 requests a minute, 32 requests at \
         once; at most $50.00 a day upstream; overflows to openai/gpt-4.1 where the first token would take over 2s, for at \
         most $20.00 a day, not for adapters; where that is closed, it waits; checked by pii-redact; keys from ACME_KEY \
         and from the store.",
        "Tenant vault: local-only, nothing of it ever leaves this machine; all models; no costs upstream; keys from the store.",
        "Virtual model auto, the first rule that holds:\n  1. tenant acme and with personal data: local.\n  2. reasoning \
         effort medium or high and from 22:00 to 06:00 UTC and on sat: house/big, then openai/gpt-4.1.\n  3. always: \
         house/big (1 of 10) or local (9 of 10), then local.\n",
        "Guardrail pii-redact (pii): redacts; for acme.",
        "Audit log in bindery-audit: signed with the key from BINDERY_AUDIT_KEY, which is not set now; no prompts or answers;",
        "Tokens of https://login.example for bindery count as the tenant that their claim team names.",
    ] {
        assert!(ended.stdout.contains(expected), "{expected}: {}", ended.stdout);
    }
    for secret in ["s3cret", "k3y"] {
        assert!(!ended.stdout.contains(secret) && !ended.stderr.contains(secret), "{secret}: {}", ended.stdout);
    }
}

#[test]
fn all_mistakes_of_a_file_are_told_in_their_order_by_check_and_serve() {
    let home = Home::new(
        "[server]\nprot = 1\n[[tenants]]\nname = \"a\"\nprivacy = \"open\"\n[[adapters]]\nname = \"x\"\n\
         [[upstreams]]\nname = \"up\"\nkind = \"opnai\"\nmodels = [\"m\"]\n[[routes]]\nmodel = \"auto\"\n\
         rules = [{ to = \"up/other\" }]\n",
    );
    for arguments in [&["check", "bindery.toml"][..], &["serve", "--port", "0"], &["keys", "list"]] {
        let ended = home.run(arguments);
        assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{}", ended.stderr);
        let errors: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        let expected = [
            "error: bindery.toml:2: in [server]: unknown key `prot`",
            "error: bindery.toml:5: \"open\" is no privacy class",
            "error: bindery.toml:6: in [[adapters]]: source is missing",
            "error: bindery.toml:10: \"opnai\" is no kind of upstream",
            "error: bindery.toml:14: no upstream offers \"up/other\"",
        ];
        assert_eq!(errors.len(), expected.len(), "{}", ended.stderr);
        for (error, expected) in errors.iter().zip(expected) {
            assert!(error.starts_with(expected), "{expected}: {}", ended.stderr);
        }
        assert_eq!(ended.stderr.matches("hint: ").count(), expected.len(), "{}", ended.stderr);
    }
}

#[test]
fn a_local_only_tenant_with_a_way_out_and_missing_names_are_mistakes() {
    let upstream = "[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = [\"gpt-4.1\"]\n";
    for (text, expected) in [
        (
            format!(
                "{upstream}[[tenants]]\nname = \"a\"\nprivacy = \"local-only\"\noverflow = {{ when_ttft_over = \"2s\", to = \"up/gpt-4.1\" }}\n"
            ),
            "bindery.toml:8: a local-only tenant sends nothing out, and has an overflow",
        ),
        (
            "[[tenants]]\nname = \"a\"\nguardrails = [\"g\"]\n".to_owned(),
            "bindery.toml:3: the guardrail \"g\" is not there",
        ),
        (
            "[[tenants]]\nname = \"a\"\nbudget = { usd_per_day = 1.0 }\n".to_owned(),
            "bindery.toml:1: a budget needs a store",
        ),
        ("[[store]]\nurl = \"sqlite://x.db\"\n".to_owned(), "bindery.toml:1: write the header of `store` as [store]"),
        ("[[tenants]]\nname = \"a\"\napi_key = \"s3cret\"\n".to_owned(), "bindery.toml:3: unknown field `api_key`"),
    ] {
        let ended = Home::new(&text).run(&["check", "bindery.toml"]);
        assert_eq!(ended.code, 2, "{}", ended.stdout);
        assert!(ended.stderr.contains(expected) && ended.stderr.contains("hint: "), "{expected}: {}", ended.stderr);
        assert!(!ended.stderr.contains("s3cret"), "{}", ended.stderr);
    }
}

#[test]
fn a_tenant_that_can_have_no_key_is_warned_of() {
    let none = Home::new("[[tenants]]\nname = \"a\"\n").run(&["check", "bindery.toml"]);
    assert!(none.stdout.contains("Warning: the tenant a can have no key"), "{} {}", none.stdout, none.stderr);
    let stored = Home::new("[store]\nurl = \"sqlite://x.db\"\n[[tenants]]\nname = \"a\"\n");
    let ended = stored.run(&["check", "bindery.toml"]);
    assert!(ended.stdout.contains("send a tenant's key, which `bindery keys create` makes"), "{}", ended.stdout);
    assert!(!stored.folder.path().join("x.db").exists(), "a check makes no store");
}

#[test]
fn explain_documents_the_gateways_sections() {
    let explained = run(&["check", "--explain"]).stdout;
    for expected in [
        "\n[store]\n# url: ",
        "\n[[upstreams]]\n# name: ",
        "# overflow.when_ttft_over: ",
        "# rules.when.pii: ",
        "\n[audit]\n# path: ",
        "# tenant_claim: ",
        "\n[[guardrails]]\n",
    ] {
        assert!(explained.contains(expected), "{expected}: {explained}");
    }
}

#[test]
fn keys_of_tenants_that_are_not_named_are_listed() {
    let home = Home::new("[store]\nurl = \"sqlite://bindery.db\"\n[[tenants]]\nname = \"acme\"\n");
    let keys = home.in_store(async |store| {
        let mut ids = Vec::new();
        for (tenant, is_revoked) in [("acme", false), ("ghost", false), ("ghost", true)] {
            let (tenant, grant) = (TenantId::new(tenant).unwrap(), KeyGrant::default());
            let new = NewKey { tenant, name: String::new(), expires_at: None, grant };
            let id = table::create(&store, new, UnixMillis::now()).await.unwrap().id();
            if is_revoked {
                table::revoke(&store, &id, UnixMillis::now()).await.unwrap();
            }
            ids.push(id.to_string());
        }
        ids
    });
    let ended = home.run(&["check", "bindery.toml"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let warnings: Vec<&str> = ended.stdout.lines().filter(|line| line.contains("Warning: the key")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains(&keys[1]) && warnings[0].contains("\"ghost\""), "{warnings:?}");
}

#[test]
fn a_key_that_goes_over_plain_http_is_warned_of() {
    let text = |url: &str| {
        format!(
            "[[upstreams]]\nname = \"up\"\nkind = \"openai-compatible\"\nbase_url = \"{url}\"\nmodels = [\"m\"]\napi_key_env = \"K\"\n"
        )
    };
    let check = |url: &str| Home::new(&text(url)).run(&["check", "bindery.toml"]).stdout;
    assert!(check("http://vllm:8000/v1").contains("Warning: the upstream up is asked over http://"));
    assert!(!check("http://127.0.0.1:8000/v1").contains("asked over http://"));
}

#[test]
fn models_of_a_tenant_that_fit_nothing_are_warned_of() {
    let home = Home::new(
        "[server]\nserved_model_name = [\"base\"]\n[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = [\"gpt-4.1\"]\n\
         [[routes]]\nmodel = \"auto\"\nrules = [{ to = \"local\" }]\n\
         [[tenants]]\nname = \"t\"\nmodels = [\"ba*\", \"auto\", \"up/*\", \"bsae\"]\n",
    );
    let ended = home.run(&["check", "bindery.toml"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let warnings: Vec<&str> = ended.stdout.lines().filter(|line| line.contains("fits no model")).collect();
    assert!(
        warnings.len() == 1 && warnings[0].starts_with("Warning: \"bsae\" among the models of the tenant t"),
        "{warnings:?}"
    );
}

#[test]
fn surprises_are_warned_of_with_a_way_out() {
    let home = Home::new(
        "[[upstreams]]\nname = \"up\"\nkind = \"openai\"\nmodels = [\"gpt-4.1\"]\n\
         [[tenants]]\nname = \"first\"\nprivacy = \"local-first\"\n[[tenants]]\nname = \"free\"\nprivacy = \"any\"\n\
         [[tenants]]\nname = \"vault\"\nprivacy = \"local-only\"\nguardrails = [\"hook\", \"judge\", \"here\"]\n\
         [[routes]]\nmodel = \"auto\"\nrules = [\n{ when = { tools = true }, to = [\"up/gpt-4.1\", \"local\"] },\n\
         { to = [\"local\", \"up/gpt-4.1\"] }]\n\
         [[guardrails]]\nname = \"hook\"\nkind = \"webhook\"\naction = \"block\"\nurl = \"http://u:s3cret@127.0.0.1:9/x\"\n\
         [[guardrails]]\nname = \"judge\"\nkind = \"model\"\naction = \"flag\"\nmodel = \"up/gpt-4.1\"\non_failure = \"open\"\n\
         [[guardrails]]\nname = \"here\"\nkind = \"model\"\naction = \"block\"\nmodel = \"local\"\n",
    );
    let ended = home.run(&["check", "bindery.toml"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for expected in [
        "Warning: rule 1 names an upstream before the local model, but for the local-first tenants first the local model is tried first",
        "It asks the web hook at http://127.0.0.1:9/x; silence blocks the request (on_failure).",
        "Warning: of the local-only tenants vault it is never sent a byte, on a loopback address neither, so all their requests are blocked",
        "It asks the model up/gpt-4.1, paid by the tenant whose request it is; silence counts as nothing found (on_failure).",
        "Warning: of the local-only tenants vault it is never sent a byte, on a loopback address neither, so it checks nothing of theirs",
        "It asks the model local on this machine, for every privacy class.",
    ] {
        assert!(ended.stdout.contains(expected), "{expected}: {}", ended.stdout);
    }
    assert!(!ended.stdout.contains("rule 2 names") && !ended.stdout.contains("s3cret"), "{}", ended.stdout);
}

#[test]
fn a_language_that_cannot_be_told_is_refused_with_its_line() {
    let home = Home::new(
        "[[routes]]\nmodel = \"auto\"\nrules = [\n{ when = { language = [\"German\", \"klingon\"] }, to = \"local\" }]\n",
    );
    let ended = home.run(&["check", "bindery.toml"]);
    assert_eq!(ended.code, 2, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("bindery.toml:4: no language that can be told is called `klingon`"),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("hint: use a code of ISO 639-1 or 639-3 or the English name"), "{}", ended.stderr);
}
