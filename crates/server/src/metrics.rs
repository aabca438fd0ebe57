//! Prometheus: vLLM's names, so that its dashboards and the endpoint pickers built on them work, and `bindery_…` for
//! what it lacks.
//!
//! Levels and totals of the engine come from its snapshot when somebody scrapes; times of a request are observed here
//! when they happen. Invariant: every series exists from the start, at zero, also while the model loads.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::Method;
use bindery_engine::{
    EngineStats,
    adapters::AdapterUse,
    engine::{ITERATION_TOKENS_BOUNDS, STEP_PHASES},
};
use bindery_gateway::{
    families::{counter_of, family, gauge_of, label},
    gateway::Gateway,
};
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounterVec, Opts, Registry, TextEncoder,
    proto::{self, LabelPair, MetricFamily, MetricType},
};

/// vLLM's bounds, so that its dashboards' quantiles mean the same here.
const TIME_TO_FIRST_TOKEN_BOUNDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const INTER_TOKEN_LATENCY_BOUNDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST_LATENCY_BOUNDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

/// The routes and methods whose counters exist from the start.
const ROUTES: &[(&str, &str)] = &[
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{*id}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
];

/// How one choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stop,
    Length,
    Abort,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Stop, Self::Length, Self::Abort];

    fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// The registry and what is observed here.
pub(crate) struct Metrics {
    registry: Registry,
    model_name: String,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token_latency: Histogram,
    pub(crate) request_latency: Histogram,
    pub(crate) queue_time: Histogram,
    pub(crate) prefill_time: Histogram,
    pub(crate) decode_time: Histogram,
    success: IntCounterVec,
    http_requests: IntCounterVec,
}

impl Metrics {
    pub(crate) fn new(model_name: &str) -> Self {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, bounds: &[f64]| {
            let options = HistogramOpts::new(name, help).const_label("model_name", model_name).buckets(bounds.to_vec());
            registered(&registry, Histogram::with_opts(options))
        };
        let success = registered(
            &registry,
            IntCounterVec::new(
                Opts::new("vllm:request_success_total", "Choices that ended, by how")
                    .const_label("model_name", model_name),
                &["finished_reason"],
            ),
        );
        for outcome in Outcome::ALL {
            success.with_label_values(&[outcome.as_str()]);
        }
        let http_requests = registered(
            &registry,
            IntCounterVec::new(
                Opts::new("bindery_http_requests_total", "Requests by method, route and status; 499: the client left"),
                &["method", "route", "status"],
            ),
        );
        for (method, route) in ROUTES {
            http_requests.with_label_values(&[method, route, &"200"]);
        }
        Self {
            time_to_first_token: histogram(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token",
                TIME_TO_FIRST_TOKEN_BOUNDS,
            ),
            inter_token_latency: histogram(
                "vllm:inter_token_latency_seconds",
                "Between two pieces of one choice",
                INTER_TOKEN_LATENCY_BOUNDS,
            ),
            request_latency: histogram(
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to its last token",
                REQUEST_LATENCY_BOUNDS,
            ),
            queue_time: histogram(
                "vllm:request_queue_time_seconds",
                "From a request's arrival in the queue to its first step",
                REQUEST_LATENCY_BOUNDS,
            ),
            prefill_time: histogram(
                "vllm:request_prefill_time_seconds",
                "From a request's first step to its first token",
                REQUEST_LATENCY_BOUNDS,
            ),
            decode_time: histogram(
                "vllm:request_decode_time_seconds",
                "From a request's first token to its last",
                REQUEST_LATENCY_BOUNDS,
            ),
            success,
            http_requests,
            model_name: model_name.to_owned(),
            registry,
        }
    }

    pub(crate) fn count_choice(&self, outcome: Outcome) {
        self.success.with_label_values(&[outcome.as_str()]).inc();
    }

    pub(crate) fn count_http_request(&self, method: &Method, route: &str, status: u16) {
        // A client may invent methods: only the usual ones become labels.
        let method = match *method {
            Method::GET | Method::POST | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS => {
                method.as_str()
            }
            _ => "other",
        };
        self.http_requests.with_label_values(&[method, route, &status.to_string()]).inc();
    }

