//! The tables that `bench-peer` ends with, from what the programs said as JSON. Pure: it calls nothing.
//!
//! Goals are those of the performance design; each verdict stands beside the figure that it is about.

use std::fmt::Write as _;

use serde_json::Value;

/// Memory's share that one stream must reach.
const MEMORY_GOAL: f64 = 0.75;
/// The share of the arithmetic's roof with which a prompt has reached its goal, where the ratio would ask for more.
const COMPUTE_GOAL: f64 = 0.8;
/// The p95 of the first token of 32 clients that start at once, over theirs.
const FIRST_TOKEN_GOAL: f64 = 0.5;
/// Seconds to become ready, of a model of 135M.
const READY_GOAL: f64 = 1.0;

/// What is in a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Weights {
    /// The default model's own file.
    Q4_1,
    /// What the peer's tool made of it.
    Q4_0,
    /// The same.
    F16,
    /// Another model's own file.
    Gemma,
}

impl Weights {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Q4_1 => "SmolLM2 Q4_1",
            Self::Q4_0 => "SmolLM2 Q4_0",
            Self::F16 => "SmolLM2 F16",
            Self::Gemma => "Gemma 3 Q4_K_M",
        }
    }
}

/// Our file and theirs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pair {
    pub(super) ours: Weights,
    pub(super) theirs: Weights,
}

/// A load, whether sent to servers or computed without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Load {
    /// Of about 500 tokens.
    Prompt,
    /// Sequences that decode together, or clients.
    Streams(u64),
}

/// What a load gave in one round of whole steps.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Step {
    load: Load,
    /// Tokens a second.
    rate: f64,
    /// Of the roof beside it, and which that is; ours only.
    share: Option<(f64, String)>,
}

impl Step {
    /// From what our `steps --json` prints.
    pub(super) fn of_ours(said: &Value) -> Vec<Self> {
        let step = |step: &Value| {
            let words: Vec<&str> = step["load"].as_str()?.split(' ').collect();
            let load = match words[..] {
                ["prefill", _] => Load::Prompt,
                ["decode", batch, ..] => Load::Streams(batch.parse().ok()?),
                _ => return None,
            };
            let share = (step["share_of_roof"].as_f64()?, step["bound"].as_str()?.to_owned());
            Some(Self { load, rate: step["tokens_per_second"].as_f64()?, share: Some(share) })
        };
        said["loads"].as_array().into_iter().flatten().filter_map(step).collect()
    }

    /// From the lines of llama-bench and llama-batched-bench. Both tell of one stream: the quicker counts.
    pub(super) fn of_theirs(said: &[Value]) -> Vec<Self> {
        let mut steps: Vec<Self> = Vec::new();
        for line in said {
            let (load, rate) = match (line["n_prompt"].as_u64(), line["pl"].as_u64()) {
                (Some(0), _) => (Load::Streams(1), &line["avg_ts"]),
                (Some(_), _) => (Load::Prompt, &line["avg_ts"]),
                (_, Some(batch)) => (Load::Streams(batch), &line["speed_tg"]),
                _ => continue,
            };
            let Some(rate) = rate.as_f64() else { continue };
            match steps.iter_mut().find(|step| step.load == load) {
                Some(step) => step.rate = step.rate.max(rate),
                None => steps.push(Self { load, rate, share: None }),
            }
        }
        steps
    }
}

/// One load on both: of pairs, ours comes first.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) pair: Pair,
    load: Load,
    /// Tokens a second: of output, or of prompts.
    rates: [f64; 2],
    /// The median of the rounds' own.
    ratio: f64,
    /// Only of servers.
    served: Option<Served>,
    /// Of the roof, and of which.
    share: Option<(f64, String)>,
}

#[derive(Debug)]
struct Served {
    first_p50_ms: [f64; 2],
    first_p95_ms: [f64; 2],
    num_failed: [u64; 2],
}

