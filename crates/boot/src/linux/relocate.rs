//! The kernel's relocations: what must change when it runs at another virtual address.
//!
//! Behind the ELF file in the payload there are lists of 32-bit words, each a kernel virtual address (the
//! lower half of it, to be sign-extended) of a place to adjust by the slide. In the order of the file, each list
//! beginning with a zero word: places with 64-bit addresses; in kernels before 6.15, places with 32-bit values relative to
//! per-CPU data, from which the slide is subtracted, as per-CPU data is linked at 0 and does not slide; places with
//! the low 32 bits of an address.

use ringfence_memory::{GuestAddress, GuestMemory, GuestRange, MemoryError};

use crate::BootError;

/// The virtual address at which the kernel maps physical address 0 (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The places to adjust.
#[derive(Debug, PartialEq)]
pub(super) struct Relocations {
    add64: Vec<i32>,
    subtract32: Vec<i32>,
    add32: Vec<i32>,
}

impl Relocations {
    /// Reads the lists out of what follows the ELF file.
    ///
    /// # Errors
    /// [`BootError::KaslrUnavailable`] if there are none, or the lists are none.
    pub(super) fn parse(tail: &[u8]) -> Result<Self, BootError> {
        // The words end with the payload, so an odd number of bytes is in front.
        let words: Vec<i32> = tail[tail.len() % 4..]
            .chunks_exact(4)
            .map(|w| i32::from_le_bytes([w[0], w[1], w[2], w[3]]))
            .collect();
        if words.is_empty() {
            return Err(BootError::KaslrUnavailable(
                "it has no relocations (built without CONFIG_RANDOMIZE_BASE)",
            ));
        }
        let lists: Vec<&[i32]> = words.split(|&w| w == 0).collect();
        match lists[..] {
            [[], add64, add32] => {
                Ok(Self { add64: add64.to_vec(), subtract32: Vec::new(), add32: add32.to_vec() })
            }
            [[], add64, subtract32, add32] => {
                Ok(Self { add64: add64.to_vec(), subtract32: subtract32.to_vec(), add32: add32.to_vec() })
            }
            _ => Err(BootError::KaslrUnavailable("its relocations are in an unknown format")),
        }
    }

    /// Adjusts every place. `linked` is the kernel's physical memory as linked, of which each place must be part;
    /// it lies `physical_slide` further on. Returns the number of places.
    ///
    /// # Errors
    /// [`BootError::BadRelocation`].
    pub(super) fn apply(
        &self,
        memory: &GuestMemory,
        linked: &GuestRange,
        physical_slide: u64,
        slide: u64,
    ) -> Result<usize, BootError> {
        let place = |word: i32, size: u64| {
            let at = (i64::from(word) as u64).wrapping_sub(KERNEL_MAP);
            let inside = linked.contains(GuestAddress(at), size);
            let bad = BootError::BadRelocation(i64::from(word) as u64);
            inside.then(|| GuestAddress(at.wrapping_add(physical_slide))).ok_or(bad)
        };
        let fail = BootError::memory("a relocation");
        let adjust32 = |at: GuestAddress, delta: u32| -> Result<(), MemoryError> {
            memory.write(at, memory.read::<u32>(at)?.wrapping_add(delta))
        };
        let low = slide as u32;
        for &word in &self.add32 {
            adjust32(place(word, 4)?, low).map_err(&fail)?;
        }
        for &word in &self.subtract32 {
            adjust32(place(word, 4)?, low.wrapping_neg()).map_err(&fail)?;
        }
        for &word in &self.add64 {
            let at = place(word, 8)?;
            let value = memory.read::<u64>(at).map_err(&fail)?;
            memory.write(at, value.wrapping_add(slide)).map_err(&fail)?;
        }
        Ok(self.add32.len() + self.subtract32.len() + self.add64.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    const LINKED: GuestRange = GuestRange::new(0x10_0000, 0x1000);

    #[test]
    fn three_lists_adjust_three_kinds_of_places() {
        let memory = GuestMemory::flat(4 << 20).unwrap();
        let at = |a: u64| GuestAddress(0x20_0000 + a);
        memory.write(at(0x10), 0xffff_ffff_8010_0000_u64).unwrap();
        memory.write(at(0x20), 0x8010_0000_u32).unwrap();
        memory.write(at(0x30), 0x100_u32).unwrap();
        let lists = tail(&[0, 0x8010_0010, 0, 0x8010_0030, 0, 0x8010_0020]);
        let relocations = Relocations::parse(&lists).unwrap();
        assert_eq!(relocations.apply(&memory, &LINKED, 0x10_0000, 0x40_0000).unwrap(), 3);
        assert_eq!(memory.read::<u64>(at(0x10)).unwrap(), 0xffff_ffff_8050_0000);
        assert_eq!(memory.read::<u32>(at(0x20)).unwrap(), 0x8050_0000);
        assert_eq!(memory.read::<u32>(at(0x30)).unwrap(), 0x100_u32.wrapping_sub(0x40_0000));
    }

    #[test]
    fn two_lists_have_no_inverse_places() {
        let relocations = Relocations::parse(&tail(&[0, 1, 2, 0, 3])).unwrap();
        assert_eq!(relocations, Relocations { add64: vec![1, 2], subtract32: vec![], add32: vec![3] });
        let empty = Relocations::parse(&tail(&[0, 1, 0, 0, 3])).unwrap();
        assert_eq!(empty, Relocations { add64: vec![1], subtract32: vec![], add32: vec![3] });
    }

    #[test]
    fn anything_else_is_refused() {
        for words in [&[][..], &[0], &[1, 0, 2], &[0, 1, 0, 2, 0, 3, 0, 4]] {
            assert!(
                matches!(Relocations::parse(&tail(words)), Err(BootError::KaslrUnavailable(_))),
                "{words:?}"
            );
        }
        let memory = GuestMemory::flat(4 << 20).unwrap();
        for word in [0x8010_1000, 0x8010_0ffd, 0x800f_ffff, 0x1000] {
            let relocations = Relocations::parse(&tail(&[0, 0, word])).unwrap();
            let error = relocations.apply(&memory, &LINKED, 0, 0x20_0000).unwrap_err();
            assert!(matches!(error, BootError::BadRelocation(_)), "{word:#x}: {error}");
        }
    }
}
