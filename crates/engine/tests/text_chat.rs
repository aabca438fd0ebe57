//! Chat templates against transformers, and everything a hostile template or conversation can do.
//!
//! `text/chat-goldens.json` and `tests/text/make_chat_goldens.py` (at the top) say what transformers rendered: whole
//! templates over whole conversations, and snippets that each use one piece of Jinja2 and Python.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bindery_engine::{
    ChatTemplate, EngineError, RenderRequest, Tokenizer,
    text::{chat::ContentFormat, gguf_vocabulary::GgufVocabulary},
};
use bindery_model::weights::gguf::GgufFile;
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Goldens {
    now: chrono::NaiveDateTime,
    named_tokens: BTreeMap<String, String>,
    templates: BTreeMap<String, String>,
    conversations: BTreeMap<String, Vec<Value>>,
    tools: Vec<Value>,
    data: Value,
    cases: Vec<Case>,
    snippets: Vec<Snippet>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    with_tools: bool,
    prompt: bool,
    kwargs: Map<String, Value>,
    #[serde(flatten)]
    expected: Expected,
}

#[derive(Deserialize)]
struct Snippet {
    source: String,
    #[serde(flatten)]
    expected: Expected,
}

/// One of the three is there.
#[derive(Deserialize)]
struct Expected {
    text: Option<String>,
    /// What `raise_exception` was given.
    raised: Option<String>,
    /// Any other error; its words are Python's own.
    error: Option<String>,
}

