//! Disks whose host fails under a Debian kernel: the guest gets errors, the user a message, and the machine lives on.
//!
//! What a host does not allow, a mount or a loop device, the tests say and skip.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::disk::{check_qcow2, clean, disk, ext4, machine, qemu_img, sparse, tool};
use support::finish;
use support::image::{BOOT, Session, ensure, nonce, sha256};
use support::wait;

const MIB: u64 = 1 << 20;

/// The command behind a program that runs it, such as `prlimit --fsize=1000`.
fn under(program: &str, arguments: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(program);
    wrapped.args(arguments).arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    wrapped
}

/// Lines of standard error that tell of a disk.
fn messages(err: &str) -> Vec<&str> {
    err.lines().filter(|line| line.contains("the guest sees an I/O error")).collect()
}

/// Fills a disk until it takes no more, looks at what it took, makes room by a discard, and goes on. The first disk has
/// a file system that must not notice.
const FULL: &str = r#"
nonce=$(sed 's/.*nonce=\([0-9]*\).*/\1/' /proc/cmdline)
mount -t ext4 /dev/nvme0n1 /mnt || exit 9
dd if=/dev/urandom of=/mnt/data bs=1M count=4 conv=fsync 2>/dev/null
sum=$(sha256sum < /mnt/data)
full=$3
dd if=/mnt/data of=$full bs=1M oflag=direct 2>/dev/null || exit 8
dd if=/dev/zero of=$full bs=1M seek=$1 oflag=direct 2>/tmp/error; echo "@full $? $(grep -c 'No space' /tmp/error)"
for i in 1 2 3; do
  dd if=/dev/zero of=$full bs=1M seek=$2 count=1 oflag=direct 2>/dev/null; echo "@again$i $?"
done
echo 3 > /proc/sys/vm/drop_caches
[ "$sum" = "$(dd if=$full bs=1M count=4 iflag=direct 2>/dev/null | sha256sum)" ] && echo "@kept yes"
blkdiscard -o $((8 << 20)) -l $((48 << 20)) $full; echo "@discard $?"
dd if=/mnt/data of=$full bs=1M seek=20 conv=fsync 2>/dev/null; echo "@room $?"
echo 3 > /proc/sys/vm/drop_caches
[ "$sum" = "$(dd if=$full bs=1M skip=20 count=4 2>/dev/null | sha256sum)" ] && echo "@whole yes"
[ "$sum" = "$(sha256sum < /mnt/data)" ] && umount /mnt && echo "@hash $(printf %s $nonce | sha256sum | cut -d' ' -f1)"
exit 5
"#;

/// How the disk that fills is attached, where the guest finds it, and whether it hears why a write failed.
struct Attached {
    options: &'static str,
    device: &'static str,
    reason: bool,
}

const RAW: Attached = Attached { options: "", device: "/dev/nvme1n1", reason: true };
const RAW_ON_VIRTIO: Attached = Attached { options: ",bus=virtio", device: "/dev/vda", reason: false };
const QCOW2: Attached = Attached { options: ",format=qcow2", ..RAW };
const QCOW2_ON_VIRTIO: Attached =
    Attached { options: ",format=qcow2,bus=virtio", device: "/dev/vda", reason: false };