    /// The text format; `stats` is absent while there is no engine.
    ///
    /// # Errors
    /// Where a family of metrics cannot be written, which is a mistake of this program.
    pub(crate) fn render(
        &self,
        stats: Option<&EngineStats>,
        adapters: &AdapterLabels,
        gateway: Option<&Gateway>,
    ) -> prometheus::Result<String> {
        let idle = EngineStats::default();
        let mut families = self.engine_families(stats.unwrap_or(&idle), adapters);
        families.extend(self.registry.gather());
        families.extend(gateway.map(Gateway::metrics).unwrap_or_default());
        // The encoder refuses all for one that has no series (yet).
        families.retain(|family| !family.get_metric().is_empty());
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// The engine's snapshot as metric families.
    fn engine_families(&self, stats: &EngineStats, adapters: &AdapterLabels) -> Vec<MetricFamily> {
        let model = || vec![label("model_name", &self.model_name)];
        let gauge = |name, help, value: f64| family(name, help, MetricType::GAUGE, vec![gauge_of(model(), value)]);
        let counter =
            |name, help, value: u64| family(name, help, MetricType::COUNTER, vec![counter_of(model(), value as f64)]);
        let usage = if stats.num_blocks == 0 { 0.0 } else { stats.num_used_blocks as f64 / stats.num_blocks as f64 };
        let cache_labels = vec![
            label("block_size", &stats.block_size.to_string()),
            label("num_gpu_blocks", &stats.num_blocks.to_string()),
        ];
        let lora_labels = vec![
            label("max_lora", &adapters.max_loras.to_string()),
            label("running_lora_adapters", &adapters.in_use.running.join(",")),
            label("waiting_lora_adapters", &adapters.in_use.waiting.join(",")),
        ];
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64();
        vec![
            gauge("vllm:num_requests_running", "Requests in the batch", stats.num_requests_running as f64),
            gauge(
                "vllm:num_requests_waiting",
                "Requests that wait to join the batch",
                (stats.num_requests_waiting + adapters.in_use.num_waiting) as f64,
            ),
            gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use: 1 is all", usage),
            counter(
                "vllm:prefix_cache_queries_total",
                "Tokens looked up in the prefix cache",
                stats.prefix_cache_queries,
            ),
            counter("vllm:prefix_cache_hits_total", "Tokens found in the prefix cache", stats.prefix_cache_hits),
            counter("vllm:num_preemptions_total", "Times a sequence gave its blocks back", stats.num_preemptions),
            counter("vllm:prompt_tokens_total", "Prompt tokens computed", stats.prompt_tokens),
            counter("vllm:generation_tokens_total", "Tokens generated", stats.generation_tokens),
            family(
                "vllm:iteration_tokens_total",
                "Tokens in one step",
                MetricType::HISTOGRAM,
                vec![iteration_tokens(model(), stats)],
            ),
            family(
                "vllm:cache_config_info",
                "The KV cache's shape, in labels",
                MetricType::GAUGE,
                vec![gauge_of(cache_labels, 1.0)],
            ),
            family(
                "vllm:lora_requests_info",
                "Adapters in use, in labels; the value is a timestamp",
                MetricType::GAUGE,
                vec![gauge_of(lora_labels, now)],
            ),
            gauge(
                "bindery_kv_slots_wasted",
                "Slots of allocated KV blocks that hold nothing",
                stats.num_unused_slots as f64,
            ),
            counter("bindery_steps_total", "Steps of the engine", stats.num_steps),
            counter("bindery_failed_steps_total", "Steps of the engine that failed", stats.num_failed_steps),
            counter(
                "bindery_logit_steps_total",
                "Steps with rows whose logits could be asked for",
                stats.num_logit_steps,
            ),
            counter("bindery_logit_rows_total", "Rows whose logits could be asked for", stats.num_logit_rows),
            counter(
                "bindery_attention_read_bytes_total",
                "Bytes of keys and values that attention had to read",
                stats.attention.read_bytes,
            ),
            counter(
                "bindery_attention_operations_total",
                "Operations of attention's products, two a multiply-add",
                stats.attention.operations,
            ),
            family(
                "bindery_step_phase_seconds_total",
                "Seconds the engine spent in each phase of its steps",
                MetricType::COUNTER,
                self.phase_metrics(stats),
            ),
        ]
    }

    fn phase_metrics(&self, stats: &EngineStats) -> Vec<proto::Metric> {
        let of = |phase: &str, seconds| {
            counter_of(vec![label("model_name", &self.model_name), label("phase", phase)], seconds)
        };
        STEP_PHASES.iter().zip(stats.phase_seconds).map(|(phase, seconds)| of(phase, seconds)).collect()
    }
}

/// What `vllm:lora_requests_info` says in its labels.
#[derive(Clone, Debug, Default)]
pub(crate) struct AdapterLabels {
    pub(crate) max_loras: usize,
    pub(crate) in_use: AdapterUse,
}

/// Names and labels of this file are constant and tested, so neither making nor registering a metric can fail.
fn registered<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("the metric's name and labels are valid");
    registry.register(Box::new(collector.clone())).expect("the metric's name is used once");
    collector
}

