//! Disks under load in a Debian kernel: admin commands in hot loops, I/O of every kind with all bytes checked, and resets
//! of the controllers in the midst of it.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::time::Duration;

use support::disk::{clean, disk, ext4, machine, sparse, tool};
use support::file;
use support::image::{BOOT, Session, ensure, nonce, program, sha256_of};

/// Seconds of load, half of them with resets; `RINGFENCE_LOAD` says otherwise.
const LOAD: u64 = 6;

/// Runs the load, takes the scratch disk away and brings it back, and says what is on it.
const SCRIPT: &str = r#"
number() { sed "s/.*$1=\([0-9]*\).*/\1/" /proc/cmdline; }
mount -t ext4 /dev/nvme0n1 /mnt || exit 9
/nvme $(number load) $(number nonce) || exit 8
sync; echo 3 > /proc/sys/vm/drop_caches
before=$(sha256sum < /dev/nvme1n1)
for i in 1 2 3; do
  device=$(readlink -f /sys/class/nvme/nvme1/device)
  echo 1 > $device/remove
  [ -e /dev/nvme1n1 ] && exit 7
  echo 1 > /sys/bus/pci/rescan
  for wait in $(seq 100); do [ -b /dev/nvme1n1 ] && break; usleep 50000; done
  after=$(sha256sum < /dev/nvme1n1)
  [ "$before" = "$after" ] || exit 6
  echo ${device##*/} > /sys/bus/pci/drivers/nvme/unbind
  echo ${device##*/} > /sys/bus/pci/drivers/nvme/bind
  for wait in $(seq 100); do [ -b /dev/nvme1n1 ] && break; usleep 50000; done
done
echo "@scratch ${before%% *}"
echo "@interrupts begin"; grep nvme /proc/interrupts; echo "@interrupts end"
dmesg | grep -E 'I/O error|timeout|Call Trace|WARNING|BUG|nvme.*(fail|remov|dead)' | grep -v 'Command line'
umount /mnt && exit 5
"#;

/// Loads two disks under a kernel with `options`, whose interrupts are named by `kind`.
fn load(options: &str, kind: &str) {
    let (Some(mke2fs), Some(e2fsck)) = (tool("mke2fs"), tool("e2fsck")) else { return };
    ensure("shell");
    let load = std::env::var("RINGFENCE_LOAD").ok().and_then(|text| text.parse().ok()).unwrap_or(LOAD);
    let folder = tempfile::tempdir().unwrap();
    let root = ext4(folder.path(), &mke2fs);
    let scratch = sparse(folder.path(), "scratch", 8 << 20);
    let mut archive = ringfence_images::cpio::Writer::new();
    let load_program = program("nvme", folder.path());
    archive.file("nvme", 0o755, &std::fs::read(load_program).unwrap()).unwrap();
    let extra = file(&archive.finish());

    let mut command = machine(&root, "");
    command.arg(disk(&scratch, ",block-size=4096,cache=none")).arg("--initrd").arg(extra.path());
    command.args(["--append", &format!("{options} load={load} nonce={}", nonce() % 1_000_000_000)]);
    // The last one counts.
    command.args(["--timeout", &(300 + load).to_string(), "--", "sh", "-c", SCRIPT]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(60 + load));
    assert_eq!(session.status, Some(5), "{}", session.text());

    let counts: Vec<u64> =
        session.value("nvme").0.split_whitespace().map(|word| word.parse().unwrap()).collect();
    println!("admin commands, raw I/O, files, resets, interrupted: {counts:?} in {load} s");
    assert!(counts[..4].iter().all(|count| *count >= 5), "{counts:?}");
    assert_eq!(session.value("scratch").0, sha256_of(&std::fs::read(&scratch).unwrap()));
    let interrupts = session.section("interrupts");
    // Messages: one for the admin queue and one for the I/O queue of each disk. Pins: one for each disk.
    let lines = if kind == "MSI" { 4 } else { 2 };
    assert!(interrupts.len() == lines && interrupts.iter().all(|line| line.contains(kind)), "{interrupts:?}");
    for complaint in ["I/O error", "timeout", "Call Trace", "WARNING", "BUG", "dead"] {
        assert!(!session.text().contains(complaint), "{complaint}: {}", session.text());
    }
    assert_eq!(session.err, "", "nothing to tell the user");
    clean(&root, &e2fsck);
}

#[test]
fn disks_keep_every_byte_under_admin_commands_and_resets() {
    load("", "MSI");
}

#[test]
#[ignore = "the same again, with interrupts that few guests use"]
fn disks_keep_every_byte_with_interrupts_by_pin() {
    load("pci=nomsi", "fasteoi");
}
