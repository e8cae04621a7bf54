//! A side of the comparison: how it is started, and how its output is collected.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::native::Native;
use super::prepare::Prepared;
use super::transcript::Transcript;

/// Who executes the programs.
#[derive(Debug, Clone)]
pub(crate) enum Side {
    Native(Native),
    Qemu { program: PathBuf, cpu: String },
    Ringfence { program: PathBuf, engine: String, cpu: String },
}

/// What became of a side in one round.
#[derive(Debug, Clone, Default)]
pub(crate) struct Round {
    pub(crate) transcript: Transcript,
    /// Why it did not run to its end.
    pub(crate) failure: Option<String>,
}

impl Side {
    /// Its name in reports.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Native(_) => "native".to_owned(),
            Self::Qemu { .. } => "qemu".to_owned(),
            Self::Ringfence { engine, .. } if engine == "jit" => "ringfence".to_owned(),
            Self::Ringfence { engine, .. } => format!("ringfence-{engine}"),
        }
    }

    pub(crate) fn is_guest(&self) -> bool {
        !matches!(self, Self::Native(_))
    }

    /// The command that runs `words` on this side and ends with it. Guests get one vCPU and `memory` MiB.
    fn command(&self, prepared: &Prepared, words: &[String], memory: u32) -> Result<Command, String> {
        let append = || -> Result<String, String> {
            let word = ringfence_images::command_word(words).map_err(|error| error.to_string())?;
            Ok(format!("{} quiet panic=-1 {word}", prepared.append))
        };
        // Both write a comma in a file's name twice.
        let disk = prepared.disk.display().to_string().replace(',', ",,");
        Ok(match self {
            Self::Native(native) => native.command(&words.iter().map(String::as_str).collect::<Vec<_>>()),
            Self::Qemu { program, cpu } => {
                let mut command = Command::new(program);
                command.args([
                    "-accel",
                    "tcg,thread=single",
                    "-cpu",
                    cpu,
                    "-smp",
                    "1",
                    "-m",
                    &memory.to_string(),
                ]);
                command.args(["-nodefaults", "-display", "none", "-monitor", "none", "-serial", "stdio"]);
                command.args(["-no-reboot", "-kernel"]).arg(&prepared.kernel).args(["-append", &append()?]);
                command.args(["-drive", &format!("file={disk},format=raw,if=none,id=root,snapshot=on")]);
                command.args(["-device", "nvme,drive=root,serial=root"]);
                command
            }
            Self::Ringfence { program, engine, cpu } => {
                let mut command = Command::new(program);
                command.args([
                    "run",
                    "--engine",
                    engine,
                    "--cpu",
                    cpu,
                    "--memory",
                    &format!("{memory}M"),
                    "--no-reboot",
                ]);
                command.arg("--kernel").arg(&prepared.kernel).args(["--append", &append()?]);
                command.args(["--disk", &format!("{disk},bus=nvme,ephemeral")]);
                command
            }
        })
    }

    /// Runs `words` on this side, at most for `limit`.
    pub(crate) fn run(&self, prepared: &Prepared, words: &[String], memory: u32, limit: Duration) -> Round {
        let failed = |failure: String| Round { transcript: Transcript::default(), failure: Some(failure) };
        match self.command(prepared, words, memory) {
            Ok(command) => collect(command, self.is_guest(), limit)
                .unwrap_or_else(|error| failed(format!("cannot be started: {error}"))),
            Err(reason) => failed(reason),
        }
    }
}

/// Runs a command to its end, its output read as it comes; of a guest with the processor time so far.
fn collect(mut command: Command, is_guest: bool, limit: Duration) -> std::io::Result<Round> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (send, lines) = channel();
    let pid = child.id();
    if let Some(out) = child.stdout.take() {
        thread::spawn(move || {
            for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
                let at = start.elapsed().as_secs_f64();
                let processor = if is_guest { processor_seconds(pid) } else { None };
                if send.send((String::from_utf8_lossy(&line).into_owned(), at, processor)).is_err() {
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
    let mut round = Round::default();
    let mut last = String::new();
    loop {
        match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok((line, at, processor)) => {
                round.transcript.line(&line, at, processor);
                if !line.trim().is_empty() {
                    last = line.trim().to_owned();
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                round.failure = Some(format!("did not end within {} s", limit.as_secs()));
                child.kill()?;
                break;
            }
        }
    }
    let status = child.wait()?;
    if round.failure.is_none() && !round.transcript.complete() {
        let errors = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
        let said = errors.trim().lines().last().map_or(last, str::to_owned);
        round.failure = Some(format!("ended too early ({status}); its last words: {said:?}"));
    }
    Ok(round)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: u64) -> Round {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        collect(command, true, Duration::from_secs(limit)).expect("starts")
    }

    #[test]
    fn output_is_collected_to_its_end() {
        let round = shell("echo @begin 1; echo @program x; echo @time 0.5 0; echo @end 2; sleep 1", 60);
        assert_eq!((round.failure, round.transcript.programs["x"].seconds.as_slice()), (None, &[0.5][..]));
        assert!(round.transcript.boot_processor.is_some());
    }

    #[test]
    fn early_and_late_ends_give_reasons() {
        let early = shell("echo @begin 1; echo oh no >&2; exit 3", 60).failure.expect("failed");
        assert!(early.contains("exit status: 3") && early.contains("oh no"), "{early}");
        let late = shell("exec sleep 60", 1).failure.expect("failed");
        assert!(late.contains("within 1 s"), "{late}");
    }
}