impl Expected {
    /// What is wrong with a result, if anything is.
    fn mismatch(&self, result: &Result<String, EngineError>) -> Option<String> {
        let wanted = || format!("{:?}", self.text.as_ref().or(self.raised.as_ref()).or(self.error.as_ref()).unwrap());
        match result {
            Ok(text) if self.text.as_ref() == Some(text) => None,
            Err(EngineError::Invalid { param: "messages", message }) if self.raised.as_ref() == Some(message) => None,
            Err(EngineError::Invalid { .. } | EngineError::Text(_)) if self.error.is_some() => None,
            other => Some(format!("\n    ours {other:?}\n    want {}", wanted())),
        }
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text").join(name)
}

fn goldens() -> Goldens {
    serde_json::from_slice(&std::fs::read(fixture("chat-goldens.json")).unwrap()).unwrap()
}

/// A tokenizer with the given `bos_token` and so on.
fn tokenizer(named: &BTreeMap<String, String>) -> Tokenizer {
    let tokens = vec![named["bos_token"].clone(), named["eos_token"].clone(), named["pad_token"].clone()];
    Tokenizer::from_vocabulary(&GgufVocabulary {
        model: "gpt2".into(),
        types: vec![3; tokens.len()],
        tokens,
        bos: Some(0),
        eos: Some(1),
        padding: Some(2),
        ..GgufVocabulary::default()
    })
    .unwrap()
}

fn plain_tokenizer() -> Tokenizer {
    let names = [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")];
    tokenizer(&names.iter().map(|&(role, token)| (role.to_owned(), token.to_owned())).collect())
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::from_source(source, &plain_tokenizer()).unwrap()
}

fn request(messages: Value) -> RenderRequest {
    let Value::Array(messages) = messages else { panic!("{messages} is no list") };
    RenderRequest { messages, ..RenderRequest::default() }
}

fn invalid(result: Result<String, EngineError>) -> String {
    match result {
        Err(EngineError::Invalid { param: "messages", message }) => message,
        other => panic!("{other:?} is no complaint about messages"),
    }
}

fn report(mismatches: &[String], total: usize) {
    assert!(mismatches.is_empty(), "{} of {total} differ:{}", mismatches.len(), mismatches.concat());
}

#[test]
fn whole_templates_render_as_transformers() {
    let goldens = goldens();
    let tokenizer = tokenizer(&goldens.named_tokens);
    let mut templates: BTreeMap<&str, ChatTemplate> = (goldens.templates.iter())
        .map(|(name, source)| (name.as_str(), ChatTemplate::from_source(source, &tokenizer).unwrap()))
        .collect();
    if let Some(path) = std::env::var_os("BINDERY_TEST_MODEL") {
        let file = GgufFile::open(Path::new(&path)).unwrap();
        let template = ChatTemplate::from_gguf(&file, &Tokenizer::from_gguf(&file).unwrap()).unwrap().unwrap();
        templates.insert("default-model", template);
    } else {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: the default model's template: BINDERY_TEST_MODEL is not set");
        }
    }
    let mut mismatches = Vec::new();
    for case in &goldens.cases {
        let Some(template) = templates.get(case.template.as_str()) else { continue };
        let request = RenderRequest {
            messages: goldens.conversations[&case.conversation].clone(),
            tools: case.with_tools.then(|| goldens.tools.clone()),
            add_generation_prompt: case.prompt,
            kwargs: case.kwargs.clone(),
        };
        if let Some(mismatch) = case.expected.mismatch(&template.render_at(&request, goldens.now)) {
            mismatches.push(format!("\n{} on {}:{mismatch}", case.template, case.conversation));
        }
    }
    report(&mismatches, goldens.cases.len());
}

#[test]
fn snippets_of_jinja_and_python_render_as_transformers() {
    let goldens = goldens();
    let tokenizer = tokenizer(&goldens.named_tokens);
    let request = RenderRequest {
        messages: goldens.conversations["tools"].clone(),
        tools: Some(goldens.tools.clone()),
        add_generation_prompt: true,
        kwargs: Map::from_iter([("data".to_owned(), goldens.data.clone())]),
    };
    let mut mismatches = Vec::new();
    for snippet in &goldens.snippets {
        // A template that knows tool calls gets null content as it is. (The line feed is trimmed with the comment.)
        let source = format!("{{# tool_calls #}}\n{}", snippet.source);
        let rendered = ChatTemplate::from_source(&source, &tokenizer)
            .and_then(|template| template.render_at(&request, goldens.now));
        if let Some(mismatch) = snippet.expected.mismatch(&rendered) {
            mismatches.push(format!("\n{}{mismatch}", snippet.source));
        }
    }
    report(&mismatches, goldens.snippets.len());
}

#[test]
fn strings_and_parts_reach_templates_in_the_form_they_read() {
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    let text = json!([{"role": "user", "content": "a"}]);

    let template_of = |source: &str| template(source);
    let reads_text = template_of("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}");
    assert_eq!(reads_text.content_format(), ContentFormat::Text);
    assert_eq!(reads_text.render(&request(text.clone())).unwrap(), "<user>a");
    assert_eq!(reads_text.render(&request(parts.clone())).unwrap(), "<user>a\nb");

    let reads_parts =
        template_of("{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}");
    assert_eq!(reads_parts.content_format(), ContentFormat::Parts);
    assert_eq!(reads_parts.render(&request(text.clone())).unwrap(), "[a]");
    assert_eq!(reads_parts.render(&request(parts.clone())).unwrap(), "[a][b]");

    let reads_both = template(&goldens().templates["parts"]);
    assert_eq!(reads_both.content_format(), ContentFormat::TextOrParts);
    assert_eq!(reads_both.render(&request(parts)).unwrap(), "<s><turn>user\nab</turn>\n");

    let picture = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
    let message = invalid(reads_text.render(&request(picture)));
    assert!(message.contains("messages[0].content[0]") && message.contains("image_url"), "{message}");
}

#[test]
fn null_content_is_empty_text_for_templates_without_tool_calls() {
    let messages =
        json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": null}, {"role": "assistant"}]);
    let plain = template("{% for m in messages %}{{ m['role'] + ':' + m['content'] }};{% endfor %}");
    assert_eq!(plain.render(&request(messages.clone())).unwrap(), "user:x;assistant:;assistant:;");
    let knowing = template(
        "{% for m in messages %}{{ m.tool_calls is defined }},{{ m.content is defined }},{{ m.content is none }};{% endfor %}",
    );
    assert_eq!(knowing.render(&request(messages)).unwrap(), "False,True,False;False,True,True;False,False,False;");
}

#[test]
fn arguments_of_tool_calls_are_objects_in_templates() {
    let source = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.items() | list }}{% endfor %}{% endfor %}";
    let message = |arguments: &str| json!([{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}]);
    let template = template(source);
    assert_eq!(template.render(&request(message("{\"b\": 1, \"a\": [2.0]}"))).unwrap(), "[('b', 1), ('a', [2.0])]");
    assert_eq!(template.render(&request(message(""))).unwrap(), "[]");
    let complaint = invalid(template.render(&request(message("{\"b\""))));
    assert!(complaint.contains("messages[0].tool_calls[0].function.arguments"), "{complaint}");
}

