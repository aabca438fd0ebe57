//! From rounds to figures, and from figures to a table or JSON. Pure: it measures nothing itself.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use bindery_model::{ModelInfo, Roofs};
use comfy_table::{Cell, CellAlignment};
use serde_json::{Value, json};

use super::{
    load::{Arrivals, Round},
    profile::{self, Profile},
    roofline,
};
use crate::commands::models::{plain_table, show};

/// Rounds further apart than this share of their median are not to be trusted.
const NOISY_SPREAD: f64 = 0.10;

/// Percentiles of one quantity, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
}

impl Percentiles {
    /// By nearest rank: each is a value that occurred. Zeros where there is none.
    pub(crate) fn of(values: impl Iterator<Item = Duration>) -> Self {
        let mut sorted: Vec<f64> = values.map(|value| value.as_secs_f64() * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            let rank = (percent * sorted.len()).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or(0.0)
        };
        Self { p50: at(50), p95: at(95), p99: at(99) }
    }

    fn json(self) -> Value {
        json!({"p50": self.p50, "p95": self.p95, "p99": self.p99})
    }
}

/// The figures of one row: one server under one load.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) server: usize,
    pub(crate) arrivals: Arrivals,
    pub(crate) num_answered: usize,
    pub(crate) failures: BTreeMap<String, usize>,
    /// Per round.
    pub(crate) output_tokens_per_second: Vec<f64>,
    pub(crate) requests_per_second: f64,
    pub(crate) first_ms: Percentiles,
    pub(crate) gap_ms: Percentiles,
    pub(crate) whole_ms: Percentiles,
    pub(crate) mean_prompt_tokens: f64,
    pub(crate) mean_output_tokens: f64,
    /// Of each round alone, for ratios.
    first_ms_by_round: Vec<f64>,
    gap_ms_by_round: Vec<f64>,
}

impl Row {
    pub(crate) fn of(server: usize, arrivals: Arrivals, rounds: &[Round]) -> Self {
        let answered = || rounds.iter().flat_map(|round| &round.answered);
        let num_answered = answered().count();
        let mut failures = BTreeMap::new();
        for failure in rounds.iter().flat_map(|round| &round.failures) {
            *failures.entry(failure.clone()).or_default() += 1;
        }
        let per_second = |round: &Round, amount: u64| amount as f64 / round.wall.as_secs_f64().max(1e-9);
        let mean = |total: u64| if num_answered == 0 { 0.0 } else { total as f64 / num_answered as f64 };
        Self {
            server,
            arrivals,
            num_answered,
            failures,
            output_tokens_per_second: rounds
                .iter()
                .map(|round| per_second(round, round.answered.iter().map(|timing| timing.output_tokens).sum()))
                .collect(),
            requests_per_second: median(
                &rounds.iter().map(|round| per_second(round, round.answered.len() as u64)).collect::<Vec<_>>(),
            ),
            first_ms: Percentiles::of(answered().map(|timing| timing.first)),
            gap_ms: Percentiles::of(answered().flat_map(|timing| timing.gaps.iter().copied())),
            whole_ms: Percentiles::of(answered().map(|timing| timing.whole)),
            mean_prompt_tokens: mean(answered().map(|timing| timing.prompt_tokens).sum()),
            mean_output_tokens: mean(answered().map(|timing| timing.output_tokens).sum()),
            first_ms_by_round: rounds
                .iter()
                .map(|round| Percentiles::of(round.answered.iter().map(|t| t.first)).p50)
                .collect(),
            gap_ms_by_round: rounds
                .iter()
                .map(|round| Percentiles::of(round.answered.iter().flat_map(|t| t.gaps.iter().copied())).p50)
                .collect(),
        }
    }

    fn num_failed(&self) -> usize {
        self.failures.values().sum()
    }

    /// (largest - smallest) / median of the rounds' output rates; None for a single round.
    pub(crate) fn spread(&self) -> Option<f64> {
        let rates = &self.output_tokens_per_second;
        if rates.len() < 2 {
            return None;
        }
        let largest = rates.iter().copied().fold(f64::MIN, f64::max);
        let smallest = rates.iter().copied().fold(f64::MAX, f64::min);
        Some((largest - smallest) / median(rates).max(1e-9))
    }

    fn is_noisy(&self) -> bool {
        self.spread().is_some_and(|spread| spread > NOISY_SPREAD)
    }

    fn load_name(&self) -> String {
        match self.arrivals {
            Arrivals::Clients(clients) => clients.to_string(),
            Arrivals::Rate(rate) => format!("{rate}/s"),
        }
    }
}

/// A over B, round by round, then the median.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ratio {
    pub(crate) output: f64,
    pub(crate) first: f64,
    pub(crate) gap: f64,
}

