//! Attention of one span, one query after the other, straight from the pages.
//!
//! Tiles start at multiples of 64 absolute positions. A score's one accumulator walks the components in order; a
//! value's one accumulator walks the keys in order; a sum has sixteen lanes, by position mod 16. Codes are summed as
//! they are, a group of components at a time: a key's scale multiplies the group's dot product, which then joins the
//! score; a value's scale multiplies its weight.

use super::LANES;
use super::exp::{exp, tanh};
use crate::cpu::attention::{MAX_RISE, TILE_KEYS};
use crate::cpu::task::{KvElement, SpanTask};
use crate::kv::SCALE_GROUP;

/// # Safety
/// Safe in fact; unsafe to fit the table.
pub(super) unsafe fn attend<E: KvElement>(task: &mut SpanTask<'_, E>) {
    let width = task.head_dim.next_multiple_of(16);
    for query in 0..task.num_queries() {
        let visible = task.visible(query);
        let mut values = vec![0.0_f32; width];
        let (mut reference, mut sums) = (f32::NEG_INFINITY, [0.0_f32; LANES]);
        if !task.begins {
            values.copy_from_slice(&task.partial.values[query * width..(query + 1) * width]);
            reference = task.partial.references[query];
            sums.copy_from_slice(&task.partial.sums[query * LANES..(query + 1) * LANES]);
        }
        let mut tile = visible.start / TILE_KEYS * TILE_KEYS;
        while tile < visible.end && visible.start < visible.end {
            let keys = tile.max(visible.start)..(tile + TILE_KEYS).min(visible.end);
            tile += TILE_KEYS;
            let keys: Vec<usize> = keys.filter(|&key| task.sees(query, key)).collect();
            if keys.is_empty() {
                continue;
            }
            let scores: Vec<f32> = keys.iter().map(|&key| score(task, query, key)).collect();
            let highest = scores.iter().fold(f32::NEG_INFINITY, |max, &score| if score > max { score } else { max });
            if highest - reference > MAX_RISE {
                let rescale = exp(reference - highest);
                sums.iter_mut().chain(&mut values).for_each(|x| *x *= rescale);
                reference = highest;
            }
            let weights: Vec<f32> = scores.iter().map(|score| exp(score - reference)).collect();
            for (&key, weight) in keys.iter().zip(&weights) {
                sums[key % LANES] += weight;
            }
            for (i, value) in values[..task.head_dim].iter_mut().enumerate() {
                for (&key, &weight) in keys.iter().zip(&weights) {
                    let scale = scale(task, task.values, key, i / SCALE_GROUP);
                    *value = (weight * scale).mul_add(task.values[task.value_index(key) + i].widen(), *value);
                }
            }
        }
        task.partial.references[query] = reference;
        task.partial.sums[query * LANES..(query + 1) * LANES].copy_from_slice(&sums);
        task.partial.values[query * width..(query + 1) * width].copy_from_slice(&values);
    }
}

fn score<E: KvElement>(task: &SpanTask<'_, E>, query: usize, key: usize) -> f32 {
    let at = task.key_index(key);
    // Without scales a head is one group.
    let group_len = if E::HAS_SCALES { SCALE_GROUP } else { task.head_dim };
    let mut dot = 0.0_f32;
    for (group, query) in task.query(query).chunks(group_len).enumerate() {
        let at = at + group * group_len * task.block_size;
        let sum = query
            .iter()
            .enumerate()
            .fold(0.0_f32, |sum, (i, &q)| q.mul_add(task.keys[at + i * task.block_size].widen(), sum));
        dot = sum.mul_add(scale(task, task.keys, key, group), dot);
    }
    let mut score = dot * task.args.scale;
    if let Some(cap) = task.args.soft_cap {
        score = tanh(score / cap) * cap;
    }
    if let Some(biases) = task.args.biases {
        score += biases[task.head(query) * task.args.num_biases() + key];
    }
    score
}

/// The scale of a group of a key or a value; 1 where components are no codes.
fn scale<E: KvElement>(task: &SpanTask<'_, E>, half: &[E], key: usize, group: usize) -> f32 {
    if E::HAS_SCALES { task.scales(half, key, 1, group).next().unwrap_or(f32::NAN) } else { 1.0 }
}
