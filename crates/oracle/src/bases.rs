//! The FS and GS bases, without the C library: its wrappers touch thread-local storage, which FS points at.

use std::arch::asm;

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;

/// The FS base.
///
/// # Safety
/// `fsgsbase` only if the kernel has enabled the instructions.
pub(crate) unsafe fn fs_base(fsgsbase: bool) -> u64 {
    let mut base: u64 = 0;
    // SAFETY: the caller says whether the kernel has enabled the instruction; the call writes to `base` only.
    unsafe {
        if fsgsbase {
            asm!("rdfsbase {}", out(reg) base, options(nomem, nostack, preserves_flags));
        } else {
            system_call(libc::SYS_arch_prctl, ARCH_GET_FS, &raw mut base as u64);
        }
    }
    base
}

/// The GS base.
///
/// # Safety
/// As [`fs_base`].
pub(crate) unsafe fn gs_base(fsgsbase: bool) -> u64 {
    let mut base: u64 = 0;
    // SAFETY: as in `fs_base`.
    unsafe {
        if fsgsbase {
            asm!("rdgsbase {}", out(reg) base, options(nomem, nostack, preserves_flags));
        } else {
            system_call(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut base as u64);
        }
    }
    base
}

/// Sets the FS base.
///
/// # Safety
/// As [`fs_base`]; and nothing uses FS (thread-local storage) until it has its old value back.
pub(crate) unsafe fn set_fs_base(fsgsbase: bool, base: u64) {
    // SAFETY: the caller knows that nothing uses FS, or gives back the base that it had.
    unsafe {
        if fsgsbase {
            asm!("wrfsbase {}", in(reg) base, options(nostack, preserves_flags));
        } else {
            system_call(libc::SYS_arch_prctl, ARCH_SET_FS, base);
        }
    }
}

/// Sets the GS base.
///
/// # Safety
/// As [`fs_base`].
pub(crate) unsafe fn set_gs_base(fsgsbase: bool, base: u64) {
    // SAFETY: as in `set_fs_base`.
    unsafe {
        if fsgsbase {
            asm!("wrgsbase {}", in(reg) base, options(nostack, preserves_flags));
        } else {
            system_call(libc::SYS_arch_prctl, ARCH_SET_GS, base);
        }
    }
}

/// A system call of two arguments that leaves `errno`, which is thread-local, alone.
///
/// # Safety
/// As the call.
pub(crate) unsafe fn system_call(number: i64, first: u64, second: u64) -> i64 {
    let result;
    // SAFETY: the caller vouches for the call; no `errno`, which would be thread-local.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") first, in("rsi") second,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}
