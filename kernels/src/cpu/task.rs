//! What the operations hand to the kernels: pieces of work as plain data.
//!
//! A task names a part of the output that no other task of the region touches. It knows buffers and shapes, not where
//! they come from. Invariant: the ranges of a task lie within its buffers; the operations that build tasks check the
//! buffers' lengths once, kernels rely on it.

use std::ops::Range;

use bytemuck::Pod;
use half::{bf16, f16};

use super::attention::{AttentionArgs, TILE_KEYS};
use super::gated::Activation;
use super::pool::SharedMut;
use super::rope::RopeStyle;
use crate::kv::SCALE_GROUP;
use crate::matrix::{Dense, DenseElement};
use crate::pack::Quantized;
use crate::quant_format::GROUP;

/// A group of 32 activations in int8: x is about `scale * code`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QuantGroup {
    pub(crate) codes: GroupCodes,
    pub(crate) scales: GroupScales,
}

/// A group's codes, each -127..=127. Those of a panel's rows follow each other without gaps, so that a matrix unit takes them as
/// they lie; half a cache line, so none crosses two.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub(crate) struct GroupCodes(pub(crate) [i8; GROUP]);

/// What goes with a group's codes.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub(crate) struct GroupScales {
    pub(crate) scale: f32,
    /// scale * sum, what a weight group's minimum is multiplied with.
    pub(crate) scaled_sum: f32,
    /// The sum of the codes.
    pub(crate) sum: i32,
    /// The sum of the first 16 codes, for weights whose groups are that long.
    pub(crate) first_sum: i32,
}

/// Where int8 groups of activation rows lie: `[panels, groups, rows of the panel]`. The rows of a panel meet a weight tile
/// together, so what they need at a time lies together, at fixed distances. The last panel may have fewer rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Panels {
    pub(crate) num_rows: usize,
    /// Groups of a row.
    pub(crate) groups: usize,
    /// Rows of a panel.
    pub(crate) panel_rows: usize,
}

impl Panels {
    /// As few panels as can be, of at most `max_rows`; the last one may have fewer rows than the others.
    pub(crate) fn new(num_rows: usize, groups: usize, max_rows: usize) -> Self {
        let panels = num_rows.div_ceil(max_rows).max(1);
        Self { num_rows, groups, panel_rows: num_rows.div_ceil(panels).max(1) }
    }

    pub(crate) fn num_panels(&self) -> usize {
        self.num_rows.div_ceil(self.panel_rows)
    }

    /// The rows of panel number `panel`.
    pub(crate) fn rows_of(&self, panel: usize) -> Range<usize> {
        let start = panel * self.panel_rows;
        start..(start + self.panel_rows).min(self.num_rows)
    }

    /// The rows of some panels that follow each other.
    pub(crate) fn rows_of_all(&self, panels: &Range<usize>) -> Range<usize> {
        (panels.start * self.panel_rows).min(self.num_rows)..(panels.end * self.panel_rows).min(self.num_rows)
    }

    /// Some rows as panels of their own, lying as they do here; none where they share a panel with others.
    pub(crate) fn part(&self, rows: &Range<usize>) -> Option<Self> {
        let is_bound = |row: usize| row.is_multiple_of(self.panel_rows) || row == self.num_rows;
        (is_bound(rows.start) && is_bound(rows.end)).then_some(Self { num_rows: rows.len(), ..*self })
    }

    /// Where a row's first group lies, and how far apart its groups are.
    pub(crate) fn place(&self, row: usize) -> (usize, usize) {
        let rows = self.rows_of(row / self.panel_rows);
        (rows.start * self.groups + (row - rows.start), rows.len())
    }
}

/// Groups behind those of the last panel that may be read with it, whatever they hold: a matrix unit takes sixteen rows of each
/// group, however many the panel has.
pub(crate) const SPARE_GROUPS: usize = 15;

/// Activation rows in int8 groups.
#[derive(Clone, Copy)]
pub(crate) struct QuantRows<'a> {
    pub(crate) panels: Panels,
    /// Of the panels, and [`SPARE_GROUPS`]; empty where there are none.
    pub(crate) codes: &'a [GroupCodes],
    /// Likewise.
    pub(crate) scales: &'a [GroupScales],
}

