//! A small machine for tests: memory, descriptor tables, page tables, and ports that remember.
//!
//! Everything lies in the first megabyte, mapped one to one: see [`at`] for what is where.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use ringfence_engine::{Bus, ClockMode, VirtualClock};
use ringfence_memory::{GuestAddress, GuestMemory, Scalar};
use ringfence_x86::cpuid::{CpuidTable, Mitigations, Model, Platform, Vendor};
use ringfence_x86::segment::{DescriptorTable, Segment, Selector, attribute, system_type};
use ringfence_x86::{Cr0, Cr4, Efer, Exception, SegmentRegister};

use super::cpu::{Connections, Cpu};
use super::event::TripleFault;
use super::features::host_cpuid;
use super::op::RIP;
use super::run::Interpreter;
use crate::code::CodeMap;

/// Where things are.
pub(crate) mod at {
    pub(crate) const IDT: u64 = 0x1000;
    pub(crate) const GDT: u64 = 0x2000;
    pub(crate) const LDT: u64 = 0x2800;
    pub(crate) const TSS: u64 = 0x3000;
    pub(crate) const TSS2: u64 = 0x3800;
    /// Vector `v`'s handler is at `HANDLERS + 16 * v`.
    pub(crate) const HANDLERS: u64 = 0x4000;
    /// Top of the stack in use at CPL 0.
    pub(crate) const STACK: u64 = 0x7000;
    /// Top of the stack that the TSS names for CPL 0.
    pub(crate) const INNER_STACK: u64 = 0x7800;
    /// Top of the first interrupt stack.
    pub(crate) const IST1: u64 = 0x7c00;
    pub(crate) const CODE: u64 = 0x8000;
    pub(crate) const USER_CODE: u64 = 0x9000;
    /// Top of the stack of CPL 3.
    pub(crate) const USER_STACK: u64 = 0xb000;
    /// A page that is not present.
    pub(crate) const ABSENT: u64 = 0xe000;
    /// A page for CPL 0 only.
    pub(crate) const KERNEL_ONLY: u64 = 0xf000;
    pub(crate) const DATA: u64 = 0xc000;
    pub(crate) const TABLES: u64 = 0x10000;
}

/// Selectors of the descriptors that every machine has.
pub(crate) mod sel {
    pub(crate) const CODE: u16 = 0x08;
    pub(crate) const DATA: u16 = 0x10;
    /// SYSRET's base: 32-bit user code here, user data and 64-bit user code behind it.
    pub(crate) const USER_CODE32: u16 = 0x18 | 3;
    pub(crate) const USER_DATA: u16 = 0x20 | 3;
    pub(crate) const USER_CODE: u16 = 0x28 | 3;
    pub(crate) const TSS: u16 = 0x30;
    pub(crate) const CODE32: u16 = 0x40;
    pub(crate) const CODE16: u16 = 0x48;
    pub(crate) const DATA16: u16 = 0x50;
    pub(crate) const LDT: u16 = 0x58;
    pub(crate) const TSS2: u16 = 0x68;
    /// Free for a test: 16 bytes.
    pub(crate) const FREE: u16 = 0x78;
}

/// Ports: the last value written to each is read back; and what was written, in order.
#[derive(Default)]
pub(crate) struct Ports {
    values: Mutex<HashMap<u16, u32>>,
    pub(crate) log: Mutex<Vec<(u16, u32)>>,
}

impl Bus for Ports {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        let value = self.values.lock().unwrap().get(&port).copied().unwrap_or(!0);
        let len = data.len();
        data.copy_from_slice(&value.to_le_bytes()[..len]);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        let value = data.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
        self.values.lock().unwrap().insert(port, value);
        self.log.lock().unwrap().push((port, value));
    }
    fn memory_read(&self, _: GuestAddress, _: &mut [u8]) {}
    fn memory_write(&self, _: GuestAddress, _: &[u8]) {}
}

/// A vCPU and what surrounds it.
pub(crate) struct Lab {
    pub(crate) m: Interpreter,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) ports: Arc<Ports>,
}

/// The CPUID of the host model, as if the host were of another make if need be.
fn cpuid(vendor: Vendor) -> CpuidTable {
    let mut host = host_cpuid().clone();
    let mut name = host.get(0, 0);
    name.ebx = u32::from_le_bytes(if vendor == Vendor::Intel { *b"Genu" } else { *b"Auth" });
    host.set(0, 0, name);
    let platform = Platform {
        cpus: 1,
        tsc_khz: 1_000_000,
        apic_khz: 1_000_000,
        physical_bits: 40,
        mitigations: Mitigations::NotNeeded,
    };
    Model::Host.table(&host, &platform).unwrap()
}

