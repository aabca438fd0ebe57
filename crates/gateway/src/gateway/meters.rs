//! What is told to whoever watches: requests, tokens and cost by tenant and place, calls upstream, what guardrails did.
//!
//! Numbers since the start, in memory: what holds after a restart is the ledger. It must not know how they are written. Labels are names
//! of the configuration and words of this crate, never what a client sent, so there is an end of them.

use std::time::Instant;

use prometheus::{
    CounterVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry,
    core::Collector,
    proto::{MetricFamily, MetricType},
};

use super::Gateway;
use crate::{
    config::{TenantConfig, UpstreamConfig},
    families::{counter_of, family, gauge_of, label},
    guardrails::{Action, GuardrailConfig, Side, Verdict},
    money::Money,
    providers::Usage,
    upstream::BreakerState,
};

/// The place of requests that run on this machine.
pub(super) const LOCAL: &str = "local";
/// The place of requests that run nowhere.
const NOWHERE: &str = "none";
/// Of a request's end; every refusal's own code counts as `refused`.
const OUTCOMES: [&str; 4] = ["completed", "cancelled", "failed", "refused"];
const TOKEN_KINDS: [&str; 4] = ["prompt", "cached", "completion", "reasoning"];
const BREAKER_STATES: [(BreakerState, &str); 3] =
    [(BreakerState::Closed, "closed"), (BreakerState::HalfOpen, "half_open"), (BreakerState::Open, "open")];
/// With more tenants and places than this makes, a series begins with its first count instead of at zero.
const MAX_SERIES_AT_ZERO: usize = 10_000;
/// Seconds. A call is as long as its answer.
const CALL_BOUNDS: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 900.0];

/// The counters.
pub(super) struct Meters {
    registry: Registry,
    requests: IntCounterVec,
    tokens: IntCounterVec,
    cost: CounterVec,
    reference_cost: CounterVec,
    verdicts: IntCounterVec,
    calls: IntCounterVec,
    call_time: HistogramVec,
}

/// Whose a call is, and since when it runs.
pub(super) struct CallMeter {
    gateway: Gateway,
    tenant: String,
    sent: Instant,
}

impl Meters {
    /// All at zero, for tenants by their ids.
    pub(super) fn new(tenants: &[&str], upstreams: &[UpstreamConfig], guardrails: &[GuardrailConfig]) -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let dollars = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, CounterVec::new(Opts::new(name, help), labels))
        };
        let call_time = HistogramOpts::new("bindery_upstream_call_seconds", "From a call to the end of its answer")
            .buckets(CALL_BOUNDS.to_vec());
        let meters = Self {
            requests: counter(
                "bindery_requests_total",
                "Generation requests by tenant, the place where they ran (none: they were turned away) and how they ended",
                &["tenant", "place", "outcome"],
            ),
            tokens: counter(
                "bindery_tenant_tokens_total",
                "Tokens by tenant, place and kind; cached are among prompt, reasoning among completion",
                &["tenant", "place", "kind"],
            ),
            cost: dollars("bindery_cost_dollars_total", "What requests cost", &["tenant", "place"]),
            reference_cost: dollars(
                "bindery_reference_cost_dollars_total",
                "What requests that ran here would have cost at the reference model's price",
                &["tenant"],
            ),
            verdicts: counter(
                "bindery_guardrail_verdicts_total",
                "Texts in which guardrails found something, and what they did",
                &["guardrail", "side", "action"],
            ),
            calls: counter(
                "bindery_upstream_calls_total",
                "Calls to upstreams, judges' questions among them, and how they ended; a request may need several",
                &["upstream", "outcome"],
            ),
            call_time: registered(&registry, HistogramVec::new(call_time, &["upstream"])),
            registry,
        };
        let upstreams: Vec<&str> = upstreams.iter().map(|upstream| &*upstream.name).collect();
        for upstream in &upstreams {
            meters.call_time.with_label_values(&[upstream]);
            for outcome in ["completed", "cancelled", "failed"] {
                meters.calls.with_label_values(&[upstream, outcome]);
            }
        }
        for guardrail in guardrails {
            for &side in guardrail.on.as_deref().unwrap_or(&[Side::Prompt, Side::Answer]) {
                meters.verdicts.with_label_values(&[&*guardrail.name, side_word(side), action_word(guardrail.action)]);
            }
        }
        meters.begin_at_zero(tenants, &upstreams);
        meters
    }

    fn begin_at_zero(&self, tenants: &[&str], upstreams: &[&str]) {
        let num_places = upstreams.len() + 2;
        if tenants.len() * num_places * (OUTCOMES.len() + TOKEN_KINDS.len()) > MAX_SERIES_AT_ZERO {
            return;
        }
        for tenant in tenants {
            self.reference_cost.with_label_values(&[tenant]);
            for place in upstreams.iter().chain(&[LOCAL]) {
                self.cost.with_label_values(&[tenant, place]);
                for kind in TOKEN_KINDS {
                    self.tokens.with_label_values(&[tenant, place, kind]);
                }
            }
            for place in upstreams.iter().chain(&[LOCAL, NOWHERE]) {
                for outcome in OUTCOMES {
                    self.requests.with_label_values(&[tenant, place, outcome]);
                }
            }
        }
    }

    /// A request has ended; an empty place is none.
    pub(super) fn request<'a>(
        &self,
        tenant: &str,
        place: &str,
        outcome: &str,
        verdicts: impl IntoIterator<Item = &'a Verdict>,
    ) {
        let place = if place.is_empty() { NOWHERE } else { place };
        let outcome = OUTCOMES.iter().find(|known| **known == outcome).unwrap_or(&"refused");
        self.requests.with_label_values(&[tenant, place, outcome]).inc();
        for verdict in verdicts {
            let labels = [&*verdict.guardrail, side_word(verdict.side), action_word(verdict.action)];
            self.verdicts.with_label_values(&labels).inc();
        }
    }

    /// A tenant has had so much at a place.
    pub(super) fn spend(&self, tenant: &str, place: &str, usage: &Usage, price: Money) {
        let counts = [usage.prompt, usage.cached, usage.completion, usage.reasoning];
        for (kind, count) in TOKEN_KINDS.iter().zip(counts) {
            self.tokens.with_label_values(&[tenant, place, kind]).inc_by(count);
        }
        self.cost.with_label_values(&[tenant, place]).inc_by(dollars(price));
    }

    /// What a request that ran here would have cost elsewhere.
    pub(super) fn save(&self, tenant: &str, reference_price: Money) {
        self.reference_cost.with_label_values(&[tenant]).inc_by(dollars(reference_price));
    }
}

