//! Far JMP, CALL and RET (SDM 2A JMP, CALL; 2B RET; 3A 5.8).

use iced_x86::{Code, Instruction};
use ringfence_memory::Scalar;
use ringfence_x86::paging::is_canonical;
use ringfence_x86::segment::{Segment, Selector, attribute, system_type};
use ringfence_x86::{Exception, SegmentRegister, Vector};

use super::descriptor::{self, null_segment, selector_fault};
use super::segment::read_far;
use super::task::Reason;
use crate::interp::cpu::Cpu;
use crate::interp::event::with_ext;
use crate::interp::op::{Handler, Op, RIP};

const GP: Vector = Vector::GeneralProtection;
const CS: usize = SegmentRegister::Cs as usize;
const SS: usize = SegmentRegister::Ss as usize;
const RSP: usize = ringfence_x86::Gpr::Rsp as usize;

/// A call gate, taken apart.
struct Gate {
    selector: Selector,
    offset: u64,
    /// Parameters to copy, of the gate's width each.
    parameters: u64,
    /// Bytes in a stack slot: 2, 4 or 8.
    width: u8,
}

impl Cpu {
    /// The code segment that `raw` describes, with `cpl` as its RPL, if it can be executed at `offset`.
    ///
    /// # Errors
    /// #NP; #GP with the selector if it is 64-bit and 32-bit at once; #GP(0) if `offset` lies outside.
    pub(super) fn code_segment(
        &mut self,
        selector: Selector,
        raw: u64,
        cpl: u8,
        offset: u64,
    ) -> Result<Segment, Exception> {
        if !descriptor::is_present(raw) {
            return Err(selector_fault(Vector::SegmentNotPresent, selector, 0));
        }
        let mut segment = Segment::from_descriptor(Selector(selector.0 & !3 | u16::from(cpl)), raw);
        let long = self.long_mode() && segment.has(attribute::LONG);
        if long && segment.has(attribute::DB) {
            return Err(selector_fault(GP, selector, 0));
        }
        let inside = if long { is_canonical(offset) } else { offset <= u64::from(segment.limit) };
        if !inside {
            return Err(Exception::GP0);
        }
        self.mark_accessed(&mut segment)?;
        Ok(segment)
    }

    /// #GP with the selector unless code described by `raw` can be jumped to or called without a gate (SDM 3A 5.8.1).
    fn check_direct(&self, selector: Selector, raw: u64) -> Result<(), Exception> {
        let dpl = descriptor::dpl(raw);
        let allowed = if descriptor::is_conforming(raw) {
            dpl <= self.cpl
        } else {
            selector.rpl() <= self.cpl && dpl == self.cpl
        };
        if allowed { Ok(()) } else { Err(selector_fault(GP, selector, 0)) }
    }

    fn jump_far(&mut self, selector: u16, offset: u64) -> Result<(), Exception> {
        if self.real_or_virtual() {
            return self.jump_real(selector, offset);
        }
        let selector = Selector(selector);
        if selector.is_null() {
            return Err(Exception::GP0);
        }
        let raw = self.fetch_descriptor(selector, GP, 0)?;
        if descriptor::is_code(raw) {
            self.check_direct(selector, raw)?;
            let cs = self.code_segment(selector, raw, self.cpl, offset)?;
            self.set_segment(SegmentRegister::Cs, cs);
            self.regs[RIP] = offset;
            return Ok(());
        }
        if self.switches_task(selector, raw)? {
            let target = self.task_of(selector, raw)?;
            let result = self.transact(|cpu| cpu.switch_task(target, Reason::Jump, 0));
            return self.settle_task_switch(result);
        }
        let gate = self.call_gate(selector, raw)?;
        let code = self.gate_code(&gate)?;
        let dpl = descriptor::dpl(code);
        let allowed = if descriptor::is_conforming(code) { dpl <= self.cpl } else { dpl == self.cpl };
        if !allowed {
            return Err(selector_fault(GP, gate.selector, 0));
        }
        let cs = self.code_segment(gate.selector, code, self.cpl, gate.offset)?;
        self.set_segment(SegmentRegister::Cs, cs);
        self.regs[RIP] = gate.offset;
        Ok(())
    }