#[test]
fn a_folder_may_hold_several_templates() {
    let folder = fixture("folder");
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let template = ChatTemplate::from_dir(&folder, &tokenizer).unwrap().unwrap();
    let mut request = request(json!([{"role": "user", "content": "hi"}]));
    assert_eq!(template.render(&request).unwrap(), "<|im_start|>user: hi<|im_end|>");
    request.tools = Some(vec![json!({"type": "function"})]);
    assert_eq!(template.render(&request).unwrap(), "tools 1hi");

    let own = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::from_dir(own.path(), &tokenizer).unwrap().is_none());
    std::fs::write(own.path().join("tokenizer_config.json"), r#"{"chat_template": "config"}"#).unwrap();
    let render = || ChatTemplate::from_dir(own.path(), &tokenizer).unwrap().unwrap().render(&request).unwrap();
    assert_eq!(render(), "config");
    std::fs::write(own.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(render(), "file");
    std::fs::create_dir(own.path().join("additional_chat_templates")).unwrap();
    std::fs::write(own.path().join("additional_chat_templates/tool_use.jinja"), "tools").unwrap();
    assert_eq!(render(), "tools");
    std::fs::write(own.path().join("chat_template.jinja"), "{% if %}").unwrap();
    let message = ChatTemplate::from_dir(own.path(), &tokenizer).unwrap_err().to_string();
    assert!(message.contains("\"default\"") && message.contains("not valid Jinja"), "{message}");
}

#[test]
fn strftime_now_follows_the_clock() {
    let template = template("{{ strftime_now('%Y') }}");
    let year: i32 = template.render(&request(json!([]))).unwrap().parse().unwrap();
    assert!(year >= 2024, "{year}");
}

/// Each of these would run, grow or recurse without end if nothing stopped it.
#[test]
fn hostile_templates_end_with_an_error() {
    let bombs = [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set x = 'x' * 9999999999 %}",
        "{% set x = [0] * 9999999999 %}",
        "{{ range(99999999999) | list | length }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in [[1]] recursive %}{{ loop([i]) }}{% endfor %}",
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
        "{% for i in range(9999) %}{{ messages | tojson(indent=4000) }}{% endfor %}",
        "{{ 'x'.zfill(9999999999) }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ 'x\\nx' | indent(9999999999) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ messages | tojson(indent=9999999999) }}",
        "{{ strftime_now('%9999999999Y' * 99999) }}",
        "{{ 2 ** 99999999 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', 'ab') | replace('b', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = [] + ns.x * 2 %}{% endfor %}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = ([] + (ns.x if i >= 0) + (ns.x)) %}{% endfor %}",
        "{% set ns = namespace(x=messages) %}{% for i in range(99) %}{% set ns.x = ns.x | map('upper') + ns.x | list %}{% endfor %}",
        "{% set ns = namespace(x=(0,)) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = ns.x | chain(ns.x) %}{% endfor %}{{ ns.x | length }}",
        "{% macro m(x, n) %}{{ m(x + x, n + 1) if n < 40 else x | length }}{% endmacro %}{{ m([0], 0) }}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(40) %}{% set ns.x = ns.x + [0] * 999999999 %}{% endfor %}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | string | length }}",
        "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ (ns.x ~ '') | length }}",
        "{% set ns = namespace(x=messages) %}{% for i in range(20) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ (ns.x ~ '') | length }}",
        "{% include 'default' %}",
        "{% extends 'default' %}",
        "{% import 'default' as d %}{{ d }}",
    ];
    for bomb in bombs {
        let conversation = request(json!([{"role": "user", "content": "y".repeat(10_000)}]));
        let result =
            ChatTemplate::from_source(bomb, &plain_tokenizer()).and_then(|template| template.render(&conversation));
        assert!(result.is_err(), "{bomb} printed {} bytes", result.unwrap().len());
    }
}

