//! What becomes of guests that are stuck: the watchdog under Debian's own kernels, and a kernel that panics.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::process::Command;
use std::time::Duration;

use support::guest::Guest;
use support::image::{BOOT, ensure};
use support::pty::Pty;
use support::{finish, ringfence, wait};

const KERNELS: [&str; 2] = ["shell", "shell:6.12"];

fn run(image: &str, options: &[&str], script: &str) -> support::Finished {
    ensure(image);
    let mut command: Command = ringfence();
    command.args(["run", image, "--net", "none", "--timeout", "200"]).args(options);
    finish(command.args(["--", "sh", "-c", script]))
}

/// Starts the watchdog with 3 seconds and pets it by `pet`.
fn with_watchdog(pet: &str) -> String {
    format!(
        "watchdog -F -T 3 -t 1000 /dev/watchdog & sleep 1; echo started $(cat /sys/class/watchdog/watchdog0/identity); {pet}"
    )
}

#[test]
fn guest_that_neglects_its_watchdog_is_ended_with_the_reason() {
    for image in KERNELS {
        for action in ["reset", "poweroff"] {
            let run = run(image, &["--watchdog", action], &with_watchdog("sleep 100; echo alive"));
            run.expect(125, &["has neglected its watchdog"]);
            assert!(run.out.contains("started wdat_wdt") && !run.out.contains("alive"), "{run:#?}");
        }
    }
}

#[test]
fn guest_that_pets_its_watchdog_lives() {
    for image in KERNELS {
        let script = "watchdog -F -T 3 -t 1 /dev/watchdog & sleep 8; echo alive";
        let run = run(image, &["--watchdog", "poweroff"], script);
        run.expect(0, &[]);
        assert_eq!(run.out.trim(), "alive");
    }
}

#[test]
fn neglect_that_is_only_told_changes_nothing() {
    let run = run("shell", &["--watchdog", "none"], &with_watchdog("sleep 5; echo alive"));
    run.expect(0, &["neglected its watchdog, which has stopped"]);
    assert!(run.out.contains("alive"), "{run:#?}");
}

#[test]
fn neglect_in_counted_time_comes_at_the_same_instruction() {
    let count = || {
        let run = run(
            "shell",
            &["--watchdog", "poweroff", "--counted", "-v"],
            &with_watchdog("while :; do :; done"),
        );
        run.expect(125, &["neglected its watchdog"]);
        let line = run.err.lines().find(|line| line.contains("vCPU 0:")).unwrap().to_owned();
        line.split(" instructions").next().unwrap().to_owned()
    };
    assert_eq!(count(), count());
}

#[test]
fn neglected_machine_boots_again_and_knows_why() {
    ensure("shell");
    let mut pty = Pty::new();
    let mut child =
        pty.spawn(ringfence().args(["run", "--net", "none", "--watchdog", "reset", "--timeout", "200"]));
    pty.expect(":~# ", BOOT);
    pty.send("watchdog -F -T 3 -t 1000 /dev/watchdog\n");
    pty.expect("neglected its watchdog, which resets it", BOOT);
    pty.expect(":~# ", BOOT);
    pty.send("echo boot''status=$(cat /sys/class/watchdog/watchdog0/bootstatus); poweroff\n");
    // WDIOF_CARDRESET.
    pty.expect("bootstatus=32", BOOT);
    assert_eq!(wait(&mut child, BOOT).code(), Some(0), "{}", pty.text());
}

/// A guest without a kernel: sets the timer to half a second, starts it, and can never wake again.
#[test]
fn watchdog_bites_a_guest_that_has_halted_for_good() {
    let kernel = Guest::new().out16(0x660, 5).out16(0x664, 1).halt_for_good().kernel();
    for engine in ["jit", "interp"] {
        for extra in [&[][..], &["--counted"]] {
            let mut command = ringfence();
            command.args([
                "run",
                "--engine",
                engine,
                "--net",
                "none",
                "--watchdog",
                "poweroff",
                "--timeout",
                "30",
            ]);
            let run = finish(command.args(extra).arg("--kernel").arg(kernel.path()));
            run.expect(125, &["neglected its watchdog"]);
        }
    }
}

#[test]
fn machine_without_a_watchdog_has_none() {
    let run = run("shell", &[], "ls /dev/watchdog* 2>/dev/null; echo over");
    assert_eq!(run.out.trim(), "over");
}

#[test]
fn panic_of_the_kernel_is_told_with_its_status() {
    for image in KERNELS {
        for console in ["serial", "virtio"] {
            let run =
                run(image, &["--console", console], "echo c > /proc/sysrq-trigger; sleep 100; echo alive");
            run.expect(125, &["the guest's kernel panicked"]);
            assert!(run.out.contains("Kernel panic - not syncing: sysrq triggered crash"), "{run:#?}");
            assert!(!run.out.contains("alive"));
        }
    }
}

#[test]
fn panic_at_a_shell_is_told_too() {
    ensure("shell");
    let mut pty = Pty::new();
    let mut child = pty.spawn(ringfence().args(["run", "--timeout", "200"]));
    pty.expect(":~# ", BOOT);
    pty.send("echo c > /proc/sysrq-trigger\n");
    pty.expect("the guest's kernel panicked", Duration::from_secs(60));
    assert_eq!(wait(&mut child, BOOT).code(), Some(125), "{}", pty.text());
}
