//! Maps by guest address, and by other small keys.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use ringfence_memory::GuestAddress;

/// A map by guest address, with a quick hash.
pub(crate) type AddressMap<T> = HashMap<GuestAddress, T, BuildHasherDefault<QuickHasher>>;

/// A map by some small key, with the same hash.
pub(crate) type QuickMap<K, T> = HashMap<K, T, BuildHasherDefault<QuickHasher>>;

/// A quick hash for small keys. A guest that makes them collide slows down nobody but itself.
#[derive(Debug, Default)]
pub(crate) struct QuickHasher(u64);

impl Hasher for QuickHasher {
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_u16(&mut self, value: u16) {
        self.write_u64(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
