//! Debian on a disk: the image `debian`, booted from NVMe by its kernel alone.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::image::{ensure, nonce, path, sha256};
use support::pty::Pty;
use support::{finish, ringfence};

fn run(command: &[&str]) -> support::Finished {
    let engine = ["run", "debian", "--engine", "jit", "--timeout", "240", "--"];
    finish(ringfence().args(engine).args(command))
}

/// What shows that it is a whole Debian: results that only the right programs give, and the owners of files.
const LOOK: &str = r#"
echo "@sum $(printf %s "$1" | sha256sum | cut -d' ' -f1)"
echo "@awk $(awk "BEGIN { printf \"%.0f\", $1 * 2 }")"
echo "@perl $(perl -e "print $1 + 1")"
bash --version | head -n 1
echo "@owners $(stat -c %U:%G:%a /etc/passwd /usr/bin/passwd /usr/bin/chage /tmp | xargs)"
mount | grep ' on / '
echo "@address $(ip -4 -o addr show scope global | grep -o 'inet [0-9./]*')"
grep nameserver /etc/resolv.conf
echo "@rest $#:$2"
touch /written && exit 7
"#;

#[test]
fn debian_computes_and_its_image_stays_as_it_was() {
    ensure("debian");
    let disk = path("debian", "disk");
    let before = std::fs::metadata(&disk).unwrap().modified().unwrap();
    let nonce = nonce();
    let number = nonce.to_string();
    let ended = run(&["bash", "-c", LOOK, "look", &number, "it's \"$HOME\" `id` \\n é"]);
    ended.expect(7, &[]);
    for wanted in [
        format!("@sum {}", sha256(&number)),
        format!("@awk {}", nonce * 2),
        format!("@perl {}", nonce + 1),
        "GNU bash, version ".to_owned(),
        "@owners root:root:644 root:root:4755 root:shadow:2755 root:root:1777".to_owned(),
        "/dev/nvme0n1 on / type ext4 (rw".to_owned(),
        "@address inet 10.0.2.15/24".to_owned(),
        "nameserver 10.0.2.3".to_owned(),
        "@rest 2:it's \"$HOME\" `id` \\n é".to_owned(),
    ] {
        assert!(ended.out.contains(&wanted), "no {wanted:?} in {}", ended.out);
    }
    // What was written is gone, and the image is as it was made.
    run(&["test", "!", "-e", "/written"]).expect(0, &[]);
    assert_eq!(std::fs::metadata(&disk).unwrap().modified().unwrap(), before);
    if let Some(e2fsck) =
        ["/usr/sbin/e2fsck", "/sbin/e2fsck"].into_iter().find(|tool| Path::new(tool).exists())
    {
        let checked = Command::new(e2fsck).args(["-f", "-n", &disk]).output().unwrap();
        assert_eq!(checked.status.code(), Some(0), "{checked:?}");
    }
}

#[test]
fn debian_gives_a_shell_that_switches_off() {
    ensure("debian");
    let mut pty = Pty::new();
    let mut child = pty.spawn(ringfence().args(["run", "debian", "--engine", "jit", "--timeout", "240"]));
    pty.expect("root@ringfence:~# ", Duration::from_secs(200));
    pty.send("echo $((6 * 7))-$0-$(stty size)\r");
    pty.expect("42-/bin/bash-33 111", Duration::from_secs(60));
    pty.send("poweroff\r");
    assert!(support::wait(&mut child, Duration::from_secs(60)).success(), "{}", pty.text());
}
