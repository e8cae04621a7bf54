//! Debian's own kernel in the machine. Every check rests on something that the guest computed from a number that
//! was not known before the run, so that none passes without a guest that ran.
//!
//! A boot takes many seconds on the interpreter, so each looks at many things. `cargo test` runs two at once.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::time::{Duration, UNIX_EPOCH};

use support::image::{BOOT, Session, ensure, errors, nonce, path, program, sha256};
use support::pty::{Pty, comparable};
use support::{file, finish, ringfence, wait};

/// The guest's answers, one line each.
const SURVEY: &str = r#"
nonce=$(sed 's/.*nonce=\([0-9]*\).*/\1/' /proc/cmdline)
echo "@date $(date +%s)"
start=$(cut -d' ' -f1 /proc/uptime)
echo "@hash $(printf %s "$nonce" | sha256sum | cut -d' ' -f1)"
echo "@arithmetic $((nonce % 1000003 * 7919 + 1))"
echo "@float $(awk -v n="$nonce" 'BEGIN { printf "%.12f %.9e", n % 1009 / 7.3 + 0.1, n * 1.000000007 / 3 }')"
echo "@uname $(uname -a)"
echo "@stdin $(cat <&0 >/dev/null 2>&1 & echo ok)"
echo "@cpuinfo begin"; cat /proc/cpuinfo; echo "@cpuinfo end"
echo "@vector begin"; /vector "$nonce"; echo "@vector end"
before=$(grep -c ^dummy /proc/modules)
modprobe dummy && ip link add fake type dummy && ip link set fake up
echo "@module $before $(grep -c ^dummy /proc/modules) $(cat /sys/class/net/fake/operstate)"
sleep 1; a=$(cut -d. -f1 /proc/uptime)
echo "@clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
for i in 1 2 3 4 5 6; do sleep 5; done
echo "@later $(date +%s)"
echo "@interrupts begin"; cat /proc/interrupts; echo "@interrupts end"
echo "@dmesg begin"; dmesg -r; echo "@dmesg end"
exit 37
"#;

#[test]
fn debian_kernel_computes_keeps_time_and_does_not_complain() {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let vector = program("vector", folder.path());
    let nonce = nonce();
    let mut archive = ringfence_images::cpio::Writer::new();
    archive.file("vector", 0o755, &std::fs::read(&vector).unwrap()).unwrap();
    let extra = file(&archive.finish());

    let mut command = ringfence();
    // All that the host has, so that the vector program computes by the same instructions here and there.
    command.args([
        "run",
        "-v",
        "--cpu",
        "host",
        "--timeout",
        "400",
        "--append",
        &format!("nonce={nonce}"),
        "--initrd",
    ]);
    command.arg(extra.path()).args(["--", "sh", "-c", SURVEY]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(240));
    assert_eq!(session.status, Some(37), "{}", session.text());
    let value = |name| session.value(name).0;

    assert_eq!(value("hash"), sha256(&nonce.to_string()));
    assert_eq!(value("arithmetic"), (nonce % 1_000_003 * 7919 + 1).to_string());
    let float =
        value("float").split_whitespace().map(|word| word.parse::<f64>().unwrap()).collect::<Vec<_>>();
    let expected = [(nonce % 1009) as f64 / 7.3 + 0.1, nonce as f64 * 1.000_000_007 / 3.0];
    assert!(float.iter().zip(expected).all(|(a, b)| (a / b - 1.0).abs() < 1e-9), "{float:?} {expected:?}");
    assert!(
        value("uname").starts_with("Linux ringfence ") && value("uname").contains("x86_64"),
        "{}",
        value("uname")
    );

    let native = std::process::Command::new(&vector).arg(nonce.to_string()).output().unwrap();
    let native = String::from_utf8(native.stdout).unwrap();
    let guest = session.section("vector");
    assert_eq!(guest, native.lines().collect::<Vec<_>>(), "{}", session.text());

    let cpuinfo = session.section("cpuinfo").join("\n");
    assert_eq!(cpuinfo.matches("processor\t:").count(), 1, "{cpuinfo}");
    for flag in [" lm ", " sse4_2 ", " hypervisor ", " x2apic ", " constant_tsc ", " nx "] {
        assert!(cpuinfo.contains(flag), "{flag}: {cpuinfo}");
    }

    assert_eq!(value("module"), "0 1 unknown");
    // Linux takes an invariant TSC, which the host may not have, before the paravirtual clock.
    assert!(["tsc", "kvm-clock"].contains(&value("clocksource")), "{}", value("clocksource"));
    for name in ["date", "later"] {
        let (seconds, at) = session.value(name);
        let host = at.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let guest: f64 = seconds.parse().unwrap();
        // A second that the CMOS clock gives counts as half over for Linux (`rtc_hctosys`), so it may be half a second ahead.
        assert!((guest - 0.6..=guest + 2.0).contains(&host), "{name}: guest {guest}, host {host}");
    }

    let dmesg = session.section("dmesg");
    assert!(dmesg.len() > 100, "{dmesg:#?}");
    let errors = errors(&dmesg);
    assert!(errors.is_empty(), "the kernel complains: {errors:#?}\n{}", session.text());
    for figure in ["shell prompt", "MIPS", "touched by the guest"] {
        assert!(session.err.contains(figure), "{}", session.err);
    }
    println!("{}", session.err);
}

