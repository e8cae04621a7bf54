//! Saving and restoring the controllers.

use std::sync::PoisonError;

use ringfence_engine::{SavedState, StateError};

use crate::IrqChip;
use crate::ioapic::IoApicState;
use crate::lapic::{LapicState, Registers};
use crate::pic::PicState;
use crate::router::Slot;

const VERSION: u32 = 1;
const PIC: &str = "pic";
const IOAPIC: &str = "ioapic";

fn lapic_name(id: u32) -> String {
    format!("lapic.{id}")
}

fn find<'a>(sections: &'a [SavedState], name: &str) -> Result<&'a SavedState, StateError> {
    let found = sections.iter().find(|section| section.name == name);
    found.ok_or_else(|| StateError::Invalid {
        name: name.to_owned(),
        what: "the section is missing".to_owned(),
    })
}

impl IrqChip {
    /// The state of the 8259 pair, the I/O APIC and every local APIC: sections `pic`, `ioapic` and `lapic.N`.
    /// The vCPUs must stand still and have parked their local APICs.
    pub fn save(&self) -> Vec<SavedState> {
        let mut sections = vec![
            SavedState::pack(PIC, VERSION, &self.lock_pic().state()),
            SavedState::pack(IOAPIC, VERSION, &self.lock_ioapic().state()),
        ];
        for slot in self.router().slots() {
            let parked = slot.parked.lock().unwrap_or_else(PoisonError::into_inner);
            let state = LapicState::capture(&parked.registers, &slot.inbox, slot.clock.now());
            sections.push(SavedState::pack(&lapic_name(slot.inbox.id()), VERSION, &state));
        }
        sections
    }

    /// Loads what [`IrqChip::save`] gave; other sections are left alone. The clock must already be at the time
    /// of the saving. The vCPUs must stand still; they take over the registers in
    /// [`LocalApic::unpark`](crate::LocalApic::unpark).
    ///
    /// # Errors
    /// [`StateError`] if a section is missing or does not fit; nothing has changed then.
    pub fn restore(&self, sections: &[SavedState]) -> Result<(), StateError> {
        let pic: PicState = find(sections, PIC)?.unpack(PIC, VERSION)?;
        let ioapic: IoApicState = find(sections, IOAPIC)?.unpack(IOAPIC, VERSION)?;
        let mut lapics: Vec<(&Slot, LapicState, Registers)> = Vec::new();
        for slot in self.router().slots() {
            let name = lapic_name(slot.inbox.id());
            let state: LapicState = find(sections, &name)?.unpack(&name, VERSION)?;
            let registers = state
                .registers(slot.inbox.id(), self.config().address_mask(), slot.clock.now())
                .map_err(|what| StateError::Invalid { name, what: what.to_owned() })?;
            lapics.push((slot, state, registers));
        }
        {
            let mut pair = self.lock_pic();
            pair.load(&pic);
            let intr = pair.output();
            for slot in self.router().slots() {
                slot.inbox.load_lint0(intr);
            }
        }
        self.lock_ioapic().load(&ioapic);
        for (slot, state, registers) in lapics {
            state.load_inbox(&slot.inbox);
            slot.inbox.publish(registers.address(slot.inbox.id()), registers.tpr());
            let mut parked = slot.parked.lock().unwrap_or_else(PoisonError::into_inner);
            parked.registers = registers;
            parked.replaced = true;
        }
        Ok(())
    }
}
