//! TensorBoard event files: scalars, images and text.
//!
//! Contract: each call appends one whole record in one write, so nothing waits in this process when it is killed;
//! a record cut short by a kill is skipped by TensorBoard. Every start writes a new file, named so that it
//! sorts after those of earlier starts; a resumed run begins its file with a session-start event, upon which
//! TensorBoard forgets the steps that the interrupted run had written beyond the checkpoint.
//!
//! Source: the record framing of TFRecord (length as u64, its masked CRC-32C, payload, its masked CRC-32C; all
//! little-endian) and the messages of `event.proto`, `summary.proto`, `tensor.proto`, of which only the fields
//! used here are encoded. Scalars use `simple_value` and images the `image` field, which every version reads.
//! Deliberately absent: graphs, histograms, audio, reading.

use std::path::Path;

use super::picture::Picture;
use super::unix_seconds;
use anneal_weights::{Appender, FileError};

/// The event file of one start of a run.
#[derive(Debug)]
pub struct EventWriter {
    file: Appender,
}

impl EventWriter {
    /// Starts a new event file in `folder`, which is created if needed. `resumed_step` is the step of the
    /// checkpoint that the run goes on from (0: from the start): what was shown beyond it is forgotten.
    ///
    /// # Errors
    /// If the folder or the file cannot be created or written; the message names it.
    pub fn create(folder: &Path, resumed_step: u64) -> Result<Self, FileError> {
        std::fs::create_dir_all(folder).map_err(FileError::on("create folder", folder))?;
        let now = unix_seconds();
        let name = file_name(first_free_second(folder, now as u64)?);
        let mut writer = Self { file: Appender::open(&folder.join(name))? };
        writer.append(&version_event(now))?;
        writer.append(&session_start_event(now, resumed_step + 1))?;
        Ok(writer)
    }

    /// Adds the scalars of one step. A slash in a tag groups charts: `train/loss`.
    ///
    /// # Errors
    /// If the write fails; the message names the file.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f32)]) -> Result<(), FileError> {
        self.append(&scalars_event(unix_seconds(), step, scalars))
    }

    /// Adds a picture under `tag`.
    ///
    /// # Errors
    /// If the write fails; the message names the file.
    pub fn image(&mut self, step: u64, tag: &str, picture: &Picture) -> Result<(), FileError> {
        let encoded = EncodedImage {
            height: picture.height() as u64,
            width: picture.width() as u64,
            channels: picture.channels() as u64,
            png: &picture.to_png(),
        };
        self.append(&image_event(unix_seconds(), step, tag, &encoded))
    }

    /// Adds text under `tag`, shown as Markdown; see [`verbatim`].
    ///
    /// # Errors
    /// If the write fails; the message names the file.
    pub fn text(&mut self, step: u64, tag: &str, markdown: &str) -> Result<(), FileError> {
        self.append(&text_event(unix_seconds(), step, tag, markdown))
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    fn append(&mut self, event: &Message) -> Result<(), FileError> {
        self.file.append(&record(&event.0))
    }
}

/// Markdown that shows `text` as it is, in a fixed-width font: for a recipe.
pub fn verbatim(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

/// What the names of event files begin with, as TensorBoard wants it.
pub(crate) const FILE_PREFIX: &str = "events.out.tfevents.";

fn file_name(second: u64) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "localhost",
        name => name,
    };
    format!("{FILE_PREFIX}{second:010}.{host}.{}", std::process::id())
}

/// TensorBoard reads the files of a folder in the order of their names, which begin with a time in seconds. Two
/// starts within a second, or a clock set back, must not swap them.
fn first_free_second(folder: &Path, now: u64) -> Result<u64, FileError> {
    let mut second = now;
    for entry in std::fs::read_dir(folder).map_err(FileError::on("read folder", folder))? {
        let name = entry.map_err(FileError::on("read folder", folder))?.file_name();
        let digits = name.to_str().and_then(|name| name.strip_prefix(FILE_PREFIX)?.split('.').next());
        if let Some(taken) = digits.and_then(|digits| digits.parse::<u64>().ok()) {
            second = second.max(taken + 1);
        }
    }
    Ok(second)
}

