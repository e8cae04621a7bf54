//! Where generated code and the host's own vector instructions are called.

use std::arch::asm;

use ringfence_x86::cpuid::CpuidResult;

use super::arena::Thunk;
use super::state::{Registers, Slots};

/// Runs a thunk on a register file and returns what it leaves in EAX (see [`super::encode`]).
pub(super) fn call(thunk: &Thunk, registers: &mut Registers, slots: &Slots) -> u32 {
    thunk.with_address(|address| {
        // SAFETY: only `encode` makes thunks. They follow the System V convention, write nothing but the
        // register file (at fixed offsets, and by register numbers in `slots`, which they mask), and leave MXCSR and the direction flag as Rust wants them. The x87 unit is not used by Rust code.
        unsafe {
            let function: extern "sysv64" fn(*mut Registers, *const Slots) -> u32 =
                std::mem::transmute(address.as_ptr());
            function(registers, slots)
        }
    })
}

/// Saves the host's x87 state to the image (64-bit form). The state stays in the host's registers.
pub(super) fn fxsave(image: &mut Image) {
    // SAFETY: 512 bytes, aligned to 16; FXSAVE does not report pending exceptions.
    unsafe { asm!("fxsave64 [{}]", in(reg) image.0.as_mut_ptr(), options(nostack, preserves_flags)) };
}

/// Loads the host's x87 registers from the image (64-bit form), XMM registers and MXCSR along with them.
pub(super) fn fxrstor(image: &Image) {
    // SAFETY: 512 bytes, aligned to 16; the vector registers are declared as clobbered; MXCSR in the image is
    // always the default (`Image::default`, `fxsave` in Rust code).
    unsafe {
        asm!(
            "fxrstor64 [{}]", in(reg) image.0.as_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, preserves_flags)
        );
    }
}

/// The host's x87 status word.
pub(super) fn fnstsw() -> u16 {
    let status: u16;
    // SAFETY: reads a register; does not report pending exceptions.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status
}

/// Resets the host's x87 unit, pending exceptions included.
pub(super) fn fninit() {
    // SAFETY: Rust code keeps nothing in the x87 unit.
    unsafe { asm!("fninit", options(nomem, nostack, preserves_flags)) };
}

/// Executes a load with the x87 unit reset and shows where the host records its addresses: the FNSTENV image
/// (28 bytes), the FXSAVE image, and the FNSTENV image after an FXRSTOR of instruction pointer 0x1234 without a
/// pending exception. The x87 unit is left reset.
pub(super) fn probe_pointers() -> ([u8; 28], Image, [u8; 28]) {
    let value = 1.5f64;
    let (mut environment, mut restored) = ([0u8; 28], [0u8; 28]);
    let mut image = Image::default();
    image.0[8..16].fill(0xff);
    // SAFETY: every buffer has the size its instruction writes; the x87 unit is reset before and after.
    unsafe {
        asm!(
            "fninit", "fld qword ptr [{value}]", "fxsave64 [{image}]", "fnstenv [{environment}]", "fninit",
            value = in(reg) &value, image = in(reg) image.0.as_mut_ptr(),
            environment = in(reg) environment.as_mut_ptr(), options(nostack, preserves_flags)
        );
    }
    let mut known = Image::default();
    known.0[8..16].copy_from_slice(&0x1234u64.to_le_bytes());
    fxrstor(&known);
    // SAFETY: as above.
    unsafe {
        asm!("fnstenv [{}]", "fninit", in(reg) restored.as_mut_ptr(), options(nostack, preserves_flags));
    }
    (environment, image, restored)
}

/// The host's CPUID.
pub(super) fn host_cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let result = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    CpuidResult { eax: result.eax, ebx: result.ebx, ecx: result.ecx, edx: result.edx }
}

/// The image of FXSAVE64 (SDM 1 10.5.1).
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Image(pub(super) [u8; 512]);

impl Default for Image {
    /// Every register zero and empty, the control words at their defaults.
    fn default() -> Self {
        let mut image = [0; 512];
        image[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        image[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        Self(image)
    }
}

/// Calls a test's frame with a state and an instruction followed by RET.
#[cfg(test)]
pub(super) fn call_native<State>(frame: &Thunk, slot: &Thunk, state: &mut State) {
    frame.with_address(|frame| {
        slot.with_address(|slot| {
            // SAFETY: the frame saves what the convention demands; the tests give it instructions that touch
            // registers and the tests' own buffer only.
            unsafe {
                let function: extern "sysv64" fn(*mut State, *const u8) = std::mem::transmute(frame.as_ptr());
                function(state, slot.as_ptr());
            }
        });
    });
}

/// As [`call_native`], with exceptions that are not masked: `true` if the instruction, of `length` bytes, has raised one, and it is left out then.
#[cfg(test)]
pub(super) fn call_trapping<State>(frame: &Thunk, slot: &Thunk, length: usize, state: &mut State) -> bool {
    use crate::landing::{self, Landing, Raised};
    let mut raised = Raised::default();
    let landing = slot.with_address(|address| {
        let start = address.as_ptr() as u64;
        let end = start + length as u64;
        Landing { code: start..end, to: end, note: &raw mut raised }
    });
    landing::with(landing, || call_native(frame, slot, state));
    raised.at != 0
}
