//! Kernels and wishes that are refused, each with its own error.

use ringfence_memory::GuestMemory;

use super::elf_kernels::{flat, header};
use super::images::{
    CODE_OFFSET, ElfFile, INIT_SIZE, LINKED, PAYLOAD_OFFSET, bzimage, compress, linux,
    linux_with_relocations, machine, patch, pvh_note,
};
use crate::{BootError, BootSpec, Compression, Initrd, Kaslr, Protocol, load};

const MIB: u64 = 1 << 20;

fn refused(spec: &BootSpec<'_>) -> BootError {
    load(&machine(64 * MIB), spec).unwrap_err()
}

fn refused_file(file: &[u8]) -> BootError {
    refused(&BootSpec::new(file))
}

macro_rules! assert_error {
    ($error:expr, $pattern:pat $(if $guard:expr)?) => {{
        let error = $error;
        assert!(matches!(error, $pattern $(if $guard)?), "{error:?}: {error}");
        error.to_string()
    }};
}

#[test]
fn unknown_files_are_named_for_what_they_are() {
    let message = assert_error!(refused_file(b""), BootError::UnknownFormat { guess: None, .. });
    assert!(message.contains("first bytes: none") && message.contains("bzImage"), "{message}");
    let message = assert_error!(refused_file(b"\x1f\x8b\x08\0\0\0\0\0\0"), BootError::UnknownFormat { .. });
    assert!(message.contains("1f 8b 08 00") && message.contains("gzip"), "{message}");
    let message = assert_error!(refused_file(b"MZ\x90\0"), BootError::UnknownFormat { .. });
    assert!(message.contains("firmware"), "{message}");
    let mut arm = vec![0; 0x40];
    patch(&mut arm, 0x38, b"ARM\x64");
    assert_error!(
        refused_file(&arm),
        BootError::UnknownFormat { guess: Some("a kernel for 64-bit ARM"), .. }
    );
    assert_error!(refused_file(&[0; 100_000]), BootError::UnknownFormat { guess: None, .. });
}

#[test]
fn truncated_bzimage_says_where() {
    let file = linux(Compression::Lz4);
    assert_error!(refused_file(&file[..0x220]), BootError::Truncated { part: "setup header", .. });
    assert_error!(
        refused_file(&file[..0x300]),
        BootError::Truncated { part: "setup sectors", needs: 1024, has: 768 }
    );
    let cut = &file[..CODE_OFFSET + PAYLOAD_OFFSET + 100];
    let message = assert_error!(refused_file(cut), BootError::Truncated { part: "payload", .. });
    assert!(message.contains("truncated"), "{message}");
    let packed = BootSpec { decompress_in_guest: true, ..BootSpec::new(cut) };
    assert_error!(refused(&packed), BootError::Truncated { part: "protected-mode code", .. });
}

#[test]
fn corrupt_payload_is_found_in_every_format() {
    for format in [Compression::Gzip, Compression::Xz, Compression::Lz4, Compression::Zstd] {
        let packed = compress(&linux_with_relocations(), format);
        // Wrong size at the end.
        let mut wrong = packed.clone();
        let last = wrong.len() - 1;
        wrong[last] ^= 0x40;
        assert_error!(
            refused_file(&bzimage(&wrong)),
            BootError::CorruptPayload { compression, .. } if compression == format
        );
        // Cut short in the middle, trailer kept.
        let mut short = packed[..packed.len() / 2].to_vec();
        short.extend(&packed[packed.len() - 4..]);
        assert_error!(
            refused_file(&bzimage(&short)),
            BootError::CorruptPayload { compression, .. } if compression == format
        );
    }
}

#[test]
fn checksums_find_a_flipped_bit() {
    for format in [Compression::Gzip, Compression::Xz, Compression::Zstd] {
        let packed = compress(&linux_with_relocations(), format);
        let mut wrong = packed.clone();
        wrong[packed.len() / 2] ^= 1;
        let error = refused_file(&bzimage(&wrong));
        assert!(
            matches!(error, BootError::CorruptPayload { .. } | BootError::BadElf(_)),
            "{format}: {error}"
        );
    }
}

