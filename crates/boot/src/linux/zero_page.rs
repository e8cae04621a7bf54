//! The zero page, `struct boot_params` (Linux, Documentation/arch/x86/zero-page.rst).

use ringfence_memory::{GuestAddress, GuestMemory, GuestRange};

use super::header::{KASLR_FLAG, START};
use crate::layout::Layout;
use crate::{BootError, E820Entry};

/// Its size in bytes.
const SIZE: usize = 0x1000;
/// Entries that the memory map has room for.
const E820_MAX: usize = 128;

/// `SETUP_RNG_SEED`.
const RNG_SEED: u32 = 9;

/// What goes into the zero page besides the setup header.
pub(super) struct ZeroPage<'a> {
    /// The setup header's bytes.
    pub(super) header: &'a [u8],
    pub(super) command_line: &'a str,
    pub(super) command_line_limit: usize,
    pub(super) initrd: Option<GuestRange>,
    pub(super) memory_map: &'a [E820Entry],
    pub(super) rsdp: GuestAddress,
    pub(super) kaslr: bool,
    pub(super) rng_seed: Option<[u8; 32]>,
}

struct Page(Box<[u8; SIZE]>);

impl Page {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(to) = self.0.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }

    fn put32(&mut self, at: usize, value: u64) {
        self.put(at, &(value as u32).to_le_bytes());
    }
}

impl ZeroPage<'_> {
    /// Writes the zero page, the command line and the random seed; returns the zero page's address.
    ///
    /// # Errors
    /// [`BootError::CommandLineTooLong`], [`BootError::NoRoom`], [`BootError::Memory`].
    pub(super) fn write(&self, memory: &GuestMemory, layout: &mut Layout) -> Result<GuestAddress, BootError> {
        let mut page = Page(Box::new([0; SIZE]));
        page.put(START, self.header);
        // The loader has no identifier of its own.
        page.put(0x210, &[0xff]);
        let loadflags = page.0[0x211] & !KASLR_FLAG;
        page.put(0x211, &[if self.kaslr { loadflags | KASLR_FLAG } else { loadflags }]);
        page.put(0x70, &self.rsdp.0.to_le_bytes());

        let line = self.write_command_line(memory, layout)?;
        page.put32(0x228, line.0);
        page.put32(0xc8, line.0 >> 32);
        // Fields that a loader has to write are written even if there is nothing to say: the file's own are not trusted.
        let initrd = self.initrd.unwrap_or(GuestRange::new(0, 0));
        page.put32(0x218, initrd.start.0);
        page.put32(0xc0, initrd.start.0 >> 32);
        page.put32(0x21c, initrd.len);
        page.put32(0xc4, initrd.len >> 32);
        let entries = self.memory_map.iter().take(E820_MAX);
        page.put(0x1e8, &[entries.len() as u8]);
        for (index, entry) in entries.enumerate() {
            let at = 0x2d0 + index * 20;
            page.put(at, &entry.range.start.0.to_le_bytes());
            page.put(at + 8, &entry.range.len.to_le_bytes());
            page.put(at + 16, &(entry.kind as u32).to_le_bytes());
        }
        let setup_data = match &self.rng_seed {
            Some(seed) => write_seed(memory, layout, seed)?,
            None => GuestAddress(0),
        };
        page.put(0x250, &setup_data.0.to_le_bytes());
        let range = layout.claim_small(SIZE as u64, SIZE as u64, "the zero page")?;
        memory.write_bytes(range.start, &page.0[..]).map_err(BootError::memory("the zero page"))?;
        Ok(range.start)
    }

    fn write_command_line(
        &self,
        memory: &GuestMemory,
        layout: &mut Layout,
    ) -> Result<GuestAddress, BootError> {
        let (len, limit) = (self.command_line.len(), self.command_line_limit);
        if len > limit {
            return Err(BootError::CommandLineTooLong { len, limit });
        }
        let mut bytes = self.command_line.as_bytes().to_vec();
        bytes.push(0);
        let range = layout.claim_small(bytes.len() as u64, 16, "the command line")?;
        memory.write_bytes(range.start, &bytes).map_err(BootError::memory("the command line"))?;
        Ok(range.start)
    }
}

/// Writes a `struct setup_data` with a seed: no next one, type, length, contents.
fn write_seed(memory: &GuestMemory, layout: &mut Layout, seed: &[u8; 32]) -> Result<GuestAddress, BootError> {
    let mut data = vec![0; 8];
    data.extend(RNG_SEED.to_le_bytes());
    data.extend(32_u32.to_le_bytes());
    data.extend(seed);
    let range = layout.claim_small(data.len() as u64, 16, "the random seed")?;
    memory.write_bytes(range.start, &data).map_err(BootError::memory("the random seed"))?;
    Ok(range.start)
}
