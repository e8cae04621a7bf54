//! What fuzz targets share: for the software engine a vCPU in memory of its own, with arbitrary bytes as code; for disks an
//! image.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use ringfence_engine::{Bus, ClockMode, VirtualClock};
use ringfence_engine_soft::code::CodeMap;
use ringfence_engine_soft::host_cpuid;
use ringfence_engine_soft::interp::cpu::{Connections, Cpu};
use ringfence_engine_soft::interp::run::Interpreter;
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::cpuid::{Mitigations, Model, Platform};

/// Where code is.
pub const CODE: u64 = 0x1_0000;
/// Where its page tables are, three pages.
pub const TABLES: u64 = 0x4000;

struct NoDevices;

impl Bus for NoDevices {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn memory_read(&self, _: GuestAddress, _: &mut [u8]) {}
    fn memory_write(&self, _: GuestAddress, _: &[u8]) {}
}

fn machine() -> Interpreter {
    let memory = Arc::new(GuestMemory::flat(1 << 20).expect("1 MiB of memory"));
    let platform = Platform {
        cpus: 1,
        tsc_khz: VirtualClock::COUNTED_TSC_KHZ,
        apic_khz: 1_000_000,
        physical_bits: 40,
        mitigations: Mitigations::default(),
    };
    let cpuid = Model::Host.table(host_cpuid(), &platform).expect("the host runs its own model");
    let connections = Connections {
        code: CodeMap::new(Arc::clone(&memory)),
        memory,
        bus: Arc::new(NoDevices),
        clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
        cpuid: Arc::new(cpuid),
    };
    Interpreter::new(Cpu::new(connections).expect("memory for translated vector instructions"))
}

/// Bytes of an input before its code.
pub const HEADER: usize = 17;

/// A vCPU that is about to execute `code`, in the mode and with the registers that the header tells: one byte of options,
/// sixteen bytes that registers are made from. `None` if no CPU can be in that state.
pub fn guest(header: &[u8], code: &[u8]) -> Option<Interpreter> {
    let mut machine = machine();
    let memory = Arc::clone(&machine.cpu.memory);
    memory.write_bytes(GuestAddress(CODE), &code[..code.len().min(4096)]).expect("the code fits");
    // Linear 0 to 2 MiB is physical, open to user code; a GDT of flat segments lies at 0x3000.
    for (at, entry) in
        [(TABLES, TABLES + 0x1007), (TABLES + 0x1000, TABLES + 0x2007), (TABLES + 0x2000, 0x87)]
    {
        memory.write(GuestAddress(at), entry).expect("the tables fit");
    }
    for (i, entry) in
        [0_u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_fb00_0000_ffff].iter().enumerate()
    {
        memory.write(GuestAddress(0x3000 + 8 * i as u64), *entry).expect("the table fits");
    }
    let mut state = machine.cpu.save_state();
    let options = header[0];
    for (i, register) in state.gpr.iter_mut().enumerate() {
        // Small addresses, so that accesses hit memory more often than not.
        let byte = u64::from(header[1 + i]);
        *register = if options & 0x80 != 0 { byte.wrapping_mul(0x0101_0101_0101_0101) } else { byte << 8 };
    }
    state.gdtr.base = 0x3000;
    for segment in &mut state.segments {
        segment.limit = u32::MAX;
        segment.attributes = 0xc093;
    }
    state.segments[1].base = 0;
    state.segments[1].attributes = [0xa09b, 0xc09b, 0x809b, 0xa09b][usize::from(options & 3)];
    state.rip = CODE;
    if options & 3 != 2 || options & 4 != 0 {
        state.cr0 |= 1;
    }
    if options & 3 == 0 || options & 3 == 3 {
        state.cr0 |= 0x8001_0001;
        state.cr3 = TABLES;
        state.cr4 = 0x6_0620;
        state.efer = 0x501;
        state.xcr0 = 7;
    }
    if machine.cpu.load_state(&state).is_err() {
        return None;
    }
    if options & 3 == 3 {
        machine.cpu.set_cpl(3);
    }
    Some(machine)
}

/// Notes that a device has worked on the guest's memory `count` times, and says what each has done so far whenever the number of runs
/// has doubled: `.ci/fuzz` shows the last of it.
pub fn note_transfers(device: &'static str, count: u64) {
    static SO_FAR: Mutex<(u64, BTreeMap<&str, u64>)> = Mutex::new((0, BTreeMap::new()));
    let mut so_far = SO_FAR.lock().expect("nobody panics here and goes on");
    let (runs, devices) = &mut *so_far;
    *runs += 1;
    *devices.entry(device).or_default() += count;
    if runs.is_power_of_two() {
        let list: Vec<String> = devices.iter().map(|(device, count)| format!("{device} {count}")).collect();
        eprintln!("DMA after {runs} runs: {}", list.join(", "));
    }
}

/// Sees to it that a peer that has gone makes a write fail, as in a Rust program, and does not end the process: the fuzzer's
/// `main` is not Rust's, which is what ignores SIGPIPE.
pub fn survive_lost_peers() {
    static IGNORED: OnceLock<()> = OnceLock::new();
    IGNORED.get_or_init(|| {
        let noted = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, noted).expect("SIGPIPE can be caught");
    });
}

/// A folder for what guests do to a host's files, and for sockets.
pub fn place() -> &'static Path {
    static PLACE: OnceLock<tempfile::TempDir> = OnceLock::new();
    PLACE.get_or_init(|| tempfile::tempdir().expect("a temporary folder can be made")).path()
}

/// An unlinked file of 128 KiB that keeps what the guests before have written.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<(File, PathBuf)> = OnceLock::new();
    let (_, path) = IMAGE.get_or_init(|| {
        let file = tempfile::tempfile().expect("a temporary file can be made");
        file.set_len(128 << 10).expect("it can have 128 KiB");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        (file, path)
    });
    path
}
