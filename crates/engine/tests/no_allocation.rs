//! Between the passes of the model the engine allocates nothing, once it has met a batch of the size, but what its streams keep:
//! asserted with an allocator that counts. (The model's own promise is tested beside it.)
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    alloc::System,
    ops::Range,
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
};

use bindery_engine::{Engine, EngineConfig, SamplingParams, Share, TokenRequest};
use bindery_model::{Adapter, AttentionWork, ForwardBatch, ModelError, ModelPhase, RopeRegimes, StepModel};
use bindery_scheduler::{Limits, Pace, Sampled, Scheduler, SeqId, SequenceSpec, StepPlan, TokenId};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const VOCAB_SIZE: usize = 64;
const NUM_STREAMS: usize = 8;
const PROMPT_LEN: usize = 20;
/// Passes until everything has its room: the prompts and the first tokens.
const WARM_UP: usize = 40;
const NUM_COUNTED: usize = 192;
/// Events that tokio's channel keeps in one piece of memory; nobody reads them meanwhile, so none is used again.
const EVENTS_PER_BLOCK: usize = 32;
/// How often a list doubles its room meanwhile. Per stream there are its tokens and blocks, both the scheduler's, and how often
/// tokens have occurred, for penalties.
const DOUBLINGS: usize = 3;

/// Computes nothing; notes how many allocations the process had made by the warm-up's last pass and by the last counted one.
struct Counting {
    num_passes: usize,
    at_start: usize,
    counted: SyncSender<usize>,
}

fn num_allocations() -> usize {
    let stats = ALLOCATOR.stats();
    stats.allocations + stats.reallocations
}

impl StepModel for Counting {
    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn rope_regimes(&self) -> Option<RopeRegimes> {
        None
    }

    fn attention_work(&self, _batch: &ForwardBatch) -> AttentionWork {
        AttentionWork::default()
    }

    fn spread(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..num_tasks).for_each(task);
    }

    fn add_adapter(&mut self, _id: u32, _adapter: &Arc<Adapter>) -> Result<(), ModelError> {
        Ok(())
    }

    fn remove_adapter(&mut self, _id: u32) {}

    fn copy_blocks(&mut self, _copies: &[(u32, u32)]) -> Result<(), ModelError> {
        Ok(())
    }

    fn forward(&mut self, batch: &ForwardBatch, _passed: &mut dyn FnMut(ModelPhase)) -> Result<(), ModelError> {
        self.num_passes += 1;
        if self.num_passes == WARM_UP {
            assert_eq!(batch.tokens.len(), NUM_STREAMS, "all of them decode");
            self.at_start = num_allocations();
        } else if self.num_passes == WARM_UP + NUM_COUNTED {
            assert_eq!(batch.tokens.len(), NUM_STREAMS, "all of them decode still");
            self.counted.send(num_allocations() - self.at_start).unwrap();
        }
        Ok(())
    }

    fn logits(&mut self, _rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        for (i, logit) in out.iter_mut().enumerate() {
            *logit = (i * 37 % 29) as f32 * 0.1;
        }
        Ok(())
    }
}

/// Greedy, drawn, cut by every filter, and with every penalty.
fn params() -> [SamplingParams; 4] {
    let max_tokens = 2 * (WARM_UP + NUM_COUNTED);
    let greedy = SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..SamplingParams::default() };
    let drawn = SamplingParams { temperature: 1.0, seed: Some(1), ..greedy.clone() };
    let filtered = SamplingParams { top_k: Some(20), top_p: 0.8, min_p: 0.05, ..drawn.clone() };
    let penalised = SamplingParams {
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.1,
        logit_bias: [(TokenId(3), 1.5)].into(),
        ..drawn.clone()
    };
    [greedy, drawn, filtered, penalised]
}

fn prompt(stream: usize) -> Vec<TokenId> {
    (0..PROMPT_LEN).map(|i| TokenId((7 * i + stream) as u32 % 60)).collect()
}

fn limits() -> Limits {
    Limits {
        block_size: 16,
        num_blocks: 1024,
        max_num_seqs: NUM_STREAMS,
        max_num_batched_tokens: 512,
        max_model_len: 1024,
        max_queued_requests: NUM_STREAMS,
    }
}

/// What the scheduler takes by itself for the same steps: in builds with debug assertions it checks its own promises, and
/// allocates for that.
fn allocations_of_scheduler() -> usize {
    let mut scheduler = Scheduler::new(limits());
    for stream in 0..NUM_STREAMS {
        let spec = SequenceSpec {
            samples: vec![SeqId(stream as u64)],
            prompt: prompt(stream),
            max_new_tokens: 2 * (WARM_UP + NUM_COUNTED),
            priority: 0,
            share: Share::default(),
            adapter: None,
            prompt_logits: false,
        };
        scheduler.add(spec).unwrap();
    }
    let (mut plan, mut sampled) = (StepPlan::default(), Vec::new());
    let mut before = 0;
    for step in 1..=WARM_UP + NUM_COUNTED {
        if step == WARM_UP {
            before = num_allocations();
        }
        scheduler.plan(&Pace::NONE, &mut plan);
        assert_eq!(plan.samples.len(), NUM_STREAMS);
        sampled.clear();
        sampled.extend(plan.samples.iter().map(|&id| Sampled { id, token: TokenId(5), finished: false }));
        scheduler.commit(&plan, &sampled);
    }
    num_allocations() - before
}

/// One test, for what runs beside it would be counted too.
#[tokio::test]
async fn between_two_passes_nothing_is_allocated_but_what_streams_keep() {
    let (counted, received) = sync_channel(1);
    let config = EngineConfig {
        limits: limits(),
        eos_token_ids: vec![TokenId(1)],
        max_buffered_tokens: 1024,
        paces_prompts: true,
    };
    let model = Counting { num_passes: 0, at_start: 0, counted };
    let (engine, handle) = Engine::start(Box::new(model), config).unwrap();
    let requests = (0..NUM_STREAMS).map(|stream| TokenRequest {
        request_id: format!("request-{stream}"),
        prompt: prompt(stream),
        params: params()[stream % 4].clone(),
        grammar: None,
        adapter: None,
        num_samples: 1,
        priority: 0,
        share: Share::default(),
        deadline: None,
    });
    let streams = handle.submit_all(requests.collect()).await.unwrap();
    // Waits without a part of tokio, which might allocate.
    let num_allocations = received.recv().unwrap();
    let of_scheduler = allocations_of_scheduler();
    assert!(
        cfg!(debug_assertions) || of_scheduler <= NUM_STREAMS * 2 * DOUBLINGS,
        "{of_scheduler} by the scheduler alone"
    );
    let of_streams = NUM_STREAMS * (NUM_COUNTED / EVENTS_PER_BLOCK + 1 + DOUBLINGS);
    assert!(of_streams < NUM_COUNTED, "one a step would not show");
    assert!(
        num_allocations <= of_scheduler + of_streams,
        "{num_allocations} in {NUM_COUNTED} steps, {of_scheduler} by the scheduler, {of_streams} for what streams keep"
    );
    drop(streams);
    engine.stop();
}
