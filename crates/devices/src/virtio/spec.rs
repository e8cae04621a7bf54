//! Numbers of the specification (Virtual I/O Device 1.2).

/// Bits of the device status (2.1).
pub(super) mod status {
    pub(in crate::virtio) const ACKNOWLEDGE: u8 = 1;
    pub(in crate::virtio) const DRIVER: u8 = 2;
    pub(in crate::virtio) const DRIVER_OK: u8 = 4;
    pub(in crate::virtio) const FEATURES_OK: u8 = 8;
    pub(in crate::virtio) const NEEDS_RESET: u8 = 64;
    pub(in crate::virtio) const FAILED: u8 = 128;
    /// Those that a driver sets.
    pub(in crate::virtio) const OF_DRIVER: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// Feature bits that belong to queues and transport, not to a kind of device (6).
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT: u64 = 1 << 28;
    /// Each side says at which index it wants to be told next.
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// The driver follows version 1 of the specification. These devices speak to no other.
    pub const VERSION_1: u64 = 1 << 32;
    /// Single queues can be reset.
    pub const QUEUE_RESET: u64 = 1 << 40;
    /// All that the core adds to a device's own.
    pub(in crate::virtio) const CORE: u64 = INDIRECT | EVENT_INDEX | VERSION_1 | QUEUE_RESET;
}

/// Size and flags of a descriptor (2.7.5).
pub(super) mod descriptor {
    pub(in crate::virtio) const SIZE: u64 = 16;
    pub(in crate::virtio) const NEXT: u16 = 1;
    pub(in crate::virtio) const WRITE: u16 = 2;
    pub(in crate::virtio) const INDIRECT: u16 = 4;
}

/// The driver's ring asks for no interrupts (2.7.6).
pub(super) const NO_INTERRUPT: u16 = 1;

/// "No vector" in the MSI-X vector registers (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status (4.1.4.5).
pub(super) mod isr {
    pub(in crate::virtio) const QUEUE: u8 = 1;
    pub(in crate::virtio) const CONFIG: u8 = 2;
}

/// Offsets in the common configuration (4.1.4.3).
pub(super) mod common {
    pub(in crate::virtio) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(in crate::virtio) const DEVICE_FEATURE: u64 = 0x04;
    pub(in crate::virtio) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(in crate::virtio) const DRIVER_FEATURE: u64 = 0x0c;
    pub(in crate::virtio) const CONFIG_VECTOR: u64 = 0x10;
    pub(in crate::virtio) const NUM_QUEUES: u64 = 0x12;
    pub(in crate::virtio) const STATUS: u64 = 0x14;
    pub(in crate::virtio) const GENERATION: u64 = 0x15;
    pub(in crate::virtio) const QUEUE_SELECT: u64 = 0x16;
    pub(in crate::virtio) const QUEUE_SIZE: u64 = 0x18;
    pub(in crate::virtio) const QUEUE_VECTOR: u64 = 0x1a;
    pub(in crate::virtio) const QUEUE_ENABLE: u64 = 0x1c;
    pub(in crate::virtio) const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
    pub(in crate::virtio) const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub(in crate::virtio) const QUEUE_DRIVER: u64 = 0x28;
    pub(in crate::virtio) const QUEUE_DEVICE: u64 = 0x30;
    pub(in crate::virtio) const QUEUE_RESET: u64 = 0x3a;
    pub(in crate::virtio) const SIZE: usize = 0x40;
}