    fn jump_real(&mut self, selector: u16, offset: u64) -> Result<(), Exception> {
        // The limit that counts is the one the new CS will have.
        let limit = if self.cr0.contains(ringfence_x86::Cr0::PE) { 0xffff } else { self.segments[CS].limit };
        if offset > u64::from(limit) {
            return Err(Exception::GP0);
        }
        self.set_real_segment(SegmentRegister::Cs, selector);
        self.regs[RIP] = offset;
        Ok(())
    }

    /// Whether a descriptor is for a TSS or task gate; #GP if it is for nothing that can be jumped to, or not at this
    /// privilege.
    fn switches_task(&self, selector: Selector, raw: u64) -> Result<bool, Exception> {
        use system_type as t;
        let fault = Err(selector_fault(GP, selector, 0));
        if descriptor::is_memory(raw) {
            return fault;
        }
        let task = match descriptor::kind(raw) {
            t::CALL_GATE => false,
            t::CALL_GATE16 if !self.long_mode() => false,
            t::TASK_GATE | t::TSS16_AVAILABLE | t::TSS_AVAILABLE if !self.long_mode() => true,
            _ => return fault,
        };
        let dpl = descriptor::dpl(raw);
        if dpl < self.cpl || dpl < selector.rpl() { fault } else { Ok(task) }
    }

    /// The TSS selector behind a task gate, or the selector itself.
    fn task_of(&self, selector: Selector, raw: u64) -> Result<Selector, Exception> {
        if descriptor::kind(raw) != system_type::TASK_GATE {
            return Ok(selector);
        }
        if !descriptor::is_present(raw) {
            return Err(selector_fault(Vector::SegmentNotPresent, selector, 0));
        }
        Ok(Selector((raw >> 16) as u16))
    }

    fn call_gate(&mut self, selector: Selector, raw: u64) -> Result<Gate, Exception> {
        if !descriptor::is_present(raw) {
            return Err(selector_fault(Vector::SegmentNotPresent, selector, 0));
        }
        let upper = self.fetch_upper(selector, GP, 0)?;
        let narrow = descriptor::kind(raw) == system_type::CALL_GATE16;
        let high = if narrow { 0 } else { raw >> 48 << 16 };
        Ok(Gate {
            selector: Selector((raw >> 16) as u16),
            offset: raw & 0xffff | high | upper << 32,
            parameters: if self.long_mode() { 0 } else { raw >> 32 & 0x1f },
            width: if narrow {
                2
            } else if self.long_mode() {
                8
            } else {
                4
            },
        })
    }

    /// The descriptor of the code behind a call gate. In long mode it must be 64-bit (SDM 3A 5.8.3.1).
    fn gate_code(&mut self, gate: &Gate) -> Result<u64, Exception> {
        if gate.selector.is_null() {
            return Err(Exception::GP0);
        }
        let code = self.fetch_descriptor(gate.selector, GP, 0)?;
        let wrong_size = self.long_mode() && code >> 53 & 3 != 1;
        if !descriptor::is_code(code) || descriptor::dpl(code) > self.cpl || wrong_size {
            return Err(selector_fault(GP, gate.selector, 0));
        }
        Ok(code)
    }

