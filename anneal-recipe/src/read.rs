//! Serde's reader over the tree: the derived `Deserialize` of the sections runs on it, and its errors carry the
//! dotted key and the place.
//!
//! Two rules beyond plain serde: an enum written as a section with the key `kind` is that variant with the other keys
//! as its content, and a whole number may be written as `1e5`.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;

use crate::node::{Entry, Node, Origin, Value};

/// What went wrong, at which key; the key is completed from the inside out.
#[derive(Debug)]
pub(crate) struct ReadError {
    pub path: Vec<String>,
    pub origin: Option<Origin>,
    pub problem: Problem,
}

#[derive(Debug)]
pub(crate) enum Problem {
    UnknownKey { key: String, known: &'static [&'static str] },
    MissingKey { key: &'static str },
    WrongType { found: Option<String>, expected: String },
    UnknownValue { found: String, known: &'static [&'static str] },
}

impl ReadError {
    fn new(problem: Problem) -> Self {
        ReadError { path: Vec::new(), origin: None, problem }
    }

    fn inside(mut self, key: &str, origin: Origin) -> Self {
        self.path.insert(0, key.into());
        self.at(origin)
    }

    fn at(mut self, origin: Origin) -> Self {
        self.origin.get_or_insert(origin);
        self
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self:?}")
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Problem::WrongType { found: None, expected: message.to_string() })
    }
    fn invalid_type(found: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new(Problem::WrongType { found: Some(describe(found)), expected: in_words(expected) })
    }
    fn invalid_value(found: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(found, expected)
    }
    fn invalid_length(length: usize, expected: &dyn de::Expected) -> Self {
        let found = format!("a list of length {length}");
        Self::new(Problem::WrongType { found: Some(found), expected: in_words(expected) })
    }
    fn unknown_variant(variant: &str, known: &'static [&'static str]) -> Self {
        Self::new(Problem::UnknownValue { found: variant.into(), known })
    }
    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        Self::new(Problem::UnknownKey { key: field.into(), known })
    }
    fn missing_field(field: &'static str) -> Self {
        Self::new(Problem::MissingKey { key: field })
    }
}

fn describe(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Bool(value) => Value::Bool(value).describe(),
        Unexpected::Unsigned(value) => Value::Unsigned(value).describe(),
        Unexpected::Signed(value) => Value::Signed(value).describe(),
        Unexpected::Float(value) => Value::Float(value).describe(),
        Unexpected::Str(text) => Value::Text(text.into()).describe(),
        Unexpected::Unit | Unexpected::Option => Value::Null.describe(),
        Unexpected::Seq => Value::List(Vec::new()).describe(),
        Unexpected::Map => Value::Map(Vec::new()).describe(),
        other => other.to_string(),
    }
}

/// Serde's names of types, in the words of a recipe.
fn in_words(expected: &dyn de::Expected) -> String {
    let expected = expected.to_string();
    match expected.as_str() {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".into(),
        "f32" | "f64" => "a number".into(),
        "a string" => "text (in quotes if it looks like a number)".into(),
        "path string" => "a path".into(),
        "a boolean" => "true or false".into(),
        "a sequence" => "a list, such as [1, 2]".into(),
        other => {
            let length = other.strip_prefix("an array of length ");
            match length.or_else(|| other.strip_suffix(" elements in sequence")) {
                Some(length) => format!("a list of length {length}"),
                None => other.into(),
            }
        }
    }
}

/// Reads one node.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(pub &'a Node);

/// Reads the entries of a section; `kind` is left out where it has already chosen the variant.
struct Section<'a> {
    entries: std::slice::Iter<'a, Entry>,
    skip: Option<&'static str>,
    current: Option<&'a Entry>,
}

impl<'a> Reader<'a> {
    fn section<V: Visitor<'a>>(self, skip: Option<&'static str>, visitor: V) -> Result<V::Value, ReadError> {
        match self.0.entries() {
            Some(entries) => visitor.visit_map(Section { entries: entries.iter(), skip, current: None }),
            None => {
                let found = Some(self.0.value.describe());
                let problem = Problem::WrongType { found, expected: "a section of keys".into() };
                Err(ReadError::new(problem).at(self.0.origin))
            }
        }
    }

    /// The variant that an enum's node names, in one of its three forms.
    fn choice(self) -> Result<Choice<'a>, ReadError> {
        let node = self.0;
        let choice = match (&node.value, node.get("kind")) {
            (Value::Map(_), Some(kind)) => {
                Choice { name: kind, key: Some("kind"), content: Some(node), content_key: None }
            }
            (Value::Map(entries), None) if entries.len() == 1 => {
                let Entry { key, node: content, .. } = &entries[0];
                return Ok(Choice { name: node, key: None, content: Some(content), content_key: Some(key) });
            }
            _ => Choice { name: node, key: None, content: None, content_key: None },
        };
        match &choice.name.value {
            Value::Text(_) => Ok(choice),
            other => {
                let expected = "one of the known names".into();
                let error = ReadError::new(Problem::WrongType { found: Some(other.describe()), expected });
                Err(choice.at_name(error))
            }
        }
    }

    /// The number as an integer where it is one, so that `1e5` may stand for 100000.
    fn whole(self) -> Option<u64> {
        match self.0.value {
            Value::Float(value) if value.fract() == 0.0 && (0.0..9e15).contains(&value) => Some(value as u64),
            _ => None,
        }
    }
}

