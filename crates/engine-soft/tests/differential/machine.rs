//! A guest laid out as the oracle's process is: the same linear addresses, permissions and descriptors at CPL 3.

use std::sync::Arc;

use ringfence_engine::{Bus, ClockMode, VectorState, VirtualClock, X87State};
use ringfence_engine_soft::code::CodeMap;
use ringfence_engine_soft::interp::cpu::{Connections, Cpu};
use ringfence_engine_soft::interp::features::host_cpuid;
use ringfence_engine_soft::interp::op::RIP;
use ringfence_engine_soft::interp::run::Interpreter;
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_oracle::layout::{self, CODE, CODE_LEN, DATA, DATA_LEN, GDT_USER, LDT, PAGE};
use ringfence_oracle::{CODE_MAX, Case, End, Mode, Vectors};
use ringfence_x86::segment::{DescriptorTable, attribute, system_type};
use ringfence_x86::{Cr0, Cr4, Efer, Segment, Selector, Vector};

/// Where the code pages lie in guest physical memory; the data pages follow, one page apart so that accesses across
/// pages are not contiguous by chance.
const CODE_AT: u64 = 0x10_0000;
const DATA_AT: u64 = 0x20_0000;
const TABLES_AT: u64 = 0x1000;
const SYSTEM_AT: u64 = 0x8000;
/// Linear address of the supervisor's pages: descriptor tables and TSS, IDT, stack.
const SYSTEM: u64 = 0xffff_8000_0000_0000;
const SYSTEM_PAGES: u64 = 3;
const GDT: u64 = 0x800;
const TSS: u64 = 0xc00;
const IDT: u64 = 0x1000;
const STACK_TOP: u64 = 0x3000;
/// Where the gates lead: one address a vector. Nothing is there; arriving is the end of a case.
const HANDLERS: u64 = SYSTEM + 0x10_0000;
const KERNEL_CODE: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;
const LDT_SELECTOR: u16 = 0x50;
/// Instructions after which a case counts as hung.
const LIMIT: u32 = 100_000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// What the machine under test did; as [`ringfence_oracle::Outcome`].
#[derive(Debug)]
pub(crate) struct Observed {
    pub(crate) end: End,
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) segments: [u16; 6],
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    pub(crate) vectors: Vectors,
}

fn vectors(cpu: &Cpu) -> Vectors {
    let VectorState { zmm, k, mxcsr } = cpu.vector.unit.vector_state();
    let X87State { fcw, fsw, ftw, st, .. } = cpu.vector.unit.x87();
    Vectors { zmm, k, mxcsr, fcw, fsw, ftw, st, ..Vectors::default() }
}

struct NoDevices;

impl Bus for NoDevices {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn memory_read(&self, _: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn memory_write(&self, _: GuestAddress, _: &[u8]) {}
}

/// The machine under test.
pub(crate) struct Machine {
    memory: Arc<GuestMemory>,
    interpreter: Interpreter,
    before: Box<[u8; DATA_LEN]>,
    pub(crate) after: Box<[u8; DATA_LEN]>,
    code: Box<[u8; CODE_LEN]>,
    /// Where the last case's code was, to be overwritten.
    last_code: usize,
}

fn data_at(page: usize) -> GuestAddress {
    GuestAddress(DATA_AT + 2 * PAGE * page as u64)
}

impl Machine {
    pub(crate) fn new() -> Self {
        let memory = Arc::new(GuestMemory::flat(16 << 20).unwrap());
        let code = CodeMap::new(Arc::clone(&memory));
        let clock = Arc::new(VirtualClock::new(ClockMode::Counted, 0));
        let bus = Arc::new(NoDevices);
        let cpuid = Arc::new(host_cpuid().clone());
        let mut cpu = Cpu::new(Connections { memory: Arc::clone(&memory), bus, clock, code, cpuid }).unwrap();
        let components = cpu.vector.xsave_layout().supported();
        assert!(cpu.vector.set_xcr0(components));
        page_tables(&memory);
        system_tables(&memory);
        cpu.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
        cpu.cr4 =
            Cr4::PAE | Cr4::PGE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE | Cr4::FSGSBASE | Cr4::UMIP;
        cpu.efer = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
        cpu.cr3 = TABLES_AT;
        cpu.gdtr = DescriptorTable { base: SYSTEM + GDT, limit: 0x7f };
        cpu.idtr = DescriptorTable { base: SYSTEM + IDT, limit: 0xfff };
        let system = |selector, base, limit, kind: u8| Segment {
            selector: Selector(selector),
            base,
            limit,
            attributes: attribute::PRESENT | u16::from(kind),
        };
        cpu.ldtr = system(LDT_SELECTOR, SYSTEM, (8 * LDT.len() - 1) as u32, system_type::LDT);
        cpu.tr = system(TSS_SELECTOR, SYSTEM + TSS, 0x67, system_type::TSS_BUSY);
        let pages = Box::new([0xcc; CODE_LEN]);
        memory.write_bytes(GuestAddress(CODE_AT), &pages[..]).unwrap();
        Self {
            memory,
            interpreter: Interpreter::new(cpu),
            before: Box::new([0; DATA_LEN]),
            after: Box::new([0; DATA_LEN]),
            code: pages,
            last_code: 0,
        }
    }

