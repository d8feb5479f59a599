//! Small values with a unit of their own: byte sizes and image sizes.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes, written `512MiB`, `8GiB`, `0.5GiB`, in powers of 1000 as `8GB`, or as a plain number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
/// Read, but not written.
const DECIMAL_UNITS: [(&str, u64); 4] =
    [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1000)];
const BYTE_SIZE_FORM: &str = "a byte size such as 512MiB, 0.5GiB or 8GB";

impl ByteSize {
    /// The size as the machine's index type; saturates where that is narrower than 64 bits.
    pub fn bytes(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let is_of_number = |letter: char| letter.is_ascii_digit() || letter == '.';
        let (number, unit) = text.split_at(text.find(|letter| !is_of_number(letter)).unwrap_or(text.len()));
        let unit = unit.trim();
        let factor = UNITS
            .iter()
            .chain(&DECIMAL_UNITS)
            .find(|(name, _)| name.eq_ignore_ascii_case(unit) || unit.is_empty() && *name == "B")
            .map(|(_, factor)| *factor);
        let bytes = factor.and_then(|factor| match number.parse::<u64>() {
            Ok(number) => number.checked_mul(factor),
            // A part of a byte is none.
            Err(_) => number
                .parse::<f64>()
                .ok()
                .map(|number| number * factor as f64)
                .filter(|bytes| *bytes < u64::MAX as f64)
                .map(|bytes| bytes as u64),
        });
        bytes.map(ByteSize).ok_or_else(|| format!("'{text}' is not {BYTE_SIZE_FORM}"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = UNITS
            .iter()
            .find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor))
            .unwrap_or(&("B", 1));
        write!(formatter, "{}{unit}", self.0 / factor)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = ByteSize;
            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(BYTE_SIZE_FORM)
            }
            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Bytes)
    }
}

/// Height and width in pixels (or latent cells): one number for a square, or `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    pub height: usize,
    pub width: usize,
}

impl ImageSize {
    pub fn square(side: usize) -> Self {
        ImageSize { height: side, width: side }
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}x{}", self.height, self.width)
    }
}

impl Serialize for ImageSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.height == self.width {
            self.height.serialize(serializer)
        } else {
            [self.height, self.width].serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for ImageSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl<'de> Visitor<'de> for Size {
            type Value = ImageSize;
            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a size such as 32 or [height, width]")
            }
            fn visit_u64<E: de::Error>(self, side: u64) -> Result<ImageSize, E> {
                Ok(ImageSize::square(side as usize))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<ImageSize, A::Error> {
                let too_short = |length| de::Error::invalid_length(length, &self);
                let height = list.next_element()?.ok_or_else(|| too_short(0))?;
                let width = list.next_element()?.ok_or_else(|| too_short(1))?;
                match list.next_element::<usize>()? {
                    None => Ok(ImageSize { height, width }),
                    Some(_) => Err(too_short(3)),
                }
            }
        }
        deserializer.deserialize_any(Size)
    }
}
