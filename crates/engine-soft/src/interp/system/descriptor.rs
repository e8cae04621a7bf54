//! Descriptors: finding them, checking them, and what a segment register becomes (SDM 3A 3.4, 3.5, 5.2 to 5.8).

use ringfence_x86::segment::{Segment, Selector, attribute, system_type};
use ringfence_x86::{Exception, SegmentRegister, Vector};

use crate::interp::cpu::Cpu;

/// The error code of a fault on a selector. `ext` is 1 if an event outside the program led there.
pub(in crate::interp) fn selector_fault(vector: Vector, selector: Selector, ext: u16) -> Exception {
    Exception::with_code(vector, selector.error_code() | ext)
}

/// Whether a descriptor is for a present segment or gate.
pub(crate) fn is_present(descriptor: u64) -> bool {
    descriptor >> 47 & 1 != 0
}

/// Whether a descriptor is for code or data rather than for a system segment or gate.
pub(crate) fn is_memory(descriptor: u64) -> bool {
    descriptor >> 44 & 1 != 0
}

/// Type field, 0 to 15.
pub(crate) fn kind(descriptor: u64) -> u8 {
    (descriptor >> 40 & 0xf) as u8
}

/// Descriptor privilege level.
pub(crate) fn dpl(descriptor: u64) -> u8 {
    (descriptor >> 45 & 3) as u8
}

/// Conforming code (`descriptor` is for code).
pub(crate) fn is_conforming(descriptor: u64) -> bool {
    descriptor >> 42 & 1 != 0
}

/// A code segment's descriptor.
pub(crate) fn is_code(descriptor: u64) -> bool {
    descriptor >> 43 & 3 == 3
}

/// A segment register that holds a null selector: nothing can be reached through it. The privilege level stays
/// in the attributes, which is where a null SS keeps the CPL (SDM 3C 24.4.1).
pub(in crate::interp) fn null_segment(selector: Selector, cpl: u8) -> Segment {
    Segment { selector, base: 0, limit: 0, attributes: u16::from(cpl & 3) << 5 }
}

impl Cpu {
    /// Where a descriptor of `size` bytes lies, or `None` if it is outside its table.
    fn descriptor_address(&self, selector: Selector, size: u32) -> Option<u64> {
        let (base, limit) = if selector.is_local() {
            if !self.ldtr.has(attribute::PRESENT) {
                return None;
            }
            (self.ldtr.base, self.ldtr.limit)
        } else {
            (self.gdtr.base, u32::from(self.gdtr.limit))
        };
        (selector.offset() + (size - 1) <= limit).then(|| base.wrapping_add(u64::from(selector.offset())))
    }

    /// Reads the eight-byte descriptor of a selector.
    ///
    /// # Errors
    /// `invalid` with the selector if it lies outside its table; #PF.
    pub(in crate::interp) fn fetch_descriptor(
        &mut self,
        selector: Selector,
        invalid: Vector,
        ext: u16,
    ) -> Result<u64, Exception> {
        match self.descriptor_address(selector, 8) {
            Some(address) => self.load_system(address),
            None => Err(selector_fault(invalid, selector, ext)),
        }
    }

    /// The upper eight bytes of a sixteen-byte descriptor in long mode (SDM 3A 3.5.2): zero outside long mode.
    ///
    /// # Errors
    /// As [`Cpu::fetch_descriptor`]; `invalid` too if the upper half claims a type.
    pub(in crate::interp) fn fetch_upper(
        &mut self,
        selector: Selector,
        invalid: Vector,
        ext: u16,
    ) -> Result<u64, Exception> {
        if !self.long_mode() {
            return Ok(0);
        }
        let fault = selector_fault(invalid, selector, ext);
        let address = self.descriptor_address(selector, 16).ok_or(fault)?;
        let upper: u64 = self.load_system(address.wrapping_add(8))?;
        if upper >> 40 & 0x1f != 0 { Err(fault) } else { Ok(upper) }
    }

    /// A system segment (LDT or TSS) from both halves of its descriptor.
    pub(in crate::interp) fn system_segment(&self, selector: Selector, low: u64, upper: u64) -> Segment {
        let mut segment = Segment::from_descriptor(selector, low);
        if self.long_mode() {
            segment.base |= upper << 32;
        }
        segment
    }

    /// Sets the accessed bit of a code or data descriptor in its table and in `segment`.
    ///
    /// # Errors
    /// #PF if the table cannot be written.
    pub(in crate::interp) fn mark_accessed(&mut self, segment: &mut Segment) -> Result<(), Exception> {
        if segment.attributes & attribute::ACCESSED == 0 {
            segment.attributes |= attribute::ACCESSED;
            self.write_access_byte(segment.selector, segment.attributes as u8)?;
        }
        Ok(())
    }

    /// Sets or clears the busy bit of a TSS descriptor in its table.
    ///
    /// # Errors
    /// #PF.
    pub(in crate::interp) fn write_busy(&mut self, selector: Selector, busy: bool) -> Result<(), Exception> {
        let Some(address) = self.descriptor_address(selector, 8) else { return Ok(()) };
        let old: u8 = self.load_system(address.wrapping_add(5))?;
        let bit = system_type::TSS_BUSY ^ system_type::TSS_AVAILABLE;
        self.write_access_byte(selector, if busy { old | bit } else { old & !bit })
    }

