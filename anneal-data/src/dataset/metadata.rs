//! `metadata.jsonl` and `metadata.csv`: captions and labels beside the images of a folder.
//!
//! One row an image: `file_name` (relative to the folder), optionally `text` or `caption`, and
//! `label` (an id, or a name: the sorted names are then the classes). The CSV has a header line
//! and quoting as in RFC 4180. Other columns are ignored.

use crate::DataError;
use serde::Deserialize;
use std::path::Path;

/// One row, with its line for messages.
#[derive(Debug, PartialEq)]
pub(super) struct MetadataRow {
    pub line: usize,
    pub file_name: String,
    pub caption: String,
    pub label: Option<String>,
}

/// Reads the rows of a metadata file; its ending says which form it has.
pub(super) fn read_metadata(path: &Path) -> Result<Vec<MetadataRow>, DataError> {
    let bytes = std::fs::read(path).map_err(|error| DataError::read(path, error))?;
    let name = path.display().to_string();
    let text = String::from_utf8(bytes).map_err(|_| DataError::damaged(&name, "it is not UTF-8 text"))?;
    let text = text.trim_start_matches('\u{feff}');
    if path.extension().is_some_and(|extension| extension == "csv") {
        csv_rows(&name, text)
    } else {
        jsonl_rows(&name, text)
    }
}

#[derive(Deserialize)]
struct JsonRow {
    file_name: String,
    #[serde(alias = "caption")]
    text: Option<String>,
    label: Option<JsonLabel>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum JsonLabel {
    Id(i64),
    Name(String),
}

fn jsonl_rows(name: &str, text: &str) -> Result<Vec<MetadataRow>, DataError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(position, line)| {
            let row: JsonRow = serde_json::from_str(line).map_err(|error| {
                DataError::unsupported(format!("{name}, line {}", position + 1), error.to_string())
            })?;
            let label = row.label.map(|label| match label {
                JsonLabel::Id(id) => id.to_string(),
                JsonLabel::Name(name) => name,
            });
            let caption = row.text.unwrap_or_default();
            Ok(MetadataRow { line: position + 1, file_name: row.file_name, caption, label })
        })
        .collect()
}

fn csv_rows(name: &str, text: &str) -> Result<Vec<MetadataRow>, DataError> {
    let mut records = csv_records(name, text)?.into_iter();
    let header = records.next().map(|(_, fields)| fields).unwrap_or_default();
    let column = |names: &[&str]| header.iter().position(|field| names.contains(&field.trim()));
    let file_name = column(&["file_name"]).ok_or_else(|| {
        DataError::unsupported(
            name,
            format!("has no column `file_name`; its columns are {}", header.join(", ")),
        )
    })?;
    let (caption, label) = (column(&["text", "caption"]), column(&["label"]));
    records
        .map(|(line, mut fields)| {
            if fields.len() != header.len() {
                return Err(DataError::unsupported(
                    format!("{name}, line {line}"),
                    format!("has {} fields; the header has {}", fields.len(), header.len()),
                ));
            }
            let mut take = |column: Option<usize>| column.map(|column| std::mem::take(&mut fields[column]));
            Ok(MetadataRow {
                line,
                file_name: take(Some(file_name)).unwrap_or_default(),
                caption: take(caption).unwrap_or_default(),
                label: take(label).filter(|label| !label.is_empty()),
            })
        })
        .collect()
}

/// The records of a CSV with the line on which each begins.
fn csv_records(name: &str, text: &str) -> Result<Vec<(usize, Vec<String>)>, DataError> {
    let mut records = Vec::new();
    let mut characters = text.chars().peekable();
    let mut line = 1;
    while characters.peek().is_some() {
        let start = line;
        let mut fields = vec![String::new()];
        let mut quoted = false;
        while let Some(character) = characters.next() {
            line += usize::from(character == '\n');
            let field = fields.last_mut().expect("a record has a field");
            match character {
                '"' if quoted && characters.peek() == Some(&'"') => {
                    characters.next();
                    field.push('"');
                }
                '"' if quoted => quoted = false,
                '"' if field.is_empty() => quoted = true,
                ',' if !quoted => fields.push(String::new()),
                '\r' if !quoted && characters.peek() == Some(&'\n') => {}
                '\n' if !quoted => break,
                other => field.push(other),
            }
        }
        if quoted {
            return Err(DataError::unsupported(
                format!("{name}, line {start}"),
                "a quoted field is not closed before the end of the file",
            ));
        }
        if fields != [""] {
            records.push((start, fields));
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(line: usize, file_name: &str, caption: &str, label: Option<&str>) -> MetadataRow {
        let label = label.map(str::to_owned);
        MetadataRow { line, file_name: file_name.to_owned(), caption: caption.to_owned(), label }
    }

    #[test]
    fn csv_follows_rfc_4180() {
        let text = "file_name,text,label\r\na.png,\"two, \"\"quoted\"\"\nlines\",cat\r\n\r\nb.png,,\n";
        assert_eq!(
            csv_rows("m.csv", text).unwrap(),
            [row(2, "a.png", "two, \"quoted\"\nlines", Some("cat")), row(5, "b.png", "", None)]
        );
    }

    #[test]
    fn csv_errors_name_the_line() {
        let message = |text| csv_rows("m.csv", text).unwrap_err().to_string();
        assert_eq!(message("name,text\n"), "m.csv: has no column `file_name`; its columns are name, text");
        assert_eq!(message("file_name,text\na,b\nc\n"), "m.csv, line 3: has 1 fields; the header has 2");
        assert_eq!(
            message("file_name\n\"a\n"),
            "m.csv, line 2: a quoted field is not closed before the end of the file"
        );
    }

    #[test]
    fn jsonl_takes_text_or_caption_and_ids_or_names() {
        let text = "{\"file_name\":\"a.png\",\"text\":\"x\",\"label\":3}\n\n{\"file_name\":\"b.png\",\"caption\":\"y\"}";
        assert_eq!(
            jsonl_rows("m.jsonl", text).unwrap(),
            [row(1, "a.png", "x", Some("3")), row(3, "b.png", "y", None)]
        );
        let message = jsonl_rows("m.jsonl", "{\"text\": \"x\"}").unwrap_err().to_string();
        assert!(message.starts_with("m.jsonl, line 1: missing field `file_name`"), "{message}");
    }
}
