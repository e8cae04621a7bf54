//! IRET (SDM 2A IRET; 3A 6.12.1.1, 6.14.3, 20.3.3).

use iced_x86::{Code, Instruction};
use ringfence_memory::Scalar;
use ringfence_x86::segment::{Selector, attribute};
use ringfence_x86::{Exception, Rflags, SegmentRegister, Vector};

use super::task::Reason;
use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op, RIP};

/// Flags that IRET and POPF load at any privilege level with a 16-bit operand.
pub(super) const ANY: Rflags = Rflags::from_bits_retain(
    Rflags::STATUS.bits() | Rflags::TF.bits() | Rflags::DF.bits() | Rflags::NT.bits(),
);

impl Cpu {
    /// The flags that IRET loads with an operand of `T`'s size, but for those of virtual-8086 mode.
    fn iret_flags<T: Scalar>(&self) -> Rflags {
        let mut mask = ANY;
        if T::SIZE > 2 {
            mask |= Rflags::RF | Rflags::AC | Rflags::ID;
        }
        if self.cpl <= self.flags.iopl() || !self.protected() {
            mask |= Rflags::IF;
        }
        if self.cpl == 0 {
            mask |= Rflags::IOPL;
            if T::SIZE > 2 {
                mask |= Rflags::VIF | Rflags::VIP;
            }
        }
        mask
    }

    /// Loads those flags that `mask` allows.
    pub(super) fn load_flags(&mut self, value: u64, mask: Rflags) {
        self.set_rflags(self.rflags() & !mask.bits() | value & mask.bits());
        self.leave_block = true;
    }

    /// IRET with an offset, selector and flags of one size each.
    fn interrupt_return<T: Scalar>(&mut self) -> Result<(), Exception> {
        // Even an IRET that faults ends the masking of NMIs (SDM 3A 6.7.1).
        self.nmi_masked = false;
        if self.protected() && self.flags.contains(Rflags::NT) {
            return self.return_to_task();
        }
        let size = T::SIZE as u64;
        let offset = self.peek::<T>(0)?.widen();
        let selector = Selector(self.peek::<T>(size)?.widen() as u16);
        let flags = self.peek::<T>(2 * size)?.widen();
        let after = self.stack_pointer().wrapping_add(3 * size);
        if self.real_or_virtual() {
            return self.return_real::<T>(selector, offset, flags, after);
        }
        let virtual_8086 = T::SIZE == 4 && flags & Rflags::VM.bits() != 0;
        if virtual_8086 && self.cpl == 0 && !self.long_mode() {
            return self.return_virtual(selector, offset, flags);
        }
        let mask = self.iret_flags::<T>();
        let cs = self.return_segment(selector, offset)?;
        let rpl = selector.rpl();
        // 64-bit code always pops a stack pointer (SDM 3A 6.14.3).
        if rpl == self.cpl && !self.is_64bit() {
            self.set_stack_pointer(after);
            self.set_segment(SegmentRegister::Cs, cs);
        } else {
            let pointer = self.peek::<T>(3 * size)?.widen();
            let stack = Selector(self.peek::<T>(4 * size)?.widen() as u16);
            let to_64bit = self.long_mode() && cs.has(attribute::LONG);
            let ss = self.resolve_stack(stack, rpl, to_64bit, Vector::GeneralProtection, 0)?;
            self.enter_outer(cs, ss, pointer);
        }
        self.regs[RIP] = offset;
        self.load_flags(flags, mask);
        Ok(())
    }

    fn return_real<T: Scalar>(
        &mut self,
        selector: Selector,
        offset: u64,
        flags: u64,
        after: u64,
    ) -> Result<(), Exception> {
        let virtual_8086 = self.flags.contains(Rflags::VM);
        if virtual_8086 && self.flags.iopl() < 3 {
            return Err(Exception::GP0);
        }
        let limit = self.segment(SegmentRegister::Cs).limit;
        if offset > u64::from(limit) {
            return Err(Exception::GP0);
        }
        let mut mask = self.iret_flags::<T>();
        if !virtual_8086 {
            // VIF and VIP stay in real mode (SDM 2A, IRET: REAL-ADDRESS-MODE).
            mask.remove(Rflags::VIF | Rflags::VIP);
        }
        self.set_real_segment(SegmentRegister::Cs, selector.0);
        self.set_stack_pointer(after);
        self.regs[RIP] = offset;
        self.load_flags(flags, mask);
        Ok(())
    }

    /// From CPL 0 to virtual-8086 mode: the frame goes on with ESP, SS, ES, DS, FS and GS.
    fn return_virtual(&mut self, cs: Selector, offset: u64, flags: u64) -> Result<(), Exception> {
        let mut frame = [0; 6];
        for (i, value) in frame.iter_mut().enumerate() {
            *value = self.peek::<u32>(12 + 4 * i as u64)?;
        }
        if offset > 0xffff {
            return Err(Exception::GP0);
        }
        let [sp, ss, es, ds, fs, gs] = frame;
        self.set_rflags(flags & Rflags::WRITABLE.bits());
        self.cpl = 3;
        self.set_real_segment(SegmentRegister::Cs, cs.0);
        let registers = [
            (SegmentRegister::Ss, ss),
            (SegmentRegister::Es, es),
            (SegmentRegister::Ds, ds),
            (SegmentRegister::Fs, fs),
            (SegmentRegister::Gs, gs),
        ];
        for (register, value) in registers {
            self.set_real_segment(register, value as u16);
        }
        self.regs[RIP] = offset;
        self.regs[4] = u64::from(sp);
        Ok(())
    }

    fn return_to_task(&mut self) -> Result<(), Exception> {
        if self.long_mode() {
            return Err(Exception::GP0);
        }
        let link: u16 = self.load_system(self.tr.base)?;
        let result = self.transact(|cpu| cpu.switch_task(Selector(link), Reason::Return, 0));
        self.settle_task_switch(result)
    }
}

fn iret<T: Scalar>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    cpu.interrupt_return::<T>()
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Iretw => iret::<u16>,
        Code::Iretd => iret::<u32>,
        Code::Iretq => iret::<u64>,
        _ => return None,
    })
}