#[test]
fn payloads_that_are_not_unpacked_here_are_named() {
    for (format, name) in
        [(Compression::Bzip2, "bzip2"), (Compression::Lzma, "LZMA"), (Compression::Lzo, "LZO")]
    {
        let message = assert_error!(refused_file(&linux(format)), BootError::UnsupportedCompression(_));
        assert!(message.contains(name) && message.contains("guest"), "{message}");
    }
    assert_error!(refused_file(&bzimage(b"what is this")), BootError::UnknownCompression { .. });
}

#[test]
fn decompression_bomb_stops_at_the_size_in_the_header() {
    let bomb = vec![0; 64 << 20];
    for format in [Compression::Gzip, Compression::Xz, Compression::Lz4, Compression::Zstd] {
        let mut data = ElfFile::linux().build();
        data.extend(&bomb);
        let error = refused_file(&bzimage(&compress(&data, format)));
        assert_error!(error, BootError::PayloadTooLarge { limit } if limit == INIT_SIZE);
    }
}

#[test]
fn kernel_too_large_for_memory_says_how_much_is_needed() {
    let file = linux(Compression::Lz4);
    let error = load(&machine(18 * MIB), &BootSpec::new(&file)).unwrap_err();
    let message =
        assert_error!(error, BootError::KernelDoesNotFit { needed, .. } if needed > LINKED + INIT_SIZE);
    assert!(message.contains("at least 21 MiB"), "{message}");
    load(&machine(21 * MIB), &BootSpec::new(&file)).unwrap();
}

#[test]
fn initrd_that_does_not_fit_says_how_much_is_needed() {
    let file = linux(Compression::Lz4);
    let data = vec![1; 50 << 20];
    let initrds = [Initrd { data: &data, name: "" }];
    let spec = BootSpec { initrds: &initrds, ..BootSpec::new(&file) };
    let message = assert_error!(refused(&spec), BootError::InitrdDoesNotFit { needed: Some(_), .. });
    assert!(message.contains("50 MiB") && message.contains("at least 71 MiB"), "{message}");
    load(&machine(71 * MIB), &spec).unwrap();
}

#[test]
fn initrd_above_what_the_kernel_accepts_is_not_helped_by_memory() {
    let mut file = linux(Compression::Lz4);
    patch(&mut file, 0x236, &[1, 0]);
    patch(&mut file, 0x22c, &0x1ff_ffff_u32.to_le_bytes());
    let data = vec![1; 20 << 20];
    let initrds = [Initrd { data: &data, name: "" }];
    let spec = BootSpec { initrds: &initrds, ..BootSpec::new(&file) };
    let message =
        assert_error!(refused(&spec), BootError::InitrdDoesNotFit { needed: None, limit: 0x200_0000, .. });
    assert!(message.contains("smaller initrd") && !message.contains("--memory"), "{message}");
    let small = [Initrd { data: &data[..1 << 20], name: "" }];
    let plan = load(&machine(64 * MIB), &BootSpec { initrds: &small, ..spec }).unwrap();
    assert_eq!(plan.initrd.unwrap().end(), 0x200_0000);
}

#[test]
fn command_line_has_the_kernels_limit() {
    let file = linux(Compression::Lz4);
    let line = "x".repeat(2048);
    let spec = BootSpec { command_line: &line, ..BootSpec::new(&file) };
    assert_error!(refused(&spec), BootError::CommandLineTooLong { len: 2048, limit: 2047 });
    load(&machine(64 * MIB), &BootSpec { command_line: &line[1..], ..spec.clone() }).unwrap();
    assert_error!(refused(&BootSpec { command_line: "a\0b", ..spec }), BootError::CommandLineNul);
}