/// Two lists that were nested in themselves forty times: to compare or to hash them takes two to the power of that.
#[test]
fn comparing_lists_nested_in_themselves_is_paid_for() {
    let grown = "{% set a = namespace(x=[0]) %}{% set b = namespace(x=[0]) %}{% for i in range(40) %}\
                 {% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}";
    let render = |source: &str| template(source).render(&request(json!([])));
    assert_eq!(render(&format!("{grown}{{{{ a.x | length }}}}")).unwrap(), "2", "to build them costs little");
    for comparison in [
        "{{ a.x == b.x }}",
        "{{ a.x != b.x }}",
        "{{ a.x < b.x }}",
        "{{ a.x >= b.x }}",
        "{{ 1 if [a.x] == [b.x] else 2 }}",
        "{{ [a.x] == [] + [b.x] }}",
        "{{ a.x in [b.x] }}",
        "{{ a.x not in [b.x] }}",
        "{% for i in [a.x] if i in [b.x] %}{% endfor %}",
        "{{ a.x is eq(b.x) }}",
        "{{ a.x is equalto b.x }}",
        "{{ a.x is in([b.x]) }}",
        "{{ a.x is in [b.x] }}",
        "{{ [a.x] | select('eq', b.x) | list | length }}",
        "{{ [a.x] | reject('in', [b.x]) | list | length }}",
        "{{ [{'k': a.x}] | selectattr('k', 'le', b.x) | list | length }}",
        "{{ [a.x, b.x] | sort | length }}",
        "{{ [a.x, b.x] | unique | list | length }}",
        "{{ [a.x, b.x] | min | length }}",
        "{{ [a.x, b.x] | max | length }}",
        "{{ [dict(k=a.x), dict(k=b.x)] | groupby('k') | list | length }}",
        "{{ dict(k=a.x, l=b.x) | dictsort(by='value') | length }}",
        "{{ [a.x].count(b.x) }}",
        "{{ {a.x: 1} | length }}",
        "{{ {(a.x if 1 else 2): 1} | length }}",
        "{{ {}[a.x] }}",
        "{{ {}[a.x if 1 else 2] }}",
        "{{ {'k': 1}.get(a.x) }}",
        "{% for i in [a.x, b.x] %}{{ loop.changed(i) }}{% endfor %}",
    ] {
        let result = render(&format!("{grown}{comparison}"));
        assert!(result.is_err(), "{comparison} gives {result:?}");
    }
    // What is not nested in itself is compared as ever.
    let same = "{{ [1, [2]] == [1, [2]] }} {{ [2] in [[1], [2]] }} {{ [[2], [1]] | sort }} {{ {'a': [1]}['a'] is eq([1]) }} \
                {{ [3, 1] | max }} {{ [[1], [1]] | unique | list }} {{ dict(b=1, a=2) | dictsort }} {{ 'b' in 'abc' }}";
    let expected = "True True [[1], [2]] True 3 [[1]] [('a', 2), ('b', 1)] True";
    assert_eq!(render(same).unwrap().to_lowercase(), expected.to_lowercase());
}

