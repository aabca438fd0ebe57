//! Keys and values of one model, in pages.
//!
//! Knows blocks and slots, nothing of sequences. A block is `[num_layers, 2 (keys, values), kv_heads, page]`: all that its
//! tokens need lies together, so that the memory in use is a few large pages, whatever is touched in a step. (With a plane
//! for each layer, a step touched thousands of small pages of the system, and looking up where they are took up to a third
//! of its time.) Values lie row after row, `[block_size, head_dim]` a page; keys lie transposed, `[head_dim, block_size]`,
//! so that one vector holds the same component of 16 keys and a score needs no horizontal sum: its one accumulator walks
//! the components in order. In int8 a page ends with its scales, `[groups, block_size]` bf16: a token has one for every
//! [`SCALE_GROUP`] components, so that what it is stored as depends on no other, and 16 tokens' scales of a group are a
//! vector, as their components are. Invariant: blocks behind the last one written cost no memory, but for what is left of
//! a large page; a block's bytes move only as a whole.

use bytemuck::Pod;

use crate::KernelError;
use crate::memory::{Buffer, Use};

/// Components of a head that share a scale in int8; the last group of a head may be shorter. As in llama.cpp's Q8_0.
pub(crate) const SCALE_GROUP: usize = 32;
/// A scale is a bf16: all of f32's range, so that none overflows or vanishes, and its 8 bits are enough since codes are
/// made for the scale as it is stored.
const SCALE_BYTES: usize = size_of::<half::bf16>();

/// How keys and values are stored; arithmetic is f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// 4 bytes an element.
    F32,
    /// 2 bytes an element, 11 significant bits.
    F16,
    /// 2 bytes an element, 8 significant bits.
    Bf16,
    /// 1 byte an element, and 2 for the scale that every 32 elements of a token's key (or value) share in each head.
    Int8,
}

impl KvDtype {
    /// Bytes of an element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Bytes of a token's key (or value) in one head of `head_dim` components, scales included.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        (head_dim + self.scale_elements(head_dim)) * self.size_bytes()
    }

    /// Elements whose room the scales of a token's key (or value) take in its head's page.
    fn scale_elements(self, head_dim: usize) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 0,
            Self::Int8 => head_dim.div_ceil(SCALE_GROUP) * SCALE_BYTES,
        }
    }
}

/// What a cache is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that attend.
    pub num_layers: usize,
    /// Key/value heads of a layer.
    pub num_kv_heads: usize,
    /// Components of a head.
    pub head_dim: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Storage type.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Bytes of one block's keys and values over all layers; none when that does not fit an address.
    pub fn block_bytes(&self) -> Option<usize> {
        self.block_elements()?.checked_mul(self.dtype.size_bytes())?.checked_mul(2)?.checked_mul(self.num_layers)
    }

    /// Elements of one block's keys (or values) in one layer.
    fn block_elements(&self) -> Option<usize> {
        let head = self.head_dim.checked_add(self.dtype.scale_elements(self.head_dim))?;
        self.num_kv_heads.checked_mul(head)?.checked_mul(self.block_size)
    }

    /// Elements of a layer's keys (or values) in one block.
    fn half_elements(&self) -> usize {
        self.num_kv_heads * self.page_elements()
    }

    /// Elements from one block to the next.
    pub(crate) fn block_stride(&self) -> usize {
        2 * self.num_layers * self.half_elements()
    }

    /// Where a layer's keys and its values begin in a block, in elements: `kv_heads` pages each.
    pub(crate) fn layer_places(&self, layer: usize) -> [usize; 2] {
        assert!(layer < self.num_layers, "layer {layer} of a cache of {} layers", self.num_layers);
        [2 * layer, 2 * layer + 1].map(|half| half * self.half_elements())
    }

    /// Elements of one head's page: a block's keys (or values) and, behind them, their scales.
    pub(crate) fn page_elements(&self) -> usize {
        (self.head_dim + self.dtype.scale_elements(self.head_dim)) * self.block_size
    }
}

/// The paged key/value cache of one model.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    num_blocks: usize,
    /// `[num_blocks, num_layers, 2 (keys, values), kv_heads, page]`
    bytes: Buffer<u8>,
}

