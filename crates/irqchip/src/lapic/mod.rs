//! The local APIC (SDM 3A chapter 10).

mod access;
mod inbox;
mod ipi;
mod local;
mod msr;
mod page;
mod registers;
mod state;
#[cfg(test)]
mod tests;
mod timer;

use std::sync::{Arc, PoisonError};

use ringfence_engine::{VirtualClock, VirtualTime};

use crate::IrqChip;
use crate::router::Parked;

pub use inbox::{LapicInbox, pending};
pub use msr::MsrFault;
pub use page::{KVM_PAGE_LEN, PageError};
pub use registers::Lvt;
pub(crate) use registers::Registers;
pub use state::{LapicState, LvtState};
pub use timer::TIMER_HZ;

/// A maskable interrupt that waits for the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// A vector of the local APIC.
    Fixed(u8),
    /// The 8259 pair has a vector, which only acknowledging tells.
    External,
}

/// The local APIC of one vCPU, owned by the vCPU's thread.
///
/// Time comes from the clock it was made with; in counted mode the engine must have advanced the clock to the
/// present before it calls anything here that reads or writes the timer.
#[derive(Debug)]
pub struct LocalApic {
    chip: Arc<IrqChip>,
    inbox: Arc<LapicInbox>,
    clock: Arc<VirtualClock>,
    registers: Registers,
}

impl LocalApic {
    pub(crate) fn new(chip: Arc<IrqChip>, inbox: Arc<LapicInbox>, clock: Arc<VirtualClock>) -> Self {
        let registers = Registers::reset(inbox.id());
        let this = Self { chip, inbox, clock, registers };
        this.publish();
        this
    }

    /// Where others post interrupts for this vCPU.
    pub fn inbox(&self) -> &Arc<LapicInbox> {
        &self.inbox
    }

    /// The APIC id, which is also the vCPU's number.
    pub fn id(&self) -> u32 {
        self.inbox.id()
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.registers.apic_base
    }

    /// Where the 4 KiB of registers answer for this vCPU; `None` if the local APIC is disabled or in x2APIC
    /// mode.
    pub fn mmio_base(&self) -> Option<u64> {
        let visible = self.registers.enabled() && !self.registers.x2apic();
        visible.then_some(self.registers.apic_base & !0xfff)
    }

    /// Back to the state after power-on: nothing is pending any more, IA32_APIC_BASE is reset.
    pub fn reset(&mut self) {
        self.inbox.load_pending(0, 0, false);
        self.restart(None);
    }

    /// What INIT does (SDM 3A 10.4.7.3, 10.12.5.1): as after power-on, but IA32_APIC_BASE stays and a start-up
    /// IPI that followed the INIT stays pending.
    pub fn init(&mut self) {
        self.restart(Some(self.registers.apic_base));
    }

    fn restart(&mut self, apic_base: Option<u64>) {
        let tsc_offset = self.registers.timer.tsc_offset;
        self.registers = Registers::reset(self.id());
        self.registers.timer.tsc_offset = tsc_offset;
        if let Some(apic_base) = apic_base {
            self.registers.apic_base = apic_base;
        }
        self.inbox.clear_requests();
        self.publish();
        self.sample_lint0();
        self.park();
    }

    /// The task priority register.
    pub fn tpr(&self) -> u8 {
        self.registers.tpr
    }

    /// Writes the task priority register.
    pub fn set_tpr(&mut self, value: u8) {
        self.registers.tpr = value;
        self.publish();
        self.reconsider();
    }

    /// CR8: bits 7:4 of the task priority (SDM 3A 10.8.6).
    pub fn cr8(&self) -> u64 {
        u64::from(self.registers.tpr >> 4)
    }

    /// Writes CR8, whose bits above 3 the caller has checked to be zero.
    pub fn set_cr8(&mut self, value: u64) {
        self.set_tpr((value as u8 & 0xf) << 4);
    }

    /// The interrupt to take now if RFLAGS.IF allows: one from the 8259 pair, or the highest requested vector
    /// whose class is above the processor priority (SDM 3A 10.8.3).
    pub fn pending_interrupt(&mut self) -> Option<Interrupt> {
        self.service();
        let found = self.deliverable();
        if found.is_some() {
            return found;
        }
        self.inbox.clear(pending::INTERRUPT);
        // A sender may have set the request before the bit was cleared.
        let found = self.deliverable();
        if found.is_some() {
            self.inbox.raise_own(pending::INTERRUPT);
        }
        found
    }

    fn deliverable(&self) -> Option<Interrupt> {
        if self.inbox.extint() || (self.registers.accepts_pic() && self.inbox.lint0()) {
            return Some(Interrupt::External);
        }
        let vector = self.inbox.highest_request()?;
        let ready = self.registers.enabled() && vector >> 4 > self.registers.ppr() >> 4;
        ready.then_some(Interrupt::Fixed(vector))
    }

