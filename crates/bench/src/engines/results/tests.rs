use super::super::catalogue::{PROGRAMS, choose};
use super::*;

/// A side whose rounds ran `cc` and `sort` with these times, cold run first, and this result of `sort`.
fn side(name: &str, rounds: &[([f64; 3], &str)]) -> SideRounds {
    let round = |(times, result): &([f64; 3], &str)| {
        let mut round = Round::default();
        let [cold, first, second] = times;
        for line in [
            "@begin 1".to_owned(),
            "@program cc".to_owned(),
            format!("@time {cold} 0\n"),
            format!("@time {first} 0"),
            format!("@time {second} 0"),
            "@result same".to_owned(),
            "@program sort".to_owned(),
            format!("@time {cold} 0"),
            format!("@time {first} 0"),
            format!("@result {result}"),
            "@end 1".to_owned(),
        ] {
            round.transcript.line(&line, 0.5, None);
        }
        round
    };
    SideRounds {
        name: name.to_owned(),
        is_guest: name != "native",
        rounds: rounds.iter().map(round).collect(),
    }
}

fn chosen() -> Vec<&'static Program> {
    choose(&["cc".to_owned(), "sort".to_owned()]).expect("known")
}

fn row<'a>(rows: &'a [Row], name: &str) -> &'a Row {
    rows.iter().find(|row| row.name == name).expect("is there")
}

#[test]
fn means_follow_their_definitions() {
    assert_eq!(median(&[]), None);
    assert_eq!(median(&[3.0]), Some(3.0));
    assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
    assert!((geometric_mean(&[2.0, 8.0]).expect("a mean") - 4.0).abs() < 1e-12);
    assert_eq!((geometric_mean(&[]), geometric_mean(&[1.0, 0.0])), (None, None));
}

#[test]
fn figures_are_medians_over_rounds_and_cold_runs_stand_apart() {
    let native = side("native", &[([9.0, 1.0, 3.0], "r")]);
    let guest =
        side("ringfence", &[([8.0, 4.0, 6.0], "r"), ([10.0, 6.0, 8.0], "r"), ([30.0, 40.0, 50.0], "r")]);
    let rows = rows(&chosen(), &[native, guest], Measure::Wall, Take::Median);
    assert_eq!(row(&rows, "cc").figures, [Ok(2.0), Ok(7.0)]);
    assert_eq!(row(&rows, "cc-cold").figures, [Ok(2.0), Ok(10.0)]);
    assert_eq!(row(&rows, "cc-cold").ratio(1, 0), Some(5.0));
    assert_eq!(row(&rows, "sort").figures, [Ok(1.0), Ok(6.0)]);
    assert!(matches!(row(&rows, "boot").figures.as_slice(), [Err(_), Ok(0.5)]));
    assert_eq!(ratios(&rows, 1, 0), [(Class::Integer, 3.5), (Class::Integer, 5.0), (Class::Integer, 6.0)]);
}

#[test]
fn least_of_runs_and_rounds_can_be_taken_instead() {
    let native = side("native", &[([0.5, 1.0, 3.0], "r"), ([9.0, 4.0, 2.0], "r")]);
    let guest = side("ringfence", &[([8.0, 4.0, 6.0], "r"), ([10.0, 6.0, 3.5], "r")]);
    let rows = rows(&chosen(), &[native, guest], Measure::Wall, Take::Least);
    assert_eq!(row(&rows, "cc").figures, [Ok(1.0), Ok(3.5)]);
    assert_eq!(row(&rows, "cc-cold").figures, [Ok(1.0), Ok(8.0)]);
}

#[test]
fn other_result_than_the_native_one_is_no_figure() {
    let native = side("native", &[([1.0; 3], "right")]);
    let guest = side("qemu", &[([1.0; 3], "right"), ([1.0; 3], "wrong")]);
    let rows = rows(&chosen(), &[native, guest], Measure::Wall, Take::Median);
    assert_eq!(row(&rows, "sort").figures, [Ok(1.0), Err("computed another result".to_owned())]);
    assert_eq!(row(&rows, "sort").ratio(1, 0), None);
    assert_eq!(row(&rows, "cc").figures[1], Ok(1.0));
}

#[test]
fn failures_give_their_reason_and_no_figure() {
    let native = side("native", &[([1.0; 3], "r")]);
    let mut cut = side("qemu", &[]);
    let mut round = Round { failure: Some("ended too early".to_owned()), ..Round::default() };
    for line in
        ["@begin 1", "@program cc", "@time 1 0", "@time 1 1", "@result x", "@program sort", "@time 1 0"]
    {
        round.transcript.line(line, 0.0, None);
    }
    cut.rounds.push(round);
    let rows = rows(&chosen(), &[native, cut], Measure::Wall, Take::Median);
    assert_eq!(row(&rows, "cc").figures[1], Err("ended with status 1".to_owned()));
    assert_eq!(row(&rows, "sort").figures[1], Err("ended too early".to_owned()));
    let all: Vec<&Program> = PROGRAMS.iter().collect();
    let none = super::rows(&all, &[side("native", &[])], Measure::Wall, Take::Median);
    assert!(none.iter().all(|row| row.figures[0].is_err()));
}

#[test]
fn side_whose_clock_is_wrong_has_no_figures() {
    let mut guest = side("qemu", &[([1.0; 3], "r")]);
    guest.rounds[0].transcript.line("@end 50", 1.0, None);
    let rows = rows(&chosen(), &[side("native", &[([1.0; 3], "r")]), guest], Measure::Wall, Take::Median);
    assert!(row(&rows, "sort").figures[1].as_ref().is_err_and(|reason| reason.contains("clock")));
}
