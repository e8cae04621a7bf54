//! INT n (SDM 2A INT n; 3A 6.14) in translated code, from CPL 3 through a gate to 64-bit code at CPL 0: system calls of 32-bit programs.
//!
//! As with IRETQ, the gate and the descriptor that it names are the guest's memory: where the handler has gone through the same before,
//! fixed code compares both with what they were and puts the outcome in place. The stack is read from the task-state segment each
//! time. No change is made before all is known to be well.

use std::mem::offset_of;

use ringfence_x86::paging::is_canonical;
use ringfence_x86::segment::{Segment, attribute, system_type};
use ringfence_x86::{Efer, Rflags, SegmentRegister};

use super::asm::{Assembler, Imm, Mem, Reg, Two, at, cc};
use super::compat::change_mode;
use super::emit::Emitter;
use super::interrupt_return::{find, frame};
use super::mode::Mode;
use super::privilege::{
    Ways, change, decline, load_rflags, nothing_waits, use_kernel_table, with_kernel_table,
};
use super::registers::{A, B, C, STACK, TABLE};
use super::state::field;
use crate::interp::cpu::Cpu;
use crate::interp::system::descriptor;
use crate::mmu::tlb::Class;

/// What INT n has last gone through.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Gate {
    /// Its vector; [`NONE`] for none.
    vector: u64,
    /// The tables that it is known of, base and limit: that of interrupts, that of descriptors, and the task-state segment.
    tables: [u64; 6],
    /// Linear addresses of the gate and of the descriptor of CS.
    addresses: [u64; 2],
    /// What was there: the gate, and the descriptor.
    gate: [u64; 2],
    code: u64,
    /// What CS and SS became.
    segments: [Segment; 2],
    /// Whether these span all 4 GiB, in 16 bits.
    flat: u64,
    /// The flags that stay.
    keeps: u64,
    /// Where the gate leads.
    target: u64,
}

/// No vector.
const NONE: u64 = u64::MAX;

impl Gate {
    pub(super) fn new() -> Self {
        let segment =
            Segment { selector: ringfence_x86::segment::Selector(0), base: 0, limit: 0, attributes: 0 };
        Self {
            vector: NONE,
            tables: [0; 6],
            addresses: [0; 2],
            gate: [0; 2],
            code: 0,
            segments: [segment; 2],
            flat: 0,
            keeps: 0,
            target: 0,
        }
    }
}

impl Cpu {
    /// Remembers what an INT n that has just gone through has led through.
    pub(super) fn learn_gate(&mut self, vector: u8) {
        if let Some(gate) = self.gate_as_it_was(vector) {
            self.translated.gate = gate;
        }
    }

    fn gate_as_it_was(&mut self, vector: u8) -> Option<Gate> {
        const CS: usize = SegmentRegister::Cs as usize;
        const SS: usize = SegmentRegister::Ss as usize;
        let segments = [self.segments[CS], self.segments[SS]];
        if self.mode() != Some(Mode::Bits64) || self.cpl != 0 || segments[1].selector.0 != 0 {
            return None;
        }
        let place = u16::from(vector) * 16;
        if place + 15 > self.idtr.limit || self.tr.limit < 11 {
            return None;
        }
        let address = self.idtr.base.wrapping_add(place.into());
        // Only where looking is an access to memory and no more.
        self.tlb.read(self.implicit_class(), address, 16)?;
        let gate: [u64; 2] =
            [self.load_system(address).ok()?, self.load_system(address.wrapping_add(8)).ok()?];
        let target = gate[0] & 0xffff | gate[0] >> 48 << 16 | gate[1] << 32;
        let kind = descriptor::kind(gate[0]);
        let known = matches!(kind, system_type::INTERRUPT_GATE | system_type::TRAP_GATE);
        let usual = known
            && !descriptor::is_memory(gate[0])
            && descriptor::is_present(gate[0])
            && descriptor::dpl(gate[0]) == 3
            && gate[0] >> 32 & 7 == 0
            && (gate[0] >> 16) as u16 & !3 == segments[0].selector.0
            && is_canonical(target);
        let (place, code) = self.descriptor_as_loaded(segments[0])?;
        let cs = segments[0];
        let to_kernel = descriptor::is_code(code)
            && !descriptor::is_conforming(code)
            && descriptor::is_present(code)
            && descriptor::dpl(code) == 0
            && cs.has(attribute::LONG)
            && !cs.has(attribute::DB);
        if !usual || !to_kernel {
            return None;
        }
        let mut cleared = Rflags::TF | Rflags::NT | Rflags::RF | Rflags::VM;
        if kind == system_type::INTERRUPT_GATE {
            cleared |= Rflags::IF;
        }
        let (idt, gdt) = (self.idtr, self.gdtr);
        Some(Gate {
            vector: vector.into(),
            tables: [
                idt.base,
                idt.limit.into(),
                gdt.base,
                gdt.limit.into(),
                self.tr.base,
                self.tr.limit.into(),
            ],
            addresses: [address, place],
            gate,
            code,
            segments,
            flat: u64::from(self.flat[CS]) | u64::from(self.flat[SS]) << 8,
            keeps: !cleared.bits(),
            target,
        })
    }
}

