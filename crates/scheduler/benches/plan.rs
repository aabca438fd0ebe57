//! What a step costs the scheduler: `cargo bench -p bindery-scheduler`. Goal: plan + commit under 100 µs at 256
//! running sequences. Prints microseconds a step, median and 99th percentile of many steps.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench asks the clock and prints"
)]

use std::time::Instant;

use bindery_scheduler::{Limits, Pace, Sampled, Scheduler, SeqId, SequenceSpec, Share, StepPlan, TokenId};

struct Load {
    name: &'static str,
    num_blocks: usize,
    num_prompt_tokens: usize,
    num_new_tokens: usize,
    num_samples: u64,
    num_waiting: usize,
}

fn main() {
    println!("{:46} {:>9} {:>9} {:>9}", "256 sequences, microseconds a step", "median", "p99", "preempted");
    for load in [
        Load {
            name: "decode only, contexts of 512 to 2560",
            num_blocks: 256 * 161,
            num_prompt_tokens: 512,
            num_new_tokens: 2048,
            num_samples: 1,
            num_waiting: 0,
        },
        Load {
            name: "decode only, contexts of 8192 to 10240",
            num_blocks: 256 * 641,
            num_prompt_tokens: 8192,
            num_new_tokens: 2048,
            num_samples: 1,
            num_waiting: 0,
        },
        Load {
            name: "requests come and go, 1000 wait",
            num_blocks: 256 * 20,
            num_prompt_tokens: 150,
            num_new_tokens: 64,
            num_samples: 1,
            num_waiting: 1000,
        },
        Load {
            name: "the same, memory for a third of them",
            num_blocks: 85 * 14,
            num_prompt_tokens: 150,
            num_new_tokens: 64,
            num_samples: 1,
            num_waiting: 1000,
        },
        Load {
            name: "four samples each, memory for two thirds",
            num_blocks: 1800,
            num_prompt_tokens: 150,
            num_new_tokens: 64,
            num_samples: 4,
            num_waiting: 1000,
        },
    ] {
        measure(&load);
    }
}

fn measure(load: &Load) {
    let mut scheduler = Scheduler::new(Limits {
        block_size: 16,
        num_blocks: load.num_blocks,
        max_num_seqs: 256,
        max_num_batched_tokens: 2048,
        max_model_len: 16384,
        max_queued_requests: 2048,
    });
    let mut next_id = 0;
    let mut num_generated: Vec<usize> = Vec::new();
    let mut plan = StepPlan::default();
    let mut sampled = Vec::new();
    let mut micros = Vec::new();
    for step in 0..3000 {
        let num_wanted = if load.num_waiting == 0 { usize::from(next_id < 256) * 256 } else { load.num_waiting };
        while scheduler.stats().num_queued_requests < num_wanted && (load.num_waiting > 0 || next_id < 256) {
            let samples = (next_id..next_id + load.num_samples).map(SeqId).collect();
            next_id += load.num_samples;
            num_generated.resize(next_id as usize, 0);
            scheduler
                .add(SequenceSpec {
                    samples,
                    prompt: vec![TokenId(7); load.num_prompt_tokens],
                    max_new_tokens: load.num_new_tokens,
                    priority: 0,
                    share: Share::default(),
                    adapter: None,
                    prompt_logits: false,
                })
                .unwrap();
        }
        let start = Instant::now();
        scheduler.plan(&Pace::NONE, &mut plan);
        let planned = start.elapsed();
        sampled.clear();
        for &id in &plan.samples {
            let num_generated = &mut num_generated[id.0 as usize];
            *num_generated += 1;
            // Lengths differ, so that ends spread over the steps.
            let finished = *num_generated >= load.num_new_tokens - (id.0 as usize * 7) % (load.num_new_tokens / 2);
            sampled.push(Sampled { id, token: TokenId(8), finished });
        }
        let start = Instant::now();
        scheduler.commit(&plan, &sampled);
        let has_full_load = load.num_waiting > 0 && step > 300 || plan.samples.len() == 256;
        if has_full_load {
            micros.push((planned + start.elapsed()).as_nanos() as f64 / 1e3);
        }
    }
    micros.sort_by(f64::total_cmp);
    let at = |percent: usize| micros[(micros.len() - 1) * percent / 100];
    println!("{:46} {:9.1} {:9.1} {:9}", load.name, at(50), at(99), scheduler.stats().num_preemptions);
}
