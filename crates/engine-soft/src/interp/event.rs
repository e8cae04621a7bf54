//! Delivery of exceptions, software interrupts, external interrupts and NMIs (SDM 3A chapter 6, 2A INT n; APM 2
//! chapter 8).

use ringfence_memory::Scalar;
use ringfence_x86::exception::Class;
use ringfence_x86::paging::is_canonical;
use ringfence_x86::segment::{Segment, Selector, attribute, system_type};
use ringfence_x86::{Cr0, Exception, Gpr, Rflags, SegmentRegister, Vector};

use super::cpu::Cpu;
use super::op::RIP;
use super::system::descriptor::{self, null_segment, selector_fault};
use super::system::task::Reason;
use ringfence_engine::Activity;

const RSP: usize = Gpr::Rsp as usize;
const GP: Vector = Vector::GeneralProtection;
const TS: Vector = Vector::InvalidTss;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An exception.
    Exception,
    /// INT n, INT3 or INTO: the gate's privilege level is checked.
    Software,
    /// INT1: a software interrupt that passes for a hardware one (SDM 2A, INT n).
    Int1,
    /// A maskable interrupt from outside.
    External,
    /// A non-maskable interrupt.
    Nmi,
}

/// An event under delivery.
#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    error_code: Option<u16>,
    source: Source,
    /// RFLAGS to be pushed.
    rflags: u64,
}

impl Event {
    /// The EXT bit of error codes: something outside the program led here (SDM 3A 6.13).
    fn ext(&self) -> u16 {
        u16::from(self.source != Source::Software)
    }

    /// The error code that names this event's gate.
    fn gate_code(&self) -> u16 {
        u16::from(self.vector) << 3 | 2 | self.ext()
    }

    fn gate_fault(&self, vector: Vector) -> Exception {
        Exception::with_code(vector, self.gate_code())
    }
}

/// The processor has shut down: an exception came up while a double fault was being delivered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("triple fault: {chain} (RIP {rip:#x}, CR2 {cr2:#x})")]
pub struct TripleFault {
    /// The exceptions, in the order in which they came.
    pub chain: String,
    /// The instruction that raised the first one.
    pub rip: u64,
    /// CR2.
    pub cr2: u64,
}

/// What becomes of an exception raised while another is delivered (SDM 3A table 6-5); `None` is a shutdown.
fn combine(first: Exception, second: Exception) -> Option<Exception> {
    match (first.vector.class(), second.vector.class()) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => None,
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Some(Exception::new(Vector::DoubleFault))
        }
        _ => Some(second),
    }
}

/// Exceptions raised after their instruction has completed, or without one: RF is pushed as it is. All others are
/// faults, which push it set, so that an instruction breakpoint does not come up again (SDM 3B 18.3.1.1).
fn is_fault(exception: Exception) -> bool {
    match exception.vector {
        Vector::Debug => exception.error_code & Exception::DEBUG_GENERAL_DETECT != 0,
        Vector::Breakpoint | Vector::Overflow | Vector::DoubleFault | Vector::MachineCheck => false,
        _ => true,
    }
}

impl Cpu {
    /// Delivers an exception, or what becomes of it.
    ///
    /// # Errors
    /// [`TripleFault`]: the processor shuts down. Its state is as before the delivery.
    pub fn raise(&mut self, exception: Exception) -> Result<(), TripleFault> {
        let rip = self.regs[RIP];
        // Told only where it ends badly.
        let mut chain = None;
        let mut current = exception;
        self.breakpoints_hit = 0;
        loop {
            let Err(next) = self.attempt(current) else { return Ok(()) };
            let chain = chain.get_or_insert_with(|| exception.to_string());
            chain.push_str(&format!(", then {next}"));
            match combine(current, next) {
                Some(exception) => current = exception,
                None => {
                    if next.vector == Vector::PageFault {
                        self.cr2 = self.fault_address;
                    }
                    return Err(TripleFault { chain: std::mem::take(chain), rip, cr2: self.cr2 });
                }
            }
        }
    }

    /// Delivers an interrupt from outside or one of INT1's kind. For NMIs, masks further ones.
    ///
    /// # Errors
    /// As [`Cpu::raise`].
    pub fn interrupt(&mut self, vector: u8, source: Source) -> Result<(), TripleFault> {
        if source == Source::Nmi {
            self.nmi_masked = true;
        }
        let event = Event { vector, error_code: None, source, rflags: self.rflags() };
        let result = self.deliver(&event);
        self.system.task_switched = false;
        result.or_else(|exception| self.raise(exception))
    }

