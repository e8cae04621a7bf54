//! Port input and output.

use std::sync::Arc;

use ringfence_engine::Bus;
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::segment::Segment;
use ringfence_x86::{Exception, SegmentRegister, Vector};

use crate::code::CodeMap;
use crate::interp::cpu::Connections;
use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at};

#[test]
fn ports_keep_their_width() {
    let mut lab = Lab::long();
    lab.m.cpu.regs[0] = 0x1122_3344_5566_7788;
    lab.m.cpu.regs[2] = 0xffff_0000_0000_0cf8;
    // out dx, eax; out 0x80, al
    lab.step(&[0xef]).unwrap();
    lab.step(&[0xe6, 0x80]).unwrap();
    assert_eq!(*lab.ports.log.lock().unwrap(), [(0xcf8, 0x5566_7788), (0x80, 0x88)]);
    // in eax, dx clears the upper half; in al, dx keeps everything else
    lab.m.cpu.regs[0] = !0;
    lab.step(&[0xed]).unwrap();
    assert_eq!(lab.m.cpu.regs[0], 0x5566_7788);
    lab.m.cpu.regs[0] = !0;
    lab.step(&[0xec]).unwrap();
    assert_eq!(lab.m.cpu.regs[0], 0xffff_ffff_ffff_ff88);
}

#[test]
fn bitmap_opens_ports_one_by_one() {
    let mut lab = Lab::long();
    lab.user();
    // in al, 0x70; in ax, 0x70; in al, 0x71
    let (byte, word, next) = ([0xe4, 0x70], [0x66, 0xe5, 0x70], [0xe4, 0x71]);
    lab.put(at::TSS + 0x66, 0x100_u16);
    for i in 0..0x100 {
        lab.put(at::TSS + 0x100 + i, 0xff_u8);
    }
    assert_eq!(lab.step(&byte), Err(Exception::GP0));
    lab.put(at::TSS + 0x100 + 0x70 / 8, 0xfe_u8);
    lab.step(&byte).unwrap();
    assert_eq!(lab.step(&word), Err(Exception::GP0), "both ports must be open");
    assert_eq!(lab.step(&next), Err(Exception::GP0));
    // The byte behind the bitmap must exist (SDM 1 18.5.2).
    lab.m.cpu.tr.limit = 0x100 + 0x70 / 8;
    assert_eq!(lab.step(&byte), Err(Exception::GP0));
    lab.m.cpu.tr.limit += 1;
    lab.step(&byte).unwrap();
    // IOPL 3 opens all.
    lab.m.cpu.set_rflags(0x3002);
    lab.step(&word).unwrap();
}

#[test]
fn rep_outsb_writes_every_byte_and_counts_down() {
    let mut lab = Lab::long();
    lab.memory.write_bytes(ringfence_memory::GuestAddress(at::DATA), b"hello").unwrap();
    (lab.m.cpu.regs[1], lab.m.cpu.regs[2], lab.m.cpu.regs[6]) = (5, 0x3f8, at::DATA);
    lab.step(&[0xf3, 0x6e]).unwrap();
    let written: Vec<u8> = lab.ports.log.lock().unwrap().iter().map(|&(_, value)| value as u8).collect();
    assert_eq!(written, b"hello");
    assert_eq!((lab.m.cpu.regs[1], lab.m.cpu.regs[6]), (0, at::DATA + 5));
}

#[test]
fn long_rep_insw_gives_way_and_goes_on() {
    let mut lab = Lab::long();
    lab.ports.log.lock().unwrap().clear();
    (lab.m.cpu.regs[1], lab.m.cpu.regs[2], lab.m.cpu.regs[7]) = (300, 0x1f0, at::DATA);
    lab.step(&[0x66, 0xf3, 0x6d]).unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[1]), (at::CODE, 44));
    lab.m.step().unwrap();
    assert_eq!((lab.m.cpu.rip(), lab.m.cpu.regs[1]), (at::CODE + 3, 0));
    assert_eq!(lab.get::<u16>(at::DATA + 598), 0xffff);
    assert_eq!(lab.get::<u16>(at::DATA + 600), 0);
}

