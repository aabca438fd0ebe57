//! The models of this process as judges: a question in, a verdict out, past keys, limits, guardrails and routes.
//!
//! It knows the engine's way from a text to tokens; who is judged, and what a verdict means, is the gateway's. Invariant: a
//! question is bounded as every prompt is, and one that is dropped ends in the engine, too.

use std::{
    fmt::Display,
    sync::{Arc, Weak},
};

use bindery_engine::{
    EngineError, Grammar, Prompt, RenderRequest, SamplingParams, Share, TenantId, TextEvent, TextRequest,
};
use bindery_gateway::{
    gateway::{LocalAnswer, LocalJudge, LocalQuestion, LocalUse},
    guardrails::JudgeFailed,
};
use futures::future::BoxFuture;
use serde_json::{Map, json};

use crate::{
    auth::Caller,
    error::ApiError,
    exchange::{house_model, local_adapter, machine_time},
    router::Serving,
    state::{AppState, Job, SharedState},
};

/// The longest verdict. A model that thinks aloud has to come to its point in it.
const MAX_VERDICT_TOKENS: usize = 512;

/// Holds the server's state weakly: the state holds the gateway, which holds this.
pub(crate) struct HouseJudge(Weak<AppState>);

impl HouseJudge {
    pub(crate) fn new(state: &SharedState) -> Self {
        Self(Arc::downgrade(state))
    }
}

impl LocalJudge for HouseJudge {
    fn ask(&self, question: LocalQuestion) -> BoxFuture<'_, Result<LocalAnswer, JudgeFailed>> {
        Box::pin(async move {
            let state = self.0.upgrade().ok_or_else(|| failed(&"the server has stopped"))?;
            answer(&state, question).await
        })
    }
}

fn failed(what: &dyn Display) -> JudgeFailed {
    JudgeFailed(what.to_string())
}

fn of_api(error: &ApiError) -> JudgeFailed {
    failed(&error.to_body().error.message)
}

async fn answer(state: &SharedState, question: LocalQuestion) -> Result<LocalAnswer, JudgeFailed> {
    let model = state.slot.model().ok_or_else(|| failed(&"the model is not loaded"))?;
    // Nobody in particular asks: an adapter that judges must be everybody's.
    let serving = Serving { model: Arc::clone(model), caller: Caller::default() };
    let named = serving.resolve(state, question.model).map_err(|error| of_api(&error))?;
    let prompt = prompt(state, &serving, question.text).await?;
    let grammar = (!question.answers.is_empty())
        .then(|| Arc::new(Grammar::Choice(question.answers.iter().map(|&word| word.to_owned()).collect())));
    let request = TextRequest {
        request_id: question.request_id,
        // The same text has the same verdict.
        params: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: Some(MAX_VERDICT_TOKENS.min(model.max_model_len / 4).max(1)),
        share: Share { tenant: TenantId(question.share.tenant), weight: question.share.weight },
        grammar: grammar.map(|grammar| (grammar, "guardrails")),
        ..TextRequest::new(prompt)
    };
    let mut prepared = model.prepare(request).await.map_err(|error| failed(&error))?;
    let mut weights = house_model(state);
    if let Some(adapter) = serving.lease(state, &named, None).await.map_err(|error| of_api(&error))? {
        weights.adapter = adapter.identity().as_deref().cloned().map(local_adapter);
        prepared.set_adapter(adapter);
    }
    let mut streams = model.submit_all(vec![prepared]).await.map_err(|error| failed(&error))?;
    let mut answer = LocalAnswer { model: weights, ..LocalAnswer::default() };
    for stream in &mut streams {
        while let Some(event) = stream.next().await {
            if let TextEvent::Delta { text, .. } = event.map_err(|error| failed(&error))? {
                answer.text.push_str(&text);
            }
        }
        answer.used.num_prompt_tokens = stream.num_prompt_tokens() as u64;
        answer.used.num_completion_tokens = stream.num_generated_tokens() as u64;
    }
    let used = LocalUse { machine_time: machine_time(&state.slot, &answer.used), ..answer.used };
    Ok(LocalAnswer { used, ..answer })
}

/// Through the model's own template; a model without one reads the question as it stands.
async fn prompt(state: &SharedState, serving: &Serving, text: String) -> Result<Prompt, JudgeFailed> {
    let model = Arc::clone(&serving.model);
    if model.template.is_none() {
        return Ok(Prompt::Text { text, add_special_tokens: true });
    }
    let render = RenderRequest {
        messages: vec![json!({"role": "user", "content": text})],
        tools: None,
        add_generation_prompt: true,
        kwargs: Map::new(),
    };
    let rendered: Option<Result<String, EngineError>> =
        state.run_blocking(Job::Render, move || model.render_chat(&render)).await;
    let text = rendered.ok_or_else(|| failed(&"the template engine panicked"))?.map_err(|error| failed(&error))?;
    Ok(Prompt::Text { text, add_special_tokens: false })
}