    /// Delivers INT n, INT3, INTO or INT1; RIP is already behind the instruction.
    ///
    /// # Errors
    /// The exception that the instruction raises.
    pub(super) fn software_interrupt(&mut self, vector: u8, source: Source) -> Result<(), Exception> {
        let event = Event { vector, error_code: None, source, rflags: self.rflags() };
        let result = self.deliver(&event);
        self.settle_task_switch(result)
    }

    /// One attempt to deliver an exception, with the effects of the exception itself.
    fn attempt(&mut self, exception: Exception) -> Result<(), Exception> {
        match exception.vector {
            Vector::PageFault => self.cr2 = self.fault_address,
            Vector::Debug => self.record_debug(exception.error_code),
            _ => {}
        }
        let mut rflags = self.rflags();
        if is_fault(exception) {
            rflags |= Rflags::RF.bits();
        }
        let error_code = exception.vector.has_error_code().then_some(exception.error_code);
        let vector = exception.vector as u8;
        let result = self.deliver(&Event { vector, error_code, source: Source::Exception, rflags });
        // Where a task switch has gone through, the next exception is the new task's, but still part of the chain.
        self.system.task_switched = false;
        result
    }

    fn deliver(&mut self, event: &Event) -> Result<(), Exception> {
        let result = self.transact(|cpu| {
            if !cpu.cr0.contains(Cr0::PE) {
                cpu.deliver_real(event)
            } else if cpu.long_mode() {
                cpu.deliver_long(event)
            } else {
                cpu.deliver_protected(event)
            }
        });
        if result.is_ok() {
            self.interrupt_shadow = false;
            self.system.debug_shadow = false;
            // Delivery clears TF, so that the handler is not stepped into (SDM 3B 18.3.1.4).
            self.system.stepping = false;
            self.activity = Activity::Active;
            self.leave_block = true;
        }
        result
    }

    /// The flags that every gate clears, and IF.
    fn clear_flags(&mut self, interrupt_gate: bool) {
        self.flags.remove(Rflags::TF | Rflags::NT | Rflags::RF | Rflags::VM);
        if interrupt_gate {
            self.flags.remove(Rflags::IF);
        }
        self.update_class();
    }

    /// Real mode: the vector table (SDM 3A 20.1.4).
    fn deliver_real(&mut self, event: &Event) -> Result<(), Exception> {
        let at = u16::from(event.vector) * 4;
        if at + 3 > self.idtr.limit {
            return Err(event.gate_fault(GP));
        }
        let entry: u32 = self.load_system(self.idtr.base.wrapping_add(u64::from(at)))?;
        let (cs, ip) = (self.segment(SegmentRegister::Cs).selector.0, self.regs[RIP] as u16);
        self.push(event.rflags as u16)?;
        self.push(cs)?;
        self.push(ip)?;
        self.flags.remove(Rflags::IF | Rflags::TF | Rflags::AC | Rflags::RF);
        self.set_real_segment(SegmentRegister::Cs, (entry >> 16) as u16);
        self.regs[RIP] = u64::from(entry & 0xffff);
        Ok(())
    }

    /// The code segment that a gate leads to, checked up to its presence.
    fn gate_target(&mut self, selector: Selector, ext: u16) -> Result<u64, Exception> {
        if selector.is_null() {
            return Err(Exception::gp(ext));
        }
        let code = self.fetch_descriptor(selector, GP, ext)?;
        if !descriptor::is_code(code) || descriptor::dpl(code) > self.cpl {
            return Err(selector_fault(GP, selector, ext));
        }
        if !descriptor::is_present(code) {
            return Err(selector_fault(Vector::SegmentNotPresent, selector, ext));
        }
        Ok(code)
    }

