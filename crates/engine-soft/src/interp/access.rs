//! Memory accesses of instructions: segmentation, paging, alignment, devices.
//!
//! Each access first asks the soft TLB; whatever it does not hold takes the slow path ([`super::pieces`]), which walks the
//! page tables, raises exceptions, splits accesses at page boundaries and calls devices.

use ringfence_memory::Scalar;
use ringfence_x86::{Exception, SegmentRegister};

use super::cpu::Cpu;
use super::op::Op;
use crate::hostop::Int;
use crate::mmu::walk::Access;

/// Bytes in a cache line of the host.
const CACHE_LINE: u64 = 64;

impl Cpu {
    /// The effective address of the memory operand: its offset in the segment.
    #[inline(always)]
    pub fn effective_address(&self, op: &Op) -> u64 {
        self.regs[usize::from(op.base)]
            .wrapping_add(self.regs[usize::from(op.index)] << op.scale)
            .wrapping_add(op.displacement as u64)
            & op.address_mask
    }

    /// Reads the memory operand.
    ///
    /// # Errors
    /// What the processor raises for the access.
    #[inline(always)]
    pub fn read<T: Scalar>(&mut self, op: &Op) -> Result<T, Exception> {
        let linear = self.linear(op.segment, self.effective_address(op), T::SIZE as u64, false)?;
        self.load(op.segment, linear)
    }

    /// Writes the memory operand.
    ///
    /// # Errors
    /// What the processor raises for the access; nothing is written then.
    #[inline(always)]
    pub fn write<T: Scalar>(&mut self, op: &Op, value: T) -> Result<(), Exception> {
        let linear = self.linear(op.segment, self.effective_address(op), T::SIZE as u64, true)?;
        self.store(op.segment, linear, value)
    }

    /// Reads the memory operand, lets `f` compute from it, and writes the result back. Every fault is raised
    /// before `f` runs.
    ///
    /// # Errors
    /// What the processor raises for the access.
    #[inline(always)]
    pub fn modify<T: Int>(&mut self, op: &Op, f: impl FnOnce(&mut Self, T) -> T) -> Result<(), Exception> {
        let linear = self.linear(op.segment, self.effective_address(op), T::SIZE as u64, true)?;
        self.modify_linear(op.segment, linear, f)
    }

    /// As [`Cpu::modify`], at a linear address.
    ///
    /// # Errors
    /// As [`Cpu::modify`].
    #[inline(always)]
    pub fn modify_linear<T: Int>(
        &mut self,
        segment: u8,
        linear: u64,
        f: impl FnOnce(&mut Self, T) -> T,
    ) -> Result<(), Exception> {
        if let Some(at) = self.tlb.write(self.class, linear, T::SIZE as u64) {
            // SAFETY: a write hit covers `SIZE` bytes of guest memory, readable and writable.
            let old = unsafe { T::load(at) };
            let new = f(self, old);
            // SAFETY: as above; `f` computes only, so the entry still holds.
            unsafe { new.store(at) };
            return Ok(());
        }
        let pieces = self.pieces(segment, linear, T::SIZE, Access::Write, self.explicit_rights())?;
        let old = T::truncate(self.load_pieces(pieces));
        let new = f(self, old);
        self.store_pieces(pieces, new.widen());
        Ok(())
    }

    /// As [`Cpu::modify`], atomically: `f` may run several times and sees a fresh value each time. An access
    /// that leaves its cache line or reaches a device is not atomic: the host would have to lock its bus for the former.
    ///
    /// # Errors
    /// As [`Cpu::modify`].
    pub fn modify_locked<T: Int>(
        &mut self,
        op: &Op,
        mut f: impl FnMut(&mut Self, T) -> T,
    ) -> Result<(), Exception> {
        let linear = self.linear(op.segment, self.effective_address(op), T::SIZE as u64, true)?;
        self.modify_locked_linear(op.segment, linear, &mut f)
    }

