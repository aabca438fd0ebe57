//! The door against doubles on loopback that are slow, dead, overloaded, broken or endless.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::oneshot,
};

use super::*;
use crate::providers::{
    Call, ChatRequest, Credential, Endpoint, ModelEntry, Outgoing, Provider, Secret, UnmappedFields, UpstreamError,
    Usage,
    error::{Cause, Spent},
};

/// Long enough that only a test that waits for it by intent meets it.
const LONG: Duration = Duration::from_mins(1);
const SHORT: Duration = Duration::from_millis(50);

fn limits() -> Limits {
    Limits {
        connect: LONG,
        first_byte: LONG,
        idle: LONG,
        max_answer_bytes: 4096,
        max_error_bytes: 512,
        max_event_bytes: 1024,
        retry: RetryLimits {
            max_attempts: 3,
            first_wait: Duration::from_millis(1),
            max_wait: Duration::from_millis(2),
            max_retry_after: Duration::from_secs(1),
        },
    }
}

fn upstream(max_failures: u32) -> Upstream {
    Upstream::new("double", BreakerLimits { max_failures, open_for: LONG, max_open_for: LONG })
}

/// A server that answers its requests by their number, from 0.
struct Double {
    base: String,
    hits: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Double {
    async fn answering(answer: impl Fn(usize) -> Response + Clone + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}/v1", listener.local_addr().unwrap());
        let (hits, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (counter, noted) = (Arc::clone(&hits), Arc::clone(&seen));
        let router = Router::new().fallback(move |request: Request| {
            let (answer, counter, noted) = (answer.clone(), Arc::clone(&counter), Arc::clone(&noted));
            async move {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
                assert_eq!(parts.headers["content-length"], body.len().to_string(), "some servers take no chunks");
                let key = parts.headers["authorization"].to_str().unwrap().to_owned();
                noted.lock().unwrap().push((key, serde_json::from_slice(&body).unwrap()));
                answer(counter.fetch_add(1, Ordering::SeqCst))
            }
        });
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { base, hits, seen }
    }

    fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }
}

#[derive(Clone, Copy)]
enum Wanted {
    Whole,
    Stream,
}

fn outgoing(base: &str, wanted: Wanted) -> Outgoing {
    let endpoint =
        Endpoint::new(&Provider::Compatible, Some(base), Credential::Key(Secret::new("hunter2hunter2"))).unwrap();
    let model = ModelEntry::open("llama");
    let call = Call {
        endpoint: &endpoint,
        model: &model,
        max_output_tokens: None,
        max_prompt_tokens: 100,
        fields: UnmappedFields::Drop,
        at: chrono::Utc::now(),
    };
    let stream = matches!(wanted, Wanted::Stream);
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream});
    let Value::Object(body) = body else { panic!() };
    Provider::Compatible.chat(&call, &ChatRequest::read(body).unwrap()).unwrap()
}

async fn send(limits: Limits, upstream: &Upstream, outgoing: Outgoing) -> Result<Received, UpstreamError> {
    let permit = PrivacyClass::LocalFirst.leave().unwrap();
    Door::new(limits).unwrap().send(permit, upstream, outgoing, (&Departure::default(), LONG)).await
}

fn answer() -> Value {
    json!({"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
}

fn json_response(status: u16, body: &Value) -> Response {
    (StatusCode::from_u16(status).unwrap(), [("content-type", "application/json")], body.to_string()).into_response()
}

fn event(content: &str) -> String {
    format!(
        "data: {}\n\n",
        json!({"id": "x", "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": null}]})
    )
}