    /// Takes the interrupt that [`LocalApic::pending_interrupt`] tells of and gives its vector. If the 8259
    /// pair has withdrawn its request meanwhile, that is its spurious vector; if nothing is pending at all, the
    /// local APIC's own (SDM 3A 10.9).
    pub fn acknowledge(&mut self) -> u8 {
        match self.pending_interrupt() {
            Some(Interrupt::Fixed(vector)) => {
                self.inbox.take_request(vector);
                self.registers.isr[usize::from(vector / 32)] |= 1 << (vector % 32);
                vector
            }
            Some(Interrupt::External) => {
                self.inbox.take_extint();
                self.chip.acknowledge_pic(self.id())
            }
            None => self.registers.svr as u8,
        }
    }

    /// End of interrupt (SDM 3A 10.8.5): the highest vector in service is done. The I/O APIC is told if it was
    /// level-triggered.
    pub fn eoi(&mut self) {
        let Some(vector) = self.registers.highest_in_service() else { return };
        self.registers.isr[usize::from(vector / 32)] &= !(1 << (vector % 32));
        if self.inbox.is_level(vector) {
            self.end_of_lint0(vector);
            self.chip.end_of_interrupt(vector, self.id());
        }
        self.reconsider();
    }

    /// Whether the guest may end the interrupt in service without telling us (KVM's PV EOI): it is the only
    /// one, it is edge-triggered, and nothing else is requested.
    pub fn pv_eoi_possible(&self) -> bool {
        let in_service: u32 = self.registers.isr.iter().map(|word| word.count_ones()).sum();
        in_service == 1
            && self.inbox.highest_request().is_none()
            && self.registers.highest_in_service().is_some_and(|vector| !self.inbox.is_level(vector))
    }

    /// Takes a pending NMI.
    pub fn take_nmi(&mut self) -> bool {
        self.service();
        self.inbox.clear(pending::NMI)
    }

    /// Takes a pending INIT; the caller resets the CPU and calls [`LocalApic::init`].
    pub fn take_init(&mut self) -> bool {
        self.service();
        self.inbox.clear(pending::INIT)
    }

    /// Takes a pending start-up IPI: the CPU starts at page `vector` in real mode if it waits for one, else
    /// ignores it.
    pub fn take_sipi(&mut self) -> Option<u8> {
        self.inbox.take_sipi()
    }

    /// When [`LocalApic::run_timer`] must be called next.
    #[inline]
    pub fn next_deadline(&self) -> VirtualTime {
        self.registers.timer.deadline
    }

    /// Requests the timer's interrupt if the timer has expired by `now`.
    pub fn run_timer(&mut self, now: VirtualTime) {
        if self.registers.timer.run(now) {
            self.local_interrupt(Lvt::Timer);
        }
    }

    /// Tells that the guest's TSC is `offset` ahead of the clock's, which moves a TSC deadline.
    pub fn set_tsc_offset(&mut self, offset: i64) {
        self.registers.timer.set_tsc_offset(&self.clock, offset);
    }

    /// Lays the registers where [`IrqChip::save`] and [`IrqChip::restore`] reach them. To be called when the
    /// vCPU stops running.
    pub fn park(&self) {
        let Some(slot) = self.chip.router().slot(self.id()).and_then(|slot| slot.get()) else { return };
        let mut parked = slot.parked.lock().unwrap_or_else(PoisonError::into_inner);
        *parked = Parked { registers: self.registers.clone(), replaced: false };
    }

    /// Takes over registers that [`IrqChip::restore`] has loaded. To be called before the vCPU runs, and
    /// before anything else is asked of a local APIC whose vCPU stood still.
    pub fn unpark(&mut self) {
        let Some(slot) = self.chip.router().slot(self.id()).and_then(|slot| slot.get()) else { return };
        let mut parked = slot.parked.lock().unwrap_or_else(PoisonError::into_inner);
        if !parked.replaced {
            return;
        }
        parked.replaced = false;
        let tsc_offset = self.registers.timer.tsc_offset;
        self.registers = parked.registers.clone();
        drop(parked);
        self.set_tsc_offset(tsc_offset);
        self.publish();
        self.reconsider();
    }

    /// The registers and all that is pending, as a saved section holds them.
    pub fn state(&self) -> LapicState {
        LapicState::capture(&self.registers, &self.inbox, self.clock.now())
    }

    pub(crate) fn registers(&self) -> Registers {
        self.registers.clone()
    }

    fn publish(&self) {
        self.inbox.publish(self.registers.address(self.id()), self.registers.tpr);
    }

    /// Something changed that may let an interrupt through.
    fn reconsider(&self) {
        if self.deliverable().is_some() {
            self.inbox.raise_own(pending::INTERRUPT);
        }
    }
}
