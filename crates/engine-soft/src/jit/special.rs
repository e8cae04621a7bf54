//! Instructions that become something else: the stack, division and XLAT.

use iced_x86::{Code, Instruction};

use super::asm::{Imm, Mem, RAX, Reg, Two, at, cc};
use super::emit::Emitter;
use super::registers::{A, B, C, Home, STACK, home, sized};
use super::state::field;
use super::stubs::load_table;
use crate::interp::op::prefix;

const RDX: Reg = Reg(2);
const RBX: Reg = Reg(3);
const RBP: Reg = Reg(5);
const RSP: u8 = 4;

/// A check of the stack: the branch taken where it fails, where to go on with it, and the last offset that fits.
#[derive(Clone, Copy, Debug)]
pub(super) struct StackCheck {
    pub(super) site: usize,
    pub(super) back: usize,
    pub(super) limit: i32,
}

impl Emitter<'_> {
    /// Checks the slot below the stack's top for writing: where its host address is then, and where the check is left.
    pub(super) fn check_push(&mut self, i: usize) -> (Mem, Option<StackCheck>) {
        if let Some(group) = self.group {
            return (at(A, group.offset(-i64::from(self.word()))), None);
        }
        self.keep_flags(i);
        (at(A, 0), Some(self.check_stack(-self.word(), self.word())))
    }

    /// Likewise for reading the slot at the stack's top.
    pub(super) fn check_pop(&mut self, i: usize) -> (Mem, Option<StackCheck>) {
        if let Some(group) = self.group {
            return (at(A, group.offset(0)), None);
        }
        self.keep_flags(i);
        (at(A, 0), Some(self.check_stack(0, self.word())))
    }

    /// The host address of the `size` bytes in memory that step `i` reads, to [`A`]: what to give to [`Emitter::slow_unless_covered`], and the
    /// branches for [`Emitter::slow`]. Changes flags.
    pub(super) fn find_read(&mut self, i: usize, size: i32) -> Option<(Option<StackCheck>, Vec<usize>)> {
        if let Some(distance) = self.on_stack(i, 1) {
            return Some((Some(self.check_stack(distance, size)), Vec::new()));
        }
        self.address(i)?;
        Some((None, vec![self.check(size as usize, 1, false)]))
    }

    /// The host address of `size` bytes, `displacement` from the stack pointer, to [`A`], if they lie in the stack's page. It
    /// is writable. Changes flags.
    pub(super) fn check_stack(&mut self, displacement: i32, size: i32) -> StackCheck {
        self.host_flags = false;
        match displacement {
            0 => self.a.copy(A, STACK),
            _ => self.lea(A, at(STACK, displacement)),
        }
        self.a.rm(Two::Sub, A, field::stack_page());
        let limit = 0x1000 - size;
        self.a.compare_imm(A, limit);
        let site = self.a.jcc(cc::A);
        let back = self.a.here();
        self.a.rm(Two::Add, A, field::stack_host());
        StackCheck { site, back, limit }
    }

    /// The way out of line for step `i`, unless a row's check covers it: another page may become the stack's.
    pub(super) fn slow_unless_covered(&mut self, i: usize, check: Option<StackCheck>) {
        if let Some(StackCheck { site, back, limit }) = check {
            let id = self.site_back(i, |site| (site.again, site.limit) = (back as u32, limit as u16));
            self.lead_to_fixed([site], self.stubs.misses.stack, B, id);
        }
    }

    /// Moves the stack pointer, at a row's end if one is under way.
    fn move_stack(&mut self, distance: i32) {
        self.pending += distance;
        if self.group.is_none() {
            self.settle_stack(0);
        }
    }

    /// Moves the stack pointer by what is pending and `more`; changes no flag.
    pub(super) fn settle_stack(&mut self, more: i32) {
        let distance = std::mem::take(&mut self.pending) + more;
        if distance != 0 {
            self.lea(STACK, at(STACK, distance));
        }
    }

    pub(super) fn push(&mut self, i: usize) -> Option<()> {
        let (slot, check) = self.check_push(i);
        let op = *self.at(i).1;
        let register = matches!(op.code, Code::Push_r64 | Code::Push_rm64 | Code::Push_r32 | Code::Push_rm32);
        let value = if register {
            self.fetch(op.dst, B)
        } else {
            let scratch = self.scratch(B);
            self.a.constant(scratch, op.immediate & self.whole_mask());
            scratch
        };
        self.store_pointer(value, slot);
        self.move_stack(-self.word());
        self.slow_unless_covered(i, check);
        Some(())
    }

    pub(super) fn pop(&mut self, i: usize) -> Option<()> {
        let (slot, check) = self.check_pop(i);
        let to = self.at(i).1.dst;
        if to == RSP {
            self.load_pointer(STACK, slot);
            self.slow_unless_covered(i, check);
            return Some(());
        }
        match home(to) {
            Home::Host(reg) => self.load_pointer(reg, slot),
            Home::Slot if self.keeps() => {
                let reg = self.kept(to, false, true)?;
                self.a.rm(Two::Load, reg, slot);
            }
            Home::Slot => {
                self.a.rm(Two::Load, B, slot);
                self.a.rm(Two::Store, B, field::register(to));
            }
        }
        self.move_stack(self.word());
        self.slow_unless_covered(i, check);
        Some(())
    }

    pub(super) fn leave(&mut self, i: usize) -> Option<()> {
        self.keep_flags(i);
        let word = self.word();
        self.copy_pointer(A, RBP);
        let miss = self.check(word as usize, 1, false);
        self.lea(STACK, at(RBP, word));
        self.load_pointer(RBP, at(A, 0));
        self.slow(i, [miss]);
        Some(())
    }

    /// ENTER at level 0, where all of the frame lies in the stack's page: its last slot must be writable as well (SDM 2A, ENTER).
    pub(super) fn enter(&mut self, i: usize) -> Option<()> {
        let op = self.at(i).1;
        let (level, frame, word) = (op.aux % 32, (op.immediate & 0xffff) as i32, self.word());
        if level != 0 || frame + word > 0x1000 {
            return None;
        }
        self.keep_flags(i);
        let check = self.check_stack(-(frame + word), frame + word);
        self.store_pointer(RBP, at(A, frame));
        self.lea(RBP, at(STACK, -word));
        self.lea(STACK, at(STACK, -(frame + word)));
        self.slow_unless_covered(i, Some(check));
        Some(())
    }

    /// PUSH of 16 bits.
    pub(super) fn push_word(&mut self, i: usize) -> Option<()> {
        let op = *self.at(i).1;
        self.keep_flags(i);
        let check = self.check_stack(-2, 2);
        let value = if matches!(op.code, Code::Push_r16 | Code::Push_rm16) {
            self.fetch(op.dst, B)
        } else {
            self.a.constant(B, op.immediate & 0xffff);
            B
        };
        self.a.store_word(value, at(A, 0));
        self.lea(STACK, at(STACK, -2));
        self.slow_unless_covered(i, Some(check));
        Some(())
    }

    /// POP of 16 bits.
    pub(super) fn pop_word(&mut self, i: usize) -> Option<()> {
        let to = self.at(i).1.dst;
        if to == RSP {
            return None;
        }
        self.keep_flags(i);
        let check = self.check_stack(0, 2);
        match home(to) {
            Home::Host(reg) => self.a.load_low_word(reg, at(A, 0)),
            Home::Slot => {
                self.a.load_word(B, at(A, 0));
                self.a.store_word(B, field::register(to));
            }
        }
        self.lea(STACK, at(STACK, 2));
        self.slow_unless_covered(i, Some(check));
        Some(())
    }

    /// XLAT.
    pub(super) fn translate_byte(&mut self, i: usize) -> Option<()> {
        if !self.is_plain(self.at(i).1) {
            return None;
        }
        self.keep_flags(i);
        self.a.bytes(&[0x44, 0x0f, 0xb6, 0xc0]); // movzx r8d, al
        self.lea(A, Mem { base: Some(A), index: Some((RBX, 0)), disp: 0 });
        let site = self.check(1, 1, false);
        self.a.bytes(&[0x41, 0x8a, 0x00]); // mov al, [r8]
        self.slow(i, [site]);
        Some(())
    }

    /// CLFLUSH, CLFLUSHOPT and CLWB: they fault as a load of one byte does (SDM 2A), and nothing else of them can be told where all that
    /// looks at memory sees the same.
    pub(super) fn flush_line(&mut self, i: usize) -> Option<()> {
        self.keep_flags(i);
        self.address(i)?;
        let site = self.check(1, 1, false);
        self.slow(i, [site]);
        Some(())
    }

    /// DIV and IDIV of 32 and 64 bits, where the quotient certainly fits.
    pub(super) fn divide(&mut self, i: usize, signed: bool) -> Option<()> {
        let (step, op) = self.at(i);
        let (effect, wanted, op) = (step.effect, step.wanted, *op);
        let (code, memory) = (op.code, op.has(prefix::MEMORY));
        let size = match code {
            Code::Div_rm32 | Code::Idiv_rm32 => 4,
            Code::Div_rm64 | Code::Idiv_rm64 => 8,
            _ => return None,
        };
        let wide = size == 8;
        self.keep_flags(i);
        let mut sites = Vec::new();
        if memory {
            self.address(i)?;
            sites.push(self.check(size, 1, false));
            if wide { self.a.rm(Two::Load, C, at(A, 0)) } else { self.a.rm32(Two::Load, C, at(A, 0)) }
        } else {
            let from = self.fetch(op.dst, C);
            self.a.copy(C, from);
        }
        self.host_flags = false;
        let compare =
            |e: &mut Self, a, b| if wide { e.a.rr(Two::Cmp, a, b) } else { e.a.rr32(Two::Cmp, a, b) };
        if signed {
            // Neither 0 nor -1, and the dividend no wider than the divisor.
            self.a.rm(Two::Lea, B, at(C, 1));
            self.a.imm(Imm::Cmp, wide, B, 1);
            sites.push(self.a.jcc(cc::BE));
            self.a.copy(B, RAX);
            self.a.sar(wide, B, if wide { 63 } else { 31 });
            compare(self, B, RDX);
            sites.push(self.a.jcc(cc::NE));
        } else {
            compare(self, RDX, C);
            sites.push(self.a.jcc(cc::AE));
        }
        if effect.needs_flags(wanted) {
            self.restore_flags(A);
        }
        let instruction = Instruction::with1(code, sized(C, size)).ok()?;
        self.encode(&instruction)?;
        load_table(&mut self.a);
        self.flags_changed(i);
        self.slow(i, sites);
        Some(())
    }
}