/// From `bindery bench --compare --json`; `None` where it has no figures. Of a long prompt nearly all time is the first token's.
pub(super) fn served_rows(pair: Pair, is_long_prompt: bool, report: &Value) -> Option<Vec<Row>> {
    let (rows, ratios) = (report["rows"].as_array()?, report["ratios_a_over_b"].as_array()?);
    let row = |(both, ratio): (&[Value], &Value)| {
        let of_both = |figure: &dyn Fn(&Value) -> Option<f64>| Some([figure(both.first()?)?, figure(both.get(1)?)?]);
        let first_p50_ms = of_both(&|row| row["ttft_ms"]["p50"].as_f64())?;
        let served = Served {
            first_p50_ms,
            first_p95_ms: of_both(&|row| row["ttft_ms"]["p95"].as_f64())?,
            num_failed: of_both(&|row| row["failed"].as_f64())?.map(|failed| failed as u64),
        };
        let (load, rates, ratio) = if is_long_prompt {
            let tokens = of_both(&|row| row["mean_prompt_tokens"].as_f64())?;
            let rate = |server: usize| tokens[server] / (first_p50_ms[server] / 1e3);
            (Load::Prompt, [rate(0), rate(1)], 1.0 / ratio["ttft_p50"].as_f64()?)
        } else {
            let rates = of_both(&|row| row["output_tokens_per_second"].as_f64())?;
            (Load::Streams(ratio["load"]["clients"].as_u64()?), rates, ratio["output_tokens_per_second"].as_f64()?)
        };
        Some(Row { pair, load, rates, ratio, served: Some(served), share: None })
    };
    rows.chunks(2).zip(ratios).map(row).collect()
}

/// From the rounds of both, a list of steps each.
pub(super) fn step_rows(pair: Pair, ours: &[Vec<Step>], theirs: &[Vec<Step>]) -> Vec<Row> {
    let row = |load: Load| {
        let (ours, theirs) = (rounds_of(ours, load), rounds_of(theirs, load));
        let rates = |rounds: &[&Step]| median(rounds.iter().map(|step| step.rate));
        let ratio = median(ours.iter().zip(&theirs).map(|(ours, theirs)| ours.rate / theirs.rate))?;
        let shares = ours.iter().filter_map(|step| step.share.clone());
        let mut shares: Vec<_> = shares.collect();
        shares.sort_by(|a, b| a.0.total_cmp(&b.0));
        let share = shares.get(shares.len() / 2).cloned();
        Some(Row { pair, load, rates: [rates(&ours)?, rates(&theirs)?], ratio, served: None, share })
    };
    let loads = [Load::Prompt, Load::Streams(1), Load::Streams(8), Load::Streams(32)];
    loads.into_iter().filter_map(row).collect()
}

/// Each round's step of this load.
fn rounds_of(rounds: &[Vec<Step>], load: Load) -> Vec<&Step> {
    rounds.iter().filter_map(|steps| steps.iter().find(|step| step.load == load)).collect()
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[sorted.len() / 2 - 1], upper) } else { upper })
}

impl Row {
    /// A served load's share of the rate that our whole steps of its kind would have at the roof: waiting, prompts and HTTP count
    /// against it.
    pub(super) fn hold_against_roof(&mut self, ours: &[Vec<Step>]) {
        let steps = rounds_of(ours, self.load);
        let at_roof = median(steps.iter().filter_map(|step| Some(step.rate / step.share.as_ref()?.0)));
        let bound = steps.iter().find_map(|step| step.share.as_ref());
        self.share = at_roof.zip(bound).map(|(rate, (_, bound))| (self.rates[0] / rate, bound.clone()));
    }

    fn name(&self) -> String {
        let load = match (self.load, self.served.is_some()) {
            (Load::Prompt, true) => "long prompt, served (prompt tok/s)".to_owned(),
            (Load::Prompt, false) => "prompt of 512".to_owned(),
            (Load::Streams(1), true) => "1 client".to_owned(),
            (Load::Streams(clients), true) => format!("{clients} clients"),
            (Load::Streams(batch), false) => format!("decode {batch} at 128"),
        };
        format!("{}: {load}", self.pair.ours.name())
    }

