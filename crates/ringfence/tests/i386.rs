//! A 32-bit system: Debian's kernel and busybox for i386, in the image `shell:i386`. What the guest computes of bytes that were
//! not known before the run is compared with what the host makes of them.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::io::Write;
use std::net::TcpListener;
use std::time::Duration;

use support::disk::{contents, ext4, tool};
use support::image::{BOOT, Session, ensure, errors, nonce, numbers, random_bytes, sha256, sha256_of};
use support::pty::Pty;
use support::{ringfence, wait};

/// The guest's answers, one line each. `PORT` becomes the port at which the host serves bytes.
const WORK: &str = r#"
cd /tmp
sum() { sha256sum "$@" | cut -d' ' -f1; }
echo "@machine $(uname -m)"
echo "@bytes $(sum /mnt/x/bytes)"
echo "@sorted $(sort -n /mnt/x/numbers | sum)"
echo "@words $(sort /mnt/x/numbers | sum)"
echo "@awk $(awk '{ s = (s * 31 + $1) % 16777213 } END { print s }' /mnt/x/numbers)"
gzip -c /mnt/x/bytes >b.gz && bzip2 -c /mnt/x/numbers >n.bz2
echo "@unpacked $(gunzip -c b.gz | sum) $(bunzip2 -c n.bz2 | sum)"
cp b.gz n.bz2 /mnt/x/
total=0; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    n=$(sh -c "echo $(($(sed -n "${i}p" /mnt/x/numbers) % 1000))" | cat); total=$((total + n))
done
echo "@forks $total"
echo "@sums $(sha512sum </mnt/x/bytes | cut -d' ' -f1) $(md5sum </mnt/x/bytes | cut -d' ' -f1)"
echo "@net $(nc 10.0.2.2 PORT </dev/null | sum)"
mkdir disk && mount -t ext4 /dev/nvme0n1 disk && sum /mnt/x/numbers >disk/sum && umount disk && echo "@disk ok"
modprobe dummy && ip link add fake type dummy && echo "@module $(grep -c ^dummy /proc/modules)"
echo "@dmesg begin"; dmesg -r; echo "@dmesg end"
exit 38
"#;

#[test]
fn system_of_32_bits_computes_what_the_host_does() {
    ensure("shell:i386");
    let folder = tempfile::tempdir().unwrap();
    let (bytes, served) = (random_bytes(3 << 20), random_bytes(1 << 20));
    // Half of it can be packed.
    let bytes: Vec<u8> = bytes.chunks(64).flat_map(|chunk| [chunk, chunk].concat()).collect();
    // The least integer of its programs has 32 bits and a sign.
    let mut next = numbers();
    let numbers: Vec<u64> = (0..20_000).map(|_| next() >> 34).collect();
    let lines = |numbers: &[u64]| numbers.iter().map(|n| format!("{n}\n")).collect::<String>();
    std::fs::write(folder.path().join("bytes"), &bytes).unwrap();
    std::fs::write(folder.path().join("numbers"), lines(&numbers)).unwrap();
    let disk = tool("mke2fs").map(|mke2fs| ext4(folder.path(), &mke2fs));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let to_serve = served.clone();
    let server = std::thread::spawn(move || listener.accept().unwrap().0.write_all(&to_serve).unwrap());

    let mut command = ringfence();
    command.args(["run", "shell:i386", "-v", "--timeout", "300", "--share"]);
    command.arg(format!("{}:x", folder.path().display()));
    if let Some(disk) = &disk {
        command.arg("--disk").arg(disk);
    }
    command.args(["--", "sh", "-c", &WORK.replace("PORT", &port.to_string())]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(120));
    assert_eq!(session.status, Some(38), "{}", session.text());
    server.join().unwrap();
    let expect = |name: &str, value: &str| assert_eq!(session.value(name).0, value, "{name}");

    expect("machine", "i686");
    expect("bytes", &sha256_of(&bytes));
    let mut sorted = numbers.clone();
    sorted.sort_unstable();
    expect("sorted", &sha256(&lines(&sorted)));
    sorted.sort_by_key(u64::to_string);
    expect("words", &sha256(&lines(&sorted)));
    let sum = numbers.iter().fold(0, |sum, n| (sum * 31 + n) % 16_777_213);
    expect("awk", &sum.to_string());
    expect("unpacked", &format!("{} {}", sha256_of(&bytes), sha256(&lines(&numbers))));
    expect("forks", &numbers[..20].iter().map(|n| n % 1000).sum::<u64>().to_string());
    expect("net", &sha256_of(&served));
    expect("module", "1");
    for (program, packed, plain) in
        [("gzip", "b.gz", &bytes), ("bzip2", "n.bz2", &lines(&numbers).into_bytes())]
    {
        // What the guest packed, the host's programs unpack.
        let output = std::process::Command::new(program).arg("-dc").arg(folder.path().join(packed)).output();
        let Ok(output) = output else { continue };
        assert!(output.status.success() && &output.stdout == plain, "{program}");
    }
    let host = |program: &str| {
        let file = std::fs::File::open(folder.path().join("bytes")).unwrap();
        let output = std::process::Command::new(program).stdin(file).output().unwrap();
        String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
    };
    expect("sums", &format!("{} {}", host("sha512sum"), host("md5sum")));
    if let (Some(disk), Some(debugfs)) = (disk, tool("debugfs")) {
        expect("disk", "ok");
        assert_eq!(contents(&disk, &debugfs, "/sum").trim(), sha256(&lines(&numbers)));
    }
    let errors = errors(&session.section("dmesg"));
    assert!(errors.is_empty(), "the kernel complains: {errors:#?}\n{}", session.text());

    let of_a_million = "instructions interpreted per million executed: ";
    let interpreted = session.err.lines().find_map(|line| line.split_once(of_a_million));
    let interpreted: u64 = interpreted.map(|(_, number)| number.trim().parse().unwrap()).unwrap();
    println!("{}", session.err);
    assert!(interpreted < 1_000, "{}", session.text());
}

#[test]
fn shell_of_32_bits_reboots_and_powers_off_on_a_terminal() {
    ensure("shell:i386");
    let nonce = nonce();
    let mut pty = Pty::new();
    let mut child = pty.spawn(ringfence().args(["run", "shell:i386", "--append", &format!("nonce={nonce}")]));
    pty.expect(":~# ", BOOT);
    let minute = Duration::from_secs(60);
    // The quotes keep the answer from being found in the echo of the question.
    pty.send("echo han''d:$(sed 's/.*nonce=//;s/ .*//' /proc/cmdline | tr -d '\\n' | sha256sum)\n");
    pty.expect(&format!("hand:{}", sha256(&nonce.to_string())), minute);
    pty.send("echo mark > /tmp/here; reboot\n");
    pty.expect("booting it again", minute);
    pty.expect(":~# ", BOOT);
    pty.send("ls /tmp | wc -l | sed 's/^/left=/'; poweroff\n");
    pty.expect("left=0", minute);
    assert_eq!(wait(&mut child, minute).code(), Some(0), "{}", pty.text());
}
