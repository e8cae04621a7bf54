//! Instructions that become something else: the stack, division, control transfers.

use iced_x86::{Code, Instruction, OpKind};

use super::asm::{Imm, Mem, RAX, Reg, Two, at, cc};
use super::emit::{Cold, Emitter};
use super::registers::{A, B, C, Home, STACK, home, sized};
use super::state::field;
use super::stubs::{go, look_up};

const RDX: Reg = Reg(2);
const RBP: Reg = Reg(5);
/// "Below or equal".
const BE: u8 = 6;

impl Emitter<'_> {
    /// Checks the slot below the stack's top for writing: where its host address is then, and the branch to the slow way.
    fn check_push(&mut self, i: usize) -> (Mem, Vec<usize>) {
        if let Some(group) = self.group {
            return (at(A, group.offset(-8)), Vec::new());
        }
        self.keep_flags(i);
        self.a.rm(Two::Lea, A, at(STACK, -8));
        let miss = self.check(8, true);
        (at(A, 0), vec![miss])
    }

    /// Likewise for reading the slot at the stack's top.
    fn check_pop(&mut self, i: usize) -> (Mem, Vec<usize>) {
        if let Some(group) = self.group {
            return (at(A, group.offset(0)), Vec::new());
        }
        self.keep_flags(i);
        self.a.copy(A, STACK);
        let miss = self.check(8, false);
        (at(A, 0), vec![miss])
    }

    /// The slow way for step `i`, unless a row's check covers it.
    fn slow_unless_covered(&mut self, i: usize, sites: Vec<usize>) {
        if !sites.is_empty() {
            self.slow(i, sites);
        }
    }

    pub(super) fn push(&mut self, i: usize) -> Option<()> {
        let (slot, sites) = self.check_push(i);
        let (step, op) = self.at(i);
        let (kind, op) = (step.instruction.op0_kind(), *op);
        let value = if kind == OpKind::Register {
            self.fetch(op.dst, B)
        } else {
            self.a.constant(B, op.immediate);
            B
        };
        self.a.rm(Two::Store, value, slot);
        self.a.rm(Two::Lea, STACK, at(STACK, -8));
        self.slow_unless_covered(i, sites);
        Some(())
    }

    pub(super) fn pop(&mut self, i: usize) -> Option<()> {
        let (slot, sites) = self.check_pop(i);
        let to = self.at(i).1.dst;
        match home(to) {
            Home::Host(reg) => self.a.rm(Two::Load, reg, slot),
            Home::Slot => {
                self.a.rm(Two::Load, B, slot);
                self.a.rm(Two::Store, B, field::register(to));
            }
        }
        self.a.rm(Two::Lea, STACK, at(STACK, 8));
        self.slow_unless_covered(i, sites);
        Some(())
    }

    pub(super) fn leave(&mut self, i: usize) -> Option<()> {
        self.keep_flags(i);
        self.a.copy(A, RBP);
        let miss = self.check(8, false);
        self.a.rm(Two::Lea, STACK, at(RBP, 8));
        self.a.rm(Two::Load, RBP, at(A, 0));
        self.slow(i, vec![miss]);
        Some(())
    }

    /// DIV and IDIV of 32 and 64 bits, where the quotient certainly fits.
    pub(super) fn divide(&mut self, i: usize, signed: bool) -> Option<()> {
        let (step, op) = self.at(i);
        let (effect, wanted, op) = (step.effect, step.wanted, *op);
        let (size, memory, code) = match step.instruction.code() {
            Code::Div_rm32 | Code::Idiv_rm32 => {
                (4, step.instruction.op0_kind() == OpKind::Memory, step.instruction.code())
            }
            Code::Div_rm64 | Code::Idiv_rm64 => {
                (8, step.instruction.op0_kind() == OpKind::Memory, step.instruction.code())
            }
            _ => return None,
        };
        let wide = size == 8;
        self.keep_flags(i);
        let mut sites = Vec::new();
        if memory {
            self.address(i)?;
            sites.push(self.check(size, false));
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
            sites.push(self.a.jcc(BE));
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
        self.flags_changed(i);
        self.slow(i, sites);
        Some(())
    }

    /// Where a relative branch goes, from the page's start.
    fn target(&self, i: usize) -> i64 {
        let (step, op) = self.at(i);
        i64::from(step.next).wrapping_add(op.immediate as i64)
    }

    pub(super) fn jump(&mut self, i: usize) -> Option<()> {
        self.exit_to(self.target(i));
        Some(())
    }

    pub(super) fn branch(&mut self, i: usize) -> Option<()> {
        let condition = self.at(i).1.condition;
        self.restore_flags(A);
        let site = self.a.jcc(condition);
        let cold =
            Cold::Side { site, target: self.target(i), save: !self.stored_flags, refund: self.behind(i) };
        self.cold.push(cold);
        Some(())
    }

    /// Pushes the address behind step `i` to `slot`. Uses [`B`].
    fn push_return(&mut self, i: usize, slot: Mem) {
        let next = self.at(i).0.next as i32;
        self.a.rm(Two::Load, B, field::page());
        self.a.rm(Two::Lea, B, at(B, next));
        self.a.rm(Two::Store, B, slot);
        self.a.rm(Two::Lea, STACK, at(STACK, -8));
    }

    pub(super) fn call(&mut self, i: usize) -> Option<()> {
        let (slot, sites) = self.check_push(i);
        self.push_return(i, slot);
        self.exit_to(self.target(i));
        self.slow_unless_covered(i, sites);
        Some(())
    }

    /// The target of an indirect branch, looked up: its address is in [`A`], its entry in [`B`].
    fn indirect_target(&mut self, i: usize, sites: &mut Vec<usize>) -> Option<()> {
        let (step, op) = self.at(i);
        if step.instruction.op0_kind() == OpKind::Memory {
            self.address(i)?;
            sites.push(self.check(8, false));
            self.a.rm(Two::Load, A, at(A, 0));
        } else {
            let number = op.dst;
            let from = self.fetch(number, A);
            self.a.copy(A, from);
        }
        sites.extend(look_up(&mut self.a));
        Some(())
    }

    pub(super) fn jump_indirect(&mut self, i: usize) -> Option<()> {
        self.save_flags();
        let mut sites = Vec::new();
        self.indirect_target(i, &mut sites)?;
        go(&mut self.a);
        self.slow(i, sites);
        Some(())
    }

    pub(super) fn call_indirect(&mut self, i: usize) -> Option<()> {
        self.save_flags();
        self.a.rm(Two::Lea, A, at(STACK, -8));
        let mut sites = vec![self.check(8, true)];
        self.a.rm(Two::Store, A, field::slot());
        self.indirect_target(i, &mut sites)?;
        // Nothing can go wrong from here on.
        self.a.copy(C, B);
        self.a.rm(Two::Load, A, field::slot());
        self.push_return(i, at(A, 0));
        self.a.rm(Two::Load, A, at(C, 0));
        self.a.copy(B, C);
        go(&mut self.a);
        self.slow(i, sites);
        Some(())
    }

    pub(super) fn ret(&mut self, i: usize) -> Option<()> {
        // A row keeps its address in A.
        self.save_flags_with(B);
        let (slot, mut sites) = self.check_pop(i);
        self.a.rm(Two::Load, A, slot);
        sites.extend(look_up(&mut self.a));
        let released = 8 + (self.at(i).1.immediate & 0xffff) as i32;
        self.a.rm(Two::Lea, STACK, at(STACK, released));
        go(&mut self.a);
        self.slow(i, sites);
        Some(())
    }
}
