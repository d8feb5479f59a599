//! What must be visible is looked for at the place where the layout puts it.

use super::*;

/// A loss that falls from 1 to about 0.02, with noise that no generator needs.
fn falling(steps: u64) -> Vec<(u64, f64)> {
    (1..=steps)
        .map(|step| {
            let noise = ((step * 7919 % 104_729) as f64 / 104_729.0 - 0.5) * 0.5;
            (step, (0.02 + 1.0 / (1.0 + 0.03 * step as f64)) * (1.0 + noise))
        })
        .collect()
}

fn count(picture: &Picture, color: Color, rows: std::ops::Range<i32>) -> usize {
    rows.flat_map(|y| (0..WIDTH).map(move |x| (x, y)))
        .filter(|(x, y)| picture.pixel(*x as usize, *y as usize) == [color.0, color.1, color.2])
        .count()
}

#[test]
fn each_curve_is_in_its_panel() {
    let loss = falling(1150);
    let validation: Vec<_> = loss.iter().copied().filter(|(step, _)| step % 100 == 0).collect();
    let norm: Vec<_> = loss.iter().map(|(step, value)| (*step, value * 3.0)).collect();
    let curves =
        TrainingCurves { title: "digits", loss: &loss, validation: &validation, gradient_norm: &norm };
    let picture = curves.draw();
    assert_eq!((picture.width(), picture.height()), (1000, 672));
    let (loss_rows, norm_rows) = (TOP..TOP + LOSS_HEIGHT, TOP + LOSS_HEIGHT + BETWEEN..672 - BOTTOM);
    assert!(count(&picture, BLUE, loss_rows.clone()) > 800);
    assert!(count(&picture, ORANGE, loss_rows.clone()) > 200);
    assert!(count(&picture, GREEN, norm_rows.clone()) > 800);
    assert_eq!(count(&picture, GREEN, loss_rows), 0);
    assert_eq!(count(&picture, BLUE, norm_rows), 0);
    assert_eq!(TrainingCurves { gradient_norm: &[], ..curves }.draw().height(), 492);
}

#[test]
fn the_smoothed_curve_passes_where_the_values_are() {
    let loss: Vec<_> = (1..=801).map(|step| (step, if step == 1 { 3.0 } else { 1.0 })).collect();
    let picture = TrainingCurves { title: "", loss: &loss, ..Default::default() }.draw();
    let x = (LEFT + PLOT_WIDTH / 2) as usize;
    let dark: Vec<i32> = (TOP..TOP + LOSS_HEIGHT)
        .filter(|y| picture.pixel(x, *y as usize) == [BLUE.0, BLUE.1, BLUE.2])
        .collect();
    // From 1 to 3 with 6 % of the span to spare on both sides: 1 lies 0.12 above the bottom of 2.24.
    let expected = f64::from(TOP + LOSS_HEIGHT) - 0.12 / 2.24 * f64::from(LOSS_HEIGHT);
    let middle = f64::from(dark.iter().sum::<i32>()) / dark.len() as f64 + 0.5;
    assert!((1..=3).contains(&dark.len()) && (middle - expected).abs() < 0.6, "{dark:?}, {expected}");
}

#[test]
fn steps_that_were_not_finite_are_marked_below() {
    let mut loss = falling(101);
    loss[50].1 = f64::NAN;
    let picture = TrainingCurves { title: "", loss: &loss, ..Default::default() }.draw();
    let x = (LEFT + PLOT_WIDTH / 2) as usize;
    let mark = picture.pixel(x, (TOP + LOSS_HEIGHT - 5) as usize);
    assert_eq!(mark, [RED.0, RED.1, RED.2]);
}

#[test]
fn there_is_a_picture_of_anything() {
    let cases: [&[(u64, f64)]; 7] = [
        &[],
        &[(1, 0.5)],
        &[(1, f64::NAN)],
        &[(1, 0.0), (2, 0.0)],
        &[(1, -1.0), (2, 3e30)],
        &[(5, 1e-30), (6, 1e30)],
        &[(1, f64::INFINITY), (1_000_000_000_000, 1.0)],
    ];
    for loss in cases {
        let picture = TrainingCurves { title: "é熊", loss, gradient_norm: loss, ..Default::default() }.draw();
        assert_eq!(picture.width(), 1000);
    }
}

#[test]
fn a_spike_does_not_flatten_the_curve() {
    let mut loss = falling(2000);
    loss[1500].1 = 1e6;
    let with = TrainingCurves { title: "", loss: &loss, ..Default::default() };
    let mut panel = Panel::new("loss", LOSS_HEIGHT);
    panel.add("loss", with.loss, BLUE, Drawn::RawAndSmooth);
    let scale = panel.scale().unwrap();
    assert!(scale.position(1.0) > 0.3, "{scale:?}");
    assert!(count(&with.draw(), BLUE, 0..TOP - 26) == 0, "drawn over the heading");
}

#[test]
fn long_titles_end_in_dots() {
    let title = shortened(&"x".repeat(500));
    assert!(title.ends_with("x...") && Font::Title.width(&title) < WIDTH - LEFT);
    assert_eq!(shortened("digits"), "digits");
}
