//! How near the parts of a step come to what the machine can do at best (Williams, Waterman and Patterson 2009).
//!
//! A product with weights takes at least as long as reading them once a step, and as multiplying them with every row;
//! attention as reading the keys and values that a sequence sees once a step, and as its products. The larger of the two
//! over the time it took is a phase's share of the roof. The rest have none: neither weights nor contexts tell their work.

use std::fmt::Write as _;

use bindery_model::{AttentionWork, ModelInfo, ProductWeights, Roofs, machine};
use comfy_table::{Cell, CellAlignment};
use serde_json::{Value, json};

use super::profile::Profile;
use crate::commands::models::{plain_table, show};

/// The phase in which the pages are read.
const ATTENTION: &str = "attention";

/// A phase's share of the roof under one load: how much, and of what. None where no roof is known, or it took no time.
pub(crate) fn share(
    roofs: &Roofs,
    products: &[ProductWeights],
    profile: &Profile,
    phase: &str,
) -> Option<(f64, &'static str)> {
    let (_, seconds) = profile.phases.iter().find(|(name, _)| name == phase)?;
    let (reading, computing) = match products.iter().find(|product| product.part == phase) {
        Some(product) => roofs.seconds(product, profile.passes),
        None if phase == ATTENTION && profile.attention != AttentionWork::default() => {
            roofs.attention_seconds(profile.attention)
        }
        None => return None,
    };
    let (least, bound) = machine::bound(reading, computing);
    (*seconds > 0.0).then(|| (least / seconds, bound))
}

/// Megabytes that a phase has to read in a step, of the weights and of the cache.
fn megabytes(products: &[ProductWeights], profile: &Profile, phase: &str) -> Option<f64> {
    match products.iter().find(|product| product.part == phase) {
        Some(product) => Some(product.num_bytes as f64 / 1e6),
        None if phase == ATTENTION => {
            Some(profile.attention.read_bytes as f64 / 1e6 / profile.passes.num_steps.max(1.0))
        }
        None => None,
    }
}

/// What the table's columns are.
const LEGEND: &str = "MB: what a step has to read. –: nothing to hold it against.";

/// The roofs beside each load, and the phases with one column a load.
pub(crate) fn table(info: &ModelInfo, columns: &[(String, Profile)], roofs: &[Roofs]) -> String {
    let Some((_, first)) = columns.first() else { return String::new() };
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let mut text =
        format!("what the machine could do right before or right after each load, {} threads\n", info.threads);
    let mut table = plain_table();
    let mut header = vec![Cell::new("LOAD")];
    header.extend(["GB/s read", "GOP/s int8", "GFLOP/s f32"].map(|name| right(name.to_owned())));
    table.set_header(header);
    for ((load, _), roofs) in columns.iter().zip(roofs) {
        let mut cells = vec![Cell::new(load)];
        cells.push(right(format!("{:.1}", roofs.read_bytes / 1e9)));
        cells.extend([roofs.int8_operations, roofs.f32_operations].map(|roof| right(format!("{:.0}", roof / 1e9))));
        table.add_row(cells);
    }
    let _ = writeln!(text, "\n{}", show(&mut table));
    if let Some(note) = roofs.iter().find_map(|roofs| roofs.int8_note) {
        let _ = writeln!(text, "{note}\n");
    }
    let mut table = plain_table();
    let mut header = vec![Cell::new("PHASE")];
    header.extend(columns.iter().map(|(name, _)| right(format!("{name}: MB, share of"))));
    table.set_header(header);
    for (phase, _) in &first.phases {
        let mut cells = vec![Cell::new(phase)];
        cells.extend(columns.iter().zip(roofs).map(|((_, profile), roofs)| {
            let size =
                megabytes(&info.products, profile, phase).map_or_else(String::new, |size| format!("{size:.1}  "));
            right(match share(roofs, &info.products, profile, phase) {
                Some((share, bound)) => format!("{size}{:.0} % {bound}", share * 100.0),
                None => "–".to_owned(),
            })
        }));
        table.add_row(cells);
    }
    let _ = writeln!(text, "{}\n{LEGEND}", show(&mut table));
    text
}