impl Lab {
    fn new(vendor: Vendor) -> Self {
        let memory = Arc::new(GuestMemory::flat(1 << 20).unwrap());
        let ports = Arc::new(Ports::default());
        let cpu = Cpu::new(Connections {
            code: CodeMap::new(Arc::clone(&memory)),
            memory: Arc::clone(&memory),
            bus: Arc::clone(&ports) as _,
            clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
            cpuid: Arc::new(cpuid(vendor)),
        })
        .unwrap();
        Self { m: Interpreter::new(cpu), memory, ports }
    }

    /// Real mode: CS, DS, ES and SS zero, the vector table at zero with handlers at [`at::HANDLERS`].
    pub(crate) fn real() -> Self {
        let mut lab = Self::new(Vendor::Amd);
        for vector in 0..256 {
            lab.put(4 * vector, (at::HANDLERS + 16 * vector) as u32);
        }
        let cpu = &mut lab.m.cpu;
        cpu.segments[SegmentRegister::Cs as usize] = Segment::real_mode(0);
        cpu.idtr.limit = 0x3ff;
        cpu.update_mode();
        cpu.regs[4] = at::STACK;
        lab
    }

    /// Protected mode with 32-bit code at CPL 0, without paging, on an AMD processor.
    pub(crate) fn protected() -> Self {
        Self::protected_of(Vendor::Amd)
    }

    /// Protected mode with 32-bit code at CPL 0, without paging.
    pub(crate) fn protected_of(vendor: Vendor) -> Self {
        let mut lab = Self::new(vendor);
        lab.tables(false);
        lab.m.cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE | Cr0::WP;
        lab.enter(sel::CODE32, sel::DATA, at::STACK);
        lab
    }

    /// 64-bit mode at CPL 0, on an AMD processor.
    pub(crate) fn long() -> Self {
        Self::long_of(Vendor::Amd)
    }

    /// 64-bit mode at CPL 0.
    pub(crate) fn long_of(vendor: Vendor) -> Self {
        let mut lab = Self::new(vendor);
        lab.tables(true);
        lab.page_tables();
        let cpu = &mut lab.m.cpu;
        cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG;
        cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::FSGSBASE;
        cpu.efer = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
        cpu.cr3 = at::TABLES;
        lab.enter(sel::CODE, sel::DATA, at::STACK);
        lab
    }

    /// Enters CPL 3: 64-bit, or 32-bit outside long mode, at [`at::USER_CODE`].
    pub(crate) fn user(&mut self) {
        let code = if self.m.cpu.long_mode() { sel::USER_CODE } else { sel::USER_CODE32 };
        self.enter(code, sel::USER_DATA, at::USER_STACK);
        self.m.cpu.regs[RIP] = at::USER_CODE;
    }

    /// Loads segment registers straight from the table, CPL from CS.
    pub(crate) fn enter(&mut self, code: u16, data: u16, stack: u64) {
        use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
        for (register, selector) in [(Cs, code), (Ss, data), (Ds, data), (Es, data), (Fs, data), (Gs, data)] {
            self.m.cpu.segments[register as usize] = self.descriptor(selector);
        }
        let cpu = &mut self.m.cpu;
        cpu.cpl = (code & 3) as u8;
        cpu.regs[4] = stack;
        cpu.regs[RIP] = at::CODE;
        cpu.update_mode();
        cpu.tlb.flush();
    }

    /// The segment that a selector of the GDT names.
    pub(crate) fn descriptor(&self, selector: u16) -> Segment {
        let raw = self.get::<u64>(at::GDT + u64::from(selector & !7));
        Segment::from_descriptor(Selector(selector), raw)
    }

    /// Writes a descriptor of the GDT.
    pub(crate) fn set_descriptor(&mut self, selector: u16, raw: u64) {
        self.put(at::GDT + u64::from(selector & !7), raw);
    }

    /// Writes guest memory.
    pub(crate) fn put<T: Scalar>(&mut self, address: u64, value: T) {
        self.memory.write(GuestAddress(address), value).unwrap();
    }

    /// Reads guest memory.
    pub(crate) fn get<T: Scalar>(&self, address: u64) -> T {
        self.memory.read(GuestAddress(address)).unwrap()
    }

    /// Puts code at RIP.
    pub(crate) fn code(&mut self, bytes: &[u8]) {
        let at = self.m.cpu.fetch_address();
        self.memory.write_bytes(GuestAddress(at), bytes).unwrap();
    }

    /// Puts one instruction at RIP and executes it.
    pub(crate) fn step(&mut self, bytes: &[u8]) -> Result<(), Exception> {
        self.code(bytes);
        self.m.step()
    }

    /// Puts one instruction at RIP, executes it and delivers what it raises.
    pub(crate) fn deliver(&mut self, bytes: &[u8]) -> Result<(), TripleFault> {
        self.code(bytes);
        match self.m.single_step() {
            Ok(()) => Ok(()),
            Err(exception) => self.m.cpu.raise(exception),
        }
    }

