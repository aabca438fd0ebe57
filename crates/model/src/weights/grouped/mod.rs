//! Integer weights of safetensors checkpoints: GPTQ, AWQ and compressed-tensors.
//!
//! All of them are `scale * (code - zero)` with a scale and a zero point for a group of inputs; what differs is where the
//! bits lie (a file a layout). [`resolve`] finds a matrix's parts and checks their shapes, [`Tile`] unpacks codes some rows
//! at a time: GPTQ and AWQ keep inputs outermost, so a row of ours is a column there, and rows that share cache lines are
//! read together. It must not know roles or packed matrices. Its invariant: once resolved, no row or group of a matrix lies
//! outside its parts.
//!
//! Words are little-endian, lowest bits first, in every layout.

mod awq;
mod compressed;
mod gptq;
mod parts;

use std::sync::OnceLock;

use bindery_kernels::{CodeBits, CodeBook, GROUP, InputOrder, QuantFormat, QuantRow, Scaling};
use half::{bf16, f16};
use safetensors::Dtype;

use self::parts::{GroupIndex, Grouping, Part, Parts, ScaleType};
use super::{WeightFormat, mmap::MappedFile, safetensors::Checkpoint};
use crate::{
    ModelError,
    config::{GptqZeros, StoredQuantization},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Gptq,
    Awq,
    Packed,
    Bytes,
}

/// The scale of a row and group is element `row * row_step + group * group_step`.
#[derive(Clone, Debug)]
struct Scales {
    part: Part,
    ty: ScaleType,
    row_step: usize,
    group_step: usize,
}

/// Codes are unsigned here, and zero points with them: signed ones have half the range added.
#[derive(Clone, Debug)]
enum Zeros {
    /// Half the range: symmetric.
    Middle,
    /// `[groups, out]` as a stream of bits along outputs.
    Gptq { part: Part, plus: GptqZeros },
    /// `[groups, out / 8]` in AWQ's order.
    Awq(Part),
    /// `[out / (32 / bits), groups]`
    Words(Part),
    /// Signed; where they lie as for scales.
    Bytes { part: Part, row_step: usize, group_step: usize },
}

impl Zeros {
    fn part(&self) -> Option<&Part> {
        match self {
            Self::Middle => None,
            Self::Gptq { part, .. } | Self::Awq(part) | Self::Words(part) | Self::Bytes { part, .. } => Some(part),
        }
    }
}

/// The order in which the inputs of each group lie together, ascending in each.
#[derive(Clone, Debug)]
enum Order {
    AsStored,
    Sorted(InputOrder),
    /// Groups differ in size, so that no span fits them.
    Uneven,
}

impl Order {
    fn new(index: Option<&GroupIndex>, group_size: usize) -> Self {
        let Some(GroupIndex { groups, .. }) = index else { return Self::AsStored };
        let mut places: Vec<u32> = (0..groups.len() as u32).collect();
        places.sort_by_key(|&input| groups[input as usize]);
        let fits = |(place, &input): (usize, &u32)| place / group_size == groups[input as usize] as usize;
        match InputOrder::new(&places) {
            Some(order) if places.iter().enumerate().all(fits) => Self::Sorted(order),
            _ => Self::Uneven,
        }
    }
}

/// What holds a matrix exactly.
#[derive(Clone, Debug)]
pub(super) struct Exact {
    pub(super) format: QuantFormat,
    /// The order in which inputs of one group lie together, where that is not theirs.
    pub(super) order: Option<InputOrder>,
}

/// A matrix of codes and where its parts lie.
#[derive(Debug)]
pub(super) struct GroupedPlace {
    layout: Layout,
    bits: usize,
    /// Outputs.
    rows: usize,
    /// Inputs.
    cols: usize,
    group_size: usize,
    groups: usize,
    codes: Part,
    scales: Scales,
    zeros: Zeros,
    /// Each input's group, where they are not in order.
    index: Option<GroupIndex>,
    order: Order,
    /// Found when first asked for, from the zero points.
    exact: OnceLock<Option<Exact>>,
}

/// Names of the parts after a module's own. Scales of its inputs are for kernels that round those by a fixed step; ours
/// find the step of each 32.
const PARTS: [&str; 11] = [
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
    ".input_scale",
    ".input_zero_point",
];

