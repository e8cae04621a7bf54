//! What `-v` tells on standard error.

use std::time::{Duration, Instant};

use ringfence_machine::console::ConsoleOutput;
use ringfence_machine::{ByteSize, Machine, MachineError, MachineSpec};

use crate::terminal::tell;

fn say(text: impl AsRef<str>) {
    tell(&format!("ringfence: {}", text.as_ref()));
}

/// Before the start.
pub(crate) fn beginning(machine: &Machine, spec: &MachineSpec) {
    let engine = machine.engine();
    say(format!("engine {} ({})", engine.engine, engine.reason));
    let clock = machine.clock();
    say(format!(
        "{} vCPU, model {}, {} of memory, clock {:?}, TSC {} MHz",
        spec.cpus,
        spec.cpu,
        ByteSize(spec.memory),
        clock.mode(),
        clock.tsc_khz() / 1000
    ));
    say(machine.boot_plan().to_string());
    say(format!("kernel command line: {}", spec.boot.command_line));
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// After the end. `start` is when the machine started to run, `assembly` how long it took to get there.
pub(crate) fn end(
    machine: &Machine,
    output: Option<&ConsoleOutput>,
    start: Instant,
    assembly: Duration,
) -> Result<(), MachineError> {
    say(format!(
        "assembled in {}, ran {}, guest time {}",
        seconds(assembly),
        seconds(machine.run_time()),
        seconds(Duration::from_nanos(machine.clock().now().0))
    ));
    if let Some(output) = output {
        let marks = output.marks();
        let after = |mark: Option<Instant>| {
            mark.map_or("never".to_owned(), |mark| seconds(mark.saturating_duration_since(start)))
        };
        say(format!(
            "first output after {}, shell prompt after {}; {} bytes of output",
            after(marks.first_output),
            after(marks.prompt),
            marks.bytes
        ));
    }
    for (index, vcpu) in machine.statistics()?.iter().enumerate() {
        let busy = vcpu.cpu_time.as_secs_f64().max(1e-9);
        let mips = vcpu.instructions as f64 / busy / 1e6;
        say(format!(
            "vCPU {index}: {} instructions in {} of processor time, {mips:.1} MIPS",
            vcpu.instructions,
            seconds(vcpu.cpu_time)
        ));
        for (name, value) in &vcpu.counters {
            say(format!("  {name}: {value}"));
        }
    }
    if let Some(memory) = machine.memory_use() {
        say(format!(
            "memory: {} touched by the guest, {} beyond that",
            ByteSize(memory.guest),
            ByteSize(memory.overhead)
        ));
    }
    Ok(())
}