/// What a template builds must not overflow the stack when it is printed, serialised, compared or dropped.
#[test]
fn deeply_nested_values_do_no_harm() {
    let (open, close) = ("[".repeat(20), "]".repeat(20));
    let wraps = [format!("{open}ns.x{close}"), "{'k': {'k': {'k': ns.x}}}".to_owned(), "dict(k=(ns.x,))".to_owned()];
    let tails = [
        "",
        "{{ ns.x }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x == [ns.x] }}",
        "{{ {ns.x: 1} }}",
        "{{ [ns.x, ns.x] | sort }}",
    ];
    // Grows until the steps are used up, and as far as they allow with a tail.
    for (count, tail) in std::iter::once((99_999, "")).chain(tails.map(|tail| (10_000, tail))) {
        for wrap in &wraps {
            let grow = format!("{{% set ns.x = {wrap} %}}");
            let source =
                format!("{{% set ns = namespace(x=[]) %}}{{% for i in range({count}) %}}{grow}{{% endfor %}}{tail}");
            let _either = template(&source).render(&request(json!([])));
        }
    }
}

#[test]
fn hostile_sources_are_refused_or_compiled() {
    let deep = 100_000;
    for source in [
        "{{ ".to_owned() + &"(".repeat(deep),
        "{{ ".to_owned() + &"(".repeat(deep) + "1" + &")".repeat(deep) + " }}",
        "{{ ".to_owned() + &"[".repeat(deep) + &"]".repeat(deep) + " }}",
        "{{ ".to_owned() + &"not ".repeat(deep) + "1 }}",
        "{{ ".to_owned() + &"-".repeat(deep) + "1 }}",
        "{{ 1".to_owned() + &" + 1".repeat(deep) + " }}",
        "{{ x".to_owned() + &".x".repeat(deep) + " }}",
        "{{ x".to_owned() + &"|d".repeat(deep) + " }}",
        "{% if 1 %}".repeat(deep),
        "{% if 1 %}".repeat(50_000) + &"{% endif %}".repeat(50_000),
        "{%".repeat(deep),
        "{# ".repeat(deep),
        "{% generation %}".repeat(30_000),
        "\u{0}{{ \u{0} }}".to_owned(),
        "x".repeat(2 << 20),
    ] {
        if let Ok(template) = ChatTemplate::from_source(&source, &plain_tokenizer()) {
            let _either = template.render(&request(json!([])));
        }
    }
}

#[test]
fn hostile_messages_are_the_callers_mistake() {
    let template = template(&goldens().templates["chatml-tools"]);
    for messages in [
        json!([]),
        json!([1]),
        json!(["x"]),
        json!([null]),
        json!([{}]),
        json!([{"role": 1, "content": 2}]),
        json!([{"role": "tool", "content": {"a": 1}}]),
        json!([{"role": "assistant", "content": [], "tool_calls": 3}]),
        json!([{"role": "assistant", "content": [7], "tool_calls": [3, {"function": 3}, {"function": {"arguments": "x"}}]}]),
        json!([{"role": "user", "content": [{"type": "text"}]}]),
    ] {
        match template.render(&request(messages.clone())) {
            Ok(_) | Err(EngineError::Invalid { param: "messages", .. }) => {}
            Err(other) => panic!("{messages} gave {other:?}"),
        }
    }
}

#[test]
fn a_long_conversation_is_rendered() {
    let turns =
        |index| json!({"role": if index % 2 == 0 { "user" } else { "assistant" }, "content": "word ".repeat(400)});
    let request = RenderRequest { messages: (0..3_000).map(turns).collect(), ..RenderRequest::default() };
    let rendered = template(&goldens().templates["chatml-tools"]).render(&request).unwrap();
    assert!(rendered.len() > 6_000_000);
}