fn last_events() -> String {
    let finish = json!({"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]});
    let usage = json!({"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}});
    format!("data: {finish}\n\ndata: {usage}\n\ndata: [DONE]\n\n")
}

fn events(body: impl Into<Body>) -> Response {
    ([("content-type", "text/event-stream; charset=utf-8")], body.into()).into_response()
}

/// Everything a stream gives: the text, whether a finish reason came, and the error at its end.
async fn drain(received: Received) -> (String, bool, Option<UpstreamError>, AnswerStream) {
    let Received::Stream(mut stream) = received else { panic!("a stream") };
    let (mut text, mut has_finished) = (String::new(), false);
    while let Some(item) = stream.next().await {
        match item {
            Ok(chunk) => {
                for choice in chunk.choices {
                    text.push_str(choice.delta.content.as_deref().unwrap_or_default());
                    has_finished |= choice.finish.is_some();
                }
            }
            Err(error) => {
                assert!(stream.next().await.is_none(), "something after an error");
                return (text, has_finished, Some(error), *stream);
            }
        }
    }
    (text, has_finished, None, *stream)
}

#[tokio::test]
async fn a_whole_answer_comes_back() {
    let double = Double::answering(|_| json_response(200, &answer())).await;
    let received = send(limits(), &upstream(1), outgoing(&double.base, Wanted::Whole)).await.unwrap();
    let Received::Whole(answer) = received else { panic!("whole") };
    assert_eq!(answer.choices[0].message.content.as_deref(), Some("hello"));
    let seen = double.seen.lock().unwrap();
    assert_eq!(seen[0].0, "Bearer hunter2hunter2");
    assert_eq!(seen[0].1["model"], "llama");
}

#[tokio::test]
async fn a_stream_comes_back_chunk_by_chunk() {
    let double = Double::answering(|_| events(event("hel") + &event("lo") + &last_events())).await;
    let received = send(limits(), &upstream(1), outgoing(&double.base, Wanted::Stream)).await.unwrap();
    let (text, has_finished, error, stream) = drain(received).await;
    assert_eq!((text.as_str(), has_finished, error), ("hello", true, None));
    assert!(stream.is_complete());
    assert_eq!((stream.usage().prompt, stream.usage().completion, stream.usage().estimated), (3, 2, false));
}

#[tokio::test]
async fn what_may_pass_is_tried_again_and_what_may_not_is_not() {
    for (status, body, attempts) in [
        (429, json!({"error": {"message": "slow", "code": "rate_limit_exceeded"}}), 3),
        (529, json!({"error": {"message": "busy", "type": "overloaded_error"}}), 3),
        (500, json!({}), 3),
        (400, json!({"error": {"message": "bad"}}), 1),
        (413, json!({}), 1),
        (429, json!({"error": {"message": "empty", "code": "insufficient_quota"}}), 1),
        (401, json!({}), 1),
        (302, json!({}), 3),
    ] {
        let sent = body.clone();
        let double = Double::answering(move |_| json_response(status, &sent)).await;
        let error = send(limits(), &upstream(10), outgoing(&double.base, Wanted::Stream)).await.unwrap_err();
        assert_eq!(double.hits(), attempts, "{status} {body}: {error}");
    }
}

#[tokio::test]
async fn a_second_try_may_succeed() {
    let double = Double::answering(|hit| match hit {
        0 => {
            let mut response = json_response(429, &json!({}));
            response.headers_mut().insert("retry-after-ms", "1".parse().unwrap());
            response
        }
        1 => json_response(503, &json!("broken")),
        _ => json_response(200, &answer()),
    })
    .await;
    assert!(send(limits(), &upstream(9), outgoing(&double.base, Wanted::Whole)).await.is_ok());
    assert_eq!(double.hits(), 3);
}

#[tokio::test]
async fn what_may_have_cost_something_is_handed_back_at_once_with_what_is_known_of_it() {
    let mut no_choices = answer();
    no_choices["choices"] = json!([]);
    let counted = Spent::from(Some(Usage { prompt: 3, completion: 1, ..Usage::default() }));
    for (status, body, spent) in [
        (200, json!("broken"), Spent::Unknown),
        (200, no_choices, counted),
        (200, json!({"error": {"message": "busy", "type": "overloaded_error"}}), Spent::Unknown),
    ] {
        let double = Double::answering(move |_| json_response(status, &body)).await;
        let error = send(limits(), &upstream(9), outgoing(&double.base, Wanted::Whole)).await.unwrap_err();
        assert_eq!((error.spent, double.hits()), (spent, 1));
    }
    let refused = Double::answering(|_| json_response(500, &json!({"usage": {"prompt_tokens": 3}}))).await;
    let error = send(limits(), &upstream(9), outgoing(&refused.base, Wanted::Whole)).await.unwrap_err();
    assert_eq!((error.spent, refused.hits()), (Spent::Nothing, 3));
    let once = Limits { retry: RetryLimits { max_attempts: 1, ..limits().retry }, ..limits() };
    let (silent, hits) = raw("", After::Hold).await;
    let quick = Limits { first_byte: SHORT, ..limits() };
    let error = send(quick, &upstream(9), outgoing(&silent, Wanted::Whole)).await.unwrap_err();
    assert_eq!((error.spent, hits.load(Ordering::SeqCst)), (Spent::Unknown, 1));
    let (cut, _) = raw("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", After::Close).await;
    let error = send(once, &upstream(9), outgoing(&cut, Wanted::Whole)).await.unwrap_err();
    assert_eq!((error.cause, error.spent), (Cause::Cut, Spent::Unknown));
    let (begun, _) = raw(&hello(), After::Close).await;
    let received = send(limits(), &upstream(9), outgoing(&begun, Wanted::Stream)).await.unwrap();
    let (_, _, error, _) = drain(received).await;
    let Spent::Known(usage) = error.unwrap().spent else { panic!("an estimate") };
    assert_eq!((usage.prompt, usage.completion, usage.estimated), (100, 2, true), "the bound, and a third of `hello`");
}

#[tokio::test]
async fn what_a_model_makes_of_a_request_and_a_forbidden_model_do_not_open_the_circuit() {
    let double = Double::answering(|hit| match hit % 2 {
        0 => json_response(403, &json!({"error": {"message": "not this model"}})),
        _ => Body::from(vec![b'['; 5000]).into_response(),
    })
    .await;
    let upstream = upstream(1);
    for _ in 0..4 {
        send(limits(), &upstream, outgoing(&double.base, Wanted::Whole)).await.unwrap_err();
    }
    assert_eq!((upstream.state(), double.hits()), (BreakerState::Closed, 4));
}

#[tokio::test]
async fn a_stream_has_a_deadline_in_all() {
    let double = Double::answering(|_| {
        let first = stream::iter([Ok::<_, Infallible>(Bytes::from(event("hello")))]);
        events(Body::from_stream(first.chain(stream::pending())))
    })
    .await;
    let permit = PrivacyClass::Any.leave().unwrap();
    let outgoing = outgoing(&double.base, Wanted::Stream);
    let upstream = upstream(1);
    let within = (&Departure::default(), Duration::from_secs(2));
    let received = Door::new(limits()).unwrap().send(permit, &upstream, outgoing, within).await;
    let (text, has_finished, error, _) = drain(received.unwrap()).await;
    assert_eq!((text.as_str(), has_finished, error.unwrap().cause), ("hello", false, Cause::Timeout));
    assert_eq!(upstream.state(), BreakerState::Closed, "it had begun, and was not asked for more than it gave");
}

#[tokio::test]
async fn a_wait_longer_than_the_bound_is_handed_on_instead() {
    let double = Double::answering(|_| {
        let mut response = json_response(429, &json!({}));
        response.headers_mut().insert("retry-after", "7".parse().unwrap());
        response
    })
    .await;
    let error = send(limits(), &upstream(9), outgoing(&double.base, Wanted::Whole)).await.unwrap_err();
    assert_eq!((error.retry_after, double.hits()), (Some(Duration::from_secs(7)), 1));
}

#[tokio::test]
async fn a_refused_key_opens_the_circuit_and_nothing_is_sent_any_more() {
    let double = Double::answering(|_| json_response(401, &json!({}))).await;
    let upstream = upstream(100);
    let error = send(limits(), &upstream, outgoing(&double.base, Wanted::Whole)).await.unwrap_err();
    assert_eq!((error.cause, upstream.state()), (Cause::Auth, BreakerState::Open));
    let error = send(limits(), &upstream, outgoing(&double.base, Wanted::Whole)).await.unwrap_err();
    assert_eq!((error.cause, double.hits(), &error.spent), (Cause::Unreachable, 1, &Spent::NotSent));
    assert!(error.retry_after.is_some());
}

#[tokio::test]
async fn wrong_requests_do_not_open_the_circuit_and_failures_do() {
    let bad = Double::answering(|_| json_response(400, &json!({}))).await;
    let upstream = upstream(3);
    for _ in 0..5 {
        send(limits(), &upstream, outgoing(&bad.base, Wanted::Whole)).await.unwrap_err();
    }
    assert_eq!(upstream.state(), BreakerState::Closed);
    let broken = Double::answering(|_| json_response(500, &json!({}))).await;
    send(limits(), &upstream, outgoing(&broken.base, Wanted::Whole)).await.unwrap_err();
    assert_eq!(upstream.state(), BreakerState::Open);
}

#[tokio::test]
async fn a_dead_upstream_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = send(limits(), &upstream(9), outgoing(&base, Wanted::Whole)).await.unwrap_err();
    assert_eq!((error.cause, error.status(), &error.spent), (Cause::Unreachable, 502, &Spent::Nothing));
    assert!(!error.message.contains("127.0.0.1"), "{error}");
}

#[derive(Clone, Copy, PartialEq)]
enum After {
    Hold,
    Close,
}

/// Accepts one connection after the other, writes the same bytes to each, and closes it, or holds it.
async fn raw(bytes: &str, after: After) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let bytes = bytes.to_owned();
    let hits = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&hits);
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            counter.fetch_add(1, Ordering::SeqCst);
            // Until the request is there: a close with unread bytes would be a reset.
            let mut request = Vec::new();
            while !request.ends_with(b"}") {
                let mut buffer = [0; 4096];
                let count = socket.read(&mut buffer).await.unwrap();
                request.extend_from_slice(&buffer[..count]);
            }
            socket.write_all(bytes.as_bytes()).await.unwrap();
            if after == After::Hold {
                held.push(socket);
            }
        }
    });
    (base, hits)
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
/// A stream that begins, and goes no further.
fn hello() -> String {
    let event = event("hello");
    format!("{HEAD}{:x}\r\n{event}\r\n", event.len())
}

