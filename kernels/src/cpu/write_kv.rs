//! Writes new keys and values to their slots.
//!
//! Knows slots, not sequences. Invariant: a head's keys are written by one thread, and so are its values, in the order of the
//! rows, so even a slot named twice has one writer at a time and ends as the last row says.

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
        self.each_head::<E>(cache, layer, k, v, slots, |Head { half, x, page, offset }| match half {
            Half::Keys => {
                for (chunk, from) in x.chunks(CONVERT_ELEMENTS).enumerate() {
                    let mut converted = [E::zeroed(); CONVERT_ELEMENTS];
                    convert(from, &mut converted[..from.len()]);
                    scatter(&converted[..from.len()], page, chunk * CONVERT_ELEMENTS * block_size + offset, block_size);
                }
            }
            Half::Values => convert(x, &mut page[offset * head_dim..(offset + 1) * head_dim]),
        });
    }

    /// In int8, with a scale for each group of a token's key and value: as activations are quantised, but for the scale as
    /// it is stored.
    fn write_codes(&self, cache: &mut KvCache, layer: usize, k: &[f32], v: &[f32], slots: &[u32]) {
        let KvShape { head_dim, block_size, .. } = *cache.shape();
        self.each_head::<i8>(cache, layer, k, v, slots, |Head { half, x, page, offset }| {
            for (group, x) in x.chunks(SCALE_GROUP).enumerate() {
                let first = group * SCALE_GROUP;
                let scale_at = head_dim * block_size + (group * block_size + offset) * size_of::<bf16>();
                let mut codes = [0; SCALE_GROUP];
                let codes = &mut codes[..x.len()];
                put_scale(page, scale_at, encode(x, codes));
                match half {
                    Half::Keys => scatter(codes, page, first * block_size + offset, block_size),
                    Half::Values => page[offset * head_dim + first..][..codes.len()].copy_from_slice(codes),
                }
            }
        });
    }

    /// Calls `write` for the key and for the value of every head of every row. Both halves of the heads are shared out over threads:
    /// three heads alone would be two for one of two threads.
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
        self.split(2 * num_kv_heads, min_heads, |heads| {
            for (row, &slot) in slots.iter().enumerate() {
                let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
                for head in heads.clone() {
                    let (half, head) = (head / num_kv_heads, head % num_kv_heads);
                    let first = block * shape.block_stride() + places[half] + head * page;
                    let source = (row * num_kv_heads + head) * head_dim;
                    let (half, x) = [(Half::Keys, k), (Half::Values, v)][half];
                    // SAFETY: pages of one head's keys, or values, belong to one piece.
                    let page = unsafe { elements.slice(first..first + page) };
                    write(Head { half, x: &x[source..source + head_dim], page, offset });
                }
            }
        });
    }
}

/// What a page holds, which says how: keys are `[head_dim, block_size]`, values `[block_size, head_dim]`; scales follow.
#[derive(Clone, Copy)]
enum Half {
    Keys,
    Values,
}

/// One row's key or value in one head, and the page it goes to.
struct Head<'a, E> {
    half: Half,
    /// `[head_dim]`
    x: &'a [f32],
    page: &'a mut [E],
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