macro_rules! whole_numbers {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
            match self.whole() {
                Some(value) => visitor.visit_u64(value).map_err(|error: ReadError| error.at(self.0.origin)),
                None => self.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Reader<'de> {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.0.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(items) => {
                let mut access = de::value::SeqDeserializer::new(items.iter());
                let value = visitor.visit_seq(&mut access)?;
                access.end()?;
                Ok(value)
            }
            Value::Map(entries) => {
                visitor.visit_map(Section { entries: entries.iter(), skip: None, current: None })
            }
        }
        .map_err(|error: ReadError| error.at(self.0.origin))
    }

    whole_numbers!(deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64);

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.0.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.section(None, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        visitor.visit_enum(self.choice()?)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, ReadError> for &'de Node {
    type Deserializer = Reader<'de>;

    fn into_deserializer(self) -> Reader<'de> {
        Reader(self)
    }
}

impl<'de> de::MapAccess<'de> for Section<'de> {
    type Error = ReadError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ReadError> {
        let skip = self.skip;
        let Some(entry) = self.entries.find(|entry| Some(entry.key.as_str()) != skip) else {
            return Ok(None);
        };
        self.current = Some(entry);
        let key = de::value::BorrowedStrDeserializer::new(&entry.key);
        seed.deserialize(key).map(Some).map_err(|error: ReadError| error.at(entry.key_origin))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ReadError> {
        let entry = self.current.take().expect("serde asks for a value only after its key");
        seed.deserialize(Reader(&entry.node)).map_err(|error| error.inside(&entry.key, entry.node.origin))
    }
}

/// A chosen variant: `name` alone, `{kind: name, ...content}`, or `{name: content}`.
struct Choice<'a> {
    /// Where the name stands: its own node, or the section whose only key (`content_key`) it is.
    name: &'a Node,
    /// The key under which the name stands, if it has one.
    key: Option<&'static str>,
    content: Option<&'a Node>,
    content_key: Option<&'a str>,
}

impl<'a> Choice<'a> {
    fn at_name(&self, error: ReadError) -> ReadError {
        match self.key {
            Some(key) => error.inside(key, self.name.origin),
            None => error.at(self.name.origin),
        }
    }

    fn section<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let skip = self.key;
        let read = match self.content {
            Some(content) => Reader(content).section(skip, visitor),
            None => visitor.visit_map(Section { entries: [].iter(), skip, current: None }),
        };
        read.map_err(|error| match (self.content_key, self.content) {
            (Some(key), Some(content)) => error.inside(key, content.origin),
            _ => error,
        })
    }
}

impl<'de> de::EnumAccess<'de> for Choice<'de> {
    type Error = ReadError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), ReadError> {
        let name = match (self.content_key, &self.name.value) {
            (Some(key), _) => key,
            (None, Value::Text(name)) => name,
            (None, _) => unreachable!("only text is made a choice"),
        };
        let name = de::value::BorrowedStrDeserializer::new(name);
        let value = seed.deserialize(name).map_err(|error| self.at_name(error))?;
        Ok((value, self))
    }
}

impl<'de> de::VariantAccess<'de> for Choice<'de> {
    type Error = ReadError;

    fn unit_variant(self) -> Result<(), ReadError> {
        let is_skipped = |entry: &Entry| Some(entry.key.as_str()) == self.key;
        match self.content.map(|content| (content, content.entries())) {
            None => Ok(()),
            Some((_, Some(entries))) if entries.iter().all(is_skipped) => Ok(()),
            Some((content, _)) => {
                let problem = Problem::WrongType {
                    found: Some(content.value.describe()),
                    expected: "the name alone, which takes no keys".into(),
                };
                Err(ReadError::new(problem).at(content.origin))
            }
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, ReadError> {
        seed.deserialize(Content(self))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _length: usize, visitor: V) -> Result<V::Value, ReadError> {
        self.section(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.section(visitor)
    }
}

/// The content of a variant that holds a struct of its own.
struct Content<'a>(Choice<'a>);

impl<'de> Deserializer<'de> for Content<'de> {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.0.section(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}
