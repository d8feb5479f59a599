use super::*;

/// Keeps what is printed.
#[derive(Clone, Debug, Default)]
struct Paper(Arc<Mutex<String>>);

impl Paper {
    fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }

    fn add(&self, text: &str) -> std::io::Result<()> {
        self.0.lock().unwrap().push_str(text);
        Ok(())
    }
}

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.add(std::str::from_utf8(bytes).unwrap())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A terminal 100 columns wide; `^` stands for a cleared line.
impl indicatif::TermLike for Paper {
    fn width(&self) -> u16 {
        100
    }
    fn move_cursor_up(&self, _: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn move_cursor_down(&self, _: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn write_line(&self, text: &str) -> std::io::Result<()> {
        self.add(text)?;
        self.add("\n")
    }
    fn write_str(&self, text: &str) -> std::io::Result<()> {
        self.add(text)
    }
    fn clear_line(&self) -> std::io::Result<()> {
        self.add("^")
    }
    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
}

fn status(step: u64) -> TrainStatus {
    TrainStatus {
        step,
        loss: 0.25,
        grad_norm: 0.5,
        images_per_second: 512.4,
        memory_bytes: 3 << 29,
        nonfinite_skipped: 0,
    }
}

#[test]
fn without_a_terminal_there_is_a_line_every_interval() {
    let (paper, start) = (Paper::default(), Instant::now());
    let mut progress = TrainProgress::on(Screen::lines(Box::new(paper.clone()), start), 1100, 1000, start);
    for step in 1001..=1100 {
        // Half a second a step: a line every 20 steps, and the first and the last.
        progress.update_at(&status(step), start + Duration::from_millis(500 * (step - 1000)));
    }
    progress.finish();
    let text = paper.text();
    let lines: Vec<&str> = text.lines().collect();
    let end = "  grad 0.5000  1.5 GiB";
    assert_eq!(lines[0], format!("step 1,001/1,100 (91%)  loss 0.2500  512 img/s  50s left{end}"));
    assert_eq!(lines[1], format!("step 1,021/1,100 (93%)  loss 0.2500  512 img/s  40s left{end}"));
    assert_eq!(lines[5], format!("step 1,100/1,100 (100%)  loss 0.2500  512 img/s  0.0s left{end}"));
    assert_eq!(lines.len(), 6);
}

#[test]
fn skipped_steps_are_shown_and_do_not_spoil_the_loss() {
    let (paper, start) = (Paper::default(), Instant::now());
    let mut progress = TrainProgress::on(Screen::lines(Box::new(paper.clone()), start), 2, 0, start);
    progress.update_at(&status(1), start);
    let skipped =
        TrainStatus { step: 2, loss: f32::NAN, grad_norm: f32::INFINITY, nonfinite_skipped: 1, ..status(2) };
    progress.update_at(&skipped, start + Duration::from_secs(1));
    let text = paper.text();
    let last = text.lines().last().unwrap();
    assert_eq!(last, "step 2/2 (100%)  loss 0.2500  512 img/s  0.0s left  grad inf  1.5 GiB  1 step skipped");
}

#[test]
fn the_shown_loss_is_a_mean() {
    let mut mean = RunningMean::default();
    assert!(mean.value().is_nan());
    mean.add(1.0);
    assert_eq!(mean.value(), 1.0);
    (0..1000).for_each(|index| mean.add(if index % 2 == 0 { 3.0 } else { 5.0 }));
    assert!((mean.value() - 4.0).abs() < 0.02);
}

#[test]
fn time_left_follows_the_recent_speed() {
    let start = Instant::now();
    let mut speed = Speed::new(start, 0);
    assert_eq!(speed.left(100), None);
    speed.update(start + Duration::from_secs(10), 10);
    assert_eq!(speed.left(100), Some(Duration::from_secs(90)));
    // Ten minutes at ten times that speed leave nothing of the slow start.
    (1..=600).for_each(|second| speed.update(start + Duration::from_secs(10 + second), 10 + 10 * second));
    let left = speed.left(7010).unwrap().as_secs_f64();
    assert!((left - 100.0).abs() < 0.5, "{left}");
}

#[test]
fn drawing_samples_is_shown_and_is_no_part_of_the_speed() {
    let (paper, start) = (Paper::default(), Instant::now());
    let mut progress = TrainProgress::on(Screen::lines(Box::new(paper.clone()), start), 100, 0, start);
    progress.drawings.every = 40;
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    (1..=40).for_each(|step| progress.update_at(&status(step), at(step)));
    let left = |text: &str| text.split("img/s  ").last().unwrap().split(" left").next().unwrap().to_owned();
    assert_eq!(left(&paper.text()), "1m 09s", "step 31; no drawing is known yet");
    progress.begin_drawing_at(at(40));
    progress.drawing_at(1, 4, at(45));
    progress.drawing_at(2, 4, at(55));
    assert_eq!(paper.text().lines().last(), Some("step 40/100 (40%)  drawing samples 2/4 (50%)"));
    progress.drawn_at(Path::new("samples/step-40.png"), at(70));
    assert_eq!(paper.text().lines().last(), Some("samples in samples/step-40.png   (drawn in 30s)"));
    (41..=80).for_each(|step| progress.update_at(&status(step), at(30 + step)));
    // 29 steps of a second, and the drawings of steps 80 and 100, of 30 s each.
    let text = paper.text();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("img/s")).collect();
    assert!(lines.last().unwrap().starts_with("step 71/"), "{text}");
    assert_eq!(left(lines.last().unwrap()), "1m 29s");
}

#[test]
fn drawings_left_are_those_that_will_be_made() {
    let drawings = Drawings { every: 40, begun: None, each: Duration::from_secs(1) };
    let left = |total| move |step| drawings.left(step, total).as_secs();
    assert_eq!([0, 39, 40, 79, 80, 99, 100].map(left(100)), [3, 3, 2, 2, 1, 1, 0]);
    assert_eq!([0, 39, 40, 79, 80].map(left(80)), [2, 2, 1, 1, 0]);
    assert_eq!(Drawings { every: 0, ..drawings }.left(3, 100), Duration::ZERO);
}

#[test]
fn a_bar_makes_room_for_other_output() {
    let (paper, start) = (Paper::default(), Instant::now());
    let target = ProgressDrawTarget::term_like_with_hz(Box::new(paper.clone()), 255);
    let mut progress = TrainProgress::on(Screen::bar(Some(1100), target), 1100, 1000, start);
    progress.update_at(&status(1001), start + Duration::from_secs(1));
    let shown = paper.text();
    assert!(
        shown.contains("1,001/1,100  loss 0.2500  512 img/s  1m 39s left  grad 0.5000  1.5 GiB"),
        "{shown}"
    );
    progress.screen().println("saved checkpoint 1001");
    let text = paper.text();
    let (before, after) = text.split_once("saved checkpoint 1001").unwrap();
    assert!(before[shown.len()..].starts_with('^'), "the bar is cleared first: {before:?}");
    assert!(after.contains("1,001/1,100"), "and drawn again: {after:?}");
    let length = paper.text().len();
    let seen = progress.screen().suspend(|| paper.text()[length..].to_owned());
    assert!(seen.contains('^') && !seen.contains("loss"), "cleared while other code prints: {seen:?}");
}

#[test]
fn any_task_counts_from_any_thread() {
    let (paper, start) = (Paper::default(), Instant::now());
    let progress = Progress::on(Screen::lines(Box::new(paper.clone()), start), "indexing", Some(4000), start);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..250).for_each(|_| progress.add_at(1, start + Duration::from_secs(5))));
        }
    });
    assert_eq!(paper.text(), "");
    progress.add_at(1000, start + Duration::from_secs(10));
    assert!(paper.text().starts_with("indexing 2,000/4,000 (50%)  "), "{}", paper.text());
    assert!(paper.text().ends_with(" left\n"));
    let unknown = Progress::on(Screen::lines(Box::new(paper.clone()), start), "reading", None, start);
    unknown.add_at(40, start + Duration::from_secs(20));
    assert_eq!(paper.text().lines().last(), Some("reading 40  2.00/s"));
}

#[test]
fn nothing_is_nothing_but_warnings_still_come() {
    let screen = Screen::new(Show::Nothing, None);
    screen.println("not seen");
    assert_eq!(screen.suspend(|| 7), 7);
    let progress = Progress::new(Show::Nothing, "sampling", Some(3));
    progress.add(3);
    progress.finish();
}