    /// What the data pages held before the last case.
    pub(crate) fn data_before(&self) -> &[u8; DATA_LEN] {
        &self.before
    }

    pub(crate) fn run(&mut self, case: &Case) -> Observed {
        self.load(case);
        let end = self.execute(case);
        for page in 0..DATA.len() {
            let range = page * PAGE as usize..(page + 1) * PAGE as usize;
            self.memory.read_bytes(data_at(page), &mut self.after[range]).unwrap();
        }
        let cpu = &mut self.interpreter.cpu;
        cpu.vector.unit.park();
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&cpu.regs[..16]);
        Observed {
            end,
            gpr,
            rip: cpu.regs[RIP],
            rflags: cpu.rflags(),
            segments: cpu.segments.map(|segment| segment.selector.0),
            fs_base: cpu.segments[4].base,
            gs_base: cpu.segments[5].base,
            vectors: vectors(cpu),
        }
    }

    fn load(&mut self, case: &Case) {
        let place = |memory: &GuestMemory, code: &[u8; CODE_LEN], start: usize| {
            let range = start..(start + CODE_MAX).min(CODE_LEN);
            memory.write_bytes(GuestAddress(CODE_AT + start as u64), &code[range]).unwrap();
        };
        let last = self.last_code..(self.last_code + CODE_MAX).min(CODE_LEN);
        self.code[last].fill(0xcc);
        place(&self.memory, &self.code, self.last_code);
        self.last_code = usize::from(case.code_offset);
        let end = (self.last_code + case.code().len()).min(CODE_LEN);
        self.code[self.last_code..end].copy_from_slice(&case.code()[..end - self.last_code]);
        place(&self.memory, &self.code, self.last_code);

        case.fill_data(&mut self.before);
        for page in 0..DATA.len() {
            let range = page * PAGE as usize..(page + 1) * PAGE as usize;
            self.memory.write_bytes(data_at(page), &self.before[range]).unwrap();
        }

        let cpu = &mut self.interpreter.cpu;
        cpu.regs[..16].copy_from_slice(&case.gpr);
        cpu.regs[RIP] = case.rip();
        for (register, &selector) in cpu.segments.iter_mut().zip(&case.segments) {
            let null = Segment { selector: Selector(selector), base: 0, limit: 0, attributes: 0 };
            let found = layout::descriptor(selector);
            *register = found.map_or(null, |segment| Segment { selector: Selector(selector), ..segment });
        }
        if case.mode() == Mode::Bits64 {
            cpu.segments[4].base = case.fs_base;
            cpu.segments[5].base = case.gs_base;
        }
        let given = &case.vectors;
        cpu.vector.unit.set_vector_state(&VectorState { zmm: given.zmm, k: given.k, mxcsr: given.mxcsr });
        cpu.vector.unit.set_x87(&X87State {
            fcw: given.fcw,
            fsw: given.fsw,
            ftw: given.ftw,
            st: given.st,
            ..X87State::default()
        });
        cpu.set_cpl(3);
        cpu.set_rflags(case.rflags & 0x4_0dd5 | 0x202);
        cpu.cr2 = 0;
        cpu.fault_address = 0;
        cpu.interrupt_shadow = false;
        cpu.update_mode();
    }

    fn execute(&mut self, case: &Case) -> End {
        let trap = case.rflags & 1 << 8 != 0;
        for _ in 0..LIMIT {
            match self.interpreter.step() {
                // A software interrupt.
                Ok(()) if self.interpreter.cpu.cpl == 0 => return self.leave_handler(),
                // Single step is the run loop's business: here the trap is taken as given.
                Ok(()) if trap && !self.interpreter.cpu.interrupt_shadow => {
                    return End::Exception { vector: 1, error: 0, address: 0 };
                }
                Ok(()) => self.interpreter.cpu.interrupt_shadow = false,
                Err(exception) => {
                    self.interpreter.cpu.raise(exception).unwrap();
                    return self.leave_handler();
                }
            }
        }
        End::Hung
    }

