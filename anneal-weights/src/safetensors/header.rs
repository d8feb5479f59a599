//! The header of a safetensors file: eight bytes of length, then JSON, then the tensors without gaps.
//!
//! Source: the format's description at <https://github.com/huggingface/safetensors>.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{StoredDType, TensorSpec};

/// Bytes of the length in front.
pub(super) const LENGTH_BYTES: u64 = 8;

/// The format's own limit; a greater length is another kind of file.
const LARGEST_HEADER: u64 = 100_000_000;

/// The key of the text entries; no tensor can have this name.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// What a header says.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, String>,
    /// In the order of their data.
    pub tensors: Vec<Placed>,
}

/// A tensor and its place, counted from the start of the file.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub spec: TensorSpec,
    pub offset: u64,
}

/// Why a header cannot be used.
pub(super) enum Refusal {
    /// It is some other kind of file.
    Foreign(String),
    /// It was a safetensors file.
    Damaged(String),
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads and checks the header of a file of `length` bytes.
pub(super) fn read(
    length: u64,
    mut read_at: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> Result<Header, Refusal> {
    if length < LENGTH_BYTES {
        return Err(Refusal::Foreign(format!(
            "it has {length} bytes, and the header alone needs more than 8"
        )));
    }
    let mut first = [0; LENGTH_BYTES as usize];
    read_at(&mut first, 0)?;
    let header_bytes = u64::from_le_bytes(first);
    if !(2..=LARGEST_HEADER).contains(&header_bytes) {
        return Err(Refusal::Foreign(format!("its first 8 bytes give a header of {header_bytes} bytes")));
    }
    let data_start = LENGTH_BYTES + header_bytes;
    let mut text = vec![0; header_bytes.min(length - LENGTH_BYTES) as usize];
    read_at(&mut text, LENGTH_BYTES)?;
    if !text.is_empty() && text[0] != b'{' {
        return Err(Refusal::Foreign("its header is not JSON".into()));
    }
    if data_start > length {
        return Err(Refusal::Damaged(format!(
            "it ends inside its header: expected at least {data_start} bytes, found {length}"
        )));
    }
    let raw: RawHeader = serde_json::from_slice(&text)
        .map_err(|error| Refusal::Damaged(format!("its header cannot be read: {error}")))?;
    raw.check(data_start, length).map_err(Refusal::Damaged)
}

/// The bytes in front of the data, filled up so that the data starts on a multiple of eight.
pub(super) fn write(tensors: &[&TensorSpec], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut text = serde_json::to_vec(&Written { tensors, metadata }).expect("strings and numbers serialize");
    text.resize(text.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

struct Written<'a> {
    tensors: &'a [&'a TensorSpec],
    metadata: &'a BTreeMap<String, String>,
}

impl Serialize for Written<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA_KEY, self.metadata)?;
        }
        let mut begin = 0;
        for spec in self.tensors {
            let end = begin + spec.bytes();
            let raw = RawTensor {
                dtype: spec.dtype.name().into(),
                shape: spec.shape.iter().map(|size| *size as u64).collect(),
                data_offsets: [begin, end],
            };
            map.serialize_entry(&spec.name, &raw)?;
            begin = end;
        }
        map.end()
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

impl RawHeader {
    fn check(mut self, data_start: u64, length: u64) -> Result<Header, String> {
        let mut names = BTreeSet::new();
        if let Some((twice, _)) = self.tensors.iter().find(|(name, _)| !names.insert(name.as_str())) {
            return Err(format!("its header names '{twice}' twice"));
        }
        self.tensors.sort_by_key(|(_, raw)| raw.data_offsets);
        let mut end = 0;
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for (name, raw) in self.tensors {
            let [from, to] = raw.data_offsets;
            let dtype = StoredDType::from_name(&raw.dtype)
                .ok_or_else(|| format!("'{name}' has the unknown element type '{}'", raw.dtype))?;
            let needed =
                raw.shape.iter().try_fold(dtype.size() as u64, |size, extent| size.checked_mul(*extent));
            if needed.is_none() || needed != to.checked_sub(from) {
                return Err(format!(
                    "'{name}' is {dtype} {:?}, which does not fill its bytes {from} to {to}",
                    raw.shape
                ));
            }
            if from != end {
                let what =
                    if from < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
                return Err(format!("'{name}' {what}: it starts at byte {from} of the data, expected {end}"));
            }
            end = to;
            let shape = raw.shape.iter().map(|extent| *extent as usize).collect();
            tensors.push(Placed { spec: TensorSpec { name, dtype, shape }, offset: data_start + from });
        }
        match data_start.checked_add(end) {
            Some(expected) if expected == length => Ok(Header { metadata: self.metadata, tensors }),
            expected => {
                let expected = expected.unwrap_or(u64::MAX);
                let what = if length < expected { "it was cut off" } else { "it has bytes after its end" };
                Err(format!("{what}: expected {expected} bytes, found {length}"))
            }
        }
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader::default();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA_KEY {
                header.metadata = map.next_value()?;
            } else {
                let tensor =
                    map.next_value().map_err(|error| A::Error::custom(format!("'{name}': {error}")))?;
                header.tensors.push((name, tensor));
            }
        }
        Ok(header)
    }
}