    /// As [`Cpu::modify_locked`], at a linear address.
    ///
    /// # Errors
    /// As [`Cpu::modify`].
    pub fn modify_locked_linear<T: Int>(
        &mut self,
        segment: u8,
        linear: u64,
        mut f: impl FnMut(&mut Self, T) -> T,
    ) -> Result<(), Exception> {
        if linear % CACHE_LINE > CACHE_LINE - T::SIZE as u64 {
            return self.modify_linear(segment, linear, |cpu, old| f(cpu, old));
        }
        let Some(at) = self.tlb.write(self.class, linear, T::SIZE as u64).or_else(|| {
            // One miss may only mean a cold entry: the slow path fills it.
            self.pieces(segment, linear, T::SIZE, Access::Write, self.explicit_rights()).ok()?;
            self.tlb.write(self.class, linear, T::SIZE as u64)
        }) else {
            return self.modify_linear(segment, linear, |cpu, old| f(cpu, old));
        };
        // SAFETY: a write hit covers `SIZE` bytes of guest memory, readable and writable.
        let mut old = unsafe { T::load(at) };
        loop {
            let new = f(self, old);
            // SAFETY: as above; `f` computes only, so the entry still holds.
            let found = unsafe { T::compare_exchange(at, old, new) };
            if found == old {
                return Ok(());
            }
            old = found;
        }
    }

    /// The linear address of `size` bytes at `offset` in a segment, after the checks of SDM 3A 5.3 and 5.5. In 64-bit
    /// mode canonicality is checked later, where the page is looked up.
    ///
    /// # Errors
    /// #GP(0), or #SS(0) for the stack segment.
    #[inline(always)]
    pub fn linear(&self, segment: u8, offset: u64, size: u64, write: bool) -> Result<u64, Exception> {
        let index = usize::from(segment);
        if self.is_64bit() {
            return Ok(self.bases[index].wrapping_add(offset));
        }
        if self.flat[index] & (1 + u8::from(write)) != 0 && offset.wrapping_add(size - 1) <= 0xffff_ffff {
            return Ok(offset);
        }
        self.linear_checked(segment, offset, size, write)
    }