/// Runs [`FULL`] on a disk that fills somewhere behind MiB `from`, and before MiB `last`; `wrap` makes it so.
fn fill(
    folder: &Path,
    full: &Path,
    attached: &Attached,
    [from, last]: [u64; 2],
    wrap: impl FnOnce(&Command) -> Command,
) {
    let (Some(mke2fs), Some(e2fsck)) = (tool("mke2fs"), tool("e2fsck")) else { return };
    ensure("shell");
    let good = ext4(folder, &mke2fs);
    let nonce = nonce();
    let mut command = machine(&good, "");
    command.arg(disk(full, attached.options)).args(["--append", &format!("nonce={nonce}")]);
    command.args(["--", "sh", "-c", FULL, "sh", &from.to_string(), &last.to_string(), attached.device]);
    let session = Session::run(&mut wrap(&command), BOOT);
    assert_eq!(session.status, Some(5), "{}", session.text());
    assert_eq!(session.value("hash").0, sha256(&nonce.to_string()));
    let heard = format!("1 {}", u8::from(attached.reason));
    assert_eq!(session.value("full").0, heard, "the guest hears that there is no space: {}", session.text());
    for (name, value) in [("again1", "1"), ("again3", "1"), ("kept", "yes"), ("discard", "0"), ("room", "0")]
    {
        assert_eq!(session.value(name).0, value, "{name}: {}", session.text());
    }
    assert_eq!(session.value("whole").0, "yes");
    let messages = messages(&session.err);
    assert_eq!(messages.len(), 1, "one message, however often it fails: {}", session.err);
    let expected = format!("ringfence: writing the disk image {} failed at byte ", full.display());
    assert!(messages[0].starts_with(&expected), "{}", messages[0]);
    clean(&good, &e2fsck);
}

#[test]
fn full_host_gives_the_guest_an_error_and_the_machine_lives_on() {
    fill_host(&RAW, "truncate -s 64M");
}

#[test]
fn full_host_gives_the_guest_of_a_virtio_disk_an_error_and_the_machine_lives_on() {
    fill_host(&RAW_ON_VIRTIO, "truncate -s 64M");
}

/// The command that makes a qcow2 image of 64 MiB.
fn create_qcow2() -> String {
    format!("{} image create --size 64M --format qcow2", support::ringfence().get_program().display())
}

#[test]
fn full_host_gives_the_guest_of_a_qcow2_disk_an_error_and_the_machine_lives_on() {
    fill_host(&QCOW2, &create_qcow2());
}

#[test]
fn full_host_gives_the_guest_of_a_qcow2_disk_on_virtio_an_error_and_the_machine_lives_on() {
    fill_host(&QCOW2_ON_VIRTIO, &create_qcow2());
}

/// Fills a disk of 64 MiB that `create` makes on a file system of 32 MiB.
fn fill_host(attached: &Attached, create: &str) {
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small");
    std::fs::create_dir(&small).unwrap();
    // A mount of our own, which goes with the process: as root, or as root of a user namespace.
    let kinds: [&[&str]; 2] = [&["--mount"], &["--user", "--map-root-user", "--mount"]];
    let mount = format!("mount -t tmpfs -o size=32m small {0} && {create} {0}/disk >&2", small.display());
    let allowed = |kind: &&&[&str]| {
        let output = Command::new("unshare").args(**kind).args(["sh", "-c", &mount]).output();
        output.is_ok_and(|output| output.status.success())
    };
    let Some(kind) = kinds.iter().find(allowed) else {
        println!("skipped: this host lets us mount nothing, not even in a namespace of our own");
        return;
    };
    let script = format!("{mount} && exec \"$@\"");
    fill(folder.path(), &small.join("disk"), attached, [4, 60], |command| {
        under("unshare", &[kind, ["sh", "-c", &script, "sh"].as_slice()].concat(), command)
    });
}

#[test]
fn limit_on_file_sizes_gives_the_guest_an_error_and_kills_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let full = sparse(folder.path(), "full", 192 * MIB);
    // The image with the file system ends before it.
    let limit = format!("--fsize={}", 160 * MIB);
    fill(folder.path(), &full, &RAW, [150, 180], |command| under("prlimit", &[&limit], command));
}

#[test]
fn limit_on_file_sizes_gives_the_guest_of_a_qcow2_disk_an_error_and_kills_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let full = folder.path().join("full");
    let mut create = support::ringfence();
    create.args(["image", "create", "--size", "256M", "--format", "qcow2"]).arg(&full);
    finish(&mut create).expect(0, &[]);
    // The image with the file system ends before it.
    let limit = format!("--fsize={}", 140 * MIB);
    fill(folder.path(), &full, &QCOW2, [4, 240], |command| under("prlimit", &[&limit], command));
    check_qcow2(&full, false);
}