impl Ratio {
    pub(crate) fn of(a: &Row, b: &Row) -> Self {
        let ratio = |a: &[f64], b: &[f64]| {
            let pairs: Vec<f64> = a.iter().zip(b).filter(|(_, b)| **b > 0.0).map(|(a, b)| a / b).collect();
            median(&pairs)
        };
        Self {
            output: ratio(&a.output_tokens_per_second, &b.output_tokens_per_second),
            first: ratio(&a.first_ms_by_round, &b.first_ms_by_round),
            gap: ratio(&a.gap_ms_by_round, &b.gap_ms_by_round),
        }
    }
}

/// 0 for nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[length / 2],
        length => f64::midpoint(sorted[length / 2 - 1], sorted[length / 2]),
    }
}

/// All that was measured.
pub(crate) struct Report {
    /// Label, URL, model.
    pub(crate) servers: Vec<(&'static str, String, String)>,
    /// For each load: the servers' rows in order.
    pub(crate) rows: Vec<Vec<Row>>,
    /// Of the first server, by load; empty unless asked for.
    pub(crate) profiles: Vec<(String, Profile)>,
    /// Where the model ran in this process and it was asked for: the roofs beside each of `profiles`.
    pub(crate) roofline: Option<(ModelInfo, Vec<Roofs>)>,
    pub(crate) settings: Value,
    pub(crate) output_tokens: u32,
}

impl Report {
    pub(crate) fn table(&self) -> String {
        let is_comparison = self.servers.len() > 1;
        let mut text = String::new();
        for (label, url, model) in &self.servers {
            let label = if is_comparison { format!("{label}: ") } else { String::new() };
            let _ = writeln!(text, "{label}{model} at {url}");
        }
        let is_open = self.rows.iter().flatten().any(|row| matches!(row.arrivals, Arrivals::Rate(_)));
        let mut table = plain_table();
        let mut header = vec![if is_open { "RATE" } else { "CLIENTS" }];
        header.extend(is_comparison.then_some("SERVER"));
        header.extend([
            "ANSWERED",
            "FAILED",
            "OUT TOK/S",
            "REQ/S",
            "TTFT ms p50 p95 p99",
            "ITL ms p50 p95 p99",
            "E2E s p50 p95 p99",
        ]);
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        table.set_header(header.into_iter().map(|name| right(name.to_owned())));
        for rows in &self.rows {
            for row in rows {
                let mut cells = vec![row.load_name()];
                cells.extend(is_comparison.then(|| self.servers[row.server].0.to_owned()));
                cells.extend([
                    row.num_answered.to_string(),
                    row.num_failed().to_string(),
                    format!("{:.1}", median(&row.output_tokens_per_second)),
                    format!("{:.2}", row.requests_per_second),
                    three(row.first_ms, 1.0),
                    three(row.gap_ms, 1.0),
                    three(row.whole_ms, 1e3),
                ]);
                table.add_row(cells.into_iter().map(right));
            }
            if let [a, b] = rows.as_slice() {
                let ratio = Ratio::of(a, b);
                let cells = [
                    a.load_name(),
                    "A/B".to_owned(),
                    String::new(),
                    String::new(),
                    format!("x {:.2}", ratio.output),
                    String::new(),
                    format!("x {:.2}", ratio.first),
                    format!("x {:.2}", ratio.gap),
                    String::new(),
                ];
                table.add_row(cells.into_iter().map(right));
            }
        }
        let _ = writeln!(text, "\n{}", show(&mut table));
        text.push_str(&profile::table(&self.profiles));
        if let Some((info, roofs)) = &self.roofline {
            text.push_str(&roofline::table(info, &self.profiles, roofs));
        }
        text
    }

    /// Why not to trust a figure, and what failed.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for row in self.rows.iter().flatten() {
            let place = if self.servers.len() > 1 {
                format!("{} at {}", self.servers[row.server].0, row.load_name())
            } else {
                row.load_name()
            };
            if let Some(spread) = row.spread().filter(|_| row.is_noisy()) {
                warnings.push(format!(
                    "{place}: noisy, output tokens a second varied by {:.0} % between rounds; \
                     let the machine rest, or raise --num-requests",
                    spread * 100.0
                ));
            }
            if row.num_answered > 0 && (row.mean_output_tokens - f64::from(self.output_tokens)).abs() > 0.5 {
                warnings.push(format!(
                    "{place}: answers have {:.1} tokens on average instead of {}: the server does not honour ignore_eos, \
                     or its context is too short",
                    row.mean_output_tokens, self.output_tokens
                ));
            }
            let mut failures: Vec<_> = row.failures.iter().collect();
            failures.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            for (failure, count) in failures.into_iter().take(3) {
                warnings.push(format!("{place}: {count} failed: {failure}"));
            }
        }
        warnings
    }

    pub(crate) fn json(&self) -> Value {
        let servers: Vec<Value> = self
            .servers
            .iter()
            .map(|(label, url, model)| json!({"label": label, "url": url, "model": model}))
            .collect();
        let rows: Vec<Value> = self.rows.iter().flatten().map(|row| self.row_json(row)).collect();
        let ratios: Vec<Value> = self
            .rows
            .iter()
            .filter_map(|rows| match rows.as_slice() {
                [a, b] => {
                    let ratio = Ratio::of(a, b);
                    Some(json!({
                        "load": load_json(a.arrivals), "output_tokens_per_second": ratio.output,
                        "ttft_p50": ratio.first, "inter_token_p50": ratio.gap,
                    }))
                }
                _ => None,
            })
            .collect();
        json!({
            "bindery": env!("CARGO_PKG_VERSION"), "settings": self.settings, "servers": servers, "rows": rows,
            "ratios_a_over_b": ratios,
            "profiles": self.profiles.iter().map(|(load, profile)| json!({"load": load, "steps_of_a": profile.json()})).collect::<Vec<_>>(),
            "roofline": self.roofline.as_ref().map(|(info, roofs)| roofline::json(info, &self.profiles, roofs)),
        })
    }

    fn row_json(&self, row: &Row) -> Value {
        json!({
            "server": self.servers[row.server].0, "load": load_json(row.arrivals),
            "answered": row.num_answered, "failed": row.num_failed(), "failures": row.failures,
            "output_tokens_per_second": median(&row.output_tokens_per_second),
            "output_tokens_per_second_by_round": row.output_tokens_per_second,
            "requests_per_second": row.requests_per_second, "spread": row.spread(), "is_noisy": row.is_noisy(),
            "ttft_ms": row.first_ms.json(), "inter_token_ms": row.gap_ms.json(), "e2e_ms": row.whole_ms.json(),
            "mean_prompt_tokens": row.mean_prompt_tokens, "mean_output_tokens": row.mean_output_tokens,
        })
    }
}