impl QuantRows<'_> {
    /// One group of one row.
    pub(crate) fn group(&self, row: usize, group: usize) -> QuantGroup {
        let (first, stride) = self.panels.place(row);
        let at = first + group * stride;
        QuantGroup { codes: self.codes[at], scales: self.scales[at] }
    }

    /// Where a panel's groups begin, `[groups, rows]`. All of them and [`SPARE_GROUPS`] may be read there.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> GroupPointers {
        let rows = self.panels.rows_of(panel);
        let range = rows.start * self.panels.groups..rows.end * self.panels.groups + SPARE_GROUPS;
        GroupPointers { codes: self.codes[range.clone()].as_ptr(), scales: self.scales[range].as_ptr() }
    }
}

/// Where groups of activations lie that follow each other.
#[derive(Clone, Copy)]
pub(crate) struct GroupPointers {
    pub(crate) codes: *const GroupCodes,
    pub(crate) scales: *const GroupScales,
}

impl GroupPointers {
    /// From so many groups further on.
    ///
    /// # Safety
    /// There are so many groups, or they end there.
    #[inline(always)]
    pub(crate) unsafe fn add(self, groups: usize) -> Self {
        // SAFETY: the caller's duty.
        unsafe { Self { codes: self.codes.add(groups), scales: self.scales.add(groups) } }
    }
}

/// Where activation rows in int8 groups go.
pub(crate) struct QuantRowsMut {
    pub(crate) panels: Panels,
    pub(crate) codes: SharedMut<GroupCodes>,
    pub(crate) scales: SharedMut<GroupScales>,
}

impl QuantRowsMut {
    /// Some rows with panels of their own, as if there were no others.
    fn segment(&self, rows: &Range<usize>, panel_rows: usize) -> Self {
        let groups = self.panels.groups;
        let range = rows.start * groups..rows.end * groups;
        Self {
            panels: Panels::new(rows.len(), groups, panel_rows),
            codes: self.codes.part(range.clone()),
            scales: self.scales.part(range),
        }
    }
}

/// Where one row's int8 groups go: `stride` apart.
pub(crate) struct GroupsMut<'a> {
    rows: &'a QuantRowsMut,
    first: usize,
    stride: usize,
}

impl GroupsMut<'_> {
    /// # Safety
    /// The row belongs to the calling task.
    #[inline(always)]
    pub(crate) unsafe fn set(&self, group: usize, value: QuantGroup) {
        let at = self.first + group * self.stride;
        // SAFETY: passed on to the caller.
        unsafe {
            self.rows.codes.slice(at..at + 1)[0] = value.codes;
            self.rows.scales.slice(at..at + 1)[0] = value.scales;
        }
    }
}

/// Where a product goes: `[m, stride]`, each element `[out +] (sum [+ bias])`.
pub(crate) struct Output<'a> {
    pub(crate) elements: SharedMut<f32>,
    /// From one activation row's outputs to the next one's.
    pub(crate) stride: usize,
    /// The activation row whose outputs come first.
    pub(crate) first_m: usize,
    /// Weight rows that have an output.
    pub(crate) rows: Range<usize>,
    /// One for every weight row.
    pub(crate) bias: Option<&'a [f32]>,
    /// Adds to what is there instead of replacing it.
    pub(crate) accumulate: bool,
}

impl Output<'_> {
    /// Where an output lies.
    #[inline(always)]
    pub(crate) fn index(&self, m: usize, row: usize) -> usize {
        (m - self.first_m) * self.stride + row - self.rows.start
    }

    /// Finishes output elements `(m, first_row..)` with their sums: those that have an output.
    ///
    /// # Safety
    /// The elements belong to the calling task.
    #[inline(always)]
    pub(crate) unsafe fn store(&self, m: usize, first_row: usize, sums: &[f32]) {
        let rows = first_row.max(self.rows.start)..(first_row + sums.len()).min(self.rows.end);
        if rows.is_empty() {
            return;
        }
        let sums = &sums[rows.start - first_row..rows.end - first_row];
        let (start, first_row, len) = (self.index(m, rows.start), rows.start, rows.len());
        // SAFETY: passed on to the caller.
        let out = unsafe { self.elements.slice(start..start + len) };
        for (r, (out, &sum)) in out.iter_mut().zip(sums).enumerate() {
            let sum = self.bias.map_or(sum, |bias| sum + bias[first_row + r]);
            *out = if self.accumulate { *out + sum } else { sum };
        }
    }
}