#[test]
fn shell_reboots_and_powers_off_on_a_terminal() {
    ensure("shell");
    let nonce = nonce();
    let mut pty = Pty::new();
    let before = comparable(&pty.modes());
    let mut child = pty.spawn(ringfence().args(["run", "--append", &format!("nonce={nonce}")]));
    pty.expect(":~# ", BOOT);
    assert!(pty.is_raw());
    let minute = Duration::from_secs(60);
    // The quotes keep the answer from being found in the echo of the question.
    pty.send("echo han''d:$(sed 's/.*nonce=//;s/ .*//' /proc/cmdline | tr -d '\\n' | sha256sum)\n");
    pty.expect(&format!("hand:{}", sha256(&nonce.to_string())), minute);
    pty.send("stty si''ze\n");
    pty.expect("33 111", minute);
    pty.send("sleep 1000; echo inter''rupted=$?\n");
    std::thread::sleep(Duration::from_secs(2));
    pty.send("\x03");
    pty.expect(":~# ", minute);
    pty.send("echo mark > /tmp/here; ls /t''mp; reboot\n");
    pty.expect("booting it again", minute);
    pty.expect("Linux version", BOOT);
    pty.expect(":~# ", BOOT);
    // Nothing of the old system is left.
    pty.send("ls /tmp | wc -l | sed 's/^/left=/'; poweroff\n");
    pty.expect("left=0", minute);
    assert_eq!(wait(&mut child, minute).code(), Some(0), "{}", pty.text());
    assert_eq!(comparable(&pty.modes()), before);
}

#[test]
fn newer_kernel_at_a_random_address_on_a_plainer_cpu() {
    ensure("shell:6.12");
    let nonce = nonce();
    let script = format!(
        "echo \"@hash $(printf %s {nonce} | sha256sum | cut -d' ' -f1)\"; echo \"@release $(uname -r)\"; \
         echo \"@text $(grep ' _text$' /proc/kallsyms)\"; echo \"@flags $(grep -m1 ^flags /proc/cpuinfo)\"; \
         echo '@dmesg begin'; dmesg -r; echo '@dmesg end'; reboot -f"
    );
    let mut command = ringfence();
    command.args(["run", "shell:6.12", "--kaslr", "--cpu", "x86-64-v2", "--timeout", "400", "-v"]);
    command.args(["--", "sh", "-c", &script]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(60));
    assert_eq!(session.value("hash").0, sha256(&nonce.to_string()));
    assert!(session.value("release").0.starts_with("6.12"), "{}", session.text());
    assert!(session.err.contains("KASLR: 0x"), "{}", session.err);
    let text = session.value("text").0;
    assert!(!text.starts_with("ffffffff81000000") && text.starts_with("ffffffff"), "{text}");
    let flags = session.value("flags").0;
    assert!(flags.contains("sse4_2") && !flags.contains(" avx"), "{flags}");
    let errors = errors(&session.section("dmesg"));
    assert!(errors.is_empty(), "the kernel complains: {errors:#?}");
    // The command reset the machine before it told a status: a failure, said so.
    assert_eq!(session.status, Some(125), "{}", session.text());
    assert!(session.err.contains("ended before the command did"), "{}", session.err);
}

