//! Disks under Debian's own kernel: a root file system on NVMe, and machines killed in the middle of writing.
//!
//! The file system's own tools judge; where they are missing the tests say so and do nothing.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use support::disk::{
    check, check_qcow2, contents, disk, ext4, flatten, machine, overlay, qemu_img, sparse, tool,
};
use support::image::{BOOT, ensure, nonce, path, sha256};
use support::{finish, ringfence, wait};

/// Makes a root file system from the running image's own busybox.
const INSTALL: &str = r#"
mount -t ext4 /dev/nvme0n1 /mnt || exit 9
mkdir /mnt/bin /mnt/sbin /mnt/proc /mnt/dev /mnt/sys /mnt/tmp
cp /bin/busybox /mnt/bin/ && ln -s busybox /mnt/bin/sh
cat > /mnt/sbin/init <<'END'
#!/bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
nonce=$(/bin/busybox sed 's/.*nonce=\([0-9]*\).*/\1/' /proc/cmdline)
/bin/busybox dd if=/dev/urandom of=/tmp/big bs=1M count=24 conv=fsync 2>/dev/null
sum=$(/bin/busybox sha256sum /tmp/big)
echo 3 > /proc/sys/vm/drop_caches
again=$(/bin/busybox sha256sum /tmp/big)
[ "$sum" = "$again" ] && echo "big-ok"
/bin/busybox rm /tmp/big
/bin/busybox fstrim / && echo "trim-ok"
echo "@root $(/bin/busybox printf %s "$nonce" | /bin/busybox sha256sum | /bin/busybox cut -d' ' -f1)"
/bin/busybox printf %s "$nonce" > /kept
/bin/busybox sync
/bin/busybox poweroff -f
END
chmod +x /mnt/sbin/init && umount /mnt && exit 5
"#;

#[test]
fn root_on_nvme_boots_without_initrd_and_stays_clean() {
    let (Some(mke2fs), Some(e2fsck), Some(debugfs)) = (tool("mke2fs"), tool("e2fsck"), tool("debugfs"))
    else {
        return;
    };
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let image = ext4(folder.path(), &mke2fs);
    let installed = finish(machine(&image, ",bus=nvme").args(["--", "sh", "-c", INSTALL]));
    installed.expect(5, &[]);
    check(&image, &e2fsck);

    let nonce = nonce();
    let booted = finish(
        machine(&image, ",bus=nvme")
            .args(["--kernel", &path("shell", "kernel"), "--append"])
            .arg(format!("root=/dev/nvme0n1 rw console=ttyS0 nonce={nonce}")),
    );
    booted.expect(0, &[]);
    for line in ["big-ok", "trim-ok", &format!("@root {}", sha256(&nonce.to_string()))] {
        assert!(booted.out.contains(line), "no {line:?} in {}", booted.out);
    }
    check(&image, &e2fsck);
    assert_eq!(contents(&image, &debugfs, "/kept"), nonce.to_string());
}

/// Works a virtio disk over: a file system with checksums, discards, a read-only disk, the serial number. The second disk
/// has a random number in its first block.
const VIRTIO: &str = r#"
[ "$(cat /sys/block/vda/serial)" = disk0 ] && [ "$(cat /sys/block/vdb/ro)" = 1 ] || exit 8
# Else the kernel sends no flushes.
[ "$(cat /sys/block/vda/queue/write_cache)" = "write back" ] || exit 7
mount -t ext4 -o discard /dev/vda /mnt || exit 9
dd if=/dev/urandom of=/mnt/big bs=1M count=24 conv=fsync 2>/dev/null
sum=$(sha256sum /mnt/big)
echo 3 > /proc/sys/vm/drop_caches
[ "$sum" = "$(sha256sum /mnt/big)" ] && echo "big-ok"
rm /mnt/big
# Blocks are free when the journal says so.
sync
fstrim /mnt && echo "trim-ok"
nonce=$(dd if=/dev/vdb bs=512 count=1 2>/dev/null | tr -d '\0')
dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null || echo "read-only-ok"
echo "@data $(printf %s "$nonce" | sha256sum | cut -d' ' -f1)"
printf %s "$nonce" > /mnt/kept
umount /mnt && exit 6
"#;

#[test]
fn virtio_disk_keeps_data_and_takes_discards_on_both_kernels() {
    let (Some(mke2fs), Some(e2fsck), Some(debugfs)) = (tool("mke2fs"), tool("e2fsck"), tool("debugfs"))
    else {
        return;
    };
    for kernel in KERNELS {
        ensure(kernel);
        let folder = tempfile::tempdir().unwrap();
        let image = ext4(folder.path(), &mke2fs);
        let nonce = nonce().to_string();
        let second = sparse(folder.path(), "second", 1 << 20);
        std::fs::OpenOptions::new().write(true).open(&second).unwrap().write_all(nonce.as_bytes()).unwrap();
        let done = finish(
            ringfence()
                .args(["run", kernel, "--engine", "jit", "--timeout", "300"])
                .args([disk(&image, ",bus=virtio"), disk(&second, ",bus=virtio,readonly")])
                .args(["--", "sh", "-c", VIRTIO]),
        );
        done.expect(6, &[]);
        let sum = format!("@data {}", sha256(&nonce));
        for line in ["big-ok", "trim-ok", "read-only-ok", &sum] {
            assert!(done.out.contains(line), "{kernel}: no {line:?} in {}", done.out);
        }
        check(&image, &e2fsck);
        assert_eq!(contents(&image, &debugfs, "/kept"), nonce);
        let taken = std::fs::metadata(&image).unwrap().blocks() * 512;
        assert!(taken < 20 << 20, "{kernel}: what was discarded still takes room on the host: {taken} bytes");
    }
}

