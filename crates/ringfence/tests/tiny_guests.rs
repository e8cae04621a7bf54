//! The machine as the command runs it, with guests of a few instructions.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::guest::Guest;
use support::pty::{Pty, comparable};
use support::{finish, read_until, ringfence, signal, wait};

const SOON: Duration = Duration::from_secs(20);

fn run(kernel: &tempfile::NamedTempFile) -> Command {
    let mut command = ringfence();
    command.args(["run", "--memory", "16M", "--timeout", "60", "--kernel"]).arg(kernel.path());
    command
}

/// Starts a guest on pipes and waits until it says `ready`.
fn start(guest: Guest) -> Child {
    let kernel = guest.kernel();
    let mut child =
        run(&kernel).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    read_until(child.stdout.as_mut().unwrap(), "ready");
    child
}

fn ready() -> Guest {
    Guest::new().print("ready")
}

#[test]
fn power_off_ends_with_zero() {
    let run = finish(&mut run(&Guest::new().print("hello\n").power_off().kernel()));
    run.expect(0, &[]);
    assert_eq!(run.out, "hello\n");
    assert_eq!(run.err, "");
}

#[test]
fn debug_exit_gives_the_guests_status() {
    for value in [0, 1, 21] {
        let kernel = Guest::new().out8(0xf4, value).spin().kernel();
        finish(run(&kernel).args(["--debug-exit", "0xf4"])).expect(i32::from(value) << 1 | 1, &[]);
    }
}

#[test]
fn debug_exit_is_off_unless_asked_for() {
    let kernel = Guest::new().out8(0xf4, 3).print("still here").power_off().kernel();
    let run = finish(&mut run(&kernel));
    run.expect(0, &[]);
    assert_eq!(run.out, "still here");
}

#[test]
fn triple_fault_shows_registers_and_reason() {
    let marked = Guest::new().code(&[0xb9]).code(&0x1234_5678_u32.to_le_bytes());
    let run = finish(&mut run(&marked.crash().kernel()));
    run.expect(
        125,
        &["triple fault", "RCX=0000000012345678", "RIP=", "CR0=", "0f 0b", "what to try", "--append"],
    );
}

#[test]
fn halt_for_good_is_told_and_timeout_works() {
    let kernel = Guest::new().halt_for_good().kernel();
    let start = Instant::now();
    let run = finish(run(&kernel).args(["--timeout", "1.5"]));
    run.expect(124, &["halted with interrupts off", "--timeout"]);
    assert!(start.elapsed() >= Duration::from_millis(1500));
}

#[test]
fn timeout_ends_a_busy_guest() {
    finish(run(&Guest::new().spin().kernel()).args(["--timeout", "0.5"])).expect(124, &["0.5 s"]);
}

#[test]
fn reset_boots_again() {
    let guest = Guest::new().once(0x20_0000, Guest::new().reset()).print("again").power_off();
    let run = finish(&mut run(&guest.kernel()));
    run.expect(0, &["booting it again"]);
    assert_eq!(run.out, "again");
}

#[test]
fn reset_ends_with_no_reboot() {
    let kernel = Guest::new().print("once").reset().kernel();
    let run = finish(run(&kernel).arg("--no-reboot"));
    run.expect(0, &[]);
    assert_eq!(run.out, "once");
}

#[test]
fn signals_end_the_machine() {
    for (number, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut child = start(ready().spin());
        signal(&child, number);
        assert_eq!(wait(&mut child, SOON).code(), Some(status));
    }
}

#[test]
fn sigterm_presses_the_power_button_of_a_guest_that_listens() {
    let guest = Guest::new().listen_to_power_button().print("ready").wait_for_power_button();
    let mut child = start(guest.print("pressed").power_off());
    signal(&child, Signal::TERM);
    assert_eq!(wait(&mut child, SOON).code(), Some(0));
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(out.contains("pressed"), "{out}");
    assert!(err.contains("power button") && err.contains("--stop-timeout"), "{err}");
}

