//! IRETQ (SDM 2A IRET; 3A 6.14.3) in translated code, from CPL 0 to 64-bit code at CPL 0 or CPL 3, or to flat 32-bit code at CPL 3.
//!
//! The segments that it loads are those of descriptors in the guest's memory. Where the handler has led to the same selectors
//! before, its outcome is known by the descriptors alone: fixed code compares both with what they were and puts the
//! segments in place. Whatever is unusual is the handler's, which finds the vCPU as it was: no change is made before all
//! is known to be well.

use std::mem::offset_of;

use ringfence_x86::segment::{Segment, attribute};
use ringfence_x86::{Rflags, SegmentRegister};

use super::MAX_UNIT;
use super::asm::{Assembler, Imm, Mem, Two, at, cc};
use super::compat::{change_mode, require_flat, store_spans};
use super::mode::Mode;
use super::privilege::{
    Ways, change, decline, not_canonical, nothing_waits, store_rflags, use_kernel_table, use_table,
};
use super::registers::{A, B, BUDGET, C, STACK, TABLE};
use super::state::field;
use super::stubs::{data_entry, load_table};
use crate::interp::cpu::Cpu;
use crate::mmu::tlb::Class;

/// Where IRETQ has led to.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Return {
    /// The selector of CS, and that of SS in the next 16 bits; [`NOWHERE`] for none.
    selectors: u64,
    /// Linear addresses of their descriptors, which lie in one page. A null SS has none: it is CS's once more then.
    addresses: [u64; 2],
    /// What was there.
    descriptors: [u64; 2],
    /// What CS and SS became.
    pub(super) segments: [Segment; 2],
    /// Whether these span all 4 GiB, in 16 bits.
    flat: u64,
}

/// No 32-bit number.
const NOWHERE: u64 = u64::MAX;

impl Return {
    const NONE: Self = {
        let segment =
            Segment { selector: ringfence_x86::segment::Selector(0), base: 0, limit: 0, attributes: 0 };
        Self { selectors: NOWHERE, addresses: [0; 2], descriptors: [0; 2], segments: [segment; 2], flat: 0 }
    };
}

/// Which of [`Returns::ways`] is for what.
mod way {
    /// To CPL 3.
    pub(super) const USER: usize = 0;
    /// To CPL 0.
    pub(super) const KERNEL: usize = 1;
    /// To CPL 0 with a null SS, as it is where an interrupt came from CPL 3.
    pub(super) const KERNEL_WITHOUT_STACK: usize = 2;
    /// To 32-bit code at CPL 3.
    pub(super) const NARROW: usize = 3;
    pub(super) const COUNT: usize = 4;
}

/// All that is known.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Returns {
    /// The global descriptor table that it is known of: base and limit.
    table: [u64; 2],
    ways: [Return; way::COUNT],
}

impl Returns {
    pub(super) const NONE: Self = Self { table: [0; 2], ways: [Return::NONE; way::COUNT] };
}

impl Cpu {
    /// Remembers where an IRETQ from CPL 0 that has just gone through has led to.
    pub(super) fn learn_return(&mut self) {
        if let Some((way, known)) = self.return_as_it_was() {
            let table = [self.gdtr.base, self.gdtr.limit.into()];
            let returns = &mut self.translated.returns;
            if returns.table != table {
                *returns = Returns { table, ..Returns::NONE };
            }
            returns.ways[way] = known;
        }
    }

    fn return_as_it_was(&mut self) -> Option<(usize, Return)> {
        const CS: usize = SegmentRegister::Cs as usize;
        const SS: usize = SegmentRegister::Ss as usize;
        let segments = [self.segments[CS], self.segments[SS]];
        let [cs, ss] = segments;
        let null = ss.selector.is_null();
        let way = match (self.mode()?, self.cpl) {
            (Mode::Flat32, 3) => way::NARROW,
            (Mode::Bits64, 3) => way::USER,
            (Mode::Bits64, 0) if null => way::KERNEL_WITHOUT_STACK,
            (Mode::Bits64, 0) => way::KERNEL,
            _ => return None,
        };
        let code = self.descriptor_as_loaded(cs)?;
        let stack = if null { code } else { self.descriptor_as_loaded(ss)? };
        if (code.0 ^ stack.0) & !0xfff != 0 {
            return None;
        }
        let known = Return {
            selectors: u64::from(cs.selector.0) | u64::from(ss.selector.0) << 16,
            addresses: [code.0, stack.0],
            descriptors: [code.1, stack.1],
            segments,
            flat: u64::from(self.flat[CS]) | u64::from(self.flat[SS]) << 8,
        };
        Some((way, known))
    }

