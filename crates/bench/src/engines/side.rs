//! A side of the comparison: how it is started, and what it says.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::transcript::Transcript;
use crate::collect;
use crate::root::Prepared;
use crate::root::native::Native;
use crate::sides::Ringfence;

/// Who executes the programs.
#[derive(Debug, Clone)]
pub(crate) enum Side {
    Native(Native),
    Qemu { program: PathBuf, cpu: String },
    Ringfence(Ringfence),
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
            Self::Ringfence(ringfence) => ringfence.name(),
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
            Self::Ringfence(Ringfence { program, engine, cpu }) => {
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

/// Runs a command to its end and reads its output as a transcript; of a guest with the processor time so far.
fn collect(command: Command, is_guest: bool, limit: Duration) -> std::io::Result<Round> {
    let mut transcript = Transcript::default();
    let ended = collect::run(command, limit, |line| {
        transcript.line(&line.text, line.at, line.processor.filter(|_| is_guest));
    })?;
    let failure = ended.late.or_else(|| (!transcript.complete()).then_some(ended.early));
    Ok(Round { transcript, failure })
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
