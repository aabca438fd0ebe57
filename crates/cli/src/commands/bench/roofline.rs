//! How near the parts of a step come to what the machine can do at best (Williams, Waterman and Patterson 2009).
//!
//! A product with weights takes at least as long as reading them once a step, and as multiplying them with every row.
//! The larger of the two over the time it took is its share of the roof. Attention and the rest have no entry: their
//! work depends on the contexts, which the counters do not tell.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use bindery_model::{Machine, ModelInfo, ProductWeights};
use comfy_table::{Cell, CellAlignment};
use serde_json::{Value, json};

use super::profile::Profile;
use crate::commands::models::{plain_table, show};

/// Each roof is taken in rounds of about this length, and the best of them counts: other work on the machine only ever
/// lowers a figure.
const ROUND: Duration = Duration::from_millis(40);
const ROUNDS: usize = 12;
/// Larger than the caches of every machine in question.
const READ_BYTES: usize = 512 << 20;

/// What the machine does at best, a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Roofs {
    pub(crate) read_bytes: f64,
    pub(crate) int8_operations: f64,
    pub(crate) f32_operations: f64,
}

impl Roofs {
    /// Takes about two seconds of all threads.
    pub(crate) fn measure(machine: &Machine) -> Self {
        let bytes = vec![1_u8; READ_BYTES];
        let best_read = (0..ROUNDS / 2).map(|_| rate(|| machine.read(&bytes))).fold(0.0, f64::max);
        Self {
            read_bytes: best_read,
            int8_operations: best(|rounds| machine.spin_int8(rounds)),
            f32_operations: best(|rounds| machine.spin_f32(rounds)),
        }
    }

    /// Seconds below which a load's products with these weights cannot go; `num_rows` over all steps.
    fn least_seconds(&self, product: &ProductWeights, num_steps: f64, num_rows: f64) -> (f64, &'static str) {
        let peak = if product.is_quantized { self.int8_operations } else { self.f32_operations };
        let reading = num_steps * product.num_bytes as f64 / self.read_bytes;
        let computing = num_rows * 2.0 * product.num_parameters as f64 / peak;
        if reading > computing { (reading, "memory") } else { (computing, "compute") }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "read_bytes_per_second": self.read_bytes, "int8_operations_per_second": self.int8_operations,
            "f32_operations_per_second": self.f32_operations,
        })
    }
}

fn rate(work: impl FnOnce() -> u64) -> f64 {
    let start = Instant::now();
    let done = work();
    done as f64 / start.elapsed().as_secs_f64().max(1e-9)
}

/// The best round of work that grows with its argument.
fn best(work: impl Fn(usize) -> u64) -> f64 {
    let mut rounds = 1000;
    loop {
        let start = Instant::now();
        work(rounds);
        let elapsed = start.elapsed();
        if elapsed >= ROUND / 2 {
            break;
        }
        rounds *= 2;
    }
    (0..ROUNDS).map(|_| rate(|| work(rounds))).fold(0.0, f64::max)
}

/// A part's share of the roof under one load: of what, and how much.
pub(crate) fn share(roofs: &Roofs, product: &ProductWeights, profile: &Profile) -> Option<(f64, &'static str)> {
    let (_, seconds) = profile.phases.iter().find(|(phase, _)| phase == product.part)?;
    let num_rows = if product.part == "head" { profile.num_sampled } else { profile.num_tokens };
    let (least, bound) = roofs.least_seconds(product, profile.num_steps, num_rows);
    (*seconds > 0.0).then(|| (least / seconds, bound))
}

/// The roofs, and one column a load.
pub(crate) fn table(roofs: &Roofs, info: &ModelInfo, columns: &[(String, Profile)]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "roofs, {} threads: {:.1} GB/s read, {:.0} GOP/s int8, {:.0} GFLOP/s f32\n",
        info.threads,
        roofs.read_bytes / 1e9,
        roofs.int8_operations / 1e9,
        roofs.f32_operations / 1e9
    );
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let mut table = plain_table();
    let mut header = vec![Cell::new("PRODUCT"), right("MB".to_owned())];
    header.extend(columns.iter().map(|(name, _)| right(format!("{name}: share of"))));
    table.set_header(header);
    for product in &info.products {
        let mut cells = vec![Cell::new(product.part), right(format!("{:.1}", product.num_bytes as f64 / 1e6))];
        cells.extend(columns.iter().map(|(_, profile)| match share(roofs, product, profile) {
            Some((share, bound)) => right(format!("{:.0} % {bound}", share * 100.0)),
            None => right(String::new()),
        }));
        table.add_row(cells);
    }
    let _ = writeln!(text, "{}", show(&mut table));
    text
}

pub(crate) fn json(roofs: &Roofs, info: &ModelInfo, columns: &[(String, Profile)]) -> Value {
    let shares: Vec<Value> = columns
        .iter()
        .flat_map(|(load, profile)| {
            info.products.iter().filter_map(move |product| {
                let (share, bound) = share(roofs, product, profile)?;
                Some(json!({"load": load, "product": product.part, "share": share, "bound": bound}))
            })
        })
        .collect();
    json!({"roofs": roofs.json(), "shares": shares})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_roof_counts() {
        let roofs = Roofs { read_bytes: 100.0, int8_operations: 1000.0, f32_operations: 10.0 };
        let product = ProductWeights { part: "mlp", num_parameters: 50, num_bytes: 25, is_quantized: true };
        let profile = |num_steps, num_tokens| Profile {
            phases: vec![("mlp".to_owned(), 1.0)],
            num_steps,
            num_tokens,
            num_sampled: 0.0,
        };
        // One row a step: 0.25 s of reading, 0.1 s of products.
        assert_eq!(share(&roofs, &product, &profile(1.0, 1.0)), Some((0.25, "memory")));
        // Eight rows a step: as much reading, 0.8 s of products.
        assert_eq!(share(&roofs, &product, &profile(1.0, 8.0)), Some((0.8, "compute")));
        // Dense: multiplied in f32.
        let dense = ProductWeights { is_quantized: false, ..product };
        assert_eq!(share(&roofs, &dense, &profile(1.0, 1.0)), Some((10.0, "compute")));
        // The head computes sampled rows alone; a part that took no time has no share.
        let head = ProductWeights { part: "head", ..product };
        assert_eq!(share(&roofs, &head, &profile(1.0, 1.0)), None);
    }
}
