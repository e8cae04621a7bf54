//! The interrupt controllers of a machine, tied together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringfence_engine::{InterruptSink, VirtualClock};

use crate::ioapic::IoApic;
use crate::lapic::{LapicInbox, LocalApic};
use crate::message::Message;
use crate::pic::PicPair;
use crate::router::{MAX_LOCAL_APICS, Parked, Router, Slot, WakeSet};

/// What the controllers offer.
#[derive(Clone, Copy, Debug)]
pub struct IrqChipConfig {
    /// The most local APICs there can be, 1 to 255; their ids are smaller than it.
    pub cpus: u32,
    /// MAXPHYADDR, the width of physical addresses in bits (32 to 52).
    pub physical_bits: u8,
    /// CPUID offers x2APIC mode.
    pub x2apic: bool,
    /// CPUID offers the timer's TSC-deadline mode; without it IA32_TSC_DEADLINE raises #GP.
    pub tsc_deadline: bool,
}

impl IrqChipConfig {
    /// The bits an address can have.
    pub(crate) fn address_mask(&self) -> u64 {
        (1 << self.physical_bits.clamp(32, 52)) - 1
    }
}

/// Why there is no such local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IrqChipError {
    /// More than the chip was made for.
    #[error("local APIC {id} is beyond the {cpus} that the machine was made for")]
    IdOutOfRange {
        /// The id asked for.
        id: u32,
        /// How many there can be.
        cpus: u32,
    },
    /// There is one already.
    #[error("local APIC {0} exists already; each vCPU needs an id of its own")]
    IdTaken(u32),
}

/// The interrupt controllers of a machine: the 8259 pair, the I/O APIC, and the way to every local APIC.
///
/// Lock order: 8259 pair, I/O APIC; neither is held while a vCPU is woken.
pub struct IrqChip {
    config: IrqChipConfig,
    pic: Mutex<PicPair>,
    ioapic: Mutex<IoApic>,
    router: Router,
}

impl std::fmt::Debug for IrqChip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IrqChip({:?})", self.config)
    }
}

impl IrqChip {
    /// Controllers in reset state, without local APICs yet.
    pub fn new(config: IrqChipConfig) -> Arc<Self> {
        Arc::new(Self {
            config,
            pic: Mutex::new(PicPair::new()),
            ioapic: Mutex::new(IoApic::new()),
            router: Router::new(config.cpus),
        })
    }

    /// Makes the local APIC with this id, in reset state; number 0 is the bootstrap processor's.
    ///
    /// # Errors
    /// [`IrqChipError`] if the id is out of range or taken.
    pub fn add_local_apic(
        self: &Arc<Self>,
        id: u32,
        clock: Arc<VirtualClock>,
    ) -> Result<LocalApic, IrqChipError> {
        let cpus = self.config.cpus.min(MAX_LOCAL_APICS);
        let place = self.router.slot(id).ok_or(IrqChipError::IdOutOfRange { id, cpus })?;
        let inbox = Arc::new(LapicInbox::new(id));
        let lapic = LocalApic::new(Arc::clone(self), Arc::clone(&inbox), Arc::clone(&clock));
        let parked = Mutex::new(Parked { registers: lapic.registers(), replaced: false });
        place.set(Slot { inbox, clock, parked }).map_err(|_| IrqChipError::IdTaken(id))?;
        Ok(lapic)
    }

    /// The inbox of a local APIC.
    pub fn inbox(&self, id: u32) -> Option<&Arc<LapicInbox>> {
        Some(&self.router.slot(id)?.get()?.inbox)
    }

    /// An edge of the NMI line (system error, watchdog, debug button), which is LINT1 of every local APIC.
    pub fn pulse_nmi_line(&self) {
        let mut wake = WakeSet::default();
        self.router.pulse_lint1(&mut wake);
        self.router.wake(wake);
    }

    /// Resets the 8259 pair and the I/O APIC, as the machine's reset line does. The vCPUs reset their local
    /// APICs ([`LocalApic::reset`]).
    pub fn reset(&self) {
        self.with_pic(PicPair::reset);
        self.lock_ioapic().reset();
    }

    /// Brings work in flight to rest before [`IrqChip::save`]. The controllers put nothing off: once vCPUs and
    /// devices stand still, all there is to know is in their registers.
    pub fn quiesce(&self) {}

    pub(crate) fn config(&self) -> &IrqChipConfig {
        &self.config
    }

