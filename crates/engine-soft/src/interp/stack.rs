//! Pushing and popping.

use ringfence_memory::Scalar;
use ringfence_x86::{Exception, Gpr, SegmentRegister};

use super::cpu::Cpu;

const RSP: usize = Gpr::Rsp as usize;
const SS: u8 = SegmentRegister::Ss as u8;

impl Cpu {
    /// The stack pointer, as wide as the stack segment says.
    #[inline(always)]
    pub fn stack_pointer(&self) -> u64 {
        self.regs[RSP] & self.stack_mask
    }

    /// Moves the stack pointer; bits beyond the stack's width stay. A 32-bit stack pointer clears the upper half.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        self.regs[RSP] = match self.stack_mask {
            0xffff => self.regs[RSP] & !0xffff | value & 0xffff,
            mask => value & mask,
        };
    }

    /// Pushes a value. Nothing changes if it faults.
    ///
    /// # Errors
    /// #SS(0), #PF, #AC.
    #[inline(always)]
    pub fn push<T: Scalar>(&mut self, value: T) -> Result<(), Exception> {
        let top = self.stack_pointer().wrapping_sub(T::SIZE as u64) & self.stack_mask;
        let linear = self.linear(SS, top, T::SIZE as u64, true)?;
        self.store(SS, linear, value)?;
        self.set_stack_pointer(top);
        Ok(())
    }

    /// Pops a value. Nothing changes if it faults.
    ///
    /// # Errors
    /// #SS(0), #PF, #AC.
    #[inline(always)]
    pub fn pop<T: Scalar>(&mut self) -> Result<T, Exception> {
        let value = self.peek(0)?;
        self.set_stack_pointer(self.stack_pointer().wrapping_add(T::SIZE as u64));
        Ok(value)
    }

    /// Reads the stack `offset` bytes above its top.
    ///
    /// # Errors
    /// #SS(0), #PF, #AC.
    #[inline(always)]
    pub fn peek<T: Scalar>(&mut self, offset: u64) -> Result<T, Exception> {
        let at = self.stack_pointer().wrapping_add(offset) & self.stack_mask;
        let linear = self.linear(SS, at, T::SIZE as u64, false)?;
        self.load(SS, linear)
    }

    /// Raises what pushing `size` bytes would raise.
    ///
    /// # Errors
    /// As [`Cpu::push`].
    #[cold]
    pub fn probe_push(&mut self, size: u64) -> Result<(), Exception> {
        let offset = self.stack_pointer().wrapping_sub(size) & self.stack_mask;
        let linear = self.linear(SS, offset, size, true)?;
        self.probe(SS, linear, size as usize, true)
    }
}
