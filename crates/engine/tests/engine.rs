//! What the engine promises, over a model that notices every wrong slot: same tokens alone, in a batch, preempted or
//! chunked; nothing held after the end; failures that stay where they happen; a shutdown that never hangs.
//!
//! Nothing sleeps: a gate in the model holds steps, and statistics are waited for.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use bindery_engine::{
    Engine, EngineConfig, EngineError, EngineHandle, EngineStats, FinishReason, SamplingParams, Share, TokenEvent,
    TokenLogprobs, TokenRequest, TokenStream,
    sample::{PreparedSampling, SampleState, Sampler},
    testing::{EOS, FakeModel, FakeModelOptions, GateKeeper, VOCAB_SIZE, expected_logits, gate, small_limits},
};
use bindery_model::RopeRegimes;
use bindery_scheduler::{Limits, TokenId};
use proptest::{prelude::*, test_runner::TestRng};

fn start(limits: &Limits, options: FakeModelOptions) -> (Engine, EngineHandle) {
    start_buffered(limits, options, 10_000)
}

fn start_buffered(limits: &Limits, options: FakeModelOptions, max_buffered_tokens: usize) -> (Engine, EngineHandle) {
    let model = FakeModel::new(limits.block_size, limits.num_blocks, options);
    let config =
        EngineConfig { limits: limits.clone(), eos_token_ids: vec![EOS], max_buffered_tokens, paces_prompts: false };
    Engine::start(Box::new(model), config).unwrap()
}

/// Steps wait at a gate. The keeper is last, so that it goes first: an engine whose step is held cannot be joined.
fn start_gated(limits: &Limits, options: FakeModelOptions) -> (Engine, EngineHandle, GateKeeper) {
    let (gate, keeper) = gate();
    let (engine, handle) = start(limits, FakeModelOptions { gate: Some(gate), ..options });
    (engine, handle, keeper)
}

fn request(prompt: Vec<TokenId>, params: SamplingParams) -> TokenRequest {
    TokenRequest {
        request_id: "test".to_owned(),
        prompt,
        params,
        grammar: None,
        adapter: None,
        num_samples: 1,
        priority: 0,
        share: Share::default(),
        deadline: None,
    }
}

/// A prompt of `length` tokens that differs from others by its `start`.
fn prompt(start: u32, length: usize) -> Vec<TokenId> {
    (0..length as u32).map(|index| TokenId((start * 31 + index * 7) % 200)).collect()
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() }
}

fn seeded(seed: u64, max_tokens: usize) -> SamplingParams {
    SamplingParams { seed: Some(seed), max_tokens, ..SamplingParams::default() }
}

/// What the model and the sampler give without engine, scheduler, cache or batch.
fn naive(prompt: &[TokenId], params: &SamplingParams, sample: u32) -> Vec<TokenId> {
    let prepared = PreparedSampling::new(params, prompt, &[EOS]);
    let mut state = SampleState::new(sample);
    let mut history: Vec<u32> = prompt.iter().map(|token| token.0).collect();
    let mut logits = vec![0.0; VOCAB_SIZE];
    let mut tokens = Vec::new();
    loop {
        expected_logits(&history, 0.0, &mut logits);
        let token = Sampler::default().sample(&logits, &prepared, &state, None).unwrap();
        tokens.push(token);
        history.push(token.0);
        if state.record(token, &prepared).is_some() {
            return tokens;
        }
    }
}

/// All that comes back, tokens by sample.
#[derive(Debug, Default)]
struct Collected {
    tokens: Vec<Vec<TokenId>>,
    finish: Vec<Option<FinishReason>>,
    logprobs: Vec<Option<TokenLogprobs>>,
    scores: Vec<Option<TokenLogprobs>>,
    num_score_events: usize,
    num_scheduled: usize,
    error: Option<EngineError>,
}

async fn collect(mut stream: TokenStream, num_samples: usize) -> Collected {
    let mut all =
        Collected { tokens: vec![Vec::new(); num_samples], finish: vec![None; num_samples], ..Collected::default() };
    while let Some(event) = stream.next().await {
        match event {
            Ok(TokenEvent::Scheduled) => all.num_scheduled += 1,
            Ok(TokenEvent::PromptLogprobs(scores)) => {
                all.num_score_events += 1;
                all.scores.extend(scores);
            }
            Ok(TokenEvent::Token { sample, token, logprobs, finish }) => {
                assert_eq!(all.finish[sample as usize], None, "a token after the end");
                all.tokens[sample as usize].push(token);
                all.finish[sample as usize] = finish;
                all.logprobs.push(logprobs);
            }
            Err(error) => all.error = Some(error),
        }
    }
    assert!(stream.next().await.is_none(), "the end is the end");
    all
}

async fn run(engine: &EngineHandle, request: TokenRequest) -> Collected {
    let num_samples = request.num_samples as usize;
    collect(engine.submit(request).await.unwrap(), num_samples).await
}

