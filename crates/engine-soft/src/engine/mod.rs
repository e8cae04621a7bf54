//! The software engine behind the seam.

mod signal;
mod vcpu;

use std::sync::Arc;

use ringfence_engine::{
    Bus, Engine, EngineError, InterruptSink, Placement, SavedState, StateError, Vcpu, Vm, VmConfig,
};
use ringfence_irqchip::{IrqChip, IrqChipConfig};

use crate::code::CodeMap;
use crate::interp::cpu::Connections;
use crate::interp::features::Features;
use ringfence_x86::cpuid::Output;
use vcpu::SoftVcpu;

/// The software engine, executing by the reference interpreter.
#[derive(Clone, Copy, Debug, Default)]
pub struct InterpreterEngine;

impl InterpreterEngine {
    const NAME: &'static str = "interp";
}

impl Engine for InterpreterEngine {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn create_vm(&self, config: VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        if config.cpus != 1 {
            let what = format!("{} vCPUs; it runs one so far", config.cpus);
            return Err(EngineError::Unsupported { engine: Self::NAME, what });
        }
        let offers = |bit| config.cpuid.bit(1, 0, Output::Ecx, bit);
        let chip = IrqChip::new(IrqChipConfig {
            cpus: config.cpus,
            physical_bits: Features::new(&config.cpuid).physical_bits() as u8,
            x2apic: offers(21),
            tsc_deadline: offers(24),
        });
        let code = CodeMap::new(Arc::clone(&config.memory));
        Ok(Box::new(SoftVm { config, chip, code }))
    }
}

/// A virtual machine of the software engine: what its vCPUs share.
#[derive(Debug)]
struct SoftVm {
    config: VmConfig,
    chip: Arc<IrqChip>,
    code: Arc<CodeMap>,
}

impl Vm for SoftVm {
    fn create_vcpu(&self, index: u32, bus: Arc<dyn Bus>) -> Result<Box<dyn Vcpu>, EngineError> {
        let unsupported = |what| EngineError::Unsupported { engine: InterpreterEngine::NAME, what };
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
        Ok(Box::new(SoftVcpu::new(connections, apic, Arc::clone(&self.config.timers))?))
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
