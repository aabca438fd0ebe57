//! What a server builds on: text in, text out. Prompts checked before anything is computed, answers cut at stop strings
//! and never inside a character, the best of several, echoes, and errors that name the wire field.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bindery_engine::{
    EngineError, FinishReason, Grammar, LocalModel, Prompt, SamplingParams, StopReason, TextEvent, TextRequest,
    TokenText,
    testing::{EOS, FakeModelOptions, VOCAB_SIZE, expected_logits, fake_local_model, gate, small_limits},
};
use bindery_scheduler::TokenId;

fn model() -> LocalModel {
    fake_local_model(small_limits(), FakeModelOptions::default()).unwrap()
}

fn text_prompt(text: &str) -> Prompt {
    Prompt::Text { text: text.to_owned(), add_special_tokens: true }
}

/// Greedy, of lower-case letters only, so that texts can be read.
fn request(prompt: &str, max_tokens: usize) -> TextRequest {
    let logit_bias: BTreeMap<TokenId, f32> = (b'a'..=b'z').map(|letter| (TokenId(u32::from(letter)), 50.0)).collect();
    TextRequest {
        params: SamplingParams { temperature: 0.0, logit_bias, ..SamplingParams::default() },
        max_tokens: Some(max_tokens),
        ..TextRequest::new(text_prompt(prompt))
    }
}

#[derive(Debug, Default, PartialEq)]
struct Answer {
    text: String,
    tokens: Vec<TokenText>,
    num_tokens: usize,
    num_deltas: usize,
    end: Option<(FinishReason, Option<StopReason>)>,
}

#[derive(Debug, Default)]
struct Collected {
    prompt: Option<(Vec<TokenText>, usize)>,
    answers: Vec<Answer>,
    error: Option<EngineError>,
}

async fn run(model: &LocalModel, request: TextRequest) -> Collected {
    let mut all = Collected::default();
    all.answers.resize_with(request.num_samples as usize, Answer::default);
    let mut stream = model.generate(request).await.unwrap();
    while let Some(event) = stream.next().await {
        match event {
            Ok(TextEvent::Prompt { tokens, num_tokens }) => {
                assert!(all.prompt.is_none() && all.answers.iter().all(|answer| answer.num_deltas == 0));
                assert_eq!(num_tokens, stream.num_prompt_tokens());
                all.prompt = Some((tokens, num_tokens));
            }
            Ok(TextEvent::Delta { sample, text, tokens, num_tokens }) => {
                let answer = &mut all.answers[sample as usize];
                assert!(answer.end.is_none(), "text after the end");
                answer.text.push_str(&text);
                answer.tokens.extend(tokens);
                answer.num_tokens += num_tokens;
                answer.num_deltas += 1;
            }
            Ok(TextEvent::Finished { sample, reason, stop_reason, num_tokens }) => {
                let answer = &mut all.answers[sample as usize];
                assert!(answer.end.is_none(), "two ends");
                assert_eq!(answer.num_tokens, num_tokens);
                answer.end = Some((reason, stop_reason));
            }
            Err(error) => all.error = Some(error),
        }
    }
    assert!(stream.next().await.is_none());
    all
}

async fn answer(model: &LocalModel, request: TextRequest) -> Answer {
    let mut all = run(model, request).await;
    assert!(all.error.is_none(), "{:?}", all.error);
    all.answers.remove(0)
}

async fn refusal(model: &LocalModel, request: TextRequest) -> EngineError {
    model.generate(request).await.unwrap_err()
}

/// The greedy answer by a plain loop over the double's logits.
fn naive_text(prompt: &str, num_tokens: usize) -> String {
    let mut history: Vec<u32> = prompt.bytes().map(u32::from).collect();
    let mut logits = vec![0.0; VOCAB_SIZE];
    for _ in 0..num_tokens {
        expected_logits(&history, 0.0, &mut logits);
        let letters = (b'a'..=b'z').map(u32::from);
        let best = letters.max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize])).unwrap();
        history.push(best);
    }
    history[prompt.len()..].iter().map(|&letter| char::from(letter as u8)).collect()
}

#[tokio::test]
async fn text_comes_back_token_by_token() {
    let model = model();
    let found = run(&model, request("Hello", 12)).await;
    assert_eq!(found.prompt, Some((Vec::new(), 5)));
    let answer = &found.answers[0];
    assert_eq!(answer.text, naive_text("Hello", 12));
    assert_eq!((answer.num_deltas, answer.num_tokens), (12, 12));
    assert_eq!(answer.end, Some((FinishReason::Length, None)));
    assert_eq!(answer.tokens.iter().map(|token| token.text.as_str()).collect::<String>(), answer.text);
    assert!(answer.tokens.iter().all(|token| token.logprob.is_none() && token.top.is_empty()));
    model.stop();
    model.stop();
}

