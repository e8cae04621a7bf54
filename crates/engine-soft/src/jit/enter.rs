//! The way from Rust into translated code.

use std::arch::asm;
use std::mem::offset_of;

use super::Jit;
use super::cache::Cache;
use crate::interp::cpu::Cpu;
use crate::landing;

/// Runs translated code from `cpu.translated.entry` and returns why it was left (see [`super::stubs::reason`]).
///
/// The caller has set up every field of `cpu.translated`; the entry is that of a region in the cache of `jit`.
pub(super) fn enter(cpu: &mut Cpu, jit: &mut Jit) -> u64 {
    show_code(&mut jit.cache);
    let address = jit.cache.host(jit.cache.stubs.enter);
    let landing = jit.cache.landing(&raw mut cpu.translated.raised_at);
    let jit: *mut Jit = jit;
    cpu.translated.translator = jit as u64;
    let cpu: *mut Cpu = cpu;
    // SAFETY: the arena holds only code made by `emit` and `stubs`, which follows the System V convention. It writes the
    // vCPU at fixed offsets, the stack, and guest memory where the soft TLB has an entry; it reads the table of jumps, which
    // leads to regions that exist. It calls functions of `helper` and `unmasked` only, with this vCPU, which nobody else borrows
    // meanwhile, and neither does anybody the translator.
    landing::with(landing, || unsafe {
        let function: extern "sysv64" fn(*mut u8) -> u64 = std::mem::transmute(address);
        function(cpu.cast::<u8>().add(offset_of!(Cpu, regs)))
    })
}

/// Has the processor see code that was written since it was last shown some.
pub(super) fn show_code(cache: &mut Cache) {
    if std::mem::take(&mut cache.written) {
        serialize();
    }
}

/// Makes the processor fetch anew. Code written through one linear address and run at another wants that (SDM 3A 8.1.3,
/// APM 2 7.6.1). IRET is the serialising instruction that a virtual machine need not intercept.
fn serialize() {
    // SAFETY: returns to the next instruction with the same segments, stack and flags.
    unsafe {
        asm!(
            "mov {old}, rsp",
            "mov {seg:e}, ss", "push {seg}", "push {old}", "pushfq", "mov {seg:e}, cs", "push {seg}",
            "lea {seg}, [rip + 2f]", "push {seg}", "iretq", "2:",
            old = out(reg) _, seg = out(reg) _,
        );
    }
}
