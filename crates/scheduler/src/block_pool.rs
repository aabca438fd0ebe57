//! The blocks of the KV cache, by number: who may hold how many.
//!
//! It knows counts and references, never what a block contains nor whose it is. Its invariant is a sum: every block
//! is free, cached or referenced, exactly one of them. (No block is cached yet. The prefix cache joins where a count
//! falls to zero, in [`BlockPool::release`]: there a full block will go to an LRU list with its content's key instead
//! of the free list, and [`BlockPool::try_allocate`] will take from that list when the free one is empty. Callers see
//! no difference: what can be allocated stays [`BlockPool::num_free`].)
//!
//! Blocks are handed out in a fixed order (last freed first, at the start ascending), so that equal histories give
//! equal block tables.

use crate::{ids::BlockId, plan::BlockCopy};

/// A fixed number of blocks with reference counts.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    /// Blocks nobody holds; the next one to hand out is the last.
    free: Vec<BlockId>,
    /// Holders of each block, `[num_blocks]`.
    ref_counts: Vec<u32>,
    /// Slots of each block that hold a computed token, `[num_blocks]`; 0 where the block is free.
    num_filled_slots: Vec<u32>,
    /// Sum of `num_filled_slots`.
    num_filled_total: usize,
}

impl BlockPool {
    /// `num_blocks` free blocks of `block_size` slots each.
    ///
    /// # Panics
    /// Where a number is zero or the slots do not fit a `u32`.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        assert!(num_blocks > 0, "num_blocks must be > 0");
        assert!(block_size > 0, "block_size must be > 0");
        let num_slots = num_blocks.checked_mul(block_size).and_then(|slots| u32::try_from(slots).ok());
        assert!(num_slots.is_some(), "{num_blocks} blocks of {block_size} slots are more than slot ids can name");
        Self {
            block_size,
            free: (0..num_blocks as u32).rev().map(BlockId).collect(),
            ref_counts: vec![0; num_blocks],
            num_filled_slots: vec![0; num_blocks],
            num_filled_total: 0,
        }
    }

    /// All blocks.
    pub fn num_blocks(&self) -> usize {
        self.ref_counts.len()
    }

    /// Slots of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks that can be allocated.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks somebody holds.
    pub fn num_referenced(&self) -> usize {
        self.num_blocks() - self.num_free()
    }

    /// Slots of referenced blocks that hold no computed token.
    pub fn num_unused_slots(&self) -> usize {
        self.num_referenced() * self.block_size - self.num_filled_total
    }

    /// How many hold the block.
    pub fn ref_count(&self, block: BlockId) -> u32 {
        self.ref_counts[block.0 as usize]
    }

    /// Whether writing into the block would be seen by another holder.
    pub fn is_shared(&self, block: BlockId) -> bool {
        self.ref_count(block) > 1
    }

    /// Slots of the block that hold a computed token.
    pub fn num_filled_slots(&self, block: BlockId) -> usize {
        self.num_filled_slots[block.0 as usize] as usize
    }

    /// The blocks nobody holds, next one last.
    pub fn free_blocks(&self) -> &[BlockId] {
        &self.free
    }

    /// Appends `num_wanted` blocks, each held once, to `blocks`; or does nothing and returns false.
    #[must_use]
    pub fn try_allocate(&mut self, num_wanted: usize, blocks: &mut Vec<BlockId>) -> bool {
        let Some(num_kept) = self.free.len().checked_sub(num_wanted) else { return false };
        for block in self.free.drain(num_kept..).rev() {
            let count = &mut self.ref_counts[block.0 as usize];
            assert!(*count == 0, "a free block is held by nobody");
            *count = 1;
            blocks.push(block);
        }
        true
    }

    /// One more holds the block.
    pub fn share(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block.0 as usize];
        assert!(*count > 0, "only a held block can be shared");
        *count += 1;
    }

    /// One less holds the block; the last one frees it.
    pub fn release(&mut self, block: BlockId) {
        let index = block.0 as usize;
        let count = &mut self.ref_counts[index];
        assert!(*count > 0, "a block is released once by each holder");
        *count -= 1;
        if *count == 0 {
            self.num_filled_total -= self.num_filled_slots[index] as usize;
            self.num_filled_slots[index] = 0;
            self.free.push(block);
        }
    }

    /// One holder of a shared block gets a block of its own (copy-on-write): allocates the target, gives up the
    /// source, and says what must be copied before the next write. None, and nothing changed, where no block is free.
    #[must_use]
    pub fn try_unshare(&mut self, source: BlockId) -> Option<BlockCopy> {
        assert!(self.is_shared(source), "a block with one holder is written in place");
        let target = self.free.pop()?;
        assert!(self.ref_counts[target.0 as usize] == 0, "a free block is held by nobody");
        self.ref_counts[target.0 as usize] = 1;
        self.ref_counts[source.0 as usize] -= 1;
        let num_copied = self.num_filled_slots[source.0 as usize];
        self.num_filled_slots[target.0 as usize] = num_copied;
        self.num_filled_total += num_copied as usize;
        Some(BlockCopy { source, target })
    }

    /// Records that the first `num_slots` slots of a block hold computed tokens. They only grow while it is held.
    pub fn set_filled(&mut self, block: BlockId, num_slots: usize) {
        let index = block.0 as usize;
        let old = self.num_filled_slots[index] as usize;
        assert!(self.ref_counts[index] > 0 && num_slots >= old && num_slots <= self.block_size);
        self.num_filled_slots[index] = num_slots as u32;
        self.num_filled_total += num_slots - old;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocation_is_all_or_nothing_and_in_a_fixed_order() {
        let mut pool = BlockPool::new(4, 16);
        let mut blocks = Vec::new();
        assert!(pool.try_allocate(3, &mut blocks));
        assert_eq!(blocks, [BlockId(0), BlockId(1), BlockId(2)]);
        assert!(!pool.try_allocate(2, &mut blocks));
        assert_eq!((blocks.len(), pool.num_free(), pool.num_referenced()), (3, 1, 3));
        pool.release(BlockId(1));
        blocks.clear();
        assert!(pool.try_allocate(2, &mut blocks));
        assert_eq!(blocks, [BlockId(1), BlockId(3)], "the last freed comes first");
        assert!(pool.try_allocate(0, &mut blocks), "nothing can always be had");
    }

    #[test]
    fn a_shared_block_is_freed_by_its_last_holder() {
        let mut pool = BlockPool::new(2, 4);
        let mut blocks = Vec::new();
        assert!(pool.try_allocate(1, &mut blocks));
        pool.share(blocks[0]);
        pool.release(blocks[0]);
        assert_eq!((pool.num_free(), pool.ref_count(blocks[0])), (1, 1));
        pool.release(blocks[0]);
        assert_eq!((pool.num_free(), pool.ref_count(blocks[0])), (2, 0));
    }

    #[test]
    fn unsharing_moves_one_reference_to_a_fresh_block() {
        let mut pool = BlockPool::new(2, 4);
        let mut blocks = Vec::new();
        assert!(pool.try_allocate(1, &mut blocks));
        pool.set_filled(blocks[0], 3);
        pool.share(blocks[0]);
        assert_eq!(pool.num_unused_slots(), 1);
        let copy = pool.try_unshare(blocks[0]).unwrap();
        assert_eq!(copy, BlockCopy { source: BlockId(0), target: BlockId(1) });
        assert_eq!((pool.ref_count(copy.source), pool.ref_count(copy.target)), (1, 1));
        assert_eq!((pool.num_filled_slots(copy.target), pool.num_unused_slots()), (3, 2));
        pool.share(blocks[0]);
        assert_eq!(pool.try_unshare(blocks[0]), None, "no block is free");
        assert_eq!(pool.ref_count(blocks[0]), 2, "and nothing has changed");
    }

    #[test]
    #[should_panic(expected = "released once by each holder")]
    fn releasing_twice_is_a_bug() {
        let mut pool = BlockPool::new(1, 4);
        pool.release(BlockId(0));
    }

    #[test]
    #[should_panic(expected = "more than slot ids can name")]
    fn slot_ids_must_suffice() {
        BlockPool::new(1 << 30, 16);
    }
}