    fn call_far<T: Scalar>(&mut self, selector: u16, offset: u64) -> Result<(), Exception> {
        let return_to = [u64::from(self.segments[CS].selector.0), self.regs[RIP]];
        if self.real_or_virtual() {
            return self.transact(|cpu| {
                cpu.push_all::<T>(&return_to)?;
                cpu.jump_real(selector, offset)
            });
        }
        let selector = Selector(selector);
        if selector.is_null() {
            return Err(Exception::GP0);
        }
        let raw = self.fetch_descriptor(selector, GP, 0)?;
        if descriptor::is_code(raw) {
            self.check_direct(selector, raw)?;
            return self.transact(|cpu| {
                let cs = cpu.code_segment(selector, raw, cpu.cpl, offset)?;
                cpu.push_all::<T>(&return_to)?;
                cpu.set_segment(SegmentRegister::Cs, cs);
                cpu.regs[RIP] = offset;
                Ok(())
            });
        }
        if self.switches_task(selector, raw)? {
            let target = self.task_of(selector, raw)?;
            let result = self.transact(|cpu| cpu.switch_task(target, Reason::Call, 0));
            return self.settle_task_switch(result);
        }
        let gate = self.call_gate(selector, raw)?;
        self.transact(|cpu| match gate.width {
            2 => cpu.call_through::<u16>(&gate, &return_to),
            4 => cpu.call_through::<u32>(&gate, &return_to),
            _ => cpu.call_through::<u64>(&gate, &return_to),
        })
    }

    fn push_all<T: Scalar>(&mut self, values: &[u64]) -> Result<(), Exception> {
        values.iter().try_for_each(|&value| self.push(T::truncate(value)))
    }

    /// A call through a gate, with a change of stack if it leads inwards (SDM 3A 5.8.5).
    fn call_through<T: Scalar>(&mut self, gate: &Gate, return_to: &[u64; 2]) -> Result<(), Exception> {
        let code = self.gate_code(gate)?;
        let dpl = descriptor::dpl(code);
        if descriptor::is_conforming(code) || dpl == self.cpl {
            let cs = self.code_segment(gate.selector, code, self.cpl, gate.offset)?;
            // The frame has the gate's width, which is that of 64-bit code's stack too.
            self.push_all::<T>(return_to)?;
            self.set_segment(SegmentRegister::Cs, cs);
            self.regs[RIP] = gate.offset;
            return Ok(());
        }
        let cs = self.code_segment(gate.selector, code, dpl, gate.offset)?;
        let (ss, pointer) = if self.long_mode() {
            let at = 4 + 8 * u32::from(dpl);
            if at + 7 > self.tr.limit {
                return Err(selector_fault(Vector::InvalidTss, self.tr.selector, 0));
            }
            let pointer: u64 = self.load_system(self.tr.base.wrapping_add(u64::from(at)))?;
            if !is_canonical(pointer) {
                return Err(Exception::SS0);
            }
            (null_segment(Selector(u16::from(dpl)), dpl), pointer)
        } else {
            let (ss, pointer) = self.inner_stack(dpl, 0)?;
            (ss, u64::from(pointer))
        };
        let mut frame = vec![u64::from(self.segments[SS].selector.0), self.regs[RSP]];
        for i in (0..gate.parameters).rev() {
            frame.push(self.peek::<T>(i * T::SIZE as u64)?.widen());
        }
        frame.extend(return_to);
        self.segments[CS] = cs;
        self.segments[SS] = ss;
        self.cpl = dpl;
        self.update_mode();
        self.set_stack_pointer(pointer);
        self.push_all::<T>(&frame).map_err(|e| with_ext(e, ss.selector, 0))?;
        self.regs[RIP] = gate.offset;
        Ok(())
    }

    /// The code segment that RETF or IRET goes back to. Its RPL is the new CPL.
    ///
    /// # Errors
    /// #GP, #NP with the selector; #GP(0) if `offset` lies outside.
    pub(super) fn return_segment(&mut self, selector: Selector, offset: u64) -> Result<Segment, Exception> {
        if selector.is_null() {
            return Err(Exception::GP0);
        }
        let raw = self.fetch_descriptor(selector, GP, 0)?;
        let (rpl, dpl) = (selector.rpl(), descriptor::dpl(raw));
        let allowed = if descriptor::is_conforming(raw) { dpl <= rpl } else { dpl == rpl };
        if !descriptor::is_code(raw) || rpl < self.cpl || !allowed {
            return Err(selector_fault(GP, selector, 0));
        }
        self.code_segment(selector, raw, rpl, offset)
    }