#[test]
fn image_in_use_is_refused_to_a_second_machine() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    ensure("shell");
    let mut first = machine(&image, ",bus=nvme")
        .stdout(Stdio::piped())
        .args(["--", "sh", "-c", "echo up; sleep 300"])
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(first.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("up")));
    let second = finish(machine(&image, ",bus=nvme").args(["--", "true"]));
    assert_ne!(second.status, Some(0));
    assert!(second.err.contains(&image.display().to_string()), "{}", second.err);
    first.kill().unwrap();
    wait(&mut first, Duration::from_secs(20));
}

/// Writes records for ever, each followed by a line once the disk has it.
const WRITE: &str = r#"
mount -t ext4 /dev/nvme0n1 /mnt 2>/dev/null || mount -t ext4 /dev/vda /mnt || exit 9
tag=$(sed 's/.*tag=\([0-9]*\).*/\1/' /proc/cmdline)
mkdir /mnt/$tag; i=0
while :; do
  echo "record $i of $tag" | dd of=/mnt/$tag/$i conv=fsync 2>/dev/null && echo "kept $i"
  i=$((i + 1))
done
"#;

const KERNELS: [&str; 2] = ["shell", "shell:6.12"];

/// Machines to kill for each kind of disk; `RINGFENCE_KILLS` says otherwise.
const KILLS: u64 = 30;
const VIRTIO_KILLS: u64 = 10;
const QCOW2_KILLS: u64 = 6;

#[test]
fn nothing_acknowledged_is_lost_when_machines_are_killed() {
    kill_machines(",bus=nvme", KILLS);
}

#[test]
fn nothing_acknowledged_on_virtio_is_lost_when_machines_are_killed() {
    kill_machines(",bus=virtio", VIRTIO_KILLS);
}

#[test]
fn nothing_acknowledged_on_qcow2_is_lost_when_machines_are_killed() {
    kill_machines_on_qcow2(",bus=nvme");
}

#[test]
fn nothing_acknowledged_on_qcow2_on_virtio_is_lost_when_machines_are_killed() {
    kill_machines_on_qcow2(",bus=virtio");
}

fn kill_machines_on_qcow2(bus: &str) {
    let Some(mke2fs) = tool("mke2fs").filter(|_| qemu_img().is_some()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let (image, options) = overlay(&ext4(folder.path(), &mke2fs));
    kill_all(&image, &(options + bus), QCOW2_KILLS, |image| {
        // Not more than clusters that nothing leads to; and the disk is what a machine that starts now would find.
        check_qcow2(image, true);
        flatten(image)
    });
}

fn kill_machines(bus: &str, kills: u64) {
    let Some(mke2fs) = tool("mke2fs") else { return };
    let folder = tempfile::tempdir().unwrap();
    kill_all(&ext4(folder.path(), &mke2fs), bus, kills, Path::to_owned);
}

/// Kills machines of the two kernels in turn with the image as their disk; `judge` gives the disk's bytes after each.
fn kill_all(image: &Path, options: &str, kills: u64, judge: impl Fn(&Path) -> PathBuf) {
    let (Some(e2fsck), Some(debugfs)) = (tool("e2fsck"), tool("debugfs")) else { return };
    KERNELS.iter().for_each(|kernel| ensure(kernel));
    let kills = std::env::var("RINGFENCE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(kills);
    let mut records = 0;
    for round in 0..kills {
        let tag = nonce();
        let mut child = machine(image, options)
            .arg(KERNELS[round as usize % 2])
            .args(["--append", &format!("tag={tag}"), "--", "sh", "-c", WRITE])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let wanted = tag % 23 + round % 5;
        let last = format!("kept {wanted}");
        let seen = lines.by_ref().take(10_000).any(|line| line.trim_end() == last);
        // Somewhere in the midst of what follows the last record that was told of.
        std::thread::sleep(Duration::from_micros(tag % 3000));
        child.kill().unwrap();
        wait(&mut child, BOOT);
        assert!(seen, "round {round}: the guest ended before {last:?}");
        let more = lines.filter(|line| line.starts_with("kept ")).count() as u64;
        let disk = judge(image);
        check(&disk, &e2fsck);
        for i in 0..=wanted + more {
            let kept = contents(&disk, &debugfs, &format!("/{tag}/{i}"));
            assert_eq!(kept.trim_end(), format!("record {i} of {tag}"), "round {round}");
            records += 1;
        }
    }
    println!("{kills} machines killed, {records} acknowledged records all there");
}
