//! Local APIC, I/O APIC, 8259 pair and MSI routing.
//!
//! [`IrqChip`] is what a machine has one of: it takes wires and messages from devices
//! ([`ringfence_engine::InterruptSink`]), holds the 8259 pair and the I/O APIC behind
//! short locks, and knows the inbox of every local APIC. A [`LocalApic`] belongs to its vCPU's thread, which
//! alone changes its registers, without a lock; whatever comes from elsewhere (I/O APIC, MSI, other vCPUs) is
//! posted to its [`LapicInbox`] with atomic operations and noticed by one relaxed load at a block boundary.
//!
//! How an engine uses it:
//!
//! - [`IrqChip::new`], then [`IrqChip::add_local_apic`] for each vCPU, [`LapicInbox::set_waker`] once for each.
//! - At every block boundary the vCPU looks at [`LapicInbox::pending`], masked by what it can take now: INIT,
//!   SIPI and EVENT always, NMI unless blocked, INTERRUPT if RFLAGS.IF is set and no shadow holds. If a bit
//!   remains: [`LocalApic::take_init`], [`LocalApic::take_sipi`] (ignored unless waiting for one),
//!   [`LocalApic::take_nmi`], and [`LocalApic::pending_interrupt`] followed by [`LocalApic::acknowledge`].
//!   After the call a bit stays set only if there is really something to take.
//! - When virtual time reaches [`LocalApic::next_deadline`]: [`LocalApic::run_timer`].
//! - Around a run of the vCPU: [`LocalApic::unpark`] and [`LocalApic::park`], so that [`IrqChip::save`] and
//!   [`IrqChip::restore`] reach the registers while the vCPU stands still.

#![forbid(unsafe_code)]

mod chip;
mod ioapic;
mod lapic;
mod message;
mod pic;
mod ports;
mod router;
mod saved;
#[cfg(test)]
mod tests;

pub use chip::{IrqChip, IrqChipConfig, IrqChipError};
pub use ioapic::IoApicState;
pub use lapic::{
    Interrupt, KVM_PAGE_LEN, LapicInbox, LapicState, LocalApic, Lvt, LvtState, MsrFault, PageError, TIMER_HZ,
    pending,
};
pub use pic::{InitStep, PicControllerState, PicState};
