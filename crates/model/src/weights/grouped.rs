//! Integer weights of safetensors checkpoints: GPTQ, AWQ and compressed-tensors.
//!
//! All of them are `scale * (code - zero)` with a scale and a zero point for a group of inputs; what differs is where the
//! bits lie. [`resolve`] finds a matrix's parts and checks their shapes, [`Tile`] unpacks codes some rows at a time: GPTQ
//! and AWQ keep inputs outermost, so a row of ours is a column there, and rows that share cache lines are read together.
//! It must not know roles or packed matrices. Its invariant: once resolved, no row or group of a matrix lies outside its
//! parts.
//!
//! Layouts, from the packers of AutoGPTQ, AutoAWQ and compressed-tensors (words are little-endian, lowest bits first):
//!
//! | | codes | scales | zero points |
//! |---|---|---|---|
//! | GPTQ | `qweight [in * bits / 32, out]`, a stream of bits along inputs | `scales [groups, out]` | `qzeros [groups, out * bits / 32]`, less one in version 1 |
//! | AWQ | `qweight [in, out / 8]`, outputs 0 2 4 6 1 3 5 7 in a word | `scales [groups, out]` | `qzeros [groups, out / 8]`, likewise |
//! | pack-quantized | `weight_packed [out, in / (32 / bits)]` | `weight_scale [out, groups]` | `weight_zero_point [out / (32 / bits), groups]` |
//! | int-quantized | `weight [out, in]` int8 | `weight_scale [out, groups]` or one | `weight_zero_point [out, groups]` int8 |

use std::{ops::Range, sync::OnceLock};

use bindery_kernels::{CodeBits, GROUP, QuantFormat, Scaling};
use half::{bf16, f16};
use safetensors::Dtype;

use super::{
    WeightFormat,
    mmap::MappedFile,
    safetensors::{Checkpoint, Entry},
};
use crate::{ModelError, config::StoredQuantization};

/// A tensor in a file.
#[derive(Clone, Debug)]
struct Part {
    file: usize,
    range: Range<usize>,
}

impl From<&Entry> for Part {
    fn from(entry: &Entry) -> Self {
        Self { file: entry.file, range: entry.range.clone() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Gptq,
    Awq,
    Packed,
    Bytes,
}

#[derive(Clone, Copy, Debug)]
enum ScaleType {
    F32,
    F16,
    Bf16,
}

/// Codes are unsigned here, and zero points with them: signed ones have half the range added.
#[derive(Clone, Debug)]
enum Zeros {
    /// Half the range: symmetric.
    Middle,
    /// `[groups, out]` as a stream of bits along outputs, `plus` to be added.
    Stream { part: Part, plus: i32 },
    /// `[groups, out / 8]` in AWQ's order.
    Awq(Part),
    /// `[out / (32 / bits), groups]`
    Words(Part),
    /// `[out, groups]`, signed.
    Bytes(Part),
}

impl Zeros {
    fn part(&self) -> Option<&Part> {
        match self {
            Self::Middle => None,
            Self::Stream { part, .. } | Self::Awq(part) | Self::Words(part) | Self::Bytes(part) => Some(part),
        }
    }
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
    scales: Part,
    scale_type: ScaleType,
    /// One scale for all.
    single_scale: bool,
    zeros: Zeros,
    /// Each input's group, where they are not in order.
    group_index: Option<Box<[u32]>>,
    /// What holds it exactly; found when first asked for, from the zero points.
    exact: OnceLock<Option<QuantFormat>>,
}

/// Names of the parts after a module's own.
const PARTS: [&str; 9] = [
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
];

/// The name of the matrix that a tensor is a part of.
pub(super) fn owner(name: &str) -> Option<String> {
    PARTS.iter().find_map(|part| name.strip_suffix(part)).map(|module| format!("{module}.weight"))
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
        StoredQuantization::Gptq { bits, group_size, zeros_plus, act_order } => {
            let Some(codes) = checkpoint.get(&parts.name("qweight"))? else { return Ok(None) };
            parts.gptq(codes, bits, group_size, zeros_plus, act_order)
        }
        StoredQuantization::Awq { group_size } => {
            let Some(codes) = checkpoint.get(&parts.name("qweight"))? else { return Ok(None) };
            parts.awq(codes, group_size)
        }
        StoredQuantization::CompressedTensors => {
            if let Some(codes) = checkpoint.get(&parts.name("weight_packed"))? {
                parts.packed(codes)
            } else if let Some(codes) = checkpoint.get(name)?.filter(|entry| entry.dtype == Dtype::I8) {
                parts.bytes(codes)
            } else {
                return Ok(None);
            }
        }
    };
    place.map(Some)
}

/// A module's tensors.
struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    module: &'a str,
}

