//! `.npz` and `.npy` against files that NumPy wrote (see fixtures/make.py), and back.

mod common;

use anneal_data::npz::{Array, Npz, Values, read_npy, write_npy, write_npz, write_samples};
use common::fixture;
use std::path::Path;

fn expected() -> Vec<(&'static str, Array)> {
    vec![
        ("u8", Array::new([2, 3, 4], Values::U8((0..24).collect()))),
        ("flags", Array::new([3], Values::Bool(vec![true, false, true]))),
        ("i32", Array::new([1, 2], Values::I32(vec![-5, i32::MAX]))),
        ("i64", Array::new([2], Values::I64(vec![i64::MIN, 7]))),
        ("f32", Array::new([3], Values::F32(vec![1.5, -0.1, f32::INFINITY]))),
        ("f64", Array::new([], Values::F64(vec![std::f64::consts::PI]))),
        ("empty", Array::new([0, 3], Values::F32(Vec::new()))),
    ]
}

#[test]
fn numpy_files_are_read() {
    for file in ["stored.npz", "deflated.npz"] {
        let npz = Npz::read(&fixture(file)).unwrap();
        for (name, array) in expected() {
            assert_eq!(npz.array(name).unwrap(), &array, "{file}, {name}");
        }
    }
}

#[test]
fn written_arrays_are_byte_for_byte_what_numpy_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ours.npz");
    let arrays = expected();
    let named: Vec<(&str, &Array)> = arrays.iter().map(|(name, array)| (*name, array)).collect();
    write_npz(&path, &named).unwrap();
    let members = |path: &Path| {
        let mut archive = zip::ZipArchive::new(std::fs::File::open(path).unwrap()).unwrap();
        (0..archive.len())
            .map(|index| {
                let mut member = archive.by_index(index).unwrap();
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut member, &mut bytes).unwrap();
                (member.name().unwrap().into_owned(), bytes)
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(members(&path), members(&fixture("stored.npz")));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "a partial file is left behind");
}

#[test]
fn samples_have_the_evaluators_layout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("samples.npz");
    write_samples(&path, (0..24).collect(), [2, 2, 2, 3], Some(vec![4, 1])).unwrap();
    let npz = Npz::read(&path).unwrap();
    assert_eq!(npz.array("arr_0").unwrap(), &Array::new([2, 2, 2, 3], Values::U8((0..24).collect())));
    assert_eq!(npz.array("arr_1").unwrap(), &Array::new([2], Values::I64(vec![4, 1])));
    write_samples(&path, (0..24).collect(), [2, 2, 2, 3], None).unwrap();
    assert!(!Npz::read(&path).unwrap().contains("arr_1"));
}

#[test]
fn npy_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npy");
    for (_, array) in expected() {
        write_npy(&path, &array).unwrap();
        assert_eq!(read_npy(&path).unwrap(), array);
    }
}

#[test]
fn what_is_not_understood_is_said() {
    let message = |name: &str| read_npy(&fixture(name)).unwrap_err().to_string();
    assert!(message("fortran.npy").ends_with("is in Fortran order; save `numpy.ascontiguousarray(array)`"));
    assert!(message("half.npy").contains("has element type `<f2`; save it as uint8, bool, int32"));
    assert!(message("big_endian.npy").contains("has element type `>i4`"));
    let npz = Npz::read(&fixture("stored.npz")).unwrap();
    let message = npz.array("images").unwrap_err().to_string();
    assert!(message.ends_with(
        "stored.npz: has no array `images`; it has `empty`, `f32`, `f64`, `flags`, `i32`, `i64`, `u8`"
    ));
}

#[test]
fn every_truncation_and_flipped_data_byte_is_noticed() {
    let whole = std::fs::read(fixture("stored.npz")).unwrap();
    for length in 0..whole.len() {
        assert!(Npz::parse("cut.npz", std::io::Cursor::new(&whole[..length])).is_err(), "cut at {length}");
    }
    for name in ["deflated.npz", "stored.npz"] {
        let whole = std::fs::read(fixture(name)).unwrap();
        let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&whole)).unwrap();
        let (start, size) = {
            let member = archive.by_name("u8.npy").unwrap();
            (member.data_start().unwrap() as usize, member.compressed_size() as usize)
        };
        for position in start..start + size {
            let mut flipped = whole.clone();
            flipped[position] ^= 0x10;
            let error =
                Npz::parse("flip.npz", std::io::Cursor::new(&flipped)).expect_err("a flipped byte passed");
            let message = error.to_string();
            assert!(message.starts_with("flip.npz, array `u8`: "), "{message}");
        }
    }
    let message = Npz::parse("cut.npz", std::io::Cursor::new(&whole[..100])).unwrap_err().to_string();
    assert!(message.starts_with("cut.npz: damaged: it does not end as a zip file does"), "{message}");
    assert!(message.ends_with("; write or download it again"), "{message}");
}

#[test]
fn npy_that_is_cut_or_too_long_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npy");
    write_npy(&path, &Array::new([4], Values::F32(vec![1.0; 4]))).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let message = read_npy(&path).unwrap_err().to_string();
        assert!(message.contains("a.npy: damaged: "), "{message}");
    }
    std::fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    let message = read_npy(&path).unwrap_err().to_string();
    assert!(message.contains("its shape [4] needs 16 bytes, and the file has more"), "{message}");
}

#[test]
fn a_failed_write_leaves_the_old_file_and_names_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gone").join("samples.npz");
    let message = write_samples(&path, vec![0; 3], [1, 1, 1, 3], None).unwrap_err().to_string();
    assert!(message.contains("gone/samples.npz: cannot be written: No such file"), "{message}");
    assert!(message.ends_with("what was there before is unchanged"), "{message}");
    // A folder in the way: the write itself succeeds and the rename does not.
    let path = folder.path().join("taken.npz");
    std::fs::create_dir_all(path.join("inside")).unwrap();
    write_samples(&path, vec![0; 3], [1, 1, 1, 3], None).unwrap_err();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a partial file is left behind");
}

#[test]
fn missing_files_have_their_own_message() {
    let message = Npz::read(Path::new("nowhere/x.npz")).unwrap_err().to_string();
    assert_eq!(
        message,
        "nowhere/x.npz: no such file or folder; check the path (it is taken from the current folder)"
    );
    assert!(Npz::read(Path::new(".")).unwrap_err().to_string().contains("is a folder, not an .npz file"));
}
