//! Finding the tensors that a quantised module is made of, and checking their shapes.
//!
//! It knows names and shapes, not what the bits mean (the layouts' part). Its invariant: what it hands out has the type
//! and the shape that it was asked for; errors name the tensor, what it is and what is expected.

use std::ops::Range;

use safetensors::Dtype;

use super::{GroupedPlace, Layout, Scales, Zeros, word};
use crate::weights::safetensors::{Checkpoint, Entry};

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) file: usize,
    pub(super) range: Range<usize>,
}

impl From<&Entry> for Part {
    fn from(entry: &Entry) -> Self {
        Self { file: entry.file, range: entry.range.clone() }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum ScaleType {
    F32,
    F16,
    Bf16,
}

/// Each input's group, where groups do not follow each other.
#[derive(Debug)]
pub(super) struct GroupIndex {
    pub(super) part: Part,
    pub(super) groups: Box<[u32]>,
}

/// How a matrix is cut into groups.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grouping {
    /// Inputs.
    pub(super) cols: usize,
    /// Inputs of a group; the last one may have fewer.
    pub(super) size: usize,
    /// Groups.
    pub(super) count: usize,
}

/// A module's tensors.
pub(super) struct Parts<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) module: &'a str,
}

impl<'a> Parts<'a> {
    pub(super) fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.module)
    }

    pub(super) fn optional(&self, part: &str) -> Result<Option<&'a Entry>, String> {
        self.checkpoint.get(&self.name(part))
    }

    pub(super) fn required(&self, part: &str) -> Result<&'a Entry, String> {
        let missing = || format!("tensor {:?} is missing, which its module's codes need", self.name(part));
        self.optional(part)?.ok_or_else(missing)
    }

    pub(super) fn bytes(&self, entry: &Entry) -> &'a [u8] {
        &self.checkpoint.files[entry.file].bytes()[entry.range.clone()]
    }

    pub(super) fn expect(&self, part: &str, entry: &Entry, dtype: Dtype, shape: &[usize]) -> Result<(), String> {
        if entry.dtype == dtype && entry.shape == shape {
            return Ok(());
        }
        let name = self.name(part);
        Err(format!("tensor {name:?} is {:?} {:?}; {dtype:?} {shape:?} is expected", entry.dtype, entry.shape))
    }

    /// Rows and columns of a tensor of two dimensions, of `dtype`, neither zero.
    pub(super) fn matrix(&self, part: &str, entry: &Entry, dtype: Option<Dtype>) -> Result<(usize, usize), String> {
        match entry.shape[..] {
            [rows, cols] if rows > 0 && cols > 0 && dtype.is_none_or(|dtype| dtype == entry.dtype) => Ok((rows, cols)),
            _ => {
                let (name, wanted) = (self.name(part), dtype.map_or(String::new(), |dtype| format!(" of {dtype:?}")));
                Err(format!("tensor {name:?} is {:?} {:?}; a matrix{wanted} is expected", entry.dtype, entry.shape))
            }
        }
    }

    pub(super) fn scale_type(&self, part: &str, entry: &Entry) -> Result<ScaleType, String> {
        match entry.dtype {
            Dtype::F32 => Ok(ScaleType::F32),
            Dtype::F16 => Ok(ScaleType::F16),
            Dtype::BF16 => Ok(ScaleType::Bf16),
            other => Err(format!("tensor {:?} is {other:?}; scales are F16, BF16 or F32", self.name(part))),
        }
    }

    /// What a group is, given how many there are: as configured, else an equal share of the inputs (single modules may
    /// differ from what the config says of all).
    pub(super) fn grouping(&self, configured: Option<usize>, cols: usize, count: usize) -> Result<Grouping, String> {
        let configured = configured.unwrap_or(cols);
        let size = match () {
            () if cols.div_ceil(configured) == count => configured,
            () if count > 0 && cols.is_multiple_of(count) => cols / count,
            () => {
                return Err(format!(
                    "module {:?} has {count} groups of scales; {cols} inputs in groups of {configured} are expected",
                    self.module
                ));
            }
        };
        Ok(Grouping { cols, size, count })
    }

    /// Each input's group, where they are not in order.
    pub(super) fn group_index(&self, part: &str, grouping: Grouping) -> Result<Option<GroupIndex>, String> {
        let Grouping { cols, size, count } = grouping;
        let Some(entry) = self.optional(part)? else { return Ok(None) };
        self.expect(part, entry, Dtype::I32, &[cols])?;
        let bytes = self.bytes(entry);
        // compressed-tensors writes -1 into an index that is not in use.
        if part == "weight_g_idx" && bytes.iter().all(|&byte| byte == u8::MAX) {
            return Ok(None);
        }
        let mut groups = Vec::with_capacity(cols);
        for input in 0..cols {
            let group = word(bytes, input);
            if group as usize >= count {
                let (name, group) = (self.name(part), group.cast_signed());
                return Err(format!("tensor {name:?} places input {input} in group {group}; there are {count}"));
            }
            groups.push(group);
        }
        let in_order = groups.iter().enumerate().all(|(input, &group)| input / size == group as usize);
        Ok((!in_order).then(|| GroupIndex { part: entry.into(), groups: groups.into_boxed_slice() }))
    }

    /// What GPTQ and AWQ have alike: `scales [groups, rows]`, and `qzeros [groups, zero_words]` beside them.
    pub(super) fn with_rows_innermost(
        &self,
        layout: Layout,
        codes: &Codes<'_>,
        configured: Option<usize>,
        zeros: impl FnOnce(Part) -> Zeros,
    ) -> Result<GroupedPlace, String> {
        let &Codes { entry, bits, rows, cols, zero_words } = codes;
        let scales = self.required("scales")?;
        let (count, _) = self.matrix("scales", scales, None)?;
        self.expect("scales", scales, scales.dtype, &[count, rows])?;
        let stored_zeros = self.required("qzeros")?;
        self.expect("qzeros", stored_zeros, Dtype::I32, &[count, zero_words])?;
        let grouping = self.grouping(configured, cols, count)?;
        let scales =
            Scales { part: scales.into(), ty: self.scale_type("scales", scales)?, row_step: 1, group_step: rows };
        let index = self.group_index("g_idx", grouping)?;
        Ok(GroupedPlace::new(layout, (bits, rows, grouping), entry.into(), scales, zeros(stored_zeros.into()), index))
    }
}

/// A matrix's codes in GPTQ's or AWQ's layout, checked.
pub(super) struct Codes<'a> {
    pub(super) entry: &'a Entry,
    pub(super) bits: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Words that a group's zero points take.
    pub(super) zero_words: usize,
}
