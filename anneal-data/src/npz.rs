//! NumPy arrays in files: `.npy` (one array) and `.npz` (a zip of them), read and written.
//!
//! Contract: u8, bool, i32, i64, f32 and f64, little-endian, C order; members stored or
//! deflated. A file is read whole and checked whole (sizes and the zip's CRC). Writing stores
//! without compression, as `numpy.savez` does, and replaces the target by one rename.
//! Source: the NEP 1 description of the format, versions 1.0 to 3.0.
//! Not done: structured and object arrays, big-endian files, streaming.

use crate::DataError;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Cursor, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// The elements of an array, in C order.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    U8(Vec<u8>),
    Bool(Vec<bool>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Values {
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::Bool(values) => values.len(),
            Self::I32(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The format's name of the element type.
    fn descriptor(&self) -> &'static str {
        match self {
            Self::U8(_) => "|u1",
            Self::Bool(_) => "|b1",
            Self::I32(_) => "<i4",
            Self::I64(_) => "<i8",
            Self::F32(_) => "<f4",
            Self::F64(_) => "<f8",
        }
    }

    fn parse(descriptor: &str, bytes: Vec<u8>) -> Option<Self> {
        fn each<const N: usize, T>(bytes: &[u8], convert: fn([u8; N]) -> T) -> Vec<T> {
            bytes.as_chunks::<N>().0.iter().map(|chunk| convert(*chunk)).collect()
        }
        Some(match descriptor.trim_start_matches(['<', '|', '=']) {
            "u1" => Self::U8(bytes),
            "b1" => Self::Bool(bytes.iter().map(|byte| *byte != 0).collect()),
            "i4" => Self::I32(each(&bytes, i32::from_le_bytes)),
            "i8" => Self::I64(each(&bytes, i64::from_le_bytes)),
            "f4" => Self::F32(each(&bytes, f32::from_le_bytes)),
            "f8" => Self::F64(each(&bytes, f64::from_le_bytes)),
            _ => return None,
        })
    }

    fn write(&self, output: &mut impl Write) -> std::io::Result<()> {
        fn each<const N: usize, T: Copy>(
            output: &mut impl Write,
            values: &[T],
            convert: fn(T) -> [u8; N],
        ) -> std::io::Result<()> {
            let mut bytes = Vec::with_capacity(N * values.len().min(1 << 16));
            for chunk in values.chunks(1 << 16) {
                bytes.clear();
                chunk.iter().for_each(|value| bytes.extend_from_slice(&convert(*value)));
                output.write_all(&bytes)?;
            }
            Ok(())
        }
        match self {
            Self::U8(values) => output.write_all(values),
            Self::Bool(values) => each(output, values, |value| [u8::from(value)]),
            Self::I32(values) => each(output, values, i32::to_le_bytes),
            Self::I64(values) => each(output, values, i64::to_le_bytes),
            Self::F32(values) => each(output, values, f32::to_le_bytes),
            Self::F64(values) => each(output, values, f64::to_le_bytes),
        }
    }
}

/// One array: its shape, outermost dimension first, and its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    shape: Vec<usize>,
    values: Values,
}

impl Array {
    /// # Panics
    /// If the shape does not hold exactly as many elements as `values`.
    pub fn new(shape: impl Into<Vec<usize>>, values: Values) -> Self {
        let shape = shape.into();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "shape {shape:?} against its elements");
        Self { shape, values }
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn values(&self) -> &Values {
        &self.values
    }

    pub fn into_values(self) -> Values {
        self.values
    }
}

/// The arrays of one `.npz` file by name (without the members' `.npy`).
#[derive(Clone, Debug)]
pub struct Npz {
    name: String,
    arrays: BTreeMap<String, Array>,
}

impl Npz {
    /// Reads and checks all arrays of a file.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|error| DataError::read(path, error))?;
        if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
            return Err(DataError::unsupported(path.display().to_string(), "is a folder, not an .npz file"));
        }
        Self::parse(&path.display().to_string(), std::io::BufReader::new(file))
    }

    /// Reads and checks all arrays of an `.npz` in memory; `name` is for messages.
    pub fn parse(name: &str, input: impl Read + Seek) -> Result<Self, DataError> {
        let damaged = |detail: String| DataError::damaged(name, detail);
        let mut archive = zip::ZipArchive::new(input)
            .map_err(|error| damaged(format!("it does not end as a zip file does ({error})")))?;
        let mut arrays = BTreeMap::new();
        for position in 0..archive.len() {
            let mut member = archive
                .by_index(position)
                .map_err(|error| damaged(format!("member {position} of the zip ({error})")))?;
            let member_name = member
                .name()
                .map_err(|error| damaged(format!("the name of member {position} of the zip ({error})")))?
                .into_owned();
            if let Some(array_name) = member_name.strip_suffix(".npy") {
                let array = parse_npy(&format!("{name}, array `{array_name}`"), &mut member)?;
                arrays.insert(array_name.to_owned(), array);
            }
        }
        Ok(Self { name: name.to_owned(), arrays })
    }

    /// The array of this name, or an error that lists those present.
    pub fn array(&self, array: &str) -> Result<&Array, DataError> {
        self.arrays.get(array).ok_or_else(|| self.missing(array))
    }

    /// Moves the array of this name out, or fails with a list of those present.
    pub fn take(&mut self, array: &str) -> Result<Array, DataError> {
        self.arrays.remove(array).ok_or_else(|| self.missing(array))
    }

    pub fn contains(&self, array: &str) -> bool {
        self.arrays.contains_key(array)
    }

    fn missing(&self, array: &str) -> DataError {
        let names: Vec<String> = self.arrays.keys().map(|name| format!("`{name}`")).collect();
        DataError::MissingArray {
            file: self.name.clone(),
            array: array.to_owned(),
            present: if names.is_empty() { "none".to_owned() } else { names.join(", ") },
        }
    }
}

