//! compressed-tensors: `pack-quantized` of four and eight bits, and bytes (`int-quantized`).
//!
//! Packed codes lie along a row, `weight_packed [out, in / (32 / bits)]`, zero points along the rows,
//! `weight_zero_point [out / (32 / bits), groups]`; bytes are `weight [out, in]` with `weight_zero_point [out, groups]`. Both
//! are signed; here half the range is added. It must not know scales' types. Its invariant: the readers stay within what
//! [`packed`] and [`bytes`] have checked.
//!
//! Source: `pack_to_int32` of compressed-tensors' `pack_quantized` compressor.

use safetensors::Dtype;

use super::{GroupedPlace, Layout, Scales, Tile, Zeros, in_stream, parts::Parts, word};
use crate::weights::safetensors::Entry;

pub(super) fn packed(parts: &Parts<'_>, codes: &Entry) -> Result<GroupedPlace, String> {
    let (rows, words) = parts.matrix("weight_packed", codes, Some(Dtype::I32))?;
    let shape = shape(parts)?;
    // The bits are what the shapes leave room for; int4 and int8 never need as many words.
    let bits = [4, 8].into_iter().find(|bits| shape.1.div_ceil(32 / bits) == words);
    let (Some(bits), true) = (bits, shape.0 == rows) else {
        let (name, found) = (parts.name("weight_packed"), &codes.shape);
        return Err(format!("tensor {name:?} has the shape {found:?}, which holds no {shape:?} of int4 or int8"));
    };
    resolve(parts, Layout::Packed, bits, codes, shape)
}

pub(super) fn bytes(parts: &Parts<'_>, codes: &Entry) -> Result<GroupedPlace, String> {
    let shape = parts.matrix("weight", codes, Some(Dtype::I8))?;
    resolve(parts, Layout::Bytes, 8, codes, shape)
}

fn resolve(
    parts: &Parts<'_>,
    layout: Layout,
    bits: usize,
    codes: &Entry,
    (rows, cols): (usize, usize),
) -> Result<GroupedPlace, String> {
    let scales = parts.required("weight_scale")?;
    let single_scale = scales.shape.iter().all(|&size| size == 1);
    let groups = match scales.shape[..] {
        _ if single_scale => 1,
        [count] if count == rows => 1,
        [count, groups] if count == rows && groups > 0 => groups,
        _ => {
            let (name, found) = (parts.name("weight_scale"), &scales.shape);
            return Err(format!("tensor {name:?} has the shape {found:?}; [{rows}, groups] is expected"));
        }
    };
    let grouping = parts.grouping(Some(cols.div_ceil(groups)), cols, groups)?;
    let (row_step, group_step) = if single_scale { (0, 0) } else { (groups, 1) };
    let zeros = match parts.optional("weight_zero_point")? {
        None => Zeros::Middle,
        Some(zeros) if zeros.dtype == Dtype::I8 => {
            let count: usize = zeros.shape.iter().product();
            if count != if single_scale { 1 } else { rows * groups } {
                parts.expect("weight_zero_point", zeros, Dtype::I8, &[rows, groups])?;
            }
            Zeros::Bytes { part: zeros.into(), row_step, group_step }
        }
        Some(zeros) => {
            parts.expect("weight_zero_point", zeros, Dtype::I32, &[rows.div_ceil(32 / bits), groups])?;
            Zeros::Words(zeros.into())
        }
    };
    let scales = Scales { part: scales.into(), ty: parts.scale_type("weight_scale", scales)?, row_step, group_step };
    let index = parts.group_index("weight_g_idx", grouping)?;
    Ok(GroupedPlace::new(layout, (bits, rows, grouping), codes.into(), scales, zeros, index))
}

/// What `weight_shape` holds: rows and columns before packing.
fn shape(parts: &Parts<'_>) -> Result<(usize, usize), String> {
    let entry = parts.required("weight_shape")?;
    let bytes = parts.bytes(entry);
    let numbers: Vec<i64> = match entry.dtype {
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect(),
        Dtype::I32 => bytes.as_chunks().0.iter().map(|&bytes| i64::from(i32::from_le_bytes(bytes))).collect(),
        _ => Vec::new(),
    };
    let sizes: Vec<usize> = numbers.iter().filter_map(|&number| usize::try_from(number).ok()).collect();
    match sizes[..] {
        [rows, cols] if rows > 0 && cols > 0 => Ok((rows, cols)),
        _ => Err(format!("tensor {:?} holds {numbers:?}; rows and columns are expected", parts.name("weight_shape"))),
    }
}

/// The codes of some rows from `tile.first` on.
pub(super) fn unpack(place: &GroupedPlace, bytes: &[u8], count: usize, tile: &mut Tile) {
    let &GroupedPlace { layout, cols, bits, .. } = place;
    let line_bytes = if layout == Layout::Bytes { cols } else { cols.div_ceil(32 / bits) * 4 };
    let lines = bytes[tile.first * line_bytes..].chunks_exact(line_bytes);
    for (codes, line) in tile.codes.chunks_exact_mut(cols).zip(lines).take(count) {
        if layout == Layout::Bytes {
            codes.iter_mut().zip(line).for_each(|(code, &byte)| *code = byte ^ 0x80);
        } else {
            codes.iter_mut().enumerate().for_each(|(i, code)| *code = in_stream(|at| word(line, at), i, bits));
        }
    }
}