    fn against(&self) -> String {
        if self.pair.ours == self.pair.theirs {
            "same file".to_owned()
        } else {
            format!("its {}", self.pair.theirs.name())
        }
    }

    fn ratio_goal(&self) -> Option<f64> {
        match (self.load, self.pair.ours) {
            // Of F16 prompts nothing is asked.
            (Load::Prompt, Weights::F16) => None,
            (Load::Prompt, Weights::Q4_1) if self.pair.theirs == Weights::Q4_1 => Some(6.0),
            (Load::Streams(_), _) if self.served.is_none() => None,
            (Load::Streams(1), _) => Some(2.2),
            (Load::Streams(8), _) => Some(2.8),
            (Load::Streams(32) | Load::Prompt, _) => Some(2.5),
            _ => None,
        }
    }

    /// Goals and verdicts on rate and share.
    fn goals(&self) -> String {
        let share_of = |roof: &str| self.share.as_ref().filter(|(_, bound)| bound == roof).map(|(share, _)| *share);
        let mut goals = Vec::new();
        if let Some(goal) = self.ratio_goal() {
            let is_at_roof =
                self.load == Load::Prompt && share_of("compute").is_some_and(|share| share >= COMPUTE_GOAL);
            goals.push(match self.ratio >= goal {
                false if is_at_roof && goal < 6.0 => {
                    format!("{goal}, or {:.0} % of the int8 roof (met)", 100.0 * COMPUTE_GOAL)
                }
                is_met => format!("{goal} ({})", verdict(is_met)),
            });
        }
        if self.load == Load::Streams(1) && self.pair.ours != Weights::F16 {
            let is_met = share_of("memory").map(|share| share >= MEMORY_GOAL);
            goals.extend(is_met.map(|is_met| format!("{:.0} % of memory ({})", 100.0 * MEMORY_GOAL, verdict(is_met))));
        }
        goals.join("; ")
    }

    /// p50 and p95 of the first token.
    fn first_tokens(&self) -> [String; 2] {
        let Some(served) = &self.served else { return Default::default() };
        let both = |[ours, theirs]: [f64; 2]| format!("{} / {}", figure(ours), figure(theirs));
        let mut p95 = both(served.first_p95_ms);
        if self.load == Load::Streams(32) {
            let ratio = served.first_p95_ms[0] / served.first_p95_ms[1];
            let _ = write!(p95, " ({ratio:.2}, goal {FIRST_TOKEN_GOAL} {})", verdict(ratio <= FIRST_TOKEN_GOAL));
        }
        [both(served.first_p50_ms), p95]
    }

    fn line(&self) -> String {
        let num_failed = self.served.as_ref().map_or([0, 0], |served| served.num_failed);
        let rate = |server: usize| match num_failed[server] {
            0 => figure(self.rates[server]),
            failed => format!("{} ({failed} failed)", figure(self.rates[server])),
        };
        let [p50, p95] = self.first_tokens();
        let share =
            self.share.as_ref().map_or_else(String::new, |(share, bound)| format!("{:.0} % {bound}", 100.0 * share));
        let cells = [
            self.name(),
            self.against(),
            rate(0),
            rate(1),
            format!("{:.2}", self.ratio),
            self.goals(),
            p50,
            p95,
            share,
        ];
        format!("| {} |\n", cells.join(" | "))
    }
}

/// Two servers' start and memory.
pub(super) struct ServerRow {
    pub(super) name: &'static str,
    /// Of ours.
    pub(super) weights: Weights,
    pub(super) ready_seconds: [f64; 2],
    pub(super) resident_mib: [u64; 2],
}

impl ServerRow {
    fn line(&self, steps: &[(Weights, Value)]) -> String {
        let held = steps.iter().find(|(weights, _)| *weights == self.weights);
        let held = held.and_then(|(_, said)| said["weight_bytes"].as_f64());
        let held = held.map_or_else(String::new, |bytes| format!("{:.0}", bytes / f64::from(1 << 20)));
        // A goal of the small model alone.
        let goal = match self.weights {
            Weights::Gemma => String::new(),
            _ => format!("{READY_GOAL} ({})", verdict(self.ready_seconds[0] < READY_GOAL)),
        };
        let ([ready, their_ready], [resident, their_resident]) = (self.ready_seconds, self.resident_mib);
        format!("| {} | {ready:.2} / {their_ready:.2} | {goal} | {resident} / {their_resident} | {held} |\n", self.name)
    }
}

