//! The standard's numbers that several parts use (NVM Express 1.4; sections given with each).

/// The only memory page size offered, in bytes.
pub(super) const PAGE: u64 = 4096;
/// Bytes of a submission queue entry.
pub(super) const COMMAND_SIZE: u64 = 64;
/// Bytes of a completion queue entry.
pub(super) const COMPLETION_SIZE: u64 = 16;
/// Most entries of an I/O queue.
pub(super) const MAX_ENTRIES: u32 = 256;
/// Most entries of an admin queue, whatever the controller is (3.1.8).
pub(super) const MAX_ADMIN_ENTRIES: u32 = 4096;
/// MDTS: the most that one command transfers, as a power of two of pages.
pub(super) const MAX_TRANSFER_SHIFT: u8 = 8;
/// The same in bytes: 1 MiB.
pub(super) const MAX_TRANSFER: u64 = PAGE << MAX_TRANSFER_SHIFT;
/// AERL: asynchronous event requests held at a time.
pub(super) const MAX_EVENT_REQUESTS: usize = 4;
/// Entries of the error log.
pub(super) const ERROR_ENTRIES: usize = 16;
/// The namespace identifier that means all of them.
pub(super) const ALL_NAMESPACES: u32 = u32::MAX;

/// Register offsets (3.1).
pub(super) mod register {
    pub(in crate::nvme) const CAP: u64 = 0x00;
    pub(in crate::nvme) const VS: u64 = 0x08;
    pub(in crate::nvme) const INTMS: u64 = 0x0c;
    pub(in crate::nvme) const INTMC: u64 = 0x10;
    pub(in crate::nvme) const CC: u64 = 0x14;
    pub(in crate::nvme) const CSTS: u64 = 0x1c;
    pub(in crate::nvme) const AQA: u64 = 0x24;
    pub(in crate::nvme) const ASQ: u64 = 0x28;
    pub(in crate::nvme) const ACQ: u64 = 0x30;
    pub(in crate::nvme) const DOORBELLS: u64 = 0x1000;
}

/// Controller status bits (3.1.6).
pub(super) mod csts {
    pub(in crate::nvme) const READY: u32 = 1;
    pub(in crate::nvme) const FATAL: u32 = 1 << 1;
    pub(in crate::nvme) const SHUTDOWN: u32 = 0b11 << 2;
    pub(in crate::nvme) const SHUTDOWN_OCCURRING: u32 = 0b01 << 2;
    pub(in crate::nvme) const SHUTDOWN_COMPLETE: u32 = 0b10 << 2;
}

/// Controller configuration bits (3.1.5).
pub(super) mod cc {
    pub(in crate::nvme) const ENABLE: u32 = 1;
    /// Command set, page size and arbitration: all zero is what there is.
    pub(in crate::nvme) const MODE: u32 = 0x3ff0;
    pub(in crate::nvme) const SHUTDOWN: u32 = 0b11 << 14;
    /// Entry sizes of I/O queues, as powers of two: 64 and 16 bytes.
    pub(in crate::nvme) const ENTRY_SIZES: u32 = 0xff << 16;
    pub(in crate::nvme) const ENTRY_SIZES_KNOWN: u32 = 0x46 << 16;
    pub(in crate::nvme) const ALL: u32 = ENABLE | MODE | SHUTDOWN | ENTRY_SIZES;
}

/// Admin command opcodes (5).
pub(super) mod admin {
    pub(in crate::nvme) const DELETE_SQ: u8 = 0x00;
    pub(in crate::nvme) const CREATE_SQ: u8 = 0x01;
    pub(in crate::nvme) const GET_LOG_PAGE: u8 = 0x02;
    pub(in crate::nvme) const DELETE_CQ: u8 = 0x04;
    pub(in crate::nvme) const CREATE_CQ: u8 = 0x05;
    pub(in crate::nvme) const IDENTIFY: u8 = 0x06;
    pub(in crate::nvme) const ABORT: u8 = 0x08;
    pub(in crate::nvme) const SET_FEATURES: u8 = 0x09;
    pub(in crate::nvme) const GET_FEATURES: u8 = 0x0a;
    pub(in crate::nvme) const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    pub(in crate::nvme) const ALL: [u8; 10] = [
        DELETE_SQ,
        CREATE_SQ,
        GET_LOG_PAGE,
        DELETE_CQ,
        CREATE_CQ,
        IDENTIFY,
        ABORT,
        SET_FEATURES,
        GET_FEATURES,
        ASYNC_EVENT_REQUEST,
    ];
}

/// I/O command opcodes (6).
pub(super) mod io {
    pub(in crate::nvme) const FLUSH: u8 = 0x00;
    pub(in crate::nvme) const WRITE: u8 = 0x01;
    pub(in crate::nvme) const READ: u8 = 0x02;
    pub(in crate::nvme) const WRITE_ZEROES: u8 = 0x08;
    pub(in crate::nvme) const DATASET_MANAGEMENT: u8 = 0x09;
    /// Opcodes, and whether they change what a namespace holds.
    pub(in crate::nvme) const ALL: [(u8, bool); 5] =
        [(FLUSH, false), (WRITE, true), (READ, false), (WRITE_ZEROES, true), (DATASET_MANAGEMENT, true)];
}

/// A command's status: code in bits 0 to 7, type in bits 8 to 10, "do not retry" in bit 14 (4.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status(pub(super) u16);

const DNR: u16 = 1 << 14;

impl Status {
    pub(super) const SUCCESS: Self = Self(0);
    pub(super) const INVALID_OPCODE: Self = Self(0x01 | DNR);
    pub(super) const INVALID_FIELD: Self = Self(0x02 | DNR);
    pub(super) const DATA_TRANSFER_ERROR: Self = Self(0x04 | DNR);
    pub(super) const ABORT_REQUESTED: Self = Self(0x07);
    pub(super) const INVALID_NAMESPACE: Self = Self(0x0b | DNR);
    pub(super) const SEQUENCE_ERROR: Self = Self(0x0c | DNR);
    pub(super) const INVALID_PRP_OFFSET: Self = Self(0x13 | DNR);
    pub(super) const WRITE_PROTECTED: Self = Self(0x20 | DNR);
    pub(super) const LBA_OUT_OF_RANGE: Self = Self(0x80 | DNR);
    pub(super) const CAPACITY_EXCEEDED: Self = Self(0x81 | DNR);
    pub(super) const CQ_INVALID: Self = Self(0x100 | DNR);
    pub(super) const INVALID_QUEUE_ID: Self = Self(0x101 | DNR);
    pub(super) const INVALID_QUEUE_SIZE: Self = Self(0x102 | DNR);
    pub(super) const TOO_MANY_EVENT_REQUESTS: Self = Self(0x105 | DNR);
    pub(super) const INVALID_VECTOR: Self = Self(0x108 | DNR);
    pub(super) const INVALID_LOG_PAGE: Self = Self(0x109 | DNR);
    pub(super) const INVALID_QUEUE_DELETION: Self = Self(0x10c | DNR);
    pub(super) const NOT_SAVEABLE: Self = Self(0x10d | DNR);
    pub(super) const WRITE_FAULT: Self = Self(0x280);
    pub(super) const READ_ERROR: Self = Self(0x281);
    pub(super) const FLUSH_FAULT: Self = Self(0x280 | DNR);

    pub(super) fn is_error(self) -> bool {
        self.0 != 0
    }
}
