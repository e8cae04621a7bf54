//! PVH and Multiboot kernels that load.

use ringfence_memory::GuestMemory;
use ringfence_x86::{Gpr, SegmentRegister, Selector};

use super::images::{ElfFile, LINKED, Part, bytes, machine, pvh_note, text};
use crate::bytes::{u32_at, u64_at};
use crate::{BootPlan, BootSpec, Initrd, KernelFormat, load};

const MIB: u64 = 1 << 20;

fn assert_protected_mode(plan: &BootPlan) {
    let cpu = &plan.cpu;
    assert_eq!((cpu.cr0, cpu.cr4, cpu.efer, cpu.rflags), (0x11, 0, 0, 2));
    let code = cpu.segments[SegmentRegister::Cs as usize];
    assert_eq!((code.selector, code.attributes, code.limit), (Selector(0x10), 0xc09b, u32::MAX));
    assert!(cpu.segments.iter().all(|s| s.base == 0 && s.limit == u32::MAX));
    assert_eq!((cpu.tr.limit, cpu.tr.attributes), (0x67, 0x8b));
}

fn pvh(bits: u8) -> Vec<u8> {
    let mut kernel = ElfFile::linux();
    kernel.bits = bits;
    kernel.machine = if bits == 64 { 62 } else { 3 };
    kernel.note = pvh_note(LINKED as u32 + 0x40);
    kernel.build()
}

#[test]
fn pvh_kernel_finds_its_start_information() {
    for bits in [32, 64] {
        let memory = machine(64 * MIB);
        let file = pvh(bits);
        let initrds = [Initrd { data: b"abcde", name: "x" }];
        let spec = BootSpec { command_line: "root=/dev/x", initrds: &initrds, ..BootSpec::new(&file) };
        let plan = load(&memory, &spec).unwrap();
        assert_eq!(
            (plan.format, plan.entry.0, plan.cpu.rip),
            (KernelFormat::Pvh, LINKED + 0x40, LINKED + 0x40)
        );
        assert_protected_mode(&plan);
        let info = bytes(&memory, plan.cpu.gpr[Gpr::Rbx as usize], 56);
        assert_eq!([0, 4, 8, 12].map(|at| u32_at(&info, at).unwrap()), [0x336e_c578, 1, 0, 1]);
        assert_eq!(text(&memory, u64_at(&info, 24).unwrap()), "root=/dev/x");
        assert_eq!(u64_at(&info, 32), Some(0xe_0000), "ACPI root pointer");
        let module = bytes(&memory, u64_at(&info, 16).unwrap(), 32);
        assert_eq!(u64_at(&module, 8), Some(8), "padded to 4 bytes");
        assert_eq!(bytes(&memory, u64_at(&module, 0).unwrap(), 8), b"abcde\0\0\0");
        let count = u32_at(&info, 48).unwrap() as usize;
        assert_eq!(count, plan.memory_map.len());
        let map = bytes(&memory, u64_at(&info, 40).unwrap(), count * 24);
        for (entry, raw) in plan.memory_map.iter().zip(map.chunks(24)) {
            assert_eq!(u64_at(raw, 0), Some(entry.range.start.0));
            assert_eq!((u64_at(raw, 8), u32_at(raw, 16)), (Some(entry.range.len), Some(entry.kind as u32)));
        }
        assert_eq!(bytes(&memory, LINKED + 0x20_0000, 0x124), [&[0x5a; 0x123][..], &[0]].concat());
    }
}

#[test]
fn pvh_kernel_without_initrd_has_no_module() {
    let memory = machine(64 * MIB);
    let plan = load(&memory, &BootSpec::new(&pvh(64))).unwrap();
    assert_eq!(u32_at(&bytes(&memory, plan.cpu.gpr[Gpr::Rbx as usize], 16), 12), Some(0));
}

/// A Multiboot header with these flags.
pub(super) fn header(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let mut header = Vec::new();
    let magic = 0x1bad_b002_u32;
    for word in [magic, flags, 0_u32.wrapping_sub(magic).wrapping_sub(flags)].into_iter().chain(addresses) {
        header.extend(word.to_le_bytes());
    }
    header
}

/// A flat kernel at 1 MiB whose header is 16 bytes into the loaded part, which starts 64 bytes into the file.
pub(super) fn flat(load_end: u32, bss_end: u32) -> Vec<u8> {
    let load_address = 0x10_0000;
    let mut file = vec![0x90; 64 + 16];
    file.extend(header(
        1 << 16 | 3,
        [load_address + 16, load_address, load_end, bss_end, load_address + 0x40],
    ));
    file.resize(64 + 0x400, 0xc3);
    file
}

