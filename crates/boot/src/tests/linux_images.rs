//! bzImages and vmlinux files that load.

use ringfence_memory::GuestAddress;
use ringfence_x86::{Gpr, Segment, SegmentRegister, Selector};

use super::images::{
    CODE_OFFSET, ElfFile, INIT_SIZE, LINKED, PLACES, VIRTUAL, bytes, compress, linux, linux_with_relocations,
    machine, patch, text,
};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::{BootSpec, Compression, E820Kind, Initrd, Kaslr, KaslrOutcome, KernelFormat, Protocol, load};

const MIB: u64 = 1 << 20;

/// The zero page that RSI points to.
fn zero_page(memory: &ringfence_memory::GuestMemory, plan: &crate::BootPlan) -> Vec<u8> {
    bytes(memory, plan.cpu.gpr[Gpr::Rsi as usize], 4096)
}

#[test]
fn every_compression_gives_the_same_kernel() {
    let kernel = ElfFile::linux();
    let formats =
        [Compression::None, Compression::Gzip, Compression::Xz, Compression::Lz4, Compression::Zstd];
    for format in formats {
        let memory = machine(64 * MIB);
        let file = super::images::bzimage(&compress(&kernel.build(), format));
        let plan = load(&memory, &BootSpec::new(&file)).unwrap();
        assert_eq!(plan.format, KernelFormat::BzImage(format));
        assert_eq!(plan.entry.0, LINKED + 0x10);
        assert_eq!(plan.kaslr, KaslrOutcome::Off);
        for part in &kernel.parts {
            let mut expected = part.data.clone();
            expected.resize(part.memory as usize, 0);
            assert_eq!(bytes(&memory, part.physical, expected.len()), expected, "{format}");
        }
        // Between the segments nothing was touched.
        assert_eq!(bytes(&memory, LINKED + 0x3000, 1), [0xdd]);
    }
}

#[test]
fn payload_of_several_blocks_is_joined() {
    let mut kernel = ElfFile::linux();
    kernel.parts[1].data = (0..20 * MIB).map(|i| ((i * i) >> 7) as u8).collect();
    kernel.parts[1].memory = 20 * MIB;
    for format in [Compression::Lz4, Compression::Gzip] {
        let memory = machine(64 * MIB);
        let mut file = super::images::bzimage(&compress(&kernel.build(), format));
        patch(&mut file, 0x260, &(32 * MIB as u32).to_le_bytes());
        load(&memory, &BootSpec::new(&file)).unwrap();
        assert!(bytes(&memory, LINKED + 0x20_0000, 20 << 20) == kernel.parts[1].data, "{format}");
    }
}

#[test]
fn bzimage_is_entered_in_64_bit_mode_with_identity_paging() {
    let memory = machine(64 * MIB);
    let plan = load(&memory, &BootSpec::new(&linux(Compression::Lz4))).unwrap();
    let cpu = &plan.cpu;
    assert_eq!((cpu.rip, cpu.rflags), (LINKED + 0x10, 2));
    assert_eq!((cpu.cr0, cpu.cr4, cpu.efer), (0x8000_0011, 0x20, 0x500));
    let code = cpu.segments[SegmentRegister::Cs as usize];
    assert_eq!((code.selector, code.attributes, code.limit), (Selector(0x10), 0xa09b, u32::MAX));
    for register in [SegmentRegister::Ds, SegmentRegister::Es, SegmentRegister::Ss] {
        let data = cpu.segments[register as usize];
        assert_eq!((data.selector, data.attributes, data.base), (Selector(0x18), 0xc093, 0));
    }
    // Reloading a segment register from the table changes nothing.
    for segment in [code, cpu.segments[SegmentRegister::Ds as usize], cpu.tr] {
        let at = cpu.gdtr.base + u64::from(segment.selector.offset());
        let descriptor: u64 = memory.read(GuestAddress(at)).unwrap();
        assert_eq!(Segment::from_descriptor(segment.selector, descriptor), segment);
    }
    // Walk the tables for an address in each GiB.
    for address in [0, LINKED + 0x123_4567, 0x7fe0_0000, 0xfee0_0030, 0xffff_ffff_u64] {
        let mut table = cpu.cr3;
        for shift in [39, 30, 21] {
            let entry: u64 = memory.read(GuestAddress(table + ((address >> shift) & 0x1ff) * 8)).unwrap();
            assert_eq!(entry & 3, 3, "present and writable");
            assert_eq!(entry & 0x80 != 0, shift == 21, "large only at the leaf");
            table = entry & !0xfff;
        }
        assert_eq!(table & !0x1f_ffff, address & !0x1f_ffff);
    }
}

