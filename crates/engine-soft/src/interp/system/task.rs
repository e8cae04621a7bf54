//! Hardware task switches (SDM 3A chapter 7).

use ringfence_memory::Scalar;
use ringfence_x86::segment::{Segment, Selector, attribute, system_type};
use ringfence_x86::{Cr0, Cr4, Exception, Rflags, SegmentRegister, Vector};

use super::descriptor::{self, null_segment, selector_fault};
use crate::interp::cpu::Cpu;
use crate::interp::event::with_ext;
use crate::interp::op::RIP;

const TS: Vector = Vector::InvalidTss;
const GP: Vector = Vector::GeneralProtection;

/// What switches tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::interp) enum Reason {
    /// JMP: the old task is left for good.
    Jump,
    /// CALL: the new task is nested in the old one.
    Call,
    /// IRET with NT set.
    Return,
    /// An interrupt or exception through a task gate; nested, and the error code goes to the new task's stack.
    Gate {
        /// Pushed if present.
        error_code: Option<u16>,
    },
}

impl Reason {
    fn nests(self) -> bool {
        matches!(self, Reason::Call | Reason::Gate { .. })
    }
}

/// Where a task-state segment keeps things (SDM 3A 7.2.1, 7.6).
struct Layout {
    /// Bytes it has at least.
    size: u32,
    cr3: Option<u32>,
    ip: u32,
    flags: u32,
    gpr: u32,
    /// ES, then the others in encoding order.
    segments: u32,
    /// How many segment registers it has: a 16-bit TSS ends with DS.
    segment_count: usize,
    ldt: u32,
    trap: Option<u32>,
}

const WIDE: Layout = Layout {
    size: 0x68,
    cr3: Some(0x1c),
    ip: 0x20,
    flags: 0x24,
    gpr: 0x28,
    segments: 0x48,
    segment_count: 6,
    ldt: 0x60,
    trap: Some(0x64),
};
const NARROW: Layout = Layout {
    size: 0x2c,
    cr3: None,
    ip: 0x0e,
    flags: 0x10,
    gpr: 0x12,
    segments: 0x22,
    segment_count: 4,
    ldt: 0x2a,
    trap: None,
};

/// What the new task's TSS says.
struct Image {
    cr3: Option<u32>,
    ip: u32,
    flags: u32,
    gpr: [u32; 8],
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

fn is_wide(tss: &Segment) -> bool {
    tss.kind() >= system_type::TSS_AVAILABLE
}

impl Cpu {
    /// Switches to the task whose TSS `selector` names.
    ///
    /// # Errors
    /// #GP, #NP or #TS with the selector, or #PF, before the switch. After it,
    /// [`super::System::task_switched`] is set and the fault is the new task's.
    pub(in crate::interp) fn switch_task(
        &mut self,
        selector: Selector,
        reason: Reason,
        ext: u16,
    ) -> Result<(), Exception> {
        let tss = self.task_segment(selector, reason, ext)?;
        if is_wide(&tss) {
            let image = self.read_task::<u32>(&tss, &WIDE)?;
            self.change_task(tss, &WIDE, &image, reason, ext)
        } else {
            let image = self.read_task::<u16>(&tss, &NARROW)?;
            self.change_task(tss, &NARROW, &image, reason, ext)
        }
    }

    /// The TSS descriptor, checked (SDM 3A 7.3, table 7-1).
    fn task_segment(&mut self, selector: Selector, reason: Reason, ext: u16) -> Result<Segment, Exception> {
        let returning = reason == Reason::Return;
        let invalid = if returning { TS } else { GP };
        let fault = selector_fault(invalid, selector, ext);
        if selector.is_local() || selector.is_null() {
            return Err(fault);
        }
        let raw = self.fetch_descriptor(selector, invalid, ext)?;
        let good = match descriptor::kind(raw) {
            system_type::TSS_AVAILABLE | system_type::TSS16_AVAILABLE => !returning,
            system_type::TSS_BUSY | system_type::TSS16_BUSY => returning,
            _ => false,
        };
        if descriptor::is_memory(raw) || !good {
            return Err(fault);
        }
        if !descriptor::is_present(raw) {
            return Err(selector_fault(Vector::SegmentNotPresent, selector, ext));
        }
        let tss = Segment::from_descriptor(selector, raw);
        let layout = if is_wide(&tss) { &WIDE } else { &NARROW };
        if tss.limit < layout.size - 1 {
            return Err(selector_fault(TS, selector, ext));
        }
        Ok(tss)
    }

