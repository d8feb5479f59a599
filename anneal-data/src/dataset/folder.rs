//! Folders of images.
//!
//! Three layouts, tried in this order: a `metadata.jsonl` or `metadata.csv` lists the images; the
//! folder has folders, which are the classes in the order of their names (byte order, as
//! torchvision sorts them), searched to any depth; or it holds images without labels.
//! Files of other kinds are counted and ignored; names that begin with a dot are ignored.

use super::metadata::{MetadataRow, read_metadata};
use super::shard::folder_entries;
use super::{Content, Dataset, Holds, Item, SourceConfig, count_classes};
use crate::DataError;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Deeper folders are taken for a cycle of links.
const MAX_DEPTH: usize = 32;

struct Sample {
    path: PathBuf,
    label: i64,
    caption: String,
}

pub(super) struct FolderDataset {
    samples: Vec<Sample>,
    classes: usize,
    class_names: Vec<String>,
    warnings: Vec<String>,
}

impl FolderDataset {
    pub(super) fn open(config: &SourceConfig) -> Result<Self, DataError> {
        let root = Path::new(&config.path);
        let entries = folder_entries(root)?;
        let mut warnings = Vec::new();
        let listing = ["metadata.jsonl", "metadata.csv"].map(|name| root.join(name));
        let dataset = if let Some(listing) = listing.iter().find(|path| path.is_file()) {
            Self::from_metadata(root, listing, config.classes)?
        } else {
            let (folders, files): (Vec<PathBuf>, Vec<PathBuf>) =
                entries.into_iter().partition(|path| path.is_dir());
            if folders.is_empty() {
                Self::from_flat(files, &mut warnings, root)
            } else {
                let loose = files.iter().filter(|file| is_image(file)).count();
                if loose > 0 {
                    warnings.push(format!(
                        "{}: images outside the class folders, ignored: {loose}",
                        root.display()
                    ));
                }
                Self::from_classes(root, folders, config.classes, &mut warnings)?
            }
        };
        if dataset.samples.is_empty() {
            return Err(DataError::Empty {
                source_name: config.path.clone(),
                expected:
                    "expected .jpg, .jpeg, .png or .webp files in a folder for each class, or listed in \
                           metadata.jsonl or metadata.csv"
                        .to_owned(),
            });
        }
        Ok(Self { warnings, ..dataset })
    }

    fn from_flat(files: Vec<PathBuf>, warnings: &mut Vec<String>, root: &Path) -> Self {
        let all = files.len();
        let images: Vec<PathBuf> = files.into_iter().filter(|file| is_image(file)).collect();
        warn_of_other_files(root, all - images.len(), warnings);
        let samples =
            images.into_iter().map(|path| Sample { path, label: 0, caption: String::new() }).collect();
        Self { samples, classes: 0, class_names: Vec::new(), warnings: Vec::new() }
    }

