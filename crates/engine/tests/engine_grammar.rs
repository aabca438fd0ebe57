//! Answers of a given form, from a model that writes noise: whatever it would rather say, what comes out is JSON by the
//! schema, a match of the expression (by the regex crate's word, not by llguidance's), one of the choices. And nothing of
//! that depends on who else is in the batch.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bindery_engine::{
    EngineError, FinishReason, Grammar, LocalModel, Prompt, SamplingParams, TextEvent, TextRequest,
    grammar::{self, MAX_CHOICES},
    testing::{FakeModelOptions, GateKeeper, fake_local_model, gate, small_limits},
};
use bindery_scheduler::{Limits, TokenId};
use serde_json::{Value, json};

fn model() -> LocalModel {
    fake_local_model(small_limits(), FakeModelOptions::default()).unwrap()
}

fn request(prompt: &str, grammar: Grammar, seed: u64) -> TextRequest {
    TextRequest {
        params: SamplingParams { temperature: 1.0, seed: Some(seed), ..SamplingParams::default() },
        max_tokens: Some(400),
        grammar: Some((Arc::new(grammar), "structured_outputs")),
        ..TextRequest::new(Prompt::Text { text: prompt.to_owned(), add_special_tokens: true })
    }
}

/// Text, tokens and reason of every sample.
async fn answers(model: &LocalModel, request: TextRequest) -> Vec<(String, usize, FinishReason)> {
    let mut texts = vec![String::new(); request.num_samples as usize];
    let mut ends = vec![None; request.num_samples as usize];
    let mut stream = model.generate(request).await.unwrap();
    while let Some(event) = stream.next().await {
        match event.unwrap() {
            TextEvent::Prompt { .. } => {}
            TextEvent::Delta { sample, text, .. } => texts[sample as usize].push_str(&text),
            TextEvent::Finished { sample, reason, num_tokens, .. } => {
                ends[sample as usize] = Some((num_tokens, reason));
            }
        }
    }
    let ends = ends.into_iter().map(Option::unwrap);
    texts.into_iter().zip(ends).map(|(text, (num_tokens, reason))| (text, num_tokens, reason)).collect()
}

async fn answer(model: &LocalModel, request: TextRequest) -> (String, usize, FinishReason) {
    answers(model, request).await.remove(0)
}

/// Bounded in every part, so that noise fits it within `max_tokens`.
fn person_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
            "home": {"$ref": "#/$defs/place"},
        },
        "required": ["name", "age", "tags", "home"],
        "additionalProperties": false,
        "$defs": {"place": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
    })
}

fn assert_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let fields = value.as_object().unwrap();
    assert_eq!(fields.keys().collect::<BTreeSet<_>>().len(), 4, "{text}");
    let name = fields["name"].as_str().unwrap();
    assert!((2..=9).contains(&name.len()) && name.starts_with(|first: char| first.is_ascii_uppercase()), "{text}");
    assert!(fields["age"].as_u64().unwrap() <= 150, "{text}");
    let tags = fields["tags"].as_array().unwrap();
    assert!((1..=3).contains(&tags.len()), "{text}");
    assert!(tags.iter().all(|tag| ["red", "green", "blue"].contains(&tag.as_str().unwrap())), "{text}");
    assert!(fields["home"].is_null() || fields["home"].is_boolean(), "{text}");
}

#[tokio::test]
async fn noise_becomes_json_by_the_schema() {
    let model = model();
    for seed in 0..20 {
        let grammar = Grammar::JsonSchema { schema: person_schema(), any_whitespace: seed % 2 == 0 };
        let (text, _, reason) = answer(&model, request("p", grammar, seed)).await;
        assert_eq!(reason, FinishReason::EndOfSequence, "{text}");
        assert_person(&text);
        if seed % 2 == 1 {
            assert!(!text.contains([' ', '\n', '\t']), "white space was to be left out: {text}");
        }
    }
    model.engine.idle().await;
    assert_eq!(model.engine.stats().num_used_blocks, 0);
}

#[tokio::test]
async fn any_object_is_an_object_and_white_space_is_bounded() {
    let model = model();
    // The model likes nothing more than line breaks.
    let mut request = request("p", Grammar::json_object(), 3);
    request.params.temperature = 0.0;
    request.params.logit_bias.insert(TokenId(u32::from(b'\n')), 50.0);
    let (text, num_tokens, _) = answer(&model, request).await;
    assert!(text.starts_with('{') && num_tokens > 64, "{text:?}");
    let longest = text.split(|c: char| c != '\n').map(str::len).max().unwrap();
    assert_eq!(longest, 64, "{text:?}");
}