impl<'a> Parts<'a> {
    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.module)
    }

    fn required(&self, part: &str) -> Result<&'a Entry, String> {
        let name = self.name(part);
        self.checkpoint.get(&name)?.ok_or_else(|| format!("tensor {name:?} is missing, which its module's codes need"))
    }

    fn expect(&self, part: &str, entry: &Entry, dtype: Dtype, shape: &[usize]) -> Result<(), String> {
        if entry.dtype == dtype && entry.shape == shape {
            return Ok(());
        }
        let name = self.name(part);
        Err(format!("tensor {name:?} is {:?} {:?}; {dtype:?} {shape:?} is expected", entry.dtype, entry.shape))
    }

    /// Rows and columns of a tensor of two dimensions, of `dtype`, neither zero.
    fn matrix(&self, part: &str, entry: &Entry, dtype: Option<Dtype>) -> Result<(usize, usize), String> {
        match entry.shape[..] {
            [rows, cols] if rows > 0 && cols > 0 && dtype.is_none_or(|dtype| dtype == entry.dtype) => Ok((rows, cols)),
            _ => {
                let (name, wanted) = (self.name(part), dtype.map_or(String::new(), |dtype| format!(" of {dtype:?}")));
                Err(format!("tensor {name:?} is {:?} {:?}; a matrix{wanted} is expected", entry.dtype, entry.shape))
            }
        }
    }

    fn scale_type(&self, part: &str, entry: &Entry) -> Result<ScaleType, String> {
        match entry.dtype {
            Dtype::F32 => Ok(ScaleType::F32),
            Dtype::F16 => Ok(ScaleType::F16),
            Dtype::BF16 => Ok(ScaleType::Bf16),
            other => Err(format!("tensor {:?} is {other:?}; scales are F16, BF16 or F32", self.name(part))),
        }
    }

    /// What a group is, given how many there are: as configured, else an equal share of the inputs (single modules may
    /// differ from what the config says of all).
    fn group_size(&self, configured: Option<usize>, cols: usize, groups: usize) -> Result<usize, String> {
        let configured = configured.unwrap_or(cols);
        if cols.div_ceil(configured) == groups {
            return Ok(configured);
        }
        if groups > 0 && cols.is_multiple_of(groups) {
            return Ok(cols / groups);
        }
        let module = self.module;
        Err(format!(
            "module {module:?} has {groups} groups of scales; {cols} inputs in groups of {configured} are expected"
        ))
    }

    /// Each input's group, where they are not in order.
    fn group_index(&self, part: &str, sizes: (usize, usize, usize)) -> Result<Option<Box<[u32]>>, String> {
        let (cols, group_size, groups) = sizes;
        let name = self.name(part);
        let Some(entry) = self.checkpoint.get(&name)? else { return Ok(None) };
        self.expect(part, entry, Dtype::I32, &[cols])?;
        let bytes = &self.checkpoint.files[entry.file].bytes()[entry.range.clone()];
        // compressed-tensors writes -1 into an index that is not in use.
        if part == "weight_g_idx" && bytes.iter().all(|&byte| byte == u8::MAX) {
            return Ok(None);
        }
        let mut index = Vec::with_capacity(cols);
        for input in 0..cols {
            let group = word(bytes, input);
            if group as usize >= groups {
                let group = group.cast_signed();
                return Err(format!("tensor {name:?} places input {input} in group {group}; there are {groups}"));
            }
            index.push(group);
        }
        let in_order = index.iter().enumerate().all(|(input, &group)| input / group_size == group as usize);
        Ok((!in_order).then(|| index.into_boxed_slice()))
    }

    fn gptq(
        &self,
        codes: &Entry,
        bits: usize,
        group_size: Option<usize>,
        plus: i32,
        act_order: bool,
    ) -> Result<GroupedPlace, String> {
        let (words, rows) = self.matrix("qweight", codes, Some(Dtype::I32))?;
        let cols = whole(words, 32, bits).filter(|&cols| cols > 0);
        let zero_words = whole(rows, bits, 32);
        let (Some(cols), Some(zero_words)) = (cols, zero_words) else {
            let name = self.name("qweight");
            return Err(format!(
                "tensor {name:?} has the shape {:?}, which {bits} bits a code do not fill",
                codes.shape
            ));
        };
        let scales = self.required("scales")?;
        let (groups, _) = self.matrix("scales", scales, None)?;
        self.expect("scales", scales, scales.dtype, &[groups, rows])?;
        let zeros = self.required("qzeros")?;
        self.expect("qzeros", zeros, Dtype::I32, &[groups, zero_words])?;
        if act_order {
            self.required("g_idx")?;
        }
        let group_size = self.group_size(group_size, cols, groups)?;
        Ok(GroupedPlace {
            layout: Layout::Gptq,
            bits,
            rows,
            cols,
            group_size,
            groups,
            codes: codes.into(),
            scales: scales.into(),
            scale_type: self.scale_type("scales", scales)?,
            single_scale: false,
            zeros: Zeros::Stream { part: zeros.into(), plus },
            group_index: self.group_index("g_idx", (cols, group_size, groups))?,
            exact: OnceLock::new(),
        })
    }

    fn awq(&self, codes: &Entry, group_size: Option<usize>) -> Result<GroupedPlace, String> {
        let (cols, words) = self.matrix("qweight", codes, Some(Dtype::I32))?;
        let rows = words * AWQ_PLACES.len();
        let scales = self.required("scales")?;
        let (groups, _) = self.matrix("scales", scales, None)?;
        self.expect("scales", scales, scales.dtype, &[groups, rows])?;
        let zeros = self.required("qzeros")?;
        self.expect("qzeros", zeros, Dtype::I32, &[groups, words])?;
        Ok(GroupedPlace {
            layout: Layout::Awq,
            bits: 4,
            rows,
            cols,
            group_size: self.group_size(group_size, cols, groups)?,
            groups,
            codes: codes.into(),
            scales: scales.into(),
            scale_type: self.scale_type("scales", scales)?,
            single_scale: false,
            zeros: Zeros::Awq(zeros.into()),
            group_index: None,
            exact: OnceLock::new(),
        })
    }

    fn packed(&self, codes: &Entry) -> Result<GroupedPlace, String> {
        let (rows, words) = self.matrix("weight_packed", codes, Some(Dtype::I32))?;
        let shape = self.shape()?;
        // The bits are what the shapes leave room for; int4 and int8 never need as many words.
        let bits = [4, 8].into_iter().find(|bits| shape.1.div_ceil(32 / bits) == words);
        let (Some(bits), true) = (bits, shape.0 == rows) else {
            let (name, found) = (self.name("weight_packed"), &codes.shape);
            return Err(format!("tensor {name:?} has the shape {found:?}, which holds no {shape:?} of int4 or int8"));
        };
        self.compressed(Layout::Packed, bits, codes, shape)
    }

    fn bytes(&self, codes: &Entry) -> Result<GroupedPlace, String> {
        let shape = self.matrix("weight", codes, Some(Dtype::I8))?;
        self.compressed(Layout::Bytes, 8, codes, shape)
    }

    fn compressed(
        &self,
        layout: Layout,
        bits: usize,
        codes: &Entry,
        (rows, cols): (usize, usize),
    ) -> Result<GroupedPlace, String> {
        let scales = self.required("weight_scale")?;
        let single_scale = scales.shape.iter().all(|&size| size == 1);
        let groups = match scales.shape[..] {
            _ if single_scale => 1,
            [count] if count == rows => 1,
            [count, groups] if count == rows && groups > 0 => groups,
            _ => {
                let (name, found) = (self.name("weight_scale"), &scales.shape);
                return Err(format!("tensor {name:?} has the shape {found:?}; [{rows}, groups] is expected"));
            }
        };
        let group_size = self.group_size(Some(cols.div_ceil(groups)), cols, groups)?;
        let zeros = match self.checkpoint.get(&self.name("weight_zero_point"))? {
            None => Zeros::Middle,
            Some(zeros) if zeros.dtype == Dtype::I8 => {
                let count: usize = zeros.shape.iter().product();
                if count != if single_scale { 1 } else { rows * groups } {
                    self.expect("weight_zero_point", zeros, Dtype::I8, &[rows, groups])?;
                }
                Zeros::Bytes(zeros.into())
            }
            Some(zeros) => {
                self.expect("weight_zero_point", zeros, Dtype::I32, &[rows.div_ceil(32 / bits), groups])?;
                Zeros::Words(zeros.into())
            }
        };
        Ok(GroupedPlace {
            layout,
            bits,
            rows,
            cols,
            group_size,
            groups,
            codes: codes.into(),
            scales: scales.into(),
            scale_type: self.scale_type("weight_scale", scales)?,
            single_scale,
            zeros,
            group_index: self.group_index("weight_g_idx", (cols, group_size, groups))?,
            exact: OnceLock::new(),
        })
    }

    /// What `weight_shape` holds: rows and columns before packing.
    fn shape(&self) -> Result<(usize, usize), String> {
        let entry = self.required("weight_shape")?;
        let bytes = &self.checkpoint.files[entry.file].bytes()[entry.range.clone()];
        let numbers: Vec<i64> = match entry.dtype {
            Dtype::I64 => bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
            Dtype::I32 => bytes.as_chunks().0.iter().map(|&bytes| i64::from(i32::from_le_bytes(bytes))).collect(),
            _ => Vec::new(),
        };
        let sizes: Vec<usize> = numbers.iter().filter_map(|&number| usize::try_from(number).ok()).collect();
        match sizes[..] {
            [rows, cols] if rows > 0 && cols > 0 => Ok((rows, cols)),
            _ => {
                Err(format!("tensor {:?} holds {numbers:?}; rows and columns are expected", self.name("weight_shape")))
            }
        }
    }
}

