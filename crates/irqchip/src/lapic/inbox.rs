//! The part of a local APIC that any thread reaches.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::message::Destination;

/// Bits of [`LapicInbox::pending`].
pub mod pending {
    /// There may be a maskable interrupt to take. Stays set while RFLAGS.IF keeps the vCPU from taking it.
    pub const INTERRUPT: u32 = 1 << 0;
    /// An NMI.
    pub const NMI: u32 = 1 << 1;
    /// An INIT.
    pub const INIT: u32 = 1 << 2;
    /// A start-up IPI.
    pub const SIPI: u32 = 1 << 3;
    /// A wire changed or an error came in: to be looked at whatever RFLAGS.IF says. Every `take_` function and
    /// `pending_interrupt` does that.
    pub const EVENT: u32 = 1 << 4;
    /// What a vCPU looks at whatever it is doing.
    pub const ALWAYS: u32 = INIT | SIPI | EVENT;
}

/// Vector of the start-up IPI, in the top bits of the pending word so that both change together.
const SIPI_VECTOR_SHIFT: u32 = 24;

/// Details behind [`pending::EVENT`].
pub(super) mod event {
    pub(in crate::lapic) const LINT0_EDGE: u32 = 1 << 0;
    pub(in crate::lapic) const LINT1_EDGE: u32 = 1 << 1;
    pub(in crate::lapic) const ILLEGAL_VECTOR: u32 = 1 << 2;
}

/// What the owner tells senders about itself: the logical destination in the low 32 bits, and these flags.
pub(super) mod address {
    pub(in crate::lapic) const ENABLED: u64 = 1 << 32;
    pub(in crate::lapic) const SOFTWARE_ENABLED: u64 = 1 << 33;
    pub(in crate::lapic) const X2APIC: u64 = 1 << 34;
    pub(in crate::lapic) const CLUSTER: u64 = 1 << 35;
    /// LINT0 leads somewhere; otherwise its changes need not wake anybody.
    pub(in crate::lapic) const LINT0_OPEN: u64 = 1 << 36;
}

type Waker = Box<dyn Fn() + Send + Sync>;

/// Where interrupts for one local APIC are posted, from any thread and without a lock.
///
/// Senders set a bit in the interrupt request register, then one in the pending word, then wake the vCPU if
/// the pending bit is news. The owner clears the pending bit first and reads the request register after, so
/// that nothing is overlooked.
pub struct LapicInbox {
    id: u32,
    pending: AtomicU32,
    events: AtomicU32,
    irr: [AtomicU32; 8],
    tmr: [AtomicU32; 8],
    lint0: AtomicBool,
    extint: AtomicBool,
    address: AtomicU64,
    task_priority: AtomicU8,
    waker: OnceLock<Waker>,
}

impl std::fmt::Debug for LapicInbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LapicInbox({}, pending {:#x})", self.id, self.pending())
    }
}

impl LapicInbox {
    pub(crate) fn new(id: u32) -> Self {
        Self {
            id,
            pending: AtomicU32::new(0),
            events: AtomicU32::new(0),
            irr: Default::default(),
            tmr: Default::default(),
            lint0: AtomicBool::new(false),
            extint: AtomicBool::new(false),
            address: AtomicU64::new(0),
            task_priority: AtomicU8::new(0),
            waker: OnceLock::new(),
        }
    }

    /// The APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What waits to be looked at: bits of [`pending`]. One relaxed load.
    #[inline]
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    /// The word that [`LapicInbox::pending`] reads, for code that is generated.
    pub fn pending_word(&self) -> &AtomicU32 {
        &self.pending
    }

    /// Registers what to call, on the sender's thread and with no lock of the controllers held, when a bit of
    /// the pending word has become set. The first registration holds.
    pub fn set_waker(&self, waker: impl Fn() + Send + Sync + 'static) {
        let _ = self.waker.set(Box::new(waker));
    }

