//! A shared folder under Debian's own kernel: what the guest does in it, seen from the host.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;
#[path = "guest_programs/tree.rs"]
mod tree;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use support::image::{ensure, nonce, program, random_bytes, sha256_of};
use support::{Finished, finish, ringfence};

/// Steps of the exerciser; `RINGFENCE_SHARE_STEPS=20000` is the long check.
fn steps() -> u64 {
    std::env::var("RINGFENCE_SHARE_STEPS").ok().and_then(|text| text.parse().ok()).unwrap_or(4000)
}

fn run(shares: &[String], script: &str) -> Finished {
    run_image("shell", shares, script)
}

fn run_image(image: &str, shares: &[String], script: &str) -> Finished {
    ensure(image);
    let mut command = ringfence();
    command.args(["run", image, "--timeout", "300", "--net", "none"]);
    for share in shares {
        command.args(["--share", share]);
    }
    finish(command.args(["--", "sh", "-c", script]))
}

fn shared(folder: &Path, rest: &str) -> String {
    format!("{}:{rest}", folder.display())
}

fn exercise(image: &str) {
    let folder = tempfile::tempdir().unwrap();
    // Its program is executed from there too.
    program("share", folder.path());
    let script = format!("/mnt/work/share /mnt/work/tree {} {}", nonce(), steps());
    let run = run_image(image, &[shared(folder.path(), "work")], &script);
    run.expect(0, &[]);
    assert!(run.out.contains("ok "), "{run:#?}");
    let mut lines = Vec::new();
    tree::list(&folder.path().join("tree"), "", &mut lines);
    lines.sort();
    assert!(lines.len() > 20, "the exerciser did something: {lines:?}");
    assert_eq!(lines.join("\n"), fs::read_to_string(folder.path().join("tree.list")).unwrap());
}

#[test]
fn random_changes_are_the_same_on_both_sides() {
    exercise("shell");
}

#[test]
fn random_changes_are_the_same_on_both_sides_with_linux_6_12() {
    exercise("shell:6.12");
}

#[test]
fn large_files_and_many_files_cross_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let data = random_bytes(64 << 20);
    fs::write(folder.path().join("down"), &data).unwrap();
    fs::create_dir(folder.path().join("many")).unwrap();
    (0..3000).for_each(|i| fs::write(folder.path().join(format!("many/h{i}")), format!("{i}")).unwrap());
    let run = run(
        &[shared(folder.path(), "t")],
        "cd /mnt/t; sha256sum <down
         dd if=/dev/urandom of=up bs=1M count=64 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches; sha256sum <up
         for i in $(seq 3000); do echo $i >many/g$i; done
         echo 3 >/proc/sys/vm/drop_caches; ls many | wc -l; cat many/h* | sha256sum; rm many/h*; ls many | wc -l",
    );
    run.expect(0, &[]);
    let words: Vec<&str> = run.out.split_whitespace().filter(|word| *word != "-").collect();
    let mut names: Vec<String> = (0..3000).map(|i: u32| i.to_string()).collect();
    names.sort();
    let up = sha256_of(&fs::read(folder.path().join("up")).unwrap());
    let wanted = [&sha256_of(&data), &up, "6000", &sha256_of(names.concat().as_bytes()), "3000"];
    assert_eq!(words, wanted, "{run:#?}");
    assert_eq!(fs::metadata(folder.path().join("up")).unwrap().len(), 64 << 20);
    assert_eq!(fs::read_to_string(folder.path().join("many/g777")).unwrap(), "777\n");
    assert_eq!(fs::read_dir(folder.path().join("many")).unwrap().count(), 3000);
}

#[test]
fn there_is_no_way_out_and_read_only_is_kept() {
    no_way_out_and_read_only("shell");
}

#[test]
fn there_is_no_way_out_and_read_only_is_kept_with_linux_6_12() {
    no_way_out_and_read_only("shell:6.12");
}

fn no_way_out_and_read_only(image: &str) {
    let place = tempfile::tempdir().unwrap();
    let (folder, fixed) = (place.path().join("a"), place.path().join("b"));
    fs::create_dir(&folder).unwrap();
    fs::create_dir(&fixed).unwrap();
    fs::write(place.path().join("secret"), "the host's").unwrap();
    fs::write(fixed.join("text"), "fixed").unwrap();
    for (target, name) in [("../secret", "up"), ("../../../../../etc/hostname", "far"), ("..", "folder")] {
        symlink(target, folder.join(name)).unwrap();
    }
    symlink(place.path().join("secret"), folder.join("absolute")).unwrap();
    let script = r#"
cd /mnt/t
cat up absolute folder/secret ../../secret /mnt/t/../secret 2>/dev/null
echo guest >/mnt/secret; cat up; rm /mnt/secret
ln -s / root; ls root/mnt
ln up hard; readlink hard
mknod dev b 8 0 2>/dev/null || echo "no device"
mkfifo pipe; echo "pipe here" >pipe & cat /mnt/t/pipe; wait
cp /bin/busybox su; chmod 6755 su; stat -c %a su
cat /mnt/fixed/text
for what in 'echo x >/mnt/fixed/text' 'echo x >/mnt/fixed/new' 'rm /mnt/fixed/text' 'mkdir /mnt/fixed/d' \
    'mv /mnt/fixed/text /mnt/fixed/t' 'ln /mnt/fixed/text /mnt/fixed/l' 'chmod 777 /mnt/fixed/text' 'touch /mnt/fixed/text'; do
    sh -c "$what" 2>&1 | grep -o 'Read-only file system' || echo "went: $what"
done
"#;
    let run = run_image(image, &[shared(&folder, "t"), shared(&fixed, "fixed,readonly")], script);
    run.expect(0, &[]);
    let expected = ["guest", "fixed t", "../secret", "no device", "pipe here", "755", "fixed"].join(" ");
    let expected = format!("{expected}{}", "Read-only file system ".repeat(8));
    let got: Vec<&str> = run.out.split_whitespace().collect();
    assert_eq!(got.join(" "), expected.trim_end(), "{run:#?}");
    assert_eq!(fs::read_to_string(fixed.join("text")).unwrap(), "fixed");
    assert_eq!(fs::read_dir(&fixed).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(place.path().join("secret")).unwrap(), "the host's");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 3, "nothing beside the folders");
    assert_eq!(fs::metadata(folder.join("su")).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(fs::symlink_metadata(folder.join("hard")).unwrap().nlink(), 2);
}

