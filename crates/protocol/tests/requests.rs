//! What a request may and may not look like, and that errors say it in one sentence.

use bindery_protocol::openai::{
    ChatCompletionRequest, ChatContent, CompletionPrompt, CompletionRequest, ContentPart, DetokenizeRequest, Role,
    TokenizeRequest,
};
use serde_json::{Value, json};

fn prompt(value: &Value) -> Result<CompletionPrompt, String> {
    serde_json::from_value(value.clone()).map_err(|error| error.to_string())
}

#[test]
fn a_prompt_has_four_forms() {
    assert_eq!(prompt(&json!("a")), Ok(CompletionPrompt::Text("a".into())));
    assert_eq!(prompt(&json!(["a", "b"])), Ok(CompletionPrompt::Texts(vec!["a".into(), "b".into()])));
    assert_eq!(prompt(&json!([1, 2])), Ok(CompletionPrompt::Tokens(vec![1, 2])));
    assert_eq!(prompt(&json!([[1], [2, 3]])), Ok(CompletionPrompt::TokenLists(vec![vec![1], vec![2, 3]])));
    assert_eq!(prompt(&json!([])), Ok(CompletionPrompt::Texts(vec![])));
}

#[test]
fn a_prompt_of_another_form_says_which_forms_there_are() {
    for (value, expected) in [
        (json!(7), "an array of arrays of token ids"),
        (json!({"a": 1}), "an array of arrays of token ids"),
        (json!(["a", 1]), "elements of different kinds"),
        (json!([1, "a"]), "elements of different kinds"),
        (json!([[1], 2]), "elements of different kinds"),
        (json!([-1]), "-1 is not a token id"),
        (json!([4294967296u64]), "4294967296 is not a token id"),
        (json!([1.5]), "a string, a token id or an array of token ids"),
        (json!([[[1]]]), "u32"),
        (json!([true]), "a string, a token id or an array of token ids"),
    ] {
        let error = prompt(&value).expect_err(&value.to_string());
        assert!(error.contains(expected), "{value}: {error}");
    }
}

#[test]
fn null_means_absent() {
    let mut body = json!({"model": null, "prompt": null, "max_tokens": null, "stop": null, "logit_bias": null,
        "stream_options": null, "response_format": null, "structured_outputs": null, "suffix": null, "n": null});
    let request: CompletionRequest = serde_json::from_value(body.take()).unwrap();
    assert_eq!(request, CompletionRequest::default());
}

#[test]
fn structs_are_read_from_objects_only() {
    for error in [
        serde_json::from_str::<CompletionRequest>(r#"["model", "prompt"]"#).unwrap_err(),
        serde_json::from_str::<CompletionRequest>(r#"{"stream_options": [true]}"#).unwrap_err(),
        serde_json::from_str::<ChatCompletionRequest>(r#"{"messages": [["user", "hello"]]}"#).unwrap_err(),
        serde_json::from_str::<ChatCompletionRequest>(r#"{"messages": [{"role": "user", "content": [["text"]]}]}"#)
            .unwrap_err(),
        serde_json::from_str::<TokenizeRequest>("[]").unwrap_err(),
        serde_json::from_str::<DetokenizeRequest>("[[1]]").unwrap_err(),
    ] {
        assert!(error.to_string().starts_with("invalid type: sequence, expected a"), "{error}");
    }
}

#[test]
fn logit_bias_keys_are_token_ids() {
    let parse = |value: Value| serde_json::from_value::<CompletionRequest>(json!({"logit_bias": value}));
    let biases = parse(json!({"5": 1, "7": -2.5})).unwrap().logit_bias.unwrap().0;
    assert_eq!(biases.into_iter().collect::<Vec<_>>(), [(5, 1.0), (7, -2.5)]);
    for key in ["hello", "-1", "1.5", "", "4294967296", "１"] {
        let error = parse(json!({key: 1})).unwrap_err().to_string();
        assert!(error.contains("is not a token id"), "{key}: {error}");
    }
    assert!(parse(json!({"1": "x"})).is_err());
    assert!(parse(json!([1, 2])).is_err());
}

#[test]
fn content_is_text_or_parts() {
    let request: ChatCompletionRequest = serde_json::from_value(json!({"messages": [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "tool", "tool_call_id": "1", "content": "c"},
        {"role": "function", "name": "f", "content": "d"},
    ]}))
    .unwrap();
    let part =
        |kind: &str, text: Option<&str>| ContentPart { kind: kind.into(), text: text.map(Into::into), refusal: None };
    assert_eq!(request.messages[0].role, Role::Developer);
    assert_eq!(
        request.messages[1].content,
        Some(ChatContent::Parts(vec![part("text", Some("b")), part("image_url", None)]))
    );
    assert_eq!(request.messages[2].content, None);
    assert_eq!(request.messages[2].tool_calls.as_ref().map(Vec::len), Some(1));
    let error = serde_json::from_value::<ChatCompletionRequest>(json!({"messages": [{"role": "robot"}]})).unwrap_err();
    assert!(error.to_string().contains("expected one of `system`, `developer`, `user`"), "{error}");
}

#[test]
fn refused_fields_are_seen_whatever_they_hold() {
    for value in [json!(1), json!(-1), json!(0.5), json!("x"), json!(true), json!([1, [2]]), json!({"a": {"b": null}})]
    {
        let request: CompletionRequest = serde_json::from_value(json!({"logits_processors": value})).unwrap();
        assert!(request.logits_processors.is_some(), "{value}");
    }
}

#[test]
fn wrong_types_are_errors() {
    for body in [
        json!({"max_tokens": 64.0}),
        json!({"max_tokens": "64"}),
        json!({"temperature": "hot"}),
        json!({"n": [1]}),
        json!({"stop": 1}),
        json!({"stop": [1]}),
        json!({"stream": "yes"}),
        json!({"stream": 1}),
        json!({"seed": 1e30}),
        json!({"stop_token_ids": [-1]}),
        json!({"echo": "true"}),
    ] {
        assert!(serde_json::from_value::<CompletionRequest>(body.clone()).is_err(), "{body}");
    }
}
