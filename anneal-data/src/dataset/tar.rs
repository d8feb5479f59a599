//! Tar shards in webdataset's form: consecutive members with one stem are a sample.
//!
//! `.jpg`, `.jpeg`, `.png` or `.webp` is the image; `.cls` its class id; `.txt` its caption;
//! `.json` may hold `label` (or `cls`) and `caption` (or `text`), used where the others are absent.
//! The stem is the path up to the first dot of the file name. One pass over the headers
//! makes the index, and reads the labels; images and captions are read at their positions later.
//! Not done: compressed archives, since positions cannot be read within them.

use super::pattern::shard_files;
use super::shard::Shard;
use super::{Content, Dataset, Holds, Item, SourceConfig, count_classes};
use crate::DataError;
use serde::Deserialize;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

/// Where a member's bytes lie within its shard.
#[derive(Clone, Copy)]
struct Extent {
    offset: u64,
    size: usize,
}

struct Sample {
    shard: u32,
    /// The member's name.
    name: Box<str>,
    image: Extent,
    text: Option<Extent>,
    json: Option<Extent>,
    label: Option<i64>,
}

pub(super) struct TarDataset {
    shards: Vec<Shard>,
    samples: Vec<Sample>,
    classes: usize,
    warnings: Vec<String>,
}

/// The fields of a sample's `.json` that are used.
#[derive(Default, Deserialize)]
struct Description {
    #[serde(alias = "cls")]
    label: Option<i64>,
    #[serde(alias = "text")]
    caption: Option<String>,
}

impl TarDataset {
    pub(super) fn open(config: &SourceConfig) -> Result<Self, DataError> {
        let mut dataset = Self { shards: Vec::new(), samples: Vec::new(), classes: 0, warnings: Vec::new() };
        let mut without_image = 0;
        for (ordinal, path) in shard_files(&config.path, "tar")?.iter().enumerate() {
            let shard = Shard::open(path, ordinal)?;
            without_image += index_shard(&shard, ordinal as u32, &mut dataset.samples)?;
            dataset.shards.push(shard);
        }
        if dataset.samples.is_empty() {
            return Err(DataError::Empty {
                source_name: config.path.clone(),
                expected: "expected members such as 0001.jpg (or .png, .webp) with 0001.cls or 0001.txt"
                    .to_owned(),
            });
        }
        if without_image > 0 {
            dataset.warnings.push(format!(
                "{}: groups of members without a .jpg, .png or .webp, ignored: {without_image}",
                config.path
            ));
        }
        dataset.classes = dataset.checked_classes(config.classes)?;
        Ok(dataset)
    }

    fn checked_classes(&self, asked: Option<usize>) -> Result<usize, DataError> {
        let labelled = self.samples.iter().filter(|sample| sample.label.is_some()).count();
        if labelled == 0 {
            return Ok(0);
        }
        if let Some(index) = self.samples.iter().position(|sample| sample.label.is_none()) {
            return Err(DataError::unsupported(
                self.sample_name(index),
                format!("has no label, but {labelled} others have one; give every sample a .cls or none"),
            ));
        }
        let labels = self.samples.iter().map(|sample| sample.label.unwrap_or_default());
        count_classes(labels, asked, |index| self.sample_name(index))
    }
}

/// A sample whose members are still being met.
#[derive(Default)]
struct Group {
    stem: String,
    image: Option<(Box<str>, Extent)>,
    text: Option<Extent>,
    json: Option<Extent>,
    class: Option<i64>,
    described: Option<i64>,
}

impl Group {
    /// Adds the sample if it has an image; returns whether members were dropped.
    fn finish(self, shard: u32, samples: &mut Vec<Sample>) -> bool {
        let Self { image, text, json, class, described, .. } = self;
        let dropped = image.is_none() && (text.is_some() || json.is_some() || class.is_some());
        samples.extend(image.map(|(name, image)| Sample {
            shard,
            name,
            image,
            text,
            json,
            label: class.or(described),
        }));
        dropped
    }
}

