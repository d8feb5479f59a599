use super::*;

/// Three checkpoints; what is done to the newest is told by the warning, and the one before is used.
fn reason_for(damage: impl FnOnce(&Path)) -> String {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    (1..=3).for_each(|step| drop(save(&lock, step).unwrap()));
    let newest = run.join("checkpoints/step-00000003");
    damage(&newest);
    let found = open_newest_whole(&run).unwrap();
    let used = found.checkpoint.unwrap();
    assert_eq!((used.step(), used.read("weights", "a").unwrap()[0]), (2, 2.0));
    let [warning] = found.warnings.as_slice() else { panic!("one warning, not {:?}", found.warnings) };
    let front = format!("checkpoint {} is damaged: ", newest.display());
    let back = format!("; {} is used instead", used.path().display());
    warning.strip_prefix(&front).unwrap().strip_suffix(&back).unwrap().to_string()
}

const SHARD: &str = "weights-00002.safetensors";

#[test]
fn a_file_that_was_cut_off_is_named() {
    let cut = |folder: &Path| {
        let bytes = fs::read(folder.join(SHARD)).unwrap();
        assert_eq!(bytes.len(), 144);
        fs::write(folder.join(SHARD), &bytes[..100]).unwrap();
    };
    assert_eq!(reason_for(cut), format!("{SHARD} has 100 bytes, expected 144"));
}

#[test]
fn a_turned_bit_in_values_or_header_is_named() {
    for byte in [0, 20, 143] {
        assert_eq!(
            reason_for(|folder| flip(&folder.join(SHARD), byte)),
            format!("the content of {SHARD} has changed (its SHA-256 is another)")
        );
    }
}

#[test]
fn missing_files_are_all_named() {
    let remove = |folder: &Path| {
        fs::remove_file(folder.join(SHARD)).unwrap();
        fs::remove_file(folder.join("weights-00001.safetensors")).unwrap();
    };
    assert_eq!(reason_for(remove), format!("weights-00001.safetensors is missing; {SHARD} is missing"));
}

#[test]
fn a_wrong_hash_in_a_well_formed_manifest_is_named() {
    let forge = |folder: &Path| {
        let mut manifest = Checkpoint::open(folder).unwrap().manifest().clone();
        manifest.files[1].sha256 = "0".repeat(64);
        manifest.write(folder).unwrap();
    };
    assert_eq!(reason_for(forge), format!("the content of {SHARD} has changed (its SHA-256 is another)"));
}

#[test]
fn a_lost_manifest_is_named() {
    let remove = |folder: &Path| fs::remove_file(folder.join("manifest.json")).unwrap();
    assert_eq!(reason_for(remove), "it has no manifest.json");
}

#[test]
fn a_renamed_folder_is_named() {
    let swap = |folder: &Path| {
        fs::remove_dir_all(folder).unwrap();
        fs::create_dir(folder).unwrap();
        let other = folder.with_file_name("step-00000001");
        for name in names(&other) {
            fs::copy(other.join(&name), folder.join(&name)).unwrap();
        }
    };
    assert_eq!(reason_for(swap), "its manifest says step-00000001");
}

#[test]
fn no_byte_of_a_manifest_changes_unseen() {
    let (_folder, run) = run_folder();
    let checkpoint = save(&RunLock::acquire(&run).unwrap(), 3).unwrap();
    let whole = fs::read(checkpoint.path().join("manifest.json")).unwrap();
    let parse = |text: &[u8]| Manifest::parse(checkpoint.path(), text);
    let expected = format!(
        "checkpoint {} is damaged: its manifest.json was cut off or changed",
        checkpoint.path().display()
    );
    for byte in 0..whole.len() {
        for bit in 0..8 {
            let mut changed = whole.clone();
            changed[byte] ^= 1 << bit;
            assert_eq!(parse(&changed).unwrap_err().to_string(), expected, "byte {byte}, bit {bit}");
        }
        assert_eq!(parse(&whole[..byte]).unwrap_err().to_string(), expected, "{byte} bytes");
    }
    assert_eq!(parse(&whole).unwrap(), *checkpoint.manifest());
}

#[test]
fn if_all_are_damaged_each_is_named() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    let (first, second) = (save(&lock, 1).unwrap(), save(&lock, 2).unwrap());
    fs::remove_file(first.path().join(SHARD)).unwrap();
    flip(&second.path().join(SHARD), 140);
    assert_eq!(
        open_newest_whole(&run).unwrap_err().to_string(),
        format!(
            "no checkpoint of {run} is whole:\n  checkpoint {second} is damaged: the content of {SHARD} has changed \
             (its SHA-256 is another)\n  checkpoint {first} is damaged: {SHARD} is missing\nRestore one from a copy, \
             or remove {run}/checkpoints to start again",
            run = run.display(),
            first = first.path().display(),
            second = second.path().display()
        )
    );
}

#[test]
fn a_newer_format_stops_instead_of_going_back() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    save(&lock, 1).unwrap();
    let newest = save(&lock, 2).unwrap();
    let manifest = Manifest { format: 2, writer: "anneal 9.0.0".into(), ..newest.manifest().clone() };
    manifest.write(newest.path()).unwrap();
    assert_eq!(
        open_newest_whole(&run).unwrap_err().to_string(),
        format!(
            "checkpoint {} was written by a newer Anneal (anneal 9.0.0, format 2; this one reads up to 1): use that \
             version",
            newest.path().display()
        )
    );
}