/// The name of the matrix that a tensor is a part of.
pub(super) fn owner(name: &str) -> Option<String> {
    PARTS.iter().find_map(|part| name.strip_suffix(part)).map(|module| format!("{module}.weight"))
}

/// Whether a tensor of a quantised checkpoint says nothing about weights, whatever its name: the bias of zeros that older
/// packers give every module, and scales for a cache in integers.
pub(super) fn is_idle(checkpoint: &Checkpoint, name: &str) -> bool {
    const OF_CACHES: [&str; 4] =
        [".self_attn.k_scale", ".self_attn.v_scale", ".k_proj.output_scale", ".v_proj.output_scale"];
    if OF_CACHES.iter().any(|suffix| name.ends_with(suffix)) {
        return true;
    }
    let Some(module) = name.strip_suffix(".bias") else { return false };
    checkpoint.entries.contains_key(&format!("{module}.qweight"))
        && checkpoint.entries.get(name).is_some_and(|entry| {
            checkpoint.files[entry.file].bytes()[entry.range.clone()].iter().all(|&byte| byte == 0)
        })
}

/// The quantised matrix that stands in place of `name`, if there is one. Errors name tensor, shape and what is expected.
pub(super) fn resolve(
    checkpoint: &Checkpoint,
    quantization: StoredQuantization,
    name: &str,
) -> Result<Option<GroupedPlace>, String> {
    let Some(module) = name.strip_suffix(".weight") else { return Ok(None) };
    let parts = Parts { checkpoint, module };
    let place = match quantization {
        StoredQuantization::Bindery => return Ok(None),
        StoredQuantization::Gptq { bits, group_size, zeros, act_order } => {
            parts.optional("qweight")?.map(|codes| gptq::resolve(&parts, codes, bits, group_size, zeros, act_order))
        }
        StoredQuantization::Awq { group_size } => {
            parts.optional("qweight")?.map(|codes| awq::resolve(&parts, codes, group_size))
        }
        StoredQuantization::CompressedTensors => {
            let packed = parts.optional("weight_packed")?.map(|codes| compressed::packed(&parts, codes));
            let codes = checkpoint.get(name)?.filter(|entry| entry.dtype == Dtype::I8);
            packed.or_else(|| codes.map(|codes| compressed::bytes(&parts, codes)))
        }
    };
    place.transpose()
}

fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes[index * 4..].as_chunks().0[0])
}

/// Code number `index` of a stream of bits, whose words `word` reads.
fn in_stream(word: impl Fn(usize) -> u32, index: usize, bits: usize) -> u8 {
    let (at, shift) = (index * bits / 32, index * bits % 32);
    let mut code = word(at) >> shift;
    if shift + bits > 32 {
        code |= word(at + 1) << (32 - shift);
    }
    (code & ((1 << bits) - 1)) as u8
}

impl GroupedPlace {
    fn new(
        layout: Layout,
        (bits, rows, grouping): (usize, usize, Grouping),
        codes: Part,
        scales: Scales,
        zeros: Zeros,
        index: Option<GroupIndex>,
    ) -> Self {
        let Grouping { cols, size: group_size, count: groups } = grouping;
        let (order, exact) = (Order::new(index.as_ref(), group_size), OnceLock::new());
        Self { layout, bits, rows, cols, group_size, groups, codes, scales, zeros, index, order, exact }
    }

    /// Outputs and inputs.
    pub(super) fn shape(&self) -> Vec<usize> {
        vec![self.rows, self.cols]
    }

    pub(super) fn format(&self) -> WeightFormat {
        let bits = self.bits as u8;
        match self.layout {
            Layout::Gptq => WeightFormat::Gptq { bits },
            Layout::Awq => WeightFormat::Awq,
            Layout::Packed | Layout::Bytes => WeightFormat::CompressedInt { bits },
        }
    }

    /// Inputs that share a scale as the kernels want them; none where 32 does not divide groups.
    fn span(&self) -> Option<u32> {
        let span = if self.groups == 1 { self.cols.next_multiple_of(GROUP) } else { self.group_size };
        u32::try_from(span).ok().filter(|_| span.is_multiple_of(GROUP))
    }

    /// Whether no kernel computes its groups, so that it is unpacked.
    pub(super) fn has_odd_groups(&self) -> bool {
        self.span().is_none() || matches!(self.order, Order::Uneven)
    }

