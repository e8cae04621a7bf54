//! MSI-X: a table of messages and what is pending (PCI Local Bus 3.0, 6.8.2).

use std::sync::{Arc, Mutex};

use ringfence_engine::{BusDevice, InterruptSink};
use serde::{Deserialize, Serialize};

use crate::device::lock;

/// The most vectors that fit the layout below; the standard allows 2048.
pub const MAX_VECTORS: u16 = 128;
/// Bytes of the base address range: the table, and in its second half the pending bits.
pub(super) const SIZE: u64 = 0x1000;
/// Where the pending bit array starts.
pub(super) const PENDING: u64 = 0x800;

/// Bits of the message control register.
pub(super) mod control {
    pub(in crate::pci) const FUNCTION_MASK: u16 = 1 << 14;
    pub(in crate::pci) const ENABLE: u16 = 1 << 15;
}

/// Bit 0 of a vector's control word. The others are reserved.
const MASKED: u32 = 1;

/// Address low, address high, data, control.
type Entry = [u32; 4];

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct MsixState {
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

#[derive(Debug)]
struct State {
    table: MsixState,
    enabled: bool,
    function_masked: bool,
    /// A message is a memory write, which a function may only do as bus master.
    bus_master: bool,
}

/// The table of one function.
pub(super) struct Msix {
    sink: Arc<dyn InterruptSink>,
    state: Mutex<State>,
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        lock(&self.state).fmt(f)
    }
}

impl MsixState {
    fn new(vectors: u16) -> Self {
        let count = usize::from(vectors.clamp(1, MAX_VECTORS));
        // Every vector is masked after a reset (6.8.2.9).
        Self { entries: vec![[0, 0, 0, MASKED]; count], pending: vec![false; count] }
    }
}

impl State {
    /// Sends what is pending and may be sent.
    fn deliver(&mut self, sink: &dyn InterruptSink) {
        if !self.enabled || self.function_masked || !self.bus_master {
            return;
        }
        for (entry, pending) in self.table.entries.iter().zip(&mut self.table.pending) {
            if *pending && entry[3] & MASKED == 0 {
                *pending = false;
                send(sink, entry);
            }
        }
    }
}

/// A message that is not to the interrupt controllers' range would be a write to memory; it is dropped.
fn send(sink: &dyn InterruptSink, &[low, high, data, _]: &Entry) {
    if high == 0 && low & 0xfff0_0000 == 0xfee0_0000 {
        sink.send_msi(u64::from(low & !3), data);
    }
}

impl Msix {
    pub(super) fn new(vectors: u16, sink: Arc<dyn InterruptSink>) -> Self {
        let state = State {
            table: MsixState::new(vectors),
            enabled: false,
            function_masked: false,
            bus_master: false,
        };
        Self { sink, state: Mutex::new(state) }
    }

    pub(super) fn vectors(&self) -> u16 {
        lock(&self.state).table.entries.len() as u16
    }

    /// Takes over what the function's registers say.
    pub(super) fn set_control(&self, control: u16, bus_master: bool) {
        let mut state = lock(&self.state);
        state.enabled = control & control::ENABLE != 0;
        state.function_masked = control & control::FUNCTION_MASK != 0;
        state.bus_master = bus_master;
        state.deliver(self.sink.as_ref());
    }

    /// Sends a vector's message, or keeps it pending while it is masked. Nothing if MSI-X is off or the function
    /// has no such vector.
    pub(super) fn notify(&self, vector: u16) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if !state.enabled {
            return;
        }
        let Some(pending) = state.table.pending.get_mut(usize::from(vector)) else { return };
        match state.table.entries.get(usize::from(vector)) {
            // Sent with the lock held: once a mask bit has been written, no message follows.
            Some(entry) if entry[3] & MASKED == 0 && !state.function_masked && state.bus_master => {
                send(self.sink.as_ref(), entry);
            }
            _ => *pending = true,
        }
    }

    pub(super) fn reset(&self) {
        let mut state = lock(&self.state);
        state.table = MsixState::new(state.table.entries.len() as u16);
        state.enabled = false;
        state.function_masked = false;
        state.bus_master = false;
    }

    pub(super) fn save(&self) -> MsixState {
        lock(&self.state).table.clone()
    }

    /// Whether a saved table is one of this function.
    pub(super) fn accepts(&self, saved: &MsixState) -> bool {
        let count = lock(&self.state).table.entries.len();
        saved.entries.len() == count && saved.pending.len() == count
    }

    /// Loads a table; nothing is sent before the control register has been taken over anew.
    pub(super) fn restore(&self, saved: &MsixState) {
        let mut state = lock(&self.state);
        state.table = saved.clone();
        state.table.entries.iter_mut().for_each(|entry| entry[3] &= MASKED);
        state.enabled = false;
    }

    /// A 4-byte register of the range.
    fn register(&self, offset: u64) -> u32 {
        let state = lock(&self.state);
        match offset {
            0..PENDING => {
                let entry = state.table.entries.get((offset / 16) as usize);
                entry.and_then(|entry| entry.get((offset % 16 / 4) as usize)).copied().unwrap_or(0)
            }
            _ => {
                let first = ((offset - PENDING) * 8) as usize;
                let bits = state.table.pending.iter().skip(first).take(32);
                bits.zip(0..).fold(0, |word, (set, bit)| word | u32::from(*set) << bit)
            }
        }
    }

    fn set_register(&self, offset: u64, value: u32) {
        let mut state = lock(&self.state);
        if offset >= PENDING {
            return;
        }
        let entry = state.table.entries.get_mut((offset / 16) as usize);
        if let Some(word) = entry.and_then(|entry| entry.get_mut((offset % 16 / 4) as usize)) {
            *word = if offset % 16 == 12 { value & MASKED } else { value };
        }
        state.deliver(self.sink.as_ref());
    }
}

/// Only whole 4- and 8-byte accesses are defined (6.8.2); others read as ones and write nothing.
impl BusDevice for Msix {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if matches!(data.len(), 4 | 8) && offset.is_multiple_of(4) {
            for (bytes, at) in data.chunks_exact_mut(4).zip((offset..).step_by(4)) {
                bytes.copy_from_slice(&self.register(at).to_le_bytes());
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if matches!(data.len(), 4 | 8) && offset.is_multiple_of(4) {
            for (bytes, at) in data.chunks_exact(4).zip((offset..).step_by(4)) {
                if let &[a, b, c, d] = bytes {
                    self.set_register(at, u32::from_le_bytes([a, b, c, d]));
                }
            }
        }
    }
}