#[tokio::test]
async fn noise_matches_the_expression() {
    let model = model();
    for source in [
        r"\d\w\s\d{3}",
        r"[a-f0-9]{8}-[a-f0-9]{4}",
        r"(yes|no|maybe)( (of course|never)){0,2}",
        r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
        r"[äöü€]{3,6}/?",
        r"x",
    ] {
        // Classes are ASCII: a free choice would give digits of any script.
        let ascii = source.replace(r"\d", "[0-9]").replace(r"\w", "[0-9A-Za-z_]").replace(r"\s", r"[ \t\n\r\f\v]");
        let expected = regex::Regex::new(&format!("^(?:{ascii})$")).unwrap();
        let mut seen = BTreeSet::new();
        for seed in 0..12 {
            let (text, _, reason) = answer(&model, request("q", Grammar::Regex(source.to_owned()), seed)).await;
            assert!(expected.is_match(&text), "{source}: {text:?}");
            assert_eq!(reason, FinishReason::EndOfSequence, "{source}: {text:?}");
            seen.insert(text);
        }
        assert!(seen.len() > 3 || source == "x", "{source} leaves freedom, and seeds differ: {seen:?}");
    }
}

#[tokio::test]
async fn one_of_the_choices_whatever_their_letters() {
    let model = model();
    let choices =
        ["positive", "negative", "neu\"tral\\ | /x/", "mixed\n-\u{e9}\u{1F600}\u{7f}", "pos"].map(str::to_owned);
    let mut seen = BTreeSet::new();
    for seed in 0..40 {
        let prompt = format!("prompt {seed}");
        let (text, _, reason) = answer(&model, request(&prompt, Grammar::Choice(choices.to_vec()), seed)).await;
        assert!(choices.contains(&text), "{text:?}");
        assert_eq!(reason, FinishReason::EndOfSequence);
        seen.insert(text);
    }
    assert_eq!(seen.len(), choices.len(), "forty prompts reach them all");
    let many: Vec<String> = (0..MAX_CHOICES).map(|index| format!("choice {index}, {}", index * 7919)).collect();
    let (text, ..) = answer(&model, request("c", Grammar::Choice(many.clone()), 0)).await;
    assert!(many.contains(&text), "{text:?}");
}

#[tokio::test]
async fn a_lark_grammar_is_followed() {
    let model = model();
    let source = r#"
        start: sum
        sum: number | number OPERATOR sum
        number: /[1-9][0-9]{0,2}/
        OPERATOR: "+" | "*"
    "#;
    let expected = regex::Regex::new(r"^[1-9][0-9]{0,2}([+*][1-9][0-9]{0,2})*$").unwrap();
    for seed in 0..10 {
        let mut request = request("l", Grammar::Lark(source.to_owned()), seed);
        request.max_tokens = Some(60);
        let (text, _, reason) = answer(&model, request).await;
        let whole = if reason == FinishReason::Length { text.trim_end_matches(['+', '*']) } else { &text };
        assert!(expected.is_match(whole), "{text:?}");
    }
}

/// The end belongs to the grammar: `ignore_eos` and `min_tokens` cannot push an answer beyond it, and the answer before
/// the end is as free as ever.
#[tokio::test]
async fn a_finished_grammar_ends_the_answer() {
    let model = model();
    for (ignore_eos, min_tokens) in [(true, 0), (false, 50), (true, 50)] {
        let mut request = request("e", Grammar::Regex("ab?c{2}".to_owned()), 1);
        request.params.ignore_eos = ignore_eos;
        request.params.min_tokens = min_tokens;
        let (text, num_tokens, reason) = answer(&model, request).await;
        assert!(["abcc", "acc"].contains(&text.as_str()), "{text}");
        assert_eq!((num_tokens, reason), (text.len() + 1, FinishReason::EndOfSequence));
    }
    // Where the grammar leaves a choice, min_tokens holds.
    let mut request = request("e", Grammar::Regex("[a-z]*".to_owned()), 1);
    request.params.min_tokens = 30;
    assert!(answer(&model, request).await.0.len() >= 30);
}

