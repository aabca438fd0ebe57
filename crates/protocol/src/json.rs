//! Helpers that make serde as strict and as lenient as the API: objects only from objects, alternatives ("a string or
//! an array of strings") with one clear sentence instead of serde's "did not match any variant".
//!
//! Invariant: none of them buffers its input, so an error keeps its path and memory stays with what is kept.

use std::{borrow::Cow, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::{Map, Number, Value};
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

/// Values (objects, arrays, texts, numbers, ...) that a free-form field may hold. Expanded in memory one takes some thirty
/// times the two bytes it may have in a body.
pub const MAX_FREE_VALUES: usize = 1 << 18;

/// A free-form object, bounded by [`MAX_FREE_VALUES`] while it is read; `null` is `None`.
pub(crate) fn free_object<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Map<String, Value>>, D::Error> {
    Option::<FreeObject>::deserialize(deserializer).map(|object| object.map(|FreeObject(map)| map))
}

/// An array of free-form objects, bounded together by [`MAX_FREE_VALUES`] while they are read; `null` is `None`.
pub(crate) fn free_objects<'de, D>(deserializer: D) -> Result<Option<Vec<Map<String, Value>>>, D::Error>
where
    D: Deserializer<'de>,
{
    struct FreeObjects(Vec<Map<String, Value>>);
    impl<'de> Deserialize<'de> for FreeObjects {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_seq(ObjectsVisitor)
        }
    }
    struct ObjectsVisitor;
    impl<'de> Visitor<'de> for ObjectsVisitor {
        type Value = FreeObjects;
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a sequence")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<FreeObjects, A::Error> {
            let mut num_left = MAX_FREE_VALUES;
            let mut objects = Vec::new();
            while let Some(object) = seq.next_element_seed(ObjectSeed(&mut num_left))? {
                objects.push(object);
            }
            Ok(FreeObjects(objects))
        }
    }
    Option::<FreeObjects>::deserialize(deserializer).map(|objects| objects.map(|FreeObjects(all)| all))
}

/// Values in a free-form object, itself among them.
pub(crate) fn count_values(object: &Map<String, Value>) -> usize {
    fn count(value: &Value) -> usize {
        match value {
            Value::Object(object) => count_values(object),
            Value::Array(values) => 1 + values.iter().map(count).sum::<usize>(),
            _ => 1,
        }
    }
    1 + object.values().map(count).sum::<usize>()
}

/// The error of a field that holds more than [`MAX_FREE_VALUES`].
pub(crate) fn too_many_values<E: Error>() -> E {
    E::custom(format!("more than {MAX_FREE_VALUES} JSON values (objects, arrays, texts, numbers), which is the limit"))
}

struct FreeObject(Map<String, Value>);

impl<'de> Deserialize<'de> for FreeObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ObjectSeed(&mut { MAX_FREE_VALUES }).deserialize(deserializer).map(Self)
    }
}

/// Any JSON, bounded by [`MAX_FREE_VALUES`] while it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeValue(pub Value);

impl<'de> Deserialize<'de> for FreeValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ValueSeed(&mut { MAX_FREE_VALUES }).deserialize(deserializer).map(Self)
    }
}

impl PartialSchema for FreeValue {
    fn schema() -> RefOr<Schema> {
        Value::schema()
    }
}
impl ToSchema for FreeValue {
    fn name() -> Cow<'static, str> {
        "JsonValue".into()
    }
}

/// Reads an object, and takes each of its values from what is left.
struct ObjectSeed<'a>(&'a mut usize);

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = Map<String, Value>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ObjectSeed<'_> {
    type Value = Map<String, Value>;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a map")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let num_left = self.0;
        take_one(num_left)?;
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            object.insert(key, entries.next_value_seed(ValueSeed(num_left))?);
        }
        Ok(object)
    }
}

/// Reads any value, and takes it and what it holds from what is left. The parser bounds the nesting.
struct ValueSeed<'a>(&'a mut usize);

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
    type Value = Value;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any value")
    }
    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        take_one(self.0).map(|()| Value::Bool(value))
    }
    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        take_one(self.0).map(|()| value.into())
    }
    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        take_one(self.0).map(|()| value.into())
    }
    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        take_one(self.0).map(|()| Number::from_f64(value).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        take_one(self.0).map(|()| text.into())
    }
    fn visit_string<E: Error>(self, text: String) -> Result<Value, E> {
        take_one(self.0).map(|()| text.into())
    }
    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        take_one(self.0).map(|()| Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        take_one(self.0)?;
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(ValueSeed(self.0))? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }
    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<Value, A::Error> {
        ObjectSeed(self.0).visit_map(entries).map(Value::Object)
    }
}

fn take_one<E: Error>(num_left: &mut usize) -> Result<(), E> {
    *num_left = num_left.checked_sub(1).ok_or_else(too_many_values)?;
    Ok(())
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

// Names in the API's description are for its readers, to whom how a field is parsed means nothing.

/// The schema of "any JSON".
impl PartialSchema for Present {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().description(Some("known, not supported yet: refused")).into()
    }
}
impl ToSchema for Present {
    fn name() -> Cow<'static, str> {
        "Unsupported".into()
    }
}

impl PartialSchema for OneOrMany {
    fn schema() -> RefOr<Schema> {
        let string = || ObjectBuilder::new().schema_type(Type::String);
        OneOfBuilder::new().item(string()).item(ArrayBuilder::new().items(string())).into()
    }
}
impl ToSchema for OneOrMany {
    fn name() -> Cow<'static, str> {
        "StringOrStrings".into()
    }
}

impl PartialSchema for ModeOrObject {
    fn schema() -> RefOr<Schema> {
        let of = |kind| ObjectBuilder::new().schema_type(kind);
        OneOfBuilder::new().item(of(Type::String)).item(of(Type::Object)).into()
    }
}
impl ToSchema for ModeOrObject {
    fn name() -> Cow<'static, str> {
        "ToolChoice".into()
    }
}
