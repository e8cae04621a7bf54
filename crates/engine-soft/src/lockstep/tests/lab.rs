//! A machine in lock-step for tests: 64-bit code at CPL 0, one megabyte mapped one to one, and one device.

use std::sync::{Arc, Mutex};

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use ringfence_engine::{Bus, ClockMode, CpuState, TimerQueue, Vcpu, VirtualClock, VmConfig, VmExit};
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::cpuid::{CpuidTable, Mitigations, Model, Platform};
use ringfence_x86::segment::{DescriptorTable, Segment, Selector};

use crate::interp::features::host_cpuid;
use crate::jit::seeded::SeededBug;
use crate::lockstep::vcpu::LockstepVcpu;
use crate::lockstep::{LockstepOptions, LockstepVm};

pub(super) const CODE: u64 = 0x1_0000;
/// Every vector's handler: it puts the vector into RAX and halts.
const HANDLERS: u64 = 0x2_0000;
pub(super) const DATA: u64 = 0x3_0000;
const STACK: u64 = 0x4_0000;
const GDT: u64 = 0x3000;
const IDT: u64 = 0x4000;
const PML4: u64 = 0x6000;
/// A page of device memory.
pub(super) const DEVICE: u64 = 0x10_0000;

/// A device on ports and in memory. Reads give another value each time; a write of a value N to port 0x500 makes it fill
/// N bytes at [`DATA`]; it knows what was written.
#[derive(Default)]
pub(super) struct Device {
    memory: Mutex<Option<Arc<GuestMemory>>>,
    count: Mutex<u8>,
    pub(super) log: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Device {
    fn read(&self, data: &mut [u8]) {
        let mut count = self.count.lock().unwrap();
        for byte in data {
            *count = count.wrapping_mul(37).wrapping_add(11);
            *byte = *count;
        }
    }
}

impl Bus for Device {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        self.read(data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.log.lock().unwrap().push((port.into(), data.to_vec()));
        if port == 0x500 {
            let memory = self.memory.lock().unwrap().clone().unwrap();
            memory.fill(GuestAddress(DATA), 0xaa, data[0].into()).unwrap();
        }
    }

    fn memory_read(&self, _: GuestAddress, data: &mut [u8]) {
        self.read(data);
    }

    fn memory_write(&self, address: GuestAddress, data: &[u8]) {
        self.log.lock().unwrap().push((address.0, data.to_vec()));
    }
}

/// A machine with code loaded.
pub(super) struct Lab {
    pub(super) vm: LockstepVm,
    pub(super) vcpu: LockstepVcpu,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) device: Arc<Device>,
    pub(super) timers: Arc<TimerQueue>,
}

fn cpuid() -> CpuidTable {
    let platform = Platform {
        cpus: 1,
        tsc_khz: VirtualClock::COUNTED_TSC_KHZ,
        apic_khz: 1_000_000,
        physical_bits: 40,
        mitigations: Mitigations::default(),
    };
    Model::Host.table(host_cpuid(), &platform).unwrap()
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector: Selector(selector), base: 0, limit: 0xffff_ffff, attributes }
}

fn tables(memory: &GuestMemory) {
    let put = |at, value: u64| memory.write(GuestAddress(at), value).unwrap();
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    put(GDT + 16, 0x00cf_9300_0000_ffff);
    for vector in 0..256 {
        let handler = HANDLERS + 16 * vector;
        put(IDT + 16 * vector, handler & 0xffff | 8 << 16 | 0x8e00 << 32 | handler >> 16 << 48);
        // mov eax, vector; hlt
        let code = [0xb8, vector as u8, 0, 0, 0, 0xf4];
        memory.write_bytes(GuestAddress(handler), &code).unwrap();
    }
    put(PML4, 0x7003);
    put(0x7000, 0x8003);
    put(0x8000, 0x9003);
    for page in 0..512 {
        put(0x9000 + 8 * page, page << 12 | 3);
    }
}

impl Lab {
    pub(super) fn new(
        options: LockstepOptions,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Self {
        let memory = Arc::new(GuestMemory::flat(1 << 20).unwrap());
        tables(&memory);
        let mut assembler = CodeAssembler::new(64).unwrap();
        write(&mut assembler).unwrap();
        memory.write_bytes(GuestAddress(CODE), &assembler.assemble(CODE).unwrap()).unwrap();
        let timers = Arc::new(TimerQueue::default());
        let config = VmConfig {
            memory: Arc::clone(&memory),
            clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
            timers: Arc::clone(&timers),
            cpuid: Arc::new(cpuid()),
            cpus: 1,
        };
        let vm = LockstepVm::new(config, options).unwrap();
        let device = Arc::new(Device::default());
        *device.memory.lock().unwrap() = Some(Arc::clone(&memory));
        let bus: Arc<dyn Bus> = Arc::clone(&device) as _;
        let mut vcpu = LockstepVcpu::new(vm.pair(0, bus).unwrap());
        let data = flat(16, 0xc093);
        let mut segments = [data; 6];
        segments[1] = flat(8, 0xa09b);
        let mut state = CpuState {
            rip: CODE,
            rflags: 2,
            segments,
            gdtr: DescriptorTable { base: GDT, limit: 0xff },
            idtr: DescriptorTable { base: IDT, limit: 0xfff },
            cr0: 0x8005_0033,
            cr3: PML4,
            cr4: 0x620,
            efer: 0xd01,
            ..vcpu.state()
        };
        state.gpr = [0; 16];
        state.gpr[4] = STACK;
        state.gpr[3] = DATA;
        vcpu.set_state(&state).unwrap();
        Self { vm, vcpu, memory, device, timers }
    }

    /// Makes the translator wrong.
    pub(super) fn seed(mut self, bug: SeededBug) -> Self {
        self.vcpu.pair.subject.jit.seeded = Some(bug);
        self
    }

    /// Runs to the guest's HLT, and gives RAX.
    pub(super) fn run(&mut self) -> u64 {
        let exit = self.vcpu.run();
        if let VmExit::Internal(report) = &exit {
            panic!("{report}");
        }
        assert_eq!(exit, VmExit::HaltedForGood);
        self.vcpu.state().gpr[0]
    }

    /// Runs until the two come apart: the report.
    pub(super) fn apart(&mut self) -> String {
        match self.vcpu.run() {
            VmExit::Internal(report) => report,
            exit => panic!("{exit:?}, and nobody has noticed"),
        }
    }

    pub(super) fn word(&self, at: u64) -> u64 {
        self.memory.read(GuestAddress(at)).unwrap()
    }

    /// Maps the local APIC's page of registers where it is.
    pub(super) fn map_apic(&self) {
        let put = |at, value: u64| self.memory.write(GuestAddress(at), value).unwrap();
        // A large page for the third and fourth GiB's end.
        put(0x7018, 0xa003);
        put(0xa000 + 8 * 0x1f7, 0xfee0_0083);
    }
}