impl CallMeter {
    /// From now on.
    pub(super) fn new(gateway: Gateway, tenant: &TenantConfig) -> Self {
        Self { gateway, tenant: tenant.id.to_string(), sent: Instant::now() }
    }

    /// The call has ended.
    pub(super) fn end(self, upstream: &str, outcome: &str, usage: &Usage, price: Money) {
        let meters = &self.gateway.0.meters;
        meters.calls.with_label_values(&[upstream, outcome]).inc();
        meters.call_time.with_label_values(&[upstream]).observe(self.sent.elapsed().as_secs_f64());
        meters.spend(&self.tenant, upstream, usage, price);
    }
}

impl Gateway {
    /// Everything that is counted, for `/metrics`.
    pub fn metrics(&self) -> Vec<MetricFamily> {
        let mut families = self.0.meters.registry.gather();
        families.push(self.breakers());
        families.extend(self.ledger_families());
        families
    }

    /// One series a state, of which one is 1.
    fn breakers(&self) -> MetricFamily {
        let mut metrics = Vec::new();
        for (name, live) in &self.0.upstreams {
            let now = live.health.state();
            for (state, word) in BREAKER_STATES {
                let labels = vec![label("upstream", name), label("state", word)];
                metrics.push(gauge_of(labels, f64::from(u8::from(state == now))));
            }
        }
        let help = "Whether requests pass to an upstream (closed), none does (open) or one at a time (half_open)";
        family("bindery_upstream_state", help, MetricType::GAUGE, metrics)
    }

    fn ledger_families(&self) -> Vec<MetricFamily> {
        let Some(counts) = self.ledger_counts() else { return Vec::new() };
        let counter = |name: &str, help: &str, value: f64| {
            family(name, help, MetricType::COUNTER, vec![counter_of(Vec::new(), value)])
        };
        let waiting = gauge_of(Vec::new(), counts.leftovers as f64);
        let overrun = Money::from_nanos(i64::try_from(counts.overrun_nanos).unwrap_or(i64::MAX));
        vec![
            counter("bindery_ledger_overruns_total", "Calls that cost more than was reserved", counts.overruns as f64),
            counter("bindery_ledger_overrun_dollars_total", "By how much, together", dollars(overrun)),
            counter(
                "bindery_ledger_unsettled_total",
                "Calls that were charged in full since nobody settled them",
                counts.unsettled as f64,
            ),
            counter(
                "bindery_ledger_lost_rows_total",
                "Rows of local requests that the store has not taken and never will",
                counts.lost as f64,
            ),
            family("bindery_ledger_leftovers", "Calls that wait to be settled", MetricType::GAUGE, vec![waiting]),
        ]
    }
}

/// Names and labels of this file are constant and tested, so neither making nor registering a metric can fail.
fn registered<C: Collector + Clone + 'static>(registry: &Registry, collector: prometheus::Result<C>) -> C {
    let collector = collector.expect("the metric's name and labels are valid");
    registry.register(Box::new(collector.clone())).expect("the metric's name is used once");
    collector
}

fn dollars(money: Money) -> f64 {
    const NANOS_PER_DOLLAR: f64 = 1e9;
    money.nanos().max(0) as f64 / NANOS_PER_DOLLAR
}

fn side_word(side: Side) -> &'static str {
    match side {
        Side::Prompt => "prompt",
        Side::Answer => "answer",
    }
}

fn action_word(action: Action) -> &'static str {
    match action {
        Action::Block => "block",
        Action::Redact => "redact",
        Action::RouteLocal => "route_local",
        Action::Flag => "flag",
    }
}