/// All of it. `steps` is what our whole steps printed.
pub(super) fn markdown(rows: &[Row], servers: &[ServerRow], steps: &[(Weights, Value)]) -> String {
    let mut text = String::from(
        "| load (tok/s) | against | ours | theirs | ratio | goal | first token p50 ms: ours / theirs | p95 | share of the roof |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    text.extend(rows.iter().map(Row::line));
    text.push_str(&roofs(steps));
    text.push_str(
        "\n| servers | ready after s: ours / theirs | goal | resident MiB afterwards: ours / theirs | packed weights MiB |\n\
         |---|---|---|---|---|\n",
    );
    text.extend(servers.iter().map(|server| server.line(steps)));
    text.push_str(
        "\nGoals that this command does not measure: resident size beside the cache in use, time between tokens while a long \
         prompt arrives, adapters, cache slots unused, the scheduler's and HTTP's cost, CUDA.\n\n",
    );
    text
}

/// The lowest and the highest that our whole steps saw.
fn roofs(steps: &[(Weights, Value)]) -> String {
    let range = |roof: &str| {
        let both = steps.iter().flat_map(|(_, said)| said["roofs"][roof].as_array().into_iter().flatten());
        let (least, most) = both
            .filter_map(Value::as_f64)
            .fold((f64::INFINITY, 0.0_f64), |(least, most), value| (least.min(value), most.max(value)));
        format!("{} to {}", figure(least / 1e9), figure(most / 1e9))
    };
    if steps.is_empty() {
        return String::new();
    }
    let note = steps.iter().find_map(|(_, said)| said["roofs"]["int8_note"].as_str());
    let note = note.map_or_else(String::new, |note| format!(" {note}."));
    format!(
        "\nRoofs, taken beside every round of our whole steps: {} GB/s read, {} GOP/s int8, {} GFLOP/s f32.{note} A served load's \
         share is of the rate that the whole step of its kind would have at its roof.\n",
        range("read_bytes_per_second"),
        range("int8_operations_per_second"),
        range("f32_operations_per_second"),
    )
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "missed" }
}

