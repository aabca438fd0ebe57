//! Where a server's steps spent their time, by what it counts itself (`bindery_step_phase_seconds_total`).
//!
//! It reads a metrics text before and after a load and takes the difference; it must not measure anything itself.

use std::fmt::Write as _;

use bindery_model::{AttentionWork, Passes};
use comfy_table::{Cell, CellAlignment};
use serde_json::{Value, json};

use crate::commands::models::{plain_table, show};

const PHASE_SECONDS: &str = "bindery_step_phase_seconds_total";
/// A histogram of tokens a step: its count is the number of steps, its sum the tokens in them.
const NUM_STEPS: &str = "vllm:iteration_tokens_total_count";
const NUM_TOKENS: &str = "vllm:iteration_tokens_total_sum";
const NUM_LOGIT_STEPS: &str = "bindery_logit_steps_total";
const NUM_LOGIT_ROWS: &str = "bindery_logit_rows_total";
const ATTENTION_BYTES: &str = "bindery_attention_read_bytes_total";
const ATTENTION_OPERATIONS: &str = "bindery_attention_operations_total";

/// Time by phase, in the order of the server's text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Profile {
    pub(crate) phases: Vec<(String, f64)>,
    /// Steps and the rows in them.
    pub(crate) passes: Passes,
    /// What attention had to do at least; nothing for a server that does not count it.
    pub(crate) attention: AttentionWork,
}

impl Profile {
    /// `None` for a server that does not count its phases.
    pub(crate) fn parse(metrics: &str) -> Option<Self> {
        let mut profile = Self::default();
        for line in metrics.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            match name {
                PHASE_SECONDS => {
                    let (_, rest) = labels.split_once("phase=\"")?;
                    let (phase, _) = rest.split_once('"')?;
                    profile.phases.push((phase.to_owned(), value));
                }
                NUM_STEPS => profile.passes.num_steps += value,
                NUM_TOKENS => profile.passes.num_rows += value,
                NUM_LOGIT_STEPS => profile.passes.num_logit_steps += value,
                NUM_LOGIT_ROWS => profile.passes.num_logit_rows += value,
                ATTENTION_BYTES => profile.attention.read_bytes += value as u64,
                ATTENTION_OPERATIONS => profile.attention.operations += value as u64,
                _ => {}
            }
        }
        // Prometheus' text sorts its series by name; what a step does has an order of its own.
        let place = |phase: &str| bindery_engine::engine::STEP_PHASES.iter().position(|name| *name == phase);
        profile.phases.sort_by_key(|(phase, _)| place(phase).unwrap_or(usize::MAX));
        (!profile.phases.is_empty()).then_some(profile)
    }

    /// What was added since `before`.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let earlier =
            |phase: &str| before.phases.iter().find(|(name, _)| name == phase).map_or(0.0, |(_, value)| *value);
        Self {
            phases: self.phases.iter().map(|(phase, value)| (phase.clone(), value - earlier(phase))).collect(),
            passes: Passes {
                num_steps: self.passes.num_steps - before.passes.num_steps,
                num_rows: self.passes.num_rows - before.passes.num_rows,
                num_logit_steps: self.passes.num_logit_steps - before.passes.num_logit_steps,
                num_logit_rows: self.passes.num_logit_rows - before.passes.num_logit_rows,
            },
            attention: AttentionWork {
                read_bytes: self.attention.read_bytes.saturating_sub(before.attention.read_bytes),
                operations: self.attention.operations.saturating_sub(before.attention.operations),
            },
        }
    }

    fn seconds(&self) -> f64 {
        self.phases.iter().map(|(_, seconds)| seconds).sum()
    }

    pub(crate) fn json(&self) -> Value {
        let phases: serde_json::Map<String, Value> =
            self.phases.iter().map(|(phase, seconds)| (phase.clone(), json!(seconds))).collect();
        json!({"steps": self.passes.num_steps, "tokens": self.passes.num_rows, "seconds": phases})
    }
}