    fn read_task<T: Scalar>(&mut self, tss: &Segment, layout: &Layout) -> Result<Image, Exception> {
        let base = tss.base;
        let step = T::SIZE as u32;
        // In a 32-bit TSS selectors take four bytes each, in a 16-bit one two.
        let word = |cpu: &mut Self, at: u32| -> Result<u32, Exception> {
            Ok(cpu.load_system::<T>(base.wrapping_add(u64::from(at)))?.widen() as u32)
        };
        let mut gpr = [0; 8];
        for (i, register) in gpr.iter_mut().enumerate() {
            *register = word(self, layout.gpr + step * i as u32)?;
        }
        let mut segments = [0; 6];
        for (i, segment) in segments.iter_mut().take(layout.segment_count).enumerate() {
            *segment = word(self, layout.segments + step * i as u32)? as u16;
        }
        Ok(Image {
            cr3: layout.cr3.map(|at| word(self, at)).transpose()?,
            ip: word(self, layout.ip)?,
            flags: word(self, layout.flags)?,
            gpr,
            segments,
            ldt: word(self, layout.ldt)? as u16,
            trap: layout.trap.map(|at| word(self, at)).transpose()?.is_some_and(|word| word & 1 != 0),
        })
    }

    /// Saves the running task. Its TSS holds what was last loaded into TR.
    fn save_task<T: Scalar>(&mut self, layout: &Layout, flags: u64) -> Result<(), Exception> {
        let base = self.tr.base;
        let step = T::SIZE as u32;
        let end = layout.segments + step * layout.segment_count as u32;
        // Nothing is saved unless everything can be.
        for at in [layout.ip, end - step] {
            let linear = base.wrapping_add(u64::from(at));
            let old: T = self.load_system(linear)?;
            self.store_system(linear, old)?;
        }
        let put = |cpu: &mut Self, at: u32, value: u64| {
            cpu.store_system(base.wrapping_add(u64::from(at)), T::truncate(value))
        };
        put(self, layout.ip, self.regs[RIP])?;
        put(self, layout.flags, flags)?;
        for i in 0..8 {
            put(self, layout.gpr + step * i as u32, self.regs[i])?;
        }
        for i in 0..layout.segment_count {
            // Only the selector is written; the upper half of a 32-bit slot is reserved.
            let selector = self.segments[i].selector.0;
            self.store_system(base.wrapping_add(u64::from(layout.segments + step * i as u32)), selector)?;
        }
        Ok(())
    }

    fn change_task(
        &mut self,
        mut tss: Segment,
        layout: &Layout,
        image: &Image,
        reason: Reason,
        ext: u16,
    ) -> Result<(), Exception> {
        let old = self.tr;
        let mut saved_flags = self.rflags();
        if reason == Reason::Return {
            saved_flags &= !Rflags::NT.bits();
        }
        if is_wide(&old) {
            self.save_task::<u32>(&WIDE, saved_flags)?;
        } else {
            self.save_task::<u16>(&NARROW, saved_flags)?;
        }
        if reason.nests() {
            self.store_system(tss.base, old.selector.0)?;
        }
        if reason != Reason::Return {
            self.write_busy(tss.selector, true)?;
            tss.attributes |= 2;
        }
        if !reason.nests() {
            self.write_busy(old.selector, false)?;
        }
        self.tr = tss;
        self.cr0 |= Cr0::TS;
        // From here on every fault is the new task's.
        self.system.task_switched = true;
        self.load_task(image, layout, reason, ext)?;
        if let Reason::Gate { error_code: Some(code) } = reason {
            let selector = self.segment(SegmentRegister::Ss).selector;
            let pushed = if is_wide(&tss) { self.push(u32::from(code)) } else { self.push(code) };
            pushed.map_err(|e| with_ext(e, selector, ext))?;
        }
        let limit = u64::from(self.segment(SegmentRegister::Cs).limit);
        if self.regs[RIP] > limit {
            return Err(Exception::gp(ext));
        }
        if image.trap {
            self.system.pending_debug |= Exception::DEBUG_TASK_SWITCH;
        }
        Ok(())
    }