    /// Long mode (SDM 3A 6.14).
    fn deliver_long(&mut self, event: &Event) -> Result<(), Exception> {
        let ext = event.ext();
        let at = u32::from(event.vector) * 16;
        if at + 15 > u32::from(self.idtr.limit) {
            return Err(event.gate_fault(GP));
        }
        let address = self.idtr.base.wrapping_add(u64::from(at));
        let low: u64 = self.load_system(address)?;
        let high: u64 = self.load_system(address.wrapping_add(8))?;
        let kind = descriptor::kind(low);
        let gate = matches!(kind, system_type::INTERRUPT_GATE | system_type::TRAP_GATE);
        if descriptor::is_memory(low) || !gate {
            return Err(event.gate_fault(GP));
        }
        if event.source == Source::Software && descriptor::dpl(low) < self.cpl {
            return Err(event.gate_fault(GP));
        }
        if !descriptor::is_present(low) {
            return Err(event.gate_fault(Vector::SegmentNotPresent));
        }
        let selector = Selector((low >> 16) as u16);
        let target = low & 0xffff | low >> 48 << 16 | high << 32;
        let code = self.gate_target(selector, ext)?;
        let cpl = if descriptor::is_conforming(code) { self.cpl } else { descriptor::dpl(code) };
        let mut cs = Segment::from_descriptor(Selector(selector.0 & !3 | u16::from(cpl)), code);
        if !cs.has(attribute::LONG) || cs.has(attribute::DB) {
            return Err(selector_fault(GP, selector, ext));
        }
        if !is_canonical(target) {
            return Err(Exception::gp(ext));
        }
        let ist = low >> 32 & 7;
        let stack = if ist != 0 {
            self.tss_stack64(0x1c + 8 * ist as u32, ext)?
        } else if cpl < self.cpl {
            self.tss_stack64(4 + 8 * u32::from(cpl), ext)?
        } else {
            self.regs[RSP]
        };
        if !is_canonical(stack) {
            return Err(Exception::with_code(Vector::StackFault, ext));
        }
        self.mark_accessed(&mut cs)?;

        let old_ss = self.segment(SegmentRegister::Ss).selector.0;
        let old_cs = self.segment(SegmentRegister::Cs).selector.0;
        let (old_rsp, old_rip) = (self.regs[RSP], self.regs[RIP]);
        if cpl < self.cpl {
            self.segments[SegmentRegister::Ss as usize] = null_segment(Selector(u16::from(cpl)), cpl);
        }
        self.segments[SegmentRegister::Cs as usize] = cs;
        self.cpl = cpl;
        if self.is_64bit() {
            self.update_privilege();
        } else {
            self.update_mode();
        }
        self.regs[RSP] = stack & !0xf;
        let frame = [u64::from(old_ss), old_rsp, event.rflags, u64::from(old_cs), old_rip];
        for value in frame.into_iter().chain(event.error_code.map(u64::from)) {
            self.push(value).map_err(|e| with_ext(e, Selector(0), ext))?;
        }
        self.clear_flags(kind == system_type::INTERRUPT_GATE);
        self.regs[RIP] = target;
        Ok(())
    }

    /// A stack pointer from the 64-bit TSS.
    fn tss_stack64(&mut self, offset: u32, ext: u16) -> Result<u64, Exception> {
        if offset + 7 > self.tr.limit {
            return Err(selector_fault(TS, self.tr.selector, ext));
        }
        self.load_system(self.tr.base.wrapping_add(u64::from(offset)))
    }

    /// Protected mode and virtual-8086 mode (SDM 3A 6.12, 20.3).
    fn deliver_protected(&mut self, event: &Event) -> Result<(), Exception> {
        let at = u32::from(event.vector) * 8;
        if at + 7 > u32::from(self.idtr.limit) {
            return Err(event.gate_fault(GP));
        }
        let gate: u64 = self.load_system(self.idtr.base.wrapping_add(u64::from(at)))?;
        let kind = descriptor::kind(gate);
        let known = matches!(
            kind,
            system_type::TASK_GATE
                | system_type::INTERRUPT_GATE16
                | system_type::TRAP_GATE16
                | system_type::INTERRUPT_GATE
                | system_type::TRAP_GATE
        );
        if descriptor::is_memory(gate) || !known {
            return Err(event.gate_fault(GP));
        }
        if event.source == Source::Software && descriptor::dpl(gate) < self.cpl {
            return Err(event.gate_fault(GP));
        }
        if !descriptor::is_present(gate) {
            return Err(event.gate_fault(Vector::SegmentNotPresent));
        }
        let selector = Selector((gate >> 16) as u16);
        if kind == system_type::TASK_GATE {
            return self.deliver_to_task(event, selector);
        }
        let code = self.gate_target(selector, event.ext())?;
        let inner = !descriptor::is_conforming(code) && descriptor::dpl(code) < self.cpl;
        let virtual_8086 = self.flags.contains(Rflags::VM);
        if virtual_8086 && (!inner || descriptor::dpl(code) != 0) {
            return Err(selector_fault(GP, selector, event.ext()));
        }
        let wide = kind >= system_type::TSS_AVAILABLE;
        let offset = gate & 0xffff | if wide { gate >> 48 << 16 } else { 0 };
        let target = Target { selector, code, offset, inner };
        if wide {
            self.enter::<u32>(event, &target)?
        } else {
            self.enter::<u16>(event, &target)?
        }
        self.clear_flags(matches!(kind, system_type::INTERRUPT_GATE | system_type::INTERRUPT_GATE16));
        Ok(())
    }