    /// An exception or software interrupt has been delivered: back to the state that its frame tells of.
    fn leave_handler(&mut self) -> End {
        /// #DF, #TS, #NP, #SS, #GP, #PF, #AC.
        const WITH_ERROR_CODE: u64 = 1 << 8 | 0x1f << 10 | 1 << 17;
        let cpu = &mut self.interpreter.cpu;
        let vector = cpu.regs[RIP].wrapping_sub(HANDLERS) / 16;
        assert!(vector < 32 && cpu.cpl == 0 && cpu.segments[1].selector.0 == KERNEL_CODE);
        let mut at = SYSTEM_AT + (cpu.regs[4] - SYSTEM);
        let mut pop = || {
            at += 8;
            self.memory.read::<u64>(GuestAddress(at - 8)).unwrap()
        };
        let error = if WITH_ERROR_CODE >> vector & 1 != 0 { pop() } else { 0 };
        let [rip, cs, rflags, rsp, ss] = std::array::from_fn(|_| pop());
        assert_eq!(at, SYSTEM_AT + STACK_TOP);
        cpu.regs[RIP] = rip;
        cpu.regs[4] = rsp;
        for (register, selector) in [(1, cs), (2, ss)] {
            let selector = Selector(selector as u16);
            let segment = layout::descriptor(selector.0).unwrap_or(Segment { attributes: 0, ..cpu.ldtr });
            cpu.segments[register] = Segment { selector, ..segment };
        }
        cpu.set_cpl(3);
        cpu.set_rflags(rflags);
        cpu.update_mode();
        let address = if vector == u64::from(Vector::PageFault as u8) { cpu.cr2 } else { 0 };
        End::Exception { vector: vector as u8, error: error as u32, address }
    }
}

/// Four levels that map the window's pages, and the descriptor tables for the supervisor.
fn page_tables(memory: &GuestMemory) {
    let put = |table: u64, index: u64, entry: u64| {
        memory.write(GuestAddress(table + 8 * (index & 511)), entry).unwrap();
    };
    let [root, pointers, directory, table] = [0, 1, 2, 3].map(|level| TABLES_AT + level * PAGE);
    let link = PRESENT | WRITABLE | USER;
    put(root, CODE >> 39, pointers | link);
    put(pointers, CODE >> 30, directory | link);
    put(directory, CODE >> 21, table | link);
    for page in 0..CODE_LEN as u64 / PAGE {
        put(table, (CODE >> 12) + page, (CODE_AT + page * PAGE) | PRESENT | USER);
    }
    for (index, page) in DATA.iter().enumerate() {
        let write = if page.writable { WRITABLE } else { 0 };
        put(table, page.address >> 12, data_at(index).0 | PRESENT | USER | write | NO_EXECUTE);
    }
    let [pointers, directory, table] = [4, 5, 6].map(|level| TABLES_AT + level * PAGE);
    put(root, SYSTEM >> 39, pointers | PRESENT | WRITABLE);
    put(pointers, SYSTEM >> 30, directory | PRESENT | WRITABLE);
    put(directory, SYSTEM >> 21, table | PRESENT | WRITABLE);
    for page in 0..SYSTEM_PAGES {
        let entry = (SYSTEM_AT + page * PAGE) | PRESENT | WRITABLE | NO_EXECUTE;
        put(table, (SYSTEM >> 12) + page, entry);
    }
}

/// LDT, GDT, a TSS with nothing but a stack, and an IDT whose gates lead to the vector's address in [`HANDLERS`].
fn system_tables(memory: &GuestMemory) {
    let put = |offset: u64, value: u64| memory.write(GuestAddress(SYSTEM_AT + offset), value).unwrap();
    for (index, segment) in LDT.iter().enumerate() {
        put(8 * index as u64, segment.to_descriptor());
    }
    for segment in &GDT_USER {
        put(GDT + u64::from(segment.selector.offset()), segment.to_descriptor());
    }
    // 64-bit code, DPL 0, accessed.
    put(GDT + u64::from(KERNEL_CODE), 0x00af_9b00_0000_ffff);
    put(TSS + 4, SYSTEM + STACK_TOP);
    for vector in 0..256 {
        const INTERRUPT_GATE: u64 = 0xe;
        let handler = HANDLERS + 16 * vector;
        // INT3 and INTO may be executed by user code.
        let privilege = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = handler & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | INTERRUPT_GATE << 40
            | privilege << 45
            | 1 << 47
            | (handler & 0xffff_0000) << 32;
        put(IDT + 16 * vector, low);
        put(IDT + 16 * vector + 8, handler >> 32);
    }
}
