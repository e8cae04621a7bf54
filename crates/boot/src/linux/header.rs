//! The setup header of a bzImage (Linux, Documentation/arch/x86/boot.rst, "The real-mode kernel header").

use crate::BootError;
use crate::bytes::{printable, u16_at, u32_at, u64_at};

/// Offset of the magic number `HdrS`.
pub(super) const MAGIC: usize = 0x202;
/// Where the header starts, in the file and in the zero page.
pub(super) const START: usize = 0x1f1;
/// The last byte of the header that the zero page has room for, plus one: the EDD signatures follow.
const ROOM: usize = 0x290;

/// `loadflags`: the kernel has been placed at random, so it randomizes more.
pub(super) const KASLR_FLAG: u8 = 1 << 1;
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `xloadflags`: everything handed over may lie anywhere below 4 GiB and above.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;

/// What the header says.
#[derive(Clone, Debug)]
pub(super) struct SetupHeader<'a> {
    file: &'a [u8],
    pub(super) protocol: u16,
    /// Where the protected-mode part starts in the file.
    pub(super) code_offset: usize,
    pub(super) alignment: u64,
    pub(super) relocatable: bool,
    pub(super) preferred_address: u64,
    /// Memory that the kernel needs from its load address on until it knows the memory map.
    pub(super) init_size: u64,
    xloadflags: u16,
    pub(super) command_line_limit: usize,
    initrd_last: u64,
}

impl<'a> SetupHeader<'a> {
    /// Whether a file has the header.
    pub(super) fn is_present(file: &[u8]) -> bool {
        file.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
    }

    /// Reads the header and checks that the file is complete.
    ///
    /// # Errors
    /// [`BootError::Truncated`], [`BootError::OldProtocol`].
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, BootError> {
        let has = file.len() as u64;
        let cut = |part, needs| BootError::Truncated { part, needs, has };
        let setup_end = 0x268_u64;
        let header = || {
            let setup_sectors = match *file.get(START)? {
                0 => 4,
                n => usize::from(n),
            };
            let protocol = u16_at(file, 0x206)?;
            let since = |version: u16| protocol >= version;
            Some((
                Self {
                    file,
                    protocol,
                    code_offset: (setup_sectors + 1) * 512,
                    alignment: u64::from(u32_at(file, 0x230)?),
                    relocatable: since(0x205) && *file.get(0x234)? != 0,
                    preferred_address: if since(0x20a) { u64_at(file, 0x258)? } else { 0x10_0000 },
                    init_size: if since(0x20a) { u64::from(u32_at(file, 0x260)?) } else { 0 },
                    xloadflags: if since(0x20c) { u16_at(file, 0x236)? } else { 0 },
                    command_line_limit: if since(0x206) { u32_at(file, 0x238)? as usize } else { 255 },
                    initrd_last: if since(0x203) { u32_at(file, 0x22c)?.into() } else { 0x37ff_ffff },
                },
                *file.get(0x211)?,
            ))
        };
        let (header, loadflags) = header().ok_or_else(|| cut("setup header", setup_end))?;
        // 2.08 has the payload's place; every kernel that can be met has it.
        if header.protocol < 0x208 || loadflags & LOADED_HIGH == 0 {
            return Err(BootError::OldProtocol {
                version: header.protocol,
                needs: "2.08 (a bzImage with a payload field)",
            });
        }
        if has < header.code_offset as u64 {
            return Err(cut("setup sectors", header.code_offset as u64));
        }
        Ok(header)
    }

    /// The protected-mode part.
    pub(super) fn code(&self) -> &'a [u8] {
        self.file.get(self.code_offset..).unwrap_or_default()
    }

    /// The protected-mode part, checked to be complete (`syssize` counts 16-byte units).
    pub(super) fn whole_code(&self) -> Result<&'a [u8], BootError> {
        let size = u64::from(u32_at(self.file, 0x1f4).unwrap_or(0)) * 16;
        let code = self.code();
        let size_here = usize::try_from(size).unwrap_or(usize::MAX);
        code.get(..size_here).ok_or(BootError::Truncated {
            part: "protected-mode code",
            needs: size.saturating_add(self.code_offset as u64),
            has: self.file.len() as u64,
        })
    }

    /// The compressed kernel within the protected-mode part.
    pub(super) fn payload(&self) -> Result<&'a [u8], BootError> {
        let (offset, len) = (u32_at(self.file, 0x248).unwrap_or(0), u32_at(self.file, 0x24c).unwrap_or(0));
        if len == 0 {
            return Err(BootError::OldProtocol {
                version: self.protocol,
                needs: "2.08 (a bzImage with a payload field)",
            });
        }
        let end = u64::from(offset) + u64::from(len);
        let range = offset as usize..usize::try_from(end).unwrap_or(usize::MAX);
        self.code().get(range).ok_or(BootError::Truncated {
            part: "payload",
            needs: end + self.code_offset as u64,
            has: self.file.len() as u64,
        })
    }

    /// Whether the kernel has a 64-bit entry of its own.
    pub(super) fn has_64bit_entry(&self) -> bool {
        self.xloadflags & XLF_KERNEL_64 != 0
    }

    /// Whether it is a 32-bit kernel for certain: since protocol 2.12, 64-bit ones tell of their entry.
    pub(super) fn is_32bit(&self) -> bool {
        self.protocol >= 0x20c && !self.has_64bit_entry()
    }

    /// The highest end that the initrd may have, below 4 GiB.
    pub(super) fn initrd_limit(&self) -> u64 {
        if self.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 { 1 << 32 } else { self.initrd_last + 1 }
    }

    /// The version text, such as `6.1.0-13-amd64 (builder@host) #1 SMP`.
    pub(super) fn version(&self) -> Option<String> {
        let offset = usize::from(u16_at(self.file, 0x20e)?);
        let text = printable(self.file.get(offset + 0x200..)?, 200);
        (offset != 0 && !text.is_empty()).then_some(text)
    }

    /// The header's own bytes, to be copied into the zero page at [`START`].
    pub(super) fn bytes(&self) -> &'a [u8] {
        // The jump instruction in front of the magic number leads just past the header.
        let end = MAGIC + usize::from(self.file.get(0x201).copied().unwrap_or(0));
        self.file.get(START..end.clamp(0x250, ROOM)).unwrap_or_default()
    }
}
