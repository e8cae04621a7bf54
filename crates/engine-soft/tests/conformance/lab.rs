//! What conformance guests run in: 16 MiB of memory, descriptor tables, page tables, exception handlers that keep a log, and
//! a bus with one echo device.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use iced_x86::code_asm::{CodeAssembler, *};
use ringfence_engine::{
    Bus, ClockMode, CpuState, Engine, Placement, TimerQueue, VirtualClock, VmConfig, VmExit,
};
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::cpuid::{CpuidTable, Mitigations, Model, Platform};
use ringfence_x86::segment::{DescriptorTable, Segment, Selector};

pub(crate) const CODE: u64 = 0x1_0000;
pub(crate) const HANDLERS: u64 = 0x2_0000;
pub(crate) const STACK: u64 = 0x8_0000;
pub(crate) const RING0_STACK: u64 = 0x9_0000;
pub(crate) const DATA: u64 = 0x10_0000;
/// The handlers count exceptions here and log vector, error code, RIP and CR2, 32 bytes each, behind.
pub(crate) const LOG: u64 = 0x20_0000;
pub(crate) const GDT: u64 = 0x3000;
pub(crate) const IDT: u64 = 0x4000;
pub(crate) const TSS: u64 = 0x5000;
pub(crate) const PML4: u64 = 0x6000;

pub(crate) const KERNEL_CODE: u16 = 0x08;
pub(crate) const KERNEL_DATA: u16 = 0x10;
pub(crate) const USER_DATA: u16 = 0x1b;
pub(crate) const USER_CODE: u16 = 0x23;
pub(crate) const CODE_32: u16 = 0x28;
pub(crate) const TASK: u16 = 0x38;

/// How a guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// 64-bit mode, ring 0, identity-mapped.
    Long,
    /// Real mode at 0:CODE's paragraph.
    Real,
    /// 32-bit protected mode, ring 0, unpaged.
    Protected,
}

/// A program.
pub(crate) struct Guest {
    pub(crate) start: Start,
    pub(crate) code: Vec<u8>,
    /// Memory besides the code.
    pub(crate) data: Vec<(u64, Vec<u8>)>,
    /// Changes to the state at the start.
    pub(crate) prepare: fn(&mut CpuState),
}

impl Guest {
    pub(crate) fn new(
        start: Start,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> Self {
        let bits = match start {
            Start::Long => 64,
            Start::Protected => 32,
            Start::Real => 16,
        };
        let mut assembler = CodeAssembler::new(bits).unwrap();
        write(&mut assembler).unwrap();
        let origin = if start == Start::Real { 0 } else { CODE };
        Self { start, code: assembler.assemble(origin).unwrap(), data: Vec::new(), prepare: |_| {} }
    }

    pub(crate) fn with(mut self, at: u64, bytes: &[u8]) -> Self {
        self.data.push((at, bytes.to_vec()));
        self
    }
}

/// One exception that a handler saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Logged {
    pub(crate) vector: u64,
    pub(crate) error_code: u64,
    pub(crate) rip: u64,
    pub cr2: u64,
}

/// What came of a guest.
pub(crate) struct Report {
    pub(crate) exit: VmExit,
    pub(crate) state: CpuState,
    pub(crate) log: Vec<Logged>,
    pub(crate) ports: Vec<(u16, Vec<u8>)>,
    pub(crate) instructions: u64,
    memory: Arc<GuestMemory>,
}

impl Report {
    pub(crate) fn reg(&self, register: ringfence_x86::Gpr) -> u64 {
        self.state.gpr[register as usize]
    }

    pub(crate) fn rax(&self) -> u64 {
        self.state.gpr[0]
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        self.memory.read(GuestAddress(at)).unwrap()
    }

    /// Demands that the guest came to its HLT, with these exceptions on the way.
    pub(crate) fn halted_with(&self, exceptions: &[(u64, u64)]) {
        assert_eq!(self.exit, VmExit::HaltedForGood, "rip {:#x}, log {:x?}", self.state.rip, self.log);
        let seen: Vec<_> = self.log.iter().map(|l| (l.vector, l.error_code)).collect();
        assert_eq!(seen, exceptions, "{:x?}", self.log);
    }
}

/// Ports: 0x500 gives back the last value written there plus one; all writes are logged.
#[derive(Default)]
struct LabBus {
    echo: AtomicU32,
    writes: Mutex<Vec<(u16, Vec<u8>)>>,
    chips: Mutex<Vec<Placement>>,
}

