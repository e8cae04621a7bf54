//! The power button in the images: SIGTERM asks the guest's programs to end, then the machine goes off.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::image::{ensure, nonce};
use support::{read_until, ringfence, signal, wait};

/// Says when somebody waits for the button, and what it does when it is told to end.
const COMMAND: &str = r#"
trap 'echo "@told $(($1 + 1))"; exit 5' TERM
until grep -qs "^Name:.dd$" /proc/[0-9]*/status; do sleep 0.1; done
echo "@ready"
while :; do sleep 0.2; done
"#;

fn command_is_told_and_its_status_passed_on(image: &str) {
    ensure(image);
    let nonce = nonce() % 1_000_000;
    let mut command = ringfence();
    command.args(["run", image, "--timeout", "300", "--stop-timeout", "60", "--", "sh", "-c", COMMAND, "sh"]);
    let mut child =
        command.arg(nonce.to_string()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    read_until(child.stdout.as_mut().unwrap(), "@ready");
    let pressed = Instant::now();
    signal(&child, Signal::TERM);
    let status = wait(&mut child, Duration::from_secs(60));
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(status.code(), Some(5), "{out}\n{err}");
    assert!(out.contains(&format!("@told {}", nonce + 1)), "{out}\n{err}");
    println!("{image}: off {:.1?} after the button", pressed.elapsed());
}

#[test]
fn button_ends_the_command_of_the_image_in_memory() {
    command_is_told_and_its_status_passed_on("shell");
}

#[test]
fn button_ends_the_command_with_linux_6_12() {
    command_is_told_and_its_status_passed_on("shell:6.12");
}

#[test]
fn button_ends_the_command_of_the_image_on_disk() {
    command_is_told_and_its_status_passed_on("debian");
}