#[tokio::test]
async fn stop_strings_are_found_across_tokens() {
    let model = model();
    let whole = naive_text("once", 30);
    let stop = whole[10..14].to_owned();
    let at = whole.find(&stop).unwrap();
    let with = |include| TextRequest {
        stop: vec!["0123".to_owned(), stop.clone()],
        include_stop_str_in_output: include,
        ..request("once", 30)
    };
    let end = Some((FinishReason::StopString, Some(StopReason::Text(stop.clone()))));
    let before = answer(&model, with(false)).await;
    assert_eq!((&before.text[..], before.num_tokens, &before.end), (&whole[..at], at + 4, &end));
    let including = answer(&model, with(true)).await;
    assert_eq!((&including.text[..], &including.end), (&whole[..at + 4], &end));
    // A stop string counts only after min_tokens.
    let mut late = with(false);
    late.params.min_tokens = at + 4;
    let late = answer(&model, late).await;
    assert_eq!((late.text, late.end), (whole.clone(), Some((FinishReason::Length, None))));
    // What was held back for a stop string that did not come is not lost.
    let open = TextRequest { stop: vec![format!("{}0", &whole[26..])], ..request("once", 30) };
    assert_eq!(answer(&model, open).await.text, whole);
    model.engine.idle().await;
    assert_eq!(model.engine.stats().num_used_blocks, 0);
}

#[tokio::test]
async fn end_and_stop_tokens_are_not_part_of_the_answer() {
    let model = fake_local_model(small_limits(), FakeModelOptions { eos_bias: 200.0, ..FakeModelOptions::default() });
    let model = model.unwrap();
    let mut min = request("x", 30);
    min.params.min_tokens = 4;
    let found = answer(&model, min.clone()).await;
    assert_eq!((found.text.len(), found.num_tokens, found.tokens.len()), (4, 5, 4));
    assert_eq!(found.end, Some((FinishReason::EndOfSequence, None)));
    // Included, a special token is a token of the answer, and part of its text unless that skips special tokens.
    let included = TextRequest { include_stop_str_in_output: true, ..min.clone() };
    let found = answer(&model, included.clone()).await;
    assert_eq!((found.text.len(), found.tokens.len()), (4, 5));
    assert_eq!(found.tokens[4].id, EOS);
    let shown = answer(&model, TextRequest { skip_special_tokens: false, ..included }).await;
    assert_eq!(&shown.text[4..], "<|endoftext|>");
    // A stop token of the request.
    let mut stopped = request("x", 30);
    stopped.params.ignore_eos = true;
    stopped.params.logit_bias.insert(TokenId(u32::from(b'q')), 100.0);
    stopped.params.stop_token_ids = vec![TokenId(u32::from(b'q'))];
    let found = answer(&self::model(), stopped).await;
    assert_eq!((found.text.as_str(), found.num_tokens), ("", 1));
    let q = TokenId(u32::from(b'q'));
    assert_eq!(found.end, Some((FinishReason::StopToken(q), Some(StopReason::Token(q)))));
}

#[tokio::test]
async fn characters_are_never_split() {
    // Continuation bytes only: each is invalid alone, and what comes out is valid text all the same.
    let model = model();
    let mut request = request("ü", 40);
    request.params.logit_bias = (0x80..0xf5).map(|byte| (TokenId(byte), 60.0)).collect();
    request.params.temperature = 1.0;
    request.params.seed = Some(3);
    let mut stream = model.generate(request).await.unwrap();
    let mut tokens = Vec::new();
    let mut text = String::new();
    while let Some(event) = stream.next().await {
        if let TextEvent::Delta { text: piece, tokens: new, .. } = event.unwrap() {
            text.push_str(&piece);
            tokens.extend(new.iter().map(|token| token.id));
        }
    }
    assert_eq!(text, model.tokenizer.decode(&tokens, true).unwrap());
}