/// Activation groups whose weights are unpacked together where many rows meet them, an even number; of two tiles at once half as
/// many. With their scales they stay in the first-level cache.
pub(crate) const PART_GROUPS: usize = 48;
/// Lines of sums that wait while the other tiles of a task meet the same groups of activations: 256 KB, beside a part of the
/// activations in the second-level cache (measured where that has 2 MB).
const WAITING_LINES: usize = 4096;

/// How many of a task's tiles go by turns, part by part of their groups, where so many lines of each one's sums wait meanwhile: the
/// activations of a part are in the second-level cache for all of them. One where a part is all there is.
pub(crate) fn tiles_by_turns(num_parts: usize, waiting_lines: usize) -> usize {
    if num_parts <= 1 { 1 } else { (WAITING_LINES / waiting_lines.max(1)).max(1) }
}

/// Room for the sums of as many tiles as go by turns. More than they need: fewer rows may come in larger blocks, and must find it.
pub(crate) fn room_to_wait(num_tiles: usize, waiting_lines: usize) -> usize {
    WAITING_LINES.max(num_tiles * waiting_lines)
}

/// A part of a quantised product: some panels of activation rows by weight tiles `tiles`.
pub(crate) struct QuantTask<'a> {
    pub(crate) weights: &'a Quantized,
    pub(crate) x: QuantRows<'a>,
    pub(crate) panels: Range<usize>,
    pub(crate) tiles: Range<usize>,
    pub(crate) out: &'a Output<'a>,
    /// Room for unpacked tiles; grown on use, contents meaningless.
    pub(crate) scratch: &'a mut Vec<Line>,
}

/// A cache line of plain memory.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub(crate) struct Line {
    _floats: [f32; 16],
}

/// A part of a dense product: activation rows `m` by weight tiles `tiles`.
pub(crate) struct DenseTask<'a, E: DenseElement> {
    pub(crate) weights: &'a Dense<E>,
    /// `[m, cols]`
    pub(crate) x: &'a [f32],
    pub(crate) m: Range<usize>,
    pub(crate) tiles: Range<usize>,
    pub(crate) out: &'a Output<'a>,
}

/// Where prepared activations go: f32 rows `[m, cols]`, int8 groups, or both.
pub(crate) struct ActivationsOut {
    pub(crate) cols: usize,
    pub(crate) rows: Option<SharedMut<f32>>,
    pub(crate) groups: Option<QuantRowsMut>,
}

impl ActivationsOut {
    /// Some rows by themselves: with panels of their own, as if there were no others.
    pub(crate) fn segment(&self, rows: Range<usize>, panel_rows: usize) -> Self {
        let cols = self.cols;
        Self {
            cols,
            rows: self.rows.as_ref().map(|all| all.part(rows.start * cols..rows.end * cols)),
            groups: self.groups.as_ref().map(|all| all.segment(&rows, panel_rows)),
        }
    }

    /// Where a row's groups go, from number `first_group` on.
    #[inline(always)]
    pub(crate) fn groups_of(&self, row: usize, first_group: usize) -> Option<GroupsMut<'_>> {
        self.groups.as_ref().map(|rows| {
            let (first, stride) = rows.panels.place(row);
            GroupsMut { rows, first: first + first_group * stride, stride }
        })
    }
}

/// Products of a gate and, where there is one, an up projection, to be joined: `activation(gate) [* up]`.
pub(crate) struct GatedTask<'a> {
    /// `[m, stride]`, readable for whole groups of 32.
    pub(crate) gate: &'a [f32],
    /// Likewise.
    pub(crate) up: Option<&'a [f32]>,
    pub(crate) activation: Activation,
    pub(crate) stride: usize,
    /// Activation rows.
    pub(crate) m: Range<usize>,
    /// Outputs, from a multiple of 32 on.
    pub(crate) cols: Range<usize>,
    pub(crate) out: &'a ActivationsOut,
}

/// One row of heads to rotate.
pub(crate) struct RopeRow<'a> {
    /// `[num_heads, head_dim]`
    pub(crate) x: &'a mut [f32],
    pub(crate) head_dim: usize,
    pub(crate) style: RopeStyle,
    /// `[rotary_dim / 2]` each
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
}

/// How a component of a key or a value is stored.
pub(crate) trait KvElement: Pod + Send + Sync {
    /// Whether components are codes, to be multiplied with their group's scale.
    const HAS_SCALES: bool = false;

    /// Widens; exact for every type here.
    fn widen(self) -> f32;
}

