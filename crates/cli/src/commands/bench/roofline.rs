//! How near the parts of a step come to what the machine can do at best (Williams, Waterman and Patterson 2009).
//!
//! A product with weights takes at least as long as reading them once a step, and as multiplying them with every row.
//! The larger of the two over the time it took is its share of the roof. Attention and the rest have no share: their
//! work depends on the contexts, which the counters do not tell.

use std::fmt::Write as _;

use bindery_model::{ModelInfo, ProductWeights, Roofs, machine};
use comfy_table::{Cell, CellAlignment};
use serde_json::{Value, json};

use super::profile::Profile;
use crate::commands::models::{plain_table, show};

/// A part's share of the roof under one load: of what, and how much.
pub(crate) fn share(roofs: &Roofs, product: &ProductWeights, profile: &Profile) -> Option<(f64, &'static str)> {
    let (_, seconds) = profile.phases.iter().find(|(phase, _)| phase == product.part)?;
    let num_rows = if product.part == "head" { profile.num_sampled } else { profile.num_tokens };
    let (reading, computing) = roofs.seconds(product, profile.num_steps, num_rows);
    let (least, bound) = machine::bound(reading, computing);
    (*seconds > 0.0).then(|| (least / seconds, bound))
}

/// Why a phase has none.
const NO_SHARE: &str = "–: nothing to hold it against. What attention must read depends on the contexts, which the server does not count; \
    the other phases multiply with no weights.";

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
    let mut header = vec![Cell::new("PHASE"), right("MB".to_owned())];
    header.extend(columns.iter().map(|(name, _)| right(format!("{name}: share of"))));
    table.set_header(header);
    for (phase, _) in &first.phases {
        let product = info.products.iter().find(|product| product.part == phase);
        let size = product.map_or_else(String::new, |product| format!("{:.1}", product.num_bytes as f64 / 1e6));
        let mut cells = vec![Cell::new(phase), right(size)];
        cells.extend(columns.iter().zip(roofs).map(|((_, profile), roofs)| {
            right(match product.and_then(|product| share(roofs, product, profile)) {
                Some((share, bound)) => format!("{:.0} % {bound}", share * 100.0),
                None => "–".to_owned(),
            })
        }));
        table.add_row(cells);
    }
    let _ = writeln!(text, "{}\n{NO_SHARE}", show(&mut table));
    text
}

pub(crate) fn json(info: &ModelInfo, columns: &[(String, Profile)], roofs: &[Roofs]) -> Value {
    let loads = || columns.iter().zip(roofs);
    let shares: Vec<Value> = loads()
        .flat_map(|((load, profile), roofs)| {
            info.products.iter().filter_map(move |product| {
                let (share, bound) = share(roofs, product, profile)?;
                Some(json!({"load": load, "product": product.part, "share": share, "bound": bound}))
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
    use super::*;

    #[test]
    fn the_nearer_roof_counts() {
        let roofs = Roofs { read_bytes: 100.0, int8_operations: 1000.0, f32_operations: 10.0, int8_note: None };
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