    pub(crate) fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker();
        }
    }

    fn flag(&self, flag: u64) -> bool {
        self.address.load(Ordering::SeqCst) & flag != 0
    }

    /// Globally enabled: takes part in the exchange of messages.
    pub(crate) fn enabled(&self) -> bool {
        self.flag(address::ENABLED)
    }

    /// Enabled by software too: accepts fixed interrupts (SDM 3A 10.4.7.2).
    pub(crate) fn software_enabled(&self) -> bool {
        const BOTH: u64 = address::ENABLED | address::SOFTWARE_ENABLED;
        self.address.load(Ordering::SeqCst) & BOTH == BOTH
    }

    pub(crate) fn task_priority(&self) -> u8 {
        self.task_priority.load(Ordering::Relaxed)
    }

    /// Whether a message to `destination` is for this local APIC (SDM 3A 10.6.2, 10.12.10).
    pub(crate) fn matches(&self, destination: Destination) -> bool {
        match destination {
            Destination::Broadcast => true,
            Destination::AllBut(id) => id != self.id,
            Destination::Physical(id) => id == self.id,
            Destination::Logical(mda) => {
                let own = self.address.load(Ordering::SeqCst);
                let logical = own as u32;
                if own & address::X2APIC != 0 {
                    logical >> 16 == mda >> 16 && logical & mda & 0xffff != 0
                } else if mda > 0xff {
                    // No 8-bit logical id is as wide as this.
                    false
                } else if own & address::CLUSTER != 0 {
                    logical >> 4 == mda >> 4 && logical & mda & 0xf != 0
                } else {
                    logical & mda != 0
                }
            }
        }
    }

    /// Sets bits of the pending word; whether one of them is new.
    fn raise(&self, bits: u32) -> bool {
        self.pending.fetch_or(bits, Ordering::SeqCst) & bits != bits
    }

    fn raise_event(&self, event: u32) -> bool {
        self.events.fetch_or(event, Ordering::SeqCst);
        self.raise(pending::EVENT)
    }

    /// Posts a fixed interrupt. Like every `post_`, says whether the vCPU must be woken.
    pub(crate) fn post_vector(&self, vector: u8, level: bool) -> bool {
        if vector < 16 {
            return self.raise_event(event::ILLEGAL_VECTOR);
        }
        let (word, bit) = (usize::from(vector / 32), 1_u32 << (vector % 32));
        // The trigger mode is set on acceptance (SDM 3A 10.8.4), and is known before the request is seen.
        if level {
            self.tmr[word].fetch_or(bit, Ordering::SeqCst);
        } else if self.tmr[word].load(Ordering::Relaxed) & bit != 0 {
            self.tmr[word].fetch_and(!bit, Ordering::SeqCst);
        }
        self.irr[word].fetch_or(bit, Ordering::SeqCst);
        self.raise(pending::INTERRUPT)
    }

    pub(crate) fn post_nmi(&self) -> bool {
        self.raise(pending::NMI)
    }

    /// A start-up IPI from before the INIT is void.
    pub(crate) fn post_init(&self) -> bool {
        let update = |word: u32| Some((word & 0xff_ffff & !pending::SIPI) | pending::INIT);
        let old = self.pending.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update);
        old.is_ok_and(|old| old & pending::INIT == 0)
    }

    /// The first of several start-up IPIs counts.
    pub(crate) fn post_sipi(&self, vector: u8) -> bool {
        let update = |word: u32| {
            let free = word & pending::SIPI == 0;
            free.then_some(word | pending::SIPI | u32::from(vector) << SIPI_VECTOR_SHIFT)
        };
        self.pending.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update).is_ok()
    }

    /// An ExtINT message: the 8259 pair has a vector.
    pub(crate) fn post_extint(&self) -> bool {
        self.extint.store(true, Ordering::SeqCst);
        self.raise(pending::INTERRUPT)
    }

    pub(crate) fn set_lint0(&self, asserted: bool) -> bool {
        let before = self.lint0.swap(asserted, Ordering::SeqCst);
        // Read after the level is stored; the owner publishes first and looks at the level after.
        if !asserted || before || !self.flag(address::LINT0_OPEN) {
            return false;
        }
        self.events.fetch_or(event::LINT0_EDGE, Ordering::SeqCst);
        self.raise(pending::EVENT | pending::INTERRUPT)
    }

    /// The level after a restore, whose edges are long past.
    pub(crate) fn load_lint0(&self, asserted: bool) {
        self.lint0.store(asserted, Ordering::SeqCst);
    }

    pub(crate) fn pulse_lint1(&self) -> bool {
        self.raise_event(event::LINT1_EDGE)
    }
}

