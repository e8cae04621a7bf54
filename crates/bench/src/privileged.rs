//! What changes of privilege, exceptions and privileged instructions cost: a guest of a few hundred bytes does one of them a million
//! times, at CPL 3 or CPL 0, on a vCPU as machines have it.

mod cases;

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use ringfence_engine::{
    Activity, ClockMode, CpuState, Engine, EngineError, TimerQueue, Vcpu, VirtualClock, VmConfig, VmExit,
};
use ringfence_engine_soft::engine::{InterpreterEngine, JitEngine};
use ringfence_engine_soft::jit::Options;
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::cpuid::{CpuidTable, MissingFeatures, Mitigations, Model, Platform};
use ringfence_x86::msr;
use ringfence_x86::segment::{DescriptorTable, Segment, Selector};

use crate::interpreter::NoDevices;
use cases::{Case, Code, X2APIC_ENABLED, X2APIC_SPURIOUS, cases};

/// What to measure, and how.
#[derive(Debug, Args)]
pub(crate) struct PrivilegedArguments {
    /// Only what has this in its name.
    #[arg(long, default_value = "")]
    only: String,
    /// How often each is measured; the least and the median are told.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Times each in a round.
    #[arg(long, default_value_t = 500_000)]
    count: u32,
    /// By the interpreter.
    #[arg(long)]
    interpreter: bool,
}

/// Why it could not be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivilegedError {
    /// A program is wrong.
    #[error("cannot assemble a guest program")]
    Assemble(#[from] IcedError),
    /// The engine does not work on this host.
    #[error("cannot make a vCPU")]
    Engine(#[from] EngineError),
    /// The host's CPU is none that guests can have.
    #[error("cannot describe the guest's CPU")]
    Model(#[from] MissingFeatures),
    /// A program did not come to its end.
    #[error(
        "the guest stopped by {exit:?} at {rip:#x} in \"{name}\"; this is a fault of the engine or of the benchmark"
    )]
    Stopped {
        /// Which.
        name: &'static str,
        /// How.
        exit: VmExit,
        /// Where.
        rip: u64,
    },
}

const GDT: u64 = 0x1000;
const TSS: u64 = 0x2000;
const IDT: u64 = 0x3000;
const TABLES: u64 = 0x4000;
/// The page table of [`WINDOW`].
const PAGES: u64 = TABLES + 0x3000;
const KERNEL_STACK: u64 = 0xa000;
const USER_STACK: u64 = 0xb000;
const MAIN: u64 = 0x1_0000;
const ENTRY: u64 = 0x1_1000;
const HANDLER: u64 = 0x1_2000;
/// Where the handler for the end is: a program has executed HLT.
const END: u64 = 0x1_3000;
/// 2 MiB of pages of 4 KiB, all of the same memory.
const WINDOW: u64 = 0x0100_0000;
const WINDOW_PAGES: u64 = 512;
const SHARED_PAGE: u64 = 0x20_0000;
/// An entry of a page table: present, writable, a program's.
const OPEN: u64 = 7;

const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_DATA: u16 = 0x20 | 3;
const USER_CODE: u16 = 0x28 | 3;
const TASK: u16 = 0x30;

/// The vector of interrupts from outside.
const INTERRUPT: u8 = 0x40;

fn assemble(address: u64, part: fn(&mut CodeAssembler) -> Code) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    part(&mut a)?;
    // Nobody gets here.
    a.hlt()?;
    a.assemble(address)
}

/// Does it RBX times, then HLT.
fn main_loop(case: &Case) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut again = a.create_label();
    if !case.user {
        a.mov(ecx, msr::APIC_BASE)?;
        a.rdmsr()?;
        a.or(eax, X2APIC_ENABLED)?;
        a.wrmsr()?;
        a.mov(ecx, X2APIC_SPURIOUS)?;
        a.mov(eax, 0x1ff)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.sti()?;
        a.nop()?;
    }
    a.set_label(&mut again)?;
    (case.once)(&mut a)?;
    a.dec(rbx)?;
    a.jne(again)?;
    if !case.user {
        a.cli()?;
    }
    a.hlt()?;
    a.assemble(MAIN)
}

