//! Attention over pages: splits rows and heads over threads, and long contexts into spans.
//!
//! A query's keys are walked in spans of [`SPAN_KEYS`] absolute positions, each span in tiles of [`TILE_KEYS`]; spans
//! are computed each for itself and joined in ascending order. So a long context can be computed by many threads, and
//! chunking, batching and threads change nothing: the pieces depend on the position alone. Within a span the softmax is
//! online (Milakov and Gimelshein 2018), but sums and values are rescaled only when a tile's highest score is much above what
//! is taken from scores ([`MAX_RISE`]): any reference that is near enough to the maximum gives the same quotient.
//! Invariant: a query sees the keys `max(0, p + 1 - window)..=p`, of these those that its head's pattern lets through, and
//! no others.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use super::Cpu;
use super::pool::SharedMut;
use super::scalar::exp::exp;
use super::scalar::{LANES, join_lanes};
use super::task::{Partial, SpanTask};
use crate::kv::{KvCache, KvDtype, KvShape};

/// Keys of a tile: scores are made, then weighed, a tile at a time.
pub(crate) const TILE_KEYS: usize = 64;
/// Keys of a span: the unit in which a long context is split over threads.
pub(crate) const SPAN_KEYS: usize = 512;
/// How far a score may be above what is taken from it before exp: f32 holds sums of e^16 as it holds those of 1.
pub(crate) const MAX_RISE: f32 = 16.0;
/// Rows of one piece: their queries meet a tile while it is in a core's caches.
const PIECE_ROWS: usize = 32;
/// Queries of a piece with more rows than that: they share what bringing and converting a tile takes.
const PIECE_QUERIES: usize = 256;
/// Queries of a head from which on they spend their time computing: it is walked alone, and kernels convert a tile to f32 once,
/// instead of for every few queries. With fewer, all heads of a tile are met before the next tile is, since they lie side by
/// side in memory and tiles of one head far apart: the processors' own prefetchers run ahead then, which have more lines under
/// way than a core can ask for. (Contexts of one span gain nothing.)
pub(crate) const MANY_QUERIES: usize = 12;
/// Tasks for a thread that heads walked together must leave.
const TASKS_PER_THREAD: usize = 4;
/// Key visits (queries times keys) that are worth waking another thread for.
const MIN_REGION_VISITS: usize = 1024;

/// One sequence's rows in an attention call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionSequence<'a> {
    /// Its rows in `q` and `out`: the last tokens of its context, in order.
    pub rows: Range<usize>,
    /// Tokens in the cache, these rows included: row `rows.start + i` stands at position
    /// `context_len - rows.len() + i`.
    pub context_len: usize,
    /// Blocks of the sequence; those a window has left behind are never read and may name any block.
    pub block_table: &'a [u32],
}

/// A pattern of key blocks, counted from position 0: those near a query's own and, further back, every so-many-th, which
/// ones depending on the head (Phi-3-small's blocksparse attention).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseBlocks {
    /// Positions of a block.
    pub block_size: usize,
    /// Blocks that a query sees up to its own, that one included.
    pub num_local_blocks: usize,
    /// Further back block b of head h is seen where `b + h * head_step + 1` is a multiple of this.
    pub vertical_stride: usize,
    /// 0: the same blocks in all heads.
    pub head_step: usize,
}

impl SparseBlocks {
    /// Whether a head's query at `position` sees the block number `block`, if the keys in it are not after the query.
    fn sees_block(&self, head: usize, position: usize, block: usize) -> bool {
        (position / self.block_size).saturating_sub(block) < self.num_local_blocks
            || (block + head * self.head_step + 1).is_multiple_of(self.vertical_stride)
    }

    /// Whether a head's query at `position` sees the key at `key`, which is not after it.
    pub(crate) fn sees(&self, head: usize, position: usize, key: usize) -> bool {
        self.sees_block(head, position, key / self.block_size)
    }

    /// Whether it sees any of these keys.
    pub(crate) fn sees_any(&self, head: usize, position: usize, keys: &Range<usize>) -> bool {
        let blocks = keys.start / self.block_size..keys.end.div_ceil(self.block_size);
        !keys.is_empty() && blocks.into_iter().any(|block| self.sees_block(head, position, block))
    }
}

