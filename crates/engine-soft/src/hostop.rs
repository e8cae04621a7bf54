//! Integer operations as the host computes them.
//!
//! Each function is one host instruction between loading the flags it starts from and saving those it leaves.
//! Registers only: no memory is touched, so all of it is safe to call. Where the manual leaves flags undefined
//! the guest sees what its own processor would have done.

use std::arch::asm;
use std::sync::LazyLock;

use ringfence_memory::Scalar;

use crate::status::Status;

/// Declares trait functions `name(self, args) -> (result, flags)`.
macro_rules! declare {
    ($($name:ident($($arg:ident: $type:ty),*)),* $(,)?) => {$(
        #[doc = concat!("The host's `", stringify!($name), "`: result and flags.")]
        fn $name(self, $($arg: $type),*) -> (Self, Status);
    )*};
}

/// Defines functions for one instruction template each. `$fresh` instructions write every flag; the others
/// start from the flags given, which a small addition (for OF) and SAHF put in place.
macro_rules! define {
    (fresh $class:ident $m:literal: $($name:ident)*) => {$(
        #[inline(always)]
        fn $name(self, b: Self) -> (Self, Status) {
            let mut a = self;
            let status: u16;
            // SAFETY: register operands only, all declared; neither memory nor stack is touched.
            unsafe {
                asm!(concat!(stringify!($name), " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                     a = inout($class) a, b = in($class) b, out("ax") status, options(nomem, nostack, pure));
            }
            (a, Status(status))
        }
    )*};
    (unary $class:ident $m:literal: $($name:ident)*) => {$(
        #[inline(always)]
        fn $name(self, status: Status) -> (Self, Status) {
            let (mut a, mut status) = (self, status.0);
            // SAFETY: register operands only, all declared; neither memory nor stack is touched.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!(stringify!($name), " {a", $m, "}"), "lahf", "seto al",
                     a = inout($class) a, inout("ax") status, options(nomem, nostack, pure));
            }
            (a, Status(status))
        }
    )*};
    (binary $class:ident $m:literal: $($name:ident)*) => {$(
        #[inline(always)]
        fn $name(self, b: Self, status: Status) -> (Self, Status) {
            let (mut a, mut status) = (self, status.0);
            // SAFETY: register operands only, all declared; neither memory nor stack is touched.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!(stringify!($name), " {a", $m, "}, {b", $m, "}"),
                     "lahf", "seto al",
                     a = inout($class) a, b = in($class) b, inout("ax") status, options(nomem, nostack, pure));
            }
            (a, Status(status))
        }
    )*};
    (shift $class:ident $m:literal: $($name:ident)*) => {$(
        #[inline(always)]
        fn $name(self, count: u8, status: Status) -> (Self, Status) {
            let (mut a, mut status) = (self, status.0);
            // SAFETY: register operands only, all declared; neither memory nor stack is touched.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!(stringify!($name), " {a", $m, "}, cl"), "lahf", "seto al",
                     a = inout($class) a, in("cl") count, inout("ax") status, options(nomem, nostack, pure));
            }
            (a, Status(status))
        }
    )*};
    (double_shift $class:ident $m:literal: $($name:ident)*) => {$(
        #[inline(always)]
        fn $name(self, b: Self, count: u8, status: Status) -> (Self, Status) {
            let (mut a, mut status) = (self, status.0);
            // SAFETY: register operands only, all declared; neither memory nor stack is touched.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!(stringify!($name), " {a", $m, "}, {b", $m, "}, cl"),
                     "lahf", "seto al",
                     a = inout($class) a, b = in($class) b, in("cl") count, inout("ax") status,
                     options(nomem, nostack, pure));
            }
            (a, Status(status))
        }
    )*};
}

/// Whether a rotation of a register by a constant other than one leaves OF, which is undefined then, as it was (Intel's processors), where
/// one by CL changes it. The functions here rotate by CL.
pub fn constant_rotations_keep_overflow() -> bool {
    static KEPT: LazyLock<bool> = LazyLock::new(|| {
        let kept: u8;
        // SAFETY: register operands only, all declared; neither memory nor stack is touched.
        unsafe {
            asm!("mov {a:e}, 0x7fffffff", "add {a:e}, 1", "mov {a:e}, 0", "rol {a:e}, 2", "seto {kept}",
                 a = out(reg) _, kept = out(reg_byte) kept, options(nomem, nostack, pure));
        }
        kept != 0
    });
    *KEPT
}

