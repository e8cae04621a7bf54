//! qcow2 disks under Debian's kernels: load on overlays that QEMU judges, damaged images, limits.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::path::Path;
use std::process::Command;

use support::disk::{check_qcow2, clean, disk, ext4, flatten, machine, overlay, qemu_img, sparse, tool};
use support::image::{BOOT, Session, ensure, nonce, sha256};
use support::{finish, ringfence};

/// Four writers and one who gives room back, then everything is looked at.
const LOAD: &str = r#"
mount -t ext4 $1 /mnt || exit 9
writer() {
  mkdir /mnt/$1
  for i in 1 2 3 4 5 6; do
    dd if=/dev/urandom of=/tmp/$1 bs=64k count=$((5 * i)) 2>/dev/null
    cp /tmp/$1 /mnt/$1/$i && sha256sum /mnt/$1/$i >> /tmp/sums.$1
    [ $((i % 2)) = 0 ] && sync
  done
}
for i in 1 2 3 4; do writer $i & pids="$pids $!"; done
for i in 1 2 3; do
  dd if=/dev/zero of=/mnt/room bs=1M count=8 conv=fsync 2>/dev/null; rm /mnt/room; sync; fstrim /mnt || exit 8
done
wait $pids
sync; echo 3 > /proc/sys/vm/drop_caches
for i in 1 2 3 4; do sha256sum -c /tmp/sums.$i > /dev/null 2>&1 || exit 7; done
echo "@sums $(cat /tmp/sums.* | wc -l)"
nonce=$(sed 's/.*nonce=\([0-9]*\).*/\1/' /proc/cmdline)
echo "@hash $(printf %s $nonce | sha256sum | cut -d' ' -f1)"
umount /mnt && exit 5
"#;

fn load(kernel: &str, options: &str, device: &str) {
    let (Some(mke2fs), Some(e2fsck)) = (tool("mke2fs"), tool("e2fsck")) else { return };
    ensure(kernel);
    let folder = tempfile::tempdir().unwrap();
    let base = ext4(folder.path(), &mke2fs);
    let before = std::fs::read(&base).unwrap();
    let (image, backing) = overlay(&base);
    let nonce = nonce();
    let mut command = ringfence();
    command.args(["run", kernel, "--engine", "jit", "--timeout", "300"]);
    command.arg(disk(&image, &format!("{backing}{options}")));
    command.args(["--append", &format!("nonce={nonce}"), "--", "sh", "-c", LOAD, "sh", device]);
    let session = Session::run(&mut command, BOOT);
    assert_eq!(session.status, Some(5), "{options}: {}", session.text());
    assert_eq!(session.value("sums").0, "24", "{}", session.text());
    assert_eq!(session.value("hash").0, sha256(&nonce.to_string()));
    assert_eq!(session.err, "", "nothing to tell the user");
    assert!(std::fs::read(&base).unwrap() == before, "what it stands on is as it was");
    check_qcow2(&image, false);
    if qemu_img().is_some() {
        clean(&flatten(&image), &e2fsck);
    }
}

#[test]
fn overlay_under_load_keeps_every_byte_on_nvme() {
    load("shell", ",cache=none", "/dev/nvme0n1");
}

#[test]
fn overlay_under_load_keeps_every_byte_on_virtio_on_both_kernels() {
    load("shell", ",bus=virtio", "/dev/vda");
    load("shell:6.12", ",bus=virtio", "/dev/vda");
}

/// An image of our own making, with `change` done to its bytes.
fn changed(folder: &Path, change: impl FnOnce(&mut Vec<u8>)) -> std::path::PathBuf {
    let image = folder.join("changed");
    let mut create = ringfence();
    create.args(["image", "create"]).arg(&image).args(["--size", "64M", "--format", "qcow2"]);
    finish(&mut create).expect(0, &[]);
    let mut bytes = std::fs::read(&image).unwrap();
    change(&mut bytes);
    std::fs::write(&image, bytes).unwrap();
    image
}

#[test]
fn image_that_cannot_be_used_is_refused_with_what_to_do() {
    let refused = |image: &Path, options: &str, words: &[&str]| {
        let kernel = support::guest::Guest::new().power_off().kernel();
        let mut command = machine(image, options);
        finish(command.arg("--kernel").arg(kernel.path())).expect(125, words);
    };
    let folder = tempfile::tempdir().unwrap();
    let image = changed(folder.path(), |bytes| bytes.truncate(100));
    refused(&image, ",format=qcow2", &["changed as a qcow2 disk image", "cut off"]);
    std::fs::remove_file(&image).unwrap();
    let image = changed(folder.path(), |bytes| bytes[79] = 1);
    refused(&image, ",format=qcow2", &["qemu-img check -r all"]);
    let raw = sparse(folder.path(), "raw", 1 << 20);
    refused(&raw, ",format=qcow2", &["not a qcow2 image; leave format=qcow2 out"]);
    let (above, _) = overlay(&raw);
    let hint = format!("add ,backing={}", folder.path().display());
    refused(&above, ",format=qcow2", &["raw", &hint]);
    refused(&above, ",format=qcow2,backing=/proc", &["it is not in /proc"]);
}