/// Reads one `.npy` file.
pub fn read_npy(path: &Path) -> Result<Array, DataError> {
    let file = File::open(path).map_err(|error| DataError::read(path, error))?;
    parse_npy(&path.display().to_string(), &mut std::io::BufReader::new(file))
}

/// Writes one `.npy` file.
pub fn write_npy(path: &Path, array: &Array) -> Result<(), DataError> {
    replace_file(path, |file| {
        let mut output = BufWriter::new(file);
        write_array(&mut output, array)?;
        output.flush()
    })
}

/// Writes arrays under their names as one `.npz`.
pub fn write_npz(path: &Path, arrays: &[(&str, &Array)]) -> Result<(), DataError> {
    replace_file(path, |file| {
        let mut archive = zip::ZipWriter::new(FirstError::new(BufWriter::new(file)));
        for (name, array) in arrays {
            // A zip member above 4 GiB needs its long form; 16 bytes an element is an upper bound.
            let options = zip::write::SimpleFileOptions::default()
                .compression_method(zip::CompressionMethod::Stored)
                .large_file(array.values.len() >= (1 << 28) - (1 << 16));
            archive.start_file(format!("{name}.npy"), options)?;
            write_array(&mut archive, array)?;
        }
        archive.finish()?.flush()
    })
}

/// Writes samples as the ADM evaluator reads them: `arr_0` u8 [N, H, W, C] and, for
/// class-conditional samples, `arr_1` i64 [N].
///
/// # Panics
/// If the numbers of pixels or labels contradict `shape_nhwc`.
pub fn write_samples(
    path: &Path,
    images: Vec<u8>,
    shape_nhwc: [usize; 4],
    labels: Option<Vec<i64>>,
) -> Result<(), DataError> {
    let images = Array::new(shape_nhwc, Values::U8(images));
    let labels = labels.map(|labels| Array::new([shape_nhwc[0]], Values::I64(labels)));
    let mut arrays = vec![("arr_0", &images)];
    arrays.extend(labels.as_ref().map(|labels| ("arr_1", labels)));
    write_npz(path, &arrays)
}

/// Tells of the first error alone; what comes after it goes nowhere. A zip writer that is dropped unfinished tries to write
/// its end, and prints on standard error what it meets.
struct FirstError<W> {
    inner: W,
    failed: bool,
    position: u64,
    length: u64,
}

impl<W: Write + Seek> FirstError<W> {
    /// Over a file that is empty.
    fn new(inner: W) -> Self {
        Self { inner, failed: false, position: 0, length: 0 }
    }

    fn noting<T>(&mut self, result: std::io::Result<T>) -> std::io::Result<T> {
        self.failed |= result.as_ref().is_err_and(|error| error.kind() != ErrorKind::Interrupted);
        result
    }
}

impl<W: Write + Seek> Write for FirstError<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = match self.failed {
            true => bytes.len(),
            false => {
                let written = self.inner.write(bytes);
                self.noting(written)?
            }
        };
        self.position += count as u64;
        self.length = self.length.max(self.position);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.failed {
            return Ok(());
        }
        let flushed = self.inner.flush();
        self.noting(flushed)
    }
}

impl<W: Write + Seek> Seek for FirstError<W> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.position = match (self.failed, to) {
            (false, _) => {
                let sought = self.inner.seek(to);
                self.noting(sought)?
            }
            (true, SeekFrom::Start(position)) => position,
            (true, SeekFrom::Current(by)) => self.position.saturating_add_signed(by),
            (true, SeekFrom::End(by)) => self.length.saturating_add_signed(by),
        };
        Ok(self.position)
    }
}

/// Writes beside the target and renames, so that a full disk leaves the old file whole.
fn replace_file(path: &Path, write: impl FnOnce(&File) -> std::io::Result<()>) -> Result<(), DataError> {
    let failed = |source| DataError::Write { path: path.to_owned(), source };
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let file = File::create(&partial).map_err(failed)?;
    let written = write(&file).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&partial, path));
    written.map_err(|error| {
        // The partial file is of no use, and the write's own error is the one to report.
        let _ = std::fs::remove_file(&partial);
        failed(error)
    })
}