#[tokio::test]
async fn slowness_is_a_time_out_at_each_stage() {
    let short = |limits: Limits| Limits { retry: RetryLimits { max_attempts: 1, ..limits.retry.clone() }, ..limits };
    let (base, _) = raw("", After::Hold).await;
    let quick = short(Limits { first_byte: SHORT, ..limits() });
    let error = send(quick, &upstream(9), outgoing(&base, Wanted::Whole)).await.unwrap_err();
    assert_eq!((error.cause, error.status()), (Cause::Timeout, 504));
    let (base, _) = raw("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", After::Hold).await;
    let quick = short(Limits { idle: SHORT, ..limits() });
    let error = send(quick.clone(), &upstream(9), outgoing(&base, Wanted::Whole)).await.unwrap_err();
    assert_eq!(error.cause, Cause::Timeout);
    let (base, _) = raw(&hello(), After::Hold).await;
    let received = send(quick, &upstream(9), outgoing(&base, Wanted::Stream)).await.unwrap();
    let (text, has_finished, error, stream) = drain(received).await;
    assert_eq!((text.as_str(), has_finished, error.unwrap().cause), ("hello", false, Cause::Timeout));
    assert!(stream.usage().estimated);
}

#[tokio::test]
async fn the_deadline_ends_the_call_whatever_it_waits_for() {
    let (base, _) = raw("", After::Hold).await;
    let permit = PrivacyClass::Any.leave().unwrap();
    let door = Door::new(limits()).unwrap();
    let error = door
        .send(permit, &upstream(9), outgoing(&base, Wanted::Whole), (&Departure::default(), SHORT))
        .await
        .unwrap_err();
    assert_eq!(error.cause, Cause::Timeout);
}

