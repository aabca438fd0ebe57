//! Writes new keys and values to their slots.
//!
//! Knows slots, not sequences. Invariant: every key/value head is written by one thread, in the order of the rows, so
//! even a slot named twice has one writer at a time and ends as the last row says.

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::Cpu;
use super::pool::SharedMut;
use super::scalar::quantize::{code, scale_and_factor};
use crate::kv::{KvCache, KvDtype, KvShape, SCALE_GROUP};

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
            KvDtype::Int8 => self.write_codes(cache, layer, k, v, slots),
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
        let KvShape { head_dim, block_size, .. } = *cache.shape();
        self.each_head::<E>(cache, layer, k, v, slots, |Head { k, v, keys, values, offset }| {
            for (chunk, from) in k.chunks(CONVERT_ELEMENTS).enumerate() {
                let mut converted = [E::zeroed(); CONVERT_ELEMENTS];
                convert(from, &mut converted[..from.len()]);
                scatter(&converted[..from.len()], keys, chunk * CONVERT_ELEMENTS * block_size + offset, block_size);
            }
            convert(v, &mut values[offset * head_dim..(offset + 1) * head_dim]);
        });
    }

    /// In int8, with a scale for each group of a token's key and value: as activations are quantised, but for the scale as
    /// it is stored.
    fn write_codes(&self, cache: &mut KvCache, layer: usize, k: &[f32], v: &[f32], slots: &[u32]) {
        let KvShape { head_dim, block_size, .. } = *cache.shape();
        self.each_head::<i8>(cache, layer, k, v, slots, |Head { k, v, keys, values, offset }| {
            for (group, (k, v)) in k.chunks(SCALE_GROUP).zip(v.chunks(SCALE_GROUP)).enumerate() {
                let first = group * SCALE_GROUP;
                let scale_at = head_dim * block_size + (group * block_size + offset) * size_of::<bf16>();
                let mut codes = [0; SCALE_GROUP];
                let codes = &mut codes[..k.len()];
                put_scale(keys, scale_at, encode(k, codes));
                scatter(codes, keys, first * block_size + offset, block_size);
                let codes = &mut values[offset * head_dim + first..][..v.len()];
                let scale = encode(v, codes);
                put_scale(values, scale_at, scale);
            }
        });
    }

    /// Calls `write` for every key/value head of every row; heads are shared out over threads.
    fn each_head<E: Pod + Send>(
        &self,
        cache: &mut KvCache,
        layer: usize,
        k: &[f32],
        v: &[f32],
        slots: &[u32],
        write: impl Fn(Head<'_, E>) + Sync,
    ) {
        let shape = *cache.shape();
        let (num_kv_heads, head_dim, block_size) = (shape.num_kv_heads, shape.head_dim, shape.block_size);
        let elements = SharedMut::new(cache.elements_mut::<E>());
        let (page, places) = (shape.page_elements(), shape.layer_places(layer));
        let min_heads = MIN_PIECE_ELEMENTS.div_ceil((slots.len() * head_dim).max(1));
        self.split(num_kv_heads, min_heads, |heads| {
            for (row, &slot) in slots.iter().enumerate() {
                let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
                for head in heads.clone() {
                    let [keys, values] = places.map(|place| block * shape.block_stride() + place + head * page);
                    let source = (row * num_kv_heads + head) * head_dim;
                    let source = source..source + head_dim;
                    // SAFETY: pages of one head belong to one piece, and those of keys and values are two.
                    let (keys, values) =
                        unsafe { (elements.slice(keys..keys + page), elements.slice(values..values + page)) };
                    write(Head { k: &k[source.clone()], v: &v[source], keys, values, offset });
                }
            }
        });
    }
}

/// One row's key and value in one head, and the pages they go to.
struct Head<'a, E> {
    /// `[head_dim]`
    k: &'a [f32],
    v: &'a [f32],
    /// `[head_dim, block_size]` and scales.
    keys: &'a mut [E],
    /// `[block_size, head_dim]` and scales.
    values: &'a mut [E],
    /// The token's place in the block.
    offset: usize,
}

/// A group's codes, and its scale. The codes are made for the scale as it is stored, so that its rounding costs at most
/// another quarter of a step at the largest element.
fn encode(x: &[f32], codes: &mut [i8]) -> bf16 {
    let (scale, factor) = scale_and_factor(x);
    let scale = bf16::from_f32(scale);
    let factor = if factor == 0.0 { 0.0 } else { 1.0 / scale.to_f32() };
    codes.iter_mut().zip(x).for_each(|(to, &x)| *to = code(x, factor));
    scale
}

fn put_scale(page: &mut [i8], at: usize, scale: bf16) {
    let bytes = scale.to_le_bytes();
    page[at..at + bytes.len()].copy_from_slice(bytemuck::cast_slice(&bytes));
}

/// To every `stride`-th element from `first` on.
fn scatter<E: Copy>(from: &[E], to: &mut [E], first: usize, stride: usize) {
    for (target, &element) in to[first..].iter_mut().step_by(stride).zip(from) {
        *target = element;
    }
}