impl LabBus {
    fn chip(&self, space: ringfence_engine::AddressSpace, address: u64) -> Option<(Placement, u64)> {
        let chips = self.chips.lock().unwrap();
        let found = chips.iter().find(|p| p.space == space && p.range.contains(GuestAddress(address), 1))?;
        Some((found.clone(), address - found.range.start.0))
    }
}

impl Bus for LabBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        if let Some((chip, offset)) = self.chip(ringfence_engine::AddressSpace::Port, u64::from(port)) {
            return chip.device.read(offset, data);
        }
        if port == 0x500 {
            let value = self.echo.load(Ordering::Relaxed).wrapping_add(1).to_le_bytes();
            data.copy_from_slice(&value[..data.len()]);
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        if let Some((chip, offset)) = self.chip(ringfence_engine::AddressSpace::Port, u64::from(port)) {
            return chip.device.write(offset, data);
        }
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        self.echo.store(u32::from_le_bytes(value), Ordering::Relaxed);
        self.writes.lock().unwrap().push((port, data.to_vec()));
    }

    fn memory_read(&self, address: GuestAddress, data: &mut [u8]) {
        if let Some((chip, offset)) = self.chip(ringfence_engine::AddressSpace::Memory, address.0) {
            chip.device.read(offset, data);
        }
    }

    fn memory_write(&self, address: GuestAddress, data: &[u8]) {
        if let Some((chip, offset)) = self.chip(ringfence_engine::AddressSpace::Memory, address.0) {
            chip.device.write(offset, data);
        }
    }
}

/// The host's CPU model, as a machine in counted mode has it.
fn cpuid() -> CpuidTable {
    let platform = Platform {
        cpus: 1,
        tsc_khz: VirtualClock::COUNTED_TSC_KHZ,
        apic_khz: 1_000_000,
        physical_bits: 40,
        mitigations: Mitigations::default(),
    };
    Model::Host.table(ringfence_engine_soft::host_cpuid(), &platform).unwrap()
}

/// Runs guests on one engine.
pub(crate) struct Lab<'a> {
    engine: &'a dyn Engine,
}

impl<'a> Lab<'a> {
    pub(crate) fn new(engine: &'a dyn Engine) -> Self {
        Self { engine }
    }

    pub(crate) fn run(&self, guest: &Guest) -> Report {
        let memory = Arc::new(GuestMemory::flat(16 << 20).unwrap());
        let write = |at, bytes: &[u8]| memory.write_bytes(GuestAddress(at), bytes).unwrap();
        tables(&memory);
        write(HANDLERS, &handlers());
        write(CODE, &guest.code);
        for (at, bytes) in &guest.data {
            write(*at, bytes);
        }
        let clock = Arc::new(VirtualClock::new(ClockMode::Counted, 0));
        let bus = Arc::new(LabBus::default());
        let vm = self
            .engine
            .create_vm(VmConfig {
                memory: Arc::clone(&memory),
                clock,
                timers: Arc::new(TimerQueue::default()),
                cpuid: Arc::new(cpuid()),
                cpus: 1,
            })
            .unwrap();
        *bus.chips.lock().unwrap() = vm.placements();
        let mut vcpu = vm.create_vcpu(0, Arc::clone(&bus) as _).unwrap();
        let mut state = vcpu.state();
        enter(&mut state, guest.start);
        (guest.prepare)(&mut state);
        vcpu.set_state(&state).unwrap();
        // A guest that never ends is stopped from outside, and fails its check.
        let kick = vcpu.kick();
        let (done, ended) = std::sync::mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            if ended.recv_timeout(std::time::Duration::from_secs(10)).is_err() {
                kick.kick();
            }
        });
        let exit = vcpu.run();
        let _ = done.send(());
        watchdog.join().unwrap();
        let count: u64 = memory.read(GuestAddress(LOG)).unwrap();
        let field = |i: u64, n: u64| memory.read(GuestAddress(LOG + 32 * (i + 1) + 8 * n)).unwrap();
        let log = (0..count.min(64))
            .map(|i| Logged {
                vector: field(i, 0),
                error_code: field(i, 1),
                rip: field(i, 2),
                cr2: field(i, 3),
            })
            .collect();
        let ports = bus.writes.lock().unwrap().clone();
        Report { exit, state: vcpu.state(), log, ports, instructions: vcpu.instructions(), memory }
    }
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector: Selector(selector), base: 0, limit: 0xffff_ffff, attributes }
}

