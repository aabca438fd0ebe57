//! Perplexity and KL divergence over a small model of random weights, against a loop that does one thing at a time; and
//! what is refused.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use bindery_engine::{
    EngineError,
    perplexity::{PerplexityReport, PerplexityRequest, Progress, Side, measure},
};
use bindery_model::{BackendKind, BatchSequence, Dtype, ForwardBatch, LoadOptions, Model, Quantize, StepModel};

/// 128 tokens, contexts of 256; it has no tokenizer of its own, so as a dummy every byte is a token.
const TINY_LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/checkpoints/tiny-llama");
/// Ours. ASCII, so that its bytes are tokens that the model knows.
const TEXT: &str = include_str!("../../../tests/golden/make_golden.py");
const CONTEXT_LEN: usize = 48;
const NUM_WINDOWS: usize = 3;

fn options(backend: BackendKind) -> LoadOptions {
    LoadOptions { dummy: true, threads: Some(2), dtype: Dtype::F32, ..LoadOptions::new(backend) }
}

fn request<'a>(subject: &'a LoadOptions, base: Option<&'a LoadOptions>) -> PerplexityRequest<'a> {
    let side = |load| Side { path: Path::new(TINY_LLAMA), load };
    PerplexityRequest {
        subject: side(subject),
        base: base.map(side),
        text: TEXT,
        context_len: CONTEXT_LEN,
        max_windows: Some(NUM_WINDOWS),
        max_num_batched_tokens: 512,
    }
}

fn measured(request: &PerplexityRequest<'_>) -> Result<PerplexityReport, EngineError> {
    measure(request, &mut |_| ())
}

/// Probabilities of every position of a window, `[window.len()][vocab_size]`, from one step with all of its logits.
fn naive_rows(model: &mut Model, window: &[u32]) -> Vec<Vec<f64>> {
    let len = window.len();
    let batch = ForwardBatch {
        tokens: window.to_vec(),
        positions: (0..len as u32).collect(),
        slots: (0..len as u32).collect(),
        block_tables: (0..len.div_ceil(16) as u32).collect(),
        sequences: vec![BatchSequence {
            rows: 0..len,
            block_table: 0..len.div_ceil(16),
            context_len: len,
            rope_len: 0,
            adapter: None,
        }],
        logit_rows: (0..len as u32).collect(),
    };
    model.forward(&batch, &mut |_| ()).unwrap();
    let mut logits = vec![0.0; len * model.vocab_size()];
    model.logits(0..len, &mut logits).unwrap();
    let softmax = |row: &[f32]| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        row.iter().map(|&logit| f64::from(logit).exp() / sum).collect()
    };
    logits.chunks(model.vocab_size()).map(softmax).collect()
}

fn loaded(options: &LoadOptions) -> Model {
    let mut model = Model::load(Path::new(TINY_LLAMA), options, &mut |_, _| ()).unwrap();
    model.allocate_kv(CONTEXT_LEN.div_ceil(16)).unwrap();
    model
}