    /// Switches to a gate's code segment, and stack if it is more privileged, and builds the frame.
    fn enter<T: Scalar>(&mut self, event: &Event, target: &Target) -> Result<(), Exception> {
        let ext = event.ext();
        let cpl = if target.inner { descriptor::dpl(target.code) } else { self.cpl };
        let selector = Selector(target.selector.0 & !3 | u16::from(cpl));
        let mut cs = Segment::from_descriptor(selector, target.code);
        if target.offset > u64::from(cs.limit) {
            return Err(Exception::gp(ext));
        }
        let virtual_8086 = self.flags.contains(Rflags::VM);
        let old = self.segments.map(|s| u64::from(s.selector.0));
        let (old_sp, old_ip) = (self.regs[RSP], self.regs[RIP]);
        let new_stack = if target.inner { Some(self.inner_stack(cpl, ext)?) } else { None };
        self.mark_accessed(&mut cs)?;

        self.segments[SegmentRegister::Cs as usize] = cs;
        self.cpl = cpl;
        self.flags.remove(Rflags::VM);
        let mut stack_selector = Selector(0);
        if let Some((ss, pointer)) = new_stack {
            self.segments[SegmentRegister::Ss as usize] = ss;
            self.update_mode();
            self.set_stack_pointer(u64::from(pointer));
            stack_selector = ss.selector;
        } else {
            self.update_mode();
        }
        let [es, cs, ss, ds, fs, gs] = old;
        let segments: &[u64] = if virtual_8086 { &[gs, fs, ds, es] } else { &[] };
        let stack: &[u64] = if target.inner { &[ss, old_sp] } else { &[] };
        let frame = [segments, stack, &[event.rflags, cs, old_ip]].concat();
        for value in frame.into_iter().chain(event.error_code.map(u64::from)) {
            self.push(T::truncate(value)).map_err(|e| with_ext(e, stack_selector, ext))?;
        }
        if virtual_8086 {
            use SegmentRegister::{Ds, Es, Fs, Gs};
            for register in [Gs, Fs, Ds, Es] {
                self.set_segment(register, null_segment(Selector(0), 0));
            }
        }
        self.regs[RIP] = target.offset;
        Ok(())
    }

    /// The stack for a more privileged level from the TSS, checked (SDM 3A 5.8.5).
    ///
    /// # Errors
    /// #TS, #SS with the selector; #PF.
    pub(super) fn inner_stack(&mut self, cpl: u8, ext: u16) -> Result<(Segment, u32), Exception> {
        let wide = self.tr.kind() >= system_type::TSS_AVAILABLE;
        let level = u32::from(cpl);
        let (at, size) = if wide { (4 + 8 * level, 8) } else { (2 + 4 * level, 4) };
        if at + size - 1 > self.tr.limit {
            return Err(selector_fault(TS, self.tr.selector, ext));
        }
        let base = self.tr.base.wrapping_add(u64::from(at));
        let (pointer, selector) = if wide {
            (self.load_system::<u32>(base)?, self.load_system::<u16>(base.wrapping_add(4))?)
        } else {
            (u32::from(self.load_system::<u16>(base)?), self.load_system::<u16>(base.wrapping_add(2))?)
        };
        let ss = self.resolve_stack(Selector(selector), cpl, false, TS, ext)?;
        Ok((ss, pointer))
    }

    /// An event through a task gate (SDM 3A 6.12.2).
    fn deliver_to_task(&mut self, event: &Event, selector: Selector) -> Result<(), Exception> {
        self.flags.set(Rflags::RF, event.rflags & Rflags::RF.bits() != 0);
        self.switch_task(selector, Reason::Gate { error_code: event.error_code }, event.ext())
    }
}

/// Where a gate of protected mode leads.
struct Target {
    selector: Selector,
    code: u64,
    offset: u64,
    /// To a more privileged level.
    inner: bool,
}

/// A stack fault while pushing a frame carries the EXT bit, and the selector of a stack just switched to.
pub(super) fn with_ext(exception: Exception, selector: Selector, ext: u16) -> Exception {
    match exception.vector {
        Vector::StackFault => selector_fault(Vector::StackFault, selector, ext),
        _ => exception,
    }
}
