//! The table as it ships, and prices against a twin that counts in another way.

use proptest::prelude::*;

use super::*;
use crate::providers::usage::Usage;

fn at(day: &str) -> DateTime<Utc> {
    format!("{day}T12:00:00Z").parse().unwrap()
}

fn built_in() -> Catalogue {
    Catalogue::built_in().unwrap()
}

#[test]
fn the_built_in_table_reads_and_holds_the_families_people_use() {
    let catalogue = built_in();
    for name in [
        "gpt-4",
        "gpt-4-turbo",
        "gpt-4o",
        "gpt-4o-mini",
        "gpt-4.1",
        "o1",
        "o3",
        "gpt-5",
        "gpt-5.5",
        "gpt-6.2-sol",
        "claude-3-opus-20240229",
        "claude-3-haiku-20240307",
        "claude-3-5-sonnet-20241022",
        "claude-haiku-4-5",
        "claude-opus-5-5",
        "gemini-2.0-flash",
        "gemini-2.5-pro",
        "gemini-3.8-flash",
        "gemini-4-argon",
    ] {
        assert!(catalogue.find_ever(name).is_some(), "{name}");
    }
    for entry in catalogue.iter() {
        assert!(entry.max_input_tokens.is_some() && entry.max_output_tokens.is_some(), "{}", entry.id);
        assert!(!entry.prices.is_empty() || entry.id == "claude-mythos-5-2", "{} has no price", entry.id);
        for price in &entry.prices {
            let rates = std::iter::once(&price.rates).chain(price.long_prompt.iter().map(|tier| &tier.rates));
            for rates in rates {
                assert!(rates.cached.is_none_or(|cached| cached <= rates.input), "{}", entry.id);
                assert!(rates.cache_write.is_none_or(|write| write >= rates.input), "{}", entry.id);
            }
        }
    }
}

#[test]
fn a_retired_model_says_when_and_what_instead() {
    let catalogue = built_in();
    let error = catalogue.find("gpt-4", at("2026-11-28")).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("2026-10-23") && text.contains("gpt-5.6-sol"), "{text}");
    assert!(catalogue.find("gpt-4", at("2026-10-22")).is_ok());
    // On its last day it is gone: the day named is the day it stops.
    assert!(matches!(catalogue.find("gpt-4", at("2026-10-23")), Err(LookupError::Retired { .. })));
    let alias = catalogue.find("claude-3-5-sonnet-20241022", at("2026-11-28")).unwrap_err();
    assert!(alias.to_string().contains("claude-3-5-sonnet-20241022"), "{alias}");
    assert!(matches!(catalogue.find("gpt-17", at("2026-11-28")), Err(LookupError::Unknown { .. })));
}

#[test]
fn prices_change_with_the_day_and_the_length() {
    let catalogue = built_in();
    let million = Usage { prompt: 200_000, completion: 100_000, ..Usage::default() };
    let argon = catalogue.find("gemini-4-argon", at("2026-11-28")).unwrap();
    // 0.2 M at 2 and 0.1 M at 10; from December on the double.
    assert_eq!(argon.price(&million, at("2026-11-30")).unwrap().to_string(), "$1.400000000");
    assert_eq!(argon.price(&million, at("2026-12-01")).unwrap().to_string(), "$2.800000000");
    let long = catalogue.find("gpt-5.5", at("2026-11-28")).unwrap();
    let usage = |prompt| Usage { prompt, ..Usage::default() };
    assert_eq!(long.price(&usage(272_000), at("2026-11-28")).unwrap().to_string(), "$1.360000000");
    assert_eq!(long.price(&usage(272_001), at("2026-11-28")).unwrap().to_string(), "$2.720010000");
    let cached = Usage { prompt: 1000, cached: 600, cache_write: 300, completion: 10, ..Usage::default() };
    // Claude Opus 5.5: 100 at 4, 600 at 0.2, 300 at 5, 10 at 20 = 2220 microdollars.
    let opus = catalogue.find("claude-opus-5-5", at("2026-11-28")).unwrap();
    assert_eq!(opus.price(&cached, at("2026-11-28")).unwrap().to_string(), "$0.002220000");
    let flex = Usage { tier: ServedTier::Flex, ..usage(1_000) };
    assert_eq!(long.price(&flex, at("2026-11-28")).unwrap().to_string(), "$0.002500000");
}

#[test]
fn a_model_without_a_price_has_no_cost() {
    let catalogue = built_in();
    let mythos = catalogue.find("claude-mythos-5-2", at("2026-11-28")).unwrap();
    let error = mythos.price(&Usage::default(), at("2026-11-28")).unwrap_err();
    assert!(error.to_string().contains("claude-mythos-5-2"), "{error}");
    let bound = Bound { max_prompt_tokens: 1, max_output_tokens: 1, tier: ServedTier::Standard };
    assert!(ModelEntry::open("llama").upper_bound(&bound, at("2026-11-28")).is_err());
}