    /// Where a segment's descriptor is in the global table, and what it is, if the segment is what that says.
    pub(super) fn descriptor_as_loaded(&mut self, segment: Segment) -> Option<(u64, u64)> {
        let selector = segment.selector;
        if selector.is_local() || selector.offset() + 7 > u32::from(self.gdtr.limit) {
            return None;
        }
        let address = self.gdtr.base.wrapping_add(selector.offset().into());
        // Only where looking is an access to memory and no more.
        self.tlb.read(self.implicit_class(), address, 8)?;
        let descriptor = self.load_system(address).ok()?;
        (Segment::from_descriptor(selector, descriptor) == segment).then_some((address, descriptor))
    }
}

/// Flags that IRETQ loads at CPL 0, but for those that make it unusual.
const FLAGS: Rflags = Rflags::STATUS
    .union(Rflags::DF)
    .union(Rflags::IF)
    .union(Rflags::IOPL)
    .union(Rflags::AC)
    .union(Rflags::VIF)
    .union(Rflags::VIP)
    .union(Rflags::ID);

fn of_return(way: usize, offset: usize) -> Mem {
    field::returns(offset_of!(Returns, ways) + way * size_of::<Return>() + offset)
}

/// The code of [`super::stubs::Stubs::interrupt_return`].
pub(super) fn interrupt_return(a: &mut Assembler, ways: Ways) -> usize {
    let start = a.here();
    a.rm32(Two::Store, C, field::link());
    let mut declined = nothing_waits(a);
    a.compare_byte(field::cpl(), 0);
    declined.push(a.jcc(cc::NE));
    // An NMI's handler ends, or the task of another one does.
    a.compare_byte(field::nmi_masked(), 0);
    declined.push(a.jcc(cc::NE));
    a.test_imm32(field::flags(), Rflags::NT.bits() as u32);
    declined.push(a.jcc(cc::NE));
    find_frame(a, &mut declined);
    a.load_word(B, at(A, frame::CS));
    a.load_word(C, at(A, frame::SS));
    a.shl32(C, 16);
    a.rr(Two::Or, B, C);
    let known = [way::USER, way::KERNEL, way::KERNEL_WITHOUT_STACK, way::NARROW].map(|way| {
        a.rm(Two::Cmp, B, of_return(way, offset_of!(Return, selectors)));
        (way, a.jcc(cc::E))
    });
    let unknown = a.here();
    decline(a, declined, ways);
    for (way, site) in known {
        a.bind(site);
        let mut declined = Vec::new();
        return_to(a, way, &mut declined, ways);
        for site in declined {
            a.patch(site, unknown as i64);
        }
    }
    start
}

/// What IRETQ finds on the stack, in bytes from its top.
pub(super) mod frame {
    pub(in super::super) const RIP: i32 = 0;
    pub(in super::super) const CS: i32 = 8;
    pub(in super::super) const RFLAGS: i32 = 16;
    pub(in super::super) const RSP: i32 = 24;
    pub(in super::super) const SS: i32 = 32;
    pub(in super::super) const BYTES: i32 = 40;
}

/// The host's address of the frame to [`A`], and put by.
fn find_frame(a: &mut Assembler, declined: &mut Vec<usize>) {
    load_table(a);
    a.copy(A, STACK);
    find(a, frame::BYTES, false, declined);
    a.rm(Two::Store, A, field::slot());
}

/// The host's address of `bytes` at the linear address in [`A`], to [`A`], by the table in [`TABLE`]. Uses [`B`].
pub(super) fn find(a: &mut Assembler, bytes: i32, write: bool, declined: &mut Vec<usize>) {
    let [page, host] = data_entry(a, write);
    a.rm(Two::Sub, A, page);
    a.compare_imm(A, 0x1000 - bytes);
    declined.push(a.jcc(cc::A));
    a.rm(Two::Add, A, host);
}