/// CRC-32C with TFRecord's mask: rotated right by 15 bits, plus a constant, so that a checksum of data which
/// itself holds checksums stays strong.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut bytes = Vec::with_capacity(payload.len() + 16);
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(&masked_crc(&length).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&masked_crc(payload).to_le_bytes());
    bytes
}

/// A protobuf message under construction. Fields are added in the order of their numbers, as the reference
/// writer does; a field that equals its default is left out, except inside a `oneof`.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn tag(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn varint(mut self, field: u64, value: u64) -> Self {
        if value != 0 {
            self.tag(field, 0);
            self.raw_varint(value);
        }
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        self.tag(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn float(mut self, field: u64, value: f32) -> Self {
        self.tag(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.tag(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn message(self, field: u64, value: &Message) -> Self {
        self.bytes(field, &value.0)
    }
}

// Field numbers, as in `Message::double(1, ..)`, are those of the .proto files named in the head.

fn event(wall_time: f64, step: u64) -> Message {
    Message::default().double(1, wall_time).varint(2, step)
}

fn version_event(wall_time: f64) -> Message {
    event(wall_time, 0).bytes(3, b"brain.Event:2")
}

/// `SessionLog.START` at the first step to come: readers drop what earlier files hold from that step on.
fn session_start_event(wall_time: f64, step: u64) -> Message {
    const START: u64 = 1;
    event(wall_time, step).message(7, &Message::default().varint(1, START))
}

fn scalars_event(wall_time: f64, step: u64, scalars: &[(&str, f32)]) -> Message {
    let summary = scalars.iter().fold(Message::default(), |summary, (tag, value)| {
        summary.message(1, &Message::default().bytes(1, tag.as_bytes()).float(2, *value))
    });
    event(wall_time, step).message(5, &summary)
}

struct EncodedImage<'a> {
    height: u64,
    width: u64,
    /// Also TensorFlow's code of the colour space: 1 grey, 3 RGB.
    channels: u64,
    png: &'a [u8],
}

fn image_event(wall_time: f64, step: u64, tag: &str, image: &EncodedImage) -> Message {
    let image = Message::default()
        .varint(1, image.height)
        .varint(2, image.width)
        .varint(3, image.channels)
        .bytes(4, image.png);
    let value = Message::default().bytes(1, tag.as_bytes()).message(4, &image);
    event(wall_time, step).message(5, &Message::default().message(1, &value))
}

/// Text is a string tensor of shape [1] that names the plugin which shows it.
fn text_event(wall_time: f64, step: u64, tag: &str, text: &str) -> Message {
    const DT_STRING: u64 = 7;
    let one_dimension = Message::default().message(2, &Message::default().varint(1, 1));
    let tensor = Message::default().varint(1, DT_STRING).message(2, &one_dimension).bytes(8, text.as_bytes());
    let plugin = Message::default().bytes(1, b"text");
    let value = Message::default()
        .bytes(1, format!("{tag}/text_summary").as_bytes())
        .message(8, &tensor)
        .message(9, &Message::default().message(1, &plugin));
    event(wall_time, step).message(5, &Message::default().message(1, &value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// RFC 3720, appendix B.4, and the check value that the CRC catalogue lists for CRC-32/ISCSI.
    #[test]
    fn crc_of_published_vectors() {
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        let vectors: [(&[u8], u32); 5] = [
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (&descending, 0x113f_db5c),
            (b"123456789", 0xe306_9283),
        ];
        for (bytes, expected) in vectors {
            assert_eq!(crc32c::crc32c(bytes), expected);
            assert_eq!(masked_crc(bytes).wrapping_sub(0xa282_ead8).rotate_left(15), expected);
        }
    }

    // The expected bytes are those of the `tensorboard` package 2.21 (its `event_pb2` and `RecordWriter`).

    #[test]
    fn version_record_equals_the_reference() {
        assert_eq!(
            hex(&record(&version_event(1_700_000_000.25).0)),
            "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9"
        );
    }

    #[test]
    fn session_start_record_equals_the_reference() {
        assert_eq!(
            hex(&record(&session_start_event(1_700_000_004.0, 301).0)),
            "100000000000000095fbfe180900000041fc54d94110ad023a02080116d553ae"
        );
    }

    #[test]
    fn scalar_records_equal_the_reference() {
        assert_eq!(
            hex(&record(
                &scalars_event(1_700_000_001.5, 300, &[("train/loss", 0.125), ("train/lr", 1e-4)]).0
            )),
            "3200000000000000241956ec0900006040fc54d94110ac022a240a110a0a747261696e2f6c6f7373150000003e0a0f0a0874\
             7261696e2f6c721517b7d1386b81d877"
        );
        assert_eq!(
            hex(&record(&scalars_event(1_700_000_001.5, 0, &[("train/loss", 0.0)]).0)),
            "1e00000000000000d9dc12320900006040fc54d9412a130a110a0a747261696e2f6c6f73731500000000171cf44c"
        );
    }

    #[test]
    fn image_record_equals_the_reference() {
        let image = EncodedImage { height: 2, width: 300, channels: 3, png: &[0x89, 0x50, 0x4e, 0x47] };
        assert_eq!(
            hex(&record(&image_event(1_700_000_002.0, 7, "samples", &image).0)),
            "2700000000000000bbe1b1460900008040fc54d94110072a1a0a180a0773616d706c6573220d080210ac021803220489504e\
             47eb4dcbd2"
        );
    }

    #[test]
    fn text_record_equals_the_reference() {
        assert_eq!(
            hex(&record(&text_event(1_700_000_003.0, 0, "recipe", "model: dit é").0)),
            "4500000000000000ebe668b0090000c040fc54d9412a3a0a380a137265636970652f746578745f73756d6d61727942170807\
             120412020801420d6d6f64656c3a2064697420c3a94a080a060a04746578740fe72b94"
        );
    }

    /// Splits a file into payloads, checking both checksums of each.
    fn payloads(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut payloads = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let payload = &bytes[12..12 + length];
            assert_eq!(bytes[..12 + length + 4], record(payload));
            payloads.push(payload.to_vec());
            bytes = &bytes[12 + length + 4..];
        }
        payloads
    }

    #[test]
    fn a_file_holds_whole_records_after_each_call() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(&folder.path().join("tensorboard"), 300).unwrap();
        let read = |writer: &EventWriter| payloads(&std::fs::read(writer.path()).unwrap());
        assert_eq!(read(&writer).len(), 2);
        // After the time (9 bytes): step 301 and the session start, as in the reference record.
        assert_eq!(hex(&read(&writer)[1][9..]), "10ad023a020801");
        writer.scalars(301, &[("train/loss", 0.5)]).unwrap();
        writer.text(301, "recipe", &verbatim("model: dit\n  depth: 6")).unwrap();
        let events = read(&writer);
        assert_eq!(events.len(), 4);
        assert!(String::from_utf8_lossy(&events[3]).contains("    model: dit\n      depth: 6\n"));
        let now = f64::from_le_bytes(events[2][1..9].try_into().unwrap());
        assert!((unix_seconds() - now).abs() < 60.0);
    }

    #[test]
    fn files_of_later_starts_sort_after_earlier_ones() {
        let folder = tempfile::tempdir().unwrap();
        let future = folder.path().join(format!("{FILE_PREFIX}9000000000.host.1"));
        std::fs::write(future, b"").unwrap();
        let paths: Vec<std::path::PathBuf> =
            (0..3).map(|_| EventWriter::create(folder.path(), 0).unwrap().path().to_path_buf()).collect();
        assert!(paths.is_sorted());
        assert!(paths[0].to_str().unwrap().contains(".9000000001."));
    }

    #[test]
    fn a_folder_that_cannot_be_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run");
        std::fs::write(&file, b"").unwrap();
        let message = EventWriter::create(&file.join("tensorboard"), 0).unwrap_err().to_string();
        assert!(
            message.starts_with(&format!("cannot create folder {}/tensorboard: ", file.display())),
            "{message}"
        );
    }
}
