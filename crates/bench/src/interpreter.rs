//! The software engine's speed on integer code, interpreted and translated: loops of loads, stores, branches and calls, whose results are checked.

use std::sync::Arc;
use std::time::Instant;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use ringfence_engine::{Bus, ClockMode, VirtualClock};
use ringfence_engine_soft::code::CodeMap;
use ringfence_engine_soft::interp::cpu::{Connections, Cpu};
use ringfence_engine_soft::interp::op::RIP;
use ringfence_engine_soft::interp::run::Interpreter;
use ringfence_engine_soft::jit::{Jit, Options};
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::segment::attribute;
use ringfence_x86::{Efer, Exception};

/// What memory comes in.
const MIB: u64 = 1 << 20;
const CODE: u64 = 0x1000;
const DATA: u64 = 0x10_0000;
const STACK: u64 = 0x8_0000;

/// Where nothing answers.
pub(crate) struct NoDevices;

impl Bus for NoDevices {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn memory_read(&self, _: GuestAddress, _: &mut [u8]) {}
    fn memory_write(&self, _: GuestAddress, _: &[u8]) {}
}

/// A program: assembled code, and what RAX must hold at its end.
struct Program {
    name: &'static str,
    code: Vec<u8>,
    expected: u64,
}

/// fib(27) by recursion: calls, returns, pushes, branches.
fn fibonacci() -> Result<Program, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut fib, mut base) = (a.create_label(), a.create_label());
    a.mov(edi, 27)?;
    a.call(fib)?;
    a.ud2()?;
    a.set_label(&mut fib)?;
    a.cmp(edi, 2)?;
    a.jb(base)?;
    a.push(rdi)?;
    a.dec(edi)?;
    a.call(fib)?;
    a.pop(rdi)?;
    a.push(rax)?;
    a.sub(edi, 2)?;
    a.call(fib)?;
    a.pop(rcx)?;
    a.add(rax, rcx)?;
    a.ret()?;
    a.set_label(&mut base)?;
    a.mov(eax, edi)?;
    a.ret()?;
    Ok(Program { name: "calls (fib)", code: a.assemble(CODE)?, expected: 196_418 })
}

/// Sieve of Eratosthenes below 2^16, counting the primes: loads, stores and hard-to-predict branches.
fn sieve() -> Result<Program, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut outer, mut inner, mut next, mut clear) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(rbx, DATA)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut clear)?;
    a.mov(byte_ptr(rbx + rcx), 0)?;
    a.inc(ecx)?;
    a.cmp(ecx, 0x1_0000)?;
    a.jb(clear)?;
    a.xor(eax, eax)?;
    a.mov(esi, 2)?;
    a.set_label(&mut outer)?;
    a.cmp(byte_ptr(rbx + rsi), 0)?;
    a.jne(next)?;
    a.inc(eax)?;
    a.lea(edi, ptr(rsi + rsi))?;
    a.set_label(&mut inner)?;
    a.cmp(edi, 0x1_0000)?;
    a.jae(next)?;
    a.mov(byte_ptr(rbx + rdi), 1)?;
    a.add(edi, esi)?;
    a.jmp(inner)?;
    a.set_label(&mut next)?;
    a.inc(esi)?;
    a.cmp(esi, 0x1_0000)?;
    a.jb(outer)?;
    a.ud2()?;
    Ok(Program { name: "loads and stores (sieve)", code: a.assemble(CODE)?, expected: 6542 })
}

/// A bytewise CRC-32 with a table made first: shifts, masks, dependent loads.
fn checksum() -> Result<Program, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut table, mut bit, mut keep, mut fill, mut update) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(rbx, DATA)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut table)?;
    a.mov(eax, ecx)?;
    a.mov(edx, 8)?;
    a.set_label(&mut bit)?;
    a.shr(eax, 1)?;
    a.jnc(keep)?;
    a.xor(eax, 0xedb8_8320_u32 as i32)?;
    a.set_label(&mut keep)?;
    a.dec(edx)?;
    a.jnz(bit)?;
    a.mov(dword_ptr(rbx + rcx * 4), eax)?;
    a.inc(ecx)?;
    a.cmp(ecx, 256)?;
    a.jb(table)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut fill)?;
    a.imul_3(eax, ecx, 7)?;
    a.mov(byte_ptr(rbx + rcx + 0x1000), al)?;
    a.inc(ecx)?;
    a.cmp(ecx, 0x8000)?;
    a.jb(fill)?;
    a.mov(eax, -1)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut update)?;
    a.movzx(edx, byte_ptr(rbx + rcx + 0x1000))?;
    a.xor(dl, al)?;
    a.shr(eax, 8)?;
    a.xor(eax, dword_ptr(rbx + rdx * 4))?;
    a.inc(ecx)?;
    a.cmp(ecx, 0x8000)?;
    a.jb(update)?;
    a.not(eax)?;
    a.ud2()?;
    let mut crc = !0_u32;
    for i in 0..0x8000_u32 {
        crc ^= u32::from((i * 7) as u8);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 };
        }
    }
    Ok(Program { name: "tables and shifts (crc32)", code: a.assemble(CODE)?, expected: u64::from(!crc) })
}