#[tokio::test]
async fn a_stream_cut_after_its_first_chunk_is_an_error_and_never_begun_again() {
    let (base, hits) = raw(&hello(), After::Close).await;
    let upstream = upstream(1);
    let received = send(limits(), &upstream, outgoing(&base, Wanted::Stream)).await.unwrap();
    let (text, has_finished, error, stream) = drain(received).await;
    assert_eq!((text.as_str(), has_finished, error.unwrap().cause), ("hello", false, Cause::Cut));
    assert_eq!(hits.load(Ordering::SeqCst), 1);
    assert!(!stream.is_complete() && stream.usage().estimated);
    assert_eq!(upstream.state(), BreakerState::Open);
}

#[tokio::test]
async fn a_stream_cut_before_its_first_chunk_is_left_to_who_pays() {
    let (base, hits) = raw(HEAD, After::Close).await;
    let error = send(limits(), &upstream(9), outgoing(&base, Wanted::Stream)).await.unwrap_err();
    assert_eq!((error.cause, hits.load(Ordering::SeqCst), error.spent.may_cost()), (Cause::Cut, 1, true));
}

#[tokio::test]
async fn an_end_without_the_mark_is_a_cut_even_where_the_connection_ends_well() {
    let double = Double::answering(|_| events(event("hello"))).await;
    let received = send(limits(), &upstream(9), outgoing(&double.base, Wanted::Stream)).await.unwrap();
    let (text, has_finished, error, _) = drain(received).await;
    assert_eq!((text.as_str(), has_finished, error.unwrap().cause), ("hello", false, Cause::Cut));
}