    #[cold]
    fn linear_checked(&self, segment: u8, offset: u64, size: u64, write: bool) -> Result<u64, Exception> {
        let fault = if segment == SegmentRegister::Ss as u8 { Exception::SS0 } else { Exception::GP0 };
        let s = &self.segments[usize::from(segment)];
        if self.protected() {
            let kind = if write { s.is_writable() } else { s.is_readable() };
            if !kind || !s.has(ringfence_x86::segment::attribute::PRESENT) {
                return Err(fault);
            }
        }
        let last = offset.wrapping_add(size - 1);
        let inside = if s.is_expand_down() {
            let top = if s.has(ringfence_x86::segment::attribute::DB) { 0xffff_ffff } else { 0xffff };
            offset > u64::from(s.limit) && last <= top && last >= offset
        } else {
            last <= u64::from(s.limit) && last >= offset
        };
        if inside { Ok(s.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(fault) }
    }

    /// Loads from a linear address.
    ///
    /// # Errors
    /// What the processor raises for the access.
    #[inline(always)]
    pub fn load<T: Scalar>(&mut self, segment: u8, linear: u64) -> Result<T, Exception> {
        match self.tlb.read(self.class, linear, T::SIZE as u64) {
            // SAFETY: a read hit covers `SIZE` bytes of guest memory.
            Some(at) => Ok(unsafe { T::load(at) }),
            None => {
                let pieces = self.pieces(segment, linear, T::SIZE, Access::Read, self.explicit_rights())?;
                Ok(T::truncate(self.load_pieces(pieces)))
            }
        }
    }

    /// Stores to a linear address.
    ///
    /// # Errors
    /// What the processor raises for the access; nothing is written then.
    #[inline(always)]
    pub fn store<T: Scalar>(&mut self, segment: u8, linear: u64, value: T) -> Result<(), Exception> {
        match self.tlb.write(self.class, linear, T::SIZE as u64) {
            // SAFETY: a write hit covers `SIZE` writable bytes of guest memory.
            Some(at) => unsafe { value.store(at) },
            None => {
                let pieces = self.pieces(segment, linear, T::SIZE, Access::Write, self.explicit_rights())?;
                self.store_pieces(pieces, value.widen());
            }
        }
        Ok(())
    }

    /// Loads on the processor's own behalf (descriptor tables, task-state segments).
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub fn load_system<T: Scalar>(&mut self, linear: u64) -> Result<T, Exception> {
        if let Some(at) = self.tlb.read(self.implicit_class(), linear, T::SIZE as u64) {
            // SAFETY: a read hit covers `SIZE` bytes of guest memory.
            return Ok(unsafe { T::load(at) });
        }
        let rights = self.implicit_rights();
        let pieces = self.pieces(SegmentRegister::Ds as u8, linear, T::SIZE, Access::Read, rights)?;
        Ok(T::truncate(self.load_pieces(pieces)))
    }

    /// Stores on the processor's own behalf.
    ///
    /// # Errors
    /// As [`Cpu::load_system`].
    pub fn store_system<T: Scalar>(&mut self, linear: u64, value: T) -> Result<(), Exception> {
        let rights = self.implicit_rights();
        if let Some(at) = self.tlb.write(self.implicit_class(), linear, T::SIZE as u64) {
            // SAFETY: a write hit covers `SIZE` writable bytes of guest memory.
            unsafe { value.store(at) };
            return Ok(());
        }
        let pieces = self.pieces(SegmentRegister::Ds as u8, linear, T::SIZE, Access::Write, rights)?;
        self.store_pieces(pieces, value.widen());
        Ok(())
    }

    /// Raises what a read or write of `size` bytes (up to 4096) at a linear address would raise.
    ///
    /// # Errors
    /// What the processor raises for the access.
    pub fn probe(&mut self, segment: u8, linear: u64, size: usize, write: bool) -> Result<(), Exception> {
        let access = if write { Access::Write } else { Access::Read };
        self.pieces(segment, linear, size, access, self.explicit_rights()).map(drop)
    }

    /// The host address of `size` bytes at a linear address for reading or writing, if they are plain guest memory in
    /// one page. `None` means that the caller must go the long way, which raises what there is to raise.
    pub fn host_span(&mut self, segment: u8, linear: u64, size: usize, write: bool) -> Option<*mut u8> {
        let class = self.class;
        let look = |cpu: &Self| {
            if write {
                cpu.tlb.write(class, linear, size as u64)
            } else {
                cpu.tlb.read(class, linear, size as u64)
            }
        };
        look(self).or_else(|| {
            self.probe(segment, linear, 1, write).ok()?;
            look(self)
        })
    }

    /// As [`Cpu::probe`], for an operand with alignment rules of its own.
    ///
    /// # Errors
    /// What the processor raises for the access, but for #AC.
    pub fn probe_bytes(
        &mut self,
        segment: u8,
        linear: u64,
        size: usize,
        write: bool,
    ) -> Result<(), Exception> {
        let access = if write { Access::Write } else { Access::Read };
        self.pieces_anywhere(segment, linear, size, access).map(drop)
    }

    /// Copies up to 4096 bytes from a linear address. Alignment is the caller's business.
    ///
    /// # Errors
    /// What the processor raises for the access, but for #AC; `into` is untouched then.
    pub fn load_bytes(&mut self, segment: u8, linear: u64, into: &mut [u8]) -> Result<(), Exception> {
        let pieces = self.pieces_anywhere(segment, linear, into.len(), Access::Read)?;
        self.load_pieces_into(pieces, into);
        Ok(())
    }

    /// Copies up to 4096 bytes to a linear address. Alignment is the caller's business.
    ///
    /// # Errors
    /// What the processor raises for the access, but for #AC; nothing is written then.
    pub fn store_bytes(&mut self, segment: u8, linear: u64, from: &[u8]) -> Result<(), Exception> {
        let pieces = self.pieces_anywhere(segment, linear, from.len(), Access::Write)?;
        self.store_pieces_from(pieces, from);
        Ok(())
    }
}
