//! A tap device between the guest and a host that is a network namespace of the test's own, so that nothing of this host is touched.
//! The same program is client and server on both sides.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::process::Command;

use support::image::{ensure, nonce, program};
use support::{Finished, finish};

/// The status of [`NAMESPACE`] when the host lets nobody make a tap device.
const NO_TAP: i32 = 77;

/// What runs in the namespace. Few datagrams are on their way at a time: what a receiver has no room for is lost. It makes the device, has a server, asks the guest when it is ready, and runs the machine.
const NAMESPACE: &str = r#"
folder=$1 seed=$2; shift 2
ip tuntap add dev tap0 mode tap || exit 77
exec 3<>/dev/net/tun || exit 77
exec 3>&-
ip addr add 192.0.2.1/24 dev tap0 && ip link set tap0 up && ip link set lo up || exit 1
"$folder/net" serve 7 >&2 &
server=$!
(
  for i in $(seq 2400); do [ -e "$folder/ready" ] && break; sleep 0.1; done
  "$folder/net" tcp 192.0.2.2:8 20 300000 "$seed"
  "$folder/net" udp 192.0.2.2:8 2 1,1472,1473,9000,65507 "$seed"
  ping -c 3 -q 192.0.2.2 2>/dev/null | grep -o ' 0% packet loss'
) >"$folder/host" 2>&1 &
client=$!
"$@"
status=$?
wait $client
kill $server
exit $status
"#;

/// What the guest does: configures itself, asks the host, then answers it until the host has had enough.
const GUEST: &str = "
ip addr flush dev eth0; ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up
ping -c 3 -q 192.0.2.1 | grep -o ' 0% packet loss'
/mnt/t/net tcp 192.0.2.1:7 20 1000000 SEED
/mnt/t/net udp 192.0.2.1:7 2 1,1472,1473,9000,65507 SEED
/mnt/t/net serve 8 & sleep 1; touch /mnt/t/ready
for i in $(seq 600); do [ \"$(grep -c . /mnt/t/host)\" -ge LINES ] && break; sleep 0.1; done
";

/// Why a network namespace with a tap device cannot be had here, if so.
fn refused() -> Option<String> {
    let mut probe = Command::new("unshare");
    let script = "ip tuntap add dev tap0 mode tap && exec 3<>/dev/net/tun";
    match probe.args(["-Urn", "sh", "-c", script]).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

fn guest_and_host_talk(image: &str, options: &str) {
    if let Some(reason) = refused() {
        eprintln!("skipped: this host gives no namespace with a tap device: {}", reason.trim());
        return;
    }
    ensure(image);
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    fs::write(folder.path().join("host"), "").unwrap();
    let has_ping = Command::new("ping").arg("-V").output().is_ok();
    let seed = nonce().to_string();
    let script = GUEST.replace("SEED", &seed).replace("LINES", if has_ping { "3" } else { "2" });
    let share = format!("{}:t", folder.path().display());
    let mut command = Command::new("unshare");
    command.args(["-Urn", "sh", "-c", NAMESPACE, "sh"]).arg(folder.path()).arg(&seed);
    command.arg(env!("CARGO_BIN_EXE_ringfence"));
    command.args([
        "run",
        image,
        "--timeout",
        "240",
        "--net",
        &format!("tap=tap0{options}"),
        "--share",
        &share,
    ]);
    let run: Finished = finish(command.args(["--", "sh", "-c", &script]));
    let host = fs::read_to_string(folder.path().join("host")).unwrap();
    assert_ne!(run.status, Some(NO_TAP), "there was one a moment ago: {run:#?}");
    run.expect(0, &[]);
    assert_eq!(run.out.lines().filter(|line| line.starts_with("ok ")).count(), 2, "{run:#?}\n{host}");
    assert!(run.out.contains(" 0% packet loss"), "{run:#?}");
    assert_eq!(host.lines().filter(|line| line.starts_with("ok ")).count(), 2, "{run:#?}\n{host}");
    assert!(!has_ping || host.contains(" 0% packet loss"), "{host}");
}

#[test]
fn guest_and_host_talk_over_a_tap_device() {
    guest_and_host_talk("shell", "");
}

#[test]
fn guest_and_host_talk_over_a_tap_device_with_linux_6_12_and_several_queues() {
    guest_and_host_talk("shell:6.12", ",queues=2");
}

/// A server on the host's side, and the machine.
const LIMITED: &str = r#"
folder=$1; shift
ip tuntap add dev tap0 mode tap && ip addr add 192.0.2.1/24 dev tap0 && ip link set tap0 up || exit 77
"$folder/net" serve 7 >&2 &
server=$!
"$@"
status=$?
kill $server
exit $status
"#;

/// Fifteen datagrams that go and come back one after the other, and how long that takes in hundredths of a second.
const LIMITED_GUEST: &str = "
ip addr flush dev eth0; ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up
now() { cut -d' ' -f1 /proc/uptime | tr -d .; }
sleep 3; start=$(now)
/mnt/t/net udp 192.0.2.1:7 1 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1 7
echo time $(($(now) - start))
";

#[test]
fn limit_holds_on_a_tap_device() {
    if let Some(reason) = refused() {
        eprintln!("skipped: this host gives no namespace with a tap device: {}", reason.trim());
        return;
    }
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    let share = format!("{}:t", folder.path().display());
    let mut command = Command::new("unshare");
    command.args(["-Urn", "sh", "-c", LIMITED, "sh"]).arg(folder.path());
    command.arg(env!("CARGO_BIN_EXE_ringfence"));
    command.args(["run", "shell", "--timeout", "240", "--net", "tap=tap0,pps=4", "--share", &share]);
    let run: Finished = finish(command.args(["--", "sh", "-c", LIMITED_GUEST]));
    run.expect(0, &[]);
    assert!(run.out.contains("ok "), "{run:#?}");
    let time =
        run.out.lines().find_map(|line| line.trim().strip_prefix("time ")?.parse::<u32>().ok()).unwrap();
    // A second's worth passes at once at most, and the rest by the rate, with whatever else the kernels say.
    assert!((260..9000).contains(&time), "{run:#?}");
}
