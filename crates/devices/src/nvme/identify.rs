//! What the controller and its namespaces say of themselves (5.15.2).

use super::spec::{COMMAND_SIZE, COMPLETION_SIZE, ERROR_ENTRIES, MAX_EVENT_REQUESTS, MAX_TRANSFER_SHIFT};
use super::{IDENTITY, Namespace, NvmeConfig, VERSION};

pub(super) const SIZE: usize = 4096;

/// A data structure that is filled by offset; what lies past the end is left out.
pub(super) struct Table(Vec<u8>);

impl Table {
    pub(super) fn new(len: usize) -> Self {
        Self(vec![0; len])
    }

    pub(super) fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }

    /// ASCII text, padded with spaces to `len`.
    fn text(&mut self, offset: usize, len: usize, text: &str) {
        let clean = text.bytes().map(|b| if b.is_ascii_graphic() { b } else { b' ' });
        let bytes: Vec<u8> = clean.chain(std::iter::repeat(b' ')).take(len).collect();
        self.put(offset, &bytes);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A UUID as text, for the subsystem's name (7.9).
fn uuid_text(uuid: [u8; 16]) -> String {
    let mut text = String::new();
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The controller (5.15.2.2).
pub(super) fn controller(config: &NvmeConfig, namespaces: usize) -> Vec<u8> {
    let mut t = Table::new(SIZE);
    t.put(0, &IDENTITY.vendor.to_le_bytes());
    t.put(2, &IDENTITY.vendor.to_le_bytes());
    t.text(4, 20, &config.serial);
    t.text(24, 40, "Ringfence NVMe disk");
    t.text(64, 8, "1");
    t.put(77, &[MAX_TRANSFER_SHIFT]);
    t.put(80, &VERSION.to_le_bytes());
    // CNTRLTYPE: an I/O controller.
    t.put(111, &[1]);
    // ACL: as many Abort commands as there can be at a time (zero-based); AERL.
    t.put(258, &[3, MAX_EVENT_REQUESTS as u8 - 1]);
    // FRMW: one firmware slot, read-only. LPA: effects log, log offsets. ELPE.
    t.put(260, &[0b11, 0b110, ERROR_ENTRIES as u8 - 1]);
    // Warning and critical temperatures, in kelvins.
    t.put(266, &343_u16.to_le_bytes());
    t.put(268, &353_u16.to_le_bytes());
    let (sqe, cqe) = (COMMAND_SIZE.ilog2() as u8, COMPLETION_SIZE.ilog2() as u8);
    t.put(512, &[sqe << 4 | sqe, cqe << 4 | cqe]);
    t.put(516, &(namespaces as u32).to_le_bytes());
    // ONCS: dataset management, write zeroes.
    t.put(520, &0b1100_u16.to_le_bytes());
    // VWC: there is a write cache; a flush of all namespaces is understood.
    t.put(525, &[0b111]);
    t.put(768, format!("nqn.2014-08.org.nvmexpress:uuid:{}", uuid_text(config.uuid)).as_bytes());
    // The only power state: 0 W is "not reported".
    t.into_bytes()
}

/// A namespace (5.15.2.1): its only format is the one it has.
pub(super) fn namespace(namespace: &Namespace) -> Vec<u8> {
    let mut t = Table::new(SIZE);
    let blocks = namespace.blocks.to_le_bytes();
    t.put(0, &blocks);
    t.put(8, &blocks);
    t.put(16, &blocks);
    // NSFEAT: the optimal sizes below are given.
    t.put(24, &[1 << 4]);
    // DLFEAT: write zeroes can deallocate; what deallocated blocks read is not said.
    t.put(33, &[1 << 3]);
    // NPWG, NPWA, NPDG, NPDA in blocks, zero-based: a page of the host's file system.
    let page = ((4096 >> namespace.block_shift) - 1_u16).to_le_bytes();
    for offset in [64, 66, 68, 70] {
        t.put(offset, &page);
    }
    // NSATTR: write protected.
    t.put(99, &[u8::from(namespace.read_only)]);
    t.put(104, &namespace.uuid);
    // LBA format 0: no metadata, block size, best performance.
    t.put(128, &[0, 0, namespace.block_shift as u8, 0]);
    t.into_bytes()
}

/// The namespaces with identifiers above `after`, of `count` (5.15.2.3).
pub(super) fn active_list(after: u32, count: usize) -> Vec<u8> {
    let mut t = Table::new(SIZE);
    let ids = (1..=count as u32).filter(|id| *id > after);
    for (offset, id) in (0..SIZE).step_by(4).zip(ids) {
        t.put(offset, &id.to_le_bytes());
    }
    t.into_bytes()
}

/// Identifiers of a namespace: its UUID (5.15.2.4).
pub(super) fn descriptors(namespace: &Namespace) -> Vec<u8> {
    const UUID: u8 = 3;
    let mut t = Table::new(SIZE);
    t.put(0, &[UUID, 16]);
    t.put(4, &namespace.uuid);
    t.into_bytes()
}