    /// Loads the new task's registers, then its segments, which may fault one by one.
    fn load_task(
        &mut self,
        image: &Image,
        layout: &Layout,
        reason: Reason,
        ext: u16,
    ) -> Result<(), Exception> {
        let wide = layout.cr3.is_some();
        for (i, &value) in image.gpr.iter().enumerate() {
            // A 16-bit task leaves upper halves undefined; they read as ones (SDM 3A 7.6 does not say).
            self.regs[i] = u64::from(if wide { value } else { value | 0xffff_0000 });
        }
        self.regs[RIP] = u64::from(image.ip);
        let mut flags = u64::from(image.flags) & Rflags::WRITABLE.bits();
        if reason.nests() {
            flags |= Rflags::NT.bits();
        }
        // Breakpoints local to the task (SDM 3B 17.2.4).
        self.dr7 &= !0x155;
        let new_cr3 = image.cr3.filter(|_| self.cr0.contains(Cr0::PG));
        if let Some(cr3) = new_cr3 {
            self.cr3 = u64::from(cr3);
            self.tlb.flush();
        }
        self.set_rflags(flags);
        // Until its descriptor is checked, a segment register is as if null.
        let virtual_8086 = self.flags.contains(Rflags::VM);
        let cpl = if virtual_8086 { 3 } else { (image.segments[1] & 3) as u8 };
        for (register, &selector) in SegmentRegister::ALL.into_iter().zip(&image.segments) {
            self.segments[register as usize] = null_segment(Selector(selector), cpl);
        }
        self.ldtr = null_segment(Selector(image.ldt), 0);
        self.cpl = cpl;
        self.update_mode();
        if new_cr3.is_some() && self.cr4.contains(Cr4::PAE) {
            self.pdpte = self.read_pdptes(self.cr3)?;
        }

        self.ldtr = self.resolve_ldt(Selector(image.ldt), TS, ext)?;
        if virtual_8086 {
            for (register, &selector) in SegmentRegister::ALL.into_iter().zip(&image.segments) {
                self.set_real_segment(register, selector);
            }
            return Ok(());
        }
        let cs = self.task_code(Selector(image.segments[1]), ext)?;
        self.set_segment(SegmentRegister::Cs, cs);
        let ss = self.resolve_stack(Selector(image.segments[2]), self.cpl, false, TS, ext)?;
        self.set_segment(SegmentRegister::Ss, ss);
        for register in [SegmentRegister::Es, SegmentRegister::Ds, SegmentRegister::Fs, SegmentRegister::Gs] {
            let selector = Selector(image.segments[register as usize]);
            let segment = self.resolve_data(selector, self.cpl, TS, ext)?;
            self.set_segment(register, segment);
        }
        Ok(())
    }

    fn task_code(&mut self, selector: Selector, ext: u16) -> Result<Segment, Exception> {
        let fault = selector_fault(TS, selector, ext);
        if selector.is_null() {
            return Err(fault);
        }
        let raw = self.fetch_descriptor(selector, TS, ext)?;
        let mut segment = Segment::from_descriptor(selector, raw);
        let privileged = if segment.has(attribute::CONFORMING_DOWN) {
            segment.dpl() <= selector.rpl()
        } else {
            segment.dpl() == selector.rpl()
        };
        if !segment.is_code() || !privileged {
            return Err(fault);
        }
        if !segment.has(attribute::PRESENT) {
            return Err(selector_fault(Vector::SegmentNotPresent, selector, ext));
        }
        self.mark_accessed(&mut segment)?;
        Ok(segment)
    }

    /// Ends an instruction that may have switched tasks: a fault after the switch is delivered in the new task, with the
    /// instruction done.
    pub(in crate::interp) fn settle_task_switch(
        &mut self,
        result: Result<(), Exception>,
    ) -> Result<(), Exception> {
        let switched = std::mem::take(&mut self.system.task_switched);
        match result {
            Err(exception) if switched => {
                if let Err(fault) = self.raise(exception) {
                    self.shut_down(fault);
                }
                Ok(())
            }
            other => other,
        }
    }
}
