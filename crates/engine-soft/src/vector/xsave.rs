//! FXSAVE, FXRSTOR and the XSAVE family in the guest's formats (SDM 1 10.5 and 13; APM 2 11.5).
//!
//! These work on byte images; the caller accesses memory. What an instruction leaves alone in memory stays out of
//! [`Saved::parts`], so it is not written.

use std::ops::Range;

use ringfence_x86::Xcr0;
use ringfence_x86::cpuid::CpuidResult;

use super::call::Image;
use super::environment::settle;
use super::state::{MXCSR_DEFAULT, Pointers, VectorUnit, sign_extend};

/// Bytes of the largest image: all components, compacted or not, fit.
pub(super) const AREA: usize = 4096;
/// Bytes of the legacy region and the header.
pub(super) const HEADER_END: usize = 576;
const HEADER: usize = 512;
const XMM: usize = 160;
/// What components in their initial state have, all of them but x87.
static INITIAL: [u8; AREA] = [0; AREA];
/// XCOMP_BV: the image is compacted.
const COMPACTED: u64 = 1 << 63;

const X87: u64 = Xcr0::X87.bits();
const SSE: u64 = Xcr0::SSE.bits();
const AVX: u64 = Xcr0::AVX.bits();

/// A state component beyond the legacy region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Component {
    offset: usize,
    size: usize,
    aligned: bool,
}

/// Where the components of XCR0 lie, from CPUID leaf 0xD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XsaveLayout {
    supported: u64,
    components: [Component; 8],
}

/// Components that can be saved here: AVX, opmasks, ZMM_Hi256, Hi16_ZMM, with their sizes.
const KNOWN: [(usize, usize); 4] = [(2, 256), (5, 64), (6, 512), (7, 1024)];

impl XsaveLayout {
    /// What a CPUID table announces, as far as it is known here and fits.
    pub fn from_cpuid(cpuid: impl Fn(u32, u32) -> CpuidResult) -> Self {
        if cpuid(0, 0).eax < 0xd {
            return Self { supported: X87, components: Default::default() };
        }
        let announced = u64::from(cpuid(0xd, 0).eax);
        let mut layout = Self { supported: announced & (X87 | SSE), components: Default::default() };
        for (i, size) in KNOWN {
            let leaf = cpuid(0xd, i as u32);
            let offset = leaf.ebx as usize;
            if announced >> i & 1 != 0
                && leaf.eax as usize == size
                && (HEADER_END..=AREA - size).contains(&offset)
            {
                layout.supported |= 1 << i;
                layout.components[i] = Component { offset, size, aligned: leaf.ecx & 2 != 0 };
            }
        }
        layout
    }

    /// The bits of XCR0 that may be set.
    pub fn supported(&self) -> u64 {
        self.supported
    }

    /// Whether XSETBV accepts a value for XCR0 (SDM 1 13.3).
    pub fn accepts(&self, value: u64) -> bool {
        let xcr0 = Xcr0::from_bits_retain(value);
        let avx512 = xcr0 & Xcr0::AVX512;
        value & !self.supported == 0
            && xcr0.contains(Xcr0::X87)
            && (!xcr0.contains(Xcr0::AVX) || xcr0.contains(Xcr0::SSE))
            && (avx512.is_empty() || (avx512 == Xcr0::AVX512 && xcr0.contains(Xcr0::AVX)))
    }

    /// The size of a standard-format image of the components in `mask`, as CPUID leaf 0xD reports it.
    pub fn size(&self, mask: u64) -> usize {
        self.places(mask, None).map(|(_, place)| place.end).fold(HEADER_END, usize::max)
    }

    /// The size of a compacted image of the components in `mask`.
    pub fn compacted_size(&self, mask: u64) -> usize {
        self.places(mask, Some(mask)).map(|(_, place)| place.end).fold(HEADER_END, usize::max)
    }

    /// Number and place of each component in `mask` beyond the legacy region. `compacted`: XCOMP_BV of a
    /// compacted image.
    fn places(&self, mask: u64, compacted: Option<u64>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let mut next = HEADER_END;
        KNOWN.iter().filter_map(move |&(i, size)| {
            let component = self.components[i];
            let start = match compacted {
                Some(bits) if bits >> i & 1 != 0 => {
                    let start = if component.aligned { next.next_multiple_of(64) } else { next };
                    next = start + size;
                    start
                }
                Some(_) => return None,
                None => component.offset,
            };
            ((mask & self.supported) >> i & 1 != 0).then_some((i, start..start + size))
        })
    }
}