#[tokio::test]
async fn an_error_is_handed_on_as_the_first_event_and_as_a_later_one() {
    let error = "data: {\"error\":{\"message\":\"busy\",\"type\":\"overloaded_error\"}}\n\n";
    let double = Double::answering(move |hit| match hit {
        0 => events(error),
        _ => events(event("hello") + error),
    })
    .await;
    let first = send(limits(), &upstream(9), outgoing(&double.base, Wanted::Stream)).await.unwrap_err();
    assert_eq!((first.cause, first.spent.may_cost(), double.hits()), (Cause::Overloaded, true, 1));
    let received = send(limits(), &upstream(9), outgoing(&double.base, Wanted::Stream)).await.unwrap();
    let (text, has_finished, error, _) = drain(received).await;
    assert_eq!((text.as_str(), has_finished, error.unwrap().cause), ("hello", false, Cause::Overloaded));
}

#[tokio::test]
async fn bodies_of_any_size_are_read_within_bounds() {
    let endless = |piece: &'static str| {
        Body::from_stream(stream::repeat_with(move || Ok::<_, Infallible>(Bytes::from_static(piece.as_bytes()))))
    };
    let json = Double::answering(move |_| endless("[").into_response()).await;
    let error = send(limits(), &upstream(9), outgoing(&json.base, Wanted::Whole)).await.unwrap_err();
    assert_eq!(error.cause, Cause::Unfit);
    let failure = Double::answering(move |_| (StatusCode::BAD_REQUEST, endless("[")).into_response()).await;
    let error = send(limits(), &upstream(9), outgoing(&failure.base, Wanted::Whole)).await.unwrap_err();
    assert_eq!(error.cause, Cause::Invalid);
    let line = Double::answering(move |_| events(endless("data: x"))).await;
    let error = send(limits(), &upstream(9), outgoing(&line.base, Wanted::Stream)).await.unwrap_err();
    assert!(error.message.contains("1024 bytes"), "{error}");
    let long = Double::answering(move |_| {
        let first = stream::iter([Ok::<_, Infallible>(Bytes::from(event("hello")))]);
        let rest = stream::repeat_with(|| Ok(Bytes::from(event("o"))));
        events(Body::from_stream(first.chain(rest)))
    })
    .await;
    let received = send(limits(), &upstream(9), outgoing(&long.base, Wanted::Stream)).await.unwrap();
    let (_, has_finished, error, _) = drain(received).await;
    assert!(!has_finished && error.unwrap().message.contains("4096 bytes"));
}