/// Appends a shard's samples and returns how many groups had no image.
fn index_shard(shard: &Shard, ordinal: u32, samples: &mut Vec<Sample>) -> Result<usize, DataError> {
    let path = shard.path();
    let mut file = BufReader::new(File::open(path).map_err(|error| DataError::read(path, error))?);
    refuse_compressed(path, &mut file)?;
    let shard_name = path.display().to_string();
    let damaged = |error: std::io::Error| DataError::damaged(&shard_name, format!("as a tar file ({error})"));
    let mut archive = tar::Archive::new(file);
    let mut without_image = 0;
    let mut group = Group::default();
    for entry in archive.entries_with_seek().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let extent = Extent { offset: entry.raw_file_position(), size: entry.size() as usize };
        if extent.offset + entry.size() > shard.len() {
            return Err(DataError::damaged(
                &shard_name,
                format!(
                    "it is truncated: member `{name}` needs {} bytes, and the file ends before",
                    extent.size
                ),
            ));
        }
        let (stem, ending) = split_name(&name);
        if stem != group.stem {
            let full = std::mem::take(&mut group);
            without_image += usize::from(full.finish(ordinal, samples));
            stem.clone_into(&mut group.stem);
        }
        add_member(&mut group, &shard_name, &name, ending, extent, &mut entry)?;
    }
    without_image += usize::from(group.finish(ordinal, samples));
    Ok(without_image)
}

fn add_member(
    group: &mut Group,
    shard_name: &str,
    name: &str,
    ending: &str,
    extent: Extent,
    content: &mut impl Read,
) -> Result<(), DataError> {
    let member = || format!("{shard_name}: {name}");
    let mut read = || {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).map_err(|error| DataError::damaged(member(), error.to_string()))?;
        Ok::<_, DataError>(bytes)
    };
    match ending.to_ascii_lowercase().as_str() {
        "jpg" | "jpeg" | "png" | "webp" => {
            group.image.get_or_insert((name.into(), extent));
        }
        "txt" => group.text = Some(extent),
        "cls" => {
            let text = String::from_utf8_lossy(&read()?).trim().to_owned();
            let class = text.parse().map_err(|_| {
                DataError::unsupported(member(), format!("holds `{text}`; expected a class id such as 7"))
            })?;
            group.class = Some(class);
        }
        "json" => {
            group.json = Some(extent);
            group.described = parse_description(&member(), &read()?)?.label;
        }
        _ => {}
    }
    Ok(())
}

fn parse_description(member: &str, bytes: &[u8]) -> Result<Description, DataError> {
    serde_json::from_slice(bytes).map_err(|error| DataError::unsupported(member, error.to_string()))
}

/// The stem and the ending of a member's name, split at the first dot of the file name.
fn split_name(name: &str) -> (&str, &str) {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[file..].find('.') {
        Some(dot) => (&name[..file + dot], &name[file + dot + 1..]),
        None => (name, ""),
    }
}

fn refuse_compressed(path: &Path, file: &mut BufReader<File>) -> Result<(), DataError> {
    let failed = |error| DataError::read(path, error);
    let mut start = Vec::new();
    file.by_ref().take(4).read_to_end(&mut start).map_err(failed)?;
    file.rewind().map_err(failed)?;
    if start.starts_with(&[0x1F, 0x8B]) || start == [0x28, 0xB5, 0x2F, 0xFD] {
        return Err(DataError::unsupported(
            path.display().to_string(),
            "is compressed; unpack it to a plain .tar, whose members can be read at any position",
        ));
    }
    Ok(())
}

impl Dataset for TarDataset {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn shape(&self) -> Option<[usize; 3]> {
        None
    }

    fn holds(&self) -> Holds {
        Holds::Images
    }

    fn sample_name(&self, index: usize) -> String {
        let sample = &self.samples[index];
        format!("{}: {}", self.shards[sample.shard as usize].path().display(), sample.name)
    }

    fn label(&self, index: usize) -> i64 {
        self.samples[index].label.unwrap_or_default()
    }

    fn load(&self, index: usize) -> Result<Item, DataError> {
        let sample = &self.samples[index];
        let shard = &self.shards[sample.shard as usize];
        let read = |extent: Extent| {
            shard.read(extent.offset, extent.size).map_err(|error| DataError::read(shard.path(), error))
        };
        let caption = match (sample.text, sample.json) {
            (Some(text), _) => String::from_utf8_lossy(&read(text)?).trim_end().to_owned(),
            (None, Some(json)) => {
                parse_description(&self.sample_name(index), &read(json)?)?.caption.unwrap_or_default()
            }
            (None, None) => String::new(),
        };
        Ok(Item { content: Content::Encoded(read(sample.image)?), caption })
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}
