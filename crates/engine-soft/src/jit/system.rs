//! System instructions that kernels execute all the time, and others that need more than their operands put in place.
//!
//! What is emitted is the common case: CPL 0, nothing waiting, no change of what anything else depends on. The rest is the
//! handler's.

use iced_x86::{Code, Mnemonic};
use ringfence_x86::{Cr4, Rflags, msr};

use super::asm::{Imm, Reg, Two, at, cc};
use super::emit::Emitter;
use super::operand::{FS, GS, adds_base};
use super::privilege::{forget_stack, load_rflags, not_canonical, store_rflags};
use super::registers::{A, B, BUDGET, C, Home, STACK, TABLE, home};
use super::state::field;
use super::stubs::load_table;
use crate::interp::op::prefix;
use crate::mmu::tlb::Class;

impl Emitter<'_> {
    /// Flags are stored; the branch is taken above CPL 0.
    fn check_privilege(&mut self) -> usize {
        self.save_flags();
        self.host_flags = false;
        self.a.compare_byte(field::cpl(), 0);
        self.a.jcc(cc::NE)
    }

    /// CLI.
    pub(super) fn clear_interrupts(&mut self, i: usize) -> Option<()> {
        let site = self.check_privilege();
        self.a.imm_mem32(Imm::And, field::flags(), !(Rflags::IF.bits() as i32));
        self.slow(i, [site]);
        Some(())
    }

    /// STI. Nothing waits, so nobody can tell when interrupts are let in; unless the run ends before the next instruction has been
    /// executed, where an interrupt that has come meanwhile would be taken too early (SDM 2B "STI"): a HLT behind it
    /// would then wait for that interrupt.
    pub(super) fn set_interrupts(&mut self, i: usize) -> Option<()> {
        let mut sites = vec![self.check_privilege()];
        self.a.rm(Two::Load, A, field::inbox());
        self.a.compare_imm32(at(A, 0), 0);
        sites.push(self.a.jcc(cc::NE));
        if let Some(needed) = self.needed_behind(i) {
            self.a.compare_imm(BUDGET, needed);
            sites.push(self.a.jcc(cc::L));
        }
        self.a.imm_mem32(Imm::Or, field::flags(), Rflags::IF.bits() as i32);
        self.slow(i, sites);
        Some(())
    }

    /// What the budget must cover for the run to go on behind step `i`; none if it certainly does.
    fn needed_behind(&self, i: usize) -> Option<i32> {
        match self.source.steps.get(i + 1) {
            Some(next) if !self.source.steps[i].last => (next.unit != 0).then(|| next.unit.into()),
            // Another region's, perhaps.
            _ => Some(self.source.most as i32),
        }
    }

    /// STAC and CLAC: RFLAGS.AC, and with it the tables of the soft TLB.
    pub(super) fn access_user_pages(&mut self, i: usize, allow: bool) -> Option<()> {
        let (from, to) =
            if allow { (Class::Kernel, Class::KernelAc) } else { (Class::KernelAc, Class::Kernel) };
        self.save_flags();
        self.host_flags = false;
        // Kernels clear it on every entry.
        let clear = (!allow).then(|| {
            self.a.compare_byte(field::class(), to as u8);
            self.a.jcc(cc::E)
        });
        self.a.compare_byte(field::class(), from as u8);
        let mut sites = vec![self.a.jcc(cc::NE)];
        if !allow {
            // Without SMAP the class is the same whatever AC is.
            self.a.test_imm32(field::cr4(), Cr4::SMAP.bits() as u32);
            sites.push(self.a.jcc(cc::E));
        }
        let flag = Rflags::AC.bits() as i32;
        if allow {
            self.a.imm_mem32(Imm::Or, field::flags(), flag);
        } else {
            self.a.imm_mem32(Imm::And, field::flags(), !flag);
        }
        self.a.store_byte(field::class(), to as u8);
        self.a.rm(Two::Load, TABLE, field::kernel_table(allow));
        self.a.rm(Two::Store, TABLE, field::data_table());
        // The page of the stack was found with the other rights.
        forget_stack(&mut self.a);
        if let Some(clear) = clear {
            self.a.bind(clear);
        }
        self.slow(i, sites);
        Some(())
    }

    /// SWAPGS.
    pub(super) fn swap_gs(&mut self, i: usize) -> Option<()> {
        let site = self.check_privilege();
        let [base, used] = field::base_of(GS);
        self.a.rm(Two::Load, A, field::msr(msr::KERNEL_GS_BASE));
        self.a.rm(Two::Load, B, base);
        self.a.rm(Two::Store, B, field::msr(msr::KERNEL_GS_BASE));
        self.a.rm(Two::Store, A, base);
        self.a.rm(Two::Store, A, used);
        self.slow(i, [site]);
        Some(())
    }

    /// MOV from CR0, CR2, CR3 or CR4: every page fault of a kernel's has two.
    pub(super) fn read_control(&mut self, i: usize) -> Option<()> {
        let (_, op) = self.at(i);
        let (from, to) = (op.src, op.dst);
        let from = match from {
            0 => field::cr0(),
            2 => field::cr2(),
            3 => field::cr3(),
            4 => field::cr4(),
            _ => return None,
        };
        let site = self.check_privilege();
        self.a.rm(Two::Load, A, from);
        self.put(to, A);
        self.slow(i, [site]);
        Some(())
    }

    /// Leaves by the branch returned if FS and GS bases are not to be read and written by instructions. Flags are stored.
    fn check_fsgsbase(&mut self) -> usize {
        self.save_flags();
        self.host_flags = false;
        self.a.test_imm32(field::cr4(), Cr4::FSGSBASE.bits() as u32);
        self.a.jcc(cc::E)
    }

    /// RDFSBASE and RDGSBASE.
    pub(super) fn read_base(&mut self, i: usize) -> Option<()> {
        let op = self.at(i).1;
        let segment = if op.code.mnemonic() == Mnemonic::Rdfsbase { FS } else { GS };
        let (wide, to) = (matches!(op.code, Code::Rdfsbase_r64 | Code::Rdgsbase_r64), op.dst);
        let site = self.check_fsgsbase();
        let [base, _] = field::base_of(segment);
        if wide {
            self.a.rm(Two::Load, A, base);
        } else {
            self.a.rm32(Two::Load, A, base);
        }
        self.put(to, A);
        self.slow(i, vec![site]);
        Some(())
    }

    /// WRFSBASE and WRGSBASE.
    pub(super) fn write_base(&mut self, i: usize) -> Option<()> {
        let op = self.at(i).1;
        let segment = if op.code.mnemonic() == Mnemonic::Wrfsbase { FS } else { GS };
        let from = op.dst;
        let mut sites = vec![self.check_fsgsbase()];
        let value = self.fetch(from, A);
        sites.push(not_canonical(&mut self.a, value));
        for place in field::base_of(segment) {
            self.a.rm(Two::Store, value, place);
        }
        self.slow(i, sites);
        Some(())
    }

    /// MOV from a segment register.
    pub(super) fn selector(&mut self, i: usize) -> Option<()> {
        let op = self.at(i).1;
        let (from, to) = (op.src, op.dst);
        if !op.has(prefix::MEMORY) {
            let part = op.code == Code::Mov_rm16_Sreg;
            match home(to) {
                Home::Host(reg) if part => self.a.load_low_word(reg, field::selector(from)),
                Home::Host(reg) => self.a.load_word(reg, field::selector(from)),
                Home::Slot => {
                    self.a.load_word(A, field::selector(from));
                    if part {
                        self.a.store_word(A, field::register(to));
                    } else {
                        self.a.rm(Two::Store, A, field::register(to));
                    }
                }
            }
            return Some(());
        }
        self.keep_flags(i);
        self.address(i)?;
        let site = self.check(2, 1, true);
        self.a.load_word(B, field::selector(from));
        self.a.store_word(B, at(A, 0));
        self.slow(i, vec![site]);
        Some(())
    }

    /// Guest register `number` from a host register.
    pub(super) fn put(&mut self, number: u8, from: Reg) {
        match home(number) {
            Home::Host(reg) => self.a.copy(reg, from),
            Home::Slot => self.a.rm(Two::Store, from, field::register(number)),
        }
    }

    /// PUSHFQ and PUSHFD.
    pub(super) fn push_flags(&mut self, i: usize) -> Option<()> {
        self.save_flags();
        let (slot, check) = self.check_push(i);
        load_rflags(&mut self.a, B);
        load_table(&mut self.a);
        self.a.imm(Imm::And, true, B, !((Rflags::VM | Rflags::RF).bits() as i32));
        self.store_pointer(B, slot);
        self.lea(STACK, at(STACK, -self.word()));
        self.host_flags = false;
        self.slow_unless_covered(i, check);
        Some(())
    }

    /// POPFQ and POPFD (SDM 2B), where nothing changes but the arithmetic flags, DF and, at CPL 0, IF. Interrupts are let in at once,
    /// so nothing may wait then.
    pub(super) fn pop_flags(&mut self, i: usize) -> Option<()> {
        let (slot, check) = self.check_pop(i);
        self.load_pointer(B, slot);
        // In translated code TF, RF and VM are clear (`Cpu::steps_singly`).
        self.a.rm(Two::Load, C, field::flags());
        self.a.rr(Two::Xor, C, B);
        let kept = Rflags::all() - Rflags::STATUS - Rflags::DF - Rflags::FIXED;
        self.a.imm(Imm::And, false, C, kept.bits() as i32);
        let same = self.a.jcc(cc::E);
        self.a.imm(Imm::Xor, false, C, Rflags::IF.bits() as i32);
        let mut sites = vec![self.a.jcc(cc::NE)];
        self.a.compare_byte(field::cpl(), 0);
        sites.push(self.a.jcc(cc::NE));
        self.a.rr32(Two::Load, C, B);
        self.a.imm(Imm::And, false, C, Rflags::IF.bits() as i32);
        let clears = self.a.jcc(cc::E);
        self.a.rm(Two::Load, C, field::inbox());
        self.a.compare_imm32(at(C, 0), 0);
        sites.push(self.a.jcc(cc::NE));
        self.a.bind(clears);
        self.a.bind(same);
        store_rflags(&mut self.a);
        load_table(&mut self.a);
        self.lea(STACK, at(STACK, self.word()));
        (self.host_flags, self.stored_flags) = (false, true);
        self.slow_unless_covered(i, check);
        self.slow(i, sites);
        Some(())
    }

    /// PUSH of an operand in memory.
    pub(super) fn push_memory(&mut self, i: usize) -> Option<()> {
        self.keep_flags(i);
        self.address(i)?;
        let word = self.word();
        let mut sites = vec![self.check(word as usize, 1, false)];
        self.load_pointer(A, at(A, 0));
        self.a.rm(Two::Store, A, field::slot());
        self.lea(A, at(STACK, -word));
        sites.push(self.check(word as usize, 1, true));
        self.a.rm(Two::Load, B, field::slot());
        self.store_pointer(B, at(A, 0));
        self.lea(STACK, at(STACK, -word));
        self.slow(i, sites);
        Some(())
    }

    /// POP to memory, where the stack pointer is not the operand's base: that would be what it is behind the POP (SDM 2B, POP).
    pub(super) fn pop_memory(&mut self, i: usize) -> Option<()> {
        if home(self.at(i).1.base) == Home::Host(STACK) {
            return None;
        }
        self.keep_flags(i);
        let word = self.word();
        self.copy_pointer(A, STACK);
        let mut sites = vec![self.check(word as usize, 1, false)];
        self.load_pointer(A, at(A, 0));
        self.a.rm(Two::Store, A, field::slot());
        self.address(i)?;
        sites.push(self.check(word as usize, 1, true));
        self.a.rm(Two::Load, B, field::slot());
        self.store_pointer(B, at(A, 0));
        self.lea(STACK, at(STACK, word));
        self.slow(i, sites);
        Some(())
    }

    /// BT, BTS, BTR and BTC whose bit number reaches beyond the operand: the operand is the part of the string that holds the
    /// bit (SDM 2A, BT).
    pub(super) fn bit_string(&mut self, i: usize) -> Option<()> {
        let (step, op) = self.at(i);
        let (number, mut instruction) = (op.src, self.source.instruction(i));
        let (effect, wanted) = (step.effect, step.wanted);
        let wide = instruction.op1_register().size() == 8;
        let size = if wide { 8 } else { 4 };
        let based = adds_base(op) && self.is_narrow();
        if op.address_mask != self.whole_mask() || based || !(wide || instruction.op1_register().size() == 4)
        {
            return None;
        }
        self.keep_flags(i);
        self.address(i)?;
        let from = self.fetch(number, C);
        if wide {
            self.a.copy(C, from);
        } else {
            self.a.sign_extend(C, from);
        }
        self.a.sar(true, C, if wide { 6 } else { 5 });
        let index = super::asm::Mem { base: Some(A), index: Some((C, if wide { 3 } else { 2 })), disp: 0 };
        self.lea(A, index);
        load_table(&mut self.a);
        let alignment = if op.is_locked() { size as u8 } else { 1 };
        let site = self.check(size, alignment, instruction.mnemonic() != iced_x86::Mnemonic::Bt);
        let from = self.fetch(number, C);
        self.a.copy(C, from);
        self.a.imm(Imm::And, false, C, if wide { 63 } else { 31 });
        if effect.needs_flags(wanted) {
            self.restore_flags(B);
        }
        super::operand::place_memory(&mut instruction, super::asm::at(A, 0));
        instruction.set_op1_register(super::registers::sized(C, size));
        self.encode(&instruction)?;
        load_table(&mut self.a);
        self.flags_changed(i);
        self.slow(i, [site]);
        Some(())
    }
}