    /// The vector whose handler RIP is at.
    pub(crate) fn handler(&self) -> Option<u64> {
        let offset = self.m.cpu.regs[RIP].checked_sub(at::HANDLERS)?;
        (offset < 0x1000 && offset.is_multiple_of(16)).then_some(offset / 16)
    }

    /// The stack's topmost slots.
    pub(crate) fn stack<T: Scalar, const N: usize>(&self) -> [u64; N] {
        let base = if self.m.cpu.is_64bit() { 0 } else { self.m.cpu.segment(SegmentRegister::Ss).base };
        let top = base + self.m.cpu.stack_pointer();
        std::array::from_fn(|i| self.get::<T>(top + (T::SIZE * i) as u64).widen())
    }

    /// An interrupt or trap gate for a vector.
    pub(crate) fn gate(&mut self, vector: u8, selector: u16, kind: u8, dpl: u8, ist: u8) {
        let vector = u64::from(vector);
        let target = at::HANDLERS + 16 * vector;
        let low = target & 0xffff
            | u64::from(selector) << 16
            | u64::from(ist) << 32
            | u64::from(kind) << 40
            | u64::from(dpl) << 45
            | 1 << 47
            | target >> 16 << 48;
        if self.m.cpu.idtr.limit == 0xfff {
            self.put(at::IDT + 16 * vector, low);
            self.put(at::IDT + 16 * vector + 8, 0_u64);
        } else {
            self.put(at::IDT + 8 * vector, low);
        }
    }

    fn tables(&mut self, long: bool) {
        let flat = |kind: u64, dpl: u64, size: u64| {
            0x008f_0000_0000_ffff | (0x90 | dpl << 5 | kind) << 40 | size << 53
        };
        const SIZE32: u64 = 2;
        const SIZE64: u64 = 1;
        let tss_kind = u64::from(system_type::TSS_BUSY);
        let system = |base: u64, limit: u64, kind: u64| limit | base << 16 | (0x80 | kind) << 40;
        let ldt = system(at::LDT, 0xff, u64::from(system_type::LDT));
        let entries = [
            (sel::CODE, flat(0xb, 0, SIZE64)),
            (sel::DATA, flat(3, 0, SIZE32)),
            (sel::USER_CODE32, flat(0xb, 3, SIZE32)),
            (sel::USER_DATA, flat(3, 3, SIZE32)),
            (sel::USER_CODE, flat(0xb, 3, SIZE64)),
            (sel::TSS, system(at::TSS, 0x7ff, tss_kind)),
            (sel::CODE32, flat(0xb, 0, SIZE32)),
            (sel::CODE16, 0x0000_9b00_0000_ffff),
            (sel::DATA16, 0x0000_9300_0000_ffff),
            (sel::LDT, ldt),
            (sel::TSS2, system(at::TSS2, 0x67, u64::from(system_type::TSS_AVAILABLE))),
        ];
        for (selector, raw) in entries {
            self.set_descriptor(selector, raw);
        }
        let present = attribute::PRESENT;
        let cpu = &mut self.m.cpu;
        cpu.gdtr = DescriptorTable { base: at::GDT, limit: 0xff };
        cpu.idtr = DescriptorTable { base: at::IDT, limit: if long { 0xfff } else { 0x7ff } };
        cpu.tr = Segment {
            selector: Selector(sel::TSS),
            base: at::TSS,
            limit: 0x7ff,
            attributes: present | u16::from(system_type::TSS_BUSY),
        };
        cpu.ldtr = Segment {
            selector: Selector(sel::LDT),
            base: at::LDT,
            limit: 0xff,
            attributes: present | u16::from(system_type::LDT),
        };
        if long {
            self.put(at::TSS + 4, at::INNER_STACK);
            self.put(at::TSS + 0x24, at::IST1);
        } else {
            self.put(at::TSS + 4, at::INNER_STACK as u32);
            self.put(at::TSS + 8, sel::DATA);
        }
        let code = if long { sel::CODE } else { sel::CODE32 };
        for vector in 0..=255 {
            self.gate(vector, code, system_type::INTERRUPT_GATE, 0, 0);
        }
    }

    /// The first two megabytes mapped one to one, for everybody but for [`at::ABSENT`] and [`at::KERNEL_ONLY`].
    fn page_tables(&mut self) {
        for level in 0..3 {
            self.put(at::TABLES + 0x1000 * level, (at::TABLES + 0x1000 * (level + 1)) | 7);
        }
        for page in 0..512 {
            let flags = match page << 12 {
                at::ABSENT => 0,
                at::KERNEL_ONLY => 3,
                _ => 7,
            };
            self.put(at::TABLES + 0x3000 + 8 * page, page << 12 | flags);
        }
    }
}
