//! The register page as KVM's `KVM_GET_LAPIC` and `KVM_SET_LAPIC` exchange it (`struct kvm_lapic_state`).

use super::registers::{VERSION, base, highest, number};
use super::state::{LapicState, LvtState};
use super::timer::{TimerMode, divisor};

/// Length of `struct kvm_lapic_state` in bytes.
pub const KVM_PAGE_LEN: usize = 1024;

/// A register page cannot be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The page belongs to another local APIC.
    #[error("the register page of local APIC {found} was given for local APIC {expected}")]
    WrongId {
        /// Whose page was wanted.
        expected: u32,
        /// Whose page it is.
        found: u32,
    },
}

type Page = [u8; KVM_PAGE_LEN];

/// Registers lie at multiples of 16, all numbers used here are below 40H.
fn put(page: &mut Page, number: u32, value: u32) {
    let at = number as usize * 16;
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn get(page: &Page, number: u32) -> u32 {
    let at = number as usize * 16;
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

impl LapicState {
    fn x2apic(&self) -> bool {
        self.apic_base & base::X2APIC != 0
    }

    /// The register page. What it has no room for goes to KVM by other calls: [`LapicState::apic_base`],
    /// [`LapicState::tsc_deadline`] (MSRs), pending NMI, INIT and SIPI (`KVM_SET_VCPU_EVENTS`).
    ///
    /// In x2APIC mode the id has the 32-bit format of `KVM_CAP_X2APIC_API`.
    pub fn to_kvm_page(&self) -> [u8; KVM_PAGE_LEN] {
        let mut page = [0; KVM_PAGE_LEN];
        let in_service = highest(&self.isr).unwrap_or(0);
        let ppr = if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 };
        let ldr = if self.x2apic() { (self.id >> 4) << 16 | 1 << (self.id & 0xf) } else { self.ldr };
        let current = self.remaining_ns.unwrap_or(0).div_ceil(divisor(self.divide));
        let single = [
            (number::ID, self.id << if self.x2apic() { 0 } else { 24 }),
            (number::VERSION, VERSION),
            (number::TPR, u32::from(self.tpr)),
            (number::PPR, u32::from(ppr)),
            (number::LDR, ldr),
            (number::DFR, self.dfr),
            (number::SVR, self.svr),
            (number::ESR, self.esr),
            (number::ICR, self.icr as u32),
            (number::ICR_HIGH, (self.icr >> 32) as u32),
            (number::INITIAL_COUNT, self.initial_count),
            (number::CURRENT_COUNT, u32::try_from(current).unwrap_or(u32::MAX)),
            (number::DIVIDE, self.divide),
        ];
        for (number, value) in single {
            put(&mut page, number, value);
        }
        for (first, words) in [(number::ISR, &self.isr), (number::TMR, &self.tmr), (number::IRR, &self.irr)] {
            for (number, word) in (first..).zip(words) {
                put(&mut page, number, *word);
            }
        }
        for (number, value) in (number::LVT..).zip(self.lvt.array()) {
            put(&mut page, number, value);
        }
        page
    }

    /// Takes over the registers in `page`; the caller has set `id` and `apic_base` before, and sets
    /// `tsc_deadline` and the pending events from KVM's other calls.
    ///
    /// # Errors
    /// [`PageError::WrongId`], and nothing has changed.
    pub fn load_kvm_page(&mut self, page: &[u8; KVM_PAGE_LEN]) -> Result<(), PageError> {
        let id = get(page, number::ID) >> if self.x2apic() { 0 } else { 24 };
        if id != self.id {
            return Err(PageError::WrongId { expected: self.id, found: id });
        }
        let words = |first: u32| std::array::from_fn(|i| get(page, first + i as u32));
        self.tpr = get(page, number::TPR) as u8;
        if !self.x2apic() {
            self.ldr = get(page, number::LDR);
        }
        self.dfr = get(page, number::DFR);
        self.svr = get(page, number::SVR);
        self.esr = get(page, number::ESR);
        self.icr = u64::from(get(page, number::ICR_HIGH)) << 32 | u64::from(get(page, number::ICR));
        (self.isr, self.tmr, self.irr) = (words(number::ISR), words(number::TMR), words(number::IRR));
        let [timer, thermal, performance, lint0, lint1, error, ..]: [u32; 8] = words(number::LVT);
        self.lvt = LvtState { timer, thermal, performance, lint0, lint1, error };
        self.initial_count = get(page, number::INITIAL_COUNT);
        self.divide = get(page, number::DIVIDE);
        let current = get(page, number::CURRENT_COUNT);
        let counts = matches!(TimerMode::from_lvt(timer), TimerMode::OneShot | TimerMode::Periodic);
        self.remaining_ns = (counts && current != 0).then(|| u64::from(current) * divisor(self.divide));
        Ok(())
    }
}