/// Reads what cannot be read, then what can.
const DAMAGED: &str = r#"
dd if=/dev/nvme0n1 of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null; echo "@bad $?"
dd if=/dev/nvme0n1 of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null; echo "@again $?"
dd if=/dev/zero of=/dev/nvme0n1 bs=4096 count=1 oflag=direct conv=notrunc 2>/dev/null; echo "@write $?"
exit 5
"#;

#[test]
fn damage_inside_an_image_is_an_io_error_and_one_message() {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    // The first L2 table is behind the end of the file.
    let image = changed(folder.path(), |bytes| {
        let at = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
        bytes[at..at + 8].copy_from_slice(&(1_u64 << 63 | 1 << 40).to_be_bytes());
    });
    let mut command = machine(&image, ",format=qcow2");
    let session = Session::run(command.args(["--", "sh", "-c", DAMAGED]), BOOT);
    assert_eq!(session.status, Some(5), "{}", session.text());
    for name in ["bad", "again", "write"] {
        assert_eq!(session.value(name).0, "1", "{name}: {}", session.text());
    }
    let reads: Vec<&str> =
        session.err.lines().filter(|line| line.contains("reading the disk image")).collect();
    assert!(reads.len() == 1 && reads[0].contains("qemu-img check"), "{}", session.err);
}

/// Sixty reads of a block each, and how long they take in hundredths of a second.
const LIMITED: &str = r#"
sleep 1.5
now() { cut -d' ' -f1 /proc/uptime | tr -d .; }
for disk in $1 $2; do
  start=$(now)
  dd if=$disk of=/dev/null bs=4096 count=60 iflag=direct 2>/dev/null || exit 9
  echo "@time.${disk##*/} $(($(now) - start))"
done
exit 5
"#;

#[test]
fn limits_hold_on_both_buses() {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let image = sparse(folder.path(), "disk", 64 << 20);
    let other = sparse(folder.path(), "other", 64 << 20);
    let mut command = machine(&image, ",iops=30");
    // Twenty-five blocks of 4 KiB in a second.
    command.arg(disk(&other, ",bus=virtio,bps=102400"));
    command.args(["--", "sh", "-c", LIMITED, "sh", "/dev/nvme0n1", "/dev/vda"]);
    let session = Session::run(&mut command, BOOT);
    assert_eq!(session.status, Some(5), "{}", session.text());
    // Where runs repeat exactly there are none.
    let counted = finish(machine(&image, ",iops=30").args(["--counted", "--", "true"]));
    counted.expect(2, &["which a disk with bps= or iops= does not"]);
    // A second's worth passes at once.
    for (name, least, most) in [("time.nvme0n1", 90, 600), ("time.vda", 130, 800)] {
        let time: u64 = session.value(name).0.parse().unwrap();
        assert!((least..most).contains(&time), "{name}: {time}");
    }
}

#[test]
fn new_images_are_made_and_used_as_the_command_says() {
    let folder = tempfile::tempdir().unwrap();
    let create = |words: &[&str]| {
        let mut command = Command::new(ringfence().get_program());
        finish(command.current_dir(folder.path()).args(["image", "create"]).args(words))
    };
    create(&["disk", "--size", "16M"]).expect(0, &[]);
    assert_eq!(std::fs::metadata(folder.path().join("disk")).unwrap().len(), 16 << 20);
    let made = create(&["over.qcow2", "--backing", "disk", "--backing-format", "raw"]);
    made.expect(0, &[]);
    assert!(
        made.out.contains("a disk of 16M") && made.out.contains("--disk over.qcow2,format=qcow2,backing=.")
    );
    create(&["disk", "--size", "32M"]).expect(125, &["disk is there already"]);
    create(&["other"]).expect(2, &["--size"]);
    create(&["other", "--size", "1M", "--format", "vmdk"]).expect(2, &["raw or qcow2"]);
    create(&["other", "--backing", "disk"]).expect(2, &["--backing-format"]);
    create(&["other", "--backing", "gone", "--backing-format", "raw"])
        .expect(125, &["gone as a backing file"]);
    assert!(!folder.path().join("other").exists());
    if let Some(mut qemu_img) = qemu_img() {
        let output = qemu_img.args(["info", "--output=json"]).arg(folder.path().join("over.qcow2")).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        assert!(
            text.contains("\"virtual-size\": 16777216")
                && text.contains("\"backing-filename-format\": \"raw\"")
        );
    }
}
