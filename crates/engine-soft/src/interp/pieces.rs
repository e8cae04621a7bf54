//! The slow path of accesses: page by page, by the page tables, to memory, read-only memory, devices, or an exception.
//!
//! What the soft TLB does not hold comes here from [`super::access`]: breakpoints and alignment are checked, each page that an access
//! touches is walked before anything is read or written, and what was found is put in the soft TLB.

use ringfence_memory::{GuestAddress, Scalar, host};
use ringfence_x86::paging::is_canonical;
use ringfence_x86::{Cr4, Exception, SegmentRegister, Vector};

use super::cpu::Cpu;
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
pub(super) struct Piece {
    target: Target,
    len: usize,
}

/// Whether an access must be aligned where alignment is checked (SDM 3A 7.15, interrupt 17).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alignment {
    Checked,
    Any,
}

impl Cpu {
    /// Translates an access of up to one page's size, page by page, lowest address first.
    #[cold]
    pub(super) fn pieces(
        &mut self,
        segment: u8,
        linear: u64,
        size: usize,
        access: Access,
        rights: Rights,
    ) -> Result<[Option<Piece>; 2], Exception> {
        self.checked(segment, linear, size, access, rights, Alignment::Checked)
    }

    /// As [`Cpu::pieces`] for an explicit access, without the alignment check.
    #[cold]
    pub(super) fn pieces_anywhere(
        &mut self,
        segment: u8,
        linear: u64,
        size: usize,
        access: Access,
    ) -> Result<[Option<Piece>; 2], Exception> {
        self.checked(segment, linear, size, access, self.explicit_rights(), Alignment::Any)
    }

    fn checked(
        &mut self,
        segment: u8,
        linear: u64,
        size: usize,
        access: Access,
        rights: Rights,
        alignment: Alignment,
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
            if alignment == Alignment::Checked {
                self.check_alignment(linear, size as u64)?;
            }
            self.check_breakpoints(linear, size as u64, access);
        }
        self.translated(segment, linear, size, access, rights)
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

    pub(super) fn load_pieces_into(&mut self, pieces: [Option<Piece>; 2], into: &mut [u8]) {
        let mut done = 0;
        for piece in pieces.into_iter().flatten() {
            self.load_piece(piece, &mut into[done..done + piece.len]);
            done += piece.len;
        }
    }

    pub(super) fn store_pieces_from(&mut self, pieces: [Option<Piece>; 2], from: &[u8]) {
        let mut done = 0;
        for piece in pieces.into_iter().flatten() {
            self.store_piece(piece, &from[done..done + piece.len]);
            done += piece.len;
        }
    }

    pub(super) fn load_pieces(&mut self, pieces: [Option<Piece>; 2]) -> u64 {
        let mut bytes = [0; 8];
        self.load_pieces_into(pieces, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn store_pieces(&mut self, pieces: [Option<Piece>; 2], value: u64) {
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
