//! What MOV to control registers, INVLPG and INVPCID do to translations (SDM 3A 4.10.4.1).

use ringfence_x86::{Cr4, Exception};

use super::control::write;
use crate::interp::op::RIP;
use crate::interp::testing::{Lab, at};

/// `mov eax, [DATA]`.
fn load(lab: &mut Lab) -> Result<(), Exception> {
    lab.m.cpu.regs[RIP] = at::CODE;
    let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
    lab.step(&[0x8b, 0x04, 0x25, a, b, c, d])
}

/// Whether a load from DATA still finds its page, taken away in the tables long ago.
fn is_kept(lab: &mut Lab) -> bool {
    load(lab).is_ok()
}

/// The page-table entry of DATA.
const DATA_ENTRY: u64 = at::TABLES + 0x3000 + 8 * (at::DATA >> 12);
/// CR3 bit 63.
const KEEP: u64 = 1 << 63;

/// A lab whose DATA page is in the soft TLB and gone from the tables, with CR4.PCIDE and PGE.
fn with_stale_page(flags: u64) -> Lab {
    let mut lab = Lab::long();
    let cr4 = (lab.m.cpu.cr4 | Cr4::PCIDE | Cr4::PGE).bits();
    write(&mut lab, 4, cr4).unwrap();
    lab.put(DATA_ENTRY, at::DATA | 7 | flags);
    load(&mut lab).unwrap();
    lab.put(DATA_ENTRY, 0_u64);
    assert!(is_kept(&mut lab));
    lab
}

const GLOBAL: u64 = 1 << 8;

/// `invpcid rax, [rcx]`, with its descriptor on a page of its own.
fn invpcid(lab: &mut Lab, kind: u64, pcid: u64, linear: u64) {
    const DESCRIPTOR: u64 = at::DATA + 0x1000;
    (lab.m.cpu.regs[0], lab.m.cpu.regs[1], lab.m.cpu.regs[RIP]) = (kind, DESCRIPTOR, at::CODE);
    lab.put(DESCRIPTOR, pcid);
    lab.put(DESCRIPTOR + 8, linear);
    lab.step(&[0x66, 0x0f, 0x38, 0x82, 0x01]).unwrap();
}

#[test]
fn write_of_cr3_with_bit_63_keeps_both_address_spaces() {
    let mut lab = with_stale_page(0);
    write(&mut lab, 3, at::TABLES | 1 | KEEP).unwrap();
    assert!(!is_kept(&mut lab), "no page of another PCID is used");
    write(&mut lab, 3, at::TABLES | KEEP).unwrap();
    assert!(is_kept(&mut lab));
    write(&mut lab, 3, at::TABLES | 1 | KEEP).unwrap();
    write(&mut lab, 3, at::TABLES).unwrap();
    assert!(!is_kept(&mut lab), "without bit 63 the PCID's pages go");
}

#[test]
fn write_of_cr3_without_bit_63_spares_global_pages_only() {
    for (flags, kept) in [(0, false), (GLOBAL, true)] {
        let mut lab = with_stale_page(flags);
        write(&mut lab, 3, at::TABLES).unwrap();
        assert_eq!(is_kept(&mut lab), kept);
        let cr4 = lab.m.cpu.cr4.bits();
        write(&mut lab, 4, cr4 & !Cr4::PGE.bits()).unwrap();
        assert!(!is_kept(&mut lab), "a change of CR4.PGE drops global pages too");
    }
}

#[test]
fn invlpg_reaches_global_pages_of_other_address_spaces_and_no_others() {
    for (flags, kept) in [(0, true), (GLOBAL, false)] {
        let mut lab = with_stale_page(flags);
        write(&mut lab, 3, at::TABLES | 1 | KEEP).unwrap();
        // invlpg [DATA]
        let [a, b, c, d] = (at::DATA as u32).to_le_bytes();
        lab.m.cpu.regs[RIP] = at::CODE;
        lab.step(&[0x0f, 0x01, 0x3c, 0x25, a, b, c, d]).unwrap();
        write(&mut lab, 3, at::TABLES | KEEP).unwrap();
        assert_eq!(is_kept(&mut lab), kept);
    }
}

#[test]
fn invpcid_drops_what_its_type_says() {
    // Type, PCID, address; whether a page of PCID 0 and a global page may stay when PCID 0 is in use, and when it is not.
    // Types 0 and 1 need not reach global pages, and may.
    for (kind, pcid, linear, stays) in [
        (0, 0, at::DATA, false),
        (0, 0, at::DATA + 0x5000, true),
        (0, 2, at::DATA, true),
        (1, 0, 0, false),
        (1, 2, 0, true),
        (2, 0, 0, false),
        (3, 0, 0, false),
    ] {
        for elsewhere in [false, true] {
            let mut lab = with_stale_page(0);
            if elsewhere {
                write(&mut lab, 3, at::TABLES | 1 | KEEP).unwrap();
            }
            invpcid(&mut lab, kind, pcid, linear);
            write(&mut lab, 3, at::TABLES | KEEP).unwrap();
            assert_eq!(is_kept(&mut lab), stays, "type {kind}, PCID {pcid}, {linear:#x}, {elsewhere}");
        }
    }
    for (kind, stays) in [(2, false), (3, true)] {
        let mut lab = with_stale_page(GLOBAL);
        invpcid(&mut lab, kind, 0, 0);
        assert_eq!(is_kept(&mut lab), stays, "global page, type {kind}");
    }
}

#[test]
fn address_spaces_beyond_the_slots_are_forgotten_and_walked_again() {
    let mut lab = with_stale_page(0);
    for pcid in 1..20 {
        write(&mut lab, 3, at::TABLES | pcid | KEEP).unwrap();
        assert!(!is_kept(&mut lab));
    }
    write(&mut lab, 3, at::TABLES | KEEP).unwrap();
    assert!(!is_kept(&mut lab));
    lab.put(DATA_ENTRY, at::DATA | 7);
    assert!(is_kept(&mut lab), "a page that was not present needs no flush");
}