#[test]
fn zero_page_tells_everything() {
    let memory = machine(64 * MIB);
    let file = linux(Compression::Gzip);
    let initrds = [Initrd { data: b"first", name: "" }, Initrd { data: b"second!!", name: "" }];
    let spec = BootSpec {
        command_line: "console=ttyS0 quiet",
        initrds: &initrds,
        rng_seed: Some([9; 32]),
        ..BootSpec::new(&file)
    };
    let plan = load(&memory, &spec).unwrap();
    let page = zero_page(&memory, &plan);
    assert_eq!(page[0x1f1..0x210], file[0x1f1..0x210], "the header is the file's");
    assert_eq!((page[0x210], page[0x211]), (0xff, 1), "loader type; KASLR flag cleared");
    assert_eq!(u64_at(&page, 0x258), Some(LINKED));
    assert_eq!((page[0x1ef], u64_at(&page, 0x70)), (0, Some(0xe_0000)));
    let line = u32_at(&page, 0x228).unwrap();
    assert_eq!(text(&memory, line.into()), "console=ttyS0 quiet");

    let initrd = plan.initrd.unwrap();
    assert_eq!((u32_at(&page, 0x218).unwrap(), u32_at(&page, 0x21c)), (initrd.start.0 as u32, Some(16)));
    assert_eq!(bytes(&memory, initrd.start.0, 16), b"first\0\0\0second!!");
    assert_eq!(initrd.start.0 % 0x1000, 0);
    assert!(initrd.end() > 63 * MIB, "as high as possible: {initrd:?}");

    let count = usize::from(page[0x1e8]);
    assert_eq!(count, plan.memory_map.len());
    for (index, entry) in plan.memory_map.iter().enumerate() {
        let at = 0x2d0 + index * 20;
        assert_eq!(u64_at(&page, at), Some(entry.range.start.0));
        assert_eq!(u64_at(&page, at + 8), Some(entry.range.len));
        assert_eq!(u32_at(&page, at + 16), Some(entry.kind as u32));
    }
    let seed = bytes(&memory, u64_at(&page, 0x250).unwrap(), 48);
    assert_eq!((u64_at(&seed, 0), u32_at(&seed, 8), u32_at(&seed, 12)), (Some(0), Some(9), Some(32)));
    assert_eq!(seed[16..], [9; 32]);
    assert_eq!(plan.version.as_deref(), Some("Linux 6.9.0-test (me@here)?[2J #1"));
}

#[test]
fn nothing_is_left_of_fields_that_the_loader_owns() {
    let memory = machine(64 * MIB);
    let mut file = linux(Compression::Gzip);
    patch(&mut file, 0x218, &[0xee; 8]);
    let plan = load(&memory, &BootSpec::new(&file)).unwrap();
    let page = zero_page(&memory, &plan);
    assert_eq!((u64_at(&page, 0x218), u64_at(&page, 0x250)), (Some(0), Some(0)));
}