fn write_array(output: &mut impl Write, array: &Array) -> std::io::Result<()> {
    // A Python tuple: one element needs its comma, more do without a last one.
    let mut dimensions = array.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    if array.shape.len() == 1 {
        dimensions.push(',');
    }
    let mut header = format!(
        "{{'descr': '{}', 'fortran_order': False, 'shape': ({dimensions}), }}",
        array.values.descriptor()
    );
    // Magic, version and length take 10 bytes; the data start at a multiple of 64.
    let padding = 63 - (10 + header.len()) % 64;
    header.extend(std::iter::repeat_n(' ', padding));
    header.push('\n');
    let length = u16::try_from(header.len()).map_err(std::io::Error::other)?;
    output.write_all(b"\x93NUMPY\x01\x00")?;
    output.write_all(&length.to_le_bytes())?;
    output.write_all(header.as_bytes())?;
    array.values.write(output)
}

fn parse_npy(name: &str, input: &mut impl Read) -> Result<Array, DataError> {
    let short = |error: std::io::Error| DataError::damaged(name, format!("it ends early ({error})"));
    let mut start = [0; 8];
    input.read_exact(&mut start).map_err(short)?;
    if &start[..6] != b"\x93NUMPY" {
        return Err(DataError::damaged(name, "it does not begin as a NumPy array does"));
    }
    let header_length = match start[6] {
        1 => {
            let mut length = [0; 2];
            input.read_exact(&mut length).map_err(short)?;
            usize::from(u16::from_le_bytes(length))
        }
        2 | 3 => {
            let mut length = [0; 4];
            input.read_exact(&mut length).map_err(short)?;
            u32::from_le_bytes(length) as usize
        }
        version => return Err(DataError::unsupported(name, format!("has NumPy format version {version}"))),
    };
    let mut header = Vec::new();
    input.take(header_length as u64).read_to_end(&mut header).map_err(short)?;
    if header.len() != header_length {
        return Err(DataError::damaged(name, "it ends within its header"));
    }
    let header = Header::parse(name, &String::from_utf8_lossy(&header))?;
    let mut bytes = Vec::new();
    // One byte more than is due: it shows excess, and reaching the end makes the zip check its CRC.
    input
        .take((header.bytes as u64).saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| DataError::damaged(name, format!("its data cannot be read ({error})")))?;
    if bytes.len() != header.bytes {
        let relation = if bytes.len() < header.bytes { "fewer" } else { "more" };
        return Err(DataError::damaged(
            name,
            format!("its shape {:?} needs {} bytes, and the file has {relation}", header.shape, header.bytes),
        ));
    }
    let values = Values::parse(&header.descriptor, bytes).expect("the header accepts only known types");
    Ok(Array { shape: header.shape, values })
}

struct Header {
    descriptor: String,
    shape: Vec<usize>,
    bytes: usize,
}

impl Header {
    /// Parses the dictionary literal that NumPy writes.
    fn parse(name: &str, text: &str) -> Result<Self, DataError> {
        let field = |key: &str| -> Result<&str, DataError> {
            let at = text
                .find(&format!("'{key}'"))
                .ok_or_else(|| DataError::damaged(name, format!("its header has no `{key}`")))?;
            Ok(text[at + key.len() + 2..].trim_start().trim_start_matches(':').trim_start())
        };
        let descriptor = field("descr")?.split('\'').nth(1).unwrap_or_default().to_owned();
        let width = match descriptor.trim_start_matches(['<', '|', '=']) {
            "u1" | "b1" => 1,
            "i4" | "f4" => 4,
            "i8" | "f8" => 8,
            _ => {
                return Err(DataError::unsupported(
                    name,
                    format!(
                        "has element type `{descriptor}`; save it as uint8, bool, int32, int64, float32 or \
                         float64 (`array.astype(...)`)"
                    ),
                ));
            }
        };
        if field("fortran_order")?.starts_with("True") {
            return Err(DataError::unsupported(
                name,
                "is in Fortran order; save `numpy.ascontiguousarray(array)`",
            ));
        }
        let malformed = || DataError::damaged(name, "its shape cannot be read");
        let inner =
            field("shape")?.strip_prefix('(').and_then(|rest| rest.split_once(')')).ok_or_else(malformed)?.0;
        let shape: Vec<usize> = inner
            .split(',')
            .map(str::trim)
            .filter(|dimension| !dimension.is_empty())
            .map(|dimension| dimension.parse().map_err(|_| malformed()))
            .collect::<Result<_, _>>()?;
        let bytes = shape
            .iter()
            .try_fold(width, |product: usize, dimension| product.checked_mul(*dimension))
            .ok_or_else(malformed)?;
        Ok(Self { descriptor, shape, bytes })
    }
}

/// The digits that come with Anneal, as the bytes of an `.npz`.
pub(crate) fn shipped_digits() -> Cursor<&'static [u8]> {
    Cursor::new(include_bytes!("../digits.npz"))
}
