//! The key-value part of a GGUF file.
//!
//! It must not know which keys a model needs. Its invariant: nesting of arrays is bounded, and memory is bounded by the
//! cursor's budget.

use super::cursor::{Cursor, Outcome};

/// Arrays of arrays deeper than this are refused (files in use have depth 1).
const MAX_ARRAY_DEPTH: usize = 4;

/// A metadata value. Integers and floats of every width widen.
#[derive(Clone, Debug, PartialEq)]
pub enum MetadataValue {
    /// u8 to u64.
    Unsigned(u64),
    /// i8 to i64.
    Signed(i64),
    /// f32 and f64.
    Float(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8.
    String(String),
    /// Arrays that the compact forms below cannot hold: of truth values, of f64, of arrays, of u64 beyond i64.
    Array(Vec<MetadataValue>),
    /// Array of texts.
    Strings(Vec<String>),
    /// Array of f32.
    Floats(Vec<f32>),
    /// Array of integers.
    Ints(Vec<i64>),
}

impl MetadataValue {
    /// What it is, for error messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "a whole number",
            Self::Float(_) => "a number",
            Self::Bool(_) => "a truth value",
            Self::String(_) => "a text",
            Self::Array(_) => "an array",
            Self::Strings(_) => "an array of texts",
            Self::Floats(_) => "an array of numbers",
            Self::Ints(_) => "an array of whole numbers",
        }
    }
}

/// Reads a value and the type id before it.
pub(super) fn read_value(cursor: &mut Cursor<'_>) -> Outcome<MetadataValue> {
    let kind = cursor.u32()?;
    read_of_kind(cursor, kind, 0)
}

fn read_of_kind(cursor: &mut Cursor<'_>, kind: u32, depth: usize) -> Outcome<MetadataValue> {
    use MetadataValue as V;
    Ok(match kind {
        0 => V::Unsigned(cursor.u8()?.into()),
        1 => V::Signed(cursor.i8()?.into()),
        2 => V::Unsigned(cursor.u16()?.into()),
        3 => V::Signed(cursor.i16()?.into()),
        4 => V::Unsigned(cursor.u32()?.into()),
        5 => V::Signed(cursor.i32()?.into()),
        6 => V::Float(cursor.f32()?.into()),
        7 => V::Bool(cursor.bool()?),
        8 => V::String(cursor.string()?),
        9 => read_array(cursor, depth)?,
        10 => V::Unsigned(cursor.u64()?),
        11 => V::Signed(cursor.i64()?),
        12 => V::Float(cursor.f64()?),
        other => return Err(format!("value type {other} is unknown (0 to 12 exist)")),
    })
}

fn read_array(cursor: &mut Cursor<'_>, depth: usize) -> Outcome<MetadataValue> {
    if depth == MAX_ARRAY_DEPTH {
        return Err(format!("arrays are nested deeper than {MAX_ARRAY_DEPTH}"));
    }
    let kind = cursor.u32()?;
    Ok(match kind {
        0 => ints(cursor, 1, |c| Ok(c.u8()?.into()))?,
        1 => ints(cursor, 1, |c| Ok(c.i8()?.into()))?,
        2 => ints(cursor, 2, |c| Ok(c.u16()?.into()))?,
        3 => ints(cursor, 2, |c| Ok(c.i16()?.into()))?,
        4 => ints(cursor, 4, |c| Ok(c.u32()?.into()))?,
        5 => ints(cursor, 4, |c| Ok(c.i32()?.into()))?,
        6 => MetadataValue::Floats(elements(cursor, 4, Cursor::f32)?),
        8 => MetadataValue::Strings(elements(cursor, 8, Cursor::string)?),
        10 => compact_unsigned(elements(cursor, 8, Cursor::u64)?),
        11 => ints(cursor, 8, Cursor::i64)?,
        // The smallest array is a type and a count, 12 bytes.
        7 => MetadataValue::Array(elements(cursor, 1, |c| read_of_kind(c, kind, depth))?),
        9 => MetadataValue::Array(elements(cursor, 12, |c| read_of_kind(c, kind, depth + 1))?),
        12 => MetadataValue::Array(elements(cursor, 8, |c| read_of_kind(c, kind, depth))?),
        other => return Err(format!("array element type {other} is unknown (0 to 12 exist)")),
    })
}

fn ints<'a>(
    cursor: &mut Cursor<'a>,
    element_bytes: u64,
    read: impl Fn(&mut Cursor<'a>) -> Outcome<i64>,
) -> Outcome<MetadataValue> {
    Ok(MetadataValue::Ints(elements(cursor, element_bytes, read)?))
}

fn elements<'a, T>(
    cursor: &mut Cursor<'a>,
    min_bytes: u64,
    read: impl Fn(&mut Cursor<'a>) -> Outcome<T>,
) -> Outcome<Vec<T>> {
    let count = cursor.count("array elements", min_bytes, size_of::<T>() as u64)?;
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        values.push(read(cursor)?);
    }
    Ok(values)
}

fn compact_unsigned(values: Vec<u64>) -> MetadataValue {
    match values.iter().map(|&value| i64::try_from(value)).collect() {
        Ok(values) => MetadataValue::Ints(values),
        Err(_) => MetadataValue::Array(values.into_iter().map(MetadataValue::Unsigned).collect()),
    }
}
