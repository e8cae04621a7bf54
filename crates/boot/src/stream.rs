//! Loads an ELF kernel that arrives in pieces.
//!
//! A decompressor's output goes straight into guest memory, piece by piece, so that an unpacked kernel never
//! exists as a whole on the host.

use ringfence_memory::{GuestAddress, GuestMemory};

use crate::BootError;
use crate::elf::{self, Elf, Segment};

/// The most that may follow the ELF file. Debian's kernels have about 1 MiB of relocations.
const MAX_TAIL: usize = 64 << 20;

/// Decides where a segment goes.
pub(crate) type Place<'a> = &'a dyn Fn(&Segment) -> Result<GuestAddress, BootError>;

/// The receiving end.
pub(crate) struct ElfLoader<'a> {
    memory: &'a GuestMemory,
    place: Place<'a>,
    /// Everything so far, until the headers are complete.
    head: Vec<u8>,
    elf: Option<(Elf, Vec<(Segment, GuestAddress)>)>,
    at: u64,
    /// What follows the ELF file: the kernel's relocations.
    tail: Vec<u8>,
}

impl<'a> ElfLoader<'a> {
    pub(crate) fn new(memory: &'a GuestMemory, place: Place<'a>) -> Self {
        Self { memory, place, head: Vec::new(), elf: None, at: 0, tail: Vec::new() }
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// If the ELF file is damaged, or is not to be placed.
    pub(crate) fn feed(&mut self, piece: &[u8]) -> Result<(), BootError> {
        if self.elf.is_some() {
            return self.store(piece);
        }
        self.head.extend_from_slice(piece);
        if elf::headers_len(&self.head)?.is_some_and(|len| len <= self.head.len()) {
            let head = std::mem::take(&mut self.head);
            self.begin(&head)?;
            self.store(&head)?;
        }
        Ok(())
    }

    fn begin(&mut self, head: &[u8]) -> Result<(), BootError> {
        let elf = Elf::parse(head)?;
        let mut placed = Vec::new();
        for segment in elf.loads() {
            let address = (self.place)(segment)?;
            let bss = GuestAddress(address.0.saturating_add(segment.file_size));
            self.memory
                .fill(bss, 0, segment.memory_size - segment.file_size)
                .map_err(BootError::memory("the kernel's cleared data"))?;
            placed.push((*segment, address));
        }
        self.elf = Some((elf, placed));
        Ok(())
    }

    fn store(&mut self, piece: &[u8]) -> Result<(), BootError> {
        let Some((elf, placed)) = &self.elf else { return Ok(()) };
        let end = self.at + piece.len() as u64;
        // The part of this piece that lies in a range of the file.
        let part = |from: u64, to: u64| {
            let (from, to) = (from.max(self.at), to.min(end));
            (from < to).then(|| &piece[(from - self.at) as usize..(to - self.at) as usize])
        };
        for (segment, address) in placed {
            if let Some(bytes) = part(segment.offset, segment.file_end()) {
                let offset = self.at.saturating_sub(segment.offset);
                let to = GuestAddress(address.0.saturating_add(offset));
                self.memory.write_bytes(to, bytes).map_err(BootError::memory("the kernel"))?;
            }
        }
        if let Some(bytes) = part(elf.end, u64::MAX) {
            if self.tail.len() + bytes.len() > MAX_TAIL {
                return Err(BootError::BadElf("what follows it is longer than any list of relocations"));
            }
            self.tail.extend_from_slice(bytes);
        }
        self.at = end;
        Ok(())
    }

    /// The headers and what follows the ELF file, once all pieces were fed.
    ///
    /// # Errors
    /// [`BootError::Truncated`] if a segment is not complete.
    pub(crate) fn finish(self) -> Result<(Elf, Vec<u8>), BootError> {
        let Some((elf, _)) = self.elf else {
            let needs = elf::headers_len(&self.head)?.unwrap_or(64) as u64;
            return Err(BootError::Truncated { part: "ELF headers", needs, has: self.head.len() as u64 });
        };
        if elf.loads_end() > self.at {
            return Err(BootError::Truncated { part: "ELF segments", needs: elf.loads_end(), has: self.at });
        }
        Ok((elf, self.tail))
    }
}

/// Loads a whole ELF file. Returns its headers.
///
/// # Errors
/// As [`ElfLoader`]'s functions.
pub(crate) fn load_elf(memory: &GuestMemory, file: &[u8], place: Place<'_>) -> Result<Elf, BootError> {
    let mut loader = ElfLoader::new(memory, place);
    loader.feed(file)?;
    Ok(loader.finish()?.0)
}