#[test]
fn ephemeral_disk_past_the_limit_on_file_sizes_is_refused_with_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let image = sparse(folder.path(), "disk", 64 * MIB);
    let mut command = under("prlimit", &["--fsize=1000000"], &machine(&image, ",ephemeral"));
    let kernel = support::guest::Guest::new().power_off().kernel();
    command.arg("--kernel").arg(kernel.path()).env("TMPDIR", folder.path());
    finish(&mut command).expect(125, &[&folder.path().display().to_string(), "TMPDIR"]);
}

/// Reads a block until it cannot be read, then everything else.
const SHORTER: &str = r#"
far="bs=4096 skip=2048 count=1"
dd if=/dev/nvme0n1 $far iflag=direct of=/dev/null 2>/dev/null || exit 9
echo "ready"
for i in $(seq 3000); do
  dd if=/dev/nvme0n1 $far iflag=direct of=/dev/null 2>/tmp/error || break
  usleep 10000
done
# How Linux tells an unrecovered read error from others, where no cache lies between.
grep -q "No data available" /tmp/error && echo "@far unreadable"
dd if=/dev/nvme0n1 $far of=/dev/null 2>/tmp/error || echo "@cached $(grep -c 'Input/output error' /tmp/error)"
echo "@near $(dd if=/dev/nvme0n1 bs=4096 count=16 2>/dev/null | sha256sum | cut -d' ' -f1)"
# What is written makes the file long again.
yes | head -c 4096 | dd of=/dev/nvme0n1 bs=4096 seek=2048 oflag=direct conv=fsync 2>/dev/null || exit 8
dd if=/dev/nvme0n1 $far iflag=direct 2>/dev/null | head -c 4 | tr -d '\n'; echo " is back"
exit 5
"#;

#[test]
fn image_made_shorter_gives_read_errors_where_it_is_missing() {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk");
    let bytes: Vec<u8> = (0..16 * MIB).map(|i| (i / 77) as u8).collect();
    std::fs::write(&image, &bytes).unwrap();
    let mut child = machine(&image, "")
        .args(["--", "sh", "-c", SHORTER])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.by_ref().any(|line| line.trim_end() == "ready"), "the guest is not ready");
    OpenOptions::new().write(true).open(&image).unwrap().set_len(4 * MIB).unwrap();
    let rest: Vec<String> = lines.map(|line| line.trim_end().to_owned()).collect();
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(wait(&mut child, BOOT).code(), Some(5), "{rest:?} {err}");
    let near = support::image::sha256_of(&bytes[..16 * 4096]);
    for line in ["@far unreadable", "@cached 1", &format!("@near {near}"), "yy is back"] {
        assert!(rest.iter().any(|have| have == line), "no {line:?} in {rest:#?}");
    }
    let messages = messages(&err);
    assert_eq!(messages.len(), 1, "{err}");
    assert!(
        messages[0].contains("reading the disk image") && messages[0].contains("at byte 8388608"),
        "{err}"
    );
}

/// A loop device on an image, detached when dropped. `None`, and why, where there is none to be had.
struct Loop(PathBuf);