/// An operand of 8, 16, 32 or 64 bits.
pub trait Int: Scalar + Eq {
    /// Width in bits.
    const BITS: u32 = 8 * Self::SIZE as u32;

    declare!(
        add(b: Self), sub(b: Self), and(b: Self), or(b: Self), xor(b: Self),
        adc(b: Self, status: Status), sbb(b: Self, status: Status),
        inc(status: Status), dec(status: Status), neg(status: Status),
        shl(count: u8, status: Status), shr(count: u8, status: Status), sar(count: u8, status: Status),
        rol(count: u8, status: Status), ror(count: u8, status: Status),
        rcl(count: u8, status: Status), rcr(count: u8, status: Status),
    );

    /// Unsigned product: low half, high half, flags.
    fn mul_wide(self, b: Self, status: Status) -> (Self, Self, Status);
    /// Signed product: low half, high half, flags.
    fn imul_wide(self, b: Self, status: Status) -> (Self, Self, Status);
    /// Unsigned division of `high:self`: quotient, remainder, flags; `None` where the quotient does not fit.
    fn div_wide(self, high: Self, divisor: Self, status: Status) -> Option<(Self, Self, Status)>;
    /// Signed division of `high:self`: quotient, remainder, flags; `None` where the quotient does not fit.
    fn idiv_wide(self, high: Self, divisor: Self, status: Status) -> Option<(Self, Self, Status)>;
    /// Sign-extended to 64 bits.
    fn sign_extend(self) -> i64;
    /// Atomic compare-and-exchange on guest-visible memory: the value found.
    ///
    /// # Safety
    /// `at` must be valid for reads and writes of [`Scalar::SIZE`] bytes; it need not be aligned.
    unsafe fn compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self;
    /// Atomic exchange on guest-visible memory: the value found.
    ///
    /// # Safety
    /// As [`Int::compare_exchange`].
    unsafe fn exchange(at: *mut u8, new: Self) -> Self;
}

/// Operands of 16, 32 or 64 bits, which have more instructions.
pub trait WideInt: Int {
    declare!(
        imul(b: Self, status: Status),
        bsf(b: Self, status: Status), bsr(b: Self, status: Status), popcnt(b: Self, status: Status),
        tzcnt(b: Self, status: Status), lzcnt(b: Self, status: Status),
        bt(bit: Self, status: Status), bts(bit: Self, status: Status), btr(bit: Self, status: Status),
        btc(bit: Self, status: Status),
        shld(b: Self, count: u8, status: Status), shrd(b: Self, count: u8, status: Status),
    );
}

macro_rules! atomics {
    ($class:ident, $m:literal, $a:tt) => {
        #[inline(always)]
        unsafe fn compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self {
            let mut found = expected;
            // SAFETY: the caller vouches for `at`; the instruction touches nothing else in memory.
            unsafe { asm!(concat!("lock cmpxchg [{at}], {new", $m, "}"), at = in(reg) at, new = in($class) new,
                          inout($a) found, options(nostack)) };
            found
        }

        #[inline(always)]
        unsafe fn exchange(at: *mut u8, new: Self) -> Self {
            let mut value = new;
            // SAFETY: the caller vouches for `at`; the instruction touches nothing else in memory.
            unsafe { asm!(concat!("xchg [{at}], {value", $m, "}"), at = in(reg) at, value = inout($class) value,
                          options(nostack, preserves_flags)) };
            value
        }
    };
}

/// `insn b` on RAX (and RDX) from and to variables, between loading and saving flags.
macro_rules! on_accumulator {
    ($insn:literal, $m:literal, $a:literal, $class:ident, $low:expr, $high:expr, $b:expr, $status:expr) => {{
        let (mut low, mut high, mut status) = ($low, $high, $status.0);
        // SAFETY: register operands only, all declared; neither memory nor stack is touched, and divisions whose
        // quotient does not fit have been excluded.
        unsafe {
            asm!("add al, 0x7f", "sahf", concat!("mov ", $a, ", {low", $m, "}"), concat!($insn, " {b", $m, "}"),
                 concat!("mov {low", $m, "}, ", $a), "lahf", "seto al",
                 low = inout(reg) low, b = in($class) $b, inout("dx") high, inout("ax") status,
                 options(nomem, nostack, pure));
        }
        (low, high, Status(status))
    }};
}

