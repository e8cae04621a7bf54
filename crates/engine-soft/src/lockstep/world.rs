//! What surrounds the two CPUs: one bus that records, one that plays back, and the same for local APIC and memory.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ringfence_engine::Bus;
use ringfence_memory::{GuestAddress, GuestMemory, WriteObserver};
use ringfence_x86::Exception;

use super::journal::{Journal, Place, Transfer};
use crate::interp::system::apic_hooks::{ApicAccess, ApicTap};

thread_local! {
    /// A CPU of the pair executes on this thread, outside of any device: what is written to memory now is its own doing.
    static EXECUTING: Cell<bool> = const { Cell::new(false) };
}

/// Marks what `f` does as the doing of a CPU, or of a device.
pub(super) fn executing<T>(cpu: bool, f: impl FnOnce() -> T) -> T {
    let before = EXECUTING.replace(cpu);
    let result = f();
    EXECUTING.set(before);
    result
}

/// The machine's bus; what goes over it is recorded.
pub(super) struct RecordingBus {
    pub(super) inner: Arc<dyn Bus>,
    pub(super) journal: Arc<Journal>,
}

impl RecordingBus {
    fn read(&self, place: Place, data: &mut [u8], read: impl FnOnce(&dyn Bus, &mut [u8])) {
        let index = self.journal.begin(place, data);
        executing(false, || read(self.inner.as_ref(), data));
        self.journal.end(index, data, true);
    }

    fn write(&self, place: Place, data: &[u8], write: impl FnOnce(&dyn Bus)) {
        self.journal.begin(place, data);
        executing(false, || write(self.inner.as_ref()));
    }
}

impl Bus for RecordingBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.read(Place::PortRead(port), data, |bus, data| bus.port_read(port, data));
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.write(Place::PortWrite(port), data, |bus| bus.port_write(port, data));
    }

    fn memory_read(&self, address: GuestAddress, data: &mut [u8]) {
        self.read(Place::MemoryRead(address), data, |bus, data| bus.memory_read(address, data));
    }

    fn memory_write(&self, address: GuestAddress, data: &[u8]) {
        self.write(Place::MemoryWrite(address), data, |bus| bus.memory_write(address, data));
    }
}

/// A bus without devices: it gives what was recorded and checks what is asked.
pub(super) struct PlayingBus {
    pub(super) journal: Arc<Journal>,
    /// What devices wrote goes here.
    pub(super) memory: Arc<GuestMemory>,
}

/// Puts what devices wrote into the other machine's memory.
pub(super) fn apply(memory: &GuestMemory, transfers: Vec<Transfer>) {
    executing(false, || {
        for Transfer { address, bytes } in transfers {
            // The two memories have the same regions, so what could be written there can be written here.
            let _ = memory.write_bytes(address, &bytes);
        }
    });
}

impl PlayingBus {
    fn play(&self, place: Place, data: &mut [u8]) {
        let played = self.journal.play(place, data);
        apply(&self.memory, played.transfers);
    }
}

impl Bus for PlayingBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.play(Place::PortRead(port), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.play(Place::PortWrite(port), &mut data.to_vec());
    }

    fn memory_read(&self, address: GuestAddress, data: &mut [u8]) {
        self.play(Place::MemoryRead(address), data);
    }

    fn memory_write(&self, address: GuestAddress, data: &[u8]) {
        self.play(Place::MemoryWrite(address), &mut data.to_vec());
    }
}

/// Listens to the real local APIC.
pub(super) struct RecordingTap(pub(super) Arc<Journal>);

impl ApicTap for RecordingTap {
    fn answer(&self, _: ApicAccess, _: &mut [u8]) -> Option<Result<(), Exception>> {
        None
    }

    fn note(&self, access: ApicAccess, data: &[u8], good: bool) {
        let index = self.0.begin(Place::Apic(access), data);
        self.0.end(index, data, good);
    }

    fn base(&self) -> Option<(u64, Option<u64>)> {
        None
    }
}

/// Stands in for the local APIC.
pub(super) struct PlayingTap {
    pub(super) journal: Arc<Journal>,
    /// IA32_APIC_BASE and the register page's address, as the real one has them.
    pub(super) base: Mutex<(u64, Option<u64>)>,
}

impl PlayingTap {
    pub(super) fn set_base(&self, base: (u64, Option<u64>)) {
        *self.base.lock().unwrap_or_else(PoisonError::into_inner) = base;
    }
}

impl ApicTap for PlayingTap {
    fn answer(&self, access: ApicAccess, data: &mut [u8]) -> Option<Result<(), Exception>> {
        let played = self.journal.play(Place::Apic(access), data);
        Some(if played.good { Ok(()) } else { Err(Exception::GP0) })
    }

    fn note(&self, _: ApicAccess, _: &[u8], _: bool) {}

    fn base(&self) -> Option<(u64, Option<u64>)> {
        Some(*self.base.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Ranges that a CPU wrote past its soft TLB: page-table entries, and what KVM's interface keeps in memory.
#[derive(Default)]
pub(super) struct OwnWrites(Mutex<Vec<(GuestAddress, u64)>>);

impl OwnWrites {
    fn push(&self, address: GuestAddress, len: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((address, len));
    }

    /// Takes the list, leaving the room of `into`.
    pub(super) fn take(&self, into: &mut Vec<(GuestAddress, u64)>) {
        into.append(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Hears of writes to the memory that devices know: theirs go to the journal.
pub(super) struct Recorder {
    pub(super) memory: Weak<GuestMemory>,
    pub(super) journal: Arc<Journal>,
    pub(super) own: Arc<OwnWrites>,
}

impl WriteObserver for Recorder {
    fn written(&self, address: GuestAddress, len: u64) {
        if EXECUTING.get() {
            return self.own.push(address, len);
        }
        let Some(memory) = self.memory.upgrade() else { return };
        let mut bytes = vec![0; len as usize];
        // It has just been written, so it can be read.
        if memory.read_bytes(address, &mut bytes).is_ok() {
            self.journal.transfer(address, bytes);
        }
    }
}

/// Hears of writes to the other memory.
pub(super) struct Listener(pub(super) Arc<OwnWrites>);

impl WriteObserver for Listener {
    fn written(&self, address: GuestAddress, len: u64) {
        if EXECUTING.get() {
            self.0.push(address, len);
        }
    }
}
