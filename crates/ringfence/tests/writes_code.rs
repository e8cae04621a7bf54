//! Guests that write code, in a Debian kernel: programs that make code for themselves, and a kernel that compiles BPF, loads and
//! unloads modules, and switches its tracing on and off. An engine that keeps translated code has to notice every one.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::time::Duration;

use support::disk::sparse;
use support::file;
use support::image::{BOOT, Session, ensure, errors, nonce, program};
use support::ringfence;

/// How often the program does each thing; `RINGFENCE_CODE` says otherwise.
const SCALE: u64 = 400;

/// An archive with these guest programs, which are also left in `folder`.
fn archive(names: &[&str], folder: &std::path::Path) -> tempfile::NamedTempFile {
    let mut archive = ringfence_images::cpio::Writer::new();
    for name in names {
        let built = std::fs::read(program(name, folder)).unwrap();
        archive.file(name, 0o755, &built).unwrap();
    }
    file(&archive.finish())
}

/// Runs the program on the host and in a guest with `options`; both must give the same.
fn programs_that_write_code(options: &[&str], scale: u64, limit: u64) {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let extra = archive(&["writes_code"], folder.path());
    let disk = sparse(folder.path(), "scratch", 1 << 20);
    let (seed, scale) = ((nonce() % 1_000_000_000).to_string(), scale.to_string());
    println!("writes_code {seed} {scale}");

    let native = std::process::Command::new(folder.path().join("writes_code"))
        .args([&seed, &scale])
        .arg(&disk)
        .output()
        .unwrap();
    assert!(native.status.success(), "on the host: {native:?}");
    let expected = String::from_utf8(native.stdout).unwrap();

    let script = format!(
        "echo '@code begin'; /writes_code {seed} {scale} /dev/nvme0n1 2>/tmp/times; status=$?; echo '@code end'; \
         echo '@times begin'; cat /tmp/times; echo '@times end'; \
         echo '@dmesg begin'; dmesg -r; echo '@dmesg end'; exit $status"
    );
    let mut command = ringfence();
    command.arg("run").args(options).args(["--timeout", &limit.to_string(), "--disk"]).arg(&disk);
    command.arg("--initrd").arg(extra.path()).args(["--", "sh", "-c", &script]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(limit));
    assert_eq!(session.status, Some(0), "{}", session.text());
    assert_eq!(session.section("code"), expected.lines().collect::<Vec<_>>(), "{}", session.text());
    let times = session.section("times");
    println!("{}", times.join("\n"));
    assert!(times.contains(&"past the page cache: true"), "{times:?}");
    let errors = errors(&session.section("dmesg"));
    assert!(errors.is_empty(), "the kernel complains: {errors:#?}");
}

#[test]
fn programs_that_write_code_run_what_they_wrote() {
    let scale = std::env::var("RINGFENCE_CODE").ok().and_then(|text| text.parse().ok()).unwrap_or(SCALE);
    programs_that_write_code(&[], scale, 200 + scale / 20);
}

#[test]
#[ignore = "the same in lock-step, which is slow"]
fn programs_that_write_code_run_what_they_wrote_in_lock_step() {
    programs_that_write_code(&["--engine", "lockstep"], 40, 1200);
    programs_that_write_code(&["--engine", "lockstep", "--lockstep-batch", "1000"], 40, 1200);
}

/// Every `@fail` is a failure. What the kernel does not offer is told as `@skip`.
const KERNEL: &str = r#"
fail() { echo "@fail $*"; }
echo "@compiler $(cat /proc/sys/net/core/bpf_jit_enable 2>/dev/null || echo none)"
echo "@bpf $(/bpf $seed 1500)"

for round in 1 2 3 4; do
  for module in dummy veth tun zram loop squashfs isofs overlay; do
    modprobe $module || { fail "round $round: $module does not load"; continue; }
    case $module in
      dummy) ip link add fake0 type dummy && ip link set fake0 up && ip link del fake0 || fail "$module" ;;
      tun) [ -e /sys/class/misc/tun ] || fail "$module" ;;
      loop|zram) [ -e /sys/block/${module}0 ] || fail "$module" ;;
      veth) [ -e /sys/module/veth ] || fail "$module" ;;
      isofs) grep -q iso9660 /proc/filesystems || fail "$module" ;;
      *) grep -q $module /proc/filesystems || fail "$module" ;;
    esac
    modprobe -r $module || fail "$module stays"
    grep -q "^$module " /proc/modules && fail "$module is still there"
  done
