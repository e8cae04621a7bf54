//! What is executed, and from which state.

use crate::layout::{self, CODE_LEN, DATA_LEN, selector};

/// Most bytes of code in a case.
pub const CODE_MAX: usize = 32;
/// Most bytes in one patch.
pub const PATCH_MAX: usize = 64;
/// Most patches in a case.
pub const PATCHES: usize = 3;
/// How many backgrounds there are, see [`background()`](crate::background()).
pub const BACKGROUNDS: u8 = 8;

/// The mode code runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// 16-bit code of compatibility mode.
    Bits16,
    /// 32-bit code of compatibility mode.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 3] = [Mode::Bits16, Mode::Bits32, Mode::Bits64];

    /// 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        match self {
            Mode::Bits16 => 16,
            Mode::Bits32 => 32,
            Mode::Bits64 => 64,
        }
    }

    /// The code segment that a case of this mode starts in.
    pub const fn code_selector(self) -> u16 {
        match self {
            Mode::Bits16 => selector::CODE16,
            Mode::Bits32 => selector::CODE32,
            Mode::Bits64 => selector::SYSTEM_CODE64,
        }
    }
}

/// Vector, opmask and x87 registers.
#[derive(Clone, Debug, PartialEq)]
#[repr(C)]
pub struct Vectors {
    /// ZMM0 to ZMM31 as little-endian quadwords.
    pub zmm: [[u64; 8]; 32],
    /// Opmask registers.
    pub k: [u64; 8],
    /// ST(0) to ST(7) (or MM): significand, then sign and exponent in the low 16 bits.
    pub st: [[u64; 2]; 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// Abridged x87 tag word, one bit a physical register, set when it is not empty.
    pub ftw: u8,
    /// Keeps the structure free of padding.
    pub reserved: [u8; 7],
}

impl Default for Vectors {
    fn default() -> Self {
        Self {
            zmm: [[0; 8]; 32],
            k: [0; 8],
            st: [[0; 2]; 8],
            mxcsr: 0x1f80,
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            reserved: [0; 7],
        }
    }
}

/// Bytes laid over the background.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Patch {
    /// First byte, as an offset in the concatenated data pages.
    pub offset: u16,
    /// How many bytes of `bytes` are used; 0 for an unused patch.
    pub len: u16,
    /// The bytes.
    pub bytes: [u8; PATCH_MAX],
}

/// Code, and the state it starts from. Plain data, so that it can lie in memory shared with the child.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Case {
    /// General-purpose registers, in encoding order.
    pub gpr: [u64; 16],
    /// Flags. Only the status flags, TF, DF and AC count; IF is always set.
    pub rflags: u64,
    /// FS base, 64-bit mode only.
    pub fs_base: u64,
    /// GS base, 64-bit mode only.
    pub gs_base: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [u16; 6],
    /// Where the code starts, in the code pages.
    pub code_offset: u16,
    /// How many bytes of `code` are used.
    pub code_len: u8,
    /// Which background the data pages start as.
    pub background: u8,
    /// The code. What follows it in the code pages is INT3.
    pub code: [u8; CODE_MAX],
    /// Changes to the background.
    pub patches: [Patch; PATCHES],
    /// Vector, opmask and x87 registers.
    pub vectors: Vectors,
}

impl Case {
    /// A case with cleared registers, a stack in the second data page and flat segments (16-bit code: segments
    /// at the window).
    ///
    /// Code beyond [`CODE_MAX`] bytes is cut off.
    pub fn new(mode: Mode, code: &[u8]) -> Self {
        let data = match mode {
            Mode::Bits16 => selector::DATA16,
            Mode::Bits32 => selector::DATA32,
            Mode::Bits64 => 0,
        };
        let stack = if mode == Mode::Bits64 { selector::SYSTEM_DATA } else { data };
        let mut case = Self {
            gpr: [0; 16],
            rflags: 0x202,
            fs_base: 0,
            gs_base: 0,
            segments: [data, mode.code_selector(), stack, data, data, data],
            code_offset: 0x800,
            code_len: 0,
            background: 0,
            code: [0; CODE_MAX],
            patches: [Patch { offset: 0, len: 0, bytes: [0; PATCH_MAX] }; PATCHES],
            vectors: Vectors::default(),
        };
        case.set_code(code);
        case.gpr[4] = case.offset_of(layout::DATA[1].address + 0x800);
        case
    }

    /// Replaces the code.
    pub fn set_code(&mut self, code: &[u8]) {
        let len = code.len().min(CODE_MAX);
        self.code = [0; CODE_MAX];
        self.code[..len].copy_from_slice(&code[..len]);
        self.code_len = len as u8;
    }

    /// The mode, from the code segment.
    pub fn mode(&self) -> Mode {
        match self.segments[1] {
            selector::CODE16 => Mode::Bits16,
            selector::CODE32 | selector::SYSTEM_CODE32 => Mode::Bits32,
            _ => Mode::Bits64,
        }
    }

    /// Linear address of the first byte of code.
    pub fn code_address(&self) -> u64 {
        layout::CODE + u64::from(self.code_offset)
    }

    /// What linear address `address` is as an offset in the code segment and in the case's default data segment.
    pub fn offset_of(&self, address: u64) -> u64 {
        if self.mode() == Mode::Bits16 { address.wrapping_sub(layout::BASE) } else { address }
    }

    /// RIP at the start.
    pub fn rip(&self) -> u64 {
        self.offset_of(self.code_address())
    }

    /// The code that is used.
    pub fn code(&self) -> &[u8] {
        &self.code[..usize::from(self.code_len).min(CODE_MAX)]
    }

    /// Lays bytes over the background at `address`, in the first unused patch; what does not fit or is not data
    /// is left out.
    pub fn patch(&mut self, address: u64, bytes: &[u8]) {
        let Some(offset) = layout::data_offset(address) else { return };
        let len = bytes.len().min(PATCH_MAX).min(DATA_LEN - offset);
        if let Some(patch) = self.patches.iter_mut().find(|patch| patch.len == 0) {
            patch.bytes[..len].copy_from_slice(&bytes[..len]);
            (patch.offset, patch.len) = (offset as u16, len as u16);
        }
    }

    /// Fills `data` with what the data pages hold at the start.
    pub fn fill_data(&self, data: &mut [u8; DATA_LEN]) {
        data.copy_from_slice(crate::background::get(self.background));
        for patch in &self.patches {
            let (offset, len) = (usize::from(patch.offset), usize::from(patch.len).min(PATCH_MAX));
            if let Some(target) = data.get_mut(offset..offset + len) {
                target.copy_from_slice(&patch.bytes[..len]);
            }
        }
    }

    /// Fills `pages` with what the code pages hold.
    pub fn fill_code(&self, pages: &mut [u8; CODE_LEN]) {
        pages.fill(INT3);
        self.place_code(pages);
    }

    /// Writes the code alone into `pages`; bytes beyond their end are left out.
    pub(crate) fn place_code(&self, pages: &mut [u8; CODE_LEN]) {
        let start = usize::from(self.code_offset).min(CODE_LEN);
        let code = self.code();
        let len = code.len().min(CODE_LEN - start);
        pages[start..start + len].copy_from_slice(&code[..len]);
    }
}

/// What fills the code pages around the code.
pub(crate) const INT3: u8 = 0xcc;