fn check_information(memory: &GuestMemory, plan: &BootPlan) {
    assert_eq!(plan.format, KernelFormat::Multiboot);
    assert_protected_mode(plan);
    assert_eq!(plan.cpu.gpr[Gpr::Rax as usize], 0x2bad_b002);
    let info = bytes(memory, plan.cpu.gpr[Gpr::Rbx as usize], 116);
    let word = |at| u32_at(&info, at).unwrap();
    assert_eq!(word(0), 0b10_0100_1101);
    assert_eq!((word(4), word(8)), (639, 63 * 1024 - 8), "KiB below 640 KiB and above 1 MiB");
    assert_eq!(text(memory, word(16).into()), "one two");
    assert_eq!(text(memory, word(64).into()), "Ringfence");
    assert_eq!(word(20), 2, "modules");
    let modules = bytes(memory, word(24).into(), 32);
    for (raw, (data, name)) in modules.chunks(16).zip([(&b"first"[..], "mod1 arg"), (b"second", "mod2")]) {
        let (start, end) = (u32_at(raw, 0).unwrap(), u32_at(raw, 4).unwrap());
        assert_eq!(start % 0x1000, 0);
        assert_eq!(bytes(memory, start.into(), (end - start) as usize), data);
        assert_eq!(text(memory, u32_at(raw, 8).unwrap().into()), name);
        assert!(u64::from(start) >= plan.kernel.end());
    }
    let map = bytes(memory, word(48).into(), word(44) as usize);
    assert_eq!(map.len(), plan.memory_map.len() * 24);
    for (entry, raw) in plan.memory_map.iter().zip(map.chunks(24)) {
        assert_eq!((u32_at(raw, 0), u64_at(raw, 4)), (Some(20), Some(entry.range.start.0)));
        assert_eq!((u64_at(raw, 12), u32_at(raw, 20)), (Some(entry.range.len), Some(entry.kind as u32)));
    }
}

const MODULES: [Initrd<'static>; 2] =
    [Initrd { data: b"first", name: "mod1 arg" }, Initrd { data: b"second", name: "mod2" }];

#[test]
fn multiboot_kernel_loads_by_its_address_fields() {
    let memory = machine(64 * MIB);
    let file = flat(0x10_0300, 0x10_0800);
    let spec = BootSpec { command_line: "one two", initrds: &MODULES, ..BootSpec::new(&file) };
    let plan = load(&memory, &spec).unwrap();
    assert_eq!((plan.entry.0, plan.kernel.start.0, plan.kernel.len), (0x10_0040, 0x10_0000, 0x800));
    assert_eq!(bytes(&memory, 0x10_0000, 0x300), file[64..0x340]);
    assert_eq!(bytes(&memory, 0x10_0300, 0x501), [&[0; 0x500][..], &[0xdd]].concat());
    check_information(&memory, &plan);
}

#[test]
fn multiboot_kernel_without_ends_is_the_rest_of_the_file() {
    let memory = machine(64 * MIB);
    let file = flat(0, 0);
    let plan = load(&memory, &BootSpec::new(&file)).unwrap();
    assert_eq!(plan.kernel.len, 0x400);
    assert_eq!(bytes(&memory, 0x10_0000, 0x400), file[64..]);
}

#[test]
fn multiboot_kernel_loads_by_its_elf_headers() {
    for bits in [32, 64] {
        let memory = machine(64 * MIB);
        let mut code = header(3, [0; 5]);
        code.resize(0x200, 0x90);
        let physical = 0x20_0000;
        let kernel = ElfFile {
            bits,
            machine: if bits == 64 { 62 } else { 3 },
            entry: 0xc000_0010,
            parts: vec![Part { physical, virtual_address: 0xc000_0000, data: code.clone(), memory: 0x1000 }],
            note: Vec::new(),
        };
        let file = kernel.build();
        let spec = BootSpec { command_line: "one two", initrds: &MODULES, ..BootSpec::new(&file) };
        let plan = load(&memory, &spec).unwrap();
        assert_eq!(plan.entry.0, physical + 0x10, "the virtual entry is translated");
        assert_eq!(bytes(&memory, physical, 0x200), code);
        check_information(&memory, &plan);
    }
}

#[test]
fn structures_make_way_for_a_kernel_in_low_memory() {
    let memory = machine(64 * MIB);
    let mut file = vec![0x90; 16];
    file.extend(header(1 << 16, [0x1010, 0x1000, 0, 0, 0x1100]));
    file.resize(0x8000, 0xc3);
    let plan = load(&memory, &BootSpec::new(&file)).unwrap();
    assert_eq!(bytes(&memory, 0x1000, 0x8000), file);
    assert!(plan.cpu.gpr[Gpr::Rbx as usize] >= 0x9000);
}
