//! Maps by guest address.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use ringfence_memory::GuestAddress;

/// A map by guest address, with a quick hash.
pub(crate) type AddressMap<T> = HashMap<GuestAddress, T, BuildHasherDefault<AddressHasher>>;

/// A quick hash for addresses. A guest that makes them collide slows down nobody but itself.
#[derive(Debug, Default)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