fn iteration_tokens(labels: Vec<LabelPair>, stats: &EngineStats) -> proto::Metric {
    let counts = &stats.iteration_tokens_counts;
    let mut cumulative = 0;
    let buckets = ITERATION_TOKENS_BOUNDS.iter().zip(counts).map(|(bound, count)| {
        cumulative += count;
        let mut bucket = proto::Bucket::default();
        bucket.set_upper_bound(*bound);
        bucket.set_cumulative_count(cumulative);
        bucket
    });
    let mut histogram = proto::Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(counts.iter().sum());
    histogram.set_sample_sum(stats.iteration_tokens_sum as f64);
    let mut metric = proto::Metric::from_label(labels);
    metric.set_histogram(histogram);
    metric
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use bindery_model::AttentionWork;

    use super::*;

    #[test]
    fn every_metric_of_the_contract_exists_at_zero_without_an_engine() {
        let text = Metrics::new("m").render(None, &AdapterLabels::default(), None).unwrap();
        for name in [
            "vllm:num_requests_running{model_name=\"m\"} 0",
            "vllm:num_requests_waiting{model_name=\"m\"} 0",
            "vllm:kv_cache_usage_perc{model_name=\"m\"} 0",
            "vllm:prefix_cache_queries_total{model_name=\"m\"} 0",
            "vllm:prefix_cache_hits_total{model_name=\"m\"} 0",
            "vllm:num_preemptions_total{model_name=\"m\"} 0",
            "vllm:prompt_tokens_total{model_name=\"m\"} 0",
            "vllm:generation_tokens_total{model_name=\"m\"} 0",
            "vllm:request_success_total{finished_reason=\"stop\",model_name=\"m\"} 0",
            "vllm:request_success_total{finished_reason=\"length\",model_name=\"m\"} 0",
            "vllm:request_success_total{finished_reason=\"abort\",model_name=\"m\"} 0",
            "vllm:time_to_first_token_seconds_count{model_name=\"m\"} 0",
            "vllm:inter_token_latency_seconds_count{model_name=\"m\"} 0",
            "vllm:e2e_request_latency_seconds_count{model_name=\"m\"} 0",
            "vllm:request_queue_time_seconds_count{model_name=\"m\"} 0",
            "vllm:request_prefill_time_seconds_count{model_name=\"m\"} 0",
            "vllm:request_decode_time_seconds_count{model_name=\"m\"} 0",
            "vllm:iteration_tokens_total_count{model_name=\"m\"} 0",
            "vllm:iteration_tokens_total_bucket{model_name=\"m\",le=\"+Inf\"} 0",
            "vllm:cache_config_info{block_size=\"0\",num_gpu_blocks=\"0\"} 1",
            "vllm:lora_requests_info{max_lora=\"0\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} ",
            "bindery_kv_slots_wasted{model_name=\"m\"} 0",
            "bindery_step_phase_seconds_total{model_name=\"m\",phase=\"attention\"} 0",
            "bindery_attention_read_bytes_total{model_name=\"m\"} 0",
            "bindery_attention_operations_total{model_name=\"m\"} 0",
            "bindery_logit_steps_total{model_name=\"m\"} 0",
            "bindery_logit_rows_total{model_name=\"m\"} 0",
            "bindery_http_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"200\"} 0",
        ] {
            assert!(text.lines().any(|line| line.starts_with(name)), "{name} is not in\n{text}");
        }
    }

    #[test]
    fn the_step_histogram_is_cumulative_and_includes_what_is_over_all_bounds() {
        let mut iteration_tokens_counts = [0; ITERATION_TOKENS_BOUNDS.len() + 1];
        iteration_tokens_counts[..2].copy_from_slice(&[3, 2]);
        iteration_tokens_counts[ITERATION_TOKENS_BOUNDS.len()] = 1;
        let stats = EngineStats { iteration_tokens_counts, iteration_tokens_sum: 40, ..EngineStats::default() };
        let text = Metrics::new("m").render(Some(&stats), &AdapterLabels::default(), None).unwrap();
        for line in [
            "vllm:iteration_tokens_total_bucket{model_name=\"m\",le=\"1\"} 3",
            "vllm:iteration_tokens_total_bucket{model_name=\"m\",le=\"8\"} 5",
            "vllm:iteration_tokens_total_bucket{model_name=\"m\",le=\"16384\"} 5",
            "vllm:iteration_tokens_total_bucket{model_name=\"m\",le=\"+Inf\"} 6",
            "vllm:iteration_tokens_total_sum{model_name=\"m\"} 40",
            "vllm:iteration_tokens_total_count{model_name=\"m\"} 6",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn what_steps_had_to_do_is_told_apart() {
        let attention = AttentionWork { read_bytes: 3, operations: 4 };
        let stats = EngineStats { num_logit_steps: 1, num_logit_rows: 2, attention, ..EngineStats::default() };
        let text = Metrics::new("m").render(Some(&stats), &AdapterLabels::default(), None).unwrap();
        let names = ["logit_steps", "logit_rows", "attention_read_bytes", "attention_operations"];
        for (index, name) in names.into_iter().enumerate() {
            let line = format!("bindery_{name}_total{{model_name=\"m\"}} {}", index + 1);
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn usage_is_a_share_of_the_blocks() {
        let stats = EngineStats { num_blocks: 8, num_used_blocks: 2, block_size: 16, ..EngineStats::default() };
        let text = Metrics::new("m").render(Some(&stats), &AdapterLabels::default(), None).unwrap();
        assert!(text.contains("vllm:kv_cache_usage_perc{model_name=\"m\"} 0.25"), "{text}");
        assert!(text.contains("vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"8\"} 1"), "{text}");
    }
}