#[test]
fn guest_that_ignores_the_power_button_is_ended_in_time() {
    let kernel = Guest::new().listen_to_power_button().print("ready").spin().kernel();
    let mut child = run(&kernel)
        .args(["--stop-timeout", "1.5"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    read_until(child.stdout.as_mut().unwrap(), "ready");
    let begun = Instant::now();
    signal(&child, Signal::TERM);
    assert_eq!(wait(&mut child, SOON).code(), Some(143));
    assert!(begun.elapsed() >= Duration::from_millis(1400), "it had its time: {:?}", begun.elapsed());
}

#[test]
fn signal_ends_a_halted_guest() {
    let mut child = start(ready().halt_for_good());
    signal(&child, Signal::TERM);
    assert_eq!(wait(&mut child, SOON).code(), Some(143));
}

#[test]
fn closed_console_ends_the_machine() {
    let mut child = start(ready().print_forever(b'x'));
    drop(child.stdout.take());
    assert_eq!(wait(&mut child, SOON).code(), Some(141));
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(err.contains("nobody reads the console"), "{err}");
}

#[test]
fn stuck_reader_does_not_hold_the_timeout() {
    let kernel = Guest::new().print_forever(b'x').kernel();
    let mut child = run(&kernel).args(["--timeout", "2"]).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(wait(&mut child, SOON).code(), Some(124));
}

#[test]
fn input_reaches_the_guest_and_its_end_changes_nothing() {
    let mut child = start(ready().echo());
    child.stdin.take().unwrap().write_all(b"ping\x1d\x03.").unwrap();
    let echoed = read_until(child.stdout.as_mut().unwrap(), ".");
    assert_eq!(echoed, "ping\x1d\x03.");
    assert!(child.try_wait().unwrap().is_none());
    signal(&child, Signal::TERM);
    wait(&mut child, SOON);
}

#[test]
fn long_input_arrives_complete() {
    let mut child = start(ready().echo());
    let mut stdin = child.stdin.take().unwrap();
    let text: String = (0..4000).map(|i| format!("{i} ")).collect::<String>() + ".";
    let sent = text.clone();
    let writer = std::thread::spawn(move || stdin.write_all(sent.as_bytes()));
    assert_eq!(read_until(child.stdout.as_mut().unwrap(), "."), text);
    writer.join().unwrap().unwrap();
    signal(&child, Signal::TERM);
    wait(&mut child, SOON);
}

#[test]
fn console_goes_to_a_file_or_nowhere() {
    let kernel = Guest::new().print("to the log").power_off().kernel();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let to_file = finish(run(&kernel).arg("--console").arg(format!("file={}", log.display())));
    to_file.expect(0, &[]);
    assert_eq!((to_file.out.as_str(), std::fs::read_to_string(log).unwrap().as_str()), ("", "to the log"));
    let nowhere = finish(run(&kernel).args(["--console", "none"]));
    nowhere.expect(0, &[]);
    assert_eq!(nowhere.out, "");
}

#[test]
fn verbose_tells_engine_and_figures() {
    let kernel = Guest::new().print("x").power_off().kernel();
    let run = finish(run(&kernel).arg("-v"));
    run.expect(0, &["engine jit", "first output after", "instructions", "MIPS", "touched by the guest"]);
}

#[test]
fn translator_gives_the_same_answers() {
    let kernel = Guest::new().print("translated\n").out8(0xf4, 8).spin().kernel();
    let run = finish(run(&kernel).args(["-v", "--engine", "jit", "--debug-exit", "0xf4"]));
    run.expect(17, &["engine jit"]);
    assert_eq!(run.out, "translated\n");
}

#[test]
fn profile_shows_where_the_instructions_were() {
    // mov ecx,6000000; first: dec ecx; jnz first: 12 million instructions in 3 bytes; then
    // mov ecx,2000000; second: nop; nop; dec ecx; jnz second: 8 million.
    let first = [0xb9, 0x80, 0x8d, 0x5b, 0x00, 0x49, 0x75, 0xfd];
    let second = [0xb9, 0x80, 0x84, 0x1e, 0x00, 0x90, 0x90, 0x49, 0x75, 0xfb];
    let kernel = Guest::new().code(&first).code(&second).print("done").power_off().kernel();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("profile");
    let run = finish(run(&kernel).args(["--engine", "jit", "--profile"]).arg(&file));
    run.expect(0, &[]);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("one every 16381 instructions") && text.contains("kernel 100.00 %"), "{text}");
    let mut shares = [0.0; 2];
    let blocks = text.split("Blocks:").nth(1).and_then(|rest| rest.split("\n\n").next()).unwrap();
    for line in blocks.lines().skip(2) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let rip = u64::from_str_radix(words[3].trim_start_matches("0x"), 16).unwrap();
        match rip.checked_sub(0x10_0000 + 48) {
            Some(0..8) => shares[0] += words[0].parse::<f64>().unwrap(),
            Some(8..18) => shares[1] += words[0].parse::<f64>().unwrap(),
            _ => {}
        }
    }
    assert!((shares[0] - 60.0).abs() < 1.0 && (shares[1] - 40.0).abs() < 1.0, "{shares:?}: {text}");
}