/// How scores are made; one value serves all sequences of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionArgs<'a> {
    /// Query heads; a multiple of the cache's key/value heads.
    pub num_heads: usize,
    /// Factor of the dot products.
    pub scale: f32,
    /// Keys visible to a row at position p: p - window < key <= p.
    pub window: Option<usize>,
    /// Which of these it sees; none: all.
    pub blocks: Option<SparseBlocks>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Added to scores that are scaled and capped, one for each query head and position of a key: `[num_heads, positions]`,
    /// positions a multiple of 64 and no fewer than any context has (ALiBi).
    pub biases: Option<&'a [f32]>,
}

impl AttentionArgs<'_> {
    /// The first position that a query at `position` sees, but for blocks.
    pub(crate) fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Of one head.
    pub(crate) fn num_biases(&self) -> usize {
        self.biases.map_or(0, |biases| biases.len() / self.num_heads)
    }
}

/// Rows of a sequence that are computed together, for some key/value heads.
struct Piece {
    sequence: usize,
    rows: Range<usize>,
    first_position: usize,
    kv_heads: Range<usize>,
    /// Spans from this one to the one that holds the last row.
    first_span: usize,
    num_spans: usize,
    /// Where its first span's partial lies, in queries, when spans are computed apart.
    partial_query: usize,
}

/// Memory a thread keeps between calls.
#[derive(Default)]
struct Scratch {
    /// Joined state and one span's: values, reference and sums of every query of a piece, twice.
    partials: Vec<f32>,
    pages: Pages,
}

/// Room that kernels write a tile and queries to; see [`SpanTask`].
#[derive(Default)]
struct Pages {
    /// Pages laid out anew.
    elements: Vec<f32>,
    scales: Vec<f32>,
    queries: Vec<f32>,
}

/// Memory the calling thread keeps between calls, so that a step no larger than one before allocates nothing.
#[derive(Default)]
struct CallScratch {
    /// Rows that a sequence names, while they are checked.
    named: Vec<bool>,
    pieces: Vec<Piece>,
    /// Piece and span of each task, where spans are computed apart.
    tasks: Vec<(usize, usize)>,
    states: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static CALL_SCRATCH: RefCell<CallScratch> = RefCell::default();
}

