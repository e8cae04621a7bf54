//! The VM generation ID: a guest finds it, and it is another for every machine, but where runs repeat exactly.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use support::image::ensure;
use support::{finish, ringfence};

fn run(image: &str, options: &[&str], script: &str) -> String {
    ensure(image);
    let mut command = ringfence();
    command
        .args(["run", image, "--net", "none", "--timeout", "200", "--append", "iomem=relaxed"])
        .args(options);
    let run = finish(command.args(["--", "sh", "-c", script]));
    run.expect(0, &[]);
    run.out
}

/// The page with the identifier in it, as one line of numbers.
const PAGE: &str = r#"
[ -e /sys/bus/platform/drivers/vmgenid/RNGF0001:00 ] || exit 9
start=$(sed -n 's/-.*ACPI Non-volatile Storage//p' /proc/iomem | head -n 1)
dd if=/dev/mem bs=4096 skip=$((0x$start / 4096)) count=1 2>/dev/null | od -An -v -tx1 | tr -d ' \n'
"#;

/// The identifier in the page: what is not zero behind the FACS, which has 64 bytes (ACPI 6.5, 5.2.10).
fn identifier(page: &str) -> String {
    let page = page.trim();
    assert_eq!((page.len(), &page[..8]), (8192, "46414353"), "the page with the FACS");
    let rest = &page[128..];
    let start = (0..rest.len()).step_by(32).find(|at| rest[*at..at + 32].bytes().any(|digit| digit != b'0'));
    rest[start.expect("there is one")..][..32].to_owned()
}

#[test]
fn driver_of_linux_6_12_is_bound_to_an_identifier_that_no_other_machine_has() {
    let [first, second] = [0, 1].map(|_| identifier(&run("shell:6.12", &[], PAGE)));
    assert_ne!(first, second);
    let counted = identifier(&run("shell:6.12", &["--counted"], PAGE));
    let text: String = b"ringfence counts".iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(counted, text);
}

/// Debian's cloud kernel 6.1 has no driver for it, and finds the device all the same.
#[test]
fn device_is_there_for_linux_6_1() {
    let out = run("shell", &[], "cat /sys/bus/acpi/devices/RNGF0001:00/modalias");
    assert!(out.contains("VM_GEN_COUNTER") || out.contains("VM_Gen_Counter"), "{out}");
}