impl Loop {
    fn new(image: &Path) -> Option<Self> {
        let output = Command::new(tool("losetup")?).args(["--find", "--show"]).arg(image).output().unwrap();
        if !output.status.success() {
            println!("skipped, no loop device: {}", String::from_utf8_lossy(&output.stderr).trim());
            return None;
        }
        Some(Self(String::from_utf8_lossy(&output.stdout).trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// Fills and empties a file system on a block device of the host.
const DEVICE: &str = r#"
mount -t ext4 /dev/nvme0n1 /mnt || exit 9
[ $(cat /sys/block/nvme0n1/size) = 262144 ] || exit 8
dd if=/dev/urandom of=/mnt/data bs=1M count=24 conv=fsync 2>/dev/null
sum=$(sha256sum < /mnt/data)
echo 3 > /proc/sys/vm/drop_caches
[ "$sum" = "$(sha256sum < /mnt/data)" ] || exit 7
rm /mnt/data && sync && fstrim /mnt && umount /mnt && exit 5
"#;

#[test]
fn block_device_of_the_host_serves_as_a_disk() {
    use std::os::unix::fs::MetadataExt;
    let (Some(mke2fs), Some(e2fsck)) = (tool("mke2fs"), tool("e2fsck")) else { return };
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let image = ext4(folder.path(), &mke2fs);
    let Some(device) = Loop::new(&image) else { return };
    for cache in ["writeback", "none"] {
        let mut command = machine(&device.0, &format!(",cache={cache}"));
        finish(command.args(["--", "sh", "-c", DEVICE])).expect(5, &[]);
        clean(&device.0, &e2fsck);
        let used = image.metadata().unwrap().blocks() * 512;
        assert!(used < 20 * MIB, "{cache}: fstrim gives {used} bytes back");
    }
}

/// Writes more than the host can keep, which shows at a flush.
const LOST: &str = r#"
mount -t ext4 /dev/nvme0n1 /mnt || exit 9
bad=/dev/nvme1n1
dd if=/dev/zero of=$bad bs=1M count=40 oflag=direct conv=fsync 2>/tmp/error; echo "@flush $? $(grep -c 'No data available' /tmp/error)"
dd if=/dev/zero of=$bad bs=1M count=1 oflag=direct 2>/dev/null; echo "@write $?"
dd if=$bad of=/dev/null bs=1M count=1 iflag=direct 2>/dev/null; echo "@read $?"
echo "still here" > /mnt/file && sync && umount /mnt && exit 5
"#;

#[test]
fn flush_that_fails_ends_all_writing_and_nothing_else() {
    flush_fails("", "true");
}

#[test]
fn flush_that_fails_ends_all_writing_to_a_qcow2_disk_and_nothing_else() {
    if qemu_img().is_some() {
        flush_fails(",format=qcow2", "qemu-img create -q -f qcow2 $device 60M");
    }
}

/// Writes to a device that cannot keep it all; `prepare` makes its image.
fn flush_fails(options: &str, prepare: &str) {
    let (Some(mke2fs), Some(e2fsck)) = (tool("mke2fs"), tool("e2fsck")) else { return };
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let good = ext4(folder.path(), &mke2fs);
    // A loop device on a file system that is too small for it: what is written stays in memory until a flush.
    let device = folder.path().join("device");
    let prepare = format!(
        "mkdir {0}/small && mount -t tmpfs -o size=16m small {0}/small && truncate -s 64M {0}/small/disk && \
         device=$(losetup --find --show {0}/small/disk) && ln -s $device {0}/device && {prepare} || exit 77; \
         \"$@\"; status=$?; losetup --detach $device; exit $status",
        folder.path().display()
    );
    let mut command = machine(&good, "");
    command.arg(disk(&device, options)).args(["--", "sh", "-c", LOST]);
    let session =
        Session::run(&mut under("unshare", &["--mount", "sh", "-c", &prepare, "sh"], &command), BOOT);
    if !device.is_symlink() {
        println!("skipped, no mount or no loop device: {}", session.err.trim());
        return;
    }
    assert_eq!(session.status, Some(5), "{}", session.text());
    for (name, value) in [("flush", "1 1"), ("write", "1"), ("read", "0")] {
        assert_eq!(session.value(name).0, value, "{name}: {}", session.text());
    }
    let messages = messages(&session.err);
    assert_eq!(messages.len(), 1, "{}", session.err);
    assert!(messages[0].contains("flushing the disk image") && messages[0].contains("takes no more writes"));
    clean(&good, &e2fsck);
}