impl KvElement for f32 {
    fn widen(self) -> f32 {
        self
    }
}

impl KvElement for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl KvElement for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl KvElement for i8 {
    const HAS_SCALES: bool = true;

    fn widen(self) -> f32 {
        f32::from(self)
    }
}

/// Attention of some rows' query heads that share a key/value head, over one span of absolute positions.
pub(crate) struct SpanTask<'a, E> {
    pub(crate) args: &'a AttentionArgs<'a>,
    /// `[m, num_heads, head_dim]`
    pub(crate) q: &'a [f32],
    /// Rows of `q`; consecutive positions of one sequence.
    pub(crate) rows: Range<usize>,
    /// Position of the first of them.
    pub(crate) first_position: usize,
    /// Query heads that share a key/value head.
    pub(crate) heads_per_kv: usize,
    pub(crate) kv_head: usize,
    /// Those that are walked together, tile by tile, this one among them.
    pub(crate) kv_heads: Range<usize>,
    pub(crate) head_dim: usize,
    pub(crate) block_size: usize,
    /// Elements from one head's page to the next.
    pub(crate) page_elements: usize,
    /// Elements from one block to the next.
    pub(crate) block_stride: usize,
    /// From the layer's keys in block 0 on: a block's are `[kv_heads, head_dim, block_size]`, each page with its scales behind it.
    pub(crate) keys: &'a [E],
    /// From its values on: `[kv_heads, block_size, head_dim]`, likewise.
    pub(crate) values: &'a [E],
    pub(crate) block_table: &'a [u32],
    /// Absolute positions of keys, from a multiple of a tile on: a span or, of heads that are walked together, one of its tiles;
    /// the context may end before.
    pub(crate) span: Range<usize>,
    /// What comes out, a query each: `rows.len() * heads_per_kv` queries, row by row.
    pub(crate) partial: Partial<'a>,
    /// Whether these are the first keys of it; else it holds what those before them gave.
    pub(crate) begins: bool,
    /// Room for pages that a kernel must lay out anew; grown on use, contents meaningless.
    pub(crate) scratch: &'a mut Vec<f32>,
    /// Likewise for a tile's scales.
    pub(crate) scale_scratch: &'a mut Vec<f32>,
    /// Likewise for queries laid out anew.
    pub(crate) query_scratch: &'a mut Vec<f32>,
    /// Whether this task's are.
    pub(crate) interleaved: bool,
}

/// Softmax over some keys, before division: for each query the reference that is taken from scores, the sums of
/// exp(score - reference), and the values weighted so.
pub(crate) struct Partial<'a> {
    /// `[queries]`: the highest score of some tile, and at most `MAX_RISE` below the highest of all; -inf where a query sees no
    /// key of the span.
    pub(crate) references: &'a mut [f32],
    /// `[queries, 16]`: a key's weight is in the lane of its position mod 16.
    pub(crate) sums: &'a mut [f32],
    /// `[queries, padded_head_dim]`
    pub(crate) values: &'a mut [f32],
}