/// Everything has been given back.
async fn assert_idle(engine: &EngineHandle) -> EngineStats {
    engine.idle().await;
    let stats = engine.stats();
    assert_eq!((stats.num_requests_running, stats.num_requests_waiting), (0, 0));
    assert_eq!((stats.num_used_blocks, stats.num_unused_slots), (0, 0));
    assert_eq!(engine.num_unfinished(), 0);
    stats
}

#[tokio::test]
async fn tokens_are_those_of_the_naive_loop() {
    let (_engine, handle) = start(&small_limits(), FakeModelOptions::default());
    for (index, params) in [
        greedy(20),
        seeded(1, 20),
        SamplingParams { top_k: Some(5), ..seeded(2, 20) },
        SamplingParams { top_p: 0.5, min_p: 0.05, ..seeded(3, 20) },
        SamplingParams { repetition_penalty: 1.3, presence_penalty: 0.5, frequency_penalty: 0.7, ..greedy(40) },
        SamplingParams { min_tokens: 10, ignore_eos: true, stop_token_ids: vec![TokenId(17)], ..seeded(4, 50) },
    ]
    .into_iter()
    .enumerate()
    {
        let prompt = prompt(index as u32, 100);
        let found = run(&handle, request(prompt.clone(), params.clone())).await;
        assert_eq!(found.tokens[0], naive(&prompt, &params, 0));
        assert!(found.finish[0].is_some() && found.error.is_none() && found.num_scheduled == 1);
    }
    let stats = assert_idle(&handle).await;
    assert_eq!(stats.prompt_tokens, 600);
    assert_eq!(stats.iteration_tokens_counts.iter().sum::<u64>(), stats.num_steps);
    assert_eq!(stats.num_failed_steps, 0);
    // The double counts a row as an operation and a context as its bytes; each token came of a context of 100 at least.
    assert_eq!(stats.attention.operations, stats.iteration_tokens_sum);
    // Alone, each token came of one row of a step of its own; a prompt's first chunk had none.
    assert_eq!((stats.num_logit_rows, stats.num_logit_steps), (stats.generation_tokens, stats.generation_tokens));
    assert!(stats.num_logit_steps < stats.num_steps, "{stats:?}");
    assert!(stats.attention.read_bytes >= 100 * stats.generation_tokens, "{:?}", stats.attention);
    assert!(stats.phase_seconds.iter().all(|seconds| *seconds > 0.0), "{:?}", stats.phase_seconds);
}

/// 32 different requests at once, each of them like it is alone.
#[tokio::test]
async fn a_batch_of_32_gives_the_tokens_of_each_alone() {
    let requests: Vec<_> = (0..32_u32)
        .map(|index| {
            let params = if index % 2 == 0 { greedy(30) } else { seeded(u64::from(index), 30) };
            request(prompt(index, 1 + index as usize * 5), params)
        })
        .collect();
    let (_engine, handle, keeper) = start_gated(&small_limits(), FakeModelOptions::default());
    let mut streams = Vec::new();
    for request in &requests {
        streams.push(handle.submit(request.clone()).await.unwrap());
    }
    drop(keeper);
    for (request, stream) in requests.iter().zip(streams) {
        assert_eq!(collect(stream, 1).await.tokens[0], naive(&request.prompt, &request.params, 0));
    }
    let stats = assert_idle(&handle).await;
    assert!(stats.iteration_tokens_counts[3..].iter().sum::<u64>() > 10, "they did run together: {stats:?}");
}

#[tokio::test]
async fn preemption_changes_no_token() {
    let limits = Limits { num_blocks: 20, max_model_len: 80, ..small_limits() };
    let (_engine, handle, keeper) = start_gated(&limits, FakeModelOptions::default());
    let mut streams = Vec::new();
    for index in 0..10 {
        let params = SamplingParams { ignore_eos: true, frequency_penalty: 0.3, ..seeded(u64::from(index), 40) };
        let mut request = request(prompt(index, 15), params);
        request.num_samples = 1 + index % 3;
        streams.push((request.clone(), handle.submit(request).await.unwrap()));
    }
    drop(keeper);
    for (request, stream) in streams {
        let found = collect(stream, request.num_samples as usize).await;
        for sample in 0..request.num_samples {
            assert_eq!(found.tokens[sample as usize], naive(&request.prompt, &request.params, sample));
        }
    }
    let stats = assert_idle(&handle).await;
    assert!(stats.num_preemptions > 0, "the pool was meant to be too small");
    assert_eq!(stats.prompt_tokens, 150, "a prompt counts once");
}

