//! Which guest register lives where while translated code runs.
//!
//! | Host | Holds |
//! |---|---|
//! | `rax rcx rdx rbx rbp rsi rdi` | the guest's registers of the same names: instructions with implicit operands are copied as they are |
//! | `r12 r13` | the guest's registers of the same names |
//! | `r11` | the guest's `rsp` (5 to 7% of operands, and every push, pop, call and return) |
//! | `r14` | how many instructions may still be executed |
//! | `r15` | the address of `Cpu::regs`, from which all other state is addressed |
//! | `r8 r9` | scratch: an address and a row of the soft TLB, or guest registers on the way from and to memory |
//! | `r10` | the address of the soft TLB's table that loads and stores ask |
//! | `rsp` | the host's stack |
//!
//! The guest's `r8` to `r11`, `r14` and `r15`, 1 to 3% of operands each, stay in `Cpu::regs`.

use iced_x86::Register;

use super::asm::Reg;

/// The register that holds the address of `Cpu::regs`.
pub(super) const PIN: Reg = Reg(15);
/// Instructions that may still be executed; below zero where the unit just entered has more. It is worth a register of the guest's: as a
/// sum in memory, taken off by each unit, it was the longest chain of many programs.
pub(super) const BUDGET: Reg = Reg(14);
/// The guest's stack pointer.
pub(super) const STACK: Reg = Reg(11);
/// Addresses.
pub(super) const A: Reg = Reg(8);
/// Rows of the soft TLB; second scratch.
pub(super) const B: Reg = Reg(9);
/// The table of the soft TLB for loads and stores.
pub(super) const TABLE: Reg = Reg(10);
/// [`TABLE`] as a third scratch register: whoever uses it loads the table again ([`super::stubs::load_table`]).
pub(super) const C: Reg = TABLE;

/// Where a guest register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// In a host register.
    Host(Reg),
    /// In `Cpu::regs`.
    Slot,
}

/// Where guest register `number` is.
pub(super) const fn home(number: u8) -> Home {
    match number {
        4 => Home::Host(STACK),
        0..=7 | 12 | 13 => Home::Host(Reg(number)),
        _ => Home::Slot,
    }
}

/// The guest registers in host registers, with those.
pub(super) fn resident() -> impl Iterator<Item = (u8, Reg)> {
    (0..16).filter_map(|number| match home(number) {
        Home::Host(reg) => Some((number, reg)),
        Home::Slot => None,
    })
}

/// Host register `reg` in `size` bytes, in the decoder library's terms. Never AH to BH.
pub(super) fn sized(reg: Reg, size: usize) -> Register {
    let number = u32::from(reg.0);
    match size {
        1 if number < 4 => Register::AL + number,
        1 => Register::SPL + (number - 4),
        2 => Register::AX + number,
        4 => Register::EAX + number,
        _ => Register::RAX + number,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_guest_registers_share_a_home_and_scratch_is_free() {
        let hosts: Vec<_> = resident().map(|(_, r)| r).collect();
        for (i, reg) in hosts.iter().enumerate() {
            assert!(!hosts[..i].contains(reg));
            assert!(![A, B, C, PIN, BUDGET, super::super::asm::RSP].contains(reg));
        }
        assert_eq!(hosts.len(), 10);
    }

    #[test]
    fn sized_names_agree_with_the_decoder() {
        for number in 0..16 {
            for size in [1, 2, 4, 8] {
                let register = sized(Reg(number), size);
                assert_eq!((register.size(), register.full_register().number()), (size, usize::from(number)));
            }
        }
        assert_eq!(sized(Reg(6), 1), Register::SIL);
    }
}
