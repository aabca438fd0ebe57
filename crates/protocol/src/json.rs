//! Helpers that make serde as strict and as lenient as the API: objects only from objects, alternatives ("a string or
//! an array of strings") with one clear sentence instead of serde's "did not match any variant".
//!
//! Invariant: none of them buffers its input, so an error keeps its path and memory stays with what is kept.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        RefOr, Schema,
        schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Type},
    },
};

/// A known field whose content this version does not read: present or not is all that matters, whatever it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present;

impl<'de> Deserialize<'de> for Present {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Asked for as "any", not as "ignored": to a watcher of ignored fields this field was read.
        struct AnyValue;
        impl<'de> Visitor<'de> for AnyValue {
            type Value = Present;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("any value")
            }
            fn visit_bool<E>(self, _: bool) -> Result<Present, E> {
                Ok(Present)
            }
            fn visit_i64<E>(self, _: i64) -> Result<Present, E> {
                Ok(Present)
            }
            fn visit_u64<E>(self, _: u64) -> Result<Present, E> {
                Ok(Present)
            }
            fn visit_f64<E>(self, _: f64) -> Result<Present, E> {
                Ok(Present)
            }
            fn visit_str<E>(self, _: &str) -> Result<Present, E> {
                Ok(Present)
            }
            fn visit_unit<E>(self) -> Result<Present, E> {
                Ok(Present)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Present, A::Error> {
                while seq.next_element::<Present>()?.is_some() {}
                Ok(Present)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Present, A::Error> {
                while map.next_entry::<IgnoredKey, Present>()?.is_some() {}
                Ok(Present)
            }
        }
        deserializer.deserialize_any(AnyValue)
    }
}

/// A key that is skipped without being kept.
struct IgnoredKey;

impl<'de> Deserialize<'de> for IgnoredKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyKey;
        impl Visitor<'_> for AnyKey {
            type Value = IgnoredKey;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_str<E>(self, _: &str) -> Result<IgnoredKey, E> {
                Ok(IgnoredKey)
            }
        }
        deserializer.deserialize_str(AnyKey)
    }
}

/// Reads `T` from an object and from nothing else: derived structs would also take an array of their fields in order,
/// which is never what a client meant. `parse` is the derived function.
pub(crate) fn object_only<'de, D, T, F>(deserializer: D, expecting: &'static str, parse: F) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    F: ObjectParser<'de, T>,
{
    struct ObjectVisitor<T, F>(&'static str, F, PhantomData<T>);
    impl<'de, T, F: ObjectParser<'de, T>> Visitor<'de> for ObjectVisitor<T, F> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str(self.0)
        }
        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            self.1.parse(MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_map(ObjectVisitor(expecting, parse, PhantomData))
}

/// The derived `deserialize` of one struct, generic in the deserializer (a closure cannot be).
pub(crate) trait ObjectParser<'de, T> {
    fn parse<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error>;
}

/// Implements `Deserialize` for structs marked `#[serde(remote = "Self")]`, from objects only.
macro_rules! from_object {
    ($($type:ident: $expecting:literal),+ $(,)?) => {$(
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Parser;
                impl<'de> $crate::json::ObjectParser<'de, $type> for Parser {
                    fn parse<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<$type, D::Error> {
                        // The inherent function that `remote = "Self"` derives.
                        $type::deserialize(deserializer)
                    }
                }
                $crate::json::object_only(deserializer, $expecting, Parser)
            }
        }
    )+};
}
pub(crate) use from_object;

/// A string, or an array of strings: OpenAI's `stop`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OneOrMany(pub Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrManyVisitor;
        impl<'de> Visitor<'de> for OneOrManyVisitor {
            type Value = OneOrMany;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }
            fn visit_str<E>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany(vec![text.to_owned()]))
            }
            fn visit_string<E>(self, text: String) -> Result<OneOrMany, E> {
                Ok(OneOrMany(vec![text]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<OneOrMany, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = seq.next_element()? {
                    texts.push(text);
                }
                Ok(OneOrMany(texts))
            }
        }
        deserializer.deserialize_any(OneOrManyVisitor)
    }
}

/// A string (a mode such as `auto`), or an object that says more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModeOrObject {
    /// `"none"`, `"auto"`, ...
    Mode(String),
    /// `{...}`, not read.
    Object,
}

impl<'de> Deserialize<'de> for ModeOrObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ModeVisitor;
        impl<'de> Visitor<'de> for ModeVisitor {
            type Value = ModeOrObject;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or an object")
            }
            fn visit_str<E>(self, mode: &str) -> Result<ModeOrObject, E> {
                Ok(ModeOrObject::Mode(mode.to_owned()))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ModeOrObject, A::Error> {
                while map.next_entry::<IgnoredKey, Present>()?.is_some() {}
                Ok(ModeOrObject::Object)
            }
        }
        deserializer.deserialize_any(ModeVisitor)
    }
}

/// The schema of "any JSON".
impl PartialSchema for Present {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().description(Some("known, not supported yet: refused")).into()
    }
}
impl ToSchema for Present {}

impl PartialSchema for OneOrMany {
    fn schema() -> RefOr<Schema> {
        let string = || ObjectBuilder::new().schema_type(Type::String);
        OneOfBuilder::new().item(string()).item(ArrayBuilder::new().items(string())).into()
    }
}
impl ToSchema for OneOrMany {}

impl PartialSchema for ModeOrObject {
    fn schema() -> RefOr<Schema> {
        let of = |kind| ObjectBuilder::new().schema_type(kind);
        OneOfBuilder::new().item(of(Type::String)).item(of(Type::Object)).into()
    }
}
impl ToSchema for ModeOrObject {}