#[tokio::test]
async fn something_else_than_asked_for_is_no_answer() {
    let page = Double::answering(|_| axum::response::Html("<h1>It works!</h1>").into_response()).await;
    let error = send(limits(), &upstream(9), outgoing(&page.base, Wanted::Stream)).await.unwrap_err();
    assert_eq!((error.cause, error.spent), (Cause::Malformed, Spent::Unknown));
    let streamed = Double::answering(|_| events(event("hello") + &last_events())).await;
    let error = send(limits(), &upstream(9), outgoing(&streamed.base, Wanted::Whole)).await.unwrap_err();
    assert_eq!(error.cause, Cause::Malformed);
}

#[tokio::test]
async fn a_redirect_is_not_followed_with_the_key() {
    let other = Double::answering(|_| json_response(200, &answer())).await;
    let to = other.base.clone();
    let double =
        Double::answering(move |_| (StatusCode::TEMPORARY_REDIRECT, [("location", to.clone())]).into_response()).await;
    assert!(send(limits(), &upstream(9), outgoing(&double.base, Wanted::Whole)).await.is_err());
    assert_eq!(other.hits(), 0);
}

/// Says when it is dropped: when the server has noticed that nobody listens.
struct Tell(Option<oneshot::Sender<()>>);

impl Drop for Tell {
    fn drop(&mut self) {
        let _ = self.0.take().map(|sender| sender.send(()));
    }
}

#[tokio::test]
async fn dropping_a_stream_ends_the_call_upstream() {
    let (sender, dropped) = oneshot::channel();
    let sender = Arc::new(Mutex::new(Some(sender)));
    let double = Double::answering(move |_| {
        let tell = Tell(sender.lock().unwrap().take());
        let first = stream::iter([Ok::<_, Infallible>(Bytes::from(event("hello")))]);
        let rest = stream::pending().map(move |item: Result<Bytes, Infallible>| {
            let _held = &tell;
            item
        });
        events(Body::from_stream(first.chain(rest)))
    })
    .await;
    let upstream = upstream(1);
    let received = send(limits(), &upstream, outgoing(&double.base, Wanted::Stream)).await.unwrap();
    let Received::Stream(mut stream) = received else { panic!("a stream") };
    assert!(stream.next().await.unwrap().is_ok());
    drop(stream);
    dropped.await.unwrap();
    assert_eq!(upstream.state(), BreakerState::Closed, "a client that leaves says nothing about the upstream");
}

#[tokio::test]
async fn what_is_local_only_has_no_way_to_ask() {
    let double = Double::answering(|_| json_response(200, &answer())).await;
    for request in [PrivacyClass::Any, PrivacyClass::LocalFirst, PrivacyClass::LocalOnly] {
        assert!(PrivacyClass::LocalOnly.tightened_by(request).leave().is_none());
    }
    assert_eq!(double.hits(), 0);
}

/// Takes connections and says nothing, not even what a TLS handshake begins with. Until told, it reads nothing, either.
async fn deaf() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(listener.accept().await.unwrap());
        }
    });
    base
}