    fn write_access_byte(&mut self, selector: Selector, value: u8) -> Result<(), Exception> {
        match self.descriptor_address(selector, 8) {
            Some(address) => self.store_system(address.wrapping_add(5), value),
            None => Ok(()),
        }
    }

    /// Puts a segment into its register.
    pub(in crate::interp) fn set_segment(&mut self, register: SegmentRegister, segment: Segment) {
        self.segments[register as usize] = segment;
        if matches!(register, SegmentRegister::Cs | SegmentRegister::Ss) {
            self.update_mode();
        } else {
            self.update_segment(register);
        }
    }

    /// Loads a segment register in real or virtual-8086 mode: base is sixteen times the selector. In real mode limit
    /// and size stay as they were (SDM 3A 9.9.2; "unreal mode" rests on it).
    pub(in crate::interp) fn set_real_segment(&mut self, register: SegmentRegister, value: u16) {
        let virtual_8086 = self.flags.contains(ringfence_x86::Rflags::VM);
        let old = self.segments[register as usize];
        let mut segment = Segment::real_mode(value);
        if virtual_8086 {
            segment.attributes |= 3 << 5;
        } else if old.has(attribute::PRESENT) {
            segment.limit = old.limit;
            segment.attributes |= old.attributes & (attribute::DB | attribute::GRANULARITY);
        }
        if register == SegmentRegister::Cs && !virtual_8086 {
            segment.attributes |= attribute::CODE;
        }
        self.set_segment(register, segment);
    }

    /// What ES, DS, FS or GS becomes with a selector, at privilege level `cpl`.
    ///
    /// # Errors
    /// `invalid` if the segment cannot be such a register at this privilege; #NP; #PF.
    pub(in crate::interp) fn resolve_data(
        &mut self,
        selector: Selector,
        cpl: u8,
        invalid: Vector,
        ext: u16,
    ) -> Result<Segment, Exception> {
        if selector.is_null() {
            return Ok(null_segment(selector, 0));
        }
        let descriptor = self.fetch_descriptor(selector, invalid, ext)?;
        let mut segment = Segment::from_descriptor(selector, descriptor);
        let checked = !segment.is_code() || !segment.has(attribute::CONFORMING_DOWN);
        let denied = checked && (selector.rpl() > segment.dpl() || cpl > segment.dpl());
        if !segment.is_readable() || denied {
            return Err(selector_fault(invalid, selector, ext));
        }
        if !segment.has(attribute::PRESENT) {
            return Err(selector_fault(Vector::SegmentNotPresent, selector, ext));
        }
        self.mark_accessed(&mut segment)?;
        Ok(segment)
    }

    /// What SS becomes with a selector at privilege level `cpl`. In 64-bit mode below CPL 3 a null selector will do
    /// (SDM 3A 5.4.1.1); `to_64bit` says whether that is where it will be used.
    ///
    /// # Errors
    /// `invalid` if the segment cannot be the stack at this privilege; #SS if it is not present; #PF.
    pub(in crate::interp) fn resolve_stack(
        &mut self,
        selector: Selector,
        cpl: u8,
        to_64bit: bool,
        invalid: Vector,
        ext: u16,
    ) -> Result<Segment, Exception> {
        if selector.is_null() {
            return if to_64bit && cpl < 3 && selector.rpl() == cpl {
                Ok(null_segment(selector, cpl))
            } else {
                Err(Exception::with_code(invalid, ext))
            };
        }
        let descriptor = self.fetch_descriptor(selector, invalid, ext)?;
        let mut segment = Segment::from_descriptor(selector, descriptor);
        if selector.rpl() != cpl || segment.dpl() != cpl || !segment.is_writable() {
            return Err(selector_fault(invalid, selector, ext));
        }
        if !segment.has(attribute::PRESENT) {
            return Err(selector_fault(Vector::StackFault, selector, ext));
        }
        self.mark_accessed(&mut segment)?;
        Ok(segment)
    }

    /// Loads a segment register as MOV, POP and LDS do.
    ///
    /// # Errors
    /// #UD for CS; #GP, #NP, #SS with the selector; #PF.
    pub(in crate::interp) fn load_segment(
        &mut self,
        register: SegmentRegister,
        value: u16,
    ) -> Result<(), Exception> {
        if register == SegmentRegister::Cs {
            return Err(Exception::UD);
        }
        if self.real_or_virtual() {
            self.set_real_segment(register, value);
            return Ok(());
        }
        let (selector, cpl) = (Selector(value), self.cpl);
        let segment = if register == SegmentRegister::Ss {
            self.resolve_stack(selector, cpl, self.is_64bit(), Vector::GeneralProtection, 0)?
        } else {
            self.resolve_data(selector, cpl, Vector::GeneralProtection, 0)?
        };
        self.set_segment(register, segment);
        Ok(())
    }
}
