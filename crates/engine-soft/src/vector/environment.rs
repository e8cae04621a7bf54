//! The x87 environment in memory: FNSTENV, FLDENV, FNSAVE, FRSTOR, FNINIT and FNSTSW (SDM 1 8.1.10).

use super::call::Image;
use super::state::{Pointers, VectorUnit};

/// The layout of an environment, which follows operand size and mode (SDM 1 figures 8-9 to 8-12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// 28 bytes rather than 14.
    pub wide: bool,
    /// Real or virtual-8086 mode: linear addresses instead of selectors and offsets.
    pub real: bool,
}

/// Bytes of the eight registers behind an environment.
const REGISTERS: usize = 80;

/// Bits of the x87 status word: error summary and busy.
const PENDING: u16 = 0x8080;

impl Layout {
    /// Bytes of the environment.
    pub fn size(self) -> usize {
        if self.wide { 28 } else { 14 }
    }

    /// Bytes of the environment and the registers.
    pub fn save_size(self) -> usize {
        self.size() + REGISTERS
    }
}

fn half(image: &Image, at: usize) -> u16 {
    u16::from_le_bytes([image.0[at], image.0[at + 1]])
}

fn set_half(image: &mut Image, at: usize, value: u16) {
    image.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn top(image: &Image) -> usize {
    usize::from(half(image, 2) >> 11 & 7)
}

/// The full tag word: two bits a physical register, worked out from the registers' contents (SDM 1 8.1.7).
fn tags(image: &Image) -> u16 {
    let top = top(image);
    (0..8).fold(0, |tags, physical| {
        let at = 32 + 16 * ((physical + 8 - top) & 7);
        let tag = if image.0[4] >> physical & 1 == 0 {
            3
        } else {
            let exponent = half(image, at + 8) & 0x7fff;
            let significand = &image.0[at..at + 8];
            match exponent {
                0 if significand.iter().all(|&byte| byte == 0) => 1,
                0 | 0x7fff => 2,
                _ if significand[7] & 0x80 == 0 => 2,
                _ => 0,
            }
        };
        tags | tag << (2 * physical)
    })
}

/// Sets the status word, whose TOP renames the registers: their contents stay where they are.
fn set_status(image: &mut Image, status: u16) {
    let turn = (usize::from(status >> 11 & 7) + 8 - top(image)) & 7;
    image.0[32..160].rotate_left(16 * turn);
    set_half(image, 2, status);
}

/// TOP becomes zero, every register valid.
pub(super) fn enter_mmx(image: &mut Image) {
    let status = half(image, 2) & !0x3800;
    set_status(image, status);
    image.0[4] = 0xff;
}

/// The control word's reserved bits, and ES and B, as the processor loads them: bit 6 of the control word is always
/// set, bits 7 and 13 to 15 never; ES and B follow from flags and masks.
pub(super) fn settle(image: &mut Image) {
    let (control, status) = (half(image, 0) & 0x1f3f | 0x40, half(image, 2));
    set_half(image, 0, control);
    let raised = status & !control & 0x3f != 0;
    set_half(image, 2, if raised { status | PENDING } else { status & !PENDING });
}

impl VectorUnit {
    /// FNINIT. Register contents stay.
    pub fn init_x87(&mut self) {
        self.pointers = Pointers::default();
        let image = self.image_mut();
        set_status(image, 0);
        set_half(image, 0, 0x37f);
        image.0[4] = 0;
    }

    /// FNSTENV: the environment, [`Layout::size`] bytes of it. All exceptions are masked afterwards; call
    /// [`VectorUnit::mask_x87`] once the memory is written.
    pub fn environment(&mut self, layout: Layout) -> [u8; 28] {
        let Pointers { fop, fip, fdp, fcs, fds } = self.pointers;
        let image = self.image();
        let (control, status, tags) = (half(image, 0), half(image, 2), tags(image));
        let mut bytes = [0; 28];
        if layout.wide {
            let word = |half: u16| 0xffff_0000 | u32::from(half);
            let (ip, code, dp, data) = if layout.real {
                let (ip, dp) = (linear(fcs, fip), linear(fds, fdp));
                (
                    0xffff_0000 | ip & 0xffff,
                    (ip >> 16) << 12 | u32::from(fop),
                    0xffff_0000 | dp & 0xffff,
                    (dp >> 16) << 12,
                )
            } else {
                (fip as u32, u32::from(fop) << 16 | u32::from(fcs), fdp as u32, word(fds))
            };
            let words = [word(control), word(status), word(tags), ip, code, dp, data];
            for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
                to.copy_from_slice(&word.to_le_bytes());
            }
        } else {
            let (ip, code, dp, data) = if layout.real {
                let (ip, dp) = (linear(fcs, fip), linear(fds, fdp));
                let high = |address: u32| (address >> 16 << 12) as u16;
                (ip as u16, high(ip) | fop, dp as u16, high(dp))
            } else {
                (fip as u16, fcs, fdp as u16, fds)
            };
            for (to, half) in bytes.chunks_exact_mut(2).zip([control, status, tags, ip, code, dp, data]) {
                to.copy_from_slice(&half.to_le_bytes());
            }
        }
        bytes
    }

    /// Masks every x87 exception, so none is pending.
    pub fn mask_x87(&mut self) {
        let image = self.image_mut();
        let control = half(image, 0) | 0x3f;
        set_half(image, 0, control);
        settle(image);
    }

    /// FLDENV: loads an environment of [`Layout::size`] bytes.
    pub fn load_environment(&mut self, bytes: &[u8; 28], layout: Layout) {
        let (mut fields, mut wide) = ([0u16; 7], [0u32; 7]);
        for (i, chunk) in bytes.chunks_exact(4).enumerate() {
            wide[i] = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        for (i, chunk) in bytes.chunks_exact(2).take(7).enumerate() {
            fields[i] = u16::from_le_bytes([chunk[0], chunk[1]]);
        }
        if layout.wide {
            for (field, wide) in fields.iter_mut().zip(wide).take(3) {
                *field = wide as u16;
            }
        }
        let [control, status, tags, ip, code, dp, data] = fields;
        self.pointers = match layout {
            Layout { wide: true, real: false } => Pointers {
                fop: (wide[4] >> 16) as u16 & 0x7ff,
                fip: wide[3].into(),
                fdp: wide[5].into(),
                fcs: wide[4] as u16,
                fds: wide[6] as u16,
            },
            Layout { wide: true, real: true } => Pointers {
                fop: wide[4] as u16 & 0x7ff,
                fip: (wide[3] & 0xffff | (wide[4] >> 12 & 0xffff) << 16).into(),
                fdp: (wide[5] & 0xffff | (wide[6] >> 12 & 0xffff) << 16).into(),
                fcs: 0,
                fds: 0,
            },
            Layout { wide: false, real: false } => {
                Pointers { fop: 0, fip: ip.into(), fdp: dp.into(), fcs: code, fds: data }
            }
            Layout { wide: false, real: true } => Pointers {
                fop: code & 0x7ff,
                fip: (u32::from(ip) | u32::from(code >> 12) << 16).into(),
                fdp: (u32::from(dp) | u32::from(data >> 12) << 16).into(),
                fcs: 0,
                fds: 0,
            },
        };
        let image = self.image_mut();
        set_status(image, status);
        set_half(image, 0, control);
        image.0[4] = (0..8).fold(0, |full, i| full | u8::from(tags >> (2 * i) & 3 != 3) << i);
        settle(image);
    }

    /// FNSAVE: the environment and the registers, [`Layout::save_size`] bytes. Call [`VectorUnit::init_x87`] once
    /// the memory is written.
    pub fn save_x87(&mut self, layout: Layout) -> [u8; 108] {
        let mut bytes = [0; 108];
        let size = layout.size();
        bytes[..28].copy_from_slice(&self.environment(layout));
        let image = self.image();
        for i in 0..8 {
            let (to, from) = (size + 10 * i, 32 + 16 * i);
            bytes[to..to + 10].copy_from_slice(&image.0[from..from + 10]);
        }
        bytes
    }

    /// FRSTOR: loads the environment and the registers.
    pub fn restore_x87(&mut self, bytes: &[u8; 108], layout: Layout) {
        let size = layout.size();
        let mut environment = [0; 28];
        environment[..size].copy_from_slice(&bytes[..size]);
        self.load_environment(&environment, layout);
        let image = self.image_mut();
        for i in 0..8 {
            let (from, to) = (size + 10 * i, 32 + 16 * i);
            image.0[to..to + 10].copy_from_slice(&bytes[from..from + 10]);
            image.0[to + 10..to + 16].fill(0);
        }
    }
}

/// The linear address that real mode keeps of a pointer.
fn linear(selector: u16, offset: u64) -> u32 {
    (u32::from(selector) << 4).wrapping_add(offset as u32)
}