/// Three digits or more.
fn figure(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    const SAME: Pair = Pair { ours: Weights::Q4_1, theirs: Weights::Q4_1 };
    const THEIR_Q4_0: Pair = Pair { ours: Weights::Q4_1, theirs: Weights::Q4_0 };

    fn report(clients: u64, ours: f64, theirs: f64) -> Value {
        let row = |rate: f64, first: f64, failed: u64| {
            json!({
                "output_tokens_per_second": rate, "ttft_ms": {"p50": first, "p95": 2.0 * first}, "failed": failed,
                "mean_prompt_tokens": 500.0,
            })
        };
        json!({
            "rows": [row(ours, 250.0, 0), row(theirs, 625.0, 2)],
            "ratios_a_over_b": [
                {"load": {"clients": clients}, "output_tokens_per_second": ours / theirs, "ttft_p50": 0.4},
            ],
        })
    }

    /// Our steps of one round, with these shares of a prompt and of one stream.
    fn said(prompt: f64, stream: f64) -> Value {
        json!({
            "weight_bytes": 97_000_000, "loads": [
                {"load": "prefill 512", "tokens_per_second": 2400.0, "share_of_roof": prompt, "bound": "compute"},
                {"load": "decode 1 at 128", "tokens_per_second": 360.0, "share_of_roof": stream, "bound": "memory"},
            ],
            "roofs": {
                "read_bytes_per_second": [27e9, 29e9], "int8_operations_per_second": [900e9, 1000e9],
                "f32_operations_per_second": [410e9, 440e9], "int8_note": "int8 is another set's",
            },
        })
    }

    #[test]
    fn clients_are_judged_by_ratio_and_by_the_slowest_first_tokens() {
        let lines = |report| served_rows(THEIR_Q4_0, false, &report).unwrap().iter().map(Row::line).collect::<String>();
        assert_eq!(
            lines(report(32, 726.3, 145.26)),
            "| SmolLM2 Q4_1: 32 clients | its SmolLM2 Q4_0 | 726 | 145 (2 failed) | 5.00 | 2.5 (met) | 250 / 625 | 500 / 1250 \
             (0.40, goal 0.5 met) |  |\n"
        );
        assert!(lines(report(8, 25.0, 10.0)).contains(" | 25.0 | 10.0 (2 failed) | 2.50 | 2.8 (missed) | "));
        assert_eq!(served_rows(SAME, false, &json!({"rows": [{}]})).map(|rows| rows.len()), None);
    }

    #[test]
    fn a_served_stream_is_held_against_the_roof_of_its_step() {
        let ours = [Step::of_ours(&said(0.5, 0.9))];
        let mut row = served_rows(SAME, false, &report(1, 280.0, 100.0)).unwrap().remove(0);
        row.hold_against_roof(&ours);
        // 400 tokens a second at the roof.
        assert_eq!(row.share, Some((0.7, "memory".to_owned())));
        assert_eq!(row.goals(), "2.2 (met); 75 % of memory (missed)");
    }

    #[test]
    fn a_long_prompt_is_judged_by_its_first_token() {
        let rows = served_rows(SAME, true, &report(1, 8.0, 4.0)).unwrap();
        assert_eq!((rows[0].rates, rows[0].ratio), ([2000.0, 800.0], 2.5));
        assert_eq!(rows[0].goals(), "6 (missed)");
        assert_eq!(served_rows(THEIR_Q4_0, true, &report(1, 8.0, 4.0)).unwrap()[0].goals(), "2.5 (met)");
    }

    #[test]
    fn steps_are_compared_round_by_round_and_a_prompt_at_the_roof_has_met_its_goal() {
        let theirs = Step::of_theirs(&[
            json!({"n_prompt": 512, "n_gen": 0, "avg_ts": 1200.0}),
            json!({"n_prompt": 0, "n_gen": 64, "avg_ts": 120.0}),
            json!({"pp": 128, "tg": 32, "pl": 1, "speed_tg": 90.0}),
            json!({"pp": 128, "tg": 32, "pl": 8, "speed_tg": 186.0}),
        ]);
        assert_eq!(theirs.len(), 3, "one stream once, the quicker: {theirs:?}");
        let rows = |prompt, stream| {
            step_rows(THEIR_Q4_0, &[Step::of_ours(&said(prompt, stream))], std::slice::from_ref(&theirs))
        };
        let met = rows(0.85, 0.9);
        assert_eq!(
            met.iter().map(|row| (row.load, row.ratio)).collect::<Vec<_>>(),
            [(Load::Prompt, 2.0), (Load::Streams(1), 3.0)]
        );
        assert_eq!(met[0].goals(), "2.5, or 80 % of the int8 roof (met)");
        assert_eq!(met[1].goals(), "75 % of memory (met)");
        assert_eq!(rows(0.5, 0.5)[0].goals(), "2.5 (missed)");
    }

    #[test]
    fn the_text_has_the_roofs_of_the_run_and_both_tables() {
        let servers = [ServerRow {
            name: "clients",
            weights: Weights::Q4_1,
            ready_seconds: [0.4, 1.1],
            resident_mib: [287, 1189],
        }];
        let text = markdown(&[], &servers, &[(Weights::Q4_1, said(0.5, 0.9))]);
        assert!(
            text.contains(
                "27.0 to 29.0 GB/s read, 900 to 1000 GOP/s int8, 410 to 440 GFLOP/s f32. int8 is another set's."
            ),
            "{text}"
        );
        assert!(text.contains("| clients | 0.40 / 1.10 | 1 (met) | 287 / 1189 | 93 |"), "{text}");
        assert!(!markdown(&[], &servers, &[]).contains("Roofs"), "before whole steps there are none");
    }
}
