//! Hosts beyond the gateway: a network of the test's own, in a namespace, with addresses that a guest may reach and some that it may not.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::process::Command;

use support::finish;
use support::image::{ensure, nonce, program};

/// What runs in the namespace: a host with several addresses that answers at port 7 of each, and the machine. Its users may ping.
const NAMESPACE: &str = r#"
folder=$1; shift
ip link set lo up || exit 77
for address in 192.0.2.50 169.254.169.254 100.100.100.200; do ip addr add $address/32 dev lo || exit 77; done
for address in 2001:db8::50 fd00:ec2::254; do ip -6 addr add $address/128 dev lo nodad; done
echo 0 0 >/proc/sys/net/ipv4/ping_group_range || exit 77
"$folder/net" serve 7 >&2 & server=$!
"$@"
status=$?
kill $server
exit $status
"#;

/// Asks the host at each of its addresses, what it may reach first.
const GUEST: &str = r#"
for i in $(seq 200); do ip -6 addr show dev eth0 | grep fd52:696e:6766: | grep -vq tentative && break; sleep 0.1; done
ask() { /mnt/t/net tcp $1:7 5 200000 $2; /mnt/t/net udp $1:7 2 1,1472,1473,9000 $2; }
ask 192.0.2.50 SEED
ping -c 3 -q 192.0.2.50 | grep -o ' 0% packet loss'
ping -c 2 -q -s 20000 192.0.2.50 | grep -o ' 0% packet loss'
/mnt/t/net tcp 192.0.2.50:8 1 1 1; /mnt/t/net udp 192.0.2.50:8 1 1 1
echo IPv6
ask [2001:db8::50] SEED
ping -6 -c 3 -q 2001:db8::50 | grep -o ' 0% packet loss'
/mnt/t/net tcp [2001:db8::50]:8 1 1 1; /mnt/t/net udp [2001:db8::50]:8 1 1 1
echo out of reach
for to in 169.254.169.254 100.100.100.200 [fd00:ec2::254]; do /mnt/t/net tcp $to:7 1 1 1; done
ping -c 1 -W 1 -q 169.254.169.254 >/dev/null || echo no echo
"#;

fn hosts_beyond_the_gateway(image: &str) {
    let ping = "ip link set lo up && echo 0 0 >/proc/sys/net/ipv4/ping_group_range";
    let probe = Command::new("unshare").args(["-Urn", "sh", "-c", ping]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: this host gives no network namespace in which users may ping");
        return;
    }
    ensure(image);
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    let share = format!("{}:t", folder.path().display());
    let mut command = Command::new("unshare");
    command.args(["-Urn", "sh", "-c", NAMESPACE, "sh"]).arg(folder.path());
    command.arg(env!("CARGO_BIN_EXE_ringfence")).args(["run", image, "--timeout", "240", "--share", &share]);
    let guest = GUEST.replace("SEED", &nonce().to_string());
    let run = finish(command.args(["--", "sh", "-c", &guest]));
    run.expect(0, &[]);
    let lines: Vec<&str> = run.out.lines().map(str::trim).collect();
    let mut parts = lines.split(|line| *line == "IPv6" || *line == "out of reach");
    let [four, six, beyond] = [0; 3].map(|_| parts.next().unwrap());
    let count = |part: &[&str], text: &str| part.iter().filter(|line| line.starts_with(text)).count();
    // A closed port is told by a reset, and by ICMP.
    let whole =
        |part: &[&str]| [count(part, "ok "), count(part, "0% "), count(part, "failed: Connection refused")];
    assert_eq!(whole(four), [2, 2, 2], "{run:#?}");
    if std::fs::read_to_string("/proc/net/if_inet6").is_ok_and(|text| !text.is_empty()) {
        assert_eq!(whole(six), [2, 1, 2], "{run:#?}");
    }
    assert_eq!((count(beyond, "failed: "), count(beyond, "no echo")), (3, 1), "{run:#?}");
}

#[test]
fn hosts_beyond_the_gateway_are_reached_by_every_protocol() {
    hosts_beyond_the_gateway("shell");
}

#[test]
fn hosts_beyond_the_gateway_are_reached_by_every_protocol_with_linux_6_12() {
    hosts_beyond_the_gateway("shell:6.12");
}