fn load_json(arrivals: Arrivals) -> Value {
    match arrivals {
        Arrivals::Clients(clients) => json!({"clients": clients}),
        Arrivals::Rate(rate) => json!({"requests_per_second": rate}),
    }
}

fn three(percentiles: Percentiles, divisor: f64) -> String {
    let show = |value: f64| match value / divisor {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    };
    format!("{} {} {}", show(percentiles.p50), show(percentiles.p95), show(percentiles.p99))
}

#[cfg(test)]
mod tests {
    use super::{super::load::Timing, *};

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    fn round(first_ms: &[u64], wall_ms: u64) -> Round {
        let answered = first_ms
            .iter()
            .map(|first| Timing {
                first: ms(*first),
                gaps: vec![ms(2), ms(4)],
                whole: ms(first + 6),
                prompt_tokens: 5,
                output_tokens: 3,
            })
            .collect();
        Round { answered, failures: Vec::new(), wall: ms(wall_ms) }
    }

    #[test]
    fn percentiles_are_exact_by_nearest_rank() {
        let p = Percentiles::of((1..=100).rev().map(ms));
        assert_eq!(p, Percentiles { p50: 50.0, p95: 95.0, p99: 99.0 });
        let p = Percentiles::of([3, 1, 2].into_iter().map(ms));
        assert_eq!(p, Percentiles { p50: 2.0, p95: 3.0, p99: 3.0 });
        assert_eq!(Percentiles::of(std::iter::empty()), Percentiles::default());
    }

    #[test]
    fn a_row_adds_up_its_rounds() {
        let mut rounds = vec![round(&[10, 20], 1000), round(&[30, 40], 500), round(&[50], 1000)];
        rounds[2].failures = vec!["503: full".into(), "503: full".into()];
        let row = Row::of(0, Arrivals::Clients(2), &rounds);
        assert_eq!((row.num_answered, row.num_failed()), (5, 2));
        assert_eq!(row.output_tokens_per_second, [6.0, 12.0, 3.0]);
        assert_eq!(median(&row.output_tokens_per_second), 6.0);
        assert_eq!(row.requests_per_second, 2.0);
        assert_eq!(row.first_ms.p50, 30.0);
        assert_eq!(row.gap_ms, Percentiles { p50: 2.0, p95: 4.0, p99: 4.0 });
        assert_eq!((row.mean_prompt_tokens, row.mean_output_tokens), (5.0, 3.0));
        assert_eq!(row.spread(), Some(1.5));
        assert!(row.is_noisy());
        assert_eq!(row.failures["503: full"], 2);
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let a = Row::of(0, Arrivals::Clients(1), &[round(&[10], 100), round(&[10], 200), round(&[10], 400)]);
        let b = Row::of(1, Arrivals::Clients(1), &[round(&[20], 200), round(&[20], 400), round(&[5], 100)]);
        // Rates of A: 30, 15, 7.5; of B: 15, 7.5, 30: ratios 2, 2, 0.25.
        assert_eq!(Ratio::of(&a, &b), Ratio { output: 2.0, first: 0.5, gap: 1.0 });
    }

    #[test]
    fn quiet_rounds_are_not_called_noisy_and_one_round_says_nothing() {
        let quiet = Row::of(0, Arrivals::Rate(2.0), &[round(&[1], 1000), round(&[1], 1050)]);
        assert!(!quiet.is_noisy());
        assert_eq!(Row::of(0, Arrivals::Rate(2.0), &[round(&[1], 1000)]).spread(), None);
    }
}