#[test]
fn ins_that_faults_has_not_read_the_port() {
    let mut lab = Lab::long();
    (lab.m.cpu.regs[1], lab.m.cpu.regs[2], lab.m.cpu.regs[7]) = (8, 0x60, at::ABSENT - 4);
    let fault = lab.step(&[0xf3, 0x6c]).unwrap_err();
    assert_eq!((fault.vector, lab.m.cpu.fault_address), (Vector::PageFault, at::ABSENT));
    // Four are done, and registers say so.
    assert_eq!((lab.m.cpu.regs[1], lab.m.cpu.regs[7], lab.m.cpu.rip()), (4, at::ABSENT, at::CODE));
}

#[test]
fn direction_flag_goes_down() {
    let mut lab = Lab::long();
    lab.m.cpu.set_rflags(0x402);
    (lab.m.cpu.regs[1], lab.m.cpu.regs[2], lab.m.cpu.regs[6]) = (2, 0x3f8, at::DATA + 4);
    lab.put(at::DATA, 0x1111_1111_u32);
    lab.put(at::DATA + 4, 0x2222_2222_u32);
    lab.step(&[0xf3, 0x6f]).unwrap();
    assert_eq!(*lab.ports.log.lock().unwrap(), [(0x3f8, 0x2222_2222), (0x3f8, 0x1111_1111)]);
    assert_eq!(lab.m.cpu.regs[6], at::DATA - 4);
}

#[test]
fn real_mode_may_use_every_port() {
    let mut lab = Lab::real();
    lab.m.cpu.regs[RIP] = at::CODE;
    lab.step(&[0xe6, 0x80]).unwrap();
}

/// Port 0x92's gate and nothing else.
struct Gate(Arc<GuestMemory>);

impl Bus for Gate {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, data: &[u8]) {
        self.0.set_a20(data[0] & 2 != 0);
    }
    fn memory_read(&self, _: GuestAddress, _: &mut [u8]) {}
    fn memory_write(&self, _: GuestAddress, _: &[u8]) {}
}

#[test]
fn a20_gate_moved_by_a_port_changes_what_the_next_load_reads() {
    let mut lab = Lab::real();
    let memory = Arc::new(GuestMemory::flat(2 << 20).unwrap());
    let cpu = &lab.m.cpu;
    let mut cpu = crate::interp::cpu::Cpu::new(Connections {
        code: CodeMap::new(Arc::clone(&memory)),
        memory: Arc::clone(&memory),
        bus: Arc::new(Gate(Arc::clone(&memory))),
        clock: Arc::clone(&cpu.clock),
        cpuid: Arc::clone(&cpu.cpuid),
    })
    .unwrap();
    cpu.segments[SegmentRegister::Cs as usize] = Segment::real_mode(0);
    cpu.segments[SegmentRegister::Ds as usize] = Segment::real_mode(0xffff);
    cpu.update_mode();
    cpu.regs[RIP] = at::CODE;
    lab.m = crate::interp::run::Interpreter::new(cpu);
    memory.write::<u8>(GuestAddress(0), 3).unwrap();
    memory.write::<u8>(GuestAddress(1 << 20), 7).unwrap();
    // FFFF:0010 is the second megabyte's first byte, or the first's. Read with the gate open, closed, and open again:
    // mov bl,[0x10]; mov al,0; out 0x92,al; mov cl,[0x10]; mov al,2; out 0x92,al; mov dl,[0x10]; ud2
    let code = [
        0x8a, 0x1e, 0x10, 0, 0xb0, 0, 0xe6, 0x92, 0x8a, 0x0e, 0x10, 0, 0xb0, 2, 0xe6, 0x92, 0x8a, 0x16, 0x10,
        0, 0x0f, 0x0b,
    ];
    memory.write_bytes(GuestAddress(at::CODE), &code).unwrap();
    let end = (0..20).find_map(|_| lab.m.run_block(100).err());
    assert_eq!(end, Some(Exception::UD));
    assert_eq!([3, 1, 2].map(|register: usize| lab.m.cpu.regs[register] as u8), [7, 3, 7]);
}