    fn from_classes(
        root: &Path,
        folders: Vec<PathBuf>,
        asked: Option<usize>,
        warnings: &mut Vec<String>,
    ) -> Result<Self, DataError> {
        let mut samples = Vec::new();
        let mut class_names = Vec::new();
        let mut others = 0;
        for (label, folder) in folders.into_iter().enumerate() {
            let before = samples.len();
            let mut images = Vec::new();
            others += find_images(&folder, 0, &mut images)?;
            samples.extend(images.into_iter().map(|path| Sample {
                path,
                label: label as i64,
                caption: String::new(),
            }));
            if samples.len() == before {
                warnings.push(format!("{}: the class has no images", folder.display()));
            }
            class_names.push(folder.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        warn_of_other_files(root, others, warnings);
        let classes = match asked {
            Some(_) => count_classes(samples.iter().map(|sample| sample.label), asked, |index| {
                samples[index].path.display().to_string()
            })?,
            None => class_names.len(),
        };
        Ok(Self { samples, classes, class_names, warnings: Vec::new() })
    }

    fn from_metadata(root: &Path, listing: &Path, asked: Option<usize>) -> Result<Self, DataError> {
        let rows = read_metadata(listing)?;
        let (labels, class_names) = resolve_labels(listing, &rows)?;
        let mut classes = 0;
        if let Some(labels) = &labels {
            let name = |index: usize| format!("{}, line {}", listing.display(), rows[index].line);
            let asked = asked.or((!class_names.is_empty()).then_some(class_names.len()));
            classes = count_classes(labels.iter().copied(), asked, name)?;
        }
        let samples = rows
            .into_iter()
            .enumerate()
            .map(|(index, row)| Sample {
                path: root.join(row.file_name),
                label: labels.as_ref().map_or(0, |labels| labels[index]),
                caption: row.caption,
            })
            .collect();
        Ok(Self { samples, classes, class_names, warnings: Vec::new() })
    }
}

/// Ids and, where the labels are not numbers, names; nothing when no row has a label.
fn resolve_labels(
    listing: &Path,
    rows: &[MetadataRow],
) -> Result<(Option<Vec<i64>>, Vec<String>), DataError> {
    let texts: Vec<&str> = rows.iter().filter_map(|row| row.label.as_deref()).collect();
    if texts.is_empty() {
        return Ok((None, Vec::new()));
    }
    if let Some(row) = rows.iter().find(|row| row.label.is_none()) {
        return Err(DataError::unsupported(
            format!("{}, line {}", listing.display(), row.line),
            "has no label, but other lines have one; give every line a label or none",
        ));
    }
    if let Ok(ids) = texts.iter().map(|text| text.trim().parse()).collect::<Result<Vec<i64>, _>>() {
        return Ok((Some(ids), Vec::new()));
    }
    let names: Vec<String> =
        texts.iter().collect::<BTreeSet<_>>().into_iter().map(|name| (*name).to_owned()).collect();
    let id = |text: &&str| {
        names.binary_search_by(|name| name.as_str().cmp(text)).expect("every name is listed") as i64
    };
    Ok((Some(texts.iter().map(id).collect()), names))
}

/// Adds a folder's images, sorted by path, and returns the number of other files.
fn find_images(folder: &Path, depth: usize, images: &mut Vec<PathBuf>) -> Result<usize, DataError> {
    if depth > MAX_DEPTH {
        return Err(DataError::unsupported(
            folder.display().to_string(),
            format!("lies more than {MAX_DEPTH} folders deep; remove the link that leads back up"),
        ));
    }
    let mut others = 0;
    for path in folder_entries(folder)? {
        if path.is_dir() {
            others += find_images(&path, depth + 1, images)?;
        } else if is_image(&path) {
            images.push(path);
        } else {
            others += 1;
        }
    }
    Ok(others)
}

/// By the ending of the name; what the file really holds is seen when it is decoded.
pub(super) fn is_image(path: &Path) -> bool {
    path.extension().is_some_and(|extension| {
        ["jpg", "jpeg", "png", "webp"].iter().any(|known| extension.eq_ignore_ascii_case(known))
    })
}

fn warn_of_other_files(root: &Path, count: usize, warnings: &mut Vec<String>) {
    if count > 0 {
        warnings.push(format!(
            "{}: files other than .jpg, .jpeg, .png and .webp, ignored: {count}",
            root.display()
        ));
    }
}

impl Dataset for FolderDataset {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn shape(&self) -> Option<[usize; 3]> {
        None
    }

    fn holds(&self) -> Holds {
        Holds::Images
    }

    fn sample_name(&self, index: usize) -> String {
        self.samples[index].path.display().to_string()
    }

    fn label(&self, index: usize) -> i64 {
        self.samples[index].label
    }

    fn load(&self, index: usize) -> Result<Item, DataError> {
        let sample = &self.samples[index];
        let bytes = std::fs::read(&sample.path).map_err(|error| DataError::read(&sample.path, error))?;
        Ok(Item { content: Content::Encoded(bytes), caption: sample.caption.clone() })
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}