/// Every sample has its own place in the grammar, and a batch changes nobody's tokens: also not when blocks run out and
/// sequences are computed again.
#[tokio::test]
async fn samples_and_neighbours_do_not_touch_each_other() {
    let person = || Grammar::JsonSchema { schema: person_schema(), any_whitespace: true };
    let roomy = model();
    let mut alone = Vec::new();
    for seed in 0..8 {
        alone.push(answer(&roomy, request("same", person(), seed)).await);
    }
    let tight = Limits { num_blocks: 130, ..small_limits() };
    let (gate, keeper) = gate();
    let tight = fake_local_model(tight, FakeModelOptions { gate: Some(gate), ..FakeModelOptions::default() }).unwrap();
    let requests = (0..8).map(|seed| request("same", person(), seed)).collect();
    let together = futures_join(&tight, requests, keeper).await;
    assert_eq!(together, alone);
    assert!(tight.engine.stats().num_preemptions > 0, "the test wants a cache that runs out");

    let mut many = request("same", person(), 5);
    many.num_samples = 6;
    let samples = answers(&roomy, many).await;
    assert_eq!(samples[0], alone[5]);
    for (text, _, _) in &samples {
        assert_person(text);
    }
    assert!(samples.iter().map(|(text, ..)| text).collect::<BTreeSet<_>>().len() > 1);
}

/// All at once: the gate opens when the last one is there.
async fn futures_join(
    model: &LocalModel,
    requests: Vec<TextRequest>,
    keeper: GateKeeper,
) -> Vec<(String, usize, FinishReason)> {
    let mut streams = Vec::new();
    for request in requests {
        streams.push(model.generate(request).await.unwrap());
    }
    drop(keeper);
    let mut all = Vec::new();
    for mut stream in streams {
        let (mut text, mut end) = (String::new(), None);
        while let Some(event) = stream.next().await {
            match event.unwrap() {
                TextEvent::Delta { text: piece, .. } => text.push_str(&piece),
                TextEvent::Finished { num_tokens, reason, .. } => end = Some((num_tokens, reason)),
                TextEvent::Prompt { .. } => {}
            }
        }
        let (num_tokens, reason) = end.unwrap();
        all.push((text, num_tokens, reason));
    }
    all
}

#[tokio::test]
async fn unusable_grammars_are_refused_with_the_reason() {
    let model = model();
    let schema = |schema: Value| Grammar::JsonSchema { schema, any_whitespace: true };
    for (grammar, said) in [
        (Grammar::Regex("(a".to_owned()), "a"),
        (Grammar::Regex("a(?=b)".to_owned()), "look"),
        (Grammar::Lark("start ::= a".to_owned()), ""),
        (Grammar::Lark("begin: \"a\"".to_owned()), "start"),
        (Grammar::Lark(String::new()), ""),
        (Grammar::Choice(Vec::new()), "1 to 4096"),
        (Grammar::Choice(vec!["a".to_owned(), String::new()]), "empty choice"),
        (Grammar::Choice(vec!["a".to_owned(); 4097]), "4097 choices"),
        (Grammar::Regex("[^\\s\\S]".to_owned()), "no text matches"),
        (Grammar::Lark("start: start".to_owned()), "no text matches"),
        (Grammar::Lark("start: %json {\"type\": \"integer\", \"multipleOf\": 999983}".to_owned()), "multipleOf"),
        (schema(json!({"$ref": "#"})), "no text matches"),
        (schema(json!({"properties": {"a": {"items": [{"multipleOf": 999_983}]}}})), "multipleOf is 999983"),
        (schema(json!({"multipleOf": 0.12345})), "multipleOf is 0.12345"),
        (schema(json!({"multipleOf": 1e300})), "multipleOf is"),
        (schema(json!(7)), "a number"),
        (schema(json!(false)), "false"),
        (schema(json!({"type": "poem"})), "poem"),
        (schema(json!({"not": {"type": "string"}})), "not"),
        (schema(json!({"$ref": "http://localhost:1/schema.json"})), "http://localhost:1"),
        (schema(json!({"$ref": "file:///etc/passwd"})), "file:///etc/passwd"),
        (schema(json!({"type": "integer", "minimum": 5, "maximum": 4})), "5"),
        (schema(json!({"const": "x".repeat(600 << 10)})), "the limit is 262144"),
    ] {
        let shown = format!("{grammar:?}").chars().take(80).collect::<String>();
        match model.generate(request("r", grammar, 0)).await {
            Err(EngineError::Invalid { param: "structured_outputs", message }) => {
                assert!(message.contains(said), "{shown}: {message}");
                assert!(message.len() < 700 && !message.contains('\n'), "{shown}: {message}");
            }
            other => panic!("{shown}: {other:?}"),
        }
    }
    model.engine.idle().await;
    assert_eq!(model.engine.num_unfinished(), 0);
}

