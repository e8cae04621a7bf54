//! The built-in image, additions to it, and what is expected of a boot.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

/// The longest that a boot to the first user program may take here, on a busy computer.
pub const BOOT: Duration = Duration::from_secs(240);

/// A number that no earlier run can have printed, small enough for every program's integers and floats.
pub fn nonce() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    (now ^ u64::from(std::process::id())).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 14
}

/// Numbers that no earlier run had, one after the other.
pub fn numbers() -> impl FnMut() -> u64 {
    let mut x = nonce() | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    }
}

/// Bytes that no earlier run had.
pub fn random_bytes(len: usize) -> Vec<u8> {
    let mut next = numbers();
    (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(len).collect()
}

/// As `sha256sum` prints it.
pub fn sha256(text: &str) -> String {
    sha256_of(text.as_bytes())
}

/// The same of any bytes.
pub fn sha256_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fetches an image unless it is there. Without it no test means anything, so that failing is an error.
pub fn ensure(name: &str) {
    let output = super::ringfence().args(["image", "ls", "--format", "json"]).output().expect("it runs");
    let images: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a listing");
    let here = images.as_array().expect("a list").iter().any(|i| i["name"] == name && !i["cached"].is_null());
    if !here {
        let status = super::ringfence().args(["image", "pull", name]).status().expect("it runs");
        assert!(status.success(), "the image {name} cannot be fetched");
    }
}

/// The path of a file of an image on disk: `kernel` or `initrd`.
pub fn path(name: &str, part: &str) -> String {
    let output = super::ringfence().args(["image", "ls", "--format", "json"]).output().expect("it runs");
    let images: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a listing");
    let image =
        images.as_array().expect("a list").iter().find(|image| image["name"] == name).expect("listed");
    image["cached"][part].as_str().expect("on disk").to_owned()
}

/// Builds a guest program from `tests/guest_programs` into `folder`, as a static program.
pub fn program(name: &str, folder: &Path) -> std::path::PathBuf {
    let source =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest_programs").join(name).with_extension("rs");
    let program = folder.join(name);
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(rustc)
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols"])
        .args(["-C", "panic=abort", "-C", "relocation-model=static"])
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .status()
        .expect("a compiler");
    assert!(status.success(), "{source:?} does not compile");
    program
}

/// Kernel messages that tell of a machine that is not right.
const COMPLAINTS: [&str; 17] = [
    "WARNING:",
    "BUG:",
    "Call Trace",
    "soft lockup",
    "rcu_sched",
    "nobody cared",
    "unstable",
    "calibration failed",
    "Firmware Bug",
    "FW BUG",
    "ACPI Error",
    "ACPI BIOS Error",
    "timer doesn't work",
    "Unable to",
    "segfault",
    "rejected",
    "unchecked MSR",
];

/// Lines of `dmesg -r` that are errors by their level, or complaints by their words.
pub fn errors<'a>(dmesg: &[&'a str]) -> Vec<&'a str> {
    let level =
        |line: &str| line.strip_prefix('<').and_then(|rest| rest.split('>').next()?.parse::<u32>().ok());
    let bad = |line: &&&str| {
        let severe = level(line).is_some_and(|level| level & 7 <= 3);
        severe || COMPLAINTS.iter().any(|words| line.contains(words))
    };
    dmesg.iter().filter(bad).copied().collect()
}

/// A line of a guest's output, and when it came.
#[derive(Debug)]
pub struct Line {
    pub text: String,
    pub at: SystemTime,
}

/// A run whose output was read line by line.
#[derive(Debug)]
pub struct Session {
    pub status: Option<i32>,
    pub lines: Vec<Line>,
    pub err: String,
}

impl Session {
    /// Runs to the end, at most for `limit`.
    #[track_caller]
    pub fn run(command: &mut Command, limit: Duration) -> Self {
        let mut child: Child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let mut err = child.stderr.take().expect("piped");
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = std::io::Read::read_to_end(&mut err, &mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a pid");
        let (done, ended) = std::sync::mpsc::channel::<()>();
        let guard = std::thread::spawn(move || {
            if ended.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        });
        let mut lines = Vec::new();
        for line in out.split(b'\n') {
            let line = line.expect("the pipe is readable");
            let text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            lines.push(Line { text, at: SystemTime::now() });
        }
        let status = child.wait().expect("the child is ours").code();
        drop(done);
        guard.join().expect("the guard ends");
        Self { status, lines, err: errors.join().expect("read") }
    }

    /// Everything it printed, to show when a check fails.
    pub fn text(&self) -> String {
        let lines: Vec<&str> = self.lines.iter().map(|line| line.text.as_str()).collect();
        format!("status {:?}\n{}\nstandard error:\n{}", self.status, lines.join("\n"), self.err)
    }

    /// What follows `@name ` on the first line that starts so, and when it came.
    #[track_caller]
    pub fn value(&self, name: &str) -> (&str, SystemTime) {
        let prefix = format!("@{name} ");
        let found = self.lines.iter().find_map(|line| Some((line.text.strip_prefix(&prefix)?, line.at)));
        found.unwrap_or_else(|| panic!("the guest printed no {prefix:?}:\n{}", self.text()))
    }

    /// The lines between `@name begin` and `@name end`.
    #[track_caller]
    pub fn section(&self, name: &str) -> Vec<&str> {
        let (begin, end) = (format!("@{name} begin"), format!("@{name} end"));
        let from_begin = self.lines.iter().map(|line| line.text.as_str()).skip_while(|line| *line != begin);
        let section: Vec<&str> = from_begin.skip(1).take_while(|line| *line != end).collect();
        assert!(!section.is_empty(), "the guest printed no section {name}:\n{}", self.text());
        section
    }
}

/// Waits until the moment, for checks of idle time.
pub fn until(moment: Instant) {
    std::thread::sleep(moment.saturating_duration_since(Instant::now()));
}