macro_rules! wide_division {
    ($signed:ty, $double:ty, $signed_double:ty, $m:literal, $a:literal) => {
        #[inline(always)]
        fn mul_wide(self, b: Self, status: Status) -> (Self, Self, Status) {
            on_accumulator!("mul", $m, $a, reg, self, 0 as Self, b, status)
        }

        #[inline(always)]
        fn imul_wide(self, b: Self, status: Status) -> (Self, Self, Status) {
            on_accumulator!("imul", $m, $a, reg, self, 0 as Self, b, status)
        }

        #[inline(always)]
        fn div_wide(self, high: Self, divisor: Self, status: Status) -> Option<(Self, Self, Status)> {
            (high < divisor).then(|| on_accumulator!("div", $m, $a, reg, self, high, divisor, status))
        }

        #[inline(always)]
        fn idiv_wide(self, high: Self, divisor: Self, status: Status) -> Option<(Self, Self, Status)> {
            let dividend = ((<$double>::from(high) << Self::BITS) | <$double>::from(self)) as $signed_double;
            let quotient = dividend.checked_div(<$signed_double>::from(divisor as $signed))?;
            <$signed>::try_from(quotient).ok()?;
            Some(on_accumulator!("idiv", $m, $a, reg, self, high, divisor, status))
        }

        fn sign_extend(self) -> i64 {
            self as $signed as i64
        }
    };
}

macro_rules! implement_wide {
    ($type:ty, $signed:ty, $double:ty, $signed_double:ty, $m:literal, $a:tt) => {
        impl Int for $type {
            define!(fresh reg $m: add sub and or xor);
            define!(binary reg $m: adc sbb);
            define!(unary reg $m: inc dec neg);
            define!(shift reg $m: shl shr sar rol ror rcl rcr);
            wide_division!($signed, $double, $signed_double, $m, $a);
            atomics!(reg, $m, $a);
        }

        impl WideInt for $type {
            define!(binary reg $m: imul bsf bsr popcnt tzcnt lzcnt bt bts btr btc);
            define!(double_shift reg $m: shld shrd);
        }
    };
}

implement_wide!(u16, i16, u32, i32, ":x", "ax");
implement_wide!(u32, i32, u64, i64, ":e", "eax");
implement_wide!(u64, i64, u128, i128, ":r", "rax");

/// The byte forms of MUL and DIV keep both halves in AX.
macro_rules! byte_accumulator {
    ($insn:literal, $ax:expr, $b:expr, $status:expr) => {{
        let (mut ax, mut status): (u16, u16) = ($ax, $status.0);
        // SAFETY: as in `on_accumulator`.
        unsafe {
            asm!("add al, 0x7f", "sahf", "mov ax, {ax:x}", concat!($insn, " {b}"), "mov {ax:x}, ax", "lahf", "seto al",
                 ax = inout(reg) ax, b = in(reg_byte) $b, inout("ax") status, options(nomem, nostack, pure));
        }
        (ax as u8, (ax >> 8) as u8, Status(status))
    }};
}

impl Int for u8 {
    define!(fresh reg_byte "": add sub and or xor);
    define!(binary reg_byte "": adc sbb);
    define!(unary reg_byte "": inc dec neg);
    define!(shift reg_byte "": shl shr sar rol ror rcl rcr);
    atomics!(reg_byte, "", "al");

    fn mul_wide(self, b: Self, status: Status) -> (Self, Self, Status) {
        byte_accumulator!("mul", u16::from(self), b, status)
    }

    fn imul_wide(self, b: Self, status: Status) -> (Self, Self, Status) {
        byte_accumulator!("imul", u16::from(self), b, status)
    }