/// Which instruction saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Save {
    /// XSAVE.
    All,
    /// XSAVEOPT.
    Optimised,
    /// XSAVEC, XSAVES.
    Compacted,
}

/// How an instruction sees the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// REX.W: 64-bit pointers of the x87 unit.
    pub wide: bool,
    /// 64-bit mode: sixteen vector registers rather than eight (and 32 with AVX-512).
    pub long: bool,
}

/// An image to be written to memory.
#[derive(Clone)]
pub struct Saved {
    /// The image.
    pub bytes: Box<[u8; AREA]>,
    /// Which bytes of it are written, in ascending order.
    pub parts: Vec<Range<usize>>,
}

impl std::fmt::Debug for Saved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Saved").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl Default for Saved {
    fn default() -> Self {
        Self { bytes: Box::new([0; AREA]), parts: Vec::with_capacity(8) }
    }
}

impl Saved {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.room(at, bytes.len()).copy_from_slice(bytes);
    }

    fn put_words(&mut self, at: usize, words: &[u64]) {
        for (to, word) in self.room(at, 8 * words.len()).chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Bytes to be written.
    fn room(&mut self, at: usize, len: usize) -> &mut [u8] {
        match self.parts.last_mut() {
            Some(last) if last.end == at => last.end += len,
            _ => self.parts.push(at..at + len),
        }
        &mut self.bytes[at..at + len]
    }

    /// Bytes from the first to the last that are written.
    pub fn extent(&self) -> Range<usize> {
        let start = self.parts.iter().map(|part| part.start).min().unwrap_or(0);
        let end = self.parts.iter().map(|part| part.end).max().unwrap_or(0);
        start..end
    }
}