    pub(crate) fn router(&self) -> &Router {
        &self.router
    }

    pub(crate) fn lock_pic(&self) -> MutexGuard<'_, PicPair> {
        self.pic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_ioapic(&self) -> MutexGuard<'_, IoApic> {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message; `from` is the vCPU on whose thread this is and which needs no waking.
    pub(crate) fn send(&self, message: &Message, from: Option<u32>) {
        let mut wake = WakeSet::default();
        self.router.deliver(message, &mut wake);
        self.wake_others(wake, from);
    }

    fn wake_others(&self, mut wake: WakeSet, from: Option<u32>) {
        if let Some(from) = from {
            wake.remove(from);
        }
        self.router.wake(wake);
    }

    /// Tells INTR's level, under the lock of the pair so that levels cannot overtake one another. It is wired
    /// to LINT0 of the local APICs and to pin 0 of the I/O APIC (MP specification figure 3-5).
    fn set_intr(&self, asserted: bool, wake: &mut WakeSet) {
        self.router.set_lint0(asserted, wake);
        self.lock_ioapic().set_pin(0, asserted, &mut |message| self.router.deliver(message, wake));
    }

    /// Does something with the 8259 pair and passes on its output.
    pub(crate) fn with_pic<R>(&self, act: impl FnOnce(&mut PicPair) -> R) -> R {
        let mut wake = WakeSet::default();
        let mut pic = self.lock_pic();
        let before = pic.output();
        let result = act(&mut pic);
        let after = pic.output();
        if before != after {
            self.set_intr(after, &mut wake);
        }
        drop(pic);
        self.router.wake(wake);
        result
    }

    /// The interrupt acknowledge cycle of vCPU `from`. INTR falls with it, and rises again if the pair has
    /// another request.
    pub(crate) fn acknowledge_pic(&self, from: u32) -> u8 {
        let mut wake = WakeSet::default();
        let mut pic = self.lock_pic();
        if pic.output() {
            self.set_intr(false, &mut wake);
        }
        let vector = pic.acknowledge();
        if pic.output() {
            self.set_intr(true, &mut wake);
        }
        drop(pic);
        self.wake_others(wake, Some(from));
        vector
    }

    fn with_ioapic(
        &self,
        from: Option<u32>,
        act: impl FnOnce(&mut IoApic, &mut dyn FnMut(&Message) -> bool),
    ) {
        let mut wake = WakeSet::default();
        act(&mut self.lock_ioapic(), &mut |message| self.router.deliver(message, &mut wake));
        self.wake_others(wake, from);
    }

    pub(crate) fn read_ioapic(&self, offset: u64) -> u32 {
        self.lock_ioapic().read(offset)
    }

    pub(crate) fn write_ioapic(&self, offset: u64, value: u32) {
        self.with_ioapic(None, |ioapic, deliver| ioapic.write(offset, value, deliver));
    }

    /// A local APIC ended a level-triggered interrupt.
    pub(crate) fn end_of_interrupt(&self, vector: u8, from: u32) {
        self.with_ioapic(Some(from), |ioapic, deliver| ioapic.end_of_interrupt(vector, deliver));
    }

    /// A local APIC has become able to accept interrupts.
    pub(crate) fn retry_levels(&self, from: u32) {
        self.with_ioapic(Some(from), |ioapic, deliver| ioapic.retry(deliver));
    }
}

impl InterruptSink for IrqChip {
    /// GSI 0 to 15 drive the 8259 pair and the pin of the I/O APIC with the same number, but for the timer:
    /// GSI 0 drives IRQ 0 of the pair and pin 2 of the I/O APIC (the MADT must say so, with an interrupt source
    /// override from ISA IRQ 0 to GSI 2). GSI 2 is no device's: the pair has its cascade there. From 16 on
    /// there are only pins of the I/O APIC; from 24 on nothing.
    fn set_gsi(&self, gsi: u32, asserted: bool) {
        let pin = match gsi {
            0 => 2,
            2 => return,
            gsi => gsi as usize,
        };
        if gsi < 16 {
            self.with_pic(|pic| pic.set_irq(gsi as u8, asserted));
        }
        self.with_ioapic(None, |ioapic, deliver| ioapic.set_pin(pin, asserted, deliver));
    }

    fn send_msi(&self, address: u64, data: u32) {
        if let Some(message) = Message::from_msi(address, data) {
            self.send(&message, None);
        }
    }
}