/// The model refuses a row that reads keys of another regime than its request's; so what comes back was computed under one.
#[tokio::test]
async fn a_request_that_grows_into_another_rotary_regime_is_computed_again() {
    for regimes in [RopeRegimes::long_rope(32), RopeRegimes::dynamic(32)] {
        for max_num_batched_tokens in [8, 64] {
            let limits = Limits { max_num_batched_tokens, ..small_limits() };
            let batches = Arc::new(Mutex::new(Vec::new()));
            let (rope_regimes, noted) = (Some(regimes), Some(Arc::clone(&batches)));
            let options = FakeModelOptions { rope_regimes, batches: noted, ..FakeModelOptions::default() };
            let (_engine, handle, keeper) = start_gated(&limits, options);
            let mut streams = Vec::new();
            // Within the original length; across it while decoding; at it; beyond it from the start, in chunks.
            for (index, length) in [(0, 5), (1, 20), (2, 32), (3, 33), (4, 100)] {
                let params = SamplingParams { ignore_eos: true, ..seeded(u64::from(index), 25) };
                let request = TokenRequest { num_samples: 1 + index % 3, ..request(prompt(index, length), params) };
                streams.push((request.clone(), handle.submit(request).await.unwrap()));
            }
            drop(keeper);
            for (request, stream) in streams {
                let found = collect(stream, request.num_samples as usize).await;
                assert!(found.error.is_none(), "{regimes:?}: {:?}", found.error);
                for sample in 0..request.num_samples {
                    assert_eq!(found.tokens[sample as usize], naive(&request.prompt, &request.params, sample));
                }
            }
            assert_idle(&handle).await;
            let batches = batches.lock().unwrap();
            let sequences = || batches.iter().flat_map(|batch| &batch.sequences);
            let has = |rope_len, starts_at: usize| {
                sequences().any(|one| one.rope_len == rope_len && one.context_len - one.rows.len() == starts_at)
            };
            assert!(has(0, 0) && has(0, 31), "up to 32 tokens are computed as such");
            assert!(has(regimes.rope_len(20, 33), 0), "what crosses while decoding is computed again from its start");
            assert!(has(regimes.rope_len(100, 100), 0), "a long prompt's first chunk knows how long it is");
            // Under longrope once: the next tokens are computed one by one. Dynamic frequencies of so short a length change
            // with every token.
            let starts_at = if regimes == RopeRegimes::long_rope(32) { 33 } else { 0 };
            assert!(has(regimes.rope_len(20, 34), starts_at));
        }
    }
}

#[tokio::test]
async fn samples_have_streams_of_their_own() {
    let (_engine, handle) = start(&small_limits(), FakeModelOptions::default());
    let params = SamplingParams { ignore_eos: true, ..seeded(9, 25) };
    let prompt = prompt(3, 13);
    let found = run(&handle, TokenRequest { num_samples: 4, ..request(prompt.clone(), params.clone()) }).await;
    for sample in 0..4 {
        assert_eq!(found.tokens[sample as usize], naive(&prompt, &params, sample));
        for other in 0..sample {
            assert_ne!(found.tokens[sample as usize], found.tokens[other as usize]);
        }
    }
    let first_alone = run(&handle, request(prompt, params)).await;
    assert_eq!(first_alone.tokens[0], found.tokens[0]);
    assert_idle(&handle).await;
}

#[tokio::test]
async fn a_sample_can_end_early() {
    let (_engine, handle) = start(&small_limits(), FakeModelOptions::default());
    let params = SamplingParams { ignore_eos: true, ..seeded(5, 200) };
    let prompt = prompt(1, 9);
    let request = TokenRequest { num_samples: 3, ..request(prompt.clone(), params.clone()) };
    let mut stream = handle.submit(request).await.unwrap();
    let mut tokens = vec![Vec::new(); 3];
    while let Some(event) = stream.next().await {
        if let TokenEvent::Token { sample, token, .. } = event.unwrap() {
            tokens[sample as usize].push(token);
            if sample != 1 && tokens[sample as usize].len() == 4 {
                stream.abort_sample(sample);
                stream.abort_sample(sample);
            }
        }
    }
    for sample in 0..3 {
        let expected = naive(&prompt, &params, sample);
        let expected = if sample == 1 { &expected[..] } else { &expected[..4] };
        assert_eq!(tokens[sample as usize], expected);
    }
    assert_idle(&handle).await;
    stream.abort_sample(77);
}

#[tokio::test]
async fn prompt_logprobs_are_the_naive_ones() {
    let limits = Limits { max_model_len: 800, max_num_batched_tokens: 300, ..small_limits() };
    let (_engine, handle) = start(&limits, FakeModelOptions::default());
    let prompt = prompt(5, 700);
    let params = SamplingParams { prompt_logprobs: Some(3), logprobs: Some(2), ..greedy(3) };
    let found = run(&handle, request(prompt.clone(), params)).await;
    assert_eq!(found.scores.len(), prompt.len());
    assert!(found.num_score_events >= 5, "the first token, and three chunks of which two have two slices");
    let history: Vec<u32> = prompt.iter().map(|token| token.0).collect();
    let score = |history: &[u32], token: TokenId, num_top: usize| {
        let mut logits = vec![0.0; VOCAB_SIZE];
        expected_logits(history, 0.0, &mut logits);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let logprob = |id: usize| f64::from(logits[id]) - sum.ln();
        let mut order: Vec<usize> = (0..VOCAB_SIZE).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let top: Vec<_> = order[..num_top].iter().map(|&id| (TokenId(id as u32), logprob(id))).collect();
        let rank = 1 + order.iter().filter(|&&id| logits[id] > logits[token.0 as usize]).count();
        (logprob(token.0 as usize), rank as u32, top)
    };
    let check = |found: &TokenLogprobs, (logprob, rank, top): (f64, u32, Vec<(TokenId, f64)>)| {
        assert!((f64::from(found.logprob) - logprob).abs() < 1e-4);
        assert_eq!(found.rank, rank);
        assert_eq!(found.top.len(), top.len());
        for (found, expected) in found.top.iter().zip(top) {
            assert_eq!(found.0, expected.0);
            assert!((f64::from(found.1) - expected.1).abs() < 1e-4);
        }
    };
    assert_eq!(found.scores[0], None);
    for index in 1..prompt.len() {
        check(found.scores[index].as_ref().unwrap(), score(&history[..index], prompt[index], 3));
    }
    let mut history = history;
    for (token, logprobs) in found.tokens[0].iter().zip(&found.logprobs) {
        check(logprobs.as_ref().unwrap(), score(&history, *token, 2));
        history.push(token.0);
    }
    assert_idle(&handle).await;
}