impl<E> SpanTask<'_, E> {
    /// The same task for keys and values that lie elsewhere, in f32.
    pub(crate) fn without_pages(&mut self) -> SpanTask<'_, f32> {
        let Partial { references, sums, values } = &mut self.partial;
        SpanTask {
            args: self.args,
            q: self.q,
            rows: self.rows.clone(),
            first_position: self.first_position,
            heads_per_kv: self.heads_per_kv,
            kv_head: self.kv_head,
            kv_heads: self.kv_heads.clone(),
            head_dim: self.head_dim,
            block_size: self.block_size,
            page_elements: self.page_elements,
            block_stride: self.block_stride,
            keys: &[],
            values: &[],
            block_table: self.block_table,
            span: self.span.clone(),
            partial: Partial { references, sums, values },
            begins: self.begins,
            scratch: self.scratch,
            scale_scratch: self.scale_scratch,
            query_scratch: self.query_scratch,
            interleaved: self.interleaved,
        }
    }

    pub(crate) fn num_queries(&self) -> usize {
        self.rows.len() * self.heads_per_kv
    }

    /// Keys of the span that a query sees; empty where `start >= end`.
    pub(crate) fn visible(&self, query: usize) -> Range<usize> {
        let position = self.first_position + query / self.heads_per_kv;
        self.args.first_visible(position).max(self.span.start)..(position + 1).min(self.span.end)
    }

    /// Whether a query sees none of these keys, which are of its visible ones.
    pub(crate) fn sees_none(&self, query: usize, keys: &Range<usize>) -> bool {
        let position = self.first_position + query / self.heads_per_kv;
        self.args.blocks.is_some_and(|blocks| !blocks.sees_any(self.head(query), position, keys))
    }

    /// Whether a query sees a key, which is of its visible ones.
    pub(crate) fn sees(&self, query: usize, key: usize) -> bool {
        let position = self.first_position + query / self.heads_per_kv;
        self.args.blocks.is_none_or(|blocks| blocks.sees(self.head(query), position, key))
    }

    /// Whether a tile may hold keys that a query's pattern hides beside such that it sees.
    pub(crate) fn hides_within_tiles(&self) -> bool {
        self.args.blocks.is_some_and(|blocks| !blocks.block_size.is_multiple_of(TILE_KEYS))
    }

    /// The next keys that follow each other and that a query sees, of `rest`, which counts from position `start` on and shrinks
    /// to what comes behind them.
    pub(crate) fn next_seen(&self, query: usize, start: usize, rest: &mut Range<usize>) -> Option<Range<usize>> {
        let first = rest.find(|&key| self.sees(query, start + key))?;
        let end = rest.find(|&key| !self.sees(query, start + key));
        Some(first..end.unwrap_or(rest.end))
    }

    /// The query head that a query belongs to.
    pub(crate) fn head(&self, query: usize) -> usize {
        self.kv_head * self.heads_per_kv + query % self.heads_per_kv
    }

    /// A query's components, `[head_dim]`.
    pub(crate) fn query(&self, query: usize) -> &[f32] {
        let row = self.rows.start + query / self.heads_per_kv;
        let start = (row * self.args.num_heads + self.head(query)) * self.head_dim;
        &self.q[start..start + self.head_dim]
    }

    /// Where what is likely to be read after the tile from `start` on lies, in place of what lies at its `position`: in the same
    /// tile of the next of the heads that are walked together, in the tile behind it or, after a head's last, in the next head's
    /// first, which is the same thread's next piece unless pieces are dealt out by their length. `None` where that is not known, or tiles are left out. `index` is [`Self::key_index`] or
    /// [`Self::value_index`].
    pub(crate) fn next_index(&self, start: usize, position: usize, index: impl Fn(usize) -> usize) -> Option<usize> {
        if self.args.blocks.is_some() {
            return None;
        }
        if self.kv_head + 1 < self.kv_heads.end {
            return Some(index(position) + self.page_elements);
        }
        if position + TILE_KEYS < self.first_position + self.rows.len() {
            return Some(index(position + TILE_KEYS) - (self.kv_heads.len() - 1) * self.page_elements);
        }
        let first = self.args.first_visible(self.first_position) / TILE_KEYS * TILE_KEYS;
        let has_next_head = (self.kv_head + 1) * self.heads_per_kv < self.args.num_heads;
        has_next_head.then(|| index(first + position - start) + self.page_elements)
    }

    /// Where the page of this head that holds a position begins.
    fn page(&self, position: usize) -> usize {
        let block = self.block_table[position / self.block_size] as usize;
        block * self.block_stride + self.kv_head * self.page_elements
    }

    /// Index of component 0 of the key at a position; component i lies `i * block_size` further.
    pub(crate) fn key_index(&self, position: usize) -> usize {
        self.page(position) + position % self.block_size
    }

    /// Index of component 0 of the value at a position; component i lies `i` further.
    pub(crate) fn value_index(&self, position: usize) -> usize {
        self.page(position) + position % self.block_size * self.head_dim
    }
}

impl<E: KvElement> SpanTask<'_, E> {
    /// Scales of a head, of use where [`KvElement::HAS_SCALES`].
    pub(crate) fn num_groups(&self) -> usize {
        self.head_dim.div_ceil(SCALE_GROUP)
    }

    /// A group's scales of the keys (or the values, as `half` says) from `position` on, which lie in one block.
    pub(crate) fn scales(&self, half: &[E], position: usize, count: usize, group: usize) -> impl Iterator<Item = f32> {
        let offset = group * self.block_size + position % self.block_size;
        let at = self.page(position) + self.head_dim * self.block_size + offset * size_of::<bf16>();
        let bytes = bytemuck::cast_slice::<E, u8>(&half[at..at + count * size_of::<bf16>()]);
        bytes.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32())
    }
}