/// Goes on if the descriptors are what they were. Uses all scratch registers.
fn compare_descriptors(a: &mut Assembler, way: usize, declined: &mut Vec<usize>) {
    let known = |field: usize, i: usize| of_return(way, field + 8 * i);
    let [base, limit] = [0, 8].map(|at| field::returns(offset_of!(Returns, table) + at));
    a.rm(Two::Load, B, field::gdt_base());
    a.rm(Two::Cmp, B, base);
    declined.push(a.jcc(cc::NE));
    a.load_word(B, field::gdt_limit());
    a.rm(Two::Cmp, B, limit);
    declined.push(a.jcc(cc::NE));
    a.rm(Two::Load, TABLE, field::system_table());
    a.rm(Two::Load, A, known(offset_of!(Return, addresses), 0));
    let [page, host] = data_entry(a, false);
    for i in 0..2 {
        if i == 1 {
            a.rm(Two::Load, A, known(offset_of!(Return, addresses), 1));
        }
        a.rm(Two::Sub, A, page);
        a.compare_imm(A, 0x1000 - 8);
        declined.push(a.jcc(cc::A));
        a.rm(Two::Add, A, host);
        a.rm(Two::Load, A, at(A, 0));
        a.rm(Two::Cmp, A, known(offset_of!(Return, descriptors), i));
        declined.push(a.jcc(cc::NE));
    }
}

/// Goes on if no data segment is taken away from the program (SDM 2A IRET, RETURN-TO-OUTER-PRIVILEGE-LEVEL). Uses [`C`].
fn keep_data_segments(a: &mut Assembler, declined: &mut Vec<usize>) {
    for register in [SegmentRegister::Es, SegmentRegister::Ds, SegmentRegister::Fs, SegmentRegister::Gs] {
        a.load_word(C, field::selector(register as u8));
        a.rr32(Two::Test, C, C);
        let null = a.jcc(cc::E);
        // Another null selector would become this one. It has no attributes.
        a.load_word(C, field::attributes(register as u8));
        let own = (attribute::PRESENT | 3 << 5).into();
        a.imm(Imm::And, false, C, own);
        a.imm(Imm::Cmp, false, C, own);
        declined.push(a.jcc(cc::NE));
        a.bind(null);
    }
}

/// Where the selectors are known.
fn return_to(a: &mut Assembler, way: usize, declined: &mut Vec<usize>, ways: Ways) {
    let narrow = way == way::NARROW;
    let user = way == way::USER || narrow;
    compare_descriptors(a, way, declined);
    a.rm(Two::Load, A, field::slot());
    // Each word is read once: another vCPU may write there. RIP is nobody's as long as translated code runs.
    a.rm(Two::Load, C, at(A, frame::RIP));
    a.rm(Two::Store, C, field::rip());
    if narrow {
        a.shr(C, 32);
        declined.push(a.jcc(cc::NE));
        a.imm_mem32(Imm::Cmp, at(A, frame::RSP + 4), 0);
        declined.push(a.jcc(cc::NE));
        require_flat(a, declined);
    } else {
        declined.push(not_canonical(a, C));
    }
    a.rm(Two::Load, B, at(A, frame::RFLAGS));
    // A trap behind the next instruction, a mode that 64-bit code has not, an error at the next IRET; at CPL 3, accesses whose
    // alignment is checked.
    let unusual = Rflags::TF | Rflags::VM | Rflags::NT | if user { Rflags::AC } else { Rflags::empty() };
    a.rr32(Two::Load, C, B);
    a.imm(Imm::And, false, C, unusual.bits() as i32);
    declined.push(a.jcc(cc::NE));
    // With RF, the next instruction's breakpoint is passed over; nobody can tell where that is executed at once, as there are no
    // breakpoints while translated code runs.
    a.rr32(Two::Load, C, B);
    a.imm(Imm::And, false, C, Rflags::RF.bits() as i32);
    let clear = a.jcc(cc::E);
    a.compare_imm(BUDGET, const { MAX_UNIT as i32 });
    declined.push(a.jcc(cc::L));
    a.bind(clear);
    if user {
        keep_data_segments(a, declined);
    }
    // From here on nothing can go wrong.
    if narrow {
        a.rm32(Two::Load, STACK, at(A, frame::RSP));
    } else {
        a.rm(Two::Load, STACK, at(A, frame::RSP));
    }
    a.imm(Imm::And, false, B, FLAGS.bits() as i32);
    store_rflags(a);
    if user {
        use_table(a, Class::User, field::user_table());
    } else {
        use_kernel_table(a);
    }
    let words = (0..2 * size_of::<Segment>()).step_by(8);
    let segments =
        words.map(|at| (of_return(way, offset_of!(Return, segments) + at), field::code_segment(at)));
    if narrow {
        change_mode(a, Mode::Flat32);
    }
    change(a, user, segments, of_return(way, offset_of!(Return, flat)));
    if narrow {
        store_spans(a);
    }
    a.rm(Two::Load, A, field::rip());
    a.jmp_to(ways.dispatch as i64);
}