#[test]
fn figures_agree_with_a_naive_loop_over_the_reference() {
    let subject = LoadOptions { quantize: Quantize::Int4, ..options(BackendKind::Cpu) };
    let base = options(BackendKind::Reference);
    let report = measured(&request(&subject, Some(&base))).unwrap();

    let (mut model, mut base_model) = (loaded(&subject), loaded(&base));
    let (mut nlls, mut divergences, mut same) = (Vec::new(), Vec::new(), 0);
    for window in TEXT.as_bytes().chunks_exact(CONTEXT_LEN).take(NUM_WINDOWS) {
        let window: Vec<u32> = window.iter().map(|&byte| u32::from(byte)).collect();
        let (rows, base_rows) = (naive_rows(&mut model, &window), naive_rows(&mut base_model, &window));
        // The token at `place` is predicted by the row before it; the first of the second half has no row asked for.
        for place in CONTEXT_LEN / 2 + 1..CONTEXT_LEN {
            let (row, base_row) = (&rows[place - 1], &base_rows[place - 1]);
            nlls.push(-row[window[place] as usize].ln());
            divergences.push(base_row.iter().zip(row).map(|(p, q)| p * (p / q).ln()).sum::<f64>());
            let top = |row: &[f64]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            same += usize::from(top(row) == top(base_row));
        }
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let max = divergences.iter().copied().fold(0.0, f64::max);
    let comparison = report.comparison.unwrap();
    assert_eq!(report.num_scored_tokens, nlls.len());
    assert_eq!((report.num_windows, report.num_text_tokens), (NUM_WINDOWS, TEXT.len()));
    let close = |actual: f64, expected: f64| (actual - expected).abs() <= 1e-9 * (1.0 + expected.abs());
    assert!(close(report.perplexity.value, mean(&nlls).exp()), "{:?}", report.perplexity);
    // candle sums in an order of its own, but the same one in both loads.
    assert!(close(comparison.kl_divergence.mean.value, mean(&divergences)), "{comparison:?}");
    assert!(close(comparison.kl_divergence.max, max));
    assert!(close(comparison.same_top.value, same as f64 / nlls.len() as f64));
    assert!(mean(&divergences) > 1e-6, "int4 differs from f32");
}

#[test]
fn neither_steps_nor_threads_change_a_bit_and_a_setting_is_no_way_from_itself() {
    let (one, two) = (LoadOptions { threads: Some(1), ..options(BackendKind::Cpu) }, options(BackendKind::Cpu));
    let whole = measured(&request(&one, None)).unwrap();
    assert_eq!(whole.comparison, None);
    for max_num_batched_tokens in [1, 7, 24, 25] {
        let in_steps = measured(&PerplexityRequest { max_num_batched_tokens, ..request(&two, Some(&one)) }).unwrap();
        assert_eq!(in_steps.perplexity, whole.perplexity, "{max_num_batched_tokens}");
        let comparison = in_steps.comparison.unwrap();
        assert_eq!((comparison.kl_divergence.min, comparison.kl_divergence.max), (0.0, 0.0));
        assert_eq!((comparison.same_top.value, comparison.rms_delta_p.value), (1.0, 0.0));
    }
}

#[test]
fn progress_ends_at_the_last_window_with_the_final_figure() {
    let options = options(BackendKind::Cpu);
    let mut seen = Vec::new();
    let report = measure(&request(&options, None), &mut |progress| seen.push(progress)).unwrap();
    assert!(matches!(seen[0], Progress::Loading { done, total } if done <= total));
    let scored: Vec<usize> = seen
        .iter()
        .filter_map(|progress| match progress {
            Progress::Scoring { done, total, .. } => {
                assert_eq!(*total, NUM_WINDOWS);
                Some(*done)
            }
            Progress::Loading { .. } => None,
        })
        .collect();
    assert_eq!(scored, (1..=NUM_WINDOWS).collect::<Vec<_>>());
    let Some(Progress::Scoring { perplexity, .. }) = seen.last() else { panic!("{seen:?}") };
    assert!((perplexity - report.perplexity.value).abs() < 1e-9 * perplexity);
}

#[test]
fn what_cannot_be_scored_is_refused_with_value_limit_and_next_step() {
    let options = options(BackendKind::Cpu);
    let refused = |change: &dyn Fn(&mut PerplexityRequest<'_>)| {
        let mut request = request(&options, None);
        change(&mut request);
        measured(&request).unwrap_err().to_string()
    };
    let error = refused(&|request| request.text = "A few words.");
    assert!(error.contains("12 tokens") && error.contains("need 96") && error.contains("--ctx-size"), "{error}");
    let error = refused(&|request| request.context_len = 257);
    assert!(error.contains("257") && error.contains("8 to 256"), "{error}");
    assert!(refused(&|request| request.context_len = 7).contains("8 to 256"));
    let accents = "é".repeat(200);
    let mut foreign = request(&options, None);
    foreign.text = &accents;
    let error = measured(&foreign).unwrap_err().to_string();
    assert!(error.contains("token 195") && error.contains("first 128"), "{error}");
}
