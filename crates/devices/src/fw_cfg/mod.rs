//! fw_cfg: configuration that firmware and kernels read from the machine.
//!
//! Source: QEMU's specification "QEMU Firmware Configuration (fw_cfg) Device", sections "Hardware Interface" and
//! "Guest-side DMA Interface". Items are read only, and what a DMA descriptor asks for is checked against guest
//! memory like everything a guest writes.

mod items;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ringfence_engine::{BusDevice, Placement, SavedState, StateError, Stateful};
use ringfence_memory::{GuestAddress, GuestMemory, MemoryError};
use serde::{Deserialize, Serialize};

pub use items::{FwCfgError, FwCfgItems};

use crate::device::{lock, ports, read_bytes};
use crate::platform::{FW_CFG_PORT, FW_CFG_PORT_COUNT};

const NAME: &str = "fw-cfg";
const VERSION: u32 = 1;

const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;
/// What the DMA address register reads as: the interface is there.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Bits of a DMA descriptor's control word.
mod control {
    pub(super) const ERROR: u32 = 1;
    pub(super) const READ: u32 = 2;
    pub(super) const SKIP: u32 = 4;
    pub(super) const SELECT: u32 = 8;
    pub(super) const WRITE: u32 = 16;
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct State {
    selected: u16,
    /// Next byte of the selected item, at most one past its end.
    offset: u32,
    /// High half of the DMA address, until the low half starts the transfer.
    dma_high: u32,
}

/// The device. Its items are part of the machine's description, not of its saved state.
pub struct FwCfg {
    items: BTreeMap<u16, Arc<[u8]>>,
    memory: Arc<GuestMemory>,
    state: Mutex<State>,
}

impl std::fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lengths: BTreeMap<u16, usize> = self.items.iter().map(|(key, item)| (*key, item.len())).collect();
        f.debug_struct("FwCfg").field("items", &lengths).field("state", &*lock(&self.state)).finish()
    }
}

impl FwCfg {
    /// A device that offers `items` and transfers to `memory`.
    pub fn new(items: FwCfgItems, memory: Arc<GuestMemory>) -> Arc<Self> {
        Arc::new(Self { items: items.build(), memory, state: Mutex::default() })
    }

    fn select(state: &mut State, key: u16) {
        state.selected = key;
        state.offset = 0;
    }

    /// The next `len` bytes of the selected item, or what there is of them; they count as read.
    fn advance(&self, state: &mut State, len: u32) -> &[u8] {
        let item = self.items.get(&state.selected).map_or(&[][..], |item| item);
        let rest = item.get(state.offset as usize..).unwrap_or_default();
        let part = rest.get(..len as usize).unwrap_or(rest);
        state.offset += part.len() as u32;
        part
    }

    /// Whether a transfer may touch a range: RAM, all of it. Firmware's ROM is not for a guest to change.
    fn is_ram(&self, address: GuestAddress, len: u32) -> bool {
        self.memory.ram().any(|ram| ram.contains(address, u64::from(len)))
    }

    /// Carries out the descriptor at `address` and writes back how it went.
    fn transfer(&self, state: &mut State, address: GuestAddress) {
        // A descriptor that is not in RAM has no place for an answer either.
        let mut descriptor = [0; 16];
        if !self.is_ram(address, 16) || self.memory.read_bytes(address, &mut descriptor).is_err() {
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, target @ ..] = descriptor;
        let command = u32::from_be_bytes([c0, c1, c2, c3]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        if command & control::SELECT != 0 {
            Self::select(state, (command >> 16) as u16);
        }
        let failed = if command & control::READ != 0 {
            let target = GuestAddress(u64::from_be_bytes(target));
            !self.is_ram(target, len) || self.read_to(state, target, len).is_err()
        } else if command & control::WRITE != 0 {
            true
        } else {
            if command & control::SKIP != 0 {
                self.advance(state, len);
            }
            false
        };
        let answer = if failed { control::ERROR } else { 0 };
        // It is in RAM, as was seen; nothing can refuse.
        let _ = self.memory.write_bytes(address, &answer.to_be_bytes());
    }

    /// Copies `len` bytes of the item to a range in RAM; past its end come zeros.
    fn read_to(&self, state: &mut State, target: GuestAddress, len: u32) -> Result<(), MemoryError> {
        let part = self.advance(state, len);
        let done = part.len() as u64;
        self.memory.write_bytes(target, part)?;
        self.memory.fill(GuestAddress(target.0 + done), 0, u64::from(len) - done)
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == DATA {
            let mut state = lock(&self.state);
            let part = self.advance(&mut state, data.len() as u32);
            data.fill(0);
            data.iter_mut().zip(part).for_each(|(byte, value)| *byte = *value);
        } else {
            read_bytes(offset, data, |offset| {
                let at = offset.checked_sub(DMA_HIGH).and_then(|at| usize::try_from(at).ok());
                at.and_then(|at| DMA_SIGNATURE.get(at)).copied().unwrap_or_default()
            });
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        match (offset, data) {
            (SELECTOR, &[low, high]) => Self::select(&mut state, u16::from_le_bytes([low, high])),
            (DMA_HIGH, &[a, b, c, d]) => state.dma_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                let high = std::mem::take(&mut state.dma_high);
                self.transfer(&mut state, GuestAddress(u64::from(high) << 32 | u64::from(low)));
            }
            _ => (),
        }
    }
}

impl crate::Device for FwCfg {
    fn placements(self: Arc<Self>) -> Vec<Placement> {
        vec![ports(NAME, FW_CFG_PORT, FW_CFG_PORT_COUNT, self)]
    }

    fn reset(&self) {
        *lock(&self.state) = State::default();
    }
}

impl Stateful for FwCfg {
    fn quiesce(&self) {}

    fn save(&self) -> SavedState {
        SavedState::pack(NAME, VERSION, &*lock(&self.state))
    }

    fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let mut new: State = saved.unpack(NAME, VERSION)?;
        let len = self.items.get(&new.selected).map_or(0, |item| item.len() as u32);
        new.offset = new.offset.min(len);
        *lock(&self.state) = new;
        Ok(())
    }
}
