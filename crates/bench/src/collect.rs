//! Running a side: its output read line by line as it comes.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// A line of a side's output.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) text: String,
    /// Seconds since the side was started.
    pub(crate) at: f64,
    /// Processor seconds that the process has taken so far, where known.
    pub(crate) processor: Option<f64>,
}

/// How a side ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Why it was ended by us.
    pub(crate) late: Option<String>,
    /// What to say if that was too early.
    pub(crate) early: String,
}

/// Runs a command to its end, for `limit` at most; `take` gets its standard output.
pub(crate) fn run(
    mut command: Command,
    limit: Duration,
    mut take: impl FnMut(&Line),
) -> std::io::Result<Ended> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (send, lines) = channel();
    let pid = child.id();
    if let Some(out) = child.stdout.take() {
        thread::spawn(move || {
            for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
                let text = String::from_utf8_lossy(&line).into_owned();
                let (at, processor) = (start.elapsed().as_secs_f64(), processor_seconds(pid));
                if send.send(Line { text, at, processor }).is_err() {
                    return;
                }
            }
        });
    }
    let errors = child.stderr.take().map(|mut err| {
        thread::spawn(move || {
            let mut text = Vec::new();
            // What could not be read is missing in a message only.
            let _ = err.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    });
    let mut late = None;
    let mut last = String::new();
    loop {
        match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(line) => {
                take(&line);
                if !line.text.trim().is_empty() {
                    last = line.text.trim().to_owned();
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                late = Some(format!("did not end within {} s", limit.as_secs()));
                child.kill()?;
                break;
            }
        }
    }
    let status = child.wait()?;
    // One that was ended may have left others with its standard error.
    let errors = errors.filter(|_| late.is_none()).and_then(|thread| thread.join().ok()).unwrap_or_default();
    let said = errors.trim().lines().last().map_or(last, str::to_owned);
    Ok(Ended { late, early: format!("ended too early ({status}); its last words: {said:?}") })
}

/// Processor seconds that a process has taken so far, all threads together: proc_pid_stat(5), fields 14 and 15.
fn processor_seconds(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name before may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    let field = |index: usize| rest.split_whitespace().nth(index)?.parse::<u64>().ok();
    let ticks = field(11)? + field(12)?;
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}