#[test]
fn an_operator_s_word_stands_over_the_table() {
    let changes: Vec<ModelOverride> = vec![
        toml::from_str("id = 'gpt-4o'\nprice = { input = 1, cached_input = 0.5, output = 2 }").unwrap(),
        toml::from_str("id = 'prod-chat'\nlike = 'gpt-4'\ndeployment = 'azure-gpt4'").unwrap(),
        toml::from_str("id = 'house-llama'\nmax_output = 2048\nprice = { input = 0.1, output = 0.1 }").unwrap(),
        toml::from_str("id = 'gpt-4o-2024-08-06'\nprice = { input = 9, output = 9 }").unwrap(),
    ];
    let catalogue = built_in().with_overrides(&changes).unwrap();
    let now = at("2026-11-28");
    let thousand = Usage { prompt: 1000, cached: 1000, ..Usage::default() };
    let omni = catalogue.find("gpt-4o", now).unwrap();
    assert_eq!(omni.price(&thousand, now).unwrap().to_string(), "$0.000500000");
    assert!(omni.can(Capability::StructuredOutputs));
    // Azure keeps what OpenAI has retired.
    let prod = catalogue.find("prod-chat", now).unwrap();
    assert_eq!((prod.wire_name.as_str(), prod.max_input_tokens), ("azure-gpt4", Some(8192)));
    let house = catalogue.find("house-llama", now).unwrap();
    assert_eq!((house.family, house.max_output_tokens), (Family::Open, Some(2048)));
    let snapshot = catalogue.find("gpt-4o-2024-08-06", now).unwrap();
    assert_eq!(snapshot.price(&thousand, now).unwrap().to_string(), "$0.009000000");
    assert_eq!(snapshot.wire_name, "gpt-4o-2024-08-06", "whoever pins a snapshot gets it");
    assert_eq!(omni.wire_name, "gpt-4o");
    assert_eq!(catalogue.find("gpt-4o-2024-11-20", now).unwrap().id, "gpt-4o");
    let dangling: ModelOverride = toml::from_str("id = 'x'\nlike = 'nothing'").unwrap();
    assert!(matches!(built_in().with_overrides(&[dangling]), Err(TableError::Dangling { .. })));
}

#[test]
fn a_broken_table_is_refused_by_name() {
    let profile = "[profile.p]\nfamily = 'openai'\ncan = ['chat']\nsampling = 'all'\nthinking = 'none'\nlimit_field = \
                   'max_tokens'\nmax_answers = 1\n";
    let model = |rest: &str| {
        format!(
            "as_of = '2026-01-01'\n{profile}[[model]]\nid = 'a'\nprofile = 'p'\nmax_input = 1\nmax_output = 1\n{rest}"
        )
    };
    assert!(table::read(&model("")).is_ok());
    for (rest, word) in [
        ("aliases = ['a']", "`a` stands for two"),
        ("successor = 'b'", "`b`"),
        ("retires = 'soon'", "soon"),
        ("efforts = ['huge']", "huge"),
        ("pirce = 1", "pirce"),
        ("price = [{ input = -1, output = 1 }]", "-1"),
        ("price = [{ input = 1, output = 1 }, { input = 2, output = 2 }]", "same day"),
    ] {
        let error = table::read(&model(rest)).unwrap_err().to_string();
        assert!(error.contains(word), "{rest}: {error}");
    }
}

fn tiers() -> impl Strategy<Value = ServedTier> {
    prop_oneof![Just(ServedTier::Standard), Just(ServedTier::Flex), Just(ServedTier::Priority)]
}

proptest! {
    /// Whatever a request within its bound uses, however it is cached, it costs no more than was reserved.
    #[test]
    fn a_price_is_never_above_its_upper_bound(
        model in any::<prop::sample::Index>(),
        max_prompt_tokens in 0u64..1_500_000,
        max_output_tokens in 0u64..200_000,
        used in (0.0f64..=1.0, 0.0f64..=1.0, 0.0f64..=1.0, 0.0f64..=1.0),
        tier in tiers(),
        day in 0i64..60,
    ) {
        let catalogue = built_in();
        let models: Vec<&ModelEntry> = catalogue.iter().filter(|entry| !entry.prices.is_empty()).collect();
        let entry = model.get(&models);
        let at = at("2026-11-01") + chrono::Duration::days(day);
        let share = |whole: u64, part: f64| ((whole as f64) * part) as u64;
        let prompt = share(max_prompt_tokens, used.0);
        let cached = share(prompt, used.1);
        let cache_write = share(prompt - cached, used.2);
        let completion = share(max_output_tokens, used.3);
        let usage = Usage { prompt, cached, cache_write, completion, tier, ..Usage::default() };
        let bound = Bound { max_prompt_tokens, max_output_tokens, tier };
        prop_assert!(entry.price(&usage, at).unwrap() <= entry.upper_bound(&bound, at).unwrap());
        // The twin: floats, dollars, one term a line.
        let list = entry.price_list(at).unwrap();
        let rates = list.long_prompt.iter().filter(|tier| prompt > tier.above_prompt_tokens)
            .max_by_key(|tier| tier.above_prompt_tokens).map_or(list.rates, |tier| tier.rates);
        let dollars = |rate: Rate| rate.to_string().parse::<f64>().unwrap() / 1e6;
        let mut sum = (prompt - cached - cache_write) as f64 * dollars(rates.input);
        sum += cached as f64 * dollars(rates.cached.unwrap_or(rates.input));
        sum += cache_write as f64 * dollars(rates.cache_write.unwrap_or(rates.input));
        sum += completion as f64 * dollars(rates.output);
        sum *= match tier {
            ServedTier::Standard => 1.0,
            ServedTier::Flex => f64::from(list.flex_permille.unwrap_or(1000)) / 1000.0,
            ServedTier::Priority => f64::from(list.priority_permille.unwrap_or(2000)) / 1000.0,
        };
        let ours = entry.price(&usage, at).unwrap().nanodollars() as f64 / 1e9;
        prop_assert!((ours - sum).abs() <= 1e-9 + sum * 1e-9, "{ours} against {sum}");
    }
}