impl Emitter<'_> {
    /// INT n.
    pub(super) fn software_interrupt(&mut self, i: usize) -> Option<()> {
        let (next, vector) = (self.at(i).0.next, self.at(i).1.immediate & 0xff);
        self.save_flags();
        self.linear(next.into());
        self.a.rm(Two::Store, A, field::rip());
        let id = self.site(i);
        self.a.constant(C, id);
        self.a.constant(A, vector);
        self.jump_out(self.stubs.software_interrupt[usize::from(self.is_narrow())]);
        Some(())
    }
}

fn known(offset: usize) -> Mem {
    field::gate(offset)
}

/// The code of [`super::stubs::Stubs::software_interrupt`], for 32-bit code (`narrow`) or for 64-bit code. RIP is behind the instruction: it is
/// nobody's as long as translated code runs.
pub(super) fn software_interrupt(a: &mut Assembler, ways: Ways, narrow: bool) -> usize {
    let start = a.here();
    a.rm32(Two::Store, C, field::link());
    let mut declined = nothing_waits(a);
    // CPL 3, and nothing to be looked at by each access.
    a.compare_byte(field::class(), Class::User as u8);
    declined.push(a.jcc(cc::NE));
    a.rm(Two::Cmp, A, known(offset_of!(Gate, vector)));
    declined.push(a.jcc(cc::NE));
    a.test_imm32(field::efer(), Efer::LMA.bits() as u32);
    declined.push(a.jcc(cc::E));
    compare_tables(a, &mut declined);
    a.rm(Two::Load, TABLE, field::system_table());
    a.rm(Two::Load, A, known(offset_of!(Gate, addresses)));
    find(a, 16, false, &mut declined);
    for word in [0, 8] {
        a.rm(Two::Load, B, at(A, word as i32));
        a.rm(Two::Cmp, B, known(offset_of!(Gate, gate) + word));
        declined.push(a.jcc(cc::NE));
    }
    a.rm(Two::Load, A, known(offset_of!(Gate, addresses) + 8));
    find(a, 8, false, &mut declined);
    a.rm(Two::Load, B, at(A, 0));
    a.rm(Two::Cmp, B, known(offset_of!(Gate, code)));
    declined.push(a.jcc(cc::NE));
    // The stack for CPL 0 (SDM 3A 8.7, figure 8-11).
    a.rm(Two::Load, A, field::tr_base());
    a.imm(Imm::Add, true, A, 4);
    find(a, 8, false, &mut declined);
    a.rm(Two::Load, A, at(A, 0));
    a.imm(Imm::And, true, A, -16);
    a.imm(Imm::Sub, true, A, frame::BYTES);
    a.rm(Two::Store, A, field::slot());
    with_kernel_table(a, |a, _, table| a.rm(Two::Load, TABLE, table));
    find(a, frame::BYTES, true, &mut declined);
    // From here on nothing can go wrong.
    a.rm(Two::Load, B, field::rip());
    a.rm(Two::Store, B, at(A, frame::RIP));
    a.load_word(B, field::selector(SegmentRegister::Cs as u8));
    a.rm(Two::Store, B, at(A, frame::CS));
    load_rflags(a, B);
    a.rm(Two::Store, B, at(A, frame::RFLAGS));
    a.rm(Two::Store, STACK, at(A, frame::RSP));
    a.load_word(B, field::selector(SegmentRegister::Ss as u8));
    a.rm(Two::Store, B, at(A, frame::SS));
    a.rm(Two::Load, STACK, field::slot());
    a.rm(Two::Load, B, known(offset_of!(Gate, keeps)));
    a.rm(Two::And, B, field::flags());
    a.rm(Two::Store, B, field::flags());
    use_kernel_table(a);
    if narrow {
        change_mode(a, Mode::Bits64);
    }
    let words = (0..2 * size_of::<Segment>()).step_by(8);
    let segments = words.map(|at| (known(offset_of!(Gate, segments) + at), field::code_segment(at)));
    change(a, false, segments, known(offset_of!(Gate, flat)));
    a.rm(Two::Load, A, known(offset_of!(Gate, target)));
    a.jmp_to(ways.dispatch as i64);
    decline(a, declined, ways);
    start
}

/// Goes on if the tables are where they were. Uses [`B`].
fn compare_tables(a: &mut Assembler, declined: &mut Vec<usize>) {
    type Load = fn(&mut Assembler, Reg, Mem);
    let (quad, half): (Load, Load) =
        (|a, to, from| a.rm(Two::Load, to, from), |a, to, from| a.rm32(Two::Load, to, from));
    let places: [(Mem, Load); 6] = [
        (field::idt_base(), quad),
        (field::idt_limit(), Assembler::load_word),
        (field::gdt_base(), quad),
        (field::gdt_limit(), Assembler::load_word),
        (field::tr_base(), quad),
        (field::tr_limit(), half),
    ];
    for (i, (place, load)) in places.into_iter().enumerate() {
        load(a, B, place);
        a.rm(Two::Cmp, B, known(offset_of!(Gate, tables) + 8 * i));
        declined.push(a.jcc(cc::NE));
    }
}
