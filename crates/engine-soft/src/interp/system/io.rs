//! IN, OUT, INS and OUTS (SDM 1 18.5; 2A IN, INS).

use iced_x86::{Code, Instruction};
use ringfence_memory::Scalar;
use ringfence_x86::segment::system_type;
use ringfence_x86::{Exception, Gpr, Rflags, SegmentRegister};

use crate::interp::cpu::Cpu;
use crate::interp::op::{Handler, Op, RIP, prefix};

const RAX: u8 = Gpr::Rax as u8;
const RCX: usize = Gpr::Rcx as usize;
const RDX: usize = Gpr::Rdx as usize;
const RSI: usize = Gpr::Rsi as usize;
const RDI: usize = Gpr::Rdi as usize;
const ES: u8 = SegmentRegister::Es as u8;

/// Elements per execution of a repeated instruction before interrupts are looked at again.
const BATCH: u32 = 256;

impl Cpu {
    /// Whether the program may use `size` ports from `port`: by IOPL, or by the bitmap in the TSS (SDM 1 18.5.2).
    ///
    /// # Errors
    /// #GP(0) if not; #PF.
    fn check_ports(&mut self, port: u16, size: u16) -> Result<(), Exception> {
        let virtual_8086 = self.flags.contains(Rflags::VM);
        let free = self.cpl <= self.flags.iopl() && !virtual_8086;
        if free || !self.cr0.contains(ringfence_x86::Cr0::PE) {
            return Ok(());
        }
        if self.tr.kind() & !2 != system_type::TSS_AVAILABLE || self.tr.limit < 0x67 {
            return Err(Exception::GP0);
        }
        let map: u16 = self.load_system(self.tr.base.wrapping_add(0x66))?;
        let at = u32::from(map) + u32::from(port) / 8;
        // Two bytes are read, since the ports may lie across a boundary.
        if at + 1 > self.tr.limit {
            return Err(Exception::GP0);
        }
        let bits: u16 = self.load_system(self.tr.base.wrapping_add(u64::from(at)))?;
        let wanted = ((1 << size) - 1) << (port % 8);
        if bits & wanted == 0 { Ok(()) } else { Err(Exception::GP0) }
    }

    fn port_in<T: Scalar>(&mut self, port: u16) -> T {
        let mut data = [0xff; 8];
        self.sync_clock();
        self.bus.port_read(port, &mut data[..T::SIZE]);
        self.note_io_breakpoints(port, T::SIZE as u64);
        self.leave_block = true;
        T::truncate(u64::from_le_bytes(data))
    }

    fn port_out<T: Scalar>(&mut self, port: u16, value: T) {
        let data = value.widen().to_le_bytes();
        self.sync_clock();
        let meaning = self.memory.generation();
        self.bus.port_write(port, &data[..T::SIZE]);
        if self.memory.generation() != meaning {
            // The A20 gate has moved: what the soft TLB holds of odd megabytes is no longer true.
            self.tlb.flush();
        }
        self.note_io_breakpoints(port, T::SIZE as u64);
        self.leave_block = true;
    }

    /// Moves an index register on by one element in the direction of DF.
    fn step_index<T: Scalar>(&mut self, register: usize, mask: u64) {
        let size = T::SIZE as u64;
        let old = self.regs[register];
        let new =
            if self.flags.contains(Rflags::DF) { old.wrapping_sub(size) } else { old.wrapping_add(size) };
        self.set_masked(register, new, mask);
    }

    /// Writes an index or count register, as wide as the address size.
    fn set_masked(&mut self, register: usize, value: u64, mask: u64) {
        self.regs[register] =
            if mask == 0xffff { self.regs[register] & !0xffff | value & 0xffff } else { value & mask };
    }