/// For the owner.
impl LapicInbox {
    pub(crate) fn publish(&self, address: u64, task_priority: u8) {
        self.task_priority.store(task_priority, Ordering::Relaxed);
        self.address.store(address, Ordering::SeqCst);
    }

    /// Sets a bit for the owner itself, which needs no waking.
    pub(super) fn raise_own(&self, bits: u32) {
        self.raise(bits);
    }

    pub(super) fn clear(&self, bits: u32) -> bool {
        self.pending.fetch_and(!bits, Ordering::SeqCst) & bits != 0
    }

    pub(super) fn take_sipi(&self) -> Option<u8> {
        let update = |word: u32| (word & pending::SIPI != 0).then_some(word & 0xff_ffff & !pending::SIPI);
        let old = self.pending.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update).ok()?;
        Some((old >> SIPI_VECTOR_SHIFT) as u8)
    }

    /// Takes the events; [`pending::EVENT`] is cleared first, so that a later one sets it again.
    pub(super) fn take_events(&self) -> u32 {
        if self.clear(pending::EVENT) { self.events.swap(0, Ordering::SeqCst) } else { 0 }
    }

    pub(super) fn lint0(&self) -> bool {
        self.lint0.load(Ordering::SeqCst)
    }

    pub(super) fn extint(&self) -> bool {
        self.extint.load(Ordering::SeqCst)
    }

    pub(super) fn take_extint(&self) -> bool {
        self.extint.swap(false, Ordering::SeqCst)
    }

    /// The highest requested vector.
    pub(super) fn highest_request(&self) -> Option<u8> {
        self.irr.iter().enumerate().rev().find_map(|(index, word)| {
            let word = word.load(Ordering::SeqCst);
            (word != 0).then(|| (index as u32 * 32 + 31 - word.leading_zeros()) as u8)
        })
    }

    pub(super) fn take_request(&self, vector: u8) {
        self.irr[usize::from(vector / 32)].fetch_and(!(1 << (vector % 32)), Ordering::SeqCst);
    }

    pub(super) fn is_level(&self, vector: u8) -> bool {
        self.tmr[usize::from(vector / 32)].load(Ordering::SeqCst) & (1 << (vector % 32)) != 0
    }

    pub(super) fn requests(&self) -> [u32; 8] {
        std::array::from_fn(|i| self.irr[i].load(Ordering::SeqCst))
    }

    pub(super) fn trigger_modes(&self) -> [u32; 8] {
        std::array::from_fn(|i| self.tmr[i].load(Ordering::SeqCst))
    }

    /// Forgets all requests, as INIT does; a start-up IPI, which came after it, stays.
    pub(super) fn clear_requests(&self) {
        self.load_requests([0; 8], [0; 8]);
        self.extint.store(false, Ordering::SeqCst);
        self.events.store(0, Ordering::SeqCst);
        self.clear(pending::INTERRUPT | pending::EVENT | pending::NMI);
    }

    pub(super) fn load_requests(&self, irr: [u32; 8], tmr: [u32; 8]) {
        for index in 0..8 {
            self.tmr[index].store(tmr[index], Ordering::SeqCst);
            self.irr[index].store(irr[index], Ordering::SeqCst);
        }
    }

    /// The whole pending word, with the start-up vector, and whether an ExtINT message waits.
    pub(super) fn snapshot(&self) -> (u32, bool) {
        (self.pending.load(Ordering::SeqCst), self.extint())
    }

    pub(super) fn load_pending(&self, bits: u32, sipi_vector: u8, extint: bool) {
        self.events.store(0, Ordering::SeqCst);
        self.extint.store(extint, Ordering::SeqCst);
        self.pending.store(bits | u32::from(sipi_vector) << SIPI_VECTOR_SHIFT, Ordering::SeqCst);
    }
}

/// The start-up vector in a pending word.
pub(super) fn sipi_vector(word: u32) -> Option<u8> {
    (word & pending::SIPI != 0).then_some((word >> SIPI_VECTOR_SHIFT) as u8)
}