/// A prompt can be scored without generating, of one token, for several samples, and while blocks are scarce.
#[tokio::test]
async fn a_prompt_can_be_scored_alone() {
    let limits = Limits { num_blocks: 20, max_model_len: 80, ..small_limits() };
    let (_engine, handle) = start(&limits, FakeModelOptions::default());
    let params = SamplingParams { prompt_logprobs: Some(0), max_tokens: 0, ..SamplingParams::default() };
    for (length, num_samples) in [(1, 1), (2, 1), (70, 1), (80, 3)] {
        let found = run(&handle, TokenRequest { num_samples, ..request(prompt(1, length), params.clone()) }).await;
        assert!(found.error.is_none(), "{:?}", found.error);
        assert_eq!(found.scores.len(), length);
        assert_eq!(found.scores.iter().filter(|score| score.is_none()).count(), 1);
        assert!(found.tokens.iter().all(Vec::is_empty));
    }
    // Held until all are there: one after the other they would have room.
    let (_engine, handle, keeper) = start_gated(&limits, FakeModelOptions::default());
    let mut streams = Vec::new();
    for index in 0..8 {
        let params = SamplingParams { prompt_logprobs: Some(1), ignore_eos: true, ..seeded(1, 40) };
        streams.push(handle.submit(request(prompt(index, 30), params)).await.unwrap());
    }
    drop(keeper);
    for stream in streams {
        let found = collect(stream, 1).await;
        assert_eq!((found.scores.len(), found.tokens[0].len()), (30, 40));
    }
    assert!(assert_idle(&handle).await.num_preemptions > 0);
}