    /// Does `element` once, or as often as the count register says; gives way after some elements with RIP at the
    /// instruction, as if an interrupt had come.
    fn repeat_io(
        &mut self,
        op: &Op,
        element: impl Fn(&mut Self, &Op) -> Result<(), Exception>,
    ) -> Result<(), Exception> {
        if !op.has(prefix::REP | prefix::REPNE) {
            return element(self, op);
        }
        let mask = op.address_mask;
        let batch = if self.flags.contains(Rflags::TF) { 1 } else { BATCH };
        for _ in 0..batch {
            let left = self.regs[RCX] & mask;
            if left == 0 {
                return Ok(());
            }
            element(self, op)?;
            self.set_masked(RCX, left - 1, mask);
        }
        if self.regs[RCX] & mask != 0 {
            self.regs[RIP] = self.regs[RIP].wrapping_sub(u64::from(op.length));
        }
        Ok(())
    }
}

fn input<T: Scalar>(cpu: &mut Cpu, port: u16) -> Result<(), Exception> {
    cpu.check_ports(port, T::SIZE as u16)?;
    let value = cpu.port_in::<T>(port);
    cpu.set_reg(RAX, value);
    Ok(())
}

fn output<T: Scalar>(cpu: &mut Cpu, port: u16) -> Result<(), Exception> {
    cpu.check_ports(port, T::SIZE as u16)?;
    cpu.port_out(port, cpu.reg::<T>(RAX));
    Ok(())
}

fn in_immediate<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    input::<T>(cpu, op.immediate as u16 & 0xff)
}

fn in_dx<T: Scalar>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    input::<T>(cpu, cpu.regs[RDX] as u16)
}

fn out_immediate<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    output::<T>(cpu, op.immediate as u16 & 0xff)
}

fn out_dx<T: Scalar>(cpu: &mut Cpu, _: &Op) -> Result<(), Exception> {
    output::<T>(cpu, cpu.regs[RDX] as u16)
}

fn ins<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let port = cpu.regs[RDX] as u16;
    cpu.check_ports(port, T::SIZE as u16)?;
    cpu.repeat_io(op, |cpu, op| {
        let mask = op.address_mask;
        let linear = cpu.linear(ES, cpu.regs[RDI] & mask, T::SIZE as u64, true)?;
        // What the port gives is gone, so the store must not fail after it.
        cpu.probe(ES, linear, T::SIZE, true)?;
        let value = cpu.port_in::<T>(port);
        cpu.store(ES, linear, value)?;
        cpu.step_index::<T>(RDI, mask);
        Ok(())
    })
}

fn outs<T: Scalar>(cpu: &mut Cpu, op: &Op) -> Result<(), Exception> {
    let port = cpu.regs[RDX] as u16;
    cpu.check_ports(port, T::SIZE as u16)?;
    cpu.repeat_io(op, |cpu, op| {
        let mask = op.address_mask;
        let linear = cpu.linear(op.segment, cpu.regs[RSI] & mask, T::SIZE as u64, false)?;
        let value: T = cpu.load(op.segment, linear)?;
        cpu.port_out(port, value);
        cpu.step_index::<T>(RSI, mask);
        Ok(())
    })
}

/// The handler for one of this family.
pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    use Code as C;
    Some(match instruction.code() {
        C::In_AL_imm8 => in_immediate::<u8>,
        C::In_AX_imm8 => in_immediate::<u16>,
        C::In_EAX_imm8 => in_immediate::<u32>,
        C::In_AL_DX => in_dx::<u8>,
        C::In_AX_DX => in_dx::<u16>,
        C::In_EAX_DX => in_dx::<u32>,
        C::Out_imm8_AL => out_immediate::<u8>,
        C::Out_imm8_AX => out_immediate::<u16>,
        C::Out_imm8_EAX => out_immediate::<u32>,
        C::Out_DX_AL => out_dx::<u8>,
        C::Out_DX_AX => out_dx::<u16>,
        C::Out_DX_EAX => out_dx::<u32>,
        C::Insb_m8_DX => ins::<u8>,
        C::Insw_m16_DX => ins::<u16>,
        C::Insd_m32_DX => ins::<u32>,
        C::Outsb_DX_m8 => outs::<u8>,
        C::Outsw_DX_m16 => outs::<u16>,
        C::Outsd_DX_m32 => outs::<u32>,
        _ => return None,
    })
}