#[test]
fn claims_never_overlap_and_lie_in_usable_memory() {
    let memory = machine(64 * MIB);
    let file = linux(Compression::Lz4);
    let initrds = [Initrd { data: &[1; 5 << 20], name: "" }];
    let spec = BootSpec { initrds: &initrds, kaslr: Kaslr::Random, ..BootSpec::new(&file) };
    let plan = load(&memory, &spec).unwrap();
    for (index, a) in plan.claims.iter().enumerate() {
        assert!(plan.claims[..index].iter().all(|b| !a.range.overlaps(&b.range)), "{a:?}");
    }
    let usable = |c: &&crate::Claim| {
        let within = |e: &&crate::E820Entry| e.range.contains(c.range.start, c.range.len);
        plan.memory_map.iter().filter(|e| e.kind == E820Kind::Ram).any(|e| within(&e))
    };
    assert_eq!(
        plan.claims.iter().filter(|c| !usable(c)).map(|c| c.what).collect::<Vec<_>>(),
        ["the firmware's area below 1 MiB", "the ACPI tables",]
    );
}

#[test]
fn kaslr_slides_each_kind_of_place() {
    let file = linux(Compression::Zstd);
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let memory = machine(64 * MIB);
        let spec = BootSpec { kaslr: Kaslr::Seeded(seed), ..BootSpec::new(&file) };
        let plan = load(&memory, &spec).unwrap();
        let KaslrOutcome::Applied { virtual_slide, physical, relocations } = plan.kaslr else {
            panic!("{:?}", plan.kaslr)
        };
        assert_eq!(relocations, 3);
        assert_eq!((virtual_slide % (2 * MIB), physical.0 % (2 * MIB)), (0, 0));
        assert!(LINKED + virtual_slide + INIT_SIZE <= 1 << 30);
        let place = |index: usize| GuestAddress(physical.0 + PLACES[index]);
        assert_eq!(memory.read::<u64>(place(0)).unwrap(), VIRTUAL + 0x2222 + virtual_slide);
        assert_eq!(memory.read::<u32>(place(1)).unwrap(), 0x1234_u32.wrapping_sub(virtual_slide as u32));
        assert_eq!(memory.read::<u32>(place(2)).unwrap(), (VIRTUAL + 0x3333 + virtual_slide) as u32);
        assert_eq!(plan.entry.0, physical.0 + 0x10);
        assert_eq!(bytes(&memory, physical.0 + 0x20_0000, 0x124), [&[0x5a; 0x123][..], &[0]].concat());
        assert_eq!(zero_page(&memory, &plan)[0x211] & 2, 2, "the kernel is told");
        seen.insert((virtual_slide, physical.0));
    }
    assert!(seen.len() > 15, "seeds give different places: {seen:x?}");
}

#[test]
fn same_seed_gives_same_place_and_host_randomness_does_not() {
    let file = linux(Compression::Lz4);
    let place = |kaslr| {
        let memory = machine(64 * MIB);
        let plan = load(&memory, &BootSpec { kaslr, ..BootSpec::new(&file) }).unwrap();
        format!("{:?}", plan.kaslr)
    };
    assert_eq!(place(Kaslr::Seeded(1)), place(Kaslr::Seeded(1)));
    let random: std::collections::BTreeSet<_> = (0..6).map(|_| place(Kaslr::Random)).collect();
    assert!(random.len() > 1);
}

#[test]
fn nokaslr_on_the_command_line_wins() {
    let memory = machine(64 * MIB);
    let file = linux(Compression::Lz4);
    let spec = BootSpec { kaslr: Kaslr::Random, command_line: "a nokaslr b", ..BootSpec::new(&file) };
    let plan = load(&memory, &spec).unwrap();
    assert_eq!((plan.kaslr, plan.kernel.start.0), (KaslrOutcome::ForbiddenByCommandLine, LINKED));
}

#[test]
fn packed_kernel_is_entered_at_its_64_bit_entry() {
    let memory = machine(64 * MIB);
    let file = linux(Compression::Lzo);
    let spec = BootSpec { decompress_in_guest: true, ..BootSpec::new(&file) };
    let plan = load(&memory, &spec).unwrap();
    assert_eq!((plan.format, plan.kaslr), (KernelFormat::BzImageInGuest, KaslrOutcome::LeftToGuest));
    assert_eq!((plan.entry.0, plan.cpu.rip), (LINKED + 0x200, LINKED + 0x200));
    assert_eq!(bytes(&memory, LINKED, file.len() - CODE_OFFSET), file[CODE_OFFSET..]);
    assert_eq!(plan.kernel.len, INIT_SIZE);
}

