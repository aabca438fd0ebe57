//! Writes new keys and values to their slots.
//!
//! Knows slots, not sequences. Invariant: every key/value head is written by one thread, in the order of the rows, so
//! even a slot named twice has one writer at a time and ends as the last row says.

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::Cpu;
use super::pool::SharedMut;
use crate::kv::{KvCache, KvDtype};

/// Elements that are worth waking another thread for.
const MIN_PIECE_ELEMENTS: usize = 16 * 1024;
/// Components converted at a time, before they are scattered over a key page.
const CONVERT_ELEMENTS: usize = 64;

impl Cpu {
    /// Writes `k, v: [slots.len(), kv_heads * head_dim]`; slot = block * block_size + offset.
    pub fn write_kv(&self, cache: &mut KvCache, layer: usize, k: &[f32], v: &[f32], slots: &[u32]) {
        let width = cache.shape().num_kv_heads * cache.shape().head_dim;
        let num_slots = cache.num_blocks() * cache.shape().block_size;
        assert!(
            k.len() == slots.len() * width && v.len() == k.len(),
            "{} rows of {width} from {} keys and {} values",
            slots.len(),
            k.len(),
            v.len()
        );
        for &slot in slots {
            assert!((slot as usize) < num_slots, "slot {slot} of a cache of {num_slots} slots");
        }
        match cache.shape().dtype {
            KvDtype::F32 => self.write_as::<f32>(cache, layer, k, v, slots, |from, to| to.copy_from_slice(from)),
            // A slice at a time, so that the conversion runs in vectors.
            KvDtype::F16 => self.write_as::<f16>(cache, layer, k, v, slots, |from, to| to.convert_from_f32_slice(from)),
            KvDtype::Bf16 => {
                self.write_as::<bf16>(cache, layer, k, v, slots, |from, to| to.convert_from_f32_slice(from));
            }
        }
    }

    fn write_as<E: Pod + Send>(
        &self,
        cache: &mut KvCache,
        layer: usize,
        k: &[f32],
        v: &[f32],
        slots: &[u32],
        convert: impl Fn(&[f32], &mut [E]) + Sync,
    ) {
        let shape = *cache.shape();
        let (num_kv_heads, head_dim, block_size) = (shape.num_kv_heads, shape.head_dim, shape.block_size);
        let (keys, values) = cache.planes_mut(layer);
        let keys = SharedMut::new(bytemuck::cast_slice_mut::<u8, E>(keys));
        let values = SharedMut::new(bytemuck::cast_slice_mut::<u8, E>(values));
        let page = head_dim * block_size;
        let min_heads = MIN_PIECE_ELEMENTS.div_ceil((slots.len() * head_dim).max(1));
        self.split(num_kv_heads, min_heads, |heads| {
            for (row, &slot) in slots.iter().enumerate() {
                let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
                for head in heads.clone() {
                    let start = (block * num_kv_heads + head) * page;
                    let source = (row * num_kv_heads + head) * head_dim;
                    // SAFETY: pages of one head belong to one piece.
                    let (keys, values) =
                        unsafe { (keys.slice(start..start + page), values.slice(start..start + page)) };
                    for (chunk, from) in k[source..source + head_dim].chunks(CONVERT_ELEMENTS).enumerate() {
                        let mut converted = [E::zeroed(); CONVERT_ELEMENTS];
                        convert(from, &mut converted[..from.len()]);
                        let first = chunk * CONVERT_ELEMENTS * block_size + offset;
                        let targets = keys[first..].iter_mut().step_by(block_size);
                        for (target, &component) in targets.zip(&converted[..from.len()]) {
                            *target = component;
                        }
                    }
                    convert(&v[source..source + head_dim], &mut values[offset * head_dim..(offset + 1) * head_dim]);
                }
            }
        });
    }
}