#[test]
fn counted_runs_repeat_exactly() {
    let kernel = Guest::new().print("some work\n").power_off().kernel();
    let instructions = || {
        let run = finish(run(&kernel).args(["-v", "--counted"]));
        run.expect(0, &["clock Counted"]);
        let line = run.err.lines().find(|line| line.contains("vCPU 0:")).unwrap().to_owned();
        line.split(" instructions").next().unwrap().to_owned()
    };
    assert_eq!(instructions(), instructions());
}

/// Runs a guest that says that it is ready on a terminal, and checks that it is raw meanwhile and as before afterwards.
#[track_caller]
fn on_terminal(guest: Guest, status: i32, act: impl FnOnce(&mut Pty, &Child)) {
    on_terminal_that_shows("ready", guest, status, act);
}

/// Likewise, once the terminal shows a text.
#[track_caller]
fn on_terminal_that_shows(text: &str, guest: Guest, status: i32, act: impl FnOnce(&mut Pty, &Child)) {
    let kernel = guest.kernel();
    let mut pty = Pty::new();
    let before = comparable(&pty.modes());
    let mut child = pty.spawn(&mut run(&kernel));
    pty.expect("Ctrl-] leaves", SOON);
    pty.expect(text, SOON);
    assert!(pty.is_raw(), "{}", comparable(&pty.modes()));
    act(&mut pty, &child);
    assert_eq!(wait(&mut child, SOON).code(), Some(status), "{}", pty.text());
    assert_eq!(comparable(&pty.modes()), before);
}

#[test]
fn terminal_is_restored_after_ctrl_right_bracket() {
    on_terminal(ready().echo(), 0, |pty, _| pty.send("\x1d"));
}

#[test]
fn terminal_is_restored_after_signals() {
    on_terminal(ready().spin(), 143, |_, child| signal(child, Signal::TERM));
    on_terminal(ready().spin(), 130, |_, child| signal(child, Signal::INT));
    // What is said of it may come before all of the guest's own output is there.
    on_terminal_that_shows("nothing will wake it", ready().halt_for_good(), 129, |_, child| {
        signal(child, Signal::HUP);
    });
}

#[test]
fn terminal_is_restored_when_the_guest_ends() {
    // The guest waits for a key, so that raw mode can be seen first.
    on_terminal(ready().wait_for_input().power_off(), 0, |pty, _| pty.send("x"));
    on_terminal(ready().wait_for_input().crash(), 125, |pty, _| pty.send("x"));
}

#[test]
fn control_c_goes_to_the_guest() {
    on_terminal(ready().echo(), 0, |pty, _| {
        pty.send("a\x03b");
        pty.expect("a\x03b", SOON);
        pty.send("\x1d");
    });
}

#[test]
fn stopped_process_gives_the_terminal_back() {
    on_terminal(ready().echo(), 143, |pty, child| {
        signal(child, Signal::TSTP);
        let until = Instant::now() + SOON;
        while pty.is_raw() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!pty.is_raw());
        std::thread::sleep(Duration::from_millis(50));
        signal(child, Signal::CONT);
        while !pty.is_raw() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(pty.is_raw());
        pty.send("on");
        pty.expect("on", SOON);
        signal(child, Signal::TERM);
    });
}
