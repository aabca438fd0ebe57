//! The keys of the gateway's sections, for `check --explain`: what each means, its default and an example.
//!
//! The gateway reads these sections itself; here they are only documented, a row a key. Invariant: the rows are the keys
//! that the gateway knows, which a test asks it for, and every example is one that it takes.

/// What stands behind the equals sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    TextOrList,
    List,
    Integer,
    Number,
    Flag,
    Table,
    Tables,
    Targets,
}

impl Form {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Text => "a string in quotes",
            Self::TextOrList => "a string in quotes, or a list of them",
            Self::List => "a list of strings",
            Self::Integer => "a whole number",
            Self::Number => "a number",
            Self::Flag => "true or false",
            Self::Table => "a table in braces",
            Self::Tables => "a list of tables in braces",
            Self::Targets => "a target, or a list of targets and weighted draws",
        }
    }
}

/// One key; a name with dots is one within a table.
pub(crate) struct GatewayKey {
    /// As it is written: `[[tenants]]`.
    pub(crate) header: &'static str,
    pub(crate) name: &'static str,
    pub(crate) form: Form,
    /// As it is written.
    pub(crate) example: &'static str,
    pub(crate) default: &'static str,
    pub(crate) explain: &'static str,
}

/// How the header of a section is written.
pub(crate) fn header_of(section: &str) -> &'static str {
    let headers = GATEWAY_KEYS.iter().map(|key| key.header);
    headers.into_iter().find(|header| header.trim_matches(['[', ']']) == section).unwrap_or_default()
}

const fn key(
    (header, name): (&'static str, &'static str),
    form: Form,
    (example, default): (&'static str, &'static str),
    explain: &'static str,
) -> GatewayKey {
    GatewayKey { header, name, form, example, default, explain }
}

