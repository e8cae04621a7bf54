//! Feature bits (5.1.3).

pub(super) const CSUM: u64 = 1 << 0;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const MERGEABLE: u64 = 1 << 15;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CONTROL: u64 = 1 << 17;
pub(super) const MULTIQUEUE: u64 = 1 << 22;
pub(super) const ALL: u64 =
    CSUM | GUEST_CSUM | MTU | MAC | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MERGEABLE | STATUS;
