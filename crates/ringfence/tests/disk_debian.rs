//! A Debian root made of packages, on NVMe with blocks of 512 and of 4096 bytes, booted without initrd: it works hard on
//! its root and on a second disk, and what it leaves is judged from outside.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use support::disk::{clean, contents, disk, machine, sparse, tool};
use support::image::{BOOT, Session, ensure, nonce, path, sha256};

const MIB: u64 = 1 << 20;

/// The guest reads this from a disk of its own.
const WORK: &str = r#"set -eu
nonce=$(sed 's/.*nonce=\([0-9]*\).*/\1/' /proc/cmdline)
forget() { sync; echo 3 > /proc/sys/vm/drop_caches; }
blocks() { cat /sys/block/$1/queue/logical_block_size; }
scratch=/dev/nvme1n1
echo "@blocks $(blocks nvme0n1) $(blocks nvme1n1)"
echo "@initrd $(dmesg | grep -c 'Freeing initrd memory' || true)"

# Sequential loads of 1 MiB, past the cache and through it.
head -c 16M /dev/urandom > /big
want=$(md5sum < /big)
dd if=/big of=$scratch bs=1M oflag=direct conv=fsync status=none
forget
[ "$(dd if=$scratch bs=1M count=16 iflag=direct status=none | md5sum)" = "$want" ]
[ "$(dd if=/big bs=1M status=none | md5sum)" = "$want" ]
rm /big
echo "@loads whole"

# Small files, each durable before the next.
mkdir /records
perl -MIO::Handle -e '
  for my $i (1 .. 120) {
    open my $file, ">", "/records/new" or die $!;
    print $file "record $i of $ARGV[0]\n";
    $file->flush or die $!;
    $file->sync or die $!;
    rename "/records/new", "/records/$i" or die $!;
  }' "$nonce"
forget
echo "@records $(cat $(seq -f /records/%.0f 120) | sha256sum | cut -d" " -f1)"

# A file system on the scratch disk with programs copied to it, judged by the guest's own tools.
mkfs.ext4 -q -F $scratch
mount $scratch /mnt
mkdir /mnt/bin
(cd /usr/bin && find . -type f | sort | head -n 40 | xargs cp -t /mnt/bin)
there=$(cd /mnt/bin && find . -type f | sort | head -n 40 | xargs md5sum)
umount /mnt
forget
mount -o discard $scratch /mnt
[ "$there" = "$(cd /mnt/bin && find . -type f | sort | head -n 40 | xargs md5sum)" ]
[ "$there" = "$(cd /usr/bin && find . -type f | sort | head -n 40 | xargs md5sum)" ]
rm -r /mnt/bin
fstrim /mnt
umount /mnt
fsck.ext4 -f -n $scratch > /dev/null 2>&1
echo "@copies whole"

blkdiscard -f $scratch
fstrim /
printf %s "$nonce" > /kept
echo "@complaints $(dmesg | grep -c -E 'I/O error|I/O Error|EXT4-fs error|Call Trace|timeout, ' || true)"
"#;

fn work(root_block: u32, scratch_block: u32) {
    let (Some(e2fsck), Some(debugfs)) = (tool("e2fsck"), tool("debugfs")) else { return };
    ensure("debian");
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.ext4");
    let copy =
        Command::new("cp").arg("--sparse=always").arg(path("debian", "disk")).arg(&root).status().unwrap();
    assert!(copy.success());
    let scratch = sparse(folder.path(), "scratch", 256 * MIB);
    // Whole blocks, filled up with what a shell ignores.
    let script = folder.path().join("script");
    let padding = "\n".repeat(WORK.len().next_multiple_of(4096) - WORK.len());
    std::fs::write(&script, WORK.to_owned() + &padding).unwrap();

    let nonce = nonce();
    let command = ["bash", "/dev/nvme2n1"].map(str::to_owned);
    let append = format!(
        "root=/dev/nvme0n1 rw console=ttyS0 nonce={nonce} {}",
        ringfence_images::command_word(&command).unwrap()
    );
    let mut machine = machine(&root, &format!(",block-size={root_block}"));
    machine.arg(disk(&scratch, &format!(",block-size={scratch_block}"))).arg(disk(&script, ",readonly"));
    machine.args(["--kernel", &path("debian", "kernel"), "--append", &append]);
    let session = Session::run(&mut machine, BOOT);
    assert_eq!(session.status, Some(0), "{}", session.text());

    let records: String = (1..=120).map(|i| format!("record {i} of {nonce}\n")).collect();
    for (name, value) in [
        ("blocks", format!("{root_block} {scratch_block}")),
        ("initrd", "0".to_owned()),
        ("loads", "whole".to_owned()),
        ("records", sha256(&records)),
        ("copies", "whole".to_owned()),
        ("complaints", "0".to_owned()),
    ] {
        assert_eq!(session.value(name).0, value, "{name}: {}", session.text());
    }
    assert_eq!(session.err, "", "nothing to tell the user");
    clean(&root, &e2fsck);
    assert_eq!(contents(&root, &debugfs, "/kept"), nonce.to_string());
    assert_eq!(contents(&root, &debugfs, "/records/120"), format!("record 120 of {nonce}\n"));
    let used = scratch.metadata().unwrap().blocks() * 512;
    assert!(used < MIB, "blkdiscard leaves {used} bytes");
}

#[test]
fn debian_works_on_blocks_of_512_bytes_and_leaves_a_clean_root() {
    work(512, 4096);
}

#[test]
fn debian_works_on_blocks_of_4096_bytes_and_leaves_a_clean_root() {
    work(4096, 512);
}