/// `count * times / by`, where that is a whole number.
fn whole(count: usize, times: usize, by: usize) -> Option<usize> {
    count.checked_mul(times).filter(|product| product.is_multiple_of(by)).map(|product| product / by)
}

/// Where AWQ keeps each of eight outputs in a word, in codes of four bits.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

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

    /// Whether inputs of one group do not lie together.
    pub(super) fn is_reordered(&self) -> bool {
        self.group_index.is_some()
    }

    fn num_bytes(&self) -> usize {
        let zeros = self.zeros.part().map_or(0, |part| part.range.len());
        self.codes.range.len() + self.scales.range.len() + zeros
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
        [codes, scales].into_iter().chain(zeros.part()).try_for_each(|part| self.files[part.file].check_unchanged())
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
        let place = self.place;
        let index = match place.layout {
            _ if place.single_scale => 0,
            Layout::Gptq | Layout::Awq => group * place.rows + row,
            Layout::Packed | Layout::Bytes => row * place.groups + group,
        };
        let bytes = self.bytes(&place.scales);
        match place.scale_type {
            ScaleType::F32 => f32::from_bits(word(bytes, index)),
            ScaleType::F16 => f16::from_le_bytes(bytes[index * 2..].as_chunks().0[0]).to_f32(),
            ScaleType::Bf16 => bf16::from_le_bytes(bytes[index * 2..].as_chunks().0[0]).to_f32(),
        }
    }

    fn zero(&self, row: usize, group: usize) -> i32 {
        let GroupedPlace { rows, groups, bits, .. } = *self.place;
        let middle = 1 << (bits - 1);
        match &self.place.zeros {
            Zeros::Middle => middle,
            Zeros::Stream { part, plus } => {
                let (bytes, first) = (self.bytes(part), group * (rows * bits / 32));
                i32::from(in_stream(|at| word(bytes, first + at), row, bits)) + plus
            }
            Zeros::Awq(part) => i32::from(awq_code(word(self.bytes(part), group * (rows / 8) + row / 8), row)),
            Zeros::Words(part) => {
                let in_word = 32 / bits;
                let word = word(self.bytes(part), row / in_word * groups + group);
                i32::from(in_stream(|_| word, row % in_word, bits))
            }
            Zeros::Bytes(part) => {
                let bytes = self.bytes(part);
                let index = if bytes.len() == 1 { 0 } else { row * groups + group };
                i32::from(bytes[index].cast_signed()) + middle
            }
        }
    }

    fn group_of(&self, input: usize) -> usize {
        match &self.place.group_index {
            None => input / self.place.group_size,
            Some(index) => index[input] as usize,
        }
    }

    /// What holds the matrix exactly, codes less zero points: signed codes of four, five or eight bits. None where inputs
    /// of one group of the kernels' have several scales, or codes less zero points take more than eight bits.
    pub(super) fn quant_format(&self) -> Option<QuantFormat> {
        *self.place.exact.get_or_init(|| {
            let GroupedPlace { rows, cols, groups, group_size, bits, .. } = *self.place;
            let aligned = cols.is_multiple_of(GROUP) && (groups == 1 || group_size.is_multiple_of(GROUP));
            if !aligned || self.place.group_index.is_some() {
                return None;
            }
            let zeros = (0..groups).flat_map(|group| (0..rows).map(move |row| self.zero(row, group)));
            let (least, most) =
                zeros.fold((i32::MAX, i32::MIN), |(least, most), zero| (least.min(zero), most.max(zero)));
            let (least, most) = (-most, (1 << bits) - 1 - least);
            let format = |bits| QuantFormat { bits, scaling: Scaling::Single, with_mins: false };
            [CodeBits::Four, CodeBits::Five, CodeBits::Eight].map(format).into_iter().find(|format| {
                let codes = format.codes();
                i32::from(*codes.start()) <= least && most <= i32::from(*codes.end())
            })
        })
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
        let GroupedPlace { layout, rows, cols, bits, .. } = *self.place;
        let (bytes, first) = (self.bytes(&self.place.codes), tile.first);
        let count = TILE_ROWS.min(rows - first);
        let lines = tile.codes.chunks_exact_mut(cols).take(count).enumerate();
        match layout {
            Layout::Gptq => {
                let words = cols * bits / 32;
                tile.words.resize(TILE_ROWS * words, 0);
                for at in 0..words {
                    for row in 0..count {
                        tile.words[row * words + at] = word(bytes, at * rows + first + row);
                    }
                }
                for (row, codes) in lines {
                    let words = &tile.words[row * words..][..words];
                    codes.iter_mut().enumerate().for_each(|(i, code)| *code = in_stream(|at| words[at], i, bits));
                }
            }
            Layout::Awq => {
                let words = rows / 8;
                for input in 0..cols {
                    for row in 0..count {
                        let word = word(bytes, input * words + (first + row) / 8);
                        tile.codes[row * cols + input] = awq_code(word, first + row);
                    }
                }
            }
            Layout::Packed => {
                let words = cols.div_ceil(32 / bits);
                for (row, codes) in lines {
                    let line = &bytes[(first + row) * words * 4..][..words * 4];
                    codes.iter_mut().enumerate().for_each(|(i, code)| *code = in_stream(|at| word(line, at), i, bits));
                }
            }
            Layout::Bytes => {
                for (row, codes) in lines {
                    let line = &bytes[(first + row) * cols..][..cols];
                    codes.iter_mut().zip(line).for_each(|(code, &byte)| *code = byte ^ 0x80);
                }
            }
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

    /// A row's codes less zero points, and its scale for every 32 of them, for a matrix with a
    /// [format](Self::quant_format). Scales wider than f16 are rounded to it: half a unit in the last place at most.
    pub(super) fn unpack_row(&self, row: usize, tile: &mut Tile, out_codes: &mut [i8], out_scales: &mut [f16]) {
        let codes = self.codes(row, tile).as_chunks::<GROUP>().0.iter();
        let out = out_codes.as_chunks_mut::<GROUP>().0.iter_mut().zip(out_scales);
        for (index, (codes, (out, scale))) in codes.zip(out).enumerate() {
            let group = self.group_of(index * GROUP);
            let zero = self.zero(row, group);
            *scale = f16::from_f32(self.scale(row, group));
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = (i32::from(code) - zero) as i8;
            }
        }
    }
}

fn awq_code(word: u32, row: usize) -> u8 {
    (word >> (4 * AWQ_PLACES[row % 8]) & 15) as u8
}
