//! One request with its times, and the two ways of sending many: N clients (closed loop) or a rate (open loop).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::prompts::{Prompts, exponential, generator};
use crate::{
    args::Endpoint,
    client::{Client, ClientError},
};

/// Requests of an open loop that may be unanswered at once; a server that far behind will not catch up.
const MAX_IN_FLIGHT: usize = 4096;

/// A server under test.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) client: Client,
    /// Names to ask for; the request with number N takes the N-th, again from the first after the last. Not empty.
    pub(crate) models: Vec<String>,
}

impl Target {
    fn model(&self, number: u64) -> &str {
        &self.models[(number % self.models.len() as u64) as usize]
    }
}

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arrivals {
    /// Each of N clients sends its next request when its last is answered.
    Clients(u32),
    /// Requests a second, at random times.
    Rate(f64),
}

impl Arrivals {
    /// For people.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Clients(clients) => format!("{clients} clients"),
            Self::Rate(rate) => format!("{rate} requests/s"),
        }
    }
}

/// What every request of a run shares.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) endpoint: Endpoint,
    pub(crate) prompts: Prompts,
    pub(crate) output_tokens: u32,
    pub(crate) temperature: f32,
    pub(crate) ignore_eos: bool,
    pub(crate) timeout: Duration,
    pub(crate) seed: u64,
}

/// Times of one answered request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Timing {
    pub(crate) first: Duration,
    /// Between pieces of text that arrived one after the other.
    pub(crate) gaps: Vec<Duration>,
    pub(crate) whole: Duration,
    pub(crate) prompt_tokens: u64,
    pub(crate) output_tokens: u64,
}

/// One round: every request's outcome, and how long all took together.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Round {
    pub(crate) answered: Vec<Timing>,
    pub(crate) failures: Vec<String>,
    pub(crate) wall: Duration,
}

impl Shape {
    fn body(&self, model: &str, prompt: &str) -> (&'static str, Value) {
        let mut body = json!({
            "model": model, "max_tokens": self.output_tokens, "temperature": self.temperature, "stream": true,
            "stream_options": {"include_usage": true},
        });
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        match self.endpoint {
            Endpoint::Completions => {
                body["prompt"] = json!(prompt);
                ("completions", body)
            }
            Endpoint::Chat => {
                body["messages"] = json!([{"role": "user", "content": prompt}]);
                ("chat/completions", body)
            }
        }
    }

    /// Sends the request with this number and reads its stream to the end.
    pub(crate) async fn send(&self, target: &Target, number: u64) -> Result<Timing, ClientError> {
        let (route, body) = self.body(target.model(number), &self.prompts.get(number));
        let started = Instant::now();
        let work = async {
            let mut stream = std::pin::pin!(target.client.stream(route, &body).await?);
            let (mut timing, mut last, mut num_pieces) = (Timing::default(), None::<Instant>, 0);
            while let Some(chunk) = stream.next().await {
                let chunk = chunk?;
                if !chunk.text.is_empty() {
                    let now = Instant::now();
                    match last {
                        None => timing.first = now - started,
                        Some(last) => timing.gaps.push(now - last),
                    }
                    last = Some(now);
                    num_pieces += 1;
                }
                if let Some(usage) = chunk.usage {
                    timing.prompt_tokens = usage.prompt_tokens;
                    timing.output_tokens = usage.completion_tokens;
                }
            }
            timing.whole = started.elapsed();
            if last.is_none() {
                // An answer without text (end tokens only) is as late as its end.
                timing.first = timing.whole;
            }
            if timing.output_tokens == 0 {
                // A server that tells no usage sends a token an event.
                timing.output_tokens = num_pieces;
            }
            Ok(timing)
        };
        tokio::time::timeout(self.timeout, work).await.unwrap_or_else(|_| {
            Err(ClientError::Cut(format!("not answered within {}", humantime::format_duration(self.timeout))))
        })
    }
}

/// Sends `num_requests` requests with numbers from `first_number` on. `done` is called after each.
pub(crate) async fn round(
    target: &Target,
    shape: &Arc<Shape>,
    arrivals: Arrivals,
    num_requests: u32,
    first_number: u64,
    done: &(dyn Fn() + Sync),
) -> Round {
    let numbers = first_number..first_number + u64::from(num_requests);
    let started = Instant::now();
    let spawn = |number: u64| {
        let (target, shape) = (target.clone(), Arc::clone(shape));
        async move { shape.send(&target, number).await }
    };
    let mut round = Round::default();
    let mut keep = |outcome: Result<Result<Timing, ClientError>, tokio::task::JoinError>| {
        match outcome {
            Ok(Ok(timing)) => round.answered.push(timing),
            Ok(Err(error)) => round.failures.push(error.to_string()),
            Err(error) => round.failures.push(format!("the client failed: {error}")),
        }
        done();
    };
    match arrivals {
        Arrivals::Clients(clients) => {
            let mut outcomes = futures::stream::iter(numbers)
                .map(|number| tokio::spawn(spawn(number)))
                .buffer_unordered(clients as usize);
            while let Some(outcome) = outcomes.next().await {
                keep(outcome);
            }
        }
        Arrivals::Rate(rate) => {
            let mut random = generator(shape.seed, u64::MAX - first_number);
            let mut due = 0.0;
            let mut running = JoinSet::new();
            for number in numbers {
                due += exponential(&mut random, rate);
                let sleep = tokio::time::sleep_until((started + Duration::from_secs_f64(due)).into());
                tokio::pin!(sleep);
                loop {
                    tokio::select! {
                        biased;
                        () = &mut sleep => break,
                        Some(outcome) = running.join_next(), if !running.is_empty() => keep(outcome),
                    }
                }
                if running.len() >= MAX_IN_FLIGHT {
                    keep(Ok(Err(ClientError::Cut(format!(
                        "not sent: {MAX_IN_FLIGHT} requests are unanswered already"
                    )))));
                } else {
                    running.spawn(spawn(number));
                }
            }
            while let Some(outcome) = running.join_next().await {
                keep(outcome);
            }
        }
    }
    round.wall = started.elapsed();
    round
}
