use super::*;

#[test]
fn each_start_takes_a_higher_epoch() {
    let (_folder, run) = run_folder();
    for epoch in 1..=3 {
        let lock = RunLock::acquire(&run).unwrap();
        assert_eq!((lock.epoch(), lock.run(), lock.warning()), (epoch, run.as_path(), None));
        assert_eq!(save(&lock, epoch).unwrap().manifest().epoch, epoch);
    }
}

#[test]
fn a_second_writer_is_refused_until_the_first_ends() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    let writer = lock.checkpoint(1).unwrap();
    drop(lock);
    // An unfinished save still holds the run.
    assert_eq!(
        RunLock::acquire(&run).unwrap_err().to_string(),
        format!(
            "another run is writing to {}: this same process; end the first run before the second",
            run.display()
        )
    );
    drop(writer);
    assert_eq!(RunLock::acquire(&run).unwrap().epoch(), 2);
}

/// What a start on another machine does where locks do not reach it.
fn take_over(run: &Path) {
    let path = run.join("writer.json");
    let mut writer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    writer["epoch"] = json!(writer["epoch"].as_u64().unwrap() + 1);
    writer["token"] = json!("another");
    writer["process"] = json!(4242);
    writer["host"] = json!("elsewhere");
    fs::write(&path, serde_json::to_vec(&writer).unwrap()).unwrap();
}

#[test]
fn an_older_process_is_refused_at_its_next_commit() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    save(&lock, 1).unwrap();
    let begun = lock.checkpoint(2).unwrap();
    take_over(&run);
    let front = format!(
        "{} was taken over by a newer run (process 4242 on elsewhere, started 0 s ago, epoch 2), so this older one may \
         not write there any more: end it",
        run.display()
    );
    let stale = |message: String| assert_eq!(message.replace("started 1 s", "started 0 s"), front);
    stale(begun.commit(Value::Null).unwrap_err().to_string());
    stale(save(&lock, 3).unwrap_err().to_string());
    stale(lock.prune(1).unwrap_err().to_string());
    assert_eq!(names(&run.join("checkpoints")), ["step-00000001"]);
}

#[test]
fn an_older_process_whose_folder_was_cleared_away_learns_why() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    let mut begun = lock.checkpoint(2).unwrap();
    take_over(&run);
    fs::remove_dir_all(run.join("checkpoints")).unwrap();
    let group = begun.group("weights", &[], |_, _| -> Result<(), CheckpointError> { Ok(()) });
    assert!(matches!(group, Err(CheckpointError::Stale { .. })));
    assert!(matches!(begun.commit(Value::Null), Err(CheckpointError::Stale { .. })));
}

#[test]
fn left_overs_of_killed_writers_go_at_the_next_start() {
    let (_folder, run) = run_folder();
    let lock = RunLock::acquire(&run).unwrap();
    save(&lock, 1).unwrap();
    let mut killed = lock.checkpoint(2).unwrap();
    let specs = [TensorSpec::new("a", StoredDType::F32, &[2])];
    killed
        .group("weights", &specs, |_, sink| -> Result<(), CheckpointError> { Ok(sink.f32(&[1.0, 2.0])?) })
        .unwrap();
    // A killed process drops nothing; its lock ends with it, which a test can only do by hand.
    std::mem::forget(killed);
    drop(lock);
    fs::remove_file(run.join(".writer.lock")).unwrap();
    let checkpoints = run.join("checkpoints");
    assert_eq!(names(&checkpoints).len(), 2, "the hidden folder lies there");
    assert_eq!(open_newest_whole(&run).unwrap().checkpoint.unwrap().step(), 1);

    let lock = RunLock::acquire(&run).unwrap();
    assert_eq!(names(&checkpoints), ["step-00000001"]);

    // Killed between the two renames of a replacement: the old one comes back.
    fs::rename(checkpoints.join("step-00000001"), checkpoints.join(".step-00000001.replaced")).unwrap();
    drop(lock);
    let lock = RunLock::acquire(&run).unwrap();
    assert_eq!(open_newest_whole(&run).unwrap().checkpoint.unwrap().step(), 1);

    // Killed after them: the new one stays, the old one goes. Other files are none of its business.
    fs::create_dir(checkpoints.join(".step-00000001.replaced")).unwrap();
    fs::write(checkpoints.join(".notes"), "mine").unwrap();
    fs::write(checkpoints.join("readme.txt"), "mine").unwrap();
    drop(lock);
    RunLock::acquire(&run).unwrap();
    assert_eq!(names(&checkpoints), [".notes", "readme.txt", "step-00000001"]);
}