/// A vCPU in 64-bit mode, in memory that holds `code` at `address`.
pub(crate) fn vcpu(code: &[u8], address: u64) -> Interpreter {
    let memory = Arc::new(
        GuestMemory::flat(4 * MIB + (code.len() as u64).next_multiple_of(MIB)).expect("a little memory"),
    );
    memory.write_bytes(GuestAddress(address), code).expect("the program fits");
    let mut cpu = Cpu::new(Connections {
        code: CodeMap::new(Arc::clone(&memory)),
        memory,
        bus: Arc::new(NoDevices),
        clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
        cpuid: Arc::new(ringfence_engine_soft::host_cpuid().clone()),
    })
    .expect("memory for translated vector instructions");
    cpu.efer = Efer::LME | Efer::LMA;
    cpu.segments[1].attributes |= attribute::LONG;
    cpu.segments[1].base = 0;
    cpu.update_mode();
    Interpreter::new(cpu)
}

/// Instructions between two looks at the outside world, as in a machine.
const BATCH: u64 = 4096;

/// A way to execute.
struct Executor {
    machine: Interpreter,
    /// The translator, if it is to be used.
    jit: Option<Jit>,
}

impl Executor {
    fn new(program: &Program, translate: bool) -> Self {
        let machine = vcpu(&program.code, CODE);
        let jit = translate
            .then(|| Jit::new(Options::default(), &machine.cpu.code).expect("memory for translated code"));
        Self { machine, jit }
    }

    /// Runs the program once.
    fn run(&mut self, program: &Program) {
        let machine = &mut self.machine;
        machine.cpu.regs[RIP] = CODE;
        machine.cpu.regs[4] = STACK;
        loop {
            let result = match &mut self.jit {
                Some(jit) => jit.run(machine, BATCH),
                None => machine.run_block(usize::MAX),
            };
            if let Err(exception) = result {
                assert_eq!(exception, Exception::UD, "{} at {:#x}", program.name, machine.cpu.rip());
                assert_eq!(
                    machine.cpu.regs[0], program.expected,
                    "{} computed the wrong result",
                    program.name
                );
                return;
            }
        }
    }

    /// Million instructions per second over the time given.
    fn rate(&mut self, program: &Program, seconds: f64) -> f64 {
        self.run(program);
        let (before, start) = (self.machine.cpu.retired, Instant::now());
        while start.elapsed().as_secs_f64() < seconds {
            self.run(program);
        }
        (self.machine.cpu.retired - before) as f64 / start.elapsed().as_secs_f64() / 1e6
    }
}

/// Prints the rates of each program, and their geometric means.
pub(crate) fn measure(seconds: f64) {
    println!("{:<28} {:>11} {:>11} {:>7}", "MIPS", "interpreted", "translated", "ratio");
    let line = |name, interpreted: f64, translated: f64| {
        println!("{name:<28} {interpreted:11.1} {translated:11.1} {:7.1}", translated / interpreted);
    };
    let mut logs = [0.0; 2];
    let programs = [fibonacci(), sieve(), checksum()];
    let count = programs.len() as f64;
    for program in programs {
        let program = program.expect("the program assembles");
        let [interpreted, translated] =
            [false, true].map(|translate| Executor::new(&program, translate).rate(&program, seconds));
        line(program.name, interpreted, translated);
        logs[0] += interpreted.ln();
        logs[1] += translated.ln();
    }
    let [interpreted, translated] = logs.map(|sum| (sum / count).exp());
    line("geometric mean", interpreted, translated);
}
