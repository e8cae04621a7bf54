//! A handful of programs; every single form is compared with the host CPU by the differential tests.

use std::sync::Arc;

use ringfence_engine::{Bus, ClockMode, VirtualClock};
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::segment::attribute;
use ringfence_x86::{Efer, Exception, Gpr};

use crate::code::CodeMap;
use crate::interp::cpu::{Connections, Cpu};
use crate::interp::op::RIP;
use crate::interp::run::Interpreter;

struct NoDevices;

impl Bus for NoDevices {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn memory_read(&self, _: GuestAddress, _: &mut [u8]) {}
    fn memory_write(&self, _: GuestAddress, _: &[u8]) {}
}

/// 64-bit code at 0x1000 without paging, the stack below 0x8000.
fn machine(code: &[u8]) -> Interpreter {
    let memory = Arc::new(GuestMemory::flat(1 << 20).unwrap());
    memory.write_bytes(GuestAddress(0x1000), code).unwrap();
    let mut cpu = Cpu::new(Connections {
        code: CodeMap::new(Arc::clone(&memory)),
        memory,
        bus: Arc::new(NoDevices),
        clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
        cpuid: Arc::default(),
    })
    .unwrap();
    cpu.efer = Efer::LME | Efer::LMA;
    cpu.segments[1].attributes |= attribute::LONG;
    cpu.segments[1].base = 0;
    cpu.update_mode();
    cpu.regs[RIP] = 0x1000;
    cpu.regs[Gpr::Rsp as usize] = 0x8000;
    Interpreter::new(cpu)
}

/// Runs until HLT's #UD stand-in, UD2.
fn run(machine: &mut Interpreter) {
    for _ in 0..1_000_000 {
        match machine.run_block(usize::MAX) {
            Ok(()) => {}
            Err(exception) => {
                assert_eq!(exception, Exception::UD, "at {:#x}", machine.cpu.rip());
                return;
            }
        }
    }
    panic!("the program did not end");
}

#[test]
fn recursive_fibonacci_is_right() {
    // mov edi,20; call fib; ud2; fib: cmp edi,2; jb base; push rdi; dec edi; call fib; pop rdi; push rax; sub edi,2;
    // call fib; pop rcx; add rax,rcx; ret; base: mov eax,edi; ret
    let code = [
        0xbf, 20, 0, 0, 0, 0xe8, 2, 0, 0, 0, 0x0f, 0x0b, 0x83, 0xff, 0x02, 0x72, 0x18, 0x57, 0xff, 0xcf,
        0xe8, 0xf3, 0xff, 0xff, 0xff, 0x5f, 0x50, 0x83, 0xef, 0x02, 0xe8, 0xe9, 0xff, 0xff, 0xff, 0x59, 0x48,
        0x01, 0xc8, 0xc3, 0xc3, 0x89, 0xf8, 0xc3,
    ];
    let mut m = machine(&code);
    run(&mut m);
    assert_eq!(m.cpu.regs[0], 6765);
    assert_eq!(m.cpu.regs[Gpr::Rsp as usize], 0x8000);
}

#[test]
fn code_that_overwrites_its_next_instruction_runs_the_new_one() {
    // mov byte [rip+1], 0x42 ; (patches the immediate of) mov al, 0 ; ud2
    let code = [0xc6, 0x05, 0x01, 0, 0, 0, 0x42, 0xb0, 0x00, 0x0f, 0x0b];
    let mut m = machine(&code);
    run(&mut m);
    assert_eq!(m.cpu.regs[0], 0x42);
}

#[test]
fn repeated_move_crosses_pages_and_stops_in_batches() {
    // mov esi,0x2ff8; mov edi,0x5ffc; mov ecx,5000; rep movsb; ud2
    let code =
        [0xbe, 0xf8, 0x2f, 0, 0, 0xbf, 0xfc, 0x5f, 0, 0, 0xb9, 0x88, 0x13, 0, 0, 0xf3, 0xa4, 0x0f, 0x0b];
    let mut m = machine(&code);
    let bytes: Vec<u8> = (0..5000_u32).map(|i| (i * 7 + i / 256) as u8).collect();
    m.cpu.memory.write_bytes(GuestAddress(0x2ff8), &bytes).unwrap();
    run(&mut m);
    let mut copied = vec![0; 5000];
    m.cpu.memory.read_bytes(GuestAddress(0x5ffc), &mut copied).unwrap();
    assert_eq!(copied, bytes);
    assert_eq!((m.cpu.regs[1], m.cpu.regs[6], m.cpu.regs[7]), (0, 0x2ff8 + 5000, 0x5ffc + 5000));
}

#[test]
fn overlapping_move_repeats_the_pattern_as_the_processor_does() {
    // mov esi,0x3000; mov edi,0x3001; mov ecx,100; rep movsb; ud2
    let code = [0xbe, 0, 0x30, 0, 0, 0xbf, 1, 0x30, 0, 0, 0xb9, 100, 0, 0, 0, 0xf3, 0xa4, 0x0f, 0x0b];
    let mut m = machine(&code);
    m.cpu.memory.write::<u8>(GuestAddress(0x3000), 0x5a).unwrap();
    run(&mut m);
    let mut bytes = [0; 102];
    m.cpu.memory.read_bytes(GuestAddress(0x3000), &mut bytes).unwrap();
    assert!(bytes[..101].iter().all(|&b| b == 0x5a) && bytes[101] == 0);
}

#[test]
fn instruction_that_straddles_a_page_runs_and_follows_both_pages() {
    let mut m = machine(&[]);
    // mov eax, 0x11223344 with three bytes in the first page; ud2
    m.cpu.memory.write_bytes(GuestAddress(0x1ffd), &[0xb8, 0x44, 0x33, 0x22, 0x11, 0x0f, 0x0b]).unwrap();
    m.cpu.regs[RIP] = 0x1ffd;
    run(&mut m);
    assert_eq!(m.cpu.regs[0], 0x1122_3344);
    m.cpu.memory.write::<u8>(GuestAddress(0x2000), 0x99).unwrap();
    m.cpu.regs[RIP] = 0x1ffd;
    run(&mut m);
    assert_eq!(m.cpu.regs[0], 0x1199_3344);
}

#[test]
fn access_to_two_pages_walks_the_page_tables_once() {
    let mut m = machine(&[]);
    m.cpu.store::<u64>(3, 0x3ffc, 0x1122_3344_5566_7788).unwrap();
    let fills = m.cpu.tlb.counters.fills;
    assert_ne!(fills, 0);
    assert_eq!(m.cpu.load::<u64>(3, 0x3ffc), Ok(0x1122_3344_5566_7788));
    m.cpu.store::<u64>(3, 0x3ffc, 1).unwrap();
    assert_eq!(m.cpu.load::<u32>(3, 0x3ffe), Ok(0));
    assert_eq!(m.cpu.tlb.counters.fills, fills);
}
