//! Access to memory that the guest can change at any moment.
//!
//! Such memory lies outside Rust's memory model: no reference to it may exist and racing accesses are normal.
//! Every function here is one host instruction in inline assembly, which the compiler treats as opaque, so the
//! host's own memory model applies: plain loads are acquires, plain stores are releases (SDM 3A 8.2), and an
//! aligned access of up to eight bytes is atomic.

use std::arch::asm;

mod sealed {
    pub trait Sealed {}
}

/// An integer that one host instruction can load or store.
pub trait Scalar: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// Size in bytes.
    const SIZE: usize;
    /// Loads from guest-visible memory.
    ///
    /// # Safety
    /// `at` must be valid for reads of [`Scalar::SIZE`] bytes; it need not be aligned.
    unsafe fn load(at: *const u8) -> Self;
    /// Stores to guest-visible memory.
    ///
    /// # Safety
    /// `at` must be valid for writes of [`Scalar::SIZE`] bytes; it need not be aligned.
    unsafe fn store(self, at: *mut u8);
    /// From the low bits of `value`.
    fn truncate(value: u64) -> Self;
    /// Zero-extended.
    fn widen(self) -> u64;
}

macro_rules! scalar {
    ($type:ty, $class:ident, $size:literal, $load:literal, $store:literal) => {
        impl sealed::Sealed for $type {}
        impl Scalar for $type {
            const SIZE: usize = $size;

            #[inline(always)]
            unsafe fn load(at: *const u8) -> Self {
                let value: $type;
                // SAFETY: the caller vouches for `at`; the instruction reads it and nothing else.
                unsafe { asm!($load, out($class) value, in(reg) at, options(nostack, preserves_flags, readonly)) };
                value
            }

            #[inline(always)]
            unsafe fn store(self, at: *mut u8) {
                // SAFETY: the caller vouches for `at`; the instruction writes it and nothing else.
                unsafe { asm!($store, in(reg) at, in($class) self, options(nostack, preserves_flags)) };
            }

            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $type
            }

            #[inline(always)]
            fn widen(self) -> u64 {
                u64::from(self)
            }
        }
    };
}

scalar!(u8, reg_byte, 1, "mov {}, byte ptr [{}]", "mov byte ptr [{}], {}");
scalar!(u16, reg, 2, "mov {:x}, word ptr [{}]", "mov word ptr [{}], {:x}");
scalar!(u32, reg, 4, "mov {:e}, dword ptr [{}]", "mov dword ptr [{}], {:e}");
scalar!(u64, reg, 8, "mov {}, qword ptr [{}]", "mov qword ptr [{}], {}");

/// Copies out of guest-visible memory.
///
/// # Safety
/// `from` must be valid for reads of `into.len()` bytes.
pub unsafe fn copy_from(from: *const u8, into: &mut [u8]) {
    // SAFETY: the caller vouches for `from`; `into` is exclusively ours. The direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") into.len() => _, inout("rsi") from => _, inout("rdi") into.as_mut_ptr() => _,
             options(nostack, preserves_flags));
    }
}

/// Copies into guest-visible memory.
///
/// # Safety
/// `into` must be valid for writes of `from.len()` bytes.
pub unsafe fn copy_to(from: &[u8], into: *mut u8) {
    // SAFETY: the caller vouches for `into`; `from` is only read. The direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") from.len() => _, inout("rsi") from.as_ptr() => _, inout("rdi") into => _,
             options(nostack, preserves_flags));
    }
}

/// Copies from guest-visible to guest-visible memory, upwards.
///
/// # Safety
/// `from` must be valid for reads and `into` for writes of `len` bytes.
pub unsafe fn copy_bytes(from: *const u8, into: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both. The direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") into => _,
             options(nostack, preserves_flags));
    }
}

/// Fills guest-visible memory with one byte.
///
/// # Safety
/// `into` must be valid for writes of `len` bytes.
pub unsafe fn fill(into: *mut u8, byte: u8, len: usize) {
    // SAFETY: the caller vouches for `into`. The direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") into => _, in("al") byte,
             options(nostack, preserves_flags));
    }
}

/// Fills guest-visible memory with `count` copies of a value, upwards.
///
/// # Safety
/// `into` must be valid for writes of `count` times [`Scalar::SIZE`] bytes.
#[inline]
pub unsafe fn fill_with<T: Scalar>(into: *mut u8, value: T, count: usize) {
    let value = value.widen();
    macro_rules! stos {
        ($instruction:literal) => {
            // SAFETY: the caller vouches for `into`. The direction flag is clear by the ABI.
            unsafe {
                asm!($instruction, inout("rcx") count => _, inout("rdi") into => _, in("rax") value,
                     options(nostack, preserves_flags));
            }
        };
    }
    match T::SIZE {
        1 => stos!("rep stosb"),
        2 => stos!("rep stosw"),
        4 => stos!("rep stosd"),
        _ => stos!("rep stosq"),
    }
}
