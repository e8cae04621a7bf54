//! The software engine behind the seam.

mod sampler;
mod signal;
pub(crate) mod vcpu;

use std::sync::Arc;

use ringfence_engine::{
    Bus, Engine, EngineError, InterruptSink, Placement, SavedState, StateError, Vcpu, Vm, VmConfig,
};
use ringfence_irqchip::{IrqChip, IrqChipConfig};

use crate::code::CodeMap;
use crate::interp::cpu::Connections;
use crate::interp::features::Features;
use crate::jit::{Jit, Options};
use ringfence_x86::cpuid::Output;
use vcpu::SoftVcpu;

/// The software engine, executing by the reference interpreter.
#[derive(Clone, Copy, Debug, Default)]
pub struct InterpreterEngine;

impl Engine for InterpreterEngine {
    fn name(&self) -> &'static str {
        "interp"
    }

    fn create_vm(&self, config: VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        create_vm(config, self.name(), None)
    }
}

/// The software engine, translating 64-bit code to host code.
#[derive(Clone, Copy, Debug, Default)]
pub struct JitEngine {
    /// What the translator may do.
    pub options: Options,
}

impl Engine for JitEngine {
    fn name(&self) -> &'static str {
        "jit"
    }

    fn create_vm(&self, config: VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        create_vm(config, self.name(), Some(self.options))
    }
}

fn create_vm(
    config: VmConfig,
    engine: &'static str,
    translator: Option<Options>,
) -> Result<Box<dyn Vm>, EngineError> {
    Ok(Box::new(SoftVm::new(config, engine, translator)?))
}

/// A virtual machine of the software engine: what its vCPUs share.
#[derive(Debug)]
pub(crate) struct SoftVm {
    config: VmConfig,
    chip: Arc<IrqChip>,
    code: Arc<CodeMap>,
    /// The engine's name.
    engine: &'static str,
    /// How its vCPUs translate, if they do.
    translator: Option<Options>,
}

impl SoftVm {
    /// A machine without vCPUs yet.
    pub(crate) fn new(
        config: VmConfig,
        engine: &'static str,
        translator: Option<Options>,
    ) -> Result<Self, EngineError> {
        if config.cpus != 1 {
            let what = format!("{} vCPUs; it runs one so far", config.cpus);
            return Err(EngineError::Unsupported { engine, what });
        }
        let offers = |bit| config.cpuid.bit(1, 0, Output::Ecx, bit);
        let chip = IrqChip::new(IrqChipConfig {
            cpus: config.cpus,
            physical_bits: Features::new(&config.cpuid).physical_bits() as u8,
            x2apic: offers(21),
            tsc_deadline: offers(24),
        });
        let code = CodeMap::new(Arc::clone(&config.memory));
        Ok(Self { config, chip, code, engine, translator })
    }

    /// What it was made from.
    pub(crate) fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Makes vCPU number `index`.
    pub(crate) fn vcpu(&self, index: u32, bus: Arc<dyn Bus>) -> Result<SoftVcpu, EngineError> {
        let unsupported = |what| EngineError::Unsupported { engine: self.engine, what };
        if index >= self.config.cpus {
            return Err(unsupported(format!("vCPU {index} of {}", self.config.cpus)));
        }
        let apic = self
            .chip
            .add_local_apic(index, Arc::clone(&self.config.clock))
            .map_err(|error| unsupported(error.to_string()))?;
        let connections = Connections {
            memory: Arc::clone(&self.config.memory),
            bus,
            clock: Arc::clone(&self.config.clock),
            code: Arc::clone(&self.code),
            cpuid: Arc::clone(&self.config.cpuid),
        };
        let timers = Arc::clone(&self.config.timers);
        let translator = self
            .translator
            .map(|options| Jit::new(options, &self.code))
            .transpose()
            .map_err(|error| unsupported(error.to_string()))?;
        SoftVcpu::new(connections, apic, timers, translator)
    }
}

impl Vm for SoftVm {
    fn create_vcpu(&self, index: u32, bus: Arc<dyn Bus>) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(self.vcpu(index, bus)?))
    }

    fn interrupts(&self) -> Arc<dyn InterruptSink> {
        Arc::clone(&self.chip) as _
    }

    fn placements(&self) -> Vec<Placement> {
        Arc::clone(&self.chip).placements()
    }

    fn reset(&self) {
        self.chip.reset();
    }

    fn save(&self) -> Vec<SavedState> {
        self.chip.save()
    }

    fn restore(&self, state: &[SavedState]) -> Result<(), StateError> {
        self.chip.restore(state)
    }
}