    fn num_bytes(&self) -> usize {
        let others = [self.zeros.part(), self.index.as_ref().map(|index| &index.part)];
        let others: usize = others.into_iter().flatten().map(|part| part.range.len()).sum();
        self.codes.range.len() + self.scales.part.range.len() + others
    }
}

/// A matrix of codes in its files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grouped<'a> {
    pub(super) files: &'a [MappedFile],
    pub(super) place: &'a GroupedPlace,
}

/// Rows whose codes are unpacked together: a cache line's worth of columns in GPTQ's layout.
const TILE_ROWS: usize = 16;

/// The unpacked codes of some rows; which ones follows from what is asked for.
#[derive(Default)]
pub(super) struct Tile {
    first: usize,
    codes: Vec<u8>,
    words: Vec<u32>,
}

impl<'a> Grouped<'a> {
    fn bytes(&self, part: &Part) -> &'a [u8] {
        &self.files[part.file].bytes()[part.range.clone()]
    }

    /// The file of its codes.
    pub(super) fn file(&self) -> &'a MappedFile {
        &self.files[self.place.codes.file]
    }

    /// An error where one of its files has changed since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), ModelError> {
        let GroupedPlace { codes, scales, zeros, .. } = self.place;
        [codes, &scales.part]
            .into_iter()
            .chain(zeros.part())
            .try_for_each(|part| self.files[part.file].check_unchanged())
    }

    /// Gives the pages of its codes back. Each thread reads all over a matrix that keeps inputs outermost, so there is
    /// nothing to give back before the end: one matrix is resident at a time.
    pub(super) fn release(&self) {
        self.file().release(&self.place.codes.range);
    }

    /// Bytes of `rows` of its rows, scales and zero points counted.
    pub(super) fn num_bytes(&self, rows: usize) -> u64 {
        (self.place.num_bytes() as u128 * rows as u128 / self.place.rows as u128) as u64
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        let Scales { part, ty, row_step, group_step } = &self.place.scales;
        let (index, bytes) = (row * row_step + group * group_step, self.bytes(part));
        match ty {
            ScaleType::F32 => f32::from_bits(word(bytes, index)),
            ScaleType::F16 => f16::from_le_bytes(bytes[index * 2..].as_chunks().0[0]).to_f32(),
            ScaleType::Bf16 => bf16::from_le_bytes(bytes[index * 2..].as_chunks().0[0]).to_f32(),
        }
    }

    /// In 0..2^bits, but for what no packer means.
    fn zero(&self, row: usize, group: usize) -> i32 {
        let GroupedPlace { rows, groups, bits, .. } = *self.place;
        let middle = 1 << (bits - 1);
        match &self.place.zeros {
            Zeros::Middle => middle,
            &Zeros::Gptq { ref part, plus } => {
                let (bytes, first) = (self.bytes(part), group * (rows * bits / 32));
                gptq::zero(|at| word(bytes, first + at), row, bits, plus)
            }
            Zeros::Awq(part) => i32::from(awq::code(word(self.bytes(part), group * (rows / 8) + row / 8), row)),
            Zeros::Words(part) => {
                let in_word = 32 / bits;
                let word = word(self.bytes(part), row / in_word * groups + group);
                i32::from(in_stream(|_| word, row % in_word, bits))
            }
            Zeros::Bytes { part, row_step, group_step } => {
                i32::from(self.bytes(part)[row * row_step + group * group_step].cast_signed()) + middle
            }
        }
    }

    fn group_of(&self, input: usize) -> usize {
        match &self.place.index {
            None => input / self.place.group_size,
            Some(index) => index.groups[input] as usize,
        }
    }

    /// What holds the matrix as it is: codes in as many bits, with scales (and zero points, where they are not all in the
    /// middle) for as many inputs. None where 32 does not divide a group, or a zero point is out of range.
    pub(super) fn exact(&self) -> Option<&'a Exact> {
        self.place.exact.get_or_init(|| self.find_exact()).as_ref()
    }

    fn find_exact(&self) -> Option<Exact> {
        let GroupedPlace { rows, cols, groups, bits, .. } = *self.place;
        let span = self.place.span()?;
        let order = match &self.place.order {
            Order::AsStored => None,
            Order::Sorted(order) => Some(order.clone()),
            Order::Uneven => return None,
        };
        let (mut is_symmetric, mut least, mut most) = (true, i32::MAX, i32::MIN);
        if self.place.zeros.part().is_some() {
            for zero in (0..groups).flat_map(|group| (0..rows).map(move |row| self.zero(row, group))) {
                is_symmetric &= zero == 1 << (bits - 1);
                (least, most) = (least.min(zero), most.max(zero));
            }
        }
        let bits = match bits {
            2 => CodeBits::Two,
            3 => CodeBits::Three,
            4 => CodeBits::Four,
            _ => CodeBits::Eight,
        };
        if !is_symmetric && [least, most].into_iter().any(|zero| kept_zero(bits, zero).is_none()) {
            return None;
        }
        // Short codes are computed with zero points alone.
        let with_mins = !is_symmetric || matches!(bits, CodeBits::Two | CodeBits::Three);
        // A scale for 32 inputs has a kernel of its own.
        let is_plain = span as usize == GROUP && !with_mins && cols.is_multiple_of(GROUP);
        let scaling = if is_plain { Scaling::Single } else { Scaling::Spans(span) };
        Some(Exact { format: QuantFormat { bits, scaling, with_mins, book: CodeBook::Linear }, order })
    }

    /// A row's codes, unsigned.
    fn codes<'t>(&self, row: usize, tile: &'t mut Tile) -> &'t [u8] {
        let cols = self.place.cols;
        if tile.codes.is_empty() || !(tile.first..tile.first + TILE_ROWS).contains(&row) {
            tile.first = row / TILE_ROWS * TILE_ROWS;
            tile.codes.resize(TILE_ROWS * cols, 0);
            self.unpack(tile);
        }
        &tile.codes[(row - tile.first) * cols..][..cols]
    }

    fn unpack(&self, tile: &mut Tile) {
        let (bytes, count) = (self.bytes(&self.place.codes), TILE_ROWS.min(self.place.rows - tile.first));
        match self.place.layout {
            Layout::Gptq => gptq::unpack(self.place, bytes, count, tile),
            Layout::Awq => awq::unpack(self.place, bytes, count, tile),
            Layout::Packed | Layout::Bytes => compressed::unpack(self.place, bytes, count, tile),
        }
    }

    /// A row dequantised in f32.
    pub(super) fn read_row(&self, row: usize, tile: &mut Tile, out: &mut [f32]) {
        let codes = self.codes(row, tile);
        let (mut group, mut scale, mut zero) = (usize::MAX, 0.0, 0);
        for (input, (out, &code)) in out.iter_mut().zip(codes).enumerate() {
            if group != self.group_of(input) {
                group = self.group_of(input);
                (scale, zero) = (self.scale(row, group), self.zero(row, group));
            }
            *out = scale * (i32::from(code) - zero) as f32;
        }
    }

    /// A row as its [exact](Self::exact) format has it. Scales wider than f16 are rounded to it: half a unit in the last
    /// place at most.
    pub(super) fn unpack_row(&self, row: usize, tile: &mut Tile, exact: &Exact, out: &mut QuantRow<'_>) {
        let Exact { format, order } = exact;
        let codes = self.codes(row, tile);
        // The kernels' lie around zero, but for short ones with zero points.
        let least = i16::from(*format.codes().start());
        let kept = |code: u8| (i16::from(code) + least) as i8;
        match order {
            None => out.codes.iter_mut().zip(codes).for_each(|(out, &code)| *out = kept(code)),
            Some(order) => {
                for (out, &input) in out.codes.iter_mut().zip(order.places()) {
                    *out = kept(codes[input as usize]);
                }
            }
        }
        for (group, scale) in out.scales.iter_mut().enumerate() {
            *scale = f16::from_f32(self.scale(row, group));
        }
        for (group, zero) in out.sub_mins.iter_mut().enumerate() {
            *zero = kept_zero(format.bits, self.zero(row, group)).expect("the format was chosen so that all fit");
        }
    }
}

/// A zero point as the kernels keep it beside codes of so many bits; none where a byte does not hold it.
fn kept_zero(bits: CodeBits, zero: i32) -> Option<i8> {
    i8::try_from(if bits == CodeBits::Eight { zero - 128 } else { zero }).ok()
}