pub(crate) fn json(info: &ModelInfo, columns: &[(String, Profile)], roofs: &[Roofs]) -> Value {
    let loads = || columns.iter().zip(roofs);
    let shares: Vec<Value> = loads()
        .flat_map(|((load, profile), roofs)| {
            profile.phases.iter().filter_map(move |(phase, _)| {
                let (share, bound) = share(roofs, &info.products, profile, phase)?;
                Some(json!({"load": load, "phase": phase, "share": share, "bound": bound}))
            })
        })
        .collect();
    let roofs: Vec<Value> = loads()
        .map(|((load, _), roofs)| {
            json!({
                "load": load, "read_bytes_per_second": roofs.read_bytes,
                "int8_operations_per_second": roofs.int8_operations,
                "f32_operations_per_second": roofs.f32_operations, "int8_note": roofs.int8_note,
            })
        })
        .collect();
    json!({"roofs": roofs, "shares": shares})
}

#[cfg(test)]
mod tests {
    use bindery_model::Passes;

    use super::*;

    #[test]
    fn the_nearer_roof_counts() {
        let roofs = Roofs { read_bytes: 100.0, int8_operations: 1000.0, f32_operations: 10.0, int8_note: None };
        let product = ProductWeights {
            part: "mlp",
            num_parameters: 50,
            num_kept_parameters: 0,
            num_bytes: 25,
            num_kept_bytes: 0,
            is_quantized: true,
        };
        let profile = |num_steps, num_rows| Profile {
            phases: vec![("mlp".to_owned(), 1.0)],
            passes: Passes { num_steps, num_rows, ..Passes::default() },
            attention: AttentionWork::default(),
        };
        let share = |product: ProductWeights, profile: &Profile| share(&roofs, &[product], profile, product.part);
        // One row a step: 0.25 s of reading, 0.1 s of products.
        assert_eq!(share(product, &profile(1.0, 1.0)), Some((0.25, "memory")));
        // Eight rows a step: as much reading, 0.8 s of products.
        assert_eq!(share(product, &profile(1.0, 8.0)), Some((0.8, "compute")));
        // Dense: multiplied in f32.
        let dense = ProductWeights { is_quantized: false, ..product };
        assert_eq!(share(dense, &profile(1.0, 1.0)), Some((10.0, "compute")));
        // A fifth of it is of the last layer, which two rows in eight meet, and one step in two.
        let last = ProductWeights { num_kept_parameters: 10, num_kept_bytes: 5, ..product };
        let mut some = profile(2.0, 8.0);
        (some.passes.num_logit_steps, some.passes.num_logit_rows) = (1.0, 2.0);
        assert_eq!(share(last, &some), Some((0.68, "compute")));
        some.passes.num_rows = 2.0;
        assert_eq!(share(last, &some), Some((0.45, "memory")));
        // A part that took no time has no share.
        let head = ProductWeights { part: "head", ..product };
        assert_eq!(share(head, &profile(1.0, 1.0)), None);
    }

    #[test]
    fn attention_is_held_against_what_it_had_to_read_and_multiply_over_all_steps() {
        let roofs = Roofs { read_bytes: 100.0, int8_operations: 1000.0, f32_operations: 10.0, int8_note: None };
        let attention = |read_bytes, operations| Profile {
            phases: vec![(ATTENTION.to_owned(), 4.0)],
            passes: Passes { num_steps: 2.0, ..Passes::default() },
            attention: AttentionWork { read_bytes, operations },
        };
        let share = |profile: &Profile| share(&roofs, &[], profile, ATTENTION);
        assert_eq!(share(&attention(200, 10)), Some((0.5, "memory")));
        assert_eq!(share(&attention(200, 30)), Some((0.75, "compute")));
        assert_eq!(share(&attention(0, 0)), None, "a server that does not count it");
        assert_eq!(megabytes(&[], &attention(3_000_000, 0), ATTENTION), Some(1.5), "a step");
    }
}