done
echo "@modules done"

tracing=/sys/kernel/tracing
mount -t tracefs none $tracing && cd $tracing || { echo "@skip tracing: no tracefs"; exit 0; }
for tracer in function function_graph function nop; do
  grep -qw $tracer available_tracers || { echo "@skip tracer $tracer"; continue; }
  echo $tracer > current_tracer || fail "tracer $tracer"
  cat /proc/version > /dev/null
  echo 0 > tracing_on
  lines=$(grep -c 'vfs_read' trace)
  case $tracer in
    nop) [ $lines = 0 ] || fail "traced without a tracer" ;;
    *) [ $lines -gt 0 ] || fail "$tracer saw no read" ;;
  esac
  echo > trace
  echo 1 > tracing_on
  echo "@tracer $tracer"
done
if [ -e kprobe_events ]; then
  echo 'p:entered vfs_read' > kprobe_events && echo 'r:returned vfs_read' >> kprobe_events || fail "kprobes"
  for round in 1 2 3 4; do
    echo 1 > events/kprobes/enable
    dd if=/dev/zero of=/dev/null bs=1 count=3000 2>/dev/null
    echo 0 > events/kprobes/enable
    dd if=/dev/zero of=/dev/null bs=1 count=3000 2>/dev/null
  done
  echo "@kprobes begin"; cat kprobe_profile; echo "@kprobes end"
  echo > kprobe_events || fail "kprobes stay"
else
  echo "@skip kprobes"
fi
if [ -e events/enable ]; then
  # Thousands of branches are patched in and out.
  for round in 1 2; do echo 1 > events/enable; cat /proc/version > /dev/null; echo 0 > events/enable; done
  echo "@events done"
else
  echo "@skip events"
fi
"#;

#[test]
fn kernel_that_writes_its_own_code_runs_what_it_wrote() {
    ensure("shell");
    let folder = tempfile::tempdir().unwrap();
    let extra = archive(&["bpf"], folder.path());
    let seed = nonce() % 1_000_000_000;
    println!("bpf {seed}");
    let script = format!("seed={seed}\n{KERNEL}\necho '@dmesg begin'; dmesg -r; echo '@dmesg end'; exit 21");
    let mut command = ringfence();
    command.args(["run", "--timeout", "400", "--initrd"]).arg(extra.path()).args(["--", "sh", "-c", &script]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(400));
    let text = session.text();
    assert_eq!(session.status, Some(21), "{text}");
    let tagged = |tag: &str| session.lines.iter().filter(|line| line.text.starts_with(tag)).count();
    for line in session.lines.iter().filter(|line| line.text.starts_with("@skip")) {
        println!("{}", line.text);
    }
    assert_eq!(tagged("@fail"), 0, "{text}");
    assert_eq!(session.value("modules").0, "done", "{text}");

    let bpf = session.value("bpf").0;
    if let Some(reason) = bpf.strip_prefix("none: ") {
        println!("skipped: the guest's kernel loads no BPF programs: {reason}");
    } else {
        let counts: Vec<&str> = bpf.split_whitespace().collect();
        assert!(counts.len() == 3 && counts[0] == "1500", "{text}");
        if session.value("compiler").0 == "1" {
            assert_eq!(counts[1], "1500", "all were compiled: {text}");
        } else {
            println!("skipped: the guest's kernel interprets BPF programs");
        }
    }
    if tagged("@skip kprobes") + tagged("@skip tracing") == 0 {
        let probes = session.section("kprobes");
        let fields: Vec<Vec<&str>> = probes.iter().map(|line| line.split_whitespace().collect()).collect();
        let hits: Vec<u64> = fields.iter().map(|line| line[1].parse().unwrap()).collect();
        // What is read while the probes are off is not counted; the programs themselves read a little.
        let exact = 4 * 3000..4 * 3000 + 200;
        assert!(hits.len() == 2 && hits.iter().all(|hits| exact.contains(hits)), "{probes:?}\n{text}");
    }
    // Switching all events on prints advice at a level of its own.
    let errors = errors(&session.section("dmesg"));
    let errors: Vec<_> = errors.iter().filter(|line| !line.contains("Scheduler tracepoints")).collect();
    assert!(errors.is_empty(), "the kernel complains: {errors:#?}");
}