/// Those of a section stand together.
#[rustfmt::skip]
pub(crate) const GATEWAY_KEYS: &[GatewayKey] = &[
    key(("[store]", "url"), Form::Text, ("\"sqlite://bindery.db\"", "none, it must be given"),
        "where keys, budgets and the ledger are kept: sqlite://FILE, or postgres://USER@HOST/DATABASE for several nodes"),
    key(("[store]", "durability"), Form::Text, ("\"process-kill\"", "power-loss"),
        "what an answered write survives: power-loss, or process-kill, which spares an fsync for each group of writes"),
    key(("[store]", "max_bytes"), Form::Integer, ("1073741824", "no limit"),
        "the SQLite file grows no further; what costs money is refused then"),
    key(("[store]", "keep_days"), Form::Integer, ("400", "for ever"),
        "requests in the ledger older than this are deleted"),
    key(("[store]", "on_failure"), Form::Text, ("\"open\"", "closed"),
        "while it takes no writes, local requests go on (open; their rows may be lost) or are refused (closed)"),
    key(("[local]", "cost_per_hour"), Form::Number, ("2.10", "local answers cost nothing"),
        "dollars that an hour of this node costs; prices local tokens"),
    key(("[local]", "compare_with"), Form::Text, ("\"openai/gpt-4.1\"", "nothing is called saved"),
        "the upstream model whose price local answers are held against in `bindery costs`"),
    key(("[[upstreams]]", "name"), Form::Text, ("\"openai\"", "none, it must be given"),
        "what targets call it: letters, digits, -, _ and ."),
    key(("[[upstreams]]", "kind"), Form::Text, ("\"openai\"", "none, it must be given"),
        "openai, anthropic, gemini, azure or openai-compatible"),
    key(("[[upstreams]]", "base_url"), Form::Text, ("\"https://api.openai.com/v1\"", "the provider's own"),
        "where it answers, as its own SDK takes it; must be given for azure and openai-compatible"),
    key(("[[upstreams]]", "api_key_env"), Form::Text, ("\"OPENAI_API_KEY\"", "none"),
        "environment variable that holds its API key"),
    key(("[[upstreams]]", "api_key_file"), Form::Text, ("\"/run/secrets/openai\"", "none"),
        "file that holds its API key"),
    key(("[[upstreams]]", "token_env"), Form::Text, ("\"AZURE_TOKEN\"", "none"),
        "environment variable that holds a bearer token (Entra)"),
    key(("[[upstreams]]", "token_file"), Form::Text, ("\"/run/secrets/azure-token\"", "none"),
        "file that holds a bearer token and that someone renews"),
    key(("[[upstreams]]", "organization"), Form::Text, ("\"org-1\"", "none"),
        "OpenAI's organisation header"),
    key(("[[upstreams]]", "project"), Form::Text, ("\"proj-1\"", "none"),
        "OpenAI's project header"),
    key(("[[upstreams]]", "api_version"), Form::Text, ("\"2024-10-21\"", "the v1 form of the URL"),
        "azure: the dated form of the URL, of this version"),
    key(("[[upstreams]]", "models"), Form::List, ("[\"gpt-4.1\", \"gpt-4o\"]", "none, it must be given"),
        "what may be asked of it, as NAME/MODEL"),
    key(("[[upstreams]]", "prices"), Form::Table, ("{ \"gpt-4.1\" = { input = 2.0, cached = 0.5, output = 8.0 } }", "the built-in dated table"),
        "dollars per million tokens by model; they go over the built-in table"),
    key(("[[upstreams]]", "prices.input"), Form::Number, ("2.0", "none, it must be given"),
        "of the prompt"),
    key(("[[upstreams]]", "prices.cached"), Form::Number, ("0.5", "as input"),
        "of the prompt, read from the provider's cache (cached_input is an alias)"),
    key(("[[upstreams]]", "prices.cache_write"), Form::Number, ("2.5", "as input"),
        "of the prompt, written to the provider's cache"),
    key(("[[upstreams]]", "prices.output"), Form::Number, ("8.0", "none, it must be given"),
        "of the answer, reasoning included"),
    key(("[[upstreams]]", "deployments"), Form::Table, ("{ \"gpt-4.1\" = \"our-deployment\" }", "the model's own name"),
        "what it calls a model, as Azure has deployments"),
    key(("[[upstreams]]", "describe"), Form::Table, ("{ \"gpt-4.1\" = { max_output = 8192 } }", "the table of models"),
        "what a model can, where the program does not know it or not as it is there"),
    key(("[[upstreams]]", "describe.like"), Form::Text, ("\"gpt-4.1\"", "itself"),
        "the known model whose abilities, limits and prices it has"),
    key(("[[upstreams]]", "describe.max_input"), Form::Integer, ("128000", "the table of models"),
        "most tokens of a prompt"),
    key(("[[upstreams]]", "describe.max_output"), Form::Integer, ("8192", "the table of models"),
        "most tokens of an answer"),
    key(("[[upstreams]]", "connect_timeout"), Form::Text, ("\"5s\"", "10s"),
        "how long opening a connection may take"),
    key(("[[upstreams]]", "first_byte_timeout"), Form::Text, ("\"1m\"", "10m"),
        "how long it may take to begin an answer; a model that reasons thinks before it says a word"),
    key(("[[upstreams]]", "idle_timeout"), Form::Text, ("\"30s\"", "5m"),
        "how long it may be silent within an answer"),
    key(("[[upstreams]]", "max_attempts"), Form::Integer, ("1", "3"),
        "how often a call that fails at no cost is made in all; one that may have cost something is repeated once at most"),
    key(("[[upstreams]]", "budget"), Form::Table, ("{ usd_per_month = 900.0 }", "no limit"),
        "of all tenants' calls together"),
    key(("[[upstreams]]", "budget.usd_per_day"), Form::Number, ("50.0", "no limit"),
        "dollars in a UTC day"),
    key(("[[upstreams]]", "budget.usd_per_month"), Form::Number, ("900.0", "no limit"),
        "dollars in a UTC month"),
    key(("[[tenants]]", "name"), Form::Text, ("\"acme\"", "none, it must be given"),
        "of the tenant, as adapters, rules and `bindery keys` name it"),
    key(("[[tenants]]", "api_key_env"), Form::Text, ("\"ACME_API_KEY\"", "none: keys are made by `bindery keys create`"),
        "environment variable that holds the tenant's key, or several with commas between"),
    key(("[[tenants]]", "privacy"), Form::Text, ("\"local-only\"", "local-first"),
        "local-only (nothing ever leaves), local-first or any; a request may tighten it, never loosen it"),
    key(("[[tenants]]", "models"), Form::List, ("[\"*\"]", "[\"*\"]"),
        "models it may name or be sent to: names, or beginnings with * at the end"),
    key(("[[tenants]]", "weight"), Form::Integer, ("2", "1"),
        "while several tenants' requests wait, this machine's tokens go to them in proportion to it"),
    key(("[[tenants]]", "limits"), Form::Table, ("{ requests_per_minute = 600, tokens_per_minute = 200000, concurrent = 32 }", "no limit"),
        "how much at once and in a minute"),
    key(("[[tenants]]", "limits.requests_per_minute"), Form::Integer, ("600", "no limit"),
        "requests in a minute"),
    key(("[[tenants]]", "limits.tokens_per_minute"), Form::Integer, ("200000", "no limit"),
        "tokens in a minute, of prompts and answers"),
    key(("[[tenants]]", "limits.concurrent"), Form::Integer, ("32", "no limit"),
        "requests at once"),
    key(("[[tenants]]", "budget"), Form::Table, ("{ usd_per_day = 50.0 }", "no limit"),
        "what its upstream calls may cost; needs [store]"),
    key(("[[tenants]]", "budget.usd_per_day"), Form::Number, ("50.0", "no limit"),
        "dollars in a UTC day"),
    key(("[[tenants]]", "budget.usd_per_month"), Form::Number, ("900.0", "no limit"),
        "dollars in a UTC month"),
    key(("[[tenants]]", "guardrails"), Form::List, ("[\"pii-redact\"]", "none"),
        "names of [[guardrails]], in the order of checking"),
    key(("[[tenants]]", "overflow"), Form::Table, ("{ when_ttft_over = \"2s\", to = \"openai/gpt-4o\", usd_per_day = 20.0 }", "requests wait"),
        "where requests go that would wait too long here"),
    key(("[[tenants]]", "overflow.when_ttft_over"), Form::Text, ("\"2s\"", "none, it must be given"),
        "the longest predicted time to the first token that is waited for"),
    key(("[[tenants]]", "overflow.to"), Form::Text, ("\"openai/gpt-4o\"", "none, it must be given"),
        "UPSTREAM/MODEL"),
    key(("[[tenants]]", "overflow.usd_per_day"), Form::Number, ("20.0", "no limit of its own"),
        "dollars in a UTC day for what overflows"),
    key(("[[tenants]]", "overflow.usd_per_month"), Form::Number, ("300.0", "no limit of its own"),
        "dollars in a UTC month for what overflows"),
    key(("[[tenants]]", "overflow.adapters"), Form::List, ("[\"support-*\"]", "none"),
        "adapters whose requests the upstream answers as well"),
    key(("[[tenants]]", "overflow.otherwise"), Form::Text, ("\"refuse\"", "wait"),
        "where the overflow is closed: wait, or refuse (429 with an honest retry-after)"),
    key(("[[tenants]]", "max_output_tokens"), Form::Integer, ("4096", "the model's"),
        "longest answer where a request names no limit; it bounds what is reserved"),
    key(("[[tenants]]", "strict_params"), Form::Flag, ("true", "false"),
        "fields that an upstream has no counterpart for are refused, not dropped with a warning"),
    key(("[[tenants]]", "store_contents"), Form::Flag, ("true", "false"),
        "the audit log keeps its prompts and answers; needs [audit] contents = \"encrypted\""),
    key(("[[routes]]", "model"), Form::Text, ("\"auto\"", "none, it must be given"),
        "name of a virtual model"),
    key(("[[routes]]", "rules"), Form::Tables, ("[{ when = { pii = true }, to = \"local\" }, { to = \"local\" }]", "none, it must be given"),
        "the first that holds, and whose targets the tenant may use, decides"),
    key(("[[routes]]", "rules.to"), Form::Targets, ("[\"local\", { \"openai/gpt-4.1\" = 1, \"local\" = 9 }]", "none, it must be given"),
        "local, a local name or UPSTREAM/MODEL; of several, the next where one fails; a table draws one by weight"),
    key(("[[routes]]", "rules.when"), Form::Table, ("{ tools = true }", "always"),
        "what must hold, all of it"),
    key(("[[routes]]", "rules.when.tenant"), Form::TextOrList, ("\"acme\"", "any"),
        "one of these tenants"),
    key(("[[routes]]", "rules.when.privacy"), Form::TextOrList, ("\"any\"", "any"),
        "one of these privacy classes"),
    key(("[[routes]]", "rules.when.task"), Form::TextOrList, ("\"summary\"", "any"),
        "the header x-bindery-task is one of these"),
    key(("[[routes]]", "rules.when.reasoning_effort"), Form::TextOrList, ("[\"medium\", \"high\"]", "any"),
        "the request's reasoning_effort is one of these"),
    key(("[[routes]]", "rules.when.tools"), Form::Flag, ("true", "either"),
        "the request has (or has not) tools"),
    key(("[[routes]]", "rules.when.images"), Form::Flag, ("true", "either"),
        "the request has (or has not) images"),
    key(("[[routes]]", "rules.when.over_local_context"), Form::Flag, ("true", "either"),
        "the prompt is (or is not) longer than the local model's context"),
    key(("[[routes]]", "rules.when.prompt_tokens_over"), Form::Integer, ("8000", "any"),
        "the prompt has more tokens than this"),
    key(("[[routes]]", "rules.when.pii"), Form::Flag, ("true", "either"),
        "personal data was (or was not) found in the prompt; works without a guardrail"),
    key(("[[routes]]", "rules.when.language"), Form::TextOrList, ("[\"de\", \"fra\", \"italian\"]", "any"),
        "the language of the user's newest messages is one of these: codes of ISO 639-1 or 639-3, or English names"),
    key(("[[routes]]", "rules.when.ttft_over"), Form::Text, ("\"2s\"", "any"),
        "the predicted local time to the first token is above this"),
    key(("[[routes]]", "rules.when.budget_left_under"), Form::Number, ("5.0", "any"),
        "fewer dollars than this are left of the tenant's budget"),
    key(("[[routes]]", "rules.when.time"), Form::Text, ("\"22:00-06:00\"", "any"),
        "time of the day, UTC"),
    key(("[[routes]]", "rules.when.weekdays"), Form::TextOrList, ("[\"sat\", \"sun\"]", "any"),
        "days of the week, UTC: mon to sun"),
    key(("[[guardrails]]", "name"), Form::Text, ("\"pii-redact\"", "none, it must be given"),
        "how tenants, verdicts and metrics name it"),
    key(("[[guardrails]]", "kind"), Form::Text, ("\"pii\"", "none, it must be given"),
        "pii, blocklist, regex, length, language, prompt-injection, webhook or model"),
    key(("[[guardrails]]", "action"), Form::Text, ("\"redact\"", "none, it must be given"),
        "block, redact, route-local or flag"),
    key(("[[guardrails]]", "on"), Form::List, ("[\"prompt\", \"answer\"]", "both; prompts alone for route-local and prompt-injection"),
        "where it looks"),
    key(("[[guardrails]]", "restore"), Form::Flag, ("true", "false"),
        "redact: answers get the prompt's values back"),
    key(("[[guardrails]]", "detect"), Form::List, ("[\"email\", \"iban\"]", "everything"),
        "pii: what to look for"),
    key(("[[guardrails]]", "phrases"), Form::List, ("[\"project kestrel\"]", "none"),
        "blocklist: the phrases"),
    key(("[[guardrails]]", "file"), Form::Text, ("\"phrases.txt\"", "none"),
        "blocklist: a file of phrases, one a line"),
    key(("[[guardrails]]", "match"), Form::Text, ("\"words\"", "words"),
        "blocklist: words (whole ones) or anywhere"),
    key(("[[guardrails]]", "patterns"), Form::List, ("[\"[0-9]{6}\"]", "none, it must be given for regex"),
        "regex: the patterns"),
    key(("[[guardrails]]", "max_chars"), Form::Integer, ("20000", "none, it must be given for length"),
        "length: the most characters"),
    key(("[[guardrails]]", "allow"), Form::List, ("[\"en\", \"de\"]", "none"),
        "language: these and no others; codes of ISO 639-1 or 639-3, or English names"),
    key(("[[guardrails]]", "deny"), Form::List, ("[\"fr\"]", "none"),
        "language: all but these"),
    key(("[[guardrails]]", "url"), Form::Text, ("\"http://127.0.0.1:9000/check\"", "none, it must be given for webhook"),
        "webhook: where to ask; nothing of a local-only request is sent there, wherever it is"),
    key(("[[guardrails]]", "token_env"), Form::Text, ("\"HOOK_TOKEN\"", "none"),
        "webhook: environment variable that holds its bearer token"),
    key(("[[guardrails]]", "model"), Form::Text, ("\"local\"", "none, it must be given for model"),
        "model: who is asked: local, a local name or UPSTREAM/MODEL, which local-only requests are kept from"),
    key(("[[guardrails]]", "template"), Form::Text, ("\"Is this allowed? {{ text }}\"", "a built-in one"),
        "model: what is asked, a Jinja template over text and side"),
    key(("[[guardrails]]", "timeout_ms"), Form::Integer, ("2000", "2000 for webhook, 10000 for model"),
        "webhook, model: how long to wait"),
    key(("[[guardrails]]", "on_failure"), Form::Text, ("\"open\"", "closed"),
        "webhook, model: what silence means: closed (as if something was found) or open"),
    key(("[audit]", "path"), Form::Text, ("\"bindery-audit\"", "none, it must be given"),
        "folder of the log"),
    key(("[audit]", "name"), Form::Text, ("\"node-1\"", "the machine's name and the folder's absolute path"),
        "what the log is called in [store], which keeps how far each log went; each node's must differ"),
    key(("[audit]", "key_env"), Form::Text, ("\"BINDERY_AUDIT_KEY\"", "BINDERY_AUDIT_KEY"),
        "environment variable that holds the key that signs records"),
    key(("[audit]", "key_file"), Form::Text, ("\"/run/secrets/audit\"", "none"),
        "file that holds it instead, outside the folder"),
    key(("[audit]", "contents"), Form::Text, ("\"encrypted\"", "none"),
        "what is kept of prompts and answers of tenants with store_contents: none, or encrypted texts"),
    key(("[audit]", "contents_key_env"), Form::Text, ("\"BINDERY_CONTENTS_KEY\"", "none"),
        "environment variable that holds the key of contents: 32 random bytes"),
    key(("[audit]", "contents_old_key_envs"), Form::List, ("[\"BINDERY_CONTENTS_KEY_2025\"]", "none"),
        "variables of keys that sealed contents before: `audit export --contents` opens with them, too"),
    key(("[audit]", "max_contents_bytes"), Form::Integer, ("65536", "262144"),
        "longest prompt, and longest answer, that is kept; the rest is cut off"),
    key(("[audit]", "fsync"), Form::Text, ("\"interval\"", "always"),
        "when records are made to last: always (before they are acknowledged), interval or never"),
    key(("[audit]", "fsync_ms"), Form::Integer, ("100", "none"),
        "fsync = \"interval\": how often, 1 to 60000"),
    key(("[audit]", "on_failure"), Form::Text, ("\"open\"", "closed"),
        "where a record cannot be kept: closed (the request fails) or open (it goes on, and is counted)"),
    key(("[audit]", "max_queued"), Form::Integer, ("4096", "4096"),
        "most records that wait to be written"),
    key(("[audit]", "max_segment_bytes"), Form::Integer, ("67108864", "67108864"),
        "a file ends when it is so long"),
    key(("[audit]", "max_segment_hours"), Form::Integer, ("24", "24"),
        "a file ends when it is so old"),
    key(("[audit]", "keep_days"), Form::Integer, ("365", "for ever"),
        "files older than this go"),
    key(("[audit]", "keep_segments"), Form::Integer, ("1000", "no limit"),
        "most files that are kept"),
    key(("[[identity]]", "issuer"), Form::Text, ("\"https://login.example.org\"", "none, it must be given"),
        "who signs tokens that open the model routes: `iss` of an OpenID Connect provider"),
    key(("[[identity]]", "audience"), Form::TextOrList, ("\"bindery\"", "none, it must be given"),
        "`aud` that a token must have"),
    key(("[[identity]]", "jwks_url"), Form::Text, ("\"https://login.example.org/keys\"", "found by the issuer's discovery document"),
        "where its public keys are"),
    key(("[[identity]]", "tenant"), Form::Text, ("\"acme\"", "see tenant_claim"),
        "the tenant of all its tokens"),
    key(("[[identity]]", "tenant_claim"), Form::Text, ("\"groups\"", "see tenant"),
        "the claim that names the tenant"),
    key(("[[identity]]", "tenants"), Form::Table, ("{ \"team-7\" = \"acme\" }", "the claim is the name"),
        "values of the claim, and the tenants they stand for"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bindery_gateway::config::{GatewayConfig, SECTIONS};

    use super::*;

    /// What has to stand beside a key so that its section is whole.
    fn whole(header: &str) -> &'static str {
        match header {
            "[store]" => "url = \"sqlite://x.db\"",
            "[[upstreams]]" => "name = \"a\"\nkind = \"openai\"\nmodels = [\"gpt-4.1\", \"gpt-4o\"]",
            "[[tenants]]" => "name = \"acme\"",
            "[[routes]]" => "model = \"auto\"\nrules = [{ to = \"local\" }]",
            "[[guardrails]]" => "name = \"g\"\nkind = \"pii\"\naction = \"flag\"",
            "[audit]" => "path = \"a\"",
            "[[identity]]" => "issuer = \"https://a\"\naudience = \"b\"\ntenant = \"acme\"",
            _ => "",
        }
    }

    fn messages(text: &str) -> Vec<String> {
        GatewayConfig::parse(text).err().unwrap_or_default().into_iter().map(|problem| problem.message).collect()
    }

    /// The names that the gateway lists when it meets one that it does not know.
    fn asked(text: &str) -> BTreeSet<String> {
        let messages = messages(text).join("\n");
        let (_, known) = messages.split_once("expected").unwrap_or_else(|| panic!("{text}: {messages}"));
        known.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    fn rows(header: &str, within: &str) -> BTreeSet<String> {
        let of_header = GATEWAY_KEYS.iter().filter(|key| key.header == header);
        let names = of_header.filter_map(|key| key.name.strip_prefix(within)).filter(|name| !name.contains('.'));
        names.map(str::to_owned).collect()
    }

    #[test]
    fn every_key_that_the_gateway_knows_is_documented_and_no_other() {
        for section in SECTIONS {
            let header = header_of(section);
            let known = asked(&format!("{header}\n{}\nzzz = 1", whole(header)));
            assert_eq!(rows(header, ""), known, "{header}");
        }
        for (header, within, probe) in [
            ("[[tenants]]", "limits.", "limits = { zzz = 1 }"),
            ("[[tenants]]", "budget.", "budget = { zzz = 1 }"),
            ("[[tenants]]", "overflow.", "overflow = { zzz = 1 }"),
            ("[[upstreams]]", "budget.", "budget = { zzz = 1 }"),
            ("[[upstreams]]", "describe.", "describe = { m = { zzz = 1 } }"),
        ] {
            let known = asked(&format!("{header}\n{}\n{probe}", whole(header)));
            assert_eq!(rows(header, within), known, "{header} {within}");
        }
        let probe = "[[routes]]\nmodel = \"auto\"\nrules = [{ to = \"local\", when = { zzz = 1 } }]";
        assert_eq!(rows("[[routes]]", "rules.when."), asked(probe));
        let probe = "[[routes]]\nmodel = \"auto\"\nrules = [{ to = \"local\", zzz = 1 }]";
        assert_eq!(rows("[[routes]]", "rules."), asked(probe));
    }

    /// Alone in a whole section, an example has the right type; what it names need not be there.
    #[test]
    fn every_example_is_of_a_type_that_the_gateway_takes() {
        for key in GATEWAY_KEYS.iter().filter(|key| !key.name.contains('.')) {
            let section = whole(key.header);
            let others = section.lines().filter(|line| !line.starts_with(&format!("{} =", key.name)));
            let others = others.collect::<Vec<_>>().join("\n");
            let text = format!("{}\n{others}\n{} = {}\n", key.header, key.name, key.example);
            let wrong = messages(&text);
            let is_of_types = |message: &String| {
                ["invalid type", "unknown", "missing", "did not match"].iter().any(|word| message.contains(word))
            };
            assert!(!wrong.iter().any(is_of_types), "{text}: {wrong:?}");
        }
    }
}
