//! Names for the guest, by the resolvers of a host whose `/etc/resolv.conf` changes: in namespaces of the test's own, so that nothing of
//! this host is asked.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::process::Command;

use support::finish;
use support::image::{ensure, program};

/// What runs in the namespaces: name servers for two addresses, one that says nothing, and the machine.
const NAMESPACE: &str = r#"
folder=$1; shift
ip link set lo up && mount --bind "$folder/resolv.conf" /etc/resolv.conf || exit 77
"$folder/net" names 127.0.0.2:53 192.0.2.1 & servers=$!
"$folder/net" deaf 127.0.0.4:53 & servers="$servers $!"
if grep -q lo /proc/net/if_inet6; then "$folder/net" names [::1]:53 192.0.2.2 & servers="$servers $!"; fi
"$@"
status=$?
kill $servers
exit $status
"#;

/// Asks by way of each kind of resolver. The guest itself changes the host's file, which it shares.
const GUEST: &str = r#"
cd /mnt/t
now() { cut -d' ' -f1 /proc/uptime | cut -d. -f1; }
./net name 10.0.2.3:53 unreachable-and-refused.example
./net name 10.0.2.3:53 long.example
nslookup -type=a busybox.example 10.0.2.3 | grep 192.0.2
if [ -e six ]; then
  echo 'nameserver ::1' >resolv.conf; sleep 2
  ./net name 10.0.2.3:53 six.example; ./net name 10.0.2.3:53 long.six.example
  for i in $(seq 200); do ip -6 addr show dev eth0 | grep fd52:696e:6766: | grep -vq tentative && break; sleep 0.1; done
  ./net name [fd52:696e:6766::3]:53 from-six.example
fi
printf 'nameserver 127.0.0.4\nnameserver 127.0.0.2\n' >resolv.conf; sleep 2
start=$(now); ./net name 10.0.2.3:53 silent.example; echo "after $(($(now) - start)) s"
start=$(now); ./net name 10.0.2.3:53 known.example; echo "then $(($(now) - start)) s"
"#;

fn names_follow_the_host(image: &str) {
    let probe = Command::new("unshare").args(["-Urnm", "sh", "-c", "ip link set lo up"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: this host gives no namespaces of our own");
        return;
    }
    ensure(image);
    let folder = tempfile::tempdir().unwrap();
    program("net", folder.path());
    // No way to the first, nobody at the second.
    let resolvers = "nameserver 2001:db8::1\nnameserver 127.0.0.9\noptions edns0\nnameserver 127.0.0.2\n";
    fs::write(folder.path().join("resolv.conf"), resolvers).unwrap();
    let six = fs::read_to_string("/proc/net/if_inet6").is_ok_and(|text| !text.is_empty());
    if six {
        fs::write(folder.path().join("six"), "").unwrap();
    }
    let share = format!("{}:t", folder.path().display());
    let mut command = Command::new("unshare");
    command.args(["-Urnm", "sh", "-c", NAMESPACE, "sh"]).arg(folder.path());
    command.arg(env!("CARGO_BIN_EXE_ringfence")).args(["run", image, "--timeout", "240", "--share", &share]);
    let run = finish(command.args(["--", "sh", "-c", GUEST]));
    run.expect(0, &[]);
    let lines: Vec<&str> = run.out.lines().map(str::trim).collect();
    let (first, second) = ("ok 192.0.2.1 1", "ok 192.0.2.2 1");
    let mut expected = vec![first, "ok 192.0.2.1 200", "Address: 192.0.2.1"];
    if six {
        expected.extend([second, "ok 192.0.2.2 200", second]);
    }
    expected.push(first);
    assert_eq!(lines[..expected.len()], expected, "{run:#?}");
    let [after, known, then] = lines[expected.len()..] else { panic!("{run:#?}") };
    let seconds = |line: &str| line.split(' ').nth(1).unwrap().parse::<u64>().unwrap();
    assert!((1..=6).contains(&seconds(after)), "the silent one has two seconds: {run:#?}");
    assert!(known == first && seconds(then) <= 1, "and is not asked again: {run:#?}");
}

#[test]
fn names_follow_the_hosts_resolvers() {
    names_follow_the_host("shell");
}

#[test]
fn names_follow_the_hosts_resolvers_with_linux_6_12() {
    names_follow_the_host("shell:6.12");
}