fn memory(case: &Case) -> Result<Arc<GuestMemory>, PrivilegedError> {
    let memory = Arc::new(GuestMemory::flat(4 << 20).expect("a little memory"));
    let put = |at: u64, value: u64| memory.write(GuestAddress(at), value).expect("inside");
    let code = [
        (MAIN, main_loop(case)?),
        (ENTRY, assemble(ENTRY, case.entry)?),
        (HANDLER, assemble(HANDLER, case.handler)?),
        (END, assemble(END, |a| a.hlt())?),
    ];
    for (at, code) in code {
        memory.write_bytes(GuestAddress(at), &code).expect("inside");
    }
    let descriptors: [u64; 8] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8b00_0000_0067 | TSS << 16,
        0,
    ];
    for (i, descriptor) in (0..).zip(descriptors) {
        put(GDT + 8 * i, descriptor);
    }
    put(TSS + 4, KERNEL_STACK);
    for vector in 0..256 {
        let target = if vector == 13 { END } else { HANDLER };
        let low = target & 0xffff | u64::from(KERNEL_CODE) << 16 | 0xee00 << 32 | target >> 16 << 48;
        put(IDT + 16 * vector, low);
    }
    put(TABLES, (TABLES + 0x1000) | OPEN);
    put(TABLES + 0x1000, (TABLES + 0x2000) | OPEN);
    for large in 0..512 {
        let entry = if large == WINDOW >> 21 { PAGES | OPEN } else { large << 21 | OPEN | 1 << 7 };
        put(TABLES + 0x2000 + 8 * large, entry);
    }
    Ok(memory)
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector: Selector(selector), base: 0, limit: u32::MAX, attributes }
}

fn prepare(state: &mut CpuState, case: &Case) {
    let null = Segment { selector: Selector(0), base: 0, limit: 0, attributes: 0 };
    state.segments = [null; 6];
    (state.segments[1], state.segments[2], state.gpr[4]) = if case.user {
        (flat(USER_CODE, 0xa0fb), flat(USER_DATA, 0xc0f3), USER_STACK)
    } else {
        (flat(KERNEL_CODE, 0xa09b), flat(KERNEL_DATA, 0xc093), KERNEL_STACK)
    };
    state.gdtr = DescriptorTable { base: GDT, limit: 0x3f };
    state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    state.tr = Segment { selector: Selector(TASK), base: TSS, limit: 0x67, attributes: 0x8b };
    state.rip = MAIN;
    state.activity = Activity::Active;
    state.rflags = 2;
    state.cr0 = 0x8005_0033;
    state.cr3 = TABLES;
    state.cr4 = 0x2_0620;
    state.efer = 0xd01;
    let star = u64::from(KERNEL_CODE) << 32 | u64::from(0x18_u16 | 3) << 48;
    state.msrs.extend([(msr::STAR, star), (msr::LSTAR, ENTRY), (msr::FMASK, 0x700)]);
}

fn cpuid() -> Result<CpuidTable, MissingFeatures> {
    let platform = Platform {
        cpus: 1,
        tsc_khz: 1_000_000,
        apic_khz: 1_000_000,
        physical_bits: 40,
        mitigations: Mitigations::NotNeeded,
    };
    Model::Host.table(ringfence_engine_soft::host_cpuid(), &platform)
}

/// A vCPU at the start of a case.
fn vcpu(case: &Case, engine: &dyn Engine) -> Result<Box<dyn Vcpu>, PrivilegedError> {
    let vm = engine.create_vm(VmConfig {
        memory: memory(case)?,
        clock: Arc::new(VirtualClock::new(ClockMode::Host, 1_000_000)),
        timers: Arc::new(TimerQueue::default()),
        cpuid: Arc::new(cpuid()?),
        cpus: 1,
    })?;
    Ok(vm.create_vcpu(0, Arc::new(NoDevices))?)
}

/// Runs a case `count` times.
fn run(vcpu: &mut dyn Vcpu, case: &Case, count: u32) -> Result<Duration, PrivilegedError> {
    let mut state = vcpu.state();
    prepare(&mut state, case);
    state.gpr[3] = count.into();
    vcpu.set_state(&state)?;
    let start = Instant::now();
    let exit = vcpu.run();
    let time = start.elapsed();
    let state = vcpu.state();
    if exit == VmExit::HaltedForGood && state.gpr[3] == 0 {
        Ok(time)
    } else {
        Err(PrivilegedError::Stopped { name: case.name, exit, rip: state.rip })
    }
}

/// Prints nanoseconds for each case, without what the loop itself takes.
pub(crate) fn measure(arguments: &PrivilegedArguments) -> Result<(), PrivilegedError> {
    let translator = JitEngine { options: Options::default() };
    let engine: &dyn Engine = if arguments.interpreter { &InterpreterEngine } else { &translator };
    println!("{:<32} {:>8} {:>8}", "ns", "least", "median");
    for case in cases().iter().filter(|case| case.name.contains(&arguments.only)) {
        let mut vcpu = vcpu(case, engine)?;
        run(&mut *vcpu, case, 10_000)?;
        let mut times = Vec::new();
        for _ in 0..arguments.rounds.max(1) {
            let time = run(&mut *vcpu, case, arguments.count)?;
            times.push(time.as_nanos() as f64 / f64::from(arguments.count.max(1)));
        }
        times.sort_by(f64::total_cmp);
        println!("{:<32} {:>8.1} {:>8.1}", case.name, times[0], times[times.len() / 2]);
    }
    Ok(())
}