    /// Enters the code and stack segments of a less privileged level, and takes away what that level may not use
    /// (SDM 2B, RET).
    pub(super) fn enter_outer(&mut self, cs: Segment, ss: Segment, pointer: u64) {
        let cpl = cs.selector.rpl();
        let outer = cpl > self.cpl;
        self.segments[CS] = cs;
        self.segments[SS] = ss;
        self.cpl = cpl;
        if outer {
            for register in
                [SegmentRegister::Es, SegmentRegister::Ds, SegmentRegister::Fs, SegmentRegister::Gs]
            {
                let segment = &mut self.segments[register as usize];
                if segment.selector.is_null() {
                    // The RPL of a null selector does not survive; the base of FS and GS does.
                    segment.selector = Selector(0);
                    continue;
                }
                let conforming = segment.is_code() && segment.has(attribute::CONFORMING_DOWN);
                if segment.has(attribute::PRESENT) && segment.dpl() < cpl && !conforming {
                    *segment = null_segment(Selector(0), 0);
                }
            }
        }
        self.update_mode();
        self.set_stack_pointer(pointer);
    }

    fn return_far<T: Scalar>(&mut self, release: u64) -> Result<(), Exception> {
        let size = T::SIZE as u64;
        let offset = self.peek::<T>(0)?.widen();
        let selector = self.peek::<T>(size)?.widen() as u16;
        let after = self.stack_pointer().wrapping_add(2 * size + release);
        if self.real_or_virtual() {
            self.jump_real(selector, offset)?;
            self.set_stack_pointer(after);
            return Ok(());
        }
        let selector = Selector(selector);
        let cs = self.return_segment(selector, offset)?;
        let rpl = selector.rpl();
        if rpl == self.cpl {
            self.set_stack_pointer(after);
            self.set_segment(SegmentRegister::Cs, cs);
        } else {
            let pointer = self.peek::<T>(2 * size + release)?.widen();
            let stack = Selector(self.peek::<T>(3 * size + release)?.widen() as u16);
            let to_64bit = self.long_mode() && cs.has(attribute::LONG);
            let ss = self.resolve_stack(stack, rpl, to_64bit, GP, 0)?;
            self.enter_outer(cs, ss, pointer.wrapping_add(release));
        }
        self.regs[RIP] = offset;
        Ok(())
    }
}

fn jump_direct(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.jump_far(op.aux as u16, op.immediate)
}

fn jump_indirect<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let (offset, selector) = read_far::<T>(cpu, op)?;
    cpu.jump_far(selector, offset.widen())
}

fn call_direct<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.call_far::<T>(op.aux as u16, op.immediate)
}

fn call_indirect<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let (offset, selector) = read_far::<T>(cpu, op)?;
    cpu.call_far::<T>(selector, offset.widen())
}

fn retf<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    cpu.return_far::<T>(op.immediate & 0xffff)
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    use Code as C;
    Some(match instruction.code() {
        C::Jmp_ptr1616 | C::Jmp_ptr1632 => jump_direct,
        C::Jmp_m1616 => jump_indirect::<u16>,
        C::Jmp_m1632 => jump_indirect::<u32>,
        C::Jmp_m1664 => jump_indirect::<u64>,
        C::Call_ptr1616 => call_direct::<u16>,
        C::Call_ptr1632 => call_direct::<u32>,
        C::Call_m1616 => call_indirect::<u16>,
        C::Call_m1632 => call_indirect::<u32>,
        C::Call_m1664 => call_indirect::<u64>,
        C::Retfw | C::Retfw_imm16 => retf::<u16>,
        C::Retfd | C::Retfd_imm16 => retf::<u32>,
        C::Retfq | C::Retfq_imm16 => retf::<u64>,
        _ => return None,
    })
}