/// One column a load: milliseconds a step and share of the steps' time.
pub(crate) fn table(columns: &[(String, Profile)]) -> String {
    let Some((_, first)) = columns.first() else { return String::new() };
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let mut table = plain_table();
    let mut header = vec![Cell::new("PHASE")];
    header.extend(columns.iter().map(|(name, _)| right(format!("{name}: ms a step, share"))));
    table.set_header(header);
    let cell = |profile: &Profile, seconds: f64| {
        let (steps, all) = (profile.passes.num_steps.max(1.0), profile.seconds().max(1e-12));
        right(format!("{:.3} {:5.1} %", seconds * 1e3 / steps, seconds / all * 100.0))
    };
    for (index, (phase, _)) in first.phases.iter().enumerate() {
        let mut cells = vec![Cell::new(phase)];
        cells.extend(columns.iter().map(|(_, profile)| cell(profile, profile.phases[index].1)));
        table.add_row(cells);
    }
    let mut cells = vec![Cell::new("all")];
    cells.extend(columns.iter().map(|(_, profile)| cell(profile, profile.seconds())));
    table.add_row(cells);
    let mut cells = vec![Cell::new("steps, tokens a step")];
    cells.extend(columns.iter().map(|(_, profile)| {
        let Passes { num_steps, num_rows, .. } = profile.passes;
        right(format!("{num_steps}, {:.1}", num_rows / num_steps.max(1.0)))
    }));
    table.add_row(cells);
    let mut text = String::from("where the steps of A spent their time\n");
    let _ = writeln!(text, "\n{}", show(&mut table));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# TYPE bindery_step_phase_seconds_total counter\n\
        bindery_step_phase_seconds_total{model_name=\"m\",phase=\"attention\"} 1.5\n\
        bindery_step_phase_seconds_total{model_name=\"m\",phase=\"schedule\"} 0.5\n\
        vllm:iteration_tokens_total_count{model_name=\"m\"} 10\n\
        vllm:iteration_tokens_total_sum{model_name=\"m\"} 100\n\
        bindery_logit_steps_total{model_name=\"m\"} 9\n\
        bindery_logit_rows_total{model_name=\"m\"} 30\n\
        bindery_attention_read_bytes_total{model_name=\"m\"} 4096\n\
        bindery_attention_operations_total{model_name=\"m\"} 2048\n";

    #[test]
    fn the_difference_of_two_texts_is_in_the_order_of_a_step() {
        let before = Profile::parse(BEFORE).unwrap();
        assert_eq!(before.phases, [("schedule".to_owned(), 0.5), ("attention".to_owned(), 1.5)]);
        let after =
            BEFORE.replace(" 1.5", " 4.5").replace(" 0.5", " 1.5").replace(" 10\n", " 12\n").replace(" 4096", " 5000");
        let profile = Profile::parse(&after).unwrap().since(&before);
        assert_eq!(profile.phases, [("schedule".to_owned(), 1.0), ("attention".to_owned(), 3.0)]);
        let passes = |num_steps, num_rows, num_logit_steps, num_logit_rows| Passes {
            num_steps,
            num_rows,
            num_logit_steps,
            num_logit_rows,
        };
        assert_eq!((before.passes, profile.passes), (passes(10.0, 100.0, 9.0, 30.0), passes(2.0, 0.0, 0.0, 0.0)));
        assert_eq!(before.attention, AttentionWork { read_bytes: 4096, operations: 2048 });
        assert_eq!(profile.attention, AttentionWork { read_bytes: 904, operations: 0 });
        let text = table(&[("8 clients".to_owned(), profile)]);
        assert!(text.contains("1500.000  75.0 %") && text.contains("2000.000 100.0 %"), "{text}");
    }

    #[test]
    fn another_servers_metrics_are_none() {
        assert_eq!(Profile::parse("vllm:iteration_tokens_total_count 3\nup 1\n"), None);
        assert_eq!(Profile::parse(""), None);
    }
}