#[test]
fn kernels_for_other_cpus_are_refused() {
    let mut kernel = ElfFile::linux();
    kernel.machine = 183;
    assert_error!(refused_file(&kernel.build()), BootError::WrongArchitecture(183));
    assert_error!(
        refused_file(&bzimage(&compress(&kernel.build(), Compression::Lz4))),
        BootError::WrongArchitecture(183)
    );
    let mut kernel = ElfFile::linux();
    (kernel.bits, kernel.machine) = (32, 3);
    assert_error!(refused_file(&kernel.build()), BootError::ThirtyTwoBit);
    // Whose header says that it has 64 bits.
    assert_error!(
        refused_file(&bzimage(&compress(&kernel.build(), Compression::Lz4))),
        BootError::ThirtyTwoBit
    );
    let mut file = linux(Compression::Lz4);
    patch(&mut file, 0x236, &[0, 0]);
    for decompress_in_guest in [false, true] {
        let spec = BootSpec { decompress_in_guest, protocol: Protocol::Linux64, ..BootSpec::new(&file) };
        assert_error!(refused(&spec), BootError::ThirtyTwoBit);
    }
}

#[test]
fn old_boot_protocols_are_refused() {
    let mut file = linux(Compression::Lz4);
    patch(&mut file, 0x206, &[4, 2]);
    let message = assert_error!(refused_file(&file), BootError::OldProtocol { version: 0x204, .. });
    assert!(message.contains("2.04"), "{message}");
    let mut file = linux(Compression::Lz4);
    patch(&mut file, 0x211, &[0]);
    assert_error!(refused_file(&file), BootError::OldProtocol { .. });
}

#[test]
fn damaged_elf_files_are_refused() {
    let good = ElfFile::linux().build();
    let broken = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        patch(&mut file, at, bytes);
        refused_file(&file)
    };
    assert_error!(refused_file(&good[..40]), BootError::Truncated { part: "ELF header", .. });
    assert_error!(refused_file(&good[..100]), BootError::Truncated { part: "program headers", .. });
    assert_error!(refused_file(&good[..0x2000]), BootError::Truncated { part: "ELF segments", .. });
    assert_error!(broken(4, &[3]), BootError::BadElf("it is neither 32- nor 64-bit"));
    assert_error!(broken(5, &[2]), BootError::BadElf("it is not little-endian"));
    assert_error!(broken(54, &[57]), BootError::BadElf(_));
    assert_error!(broken(56, &[0, 0]), BootError::BadElf(_));
    assert_error!(broken(56, &[0xff, 0xff]), BootError::BadElf(_));
    assert_error!(broken(32, &[0xff; 8]), BootError::Truncated { part: "program headers", .. });
    assert_error!(
        broken(64 + 40, &[1, 0]),
        BootError::BadElf("a segment has more bytes in the file than in memory")
    );
    assert_error!(broken(64 + 24, &[0xff; 8]), BootError::BadElf("a segment ends beyond the address space"));
    assert_error!(
        broken(64 + 24, &(LINKED + 0x20_1000).to_le_bytes()),
        BootError::BadElf("two segments want the same memory")
    );
    assert_error!(broken(24, &[0xff; 8]), BootError::BadElf("its entry point is outside of every segment"));
    assert_error!(broken(64, &[9]), BootError::BadElf(_) | BootError::Truncated { .. });
}

#[test]
fn segment_outside_of_the_kernels_own_memory_is_refused() {
    let mut kernel = ElfFile::linux();
    kernel.parts[1].physical = LINKED + INIT_SIZE - 0x1000;
    let file = bzimage(&compress(&kernel.build(), Compression::Lz4));
    assert_error!(
        refused_file(&file),
        BootError::BadElf("a segment lies outside of the memory that the header asks for")
    );
}

#[test]
fn kernel_over_the_bios_data_is_refused() {
    let mut kernel = ElfFile::linux();
    kernel.parts[1].physical = 0x400;
    assert_error!(refused_file(&kernel.build()), BootError::Overlap { other: "the BIOS data area", .. });
}

#[test]
fn kaslr_that_cannot_be_had_is_an_error() {
    let with = |file: &[u8]| refused(&BootSpec { kaslr: Kaslr::Random, ..BootSpec::new(file) });
    let plain = bzimage(&compress(&ElfFile::linux().build(), Compression::Lz4));
    let message = assert_error!(with(&plain), BootError::KaslrUnavailable(_));
    assert!(message.contains("CONFIG_RANDOMIZE_BASE"), "{message}");
    let mut fixed = linux(Compression::Lz4);
    patch(&mut fixed, 0x234, &[0]);
    assert_error!(with(&fixed), BootError::KaslrUnavailable(_));
    assert_error!(with(&ElfFile::linux().build()), BootError::KaslrUnavailable(_));
    let mut payload = linux_with_relocations();
    let end = payload.len();
    patch(&mut payload, end - 4, &0x8200_0000_u32.to_le_bytes());
    assert_error!(with(&bzimage(&compress(&payload, Compression::Lz4))), BootError::BadRelocation(_));
}