/// What an ordinary user's guest sees of owners, and what becomes of its own.
const OWNERS: &str = r#"
cd /mnt/t
stat -c '%u:%g' mine
[ ! -e other ] || stat -c 'other %u:%g' other
touch new && chown 0:0 new && stat -c '%u:%g' new
chown 1000 new 2>&1 | grep -o 'Operation not permitted'
chown 0:5 new 2>&1 | grep -o 'Operation not permitted'
# Whoever makes it in the guest, it is the one user's.
echo 'user:x:1000:1000::/:/bin/sh' >>/etc/passwd
mkdir open && chmod 777 open && su user -c 'cd /mnt/t/open && id -u && echo text >made && mkdir folder && ln -s made link'
stat -c '%u:%g' open/made open/folder open/link
chmod 6755 new; stat -c %a new
"#;

#[test]
fn ordinary_users_files_are_roots_in_the_guest_and_what_the_guest_makes_is_theirs() {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(folder.path().join("mine"), "").unwrap();
    let me = fs::metadata(folder.path().join("mine")).unwrap();
    let root = me.uid() == 0;
    let mut command = ringfence();
    if root {
        // As an ordinary user sees the world: root's files are that user's, others' are nobody's.
        fs::write(folder.path().join("other"), "").unwrap();
        std::os::unix::fs::chown(folder.path().join("other"), Some(12_345), Some(12_345)).unwrap();
        let probe = std::process::Command::new("unshare")
            .args(["--map-user=1000", "--map-group=1000", "true"])
            .output();
        if !probe.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: this host has no namespaces of users");
            return;
        }
        let program = command.get_program().to_owned();
        command = std::process::Command::new("unshare");
        command.args(["--map-user=1000", "--map-group=1000"]).arg(program).stdin(std::process::Stdio::null());
    }
    command.args([
        "run",
        "shell",
        "--timeout",
        "200",
        "--net",
        "none",
        "--share",
        &shared(folder.path(), "t"),
    ]);
    let run = finish(command.args(["--", "sh", "-c", OWNERS]));
    run.expect(0, &[]);
    let lines: Vec<&str> = run.out.lines().map(str::trim).collect();
    let mut expected = vec!["0:0"];
    expected.extend(root.then_some("other 65534:65534"));
    expected.extend([
        "0:0",
        "Operation not permitted",
        "Operation not permitted",
        "1000",
        "0:0",
        "0:0",
        "0:0",
        "755",
    ]);
    assert_eq!(lines, expected, "{run:#?}");
    for name in ["new", "open/made", "open/folder", "open/link"] {
        let made = fs::symlink_metadata(folder.path().join(name)).unwrap();
        assert_eq!((made.uid(), made.gid()), (me.uid(), me.gid()), "{name}");
    }
}

#[test]
fn folder_that_cannot_be_shared_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone");
    let run = finish(ringfence().args(["run", "--share", &shared(&gone, "t"), "--", "true"]));
    run.expect(125, &["cannot share", "gone", "No such file"]);
    let twice = [shared(folder.path(), "t"), shared(folder.path(), "t")];
    finish(ringfence().args(["run", "--share", &twice[0], "--share", &twice[1]]))
        .expect(2, &["the tag \"t\""]);
}

#[test]
fn machine_outlives_the_process_of_its_folder() {
    outlives_the_process("shell");
}

#[test]
fn machine_outlives_the_process_of_its_folder_with_linux_6_12() {
    outlives_the_process("shell:6.12");
}

fn outlives_the_process(image: &str) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("text"), "here").unwrap();
    ensure(image);
    let mut child = ringfence()
        .args(["run", image, "--timeout", "120", "--net", "none", "--share", &shared(folder.path(), "t"), "--", "sh", "-c"])
        .arg("cat /mnt/t/text; echo; while cat /mnt/t/text >/dev/null 2>&1; do sleep 0.1; done; cat /mnt/t/text; exit 7")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    support::read_until(child.stdout.as_mut().unwrap(), "here");
    let helper = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.contains(&format!("PPid:\t{}\n", child.id()))
        })
        .unwrap();
    let pid = rustix::process::Pid::from_raw(helper).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let run = Finished::from(child.wait_with_output().unwrap());
    run.expect(7, &["the process of the shared folder t has ended"]);
    assert!(format!("{}{}", run.out, run.err).contains("Input/output error"), "{run:#?}");
}