fn enter(state: &mut CpuState, start: Start) {
    state.gdtr = DescriptorTable { base: GDT, limit: 0xff };
    state.gpr[4] = STACK;
    state.rflags = 2;
    if start == Start::Real {
        state.idtr = DescriptorTable { base: 0, limit: 0x3ff };
        state.segments = [Segment::real_mode(0); 6];
        state.segments[1] = Segment { attributes: 0x9b, ..Segment::real_mode((CODE >> 4) as u16) };
        state.segments[3] = Segment::real_mode((DATA >> 8) as u16);
        state.gpr[4] = 0xf000;
        state.rip = 0;
        return;
    }
    let data = flat(KERNEL_DATA, 0xc093);
    state.segments = [data; 6];
    state.segments[1] = flat(KERNEL_CODE, 0xa09b);
    state.rip = CODE;
    state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    if start == Start::Protected {
        state.segments[1] = flat(CODE_32, 0xc09b);
        state.idtr.limit = 0;
        state.cr0 = 0x31;
        return;
    }
    state.cr0 = 0x8005_0033;
    state.cr3 = PML4;
    state.cr4 = 0x620;
    state.efer = 0xd01;
    state.tr = Segment { selector: Selector(TASK), base: TSS, limit: 0x67, attributes: 0x8b };
}

/// GDT, TSS, IDT, page tables: linear addresses 0 to 1 GiB are physical, open to user code.
fn tables(memory: &GuestMemory) {
    let put = |at, value: u64| memory.write(GuestAddress(at), value).unwrap();
    let descriptors: [u64; 9] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x008f_9b00_0000_ffff,
        0x0000_8900_0000_0067 | TSS << 16,
        0,
    ];
    for (i, descriptor) in (0..).zip(descriptors) {
        put(GDT + 8 * i, descriptor);
    }
    put(TSS + 4, RING0_STACK);
    for vector in 0..256_u64 {
        let handler = HANDLERS + 16 * vector;
        let low =
            handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        put(IDT + 16 * vector, low);
        put(IDT + 16 * vector + 8, handler >> 32);
    }
    put(PML4, 0x7007);
    put(0x7000, 0x8007);
    for i in 0..512 {
        put(0x8000 + 8 * i, i << 21 | 0x87);
    }
}

/// The handlers: each logs, then resumes at the address in [`DATA`] - 8 if that is not zero, else halts.
fn handlers() -> Vec<u8> {
    const WITH_CODE: [u64; 7] = [8, 10, 11, 12, 13, 14, 17];
    let mut bytes = vec![0x90; 16 * 256];
    let common = HANDLERS + 16 * 256;
    for vector in 0..256_u64 {
        let mut a = CodeAssembler::new(64).unwrap();
        if !WITH_CODE.contains(&vector) {
            a.push(0).unwrap();
        }
        a.push(vector as i32).unwrap();
        a.jmp(common).unwrap();
        let stub = a.assemble(HANDLERS + 16 * vector).unwrap();
        assert!(stub.len() <= 16);
        bytes[16 * vector as usize..][..stub.len()].copy_from_slice(&stub);
    }
    let mut a = CodeAssembler::new(64).unwrap();
    let write = |a: &mut CodeAssembler| -> Result<(), iced_x86::IcedError> {
        let mut stop = a.create_label();
        // Stack: rax, rbx saved; vector, error code, rip, …
        a.push(rax)?;
        a.push(rbx)?;
        a.mov(ebx, LOG as u32)?;
        a.inc(qword_ptr(rbx))?;
        a.mov(rax, qword_ptr(rbx))?;
        a.shl(rax, 5)?;
        a.add(rbx, rax)?;
        a.mov(rax, qword_ptr(rsp + 16))?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(rax, qword_ptr(rsp + 24))?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.mov(rax, qword_ptr(rsp + 32))?;
        a.mov(qword_ptr(rbx + 16), rax)?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(rbx + 24), rax)?;
        a.mov(ebx, (DATA - 8) as u32)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.test(rax, rax)?;
        a.jz(stop)?;
        a.mov(qword_ptr(rsp + 32), rax)?;
        a.pop(rbx)?;
        a.pop(rax)?;
        a.add(rsp, 16)?;
        a.iretq()?;
        a.set_label(&mut stop)?;
        a.pop(rbx)?;
        a.pop(rax)?;
        a.hlt()
    };
    write(&mut a).unwrap();
    bytes.extend(a.assemble(common).unwrap());
    bytes
}