#[test]
fn real_kernel_that_is_cut_off_or_too_large_is_refused() {
    ensure("shell");
    let kernel = path("shell", "kernel");
    let bytes = std::fs::read(&kernel).unwrap();
    for part in [600, bytes.len() / 2, bytes.len() - 200_000] {
        let cut = file(&bytes[..part]);
        let run = finish(ringfence().args(["run", "--timeout", "20", "--kernel"]).arg(cut.path()));
        run.expect(125, &["error: cannot boot"]);
        assert_eq!(run.out, "", "{part}");
    }
    finish(ringfence().args(["run", "--timeout", "20", "--memory", "24M", "--kernel", &kernel]))
        .expect(125, &["MiB with --memory"]);
    let large = tempfile::NamedTempFile::new().unwrap();
    large.as_file().set_len(70 << 20).unwrap();
    let mut command = ringfence();
    command.args(["run", "--timeout", "20", "--memory", "96M", "--kernel", &kernel, "--initrd"]);
    finish(command.arg(large.path())).expect(125, &["initrd", "--memory"]);
}

#[test]
#[ignore = "three boots; part of the long run"]
fn counted_boots_repeat_exactly_and_the_guest_can_unpack_itself() {
    ensure("shell");
    let boot = |extra: &[&str]| {
        let mut command = ringfence();
        command.args(["run", "-v", "--timeout", "600"]).args(extra).args([
            "--",
            "sh",
            "-c",
            "echo @sum $((40 + 2))",
        ]);
        let session = Session::run(&mut command, Duration::from_secs(700));
        assert_eq!((session.status, session.value("sum").0), (Some(0), "42"), "{}", session.text());
        let line = session.err.lines().find(|line| line.contains("vCPU 0:")).unwrap().to_owned();
        line.split(" instructions").next().unwrap().to_owned()
    };
    assert_eq!(boot(&["--counted"]), boot(&["--counted"]));
    boot(&["--decompress-in-guest"]);
}

/// In counted time a run depends on nothing but the guest, so the whole boot is one comparison of the two engines.
#[test]
fn translated_boot_does_exactly_what_the_interpreted_one_does() {
    ensure("shell");
    let nonce = nonce();
    let script = format!(
        "echo \"@hash $(printf %s {nonce} | sha256sum | cut -d' ' -f1)\"; for i in 1 2 3 4 5; do /bin/true; done; \
         echo '@dmesg begin'; dmesg -r; echo '@dmesg end'; echo '@interrupts begin'; cat /proc/interrupts; \
         echo '@interrupts end'; exit 37"
    );
    let [interpreted, translated] = ["interp", "jit"].map(|engine| {
        let mut command = ringfence();
        command.args(["run", "-v", "--counted", "--timeout", "400", "--engine", engine]);
        let session = Session::run(command.args(["--", "sh", "-c", &script]), BOOT);
        assert_eq!(session.status, Some(37), "{}", session.text());
        assert_eq!(session.value("hash").0, sha256(&nonce.to_string()));
        let told = ["instructions:", "interrupts:", "exceptions:", "soft TLB flushes:"]
            .map(|name| session.err.lines().find(|line| line.contains(name)).unwrap().to_owned());
        let lines: Vec<_> = session.lines.iter().map(|line| line.text.clone()).collect();
        (lines, told)
    });
    assert_eq!(interpreted.0, translated.0);
    assert_eq!(interpreted.1, translated.1);
}
