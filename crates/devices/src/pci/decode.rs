//! Which base addresses are decoded: the link between base address registers and the system bus.

use std::sync::{Arc, Mutex, OnceLock, Weak};

use ringfence_engine::{AddressSpace, BusDevice, Placement};
use ringfence_memory::{GuestAddress, GuestRange};

use super::PciError;
use crate::SystemBus;
use crate::device::lock;
use crate::platform::PCI_WINDOW;

/// A range of addresses that a base address register moves about.
struct Region {
    name: &'static str,
    size: u64,
    device: Arc<dyn BusDevice>,
    /// Where software wants it; `None` while decoding is off.
    wanted: Option<u64>,
    placed: bool,
}

#[derive(Default)]
struct State {
    regions: Vec<Region>,
    /// What has been given out of the window by [`Decoder::allocate`].
    used: u64,
}

/// Places the regions of all functions on the system bus as their registers say. One that collides with
/// something stays unplaced, as software that moves several of them one by one may want it, until the way is
/// free.
#[derive(Default)]
pub struct Decoder {
    system: OnceLock<Weak<SystemBus>>,
    state: Mutex<State>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = lock(&self.state);
        let regions = state.regions.iter().map(|r| (r.name, r.wanted, r.placed));
        f.debug_list().entries(regions).finish()
    }
}

/// Names a region of a [`Decoder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionId(usize);

impl Decoder {
    /// Connects the bus on which regions are placed. The first one counts.
    pub(super) fn connect(&self, system: &Arc<SystemBus>) {
        let _ = self.system.set(Arc::downgrade(system));
        self.place(&mut lock(&self.state));
    }

    /// Adds a region of `size` bytes (a power of two), not decoded.
    pub(super) fn add(&self, name: &'static str, size: u64, device: Arc<dyn BusDevice>) -> RegionId {
        let mut state = lock(&self.state);
        state.regions.push(Region { name, size, device, wanted: None, placed: false });
        RegionId(state.regions.len() - 1)
    }

    /// Gives out addresses for `size` bytes (a power of two) as firmware would.
    pub(super) fn allocate(&self, size: u64) -> Result<u64, PciError> {
        let mut state = lock(&self.state);
        let start = (PCI_WINDOW.start.0 + state.used).next_multiple_of(size);
        if !PCI_WINDOW.contains(GuestAddress(start), size) {
            return Err(PciError::NoRoom(size));
        }
        state.used = start + size - PCI_WINDOW.start.0;
        Ok(start)
    }

    /// Decodes a region at `wanted`, or nowhere.
    pub(super) fn set(&self, id: RegionId, wanted: Option<u64>) {
        let mut state = lock(&self.state);
        let Some(region) = state.regions.get_mut(id.0) else { return };
        let wanted = wanted.filter(|start| forwarded(*start, region.size));
        if region.wanted == wanted {
            return;
        }
        let old = std::mem::replace(&mut region.wanted, wanted);
        if std::mem::take(&mut region.placed)
            && let (Some(start), Some(system)) = (old, self.system())
        {
            // It was placed there, and nobody else takes it away.
            let _ = system.remove(AddressSpace::Memory, GuestAddress(start));
        }
        self.place(&mut state);
    }

    fn system(&self) -> Option<Arc<SystemBus>> {
        self.system.get().and_then(Weak::upgrade)
    }

    /// Places what is wanted and not placed, as far as there is room.
    fn place(&self, state: &mut State) {
        let Some(system) = self.system() else { return };
        for region in state.regions.iter_mut().filter(|r| !r.placed) {
            let Some(start) = region.wanted else { continue };
            let placement = Placement {
                name: region.name,
                space: AddressSpace::Memory,
                range: GuestRange::new(start, region.size),
                device: Arc::clone(&region.device),
            };
            region.placed = system.insert(placement).is_ok();
        }
    }
}

/// Whether the host bridge forwards accesses there: in its window, or anywhere above 4 GiB.
fn forwarded(start: u64, size: u64) -> bool {
    let above = start >= 1 << 32 && start.checked_add(size).is_some();
    PCI_WINDOW.contains(GuestAddress(start), size) || above
}
