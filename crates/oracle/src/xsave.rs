//! Vector state in the XSAVE area of a signal frame (standard format, SDM 1 13.4).

use std::arch::x86_64::__cpuid_count;

use crate::case::Vectors;

/// XSAVE state components that are set and recorded: x87, SSE, AVX, opmask, ZMM_Hi256, Hi16_ZMM.
const COMPONENTS: u64 = 0b1110_0111;

/// Where the components lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Areas {
    avx: usize,
    opmask: usize,
    zmm_hi256: usize,
    hi16_zmm: usize,
}

impl Areas {
    /// Asks CPUID leaf 0xD.
    pub(crate) fn detect() -> Self {
        let offset = |component| {
            if std::arch::is_x86_feature_detected!("xsave") {
                __cpuid_count(0xd, component).ebx as usize
            } else {
                0
            }
        };
        Self { avx: offset(2), opmask: offset(5), zmm_hi256: offset(6), hi16_zmm: offset(7) }
    }

    /// Puts `vectors` into a frame's area.
    ///
    /// # Safety
    /// `area` must be the area of a signal frame of this process with nothing else referring to it.
    pub(crate) unsafe fn load(&self, area: *mut u8, vectors: &Vectors) {
        let put = |offset: usize, value: u64| {
            // SAFETY: the kernel sized the area for every component that `present` reports, and the offsets are
            // CPUID's for those components.
            unsafe { area.add(offset).cast::<u64>().write_unaligned(value) }
        };
        // SAFETY: as this function's contract.
        let present = unsafe { present(area) };
        put(0, u64::from(vectors.fcw) | u64::from(vectors.fsw) << 16 | u64::from(vectors.ftw) << 32);
        put(8, 0);
        put(16, 0);
        // The upper half of this quadword is MXCSR_MASK, which stays.
        // SAFETY: within the legacy area.
        unsafe { area.add(24).cast::<u32>().write_unaligned(vectors.mxcsr) };
        for (i, st) in vectors.st.iter().enumerate() {
            put(32 + 16 * i, st[0]);
            put(40 + 16 * i, st[1] & 0xffff);
        }
        for (i, zmm) in vectors.zmm.iter().enumerate() {
            if i < 16 {
                put(160 + 16 * i, zmm[0]);
                put(168 + 16 * i, zmm[1]);
                if present & 1 << 2 != 0 {
                    put(self.avx + 16 * i, zmm[2]);
                    put(self.avx + 16 * i + 8, zmm[3]);
                }
                if present & 1 << 6 != 0 {
                    (0..4).for_each(|j| put(self.zmm_hi256 + 32 * i + 8 * j, zmm[4 + j]));
                }
            } else if present & 1 << 7 != 0 {
                (0..8).for_each(|j| put(self.hi16_zmm + 64 * (i - 16) + 8 * j, zmm[j]));
            }
        }
        if present & 1 << 5 != 0 {
            vectors.k.iter().enumerate().for_each(|(i, &k)| put(self.opmask + 8 * i, k));
        }
        if present & !3 != 0 {
            // XSTATE_BV: ours are all in use, the kernel's (protection keys) as they were.
            // SAFETY: a frame with extended state has the header at 512.
            let others = unsafe { area.add(512).cast::<u64>().read_unaligned() } & !COMPONENTS;
            put(512, others | present);
        }
    }

    /// Takes `vectors` out of a frame's area.
    ///
    /// # Safety
    /// `area` must be the area of a signal frame of this process.
    pub(crate) unsafe fn store(&self, area: *const u8, vectors: &mut Vectors) {
        // SAFETY: as this function's contract.
        let present = unsafe { present(area) };
        // SAFETY: as in `load`.
        let get = |offset: usize| unsafe { area.add(offset).cast::<u64>().read_unaligned() };
        // Components in their initial configuration need not have been written.
        let used = if present & !3 != 0 { get(512) & present } else { 3 };
        let field = |component: u32, offset: usize| if used & 1 << component != 0 { get(offset) } else { 0 };
        let control = if used & 1 != 0 { get(0) } else { 0x37f };
        vectors.fcw = control as u16;
        vectors.fsw = (control >> 16) as u16;
        vectors.ftw = (control >> 32) as u8;
        vectors.mxcsr = get(24) as u32;
        for (i, st) in vectors.st.iter_mut().enumerate() {
            *st = [field(0, 32 + 16 * i), field(0, 40 + 16 * i) & 0xffff];
        }
        for (i, zmm) in vectors.zmm.iter_mut().enumerate() {
            if i < 16 {
                zmm[0] = field(1, 160 + 16 * i);
                zmm[1] = field(1, 168 + 16 * i);
                zmm[2] = field(2, self.avx + 16 * i);
                zmm[3] = field(2, self.avx + 16 * i + 8);
                (0..4).for_each(|j| zmm[4 + j] = field(6, self.zmm_hi256 + 32 * i + 8 * j));
            } else {
                (0..8).for_each(|j| zmm[j] = field(7, self.hi16_zmm + 64 * (i - 16) + 8 * j));
            }
        }
        vectors.k.iter_mut().enumerate().for_each(|(i, k)| *k = field(5, self.opmask + 8 * i));
    }
}

/// Which components the frame has room for.
///
/// # Safety
/// `area` must be the area of a signal frame of this process.
unsafe fn present(area: *const u8) -> u64 {
    const MAGIC: u32 = 0x4650_5853;
    // SAFETY: Linux describes the frame in the software-reserved bytes of the legacy area (`struct _fpx_sw_bytes`):
    // a magic number at 464, the components at 472. An area is at least the legacy 512 bytes.
    unsafe {
        if area.add(464).cast::<u32>().read_unaligned() == MAGIC {
            area.add(472).cast::<u64>().read_unaligned() & COMPONENTS
        } else {
            3
        }
    }
}