#[tokio::test]
async fn logprobs_and_prompt_logprobs_come_with_their_text() {
    let model = model();
    let mut wanted = request("abc", 2);
    wanted.params.logprobs = Some(3);
    wanted.params.prompt_logprobs = Some(2);
    let found = run(&model, wanted.clone()).await;
    let (tokens, num_tokens) = found.prompt.unwrap();
    assert_eq!((tokens.len(), num_tokens), (3, 3));
    assert_eq!(tokens.iter().map(|token| token.text.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(tokens[0].logprob.is_none() && tokens[0].rank.is_none() && tokens[0].top.is_empty());
    assert!(tokens[1..].iter().all(|token| token.logprob.unwrap() < 0.0 && token.top.len() == 2));
    let answer = &found.answers[0];
    assert!(answer.tokens.iter().all(|token| token.top.len() == 3 && token.rank.unwrap() >= 1));
    assert!(answer.tokens.iter().all(|token| token.bytes == token.text.as_bytes()));
    let top = &answer.tokens[0].top;
    assert!(top[0].logprob >= top[1].logprob && top[1].logprob >= top[2].logprob);
    // Scored without generating.
    let found = run(&model, TextRequest { max_tokens: Some(0), num_samples: 2, ..wanted }).await;
    assert_eq!(found.prompt.unwrap().0, tokens);
    for answer in found.answers {
        assert_eq!((answer.num_tokens, answer.end), (0, Some((FinishReason::Length, None))));
    }
}

#[tokio::test]
async fn an_echo_without_anything_to_compute_takes_no_step() {
    let model = model();
    let mut stream = model.generate(request("Grüße", 0)).await.unwrap();
    assert_eq!(stream.prompt_text().unwrap(), "Grüße");
    let prompt = stream.next().await.unwrap().unwrap();
    assert_eq!(prompt, TextEvent::Prompt { tokens: Vec::new(), num_tokens: 7 });
    let end = stream.next().await.unwrap().unwrap();
    assert_eq!(end, TextEvent::Finished { sample: 0, reason: FinishReason::Length, stop_reason: None, num_tokens: 0 });
    assert!(stream.next().await.is_none());
    assert_eq!(model.engine.stats().num_steps, 0);
    let mut bad = request("x", 0);
    bad.params.temperature = 3.0;
    assert!(matches!(refusal(&model, bad).await, EngineError::Invalid { param: "temperature", .. }));
}

#[tokio::test]
async fn the_best_of_several_is_the_likeliest_a_token() {
    let model = model();
    let mut wanted = request("pick", 8);
    wanted.params.temperature = 2.0;
    wanted.params.seed = Some(42);
    wanted.params.logprobs = Some(0);
    wanted.num_samples = 6;
    let mut all = run(&model, wanted.clone()).await.answers;
    let mean = |answer: &Answer| {
        answer.tokens.iter().map(|token| f64::from(token.logprob.unwrap())).sum::<f64>() / answer.num_tokens as f64
    };
    all.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    wanted.num_samples = 2;
    wanted.best_of = Some(6);
    let best = run(&model, wanted.clone()).await.answers;
    for (best, expected) in best.iter().zip(&all) {
        assert_eq!((&best.text, &best.tokens, &best.end), (&expected.text, &expected.tokens, &expected.end));
    }
    wanted.params.logprobs = None;
    let mut stream = model.generate(wanted).await.unwrap();
    while let Some(event) = stream.next().await {
        if let TextEvent::Delta { sample, text, tokens, .. } = event.unwrap() {
            assert_eq!(text, all[sample as usize].text);
            assert!(tokens.iter().all(|token| token.logprob.is_none() && token.rank.is_none()));
        }
    }
    assert_eq!(stream.num_generated_tokens(), 48, "those not returned were generated, too");
}

#[tokio::test]
async fn prompts_are_checked_before_anything_is_computed() {
    let limits = small_limits();
    let model = model();
    let message = |error: EngineError| match error {
        EngineError::ContextLengthExceeded { message, param } => (param, message),
        other => panic!("{other:?}"),
    };
    // Exactly full is fine, one more is not.
    let full = TextRequest { max_tokens: None, ..request(&"a".repeat(limits.max_model_len - 3), 0) };
    assert_eq!(answer(&model, full).await.num_tokens, 3);
    let (param, text) = message(refusal(&model, request(&"a".repeat(500), 13)).await);
    assert_eq!(param, "prompt");
    assert!(text.starts_with(
        "This model's maximum context length is 512 tokens. However, you requested 513 tokens (500 in the prompt, 13 in \
         the completion)."
    ));
    let chat = TextRequest { prompt_param: "messages", ..request(&"a".repeat(500), usize::MAX) };
    let (param, text) = message(refusal(&model, chat).await);
    assert!(param == "messages" && text.contains("(500 in the messages, "), "{text}");
    let no_room = TextRequest { max_tokens: None, ..request(&"a".repeat(512), 0) };
    assert!(message(refusal(&model, no_room).await).1.contains("resulted in 512 tokens"));
    // Ten megabytes are refused by their length alone.
    let giant = "a".repeat(10 << 20);
    assert!(message(refusal(&model, request(&giant, 1)).await).1.contains("at least"));
    let tokens = TextRequest { prompt: Prompt::Tokens(vec![TokenId(1); 1 << 20]), ..request("", 1) };
    assert!(message(refusal(&model, tokens).await).1.contains("1048576"));

    for (bad, expected) in [
        (request("", 1), "prompt"),
        (TextRequest { prompt: Prompt::Tokens(Vec::new()), prompt_param: "messages", ..request("", 1) }, "messages"),
        (TextRequest { prompt: Prompt::Tokens(vec![TokenId(264)]), ..request("", 1) }, "prompt"),
        (TextRequest { truncate_prompt_tokens: Some(0), ..request("a", 1) }, "truncate_prompt_tokens"),
        (TextRequest { num_samples: 0, ..request("a", 1) }, "n"),
        (TextRequest { num_samples: 129, ..request("a", 1) }, "n"),
        (TextRequest { num_samples: 2, best_of: Some(1), ..request("a", 1) }, "best_of"),
        (TextRequest { best_of: Some(129), ..request("a", 1) }, "best_of"),
        (TextRequest { stop: vec!["x".to_owned(); 65], ..request("a", 1) }, "stop"),
        (TextRequest { stop: vec![String::new()], ..request("a", 1) }, "stop"),
        (TextRequest { stop: vec!["x".repeat(1025)], ..request("a", 1) }, "stop"),
        (TextRequest { stop: vec!["x".repeat(1000); 9], ..request("a", 1) }, "stop"),
    ] {
        match refusal(&model, bad).await {
            EngineError::Invalid { param, .. } => assert_eq!(param, expected),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(model.engine.num_unfinished(), 0);
}

/// Truncating does not buy a way round the bound on what is tokenised.
#[tokio::test]
async fn a_giant_prompt_is_not_tokenised_only_to_be_cut() {
    let model = fake_local_model(small_limits(), FakeModelOptions::default()).unwrap();
    let giant = "1".repeat(bindery_engine::local_model::MAX_TRUNCATED_BYTES + 1);
    let request = TextRequest { truncate_prompt_tokens: Some(4), ..request(&giant, 5) };
    match model.generate(request).await {
        Err(EngineError::Invalid { message, .. }) => assert!(message.contains("the limit is 1048576"), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_prompt_can_be_cut_to_its_last_tokens() {
    let model = model();
    let cut = TextRequest { truncate_prompt_tokens: Some(4), ..request("0123456789", 5) };
    let stream = model.generate(cut.clone()).await.unwrap();
    assert_eq!((stream.num_prompt_tokens(), stream.prompt_text().unwrap()), (4, "6789".to_owned()));
    drop(stream);
    assert_eq!(answer(&model, cut).await.text, naive_text("6789", 5));
    let long = TextRequest { truncate_prompt_tokens: Some(400), ..request(&"ab".repeat(5000), 5) };
    assert_eq!(answer(&model, long).await.text, naive_text(&"ab".repeat(200), 5));
    let short = TextRequest { truncate_prompt_tokens: Some(400), ..request("short", 5) };
    assert_eq!(answer(&model, short).await.text, naive_text("short", 5));
}

#[tokio::test]
async fn a_timeout_is_told_in_the_callers_words() {
    let (mask_gate, keeper) = gate();
    let options = FakeModelOptions { mask_gate: Some(mask_gate), ..FakeModelOptions::default() };
    let model = fake_local_model(small_limits(), options).unwrap();
    let already = TextRequest { timeout: Some(Duration::ZERO), ..request("a", 5) };
    assert!(matches!(refusal(&model, already).await, EngineError::DeadlineExceeded { timeout_ms: 0 }));
    // The answer stands still for lack of masks, and the engine itself waits for the deadline.
    let grammar = Grammar::Regex("[a-z]{100}".to_owned());
    let held = TextRequest {
        timeout: Some(Duration::from_millis(537)),
        grammar: Some((Arc::new(grammar), "structured_outputs")),
        ..request("a", 200)
    };
    let error = match model.generate(held).await {
        Ok(mut stream) => loop {
            match stream.next().await {
                Some(Err(error)) => break error,
                Some(Ok(_)) => {}
                None => panic!("an answer without masks came to its end"),
            }
        },
        // Where tokenising and compiling alone took longer.
        Err(error) => error,
    };
    assert!(matches!(error, EngineError::DeadlineExceeded { timeout_ms: 537 }), "{error:?}");
    drop(keeper);
    let forever = TextRequest { timeout: Some(Duration::MAX), ..request("a", 2) };
    assert!(model.generate(forever).await.is_ok());
}

#[tokio::test]
async fn timings_are_known_when_a_request_has_ended() {
    let model = model();
    let mut stream = model.generate(request("time", 5)).await.unwrap();
    assert_eq!(stream.timings(), bindery_engine::RequestTimings::default());
    while stream.next().await.is_some() {}
    let timings = stream.timings();
    assert!(timings.queue.is_some() && timings.prefill.is_some() && timings.decode.is_some());
}

#[tokio::test]
async fn a_model_without_a_template_says_so() {
    let error = model().render_chat(&bindery_engine::RenderRequest::default()).unwrap_err();
    assert!(error.to_string().contains("no chat template"), "{error}");
}