/// Held at the gate, a step with two requests; a third waits for a seat. The step fails, the third goes on.
async fn check_failing_step(options: FakeModelOptions, message: &str) {
    let limits = Limits { max_num_seqs: 2, ..small_limits() };
    let (_engine, handle, keeper) = start_gated(&limits, options);
    let first = handle.submit(request(prompt(0, 3), greedy(10))).await.unwrap();
    keeper.wait_for_step();
    let bad = handle.submit(request(vec![TokenId(1), TokenId(250)], greedy(10))).await.unwrap();
    let third = handle.submit(request(prompt(2, 3), greedy(10))).await.unwrap();
    drop(keeper);
    let (first, bad, third) = (collect(first, 1).await, collect(bad, 1).await, collect(third, 1).await);
    assert_eq!(first.tokens[0], naive(&prompt(0, 3), &greedy(10), 0)[..1], "it had one token before");
    for failed in [first, bad] {
        match failed.error {
            Some(EngineError::Step { message: found }) => assert!(found.contains(message), "{found}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(third.tokens[0], naive(&prompt(2, 3), &greedy(10), 0));
    assert!(third.error.is_none());
    assert_eq!(assert_idle(&handle).await.num_failed_steps, 1);
    assert_eq!(run(&handle, request(prompt(4, 3), greedy(5))).await.tokens[0], naive(&prompt(4, 3), &greedy(5), 0));
}

#[tokio::test]
async fn a_failing_step_fails_its_requests_and_no_other() {
    let options = FakeModelOptions { fail_on: Some(TokenId(250)), ..FakeModelOptions::default() };
    check_failing_step(options, "the fake model was told to fail").await;
}

#[tokio::test]
async fn a_panic_in_a_step_fails_its_requests_and_no_other() {
    let options = FakeModelOptions { panic_on: Some(TokenId(250)), ..FakeModelOptions::default() };
    check_failing_step(options, "panicked: the fake model was told to panic").await;
}

#[tokio::test]
async fn logits_that_are_not_numbers_fail_their_request_alone() {
    let options = FakeModelOptions { nan_on: Some(TokenId(250)), ..FakeModelOptions::default() };
    let (_engine, handle, keeper) = start_gated(&small_limits(), options);
    let mut streams = Vec::new();
    let bad = [TokenId(1), TokenId(250)].to_vec();
    let scored = SamplingParams { prompt_logprobs: Some(1), ..greedy(10) };
    for (prompt, params) in
        [(prompt(0, 3), greedy(10)), (bad.clone(), greedy(10)), (bad, scored), (prompt(1, 3), greedy(10))]
    {
        let mut request = request(prompt, params);
        request.num_samples = 2;
        streams.push((request.clone(), handle.submit(request).await.unwrap()));
    }
    drop(keeper);
    for (index, (request, stream)) in streams.into_iter().enumerate() {
        let found = collect(stream, 2).await;
        if index == 0 || index == 3 {
            assert_eq!(found.tokens[1], naive(&request.prompt, &request.params, 1));
            assert!(found.error.is_none());
        } else {
            let error = found.error.unwrap().to_string();
            assert!(error.contains("not finite numbers"), "{error}");
        }
    }
    assert_eq!(assert_idle(&handle).await.num_failed_steps, 0);
}

/// One sample of a request ends in the very step in which another fails: the request is told, the others go on.
#[tokio::test]
async fn a_sample_that_ends_as_its_sibling_fails_costs_nobody_else() {
    let prompt_of_both = prompt(4, 3);
    let params = SamplingParams { ignore_eos: true, ..seeded(11, 2) };
    let first_of = |sample| naive(&prompt_of_both, &params, sample)[0];
    assert_ne!(first_of(0), first_of(1), "the test wants rows that differ");
    let options = FakeModelOptions { nan_on: Some(first_of(1)), ..FakeModelOptions::default() };
    let (_engine, handle, keeper) = start_gated(&small_limits(), options);
    let bystander = request(prompt(5, 3), greedy(20));
    assert!(!naive(&bystander.prompt, &bystander.params, 0).contains(&first_of(1)), "the test wants a healthy one");
    let both = TokenRequest { num_samples: 2, ..request(prompt_of_both.clone(), params.clone()) };
    let (both, bystander_stream) =
        (handle.submit(both).await.unwrap(), handle.submit(bystander.clone()).await.unwrap());
    drop(keeper);
    let error = collect(both, 2).await.error.unwrap().to_string();
    assert!(error.contains("not finite numbers"), "{error}");
    let found = collect(bystander_stream, 1).await;
    assert!(found.error.is_none(), "{:?}", found.error);
    assert_eq!(found.tokens[0], naive(&bystander.prompt, &bystander.params, 0));
    assert_eq!(assert_idle(&handle).await.num_failed_steps, 0);
}

#[tokio::test]
async fn a_deadline_ends_a_request_in_any_state() {
    let limits = Limits { max_num_seqs: 1, ..small_limits() };
    let (_engine, handle, keeper) = start_gated(&limits, FakeModelOptions::default());
    // Long enough for the first to be in a step before, on any machine.
    let deadline = Instant::now() + Duration::from_secs(2);
    let with_deadline = |start| TokenRequest { deadline: Some(deadline), ..request(prompt(start, 5), greedy(400)) };
    let running = handle.submit(with_deadline(1)).await.unwrap();
    keeper.wait_for_step();
    let waiting = handle.submit(with_deadline(2)).await.unwrap();
    let patient = handle.submit(request(prompt(3, 5), greedy(5))).await.unwrap();
    tokio::time::sleep_until(deadline.into()).await;
    drop(keeper);
    for stream in [running, waiting] {
        let found = collect(stream, 1).await;
        assert!(
            matches!(found.error, Some(EngineError::DeadlineExceeded { timeout_ms }) if timeout_ms <= 2000),
            "{found:?}"
        );
        assert!(found.tokens[0].len() <= 1);
    }
    assert_eq!(collect(patient, 1).await.tokens[0].len(), 5);
    assert_idle(&handle).await;
}

#[tokio::test]
async fn prompt_tokens_are_pending_from_their_submission_until_they_are_computed() {
    let limits = Limits { max_num_batched_tokens: 16, ..small_limits() };
    let (_engine, handle, keeper) = start_gated(&limits, FakeModelOptions::default());
    assert_eq!(handle.num_pending_prompt_tokens(), 0);
    let first = handle.submit(request(prompt(0, 40), greedy(1))).await.unwrap();
    keeper.wait_for_step();
    let second = handle.submit(request(prompt(50, 10), greedy(1))).await.unwrap();
    assert_eq!(handle.num_pending_prompt_tokens(), 50, "no step has ended, and the second is only on its way");
    keeper.let_go();
    keeper.wait_for_step();
    assert_eq!(handle.num_pending_prompt_tokens(), 34, "sixteen of the first are computed");
    drop(second);
    keeper.let_go();
    keeper.wait_for_step();
    assert_eq!(handle.num_pending_prompt_tokens(), 8);
    drop(keeper);
    assert!(collect(first, 1).await.error.is_none());
    assert_idle(&handle).await;
    assert_eq!(handle.num_pending_prompt_tokens(), 0);
}

#[tokio::test]
async fn a_first_token_is_predicted_from_what_steps_cost_and_what_stands_before_it() {
    let limits = Limits { max_num_batched_tokens: 16, ..small_limits() };
    let (_engine, handle, keeper) = start_gated(&limits, FakeModelOptions::default());
    assert_eq!(handle.predicted_ttft(10), None, "nothing was computed");
    let first = handle.submit(request(prompt(0, 40), greedy(1))).await.unwrap();
    keeper.wait_for_step();
    keeper.let_go();
    keeper.wait_for_step();
    let stats = handle.stats();
    let cost = stats.step_cost.unwrap();
    assert_eq!((stats.num_steps, stats.num_decoding), (1, 0));
    // Twenty-four of the first prompt are left, in two steps, and its own ten in one.
    let predicted = handle.predicted_ttft(10).unwrap().as_secs_f64();
    let wanted = cost.prompt_seconds(24, 0, 16) + cost.prompt_seconds(10, 0, 16);
    assert!((predicted / wanted - 1.0).abs() < 1e-3, "{predicted} for {wanted}");
    drop(keeper);
    assert!(collect(first, 1).await.error.is_none());
    assert_idle(&handle).await;
    let decoding = SamplingParams { ignore_eos: true, ..greedy(400) };
    let _two = [
        handle.submit(request(prompt(1, 4), decoding.clone())).await,
        handle.submit(request(prompt(2, 4), decoding)).await,
    ];
    let stats = handle.stats_when(|stats| stats.num_decoding == 2).await;
    assert!(stats.step_cost.unwrap().per_token > 0.0);
}

#[tokio::test]
async fn a_long_prompt_leaves_streams_half_of_the_time() {
    for paces_prompts in [false, true] {
        let limits = Limits { max_num_batched_tokens: 64, ..small_limits() };
        let batches = Arc::new(Mutex::new(Vec::new()));
        // A prompt of 125 tokens is long then.
        let token_time = Duration::from_millis(2);
        let options =
            FakeModelOptions { token_time, batches: Some(Arc::clone(&batches)), ..FakeModelOptions::default() };
        let model = FakeModel::new(limits.block_size, limits.num_blocks, options);
        let config = EngineConfig { limits, eos_token_ids: vec![EOS], max_buffered_tokens: 1000, paces_prompts };
        let (_engine, handle) = Engine::start(Box::new(model), config).unwrap();
        let endless = SamplingParams { ignore_eos: true, ..greedy(400) };
        let stream = handle.submit(request(prompt(1, 4), endless)).await.unwrap();
        handle.stats_when(|stats| stats.num_steps > 10).await;
        let long = handle.submit(request(prompt(2, 250), greedy(1))).await.unwrap();
        assert!(collect(long, 1).await.error.is_none());
        drop(stream);
        let batches = batches.lock().unwrap();
        let both = batches.iter().filter(|batch| batch.sequences.len() == 2);
        let of_long: Vec<usize> = both.map(|batch| batch.tokens.len() - 1).collect();
        assert_eq!(of_long.iter().sum::<usize>(), 250);
        if paces_prompts {
            // Two or three tokens of it beside one of the stream, until what is left is short.
            assert!(of_long.len() > 12, "{of_long:?}");
            assert!(of_long.iter().rev().take(2).sum::<usize>() > 20, "its end came at once: {of_long:?}");
        } else {
            assert_eq!(of_long, [63, 63, 63, 61]);
        }
    }
}

/// The refusal comes while a step is held, so it did not wait for it.
#[tokio::test]
async fn a_full_queue_refuses_at_once_and_has_room_again_later() {
    let limits = Limits { max_num_seqs: 1, max_queued_requests: 2, ..small_limits() };
    let (_engine, handle, keeper) = start_gated(&limits, FakeModelOptions::default());
    let running = handle.submit(request(prompt(0, 5), greedy(5))).await.unwrap();
    keeper.wait_for_step();
    let waiting = handle.submit(request(prompt(1, 5), greedy(5))).await.unwrap();
    let given_up = handle.submit(request(prompt(2, 5), greedy(5))).await.unwrap();
    match handle.submit(request(prompt(3, 5), greedy(5))).await {
        Err(EngineError::QueueFull { num_asked: 1, num_queued: 2, max_queued: 2, retry_after }) => {
            assert!((1..=60).contains(&retry_after.as_secs()));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(handle.num_unfinished(), 3);
    drop(given_up);
    drop(keeper);
    assert!(collect(running, 1).await.error.is_none());
    assert!(collect(waiting, 1).await.error.is_none());
    assert!(run(&handle, request(prompt(3, 5), greedy(5))).await.error.is_none());
    assert_idle(&handle).await;
}

#[tokio::test]
async fn a_dropped_stream_frees_its_blocks_before_the_next_step() {
    let batches = Arc::new(Mutex::new(Vec::new()));
    let options = FakeModelOptions { batches: Some(Arc::clone(&batches)), ..FakeModelOptions::default() };
    let (_engine, handle, keeper) = start_gated(&small_limits(), options);
    let dropped = handle.submit(request(prompt(0, 20), greedy(400))).await.unwrap();
    keeper.wait_for_step();
    let kept = handle.submit(request(prompt(1, 4), SamplingParams { ignore_eos: true, ..greedy(3) })).await.unwrap();
    keeper.let_go();
    keeper.wait_for_step();
    assert_eq!(batches.lock().unwrap().last().unwrap().sequences.len(), 2, "both are in this step");
    drop(dropped);
    keeper.let_go();
    keeper.wait_for_step();
    let batch = batches.lock().unwrap().last().unwrap().clone();
    assert_eq!(batch.sequences.len(), 1);
    keeper.let_go();
    let stats = handle.stats_when(|stats| stats.num_steps == 3).await;
    assert_eq!((stats.num_used_blocks, stats.num_requests_running), (2, 1), "only what the other one holds: {stats:?}");
    drop(keeper);
    assert_eq!(collect(kept, 1).await.tokens[0].len(), 3);
    assert_idle(&handle).await;
}

#[tokio::test]
async fn a_slow_reader_loses_its_request_and_nobody_else_waits() {
    let (_engine, handle) = start_buffered(&small_limits(), FakeModelOptions::default(), 10);
    let endless = || SamplingParams { ignore_eos: true, ..greedy(300) };
    let slow = handle.submit(request(prompt(0, 5), endless())).await.unwrap();
    let slow_samples =
        handle.submit(TokenRequest { num_samples: 4, ..request(prompt(1, 5), endless()) }).await.unwrap();
    // Neither is read; both end nevertheless.
    assert_idle(&handle).await;
    let found = collect(slow, 1).await;
    assert_eq!(found.tokens[0], naive(&prompt(0, 5), &endless(), 0)[..10]);
    assert!(matches!(found.error, Some(EngineError::SlowReader { buffered: 10 })));
    let found = collect(slow_samples, 4).await;
    assert_eq!(found.tokens.iter().map(Vec::len).sum::<usize>(), 40);
    assert!(matches!(found.error, Some(EngineError::SlowReader { buffered: 40 })));
    // A prompt's scores are bounded by the prompt and do not count.
    let params = SamplingParams { prompt_logprobs: Some(1), ..greedy(1) };
    let scored = handle.submit(request(prompt(0, 400), params)).await.unwrap();
    assert_idle(&handle).await;
    assert!(collect(scored, 1).await.error.is_none());
}

#[tokio::test]
async fn draining_lets_the_running_finish_and_refuses_the_rest() {
    let (_engine, handle, keeper) = start_gated(&small_limits(), FakeModelOptions::default());
    let running = handle.submit(request(prompt(0, 5), greedy(20))).await.unwrap();
    handle.drain();
    assert!(handle.is_draining());
    let refused = handle.submit(request(prompt(1, 5), greedy(20))).await;
    assert!(matches!(refused, Err(EngineError::ShuttingDown)));
    drop(keeper);
    assert_eq!(collect(running, 1).await.tokens[0], naive(&prompt(0, 5), &greedy(20), 0));
    assert_idle(&handle).await;
}

#[tokio::test]
async fn stopping_ends_everything_and_never_hangs() {
    // Answers so long that none ends by itself between the gate and the command to stop.
    let limits = Limits { max_num_seqs: 2, num_blocks: 4096, max_model_len: 8192, ..small_limits() };
    for num_requests in [0_u32, 1, 5] {
        let (engine, handle, keeper) = start_gated(&limits, FakeModelOptions::default());
        let mut streams = Vec::new();
        for index in 0..num_requests {
            let params = SamplingParams { ignore_eos: true, ..greedy(8000) };
            streams.push(handle.submit(request(prompt(index, 5), params)).await.unwrap());
        }
        if num_requests > 0 {
            keeper.wait_for_step();
        }
        // It joins the thread, so it waits for the step at the gate, which opens when stopping has begun.
        let stopping = thread::spawn(move || engine.stop());
        let begun = async {
            while !handle.is_draining() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), begun).await.expect("stopping begins");
        drop(keeper);
        for stream in streams {
            assert!(matches!(collect(stream, 1).await.error, Some(EngineError::ShuttingDown)));
        }
        stopping.join().unwrap();
        let refused = handle.submit(request(prompt(1, 5), greedy(20))).await;
        assert!(matches!(refused, Err(EngineError::ShuttingDown)));
        assert_eq!(handle.num_unfinished(), 0);
        assert_eq!(handle.stats().num_used_blocks, 0);
    }
}

#[tokio::test]
async fn requests_that_cannot_be_are_refused_at_the_door() {
    let limits = Limits { num_blocks: 10, max_model_len: 100, ..small_limits() };
    let (_engine, handle) = start(&limits, FakeModelOptions::default());
    let refusal = async |request: TokenRequest| handle.submit(request).await.unwrap_err();
    let param = |error: EngineError| match error {
        EngineError::Invalid { param, .. } => param,
        other => panic!("{other:?}"),
    };
    assert_eq!(param(refusal(request(Vec::new(), greedy(1))).await), "prompt");
    assert_eq!(param(refusal(request(vec![TokenId(VOCAB_SIZE as u32)], greedy(1))).await), "prompt");
    assert_eq!(param(refusal(request(vec![TokenId(u32::MAX)], greedy(1))).await), "prompt");
    for num_samples in [0, 129, u32::MAX] {
        assert_eq!(param(refusal(TokenRequest { num_samples, ..request(prompt(0, 3), greedy(1)) }).await), "n");
    }
    assert_eq!(param(refusal(request(prompt(0, 3), greedy(0))).await), "max_tokens");
    let too_long = refusal(request(prompt(0, 3), greedy(98))).await;
    assert!(matches!(too_long, EngineError::ContextLengthExceeded { .. }) && too_long.to_string().contains("101"));
    assert!(matches!(
        refusal(request(prompt(0, 3), greedy(usize::MAX))).await,
        EngineError::ContextLengthExceeded { .. }
    ));
    let never_fits = refusal(request(prompt(0, 3), greedy(40))).await;
    assert!(never_fits.to_string().contains("11 blocks"), "{never_fits}");
    assert!(never_fits.to_string().contains("40 tokens"), "{never_fits}");
    assert_eq!(handle.num_unfinished(), 0);
    assert_eq!(handle.stats().num_steps, 0);
}

#[test]
fn limits_of_zero_do_not_start() {
    let model = || Box::new(FakeModel::new(4, 4, FakeModelOptions::default()));
    let config =
        |limits| EngineConfig { limits, eos_token_ids: Vec::new(), max_buffered_tokens: 1, paces_prompts: false };
    for limits in [
        Limits { block_size: 0, ..small_limits() },
        Limits { num_blocks: 0, ..small_limits() },
        Limits { max_num_seqs: 0, ..small_limits() },
        Limits { max_queued_requests: 0, ..small_limits() },
    ] {
        assert!(matches!(Engine::start(model(), config(limits)), Err(EngineError::Invalid { .. })));
    }
}

/// One client of the churn below.
#[derive(Clone, Debug)]
struct Client {
    prompt_len: usize,
    max_tokens: usize,
    num_samples: u32,
    end: End,
}

#[derive(Clone, Copy, Debug)]
enum End {
    ReadAll,
    DropAfter(usize),
    NeverRead,
    AbortSample(usize),
    Deadline,
    BadToken,
}

fn client() -> impl Strategy<Value = Client> {
    let end = prop_oneof![
        4 => Just(End::ReadAll),
        3 => (0_usize..20).prop_map(End::DropAfter),
        1 => Just(End::NeverRead),
        2 => (1_usize..10).prop_map(End::AbortSample),
        1 => Just(End::Deadline),
        1 => Just(End::BadToken),
    ];
    (1_usize..60, 1_usize..40, 1_u32..5, end).prop_map(|(prompt_len, max_tokens, num_samples, end)| Client {
        prompt_len,
        max_tokens,
        num_samples,
        end,
    })
}

async fn run_client(handle: EngineHandle, index: u32, client: Client) {
    let params = SamplingParams { ignore_eos: true, ..seeded(u64::from(index), client.max_tokens) };
    let mut request = request(prompt(index, client.prompt_len), params);
    request.num_samples = client.num_samples;
    match client.end {
        End::Deadline => request.deadline = Some(Instant::now() + Duration::from_millis(1)),
        End::BadToken => request.prompt.push(TokenId(250)),
        _ => {}
    }
    let original = request.clone();
    let mut stream = loop {
        match handle.submit(request.clone()).await {
            Ok(stream) => break stream,
            Err(EngineError::QueueFull { .. }) => tokio::task::yield_now().await,
            Err(other) => panic!("{other:?}"),
        }
    };
    match client.end {
        End::ReadAll => {
            let found = collect(stream, client.num_samples as usize).await;
            if found.error.is_none() {
                for sample in 0..client.num_samples {
                    assert_eq!(found.tokens[sample as usize], naive(&original.prompt, &original.params, sample));
                }
            }
        }
        End::DropAfter(num_events) => {
            for _ in 0..num_events {
                if stream.next().await.is_none() {
                    break;
                }
            }
        }
        End::NeverRead => {
            handle.stats_when(|stats| stats.num_requests_running == 0).await;
        }
        End::AbortSample(num_events) => {
            for _ in 0..num_events {
                stream.next().await;
            }
            stream.abort_sample(0);
            while stream.next().await.is_some() {}
        }
        End::Deadline | End::BadToken => while stream.next().await.is_some() {},
    }
}

/// Clients that read, leave, stall, time out and fail, over a pool too small for them: whatever they do, those that
/// read on get the right tokens, and at the end nothing is held.
#[test]
fn churn_leaves_nothing_behind() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        ProptestConfig::with_cases(if std::env::var_os("BINDERY_TEST_FULL").is_some() { 1_000 } else { 24 }),
        TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let clients = prop::collection::vec(client(), 1..40);
    runner
        .run(&clients, |clients| {
            let limits = Limits {
                num_blocks: 60,
                max_model_len: 120,
                max_num_seqs: 12,
                max_num_batched_tokens: 40,
                max_queued_requests: 8,
                ..small_limits()
            };
            let options = FakeModelOptions { fail_on: Some(TokenId(250)), ..FakeModelOptions::default() };
            let (engine, handle) = start_buffered(&limits, options, 15);
            runtime.block_on(async {
                let tasks: Vec<_> = (0..)
                    .zip(clients)
                    .map(|(index, client)| tokio::spawn(run_client(handle.clone(), index, client)))
                    .collect();
                for task in tasks {
                    task.await.unwrap();
                }
                assert_idle(&handle).await;
            });
            engine.stop();
            Ok(())
        })
        .unwrap();
}