#[tokio::test]
async fn who_gives_up_before_the_request_has_left_has_spent_nothing() {
    let departure = Departure::default();
    let door = Door::new(limits()).unwrap();
    let (deaf, (silent, hits)) = (deaf().await, raw("", After::Hold).await);
    for (base, spent) in [(&deaf, Spent::Nothing), (&silent, Spent::Unknown)] {
        let permit = PrivacyClass::Any.leave().unwrap();
        let within = (&departure, Duration::from_secs(2));
        let error = door.send(permit, &upstream(9), outgoing(base, Wanted::Whole), within).await.unwrap_err();
        assert_eq!((error.cause, &error.spent), (Cause::Timeout, &spent), "{base}");
        assert_eq!(departure.give_up(), spent, "what a drop would have been told");
        departure.begin_another();
    }
    assert_eq!(hits.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn between_two_attempts_nothing_is_on_its_way() {
    let double = Double::answering(|_| json_response(500, &json!({}))).await;
    let (departure, patient) = (Departure::default(), RetryLimits { first_wait: LONG, ..limits().retry });
    let door = Door::new(Limits { retry: RetryLimits { max_wait: LONG, ..patient }, ..limits() }).unwrap();
    let (permit, upstream) = (PrivacyClass::Any.leave().unwrap(), upstream(9));
    let sending = door.send(permit, &upstream, outgoing(&double.base, Wanted::Whole), (&departure, 2 * LONG));
    tokio::select! {
        _ = sending => panic!("it waits for its second attempt"),
        () = async {
            while double.hits() == 0 || departure.has_left() && departure.give_up() != Spent::Nothing {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        } => {}
    }
    assert_eq!((double.hits(), departure.has_left()), (1, true), "a text has been there, and cost nothing");
}

#[tokio::test]
async fn a_stream_that_http2_refuses_unread_costs_nothing_and_is_sent_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}/v1", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(socket).await.unwrap();
        for at in 0.. {
            let Some(Ok((_request, mut respond))) = connection.accept().await else { return };
            if at == 0 {
                respond.send_reset(h2::Reason::REFUSED_STREAM);
                continue;
            }
            let head = axum::http::Response::builder().header("content-type", "application/json").body(()).unwrap();
            let mut body = respond.send_response(head, false).unwrap();
            body.send_data(answer().to_string().into(), true).unwrap();
        }
    });
    let client = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    let door = Door::with_client(client, limits());
    let (departure, permit) = (Departure::default(), PrivacyClass::Any.leave().unwrap());
    // One failure would open its circuit, and there would be no second attempt.
    let (upstream, asked) = (upstream(1), outgoing(&base, Wanted::Whole));
    let received = door.send(permit, &upstream, asked, (&departure, LONG)).await;
    assert!(matches!(received, Ok(Received::Whole(_))), "{received:?}");
}

#[tokio::test]
async fn an_answer_in_one_piece_to_a_request_for_a_stream_is_given_out_as_one() {
    let mut whole = answer();
    whole["choices"][0]["message"]["tool_calls"] =
        json!([{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]);
    let double = Double::answering(move |_| json_response(200, &whole)).await;
    let received = send(limits(), &upstream(1), outgoing(&double.base, Wanted::Stream)).await.unwrap();
    let Received::Stream(mut stream) = received else { panic!("a stream was asked for") };
    let mut chunks = Vec::new();
    while let Some(chunk) = stream.next().await {
        chunks.push(chunk.unwrap().to_json());
    }
    let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
    assert_eq!(
        *deltas[0],
        json!({"role": "assistant", "content": "hello", "tool_calls":
        [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]})
    );
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert!(chunks[0]["choices"][0]["finish_reason"].is_null());
    assert_eq!(chunks[1]["choices"][0]["finish_reason"], "stop");
    assert_eq!((chunks.len(), double.hits()), (2, 1), "paid for once");
    assert!(stream.is_complete());
    assert_eq!((stream.usage().prompt, stream.usage().completion, stream.usage().estimated), (3, 1, false));
}