/// An image that cannot be loaded: #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the image's header or MXCSR has reserved bits set (#GP)")]
pub struct InvalidImage;

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn short(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl VectorUnit {
    /// FXSAVE. `vectors`: XMM registers are saved (not so under EFER.FFXSR).
    pub fn fxsave(&mut self, view: View, vectors: bool) -> Saved {
        let mut saved = self.blank();
        self.put_x87(&mut saved, view);
        self.put_mxcsr(&mut saved);
        self.put_registers(&mut saved);
        if vectors {
            self.put_xmm(&mut saved, view);
        }
        saved
    }

    /// FXRSTOR from 512 bytes.
    ///
    /// # Errors
    /// [`InvalidImage`] for a reserved bit in MXCSR; nothing is loaded then.
    pub fn fxrstor(&mut self, bytes: &[u8; 512], view: View, vectors: bool) -> Result<(), InvalidImage> {
        if !self.set_mxcsr(short(bytes, 24)) {
            return Err(InvalidImage);
        }
        self.take_x87(bytes, view);
        if vectors {
            self.take_xmm(bytes, view);
        }
        Ok(())
    }

    /// The components that are not in their initial state, as XGETBV(1) and the header show.
    pub fn in_use(&mut self) -> u64 {
        let clear = |words: &[u64]| words.iter().all(|&word| word == 0);
        let zmm = &self.registers.zmm;
        let mut used = 0;
        let mut mark = |bit: usize, is_clear: bool| used |= u64::from(!is_clear) << bit;
        mark(1, zmm[..16].iter().all(|r| clear(&r[..2])));
        mark(2, zmm[..16].iter().all(|r| clear(&r[2..4])));
        mark(5, clear(&self.registers.k));
        mark(6, zmm[..16].iter().all(|r| clear(&r[4..])));
        mark(7, zmm[16..].iter().all(|r| clear(r)));
        let pointers = self.pointers;
        let image = self.image();
        let initial = image.0[..5] == [0x7f, 3, 0, 0, 0]
            && image.0[32..160].iter().all(|&byte| byte == 0)
            && pointers == Pointers::default();
        used | u64::from(!initial)
    }

    /// XSAVE and its kin for the components in `mask` (already limited to XCR0). `old` is XSTATE_BV as it stands in
    /// memory; only XSAVE and XSAVEOPT keep bits of it.
    pub fn xsave(&mut self, layout: &XsaveLayout, save: Save, mask: u64, old: u64, view: View) -> Saved {
        let mut used = self.in_use();
        let compacted = save == Save::Compacted;
        if compacted && self.mxcsr() != MXCSR_DEFAULT {
            used |= SSE;
        }
        let written = if save == Save::All { mask } else { mask & used };
        let mut saved = self.blank();
        if written & X87 != 0 {
            self.put_x87(&mut saved, view);
        }
        if if compacted { written & SSE } else { mask & (SSE | AVX) } != 0 {
            self.put_mxcsr(&mut saved);
        }
        if written & X87 != 0 {
            self.put_registers(&mut saved);
        }
        if written & SSE != 0 {
            self.put_xmm(&mut saved, view);
        }
        if compacted {
            saved.put(HEADER, &(mask & used).to_le_bytes());
            saved.put(HEADER + 8, &(mask | COMPACTED).to_le_bytes());
        } else {
            saved.put(HEADER, &(old & !mask | used & mask).to_le_bytes());
        }
        let form = compacted.then_some(mask);
        for (component, place) in layout.places(written, form) {
            self.put_component(&mut saved, component, place.start, view);
        }
        saved
    }

    /// How many bytes XRSTOR needs, from the first [`HEADER_END`] of them.
    ///
    /// # Errors
    /// [`InvalidImage`] for a header that XRSTOR refuses. `compacted`: what the instruction accepts: `None` either
    /// format, `Some` only that one.
    pub fn xrstor_size(
        layout: &XsaveLayout,
        xcr0: u64,
        mask: u64,
        header: &[u8; HEADER_END],
        compacted: Option<bool>,
    ) -> Result<usize, InvalidImage> {
        let state = word(header, HEADER);
        let format = word(header, HEADER + 8);
        let is_compacted = format & COMPACTED != 0;
        if compacted.is_some_and(|wanted| wanted != is_compacted) {
            return Err(InvalidImage);
        }
        let zero = |range: Range<usize>| header[range].iter().all(|&byte| byte == 0);
        let valid = if is_compacted {
            let components = format & !COMPACTED;
            components & !xcr0 == 0 && state & !components == 0 && zero(HEADER + 16..HEADER + 64)
        } else {
            state & !xcr0 == 0 && zero(HEADER + 8..HEADER + 24)
        };
        if !valid {
            return Err(InvalidImage);
        }
        let form = is_compacted.then_some(format & !COMPACTED);
        Ok(layout.places(mask & state, form).map(|(_, place)| place.end).fold(HEADER_END, usize::max))
    }

    /// XRSTOR of the components in `mask` from an image of the size that [`VectorUnit::xrstor_size`] found.
    ///
    /// # Errors
    /// [`InvalidImage`] for reserved bits of MXCSR; nothing is loaded then.
    pub fn xrstor(
        &mut self,
        layout: &XsaveLayout,
        mask: u64,
        bytes: &[u8; AREA],
        view: View,
    ) -> Result<(), InvalidImage> {
        let state = word(bytes, HEADER);
        let format = word(bytes, HEADER + 8);
        let compacted = format & COMPACTED != 0;
        // In the standard format MXCSR belongs to AVX too and is loaded whatever XSTATE_BV says (SDM 1 13.8.1).
        let mxcsr = if compacted {
            (mask & SSE != 0).then(|| if state & SSE != 0 { short(bytes, 24) } else { MXCSR_DEFAULT })
        } else {
            (mask & (SSE | AVX) != 0).then(|| short(bytes, 24))
        };
        if let Some(mxcsr) = mxcsr
            && !self.set_mxcsr(mxcsr)
        {
            return Err(InvalidImage);
        }
        if mask & X87 != 0 {
            if state & X87 != 0 {
                self.take_x87(&bytes[..], view);
            } else {
                *self.image_mut() = Image::default();
                self.pointers = Pointers::default();
            }
        }
        if mask & SSE != 0 {
            self.take_xmm(if state & SSE != 0 { &bytes[..] } else { &INITIAL }, view);
        }
        let form = compacted.then_some(format & !COMPACTED);
        for (component, place) in layout.places(mask & state, form) {
            self.take_component(&bytes[place], component, view);
        }
        for (component, place) in layout.places(mask & !state, None) {
            self.take_component(&INITIAL[place], component, view);
        }
        Ok(())
    }

    /// Control, status, tags and pointers: bytes 0 to 23.
    fn put_x87(&mut self, saved: &mut Saved, view: View) {
        let quirks = self.quirks;
        let Pointers { fop, fip, fdp, fcs, fds } = self.pointers;
        let image = self.image();
        let mut bytes = [0; 24];
        bytes[..6].copy_from_slice(&image.0[..6]);
        let pending = image.0[2] & 0x80 != 0;
        if pending || quirks.saves_always {
            bytes[6..8].copy_from_slice(&fop.to_le_bytes());
            for (at, offset, selector) in [(8, fip, fcs), (16, fdp, fds)] {
                bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
                if !view.wide {
                    bytes[at + 4..at + 6].copy_from_slice(&selector.to_le_bytes());
                    bytes[at + 6..at + 8].fill(0);
                }
            }
        } else if !quirks.saves_zeroes {
            saved.put(0, &bytes[..6]);
            return;
        }
        saved.put(0, &bytes);
    }

    fn put_mxcsr(&self, saved: &mut Saved) {
        saved.put(24, &self.mxcsr().to_le_bytes());
        saved.put(28, &self.mxcsr_mask().to_le_bytes());
    }

    /// ST(0) to ST(7).
    fn put_registers(&mut self, saved: &mut Saved) {
        saved.put(32, &self.image().0[32..160]);
    }

    fn put_xmm(&self, saved: &mut Saved, view: View) {
        for (n, register) in self.registers.zmm[..view.vectors()].iter().enumerate() {
            saved.put_words(XMM + 16 * n, &register[..2]);
        }
    }

    fn take_x87(&mut self, bytes: &[u8], view: View) {
        let quirks = self.quirks;
        let offset = |at: usize, bits| {
            if view.wide { sign_extend(word(bytes, at), bits) } else { u64::from(short(bytes, at)) }
        };
        let selector = |at: usize| if view.wide { 0 } else { short(bytes, at) as u16 };
        let pointers = Pointers {
            fop: (short(bytes, 4) >> 16) as u16 & 0x7ff,
            fip: offset(8, quirks.instruction_pointer_bits),
            fcs: selector(12),
            fdp: offset(16, quirks.data_pointer_bits),
            fds: selector(20),
        };
        let mut image = Image::default();
        image.0[..5].copy_from_slice(&bytes[..5]);
        for i in 0..8 {
            let at = 32 + 16 * i;
            image.0[at..at + 10].copy_from_slice(&bytes[at..at + 10]);
        }
        settle(&mut image);
        let pending = image.0[2] & 0x80 != 0;
        if pending || quirks.restores_always {
            self.pointers = pointers;
        }
        *self.image_mut() = image;
    }

    fn take_xmm(&mut self, bytes: &[u8], view: View) {
        for (n, register) in self.registers.zmm[..view.vectors()].iter_mut().enumerate() {
            register[0] = word(bytes, XMM + 16 * n);
            register[1] = word(bytes, XMM + 16 * n + 8);
        }
    }

    fn put_component(&self, saved: &mut Saved, component: usize, at: usize, view: View) {
        let vectors = view.vectors();
        let mut put =
            |register: usize, size: usize, words: &[u64]| saved.put_words(at + size * register, words);
        let zmm = &self.registers.zmm;
        match component {
            2 => zmm[..vectors].iter().enumerate().for_each(|(n, r)| put(n, 16, &r[2..4])),
            5 => put(0, 64, &self.registers.k),
            6 => zmm[..vectors].iter().enumerate().for_each(|(n, r)| put(n, 32, &r[4..])),
            _ if view.long => zmm[16..].iter().enumerate().for_each(|(n, r)| put(n, 64, r)),
            _ => {}
        }
    }

    fn take_component(&mut self, bytes: &[u8], component: usize, view: View) {
        let vectors = view.vectors();
        let take = |register: usize, words: &mut [u64]| {
            let size = 8 * words.len();
            for (i, to) in words.iter_mut().enumerate() {
                *to = word(bytes, size * register + 8 * i);
            }
        };
        let zmm = &mut self.registers.zmm;
        match component {
            2 => zmm[..vectors].iter_mut().enumerate().for_each(|(n, r)| take(n, &mut r[2..4])),
            5 => take(0, &mut self.registers.k),
            6 => zmm[..vectors].iter_mut().enumerate().for_each(|(n, r)| take(n, &mut r[4..])),
            _ if view.long => zmm[16..].iter_mut().enumerate().for_each(|(n, r)| take(n, r)),
            _ => {}
        }
    }
}

impl View {
    fn vectors(self) -> usize {
        if self.long { 16 } else { 8 }
    }
}