    fn div_wide(self, high: Self, divisor: Self, status: Status) -> Option<(Self, Self, Status)> {
        let ax = u16::from_le_bytes([self, high]);
        (high < divisor).then(|| byte_accumulator!("div", ax, divisor, status))
    }

    fn idiv_wide(self, high: Self, divisor: Self, status: Status) -> Option<(Self, Self, Status)> {
        let ax = u16::from_le_bytes([self, high]);
        let quotient = (ax as i16).checked_div(i16::from(divisor as i8))?;
        i8::try_from(quotient).ok()?;
        Some(byte_accumulator!("idiv", ax, divisor, status))
    }

    fn sign_extend(self) -> i64 {
        i64::from(self as i8)
    }
}

/// Atomic compare-and-exchange of 16 bytes on guest-visible memory (CMPXCHG16B): the value found.
///
/// # Safety
/// `at` must be valid for reads and writes of 16 bytes and aligned to 16.
pub unsafe fn compare_exchange_16(at: *mut u8, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: the caller vouches for `at`. RBX is reserved by the compiler, so it is exchanged and put back.
    unsafe {
        asm!("xchg rbx, {new}", "lock cmpxchg16b [{at}]", "mov rbx, {new}",
             at = in(reg) at, new = inout(reg) new as u64 => _, in("rcx") (new >> 64) as u64,
             inout("rax") low, inout("rdx") high, options(nostack));
    }
    (u128::from(high) << 64) | u128::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CF: Status = Status(1 << 8);

    #[test]
    fn addition_carries_and_overflows() {
        let (sum, status) = 0x7f_u8.add(1);
        assert!(sum == 0x80 && status.of() && status.sf() && !status.cf() && status.af());
        let (sum, status) = u64::MAX.add(1);
        assert!(sum == 0 && status.cf() && status.zf() && !status.of());
    }

    #[test]
    fn carry_goes_in_and_inc_keeps_it() {
        assert_eq!(1_u32.adc(2, CF).0, 4);
        assert_eq!(1_u32.sbb(0, CF).0, 0);
        let (value, status) = 0xffff_u16.inc(CF);
        assert!(value == 0 && status.cf() && status.zf());
    }

    #[test]
    fn shift_by_zero_keeps_every_flag() {
        for bits in 0..0x1000_u64 {
            let before = Status::from_rflags(bits);
            let (value, after) = 0x1234_u32.shl(0, before);
            assert!(value == 0x1234 && after.canonical() == before, "{before:?} {after:?}");
        }
    }

    #[test]
    fn division_that_does_not_fit_is_none() {
        assert_eq!(7_u64.div_wide(0, 2, CF).map(|r| (r.0, r.1)), Some((3, 1)));
        assert_eq!(0_u64.div_wide(2, 2, CF), None);
        assert_eq!(7_u8.div_wide(0, 0, CF), None);
        assert_eq!(0x80_u8.idiv_wide(0xff, 0xff, CF), None);
        assert_eq!(
            (-7_i32 as u32).idiv_wide(u32::MAX, 2, CF).map(|r| (r.0, r.1)),
            Some((-3_i32 as u32, -1_i32 as u32))
        );
        assert_eq!(0_u64.idiv_wide(1 << 63, u64::MAX, CF), None);
    }

    #[test]
    fn multiplication_gives_both_halves() {
        let (low, high, status) = u64::MAX.mul_wide(u64::MAX, Status::default());
        assert!(low == 1 && high == u64::MAX - 1 && status.cf() && status.of());
        let (low, high, _) = 0xff_u8.mul_wide(0xff, Status::default());
        assert_eq!((low, high), (0x01, 0xfe));
    }

    #[test]
    fn sixteen_byte_exchange_swaps_on_match_only() {
        #[repr(align(16))]
        struct Cell(u128);
        let mut cell = Cell(5 << 64 | 7);
        let at = (&raw mut cell.0).cast::<u8>();
        // SAFETY: `at` is an aligned local.
        let (miss, hit) =
            unsafe { (compare_exchange_16(at, 1, 2), compare_exchange_16(at, 5 << 64 | 7, 9 << 64 | 8)) };
        assert_eq!((miss, hit, cell.0), (5 << 64 | 7, 5 << 64 | 7, 9 << 64 | 8));
    }
}