impl KvCache {
    /// Reserves address space for `num_blocks` blocks; memory is used as blocks are written, best from the first one on.
    pub fn new(shape: KvShape, num_blocks: usize) -> Result<Self, KernelError> {
        let refused = || KernelError::KvShape { shape: format!("{shape:?}"), num_blocks };
        let zero = [shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.block_size].contains(&0);
        let bytes = shape.block_bytes().and_then(|bytes| bytes.checked_mul(num_blocks)).filter(|_| !zero);
        // Slots are handed around as u32.
        let slots = num_blocks.checked_mul(shape.block_size).filter(|&slots| u32::try_from(slots).is_ok());
        let (Some(bytes), Some(_)) = (bytes, slots) else { return Err(refused()) };
        Ok(Self { shape, num_blocks, bytes: Buffer::zeroed(bytes, Use::Blocks)? })
    }

    /// What it was made for.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Blocks it has.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Bytes reserved (used are only those of blocks once written).
    pub fn size_bytes(&self) -> usize {
        self.bytes.size_bytes()
    }

    /// Copies a whole block in every layer.
    pub fn copy_block(&mut self, source: u32, target: u32) {
        let (source, target) = (source as usize, target as usize);
        for block in [source, target] {
            assert!(block < self.num_blocks, "block {block} of a cache of {} blocks", self.num_blocks);
        }
        let block_bytes = self.shape.block_stride() * self.shape.dtype.size_bytes();
        self.bytes.copy_within(source * block_bytes..(source + 1) * block_bytes, target * block_bytes);
    }

    /// As bytes, from a layer's keys in block 0 on, and from its values on; the next block's lie [`KvShape::block_stride`] further.
    pub(crate) fn halves(&self, layer: usize) -> (&[u8], &[u8]) {
        let places = self.shape.layer_places(layer).map(|place| place * self.shape.dtype.size_bytes());
        // A cache of no blocks has no such places, and nobody reads there.
        let [keys, values] = places.map(|place| self.bytes.get(place..).unwrap_or_default());
        (keys, values)
    }

    /// Elements of all blocks, for writing; see [`KvShape::block_stride`] and [`KvShape::layer_places`].
    pub(crate) fn elements_mut<E: Pod>(&mut self) -> &mut [E] {
        bytemuck::cast_slice_mut(&mut self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { num_layers: 3, num_kv_heads: 2, head_dim: 4, block_size: 5, dtype: KvDtype::F16 };

    #[test]
    fn impossible_caches_are_errors() {
        for shape in [KvShape { head_dim: 0, ..SHAPE }, KvShape { num_kv_heads: usize::MAX, ..SHAPE }] {
            assert!(matches!(KvCache::new(shape, 1), Err(KernelError::KvShape { .. })));
        }
        assert!(matches!(KvCache::new(SHAPE, usize::MAX), Err(KernelError::KvShape { .. })));
        // Miri has no address space to refuse.
        if cfg!(miri) {
            return;
        }
        let huge = KvShape { num_layers: 1 << 30, num_kv_heads: 1 << 10, head_dim: 1 << 10, ..SHAPE };
        assert!(matches!(KvCache::new(huge, 256), Err(KernelError::OutOfMemory { .. })));
    }

    #[test]
    fn copy_block_copies_all_of_it_and_nothing_else() {
        let mut cache = KvCache::new(SHAPE, 4).unwrap();
        let block_bytes = SHAPE.block_bytes().unwrap();
        assert_eq!(cache.size_bytes(), 4 * block_bytes);
        assert_eq!(SHAPE.block_stride() * 2, block_bytes);
        for (i, byte) in cache.bytes.iter_mut().enumerate() {
            *byte = (i % 251) as u8;
        }
        let before = cache.bytes.to_vec();
        cache.copy_block(3, 1);
        for (i, block) in cache.bytes.chunks_exact(block_bytes).enumerate() {
            let source = if i == 1 { 3 } else { i };
            assert_eq!(block, &before[source * block_bytes..(source + 1) * block_bytes], "block {i}");
        }
    }

    #[test]
    fn layers_share_a_block_and_nothing_of_it_is_left_over() {
        let half = 2 * 4 * 5;
        let places: Vec<[usize; 2]> = (0..3).map(|layer| SHAPE.layer_places(layer)).collect();
        assert_eq!(places, [[0, half], [2 * half, 3 * half], [4 * half, 5 * half]]);
        assert_eq!(SHAPE.block_stride(), 6 * half);
    }
}