impl Cpu {
    /// Causal attention over pages: `q, out: [m, num_heads * head_dim]`; rows that no sequence names are left alone.
    /// A sequence's own keys and values are written before.
    pub fn attention(
        &self,
        q: &[f32],
        cache: &KvCache,
        layer: usize,
        sequences: &[AttentionSequence<'_>],
        args: &AttentionArgs<'_>,
        out: &mut [f32],
    ) {
        // Taken, not borrowed: a panic in a check leaves an empty one behind and nothing locked.
        let mut scratch = CALL_SCRATCH.take();
        check(q, cache, sequences, args, out, &mut scratch.named);
        let (keys, values) = cache.halves(layer);
        let kernels = self.kernels;
        match cache.shape().dtype {
            KvDtype::F32 => {
                let call = Call { q, args, sequences, shape: cache.shape(), keys: cast(keys), values: cast(values) };
                self.attend::<f32>(kernels.attention_f32, &call, out, &mut scratch);
            }
            KvDtype::F16 => {
                let call = Call { q, args, sequences, shape: cache.shape(), keys: cast(keys), values: cast(values) };
                self.attend::<f16>(kernels.attention_f16, &call, out, &mut scratch);
            }
            KvDtype::Bf16 => {
                let call = Call { q, args, sequences, shape: cache.shape(), keys: cast(keys), values: cast(values) };
                self.attend::<bf16>(kernels.attention_bf16, &call, out, &mut scratch);
            }
            KvDtype::Int8 => {
                let call = Call { q, args, sequences, shape: cache.shape(), keys: cast(keys), values: cast(values) };
                self.attend::<i8>(kernels.attention_i8, &call, out, &mut scratch);
            }
        }
        CALL_SCRATCH.set(scratch);
    }

    fn attend<E: Sync>(
        &self,
        kernel: unsafe fn(&mut SpanTask<'_, E>),
        call: &Call<'_, E>,
        out: &mut [f32],
        scratch: &mut CallScratch,
    ) {
        let CallScratch { pieces, tasks, states, .. } = scratch;
        pieces.clear();
        let mut visits = 0;
        let heads_together = call.heads_together(self.threads());
        let piece_rows = call.piece_rows(self.threads());
        for (index, sequence) in call.sequences.iter().enumerate() {
            visits += sequence.rows.len() * sequence.context_len * call.args.num_heads;
            call.pieces_of(index, sequence, piece_rows, heads_together, pieces);
        }
        let out = &SharedMut::new(out);
        if visits < MIN_REGION_VISITS || self.threads() == 1 {
            for piece in pieces.iter() {
                call.run_piece(kernel, piece, out);
            }
        } else if pieces.len() >= self.threads() * super::PIECES_PER_THREAD || pieces.iter().all(|p| p.num_spans == 1) {
            if pieces.iter().all(|piece| piece.num_spans == pieces[0].num_spans) {
                self.pool.run(pieces.len(), |index| call.run_piece(kernel, &pieces[index], out));
            } else {
                put_longest_first(pieces);
                self.pool.run_longest_first(pieces.len(), |index| call.run_piece(kernel, &pieces[index], out));
            }
        } else {
            self.attend_by_spans(kernel, call, pieces, out, tasks, states);
        }
    }

    /// Few pieces with long contexts: every span is a task of its own, and a second region joins them.
    fn attend_by_spans<E: Sync>(
        &self,
        kernel: unsafe fn(&mut SpanTask<'_, E>),
        call: &Call<'_, E>,
        pieces: &mut [Piece],
        out: &SharedMut<f32>,
        tasks: &mut Vec<(usize, usize)>,
        states: &mut Vec<f32>,
    ) {
        let mut num_queries = 0;
        tasks.clear();
        for (index, piece) in pieces.iter_mut().enumerate() {
            piece.partial_query = num_queries;
            num_queries += piece.num_spans * call.queries_of(piece);
            tasks.extend((0..piece.num_spans).map(|span| (index, span)));
        }
        let pieces = &*pieces;
        let stride = call.state_len();
        // What is left over from earlier is written before it is read.
        states.resize(states.len().max(num_queries * stride), 0.0);
        let shared = &SharedMut::new(&mut states[..num_queries * stride]);
        self.pool.run(tasks.len(), |task| {
            let (piece, span) = (&pieces[tasks[task].0], tasks[task].1);
            let queries = call.queries_of(piece);
            let first = piece.partial_query + span * queries;
            // SAFETY: every task has queries of its own.
            let state = unsafe { shared.slice(first * stride..(first + queries) * stride) };
            SCRATCH.with_borrow_mut(|scratch| call.run_span(kernel, piece, span, false, state, &mut scratch.pages));
        });
        self.pool.run(pieces.len(), |index| {
            let piece = &pieces[index];
            let queries = call.queries_of(piece);
            let first = piece.partial_query * stride;
            // SAFETY: the region that wrote the states is over; every piece has states of its own.
            let states = unsafe { shared.slice(first..first + piece.num_spans * queries * stride) };
            let (joined, others) = states.split_at_mut(queries * stride);
            for span in others.chunks_exact(queries * stride) {
                call.join(piece, joined, span);
            }
            call.finish(piece, joined, out);
        });
    }
}

/// What is drawn last should be short.
fn put_longest_first(pieces: &mut [Piece]) {
    pieces.sort_unstable_by_key(|piece| std::cmp::Reverse(piece.num_spans));
}

fn cast<E: bytemuck::Pod>(half: &[u8]) -> &[E] {
    bytemuck::cast_slice(half)
}

fn check(
    q: &[f32],
    cache: &KvCache,
    sequences: &[AttentionSequence<'_>],
    args: &AttentionArgs<'_>,
    out: &[f32],
    named: &mut Vec<bool>,
) {
    let shape = cache.shape();
    let width = args.num_heads * shape.head_dim;
    assert!(
        args.num_heads > 0 && args.num_heads.is_multiple_of(shape.num_kv_heads),
        "{} query heads cannot share {} key/value heads",
        args.num_heads,
        shape.num_kv_heads
    );
    assert!(q.len() == out.len() && q.len().is_multiple_of(width), "q of {}, out of {}", q.len(), out.len());
    assert!(args.window != Some(0), "a window of 0 sees nothing");
    if let Some(blocks) = args.blocks {
        let sizes = [blocks.block_size, blocks.num_local_blocks, blocks.vertical_stride];
        assert!(!sizes.contains(&0), "a pattern of blocks with a zero: {blocks:?}");
    }
    if let Some(biases) = args.biases {
        let len = args.num_biases();
        assert!(
            biases.len() == args.num_heads * len && len.is_multiple_of(TILE_KEYS),
            "{} biases for {} heads: each takes a multiple of {TILE_KEYS}",
            biases.len(),
            args.num_heads
        );
        let longest = sequences.iter().map(|sequence| sequence.context_len).max().unwrap_or(0);
        assert!(longest <= len, "biases of {len} positions for a context of {longest}");
    }
    named.clear();
    named.resize(q.len() / width, false);
    for AttentionSequence { rows, context_len, block_table } in sequences {
        assert!(rows.start <= rows.end && rows.end <= named.len(), "rows {rows:?} of {}", named.len());
        for row in rows.clone() {
            assert!(!std::mem::replace(&mut named[row], true), "row {row} belongs to two sequences");
        }
        assert!(rows.len() <= *context_len, "{} rows in a context of {context_len}", rows.len());
        let blocks = context_len.div_ceil(shape.block_size);
        assert!(blocks <= block_table.len(), "{context_len} tokens need {blocks} blocks, got {}", block_table.len());
        for &block in *block_table {
            assert!((block as usize) < cache.num_blocks(), "block {block} of a cache of {}", cache.num_blocks());
        }
    }
}

/// The arguments of one attention call, checked.
struct Call<'a, E> {
    q: &'a [f32],
    args: &'a AttentionArgs<'a>,
    sequences: &'a [AttentionSequence<'a>],
    shape: &'a KvShape,
    /// From the layer's keys (and values) in block 0 on.
    keys: &'a [E],
    values: &'a [E],
}

impl<E> Call<'_, E> {
    fn heads_per_kv(&self) -> usize {
        self.args.num_heads / self.shape.num_kv_heads
    }

    /// Of all its heads.
    fn queries_of(&self, piece: &Piece) -> usize {
        piece.kv_heads.len() * self.queries_of_head(piece)
    }

    /// Of each of its heads.
    fn queries_of_head(&self, piece: &Piece) -> usize {
        piece.rows.len() * self.heads_per_kv()
    }

    /// Floats of the state of one of its heads.
    fn head_state_len(&self, piece: &Piece) -> usize {
        self.queries_of_head(piece) * self.state_len()
    }

    /// Spans of which rows, one at least, from `first_position` on see something.
    fn spans_of(&self, first_position: usize, num_rows: usize) -> Range<usize> {
        let last_position = first_position + num_rows - 1;
        self.args.first_visible(first_position) / SPAN_KEYS..last_position / SPAN_KEYS + 1
    }

    /// How many heads are walked together where a sequence has few queries: as many as leave every thread some tasks.
    fn heads_together(&self, threads: usize) -> usize {
        let num_heads = self.shape.num_kv_heads;
        let num_spans = self.sequences.iter().filter(|sequence| !sequence.rows.is_empty()).map(|sequence| {
            let num_rows = sequence.rows.len();
            self.spans_of(sequence.context_len - num_rows, num_rows).len()
        });
        (num_spans.sum::<usize>() * num_heads / (threads * TASKS_PER_THREAD)).clamp(1, num_heads)
    }

    /// Rows of a piece: more than the least where that leaves every thread some tasks.
    fn piece_rows(&self, threads: usize) -> usize {
        let num_rows: usize = self.sequences.iter().map(|sequence| sequence.rows.len()).sum();
        let mut rows = PIECE_ROWS;
        while 2 * rows * self.heads_per_kv() <= PIECE_QUERIES
            && 2 * rows * threads * TASKS_PER_THREAD <= num_rows * self.shape.num_kv_heads
        {
            rows *= 2;
        }
        rows
    }

    fn padded_head_dim(&self) -> usize {
        self.shape.head_dim.next_multiple_of(16)
    }

    /// Floats of one query's state: values, reference, sums.
    fn state_len(&self) -> usize {
        self.padded_head_dim() + 1 + LANES
    }

    fn pieces_of(
        &self,
        index: usize,
        sequence: &AttentionSequence<'_>,
        piece_rows: usize,
        heads_together: usize,
        pieces: &mut Vec<Piece>,
    ) {
        let num_heads = self.shape.num_kv_heads;
        let first_position = sequence.context_len - sequence.rows.len();
        let mut start = sequence.rows.start;
        while start < sequence.rows.end {
            let rows = start..(start + piece_rows).min(sequence.rows.end);
            let first_position = first_position + (start - sequence.rows.start);
            let spans = self.spans_of(first_position, rows.len());
            let is_alone = spans.len() == 1 || rows.len() * self.heads_per_kv() >= MANY_QUERIES;
            let heads_each = if is_alone { 1 } else { heads_together };
            for kv_head in (0..num_heads).step_by(heads_each) {
                pieces.push(Piece {
                    sequence: index,
                    rows: rows.clone(),
                    first_position,
                    kv_heads: kv_head..(kv_head + heads_each).min(num_heads),
                    first_span: spans.start,
                    num_spans: spans.len(),
                    partial_query: 0,
                });
            }
            start = rows.end;
        }
    }

    /// All spans of a piece, one after the other.
    fn run_piece(&self, kernel: unsafe fn(&mut SpanTask<'_, E>), piece: &Piece, out: &SharedMut<f32>) {
        let len = self.queries_of(piece) * self.state_len();
        SCRATCH.with_borrow_mut(|Scratch { partials, pages }| {
            partials.resize(partials.len().max(2 * len), 0.0);
            let (joined, other) = partials[..2 * len].split_at_mut(len);
            self.run_span(kernel, piece, 0, false, joined, pages);
            for span in 1..piece.num_spans {
                self.run_span(kernel, piece, span, true, other, pages);
                self.join(piece, joined, other);
            }
            self.finish(piece, joined, out);
        });
    }

    /// One span of a piece: head by head or, where it has several, tile by tile. `again`: `pages` are those of the span before it.
    fn run_span(
        &self,
        kernel: unsafe fn(&mut SpanTask<'_, E>),
        piece: &Piece,
        span: usize,
        again: bool,
        state: &mut [f32],
        pages: &mut Pages,
    ) {
        let start = (piece.first_span + span) * SPAN_KEYS;
        let end = (start + SPAN_KEYS).min(piece.first_position + piece.rows.len());
        let step = if piece.kv_heads.len() == 1 { SPAN_KEYS } else { TILE_KEYS };
        // Tiles that a window has left behind hold nothing for anybody.
        let first = self.args.first_visible(piece.first_position).max(start) / step * step;
        for part in (first..end).step_by(step) {
            let keys = part..(part + step).min(end);
            for (kv_head, state) in piece.kv_heads.clone().zip(state.chunks_exact_mut(self.head_state_len(piece))) {
                self.run_keys(kernel, piece, kv_head, keys.clone(), part == first, again, state, pages);
            }
        }
    }

    /// Some keys of a span, for one head; `begins`: the first of it. `again`: `pages` have served these queries before.
    #[expect(clippy::too_many_arguments, reason = "what a task is made of")]
    fn run_keys(
        &self,
        kernel: unsafe fn(&mut SpanTask<'_, E>),
        piece: &Piece,
        kv_head: usize,
        keys: Range<usize>,
        begins: bool,
        again: bool,
        state: &mut [f32],
        pages: &mut Pages,
    ) {
        let queries = self.queries_of_head(piece);
        let (values, rest) = state.split_at_mut(queries * self.padded_head_dim());
        let (references, sums) = rest.split_at_mut(queries);
        let mut task = SpanTask {
            args: self.args,
            q: self.q,
            rows: piece.rows.clone(),
            first_position: piece.first_position,
            heads_per_kv: self.heads_per_kv(),
            kv_head,
            kv_heads: piece.kv_heads.clone(),
            head_dim: self.shape.head_dim,
            block_size: self.shape.block_size,
            page_elements: self.shape.page_elements(),
            block_stride: self.shape.block_stride(),
            keys: self.keys,
            values: self.values,
            block_table: self.sequences[piece.sequence].block_table,
            span: keys,
            partial: Partial { references, sums, values },
            begins,
            scratch: &mut pages.elements,
            scale_scratch: &mut pages.scales,
            query_scratch: &mut pages.queries,
            interleaved: again && piece.kv_heads.len() == 1,
        };
        // SAFETY: the table fits the machine; `check` has measured rows, heads, block tables and blocks.
        unsafe { kernel(&mut task) };
    }

    /// Joins a later span's state into an earlier one's.
    fn join(&self, piece: &Piece, joined: &mut [f32], other: &[f32]) {
        let (queries, len) = (self.queries_of_head(piece), self.head_state_len(piece));
        for (joined, other) in joined.chunks_exact_mut(len).zip(other.chunks_exact(len)) {
            self.join_head(queries, joined, other);
        }
    }

    /// Of one head. A span in which a query saw nothing leaves it as it was, and
    /// the first in which it saw something replaces it, so that where a piece began does not show.
    fn join_head(&self, queries: usize, joined: &mut [f32], other: &[f32]) {
        let width = self.padded_head_dim();
        let (values, rest) = joined.split_at_mut(queries * width);
        let (references, sums) = rest.split_at_mut(queries);
        let (other_values, rest) = other.split_at(queries * width);
        let (other_references, other_sums) = rest.split_at(queries);
        for query in 0..queries {
            let (values, other_values) =
                (&mut values[query * width..][..width], &other_values[query * width..][..width]);
            let (sums, other_sums) = (&mut sums[query * LANES..][..LANES], &other_sums[query * LANES..][..LANES]);
            let (reference, other_reference) = (&mut references[query], other_references[query]);
            if is_empty(other_reference, other_sums) {
                continue;
            }
            if is_empty(*reference, sums) {
                values.copy_from_slice(other_values);
                sums.copy_from_slice(other_sums);
                *reference = other_reference;
                continue;
            }
            let higher = if other_reference > *reference { other_reference } else { *reference };
            let (ours, theirs) = (exp(*reference - higher), exp(other_reference - higher));
            for (value, &other) in values.iter_mut().zip(other_values) {
                *value = *value * ours + other * theirs;
            }
            for (sum, &other) in sums.iter_mut().zip(other_sums) {
                *sum = *sum * ours + other * theirs;
            }
            *reference = higher;
        }
    }

    /// Divides by the sums and writes the piece's part of the output.
    fn finish(&self, piece: &Piece, state: &[f32], out: &SharedMut<f32>) {
        for (kv_head, state) in piece.kv_heads.clone().zip(state.chunks_exact(self.head_state_len(piece))) {
            self.finish_head(piece, kv_head, state, out);
        }
    }

    fn finish_head(&self, piece: &Piece, kv_head: usize, state: &[f32], out: &SharedMut<f32>) {
        let (head_dim, width) = (self.shape.head_dim, self.padded_head_dim());
        let queries = self.queries_of_head(piece);
        let (values, rest) = state.split_at(queries * width);
        let sums = rest[queries..].as_chunks().0;
        for query in 0..queries {
            let row = piece.rows.start + query / self.heads_per_kv();
            let head = kv_head * self.heads_per_kv() + query % self.heads_per_kv();
            let start = (row * self.args.num_heads + head) * head_dim;
            // SAFETY: rows and heads of a piece are its own.
            let out = unsafe { out.slice(start..start + head_dim) };
            let factor = 1.0 / join_lanes(sums[query]);
            for (out, &value) in out.iter_mut().zip(&values[query * width..]) {
                *out = value * factor;
            }
        }
    }
}

/// Whether a query has seen no key yet.
fn is_empty(reference: f32, sums: &[f32]) -> bool {
    reference == f32::NEG_INFINITY && sums.iter().all(|&sum| sum == 0.0)
}