/// As ambiguous as can be: a mask takes long, and longer with every token.
fn slow_grammar() -> Grammar {
    Grammar::Lark("start: e\ne: e e | \"a\" | \"b\" | \"\"".to_owned())
}

/// A sample whose mask is not there sits the step out: who wants free text does not wait for it. The grammar threads
/// stand at a gate after their first mask, so the grammar gets no further while the other answer is written; in lockstep
/// that would never end.
#[tokio::test]
async fn a_slow_grammar_holds_up_nobody_else() {
    let (gate, keeper) = gate();
    let options = FakeModelOptions { mask_gate: Some(gate), ..FakeModelOptions::default() };
    let model = fake_local_model(small_limits(), options).unwrap();
    let mut slow = request("s", slow_grammar(), 1);
    slow.params.min_tokens = 300;
    let mut slow = model.generate(slow).await.unwrap();
    let first = slow.next().await;
    assert!(matches!(first, Some(Ok(TextEvent::Prompt { .. }))), "{first:?}");
    let plain = TextRequest {
        params: SamplingParams { ignore_eos: true, ..SamplingParams::default() },
        max_tokens: Some(300),
        ..TextRequest::new(Prompt::Text { text: "free".to_owned(), add_special_tokens: true })
    };
    let plain = tokio::time::timeout(Duration::from_mins(1), answer(&model, plain)).await;
    let (_, num_tokens, _) = plain.expect("the plain answer does not wait for the slow grammar");
    assert_eq!(num_tokens, 300);
    let stats = model.engine.stats();
    let num_slow_tokens = stats.generation_tokens - 300;
    // One by the mask that came with the grammar, and one for each thread.
    assert!(num_slow_tokens <= 1 + grammar::MAX_WORKERS as u64, "{num_slow_tokens} tokens meanwhile");
    // Its reader goes: so do its blocks, and the work on its mask.
    drop(slow);
    model.engine.idle().await;
    assert_eq!(model.engine.stats().num_used_blocks, 0);
    drop(keeper);
    // And with nothing but held sequences the loop sleeps, is woken, and comes to an end.
    let mut alone = request("t", slow_grammar(), 2);
    alone.max_tokens = Some(12);
    alone.num_samples = 3;
    for (text, ..) in answers(&model, alone).await {
        assert!(text.chars().all(|letter| "ab".contains(letter)), "{text:?}");
    }
}

#[tokio::test]
async fn a_grammar_that_becomes_too_large_fails_its_request_by_the_field_it_came_in() {
    let model = model();
    let properties: serde_json::Map<String, Value> =
        (0..3000).map(|index| (format!("p{index}"), json!({"type": "integer"}))).collect();
    let grammar =
        Grammar::JsonSchema { schema: json!({"type": "object", "properties": properties}), any_whitespace: true };
    let request = TextRequest {
        grammar: Some((Arc::new(grammar), "response_format")),
        ..request("f", Grammar::json_object(), 1)
    };
    let error = match model.generate(request).await {
        Err(error) => error,
        Ok(mut stream) => loop {
            match stream.next().await {
                Some(Err(error)) => break error,
                Some(Ok(_)) => {}
                None => panic!("three thousand open alternatives were followed"),
            }
        },
    };
    assert!(matches!(&error, EngineError::Invalid { param: "response_format", .. }), "{error:?}");
    assert!(error.to_string().contains("optional properties"), "{error}");
    model.engine.idle().await;
}

#[tokio::test]
async fn a_deadline_holds_while_a_grammar_compiles() {
    let model = model();
    let request = TextRequest { timeout: Some(Duration::ZERO), ..request("d", Grammar::json_object(), 1) };
    let error = model.generate(request).await.unwrap_err();
    assert!(matches!(error, EngineError::DeadlineExceeded { timeout_ms: 0 }), "{error:?}");
}