#[test]
fn kernel_of_32_bits_is_entered_at_its_start_without_paging() {
    // With a header that says so, and with one that is older than that.
    for (protocol, relocatable) in [(0x20f_u16, true), (0x20a, true), (0x20a, false)] {
        let memory = machine(64 * MIB);
        let mut kernel = ElfFile::linux();
        (kernel.bits, kernel.machine) = (32, 3);
        let mut file = super::images::bzimage(&compress(&kernel.build(), Compression::Lz4));
        patch(&mut file, 0x206, &protocol.to_le_bytes());
        patch(&mut file, 0x234, &[u8::from(relocatable)]);
        patch(&mut file, 0x236, &[0, 0]);
        let spec = BootSpec { command_line: "x=1", ..BootSpec::new(&file) };
        let plan = load(&memory, &spec).unwrap();
        let start = if relocatable { LINKED } else { MIB };
        assert_eq!((plan.format, plan.entry.0), (KernelFormat::BzImage32, start));
        assert_eq!(bytes(&memory, start, file.len() - CODE_OFFSET), file[CODE_OFFSET..]);
        let cpu = &plan.cpu;
        assert_eq!((cpu.rip, cpu.cr0, cpu.cr4, cpu.efer), (start, 0x11, 0, 0));
        let code = cpu.segments[SegmentRegister::Cs as usize];
        assert_eq!((code.selector, code.attributes, code.limit), (Selector(0x10), 0xc09b, u32::MAX));
        let others = [Gpr::Rbp, Gpr::Rdi, Gpr::Rbx].map(|register| cpu.gpr[register as usize]);
        assert_eq!(others, [0; 3]);
        let page = zero_page(&memory, &plan);
        assert_eq!(text(&memory, u32_at(&page, 0x228).unwrap().into()), "x=1");
    }
}

#[test]
fn vmlinux_is_entered_by_the_linux_protocol() {
    let memory = machine(64 * MIB);
    let mut kernel = ElfFile::linux();
    // Some kernels' entry is a virtual address.
    kernel.entry = VIRTUAL + 0x20;
    let file = kernel.build();
    let spec = BootSpec { command_line: "x=1", ..BootSpec::new(&file) };
    let plan = load(&memory, &spec).unwrap();
    assert_eq!((plan.format, plan.entry.0), (KernelFormat::Vmlinux, LINKED + 0x20));
    let page = zero_page(&memory, &plan);
    assert_eq!((u16_at(&page, 0x1fe), &page[0x202..0x206], page[0x210]), (Some(0xaa55), &b"HdrS"[..], 0xff));
    assert_eq!(text(&memory, u32_at(&page, 0x228).unwrap().into()), "x=1");
    assert_eq!(bytes(&memory, LINKED, 0x3000), kernel.parts[0].data);
}

#[test]
fn protocol_can_be_chosen_for_an_elf_with_a_pvh_note() {
    let memory = machine(64 * MIB);
    let mut kernel = ElfFile::linux();
    kernel.note = super::images::pvh_note(LINKED as u32 + 0x40);
    let file = kernel.build();
    let spec = BootSpec { protocol: Protocol::Linux64, ..BootSpec::new(&file) };
    assert_eq!(load(&memory, &spec).unwrap().format, KernelFormat::Vmlinux);
}

#[test]
fn relocations_are_not_loaded_as_part_of_the_kernel() {
    let memory = machine(64 * MIB);
    load(&memory, &BootSpec::new(&linux(Compression::Lz4))).unwrap();
    let elf = linux_with_relocations();
    let place = GuestAddress(LINKED + PLACES[0]);
    assert_eq!(memory.read::<u64>(place).unwrap(), VIRTUAL + 0x2222);
    assert!(elf.len() > 0x3123 + 24);
}