#[test]
fn protocol_that_the_kernel_lacks_is_an_error() {
    let with = |file: &[u8], protocol| refused(&BootSpec { protocol, ..BootSpec::new(file) });
    let elf = ElfFile::linux().build();
    assert_error!(with(&elf, Protocol::Pvh), BootError::WrongProtocol { wanted: "PVH", .. });
    assert_error!(with(&elf, Protocol::Multiboot), BootError::WrongProtocol { wanted: "Multiboot", .. });
    let image = linux(Compression::Lz4);
    assert_error!(with(&image, Protocol::Pvh), BootError::WrongProtocol { .. });
    assert_error!(with(&image, Protocol::Multiboot), BootError::WrongProtocol { .. });
    assert_error!(with(b"junk", Protocol::Linux64), BootError::UnknownFormat { .. });
    assert_error!(with(b"junk", Protocol::Pvh), BootError::UnknownFormat { .. });
}

#[test]
fn pvh_entry_outside_of_the_kernel_is_refused() {
    let mut kernel = ElfFile::linux();
    kernel.note = pvh_note(0x10);
    assert_error!(refused_file(&kernel.build()), BootError::BadElf(_));
}

#[test]
fn multiboot_demands_and_addresses_are_checked() {
    let file = header(1 << 2, [0; 5]);
    let message = assert_error!(refused_file(&file), BootError::MultibootFeatures(4));
    assert!(message.contains("video"), "{message}");
    assert_error!(refused_file(&flat(0x10_0500, 0)), BootError::Truncated { part: "loaded part", .. });
    assert_error!(refused_file(&flat(0xf_0000, 0)), BootError::BadMultiboot(_));
    assert_error!(refused_file(&flat(0x10_0300, 0x10_0200)), BootError::BadMultiboot(_));
    assert_error!(refused_file(&flat(0x10_0020, 0x10_0030)), BootError::BadMultiboot(_));
    assert_error!(refused_file(&flat(0x10_0300, 0xf000_0000)), BootError::KernelDoesNotFit { .. });
    let before = |addresses| [vec![0; 16], header(1 << 16, addresses)].concat();
    assert_error!(refused_file(&before([0x1000, 0x2000, 0, 0, 0x2000])), BootError::BadMultiboot(_));
    assert_error!(refused_file(&before([0x2000, 0x1000, 0, 0, 0x1000])), BootError::BadMultiboot(_));
}

#[test]
fn multiboot_modules_that_do_not_fit_are_refused() {
    let file = flat(0, 0);
    let data = vec![0; 63 << 20];
    let initrds = [Initrd { data: &data, name: "" }];
    let spec = BootSpec { initrds: &initrds, ..BootSpec::new(&file) };
    assert_error!(refused(&spec), BootError::InitrdDoesNotFit { .. });
}

#[test]
fn machine_without_the_firmware_segment_is_refused() {
    let region = |start: u64, len: u64| ringfence_memory::RegionSpec {
        range: ringfence_memory::GuestRange::new(start, len),
        kind: ringfence_memory::RegionKind::Ram,
    };
    let file = linux(Compression::Lz4);
    let memory = GuestMemory::new(&[region(0, 0xa_0000), region(0x10_0000, 64 << 20)]).unwrap();
    assert_error!(load(&memory, &BootSpec::new(&file)).unwrap_err(), BootError::Memory { .. });
    let tiny = GuestMemory::flat(0x8_0000).unwrap();
    assert_error!(load(&tiny, &BootSpec::new(&file)).unwrap_err(), BootError::NoRoom { .. });
    let spec = BootSpec { cpus: 0, ..BootSpec::new(&file) };
    assert_error!(refused(&spec), BootError::CpuCount(0));
}
