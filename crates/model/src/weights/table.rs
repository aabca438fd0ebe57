//! Roles to stored tensors: the table of names, resolved against what a file has.
//!
//! It must not know containers: names come in, and a lookup. Its invariant: every entry of the table it builds lies within a
//! stored tensor of exactly the shape that the config demands.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use super::{
    Place, StoredTensor, TensorRole, WeightFormat, grouped,
    names::{self, Expected, Naming, TensorKind, expected},
    native,
    safetensors::Checkpoint,
};
use crate::{ModelError, config::DecoderConfig};

/// What a source says of one tensor.
pub(super) struct Found {
    /// Outermost first, as in config terms: `[rows, cols]`, `[cols]`, or `[experts, rows, cols]`.
    pub(super) shape: Vec<usize>,
    pub(super) format: WeightFormat,
    pub(super) place: Place,
}

/// Finds every tensor that the config calls for and checks its shape; refuses files with tensors inside a layer that
/// this decoder would leave out.
pub(super) fn build_table(
    path: &Path,
    config: &DecoderConfig,
    naming: Naming,
    names: &[&str],
    lookup: impl Fn(&str) -> Result<Option<Found>, ModelError>,
) -> Result<HashMap<TensorRole, StoredTensor>, ModelError> {
    let mut tensors = HashMap::new();
    for tensor in expected(config) {
        // One missing tensor ends it, so a config that calls for more than a file has costs little.
        tensors.insert(tensor.role, find(path, config, naming, &tensor, &lookup)?);
    }
    let used: HashSet<&str> = tensors.values().map(|tensor| tensor.name.as_str()).collect();
    let is_grouped = |tensor: &&StoredTensor| matches!(tensor.place, Place::Grouped(_) | Place::Native(_));
    let grouped: HashSet<&str> = tensors.values().filter(is_grouped).map(|tensor| tensor.name.as_str()).collect();
    let is_part = |name: &str| {
        grouped::owner(name).is_some_and(|owner| grouped.contains(owner.as_str()))
            || native::owner(name).is_some_and(|owner| grouped.contains(owner))
    };
    let is_foreign =
        |name: &str| naming.is_foreign(name, config.num_layers(), |name| used.contains(name) || is_part(name));
    if let Some(name) = names.iter().find(|name| is_foreign(name)) {
        let what = format!(
            "tensor {name:?} is not part of the {} architecture as this version knows it, so answers would be wrong",
            config.architecture
        );
        return Err(ModelError::unsupported(path, what));
    }
    let mut others = names.iter().filter(|name| !naming.is_of_the_model(name) && !is_part(name));
    if let Some(example) = others.next() {
        tracing::info!(
            "{}: {} tensors are not part of the language model and are ignored, {example:?} for one",
            path.display(),
            1 + others.count()
        );
    }
    Ok(tensors)
}

/// One tensor, in the first place that the file has and whose shape is right.
fn find(
    path: &Path,
    config: &DecoderConfig,
    naming: Naming,
    tensor: &Expected,
    lookup: impl Fn(&str) -> Result<Option<Found>, ModelError>,
) -> Result<StoredTensor, ModelError> {
    let places = naming.places(config, tensor);
    let mut misfit = None;
    for place in &places {
        let Some(found) = lookup(&place.name)? else { continue };
        // Nobody quantises vectors; parts of such a shape are something else.
        let is_no_vector =
            matches!(found.place, Place::Grouped(_) | Place::Native(_)) && tensor.kind == TensorKind::Vector;
        if is_no_vector || significant(&found.shape) != significant(&place.shape) {
            misfit.get_or_insert((place, found));
            continue;
        }
        let &Expected { rows, cols, kind, .. } = tensor;
        return Ok(StoredTensor {
            name: place.name.clone(),
            rows,
            cols,
            kind,
            format: found.format,
            rows_at: place.rows_at,
            stored_cols: match kind {
                TensorKind::Matrix => cols,
                TensorKind::Vector => place.shape[0],
            },
            place: found.place,
        });
    }
    let name = &places[0].name;
    Err(ModelError::bad_file(
        path,
        match misfit {
            Some((place, found)) => format!(
                "tensor {:?} has the shape {:?}; the config calls for {:?}",
                place.name, found.shape, place.shape
            ),
            // Several places may lie in one tensor, with shapes of their own.
            None => match places
                .iter()
                .filter(|place| place.name != *name)
                .map(|place| format!("{:?}", place.name))
                .collect::<Vec<_>>()
            {
                others if others.is_empty() => format!("tensor {name:?} is missing"),
                others => {
                    format!("tensor {name:?} is missing, and {} too, where it could be instead", others.join(", "))
                }
            },
        },
    ))
}

/// Without outer sizes of one: GGUF does not tell a vector from a matrix of one row.
fn significant(shape: &[usize]) -> &[usize] {
    let ones = shape.iter().take_while(|&&size| size == 1).count();
    &shape[ones..]
}

/// Whether a checkpoint whose config ties the head to the embedding has a head with other values all the same. transformers
/// 5 does not tie them then (`tie_weights` in modeling_utils.py), whatever the config says.
pub(super) fn has_head_of_its_own(checkpoint: &Checkpoint, config: &DecoderConfig, naming: Naming) -> bool {
    let embedding = Expected {
        role: TensorRole::Embedding,
        rows: config.vocab_size,
        cols: config.hidden_size,
        kind: TensorKind::Matrix,
    };
    // The first place is the embedding's own.
    let embedding = naming.places(config, &embedding).first().and_then(|place| checkpoint.entries.get(&place.name));
    let head = names::head_names().find_map(|name| checkpoint.entries.get(&name));
    let (Some(embedding), Some(head)) = (embedding, head) else { return false };
    (embedding.dtype, &embedding.shape) != (head.dtype, &head.shape) || !checkpoint.hold_the_same(embedding, head)
}
