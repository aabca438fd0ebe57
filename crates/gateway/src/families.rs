//! Metric families made by hand, of numbers that are counted elsewhere and only looked at when somebody asks for the metrics.
//!
//! Knows `prometheus`' forms and no metric.

use prometheus::proto::{self, LabelPair, MetricFamily, MetricType};

/// One label of a series.
pub fn label(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

/// Series of one name.
pub fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<proto::Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

/// A gauge with these labels.
pub fn gauge_of(labels: Vec<LabelPair>, value: f64) -> proto::Metric {
    let mut gauge = proto::Gauge::default();
    gauge.set_value(value);
    let mut metric = proto::Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}

/// A counter with these labels.
pub fn counter_of(labels: Vec<LabelPair>, value: f64) -> proto::Metric {
    let mut counter = proto::Counter::default();
    counter.set_value(value);
    let mut metric = proto::Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}
