//! Log pages (5.14.1).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::features::{Features, TEMPERATURE};
use super::identify::Table;
use super::spec::{ERROR_ENTRIES, Status, admin, io};

/// Log identifiers.
pub(super) mod page {
    pub(in crate::nvme) const ERRORS: u8 = 1;
    pub(in crate::nvme) const HEALTH: u8 = 2;
    pub(in crate::nvme) const FIRMWARE: u8 = 3;
    pub(in crate::nvme) const EFFECTS: u8 = 5;
}

/// A command that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct ErrorEntry {
    count: u64,
    queue: u16,
    command: u16,
    status: u16,
    namespace: u32,
}

/// What the controller remembers of its life since it was switched on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Logs {
    /// The newest first.
    errors: VecDeque<ErrorEntry>,
    error_count: u64,
    media_errors: u64,
    /// Sectors of 512 bytes, and commands: read, then written.
    sectors: [u64; 2],
    commands: [u64; 2],
}

impl Logs {
    /// Remembers a failed command.
    pub(super) fn failed(&mut self, queue: u16, command: u16, status: Status, namespace: u32) {
        self.error_count = self.error_count.wrapping_add(1);
        self.media_errors = self.media_errors.wrapping_add(u64::from(status.0 >> 8 & 7 == 2));
        self.errors.truncate(ERROR_ENTRIES - 1);
        let status = status.0 << 1;
        self.errors.push_front(ErrorEntry { count: self.error_count, queue, command, status, namespace });
    }

    /// Counts a transfer.
    pub(super) fn transferred(&mut self, write: bool, bytes: u64) {
        if let (Some(sectors), Some(commands)) =
            (self.sectors.get_mut(usize::from(write)), self.commands.get_mut(usize::from(write)))
        {
            *sectors = sectors.wrapping_add(bytes / 512);
            *commands = commands.wrapping_add(1);
        }
    }

    /// A log page as it is now.
    pub(super) fn page(&self, id: u8, features: &Features) -> Option<Vec<u8>> {
        match id {
            page::ERRORS => Some(self.errors()),
            page::HEALTH => Some(self.health(features)),
            page::FIRMWARE => Some(firmware()),
            page::EFFECTS => Some(effects()),
            _ => None,
        }
    }

    fn errors(&self) -> Vec<u8> {
        let mut t = Table::new(ERROR_ENTRIES * 64);
        for (at, entry) in (0..).step_by(64).zip(&self.errors) {
            t.put(at, &entry.count.to_le_bytes());
            t.put(at + 8, &entry.queue.to_le_bytes());
            t.put(at + 10, &entry.command.to_le_bytes());
            t.put(at + 12, &entry.status.to_le_bytes());
            // Which byte of the command was wrong is not said.
            t.put(at + 14, &[0xff, 0xff]);
            t.put(at + 24, &entry.namespace.to_le_bytes());
        }
        t.into_bytes()
    }

    fn health(&self, features: &Features) -> Vec<u8> {
        let mut t = Table::new(512);
        t.put(0, &[features.critical_warning()]);
        t.put(1, &TEMPERATURE.to_le_bytes());
        // Available spare and its threshold, in percent; nothing is used up.
        t.put(3, &[100, 10, 0]);
        for (at, count) in [
            // Thousands of sectors, rounded up.
            (32, self.sectors[0].div_ceil(1000)),
            (48, self.sectors[1].div_ceil(1000)),
            (64, self.commands[0]),
            (80, self.commands[1]),
            // Power cycles.
            (112, 1),
            (160, self.media_errors),
            (176, self.error_count),
        ] {
            t.put(at, &count.to_le_bytes());
        }
        t.into_bytes()
    }
}

/// Slot 1 is active and holds revision "1".
fn firmware() -> Vec<u8> {
    let mut t = Table::new(512);
    t.put(0, &[1]);
    t.put(8, b"1       ");
    t.into_bytes()
}

/// Which commands there are and which change what a namespace holds (5.14.1.5).
fn effects() -> Vec<u8> {
    const SUPPORTED: u8 = 1;
    const CHANGES_DATA: u8 = 1 << 1;
    let mut t = Table::new(4096);
    for opcode in admin::ALL {
        t.put(usize::from(opcode) * 4, &[SUPPORTED]);
    }
    for (opcode, changes) in io::ALL {
        let effects = if changes { SUPPORTED | CHANGES_DATA } else { SUPPORTED };
        t.put(1024 + usize::from(opcode) * 4, &[effects]);
    }
    t.into_bytes()
}
