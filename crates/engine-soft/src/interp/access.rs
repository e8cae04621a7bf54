//! Memory accesses of instructions: segmentation, paging, alignment, devices.
//!
//! Each access first asks the soft TLB; whatever it does not hold takes the slow path here, which walks the
//! page tables, raises exceptions, splits accesses at page boundaries and calls devices.

use ringfence_memory::{GuestAddress, Scalar, host};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::{Cr4, Exception, SegmentRegister, Vector};

use super::cpu::Cpu;
use super::op::Op;
use crate::hostop::Int;
use crate::mmu::tlb::{Class, Grant, Page};
use crate::mmu::walk::{Access, Rights, translate};

/// What stands behind a page.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// Memory: the host address of the byte asked for, and its own if its page holds decoded code.
    Memory { host: *mut u8, code: Option<GuestAddress> },
    /// Read-only memory: writes are dropped.
    Rom(*mut u8),
    /// No memory: a device, or nothing.
    Device(GuestAddress),
}

/// A piece of an access that lies within one page.
#[derive(Clone, Copy, Debug)]
struct Piece {
    target: Target,
    len: usize,
}

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
    /// that leaves its page or reaches a device is not atomic.
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

    /// Translates an access of up to one page's size, page by page, lowest address first.
    #[cold]
    fn pieces(
        &mut self,
        segment: u8,
        linear: u64,
        size: usize,
        access: Access,
        rights: Rights,
    ) -> Result<[Option<Piece>; 2], Exception> {
        if size == 0 {
            return Ok([None; 2]);
        }
        let last = linear.wrapping_add(size as u64 - 1);
        if self.long_mode() && !(is_canonical(linear) && is_canonical(last)) {
            // The whole access is looked at before any page is.
            return Err(self.not_canonical(segment));
        }
        if self.class == Class::Slow && rights == self.explicit_rights() {
            self.check_alignment(linear, size as u64)?;
            self.check_breakpoints(linear, size as u64, access);
        }
        self.translated(segment, linear, size, access, rights)
    }

    /// As [`Cpu::pieces`] for an explicit access, without the alignment check.
    #[cold]
    fn pieces_anywhere(
        &mut self,
        segment: u8,
        linear: u64,
        size: usize,
        access: Access,
    ) -> Result<[Option<Piece>; 2], Exception> {
        if size == 0 {
            return Ok([None; 2]);
        }
        let last = linear.wrapping_add(size as u64 - 1);
        if self.long_mode() && !(is_canonical(linear) && is_canonical(last)) {
            return Err(self.not_canonical(segment));
        }
        if self.class == Class::Slow {
            self.check_breakpoints(linear, size as u64, access);
        }
        self.translated(segment, linear, size, access, self.explicit_rights())
    }

    fn translated(
        &mut self,
        segment: u8,
        linear: u64,
        size: usize,
        access: Access,
        rights: Rights,
    ) -> Result<[Option<Piece>; 2], Exception> {
        let mask = if self.long_mode() { u64::MAX } else { 0xffff_ffff };
        let first = size.min(0x1000 - (linear & 0xfff) as usize);
        let low = self.piece(segment, linear & mask, first, access, rights)?;
        let high = if first < size {
            let next = linear.wrapping_add(first as u64) & mask;
            Some(self.piece(segment, next, size - first, access, rights)?)
        } else {
            None
        };
        Ok([Some(low), high])
    }

    fn check_alignment(&self, linear: u64, size: u64) -> Result<(), Exception> {
        let aligned = !size.is_power_of_two() || size > 8 || linear & (size - 1) == 0;
        if aligned || !self.alignment_checked() { Ok(()) } else { Err(Exception::AC0) }
    }

    /// Notes the data breakpoints that an access hits.
    fn check_breakpoints(&mut self, linear: u64, size: u64, access: Access) {
        for i in 0..4 {
            let enabled = self.dr7 >> (2 * i) & 3 != 0;
            let condition = self.dr7 >> (16 + 4 * i) & 3;
            let wanted = condition == 3 || (condition == 1 && access == Access::Write);
            let len = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * i) & 3) as usize];
            let start = self.dr[i] & !(len - 1);
            if enabled && wanted && start < linear.wrapping_add(size) && linear < start.wrapping_add(len) {
                self.breakpoints_hit |= 1 << i;
            }
        }
    }

    fn piece(
        &mut self,
        segment: u8,
        linear: u64,
        len: usize,
        access: Access,
        rights: Rights,
    ) -> Result<Piece, Exception> {
        if self.long_mode() && !is_canonical(linear) {
            return Err(self.not_canonical(segment));
        }
        let class = match rights {
            Rights { user: true, .. } => Class::User,
            Rights { smap_open: false, .. } => Class::Kernel,
            Rights { smap_open: true, .. } => Class::KernelAc,
        };
        if self.tracker.is_none() {
            // A piece of an access to two pages, which missed as a whole.
            let known = match access {
                Access::Write => self.tlb.write(class, linear, len as u64),
                _ => self.tlb.read(class, linear, len as u64),
            };
            if let Some(host) = known {
                return Ok(Piece { target: Target::Memory { host, code: None }, len });
            }
        }
        let changes = self.tlb.changes();
        let known = match &self.tracker {
            Some(tracker) if access == Access::Write => tracker.walked(class, linear, changes),
            _ => None,
        };
        let found = match known {
            Some(found) => found,
            None => {
                let found = translate(&self.memory, &self.walk_context(), linear, access, rights);
                // The walk may have marked an entry in a page that is code as well.
                self.leave_block |= self.has_stale_code();
                found.map_err(|fault| {
                    self.fault_address = linear;
                    Exception::with_code(Vector::PageFault, fault.0.bits())
                })?
            }
        };
        let page = if self.is_apic_page(found.address) { None } else { self.memory.page(found.address) };
        let target = match page {
            None => Target::Device(found.address),
            Some(page) => {
                let host = page.host.wrapping_add(found.address.page_offset() as usize);
                let grant = match access {
                    _ if !(found.writable && page.writable) || page.code => Grant::Read,
                    Access::Write => Grant::Write,
                    _ if self.tracker.is_some() => Grant::Read,
                    _ => Grant::ReadOfWritable,
                };
                let mapping = Page { size: found.page_size, global: found.global };
                let both = !rights.user && !found.user && self.cr4.contains(Cr4::SMAP);
                // AC makes no difference to a supervisor's page, and kernels turn it on and off all the time.
                let other = if class == Class::Kernel { Class::KernelAc } else { Class::Kernel };
                for class in std::iter::once(class).chain(both.then_some(other)) {
                    self.tlb.fill(class, linear, page.host, grant, mapping);
                    if access == Access::Write
                        && let Some(tracker) = &mut self.tracker
                    {
                        tracker.remember(class, linear, changes, found);
                        if grant == Grant::Write {
                            tracker.opened(class, linear, found.address);
                        }
                    }
                }
                if page.writable {
                    Target::Memory { host, code: page.code.then_some(found.address) }
                } else {
                    Target::Rom(host)
                }
            }
        };
        Ok(Piece { target, len })
    }

    /// Whether code that this vCPU runs has been written.
    fn has_stale_code(&self) -> bool {
        self.translated.stale_code().unwrap_or(&self.stale).any()
    }

    /// What an address that is not canonical raises (SDM 1 3.3.7.1).
    pub(crate) fn not_canonical(&self, segment: u8) -> Exception {
        if segment == SegmentRegister::Ss as u8 { Exception::SS0 } else { Exception::GP0 }
    }

    fn load_pieces_into(&mut self, pieces: [Option<Piece>; 2], into: &mut [u8]) {
        let mut done = 0;
        for piece in pieces.into_iter().flatten() {
            self.load_piece(piece, &mut into[done..done + piece.len]);
            done += piece.len;
        }
    }

    fn store_pieces_from(&mut self, pieces: [Option<Piece>; 2], from: &[u8]) {
        let mut done = 0;
        for piece in pieces.into_iter().flatten() {
            self.store_piece(piece, &from[done..done + piece.len]);
            done += piece.len;
        }
    }

    fn load_pieces(&mut self, pieces: [Option<Piece>; 2]) -> u64 {
        let mut bytes = [0; 8];
        self.load_pieces_into(pieces, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn store_pieces(&mut self, pieces: [Option<Piece>; 2], value: u64) {
        self.store_pieces_from(pieces, &value.to_le_bytes());
    }

    fn load_piece(&mut self, piece: Piece, into: &mut [u8]) {
        match piece.target {
            // SAFETY: `piece` was cut so that its bytes lie in one page of guest memory. Aligned sizes are loaded by
            // one instruction, which keeps them atomic.
            Target::Memory { host: at, .. } | Target::Rom(at) => unsafe {
                match into.len() {
                    8 => into.copy_from_slice(&u64::load(at).to_le_bytes()),
                    4 => into.copy_from_slice(&u32::load(at).to_le_bytes()),
                    2 => into.copy_from_slice(&u16::load(at).to_le_bytes()),
                    _ => host::copy_from(at, into),
                }
            },
            Target::Device(address) => {
                into.fill(0xff);
                self.device_read(address, into);
            }
        }
    }

    fn store_piece(&mut self, piece: Piece, from: &[u8]) {
        match piece.target {
            Target::Memory { host: at, code } => {
                // SAFETY: as in `load_piece`; the page is writable guest memory.
                unsafe {
                    match *from {
                        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]).store(at),
                        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).store(at),
                        [a, b] => u16::from_le_bytes([a, b]).store(at),
                        _ => host::copy_to(from, at),
                    }
                }
                if let Some(address) = code {
                    if let Some(tracker) = &mut self.tracker {
                        tracker.wrote(address, from.len() as u64);
                    }
                    self.leave_block |= self.code.written(address, from.len() as u64);
                }
            }
            Target::Rom(_) => {}
            Target::Device(address) => self.device_write(address, from),
        }
    }

    /// Whether a physical address lies in this vCPU's local APIC page (SDM 3A 10.4.1).
    fn is_apic_page(&self, address: GuestAddress) -> bool {
        self.apic_page().is_some_and(|base| address.page().0 == base)
    }

    fn device_read(&mut self, address: GuestAddress, into: &mut [u8]) {
        self.sync_clock();
        if self.is_apic_page(address) {
            self.apic_page_read(address.page_offset(), into);
        } else {
            self.bus.memory_read(address, into);
        }
    }

    fn device_write(&mut self, address: GuestAddress, from: &[u8]) {
        self.sync_clock();
        if self.is_apic_page(address) {
            self.apic_page_write(address.page_offset(), from);
        } else {
            self.bus.memory_write(address, from);
        }
        // The device may have changed what is mapped, requested an interrupt, or ended the run.
        self.leave_block = true;
    }
}
