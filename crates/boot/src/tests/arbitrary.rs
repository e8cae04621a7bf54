//! Damaged and arbitrary files: whatever comes out, it comes out soon and without a panic.

use ringfence_memory::GuestMemory;

use super::elf_kernels::flat;
use super::images::{ElfFile, linux, pvh_note};
use crate::{BootSpec, Compression, Initrd, Kaslr, Protocol, load};

/// SplitMix64 with a fixed seed: a failure comes back.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Changes a few bytes, mostly near the start, where the headers are; sometimes cuts the file.
fn damage(file: &mut Vec<u8>, numbers: &mut Numbers) {
    const VALUES: [u8; 6] = [0, 1, 0x7f, 0x80, 0xff, 0x10];
    for _ in 0..=numbers.below(4) {
        let reach = if numbers.below(3) == 0 { file.len() } else { file.len().min(0x300) };
        let at = numbers.below(reach.max(1));
        let value = if numbers.below(2) == 0 { numbers.next() as u8 } else { VALUES[numbers.below(6)] };
        let run = [1, 1, 2, 4, 8][numbers.below(5)];
        for byte in file.iter_mut().skip(at).take(run) {
            *byte = value;
        }
    }
    if numbers.below(8) == 0 {
        file.truncate(numbers.below(file.len() + 1));
    }
}

#[test]
fn damaged_kernels_load_or_are_refused() {
    let mut pvh = ElfFile::linux();
    pvh.note = pvh_note(0x100_0040);
    let formats = [Compression::Gzip, Compression::Xz, Compression::Lz4, Compression::Zstd];
    let mut seeds: Vec<Vec<u8>> = formats.iter().map(|f| linux(*f)).collect();
    seeds.extend([ElfFile::linux().build(), pvh.build(), flat(0x10_0300, 0x10_0800)]);
    let memory = GuestMemory::flat(32 << 20).unwrap();
    let initrds = [Initrd { data: b"initrd", name: "name" }];
    let mut numbers = Numbers(2);
    let protocols = [Protocol::Auto, Protocol::Linux64, Protocol::Pvh, Protocol::Multiboot];
    let (mut loaded, mut refused) = (0, 0);
    let start = std::time::Instant::now();
    for round in 0..2500 {
        let mut file = seeds[round % seeds.len()].clone();
        damage(&mut file, &mut numbers);
        let spec = BootSpec {
            initrds: &initrds,
            command_line: "console=ttyS0",
            protocol: protocols[numbers.below(6).saturating_sub(2)],
            kaslr: if numbers.below(2) == 0 { Kaslr::Off } else { Kaslr::Seeded(numbers.next()) },
            decompress_in_guest: numbers.below(5) == 0,
            ..BootSpec::new(&file)
        };
        match load(&memory, &spec) {
            Ok(plan) => {
                assert!(!plan.to_string().contains('\x1b'));
                loaded += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(loaded > 100 && refused > 500, "{loaded} loaded, {refused} refused");
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

#[test]
fn arbitrary_bytes_are_refused() {
    let memory = GuestMemory::flat(4 << 20).unwrap();
    let mut numbers = Numbers(3);
    let magics: [&[u8]; 4] = [b"", b"\x7fELF\x02\x01\x01", b"\x7fELF\x01\x01\x01", b"\x02\xb0\xad\x1b"];
    for round in 0..400 {
        let mut file: Vec<u8> = (0..numbers.below(2000)).map(|_| numbers.next() as u8).collect();
        let magic = magics[round % magics.len()];
        file.splice(..magic.len().min(file.len()), magic.iter().copied());
        assert!(load(&memory, &BootSpec::new(&file)).is_err());
    }
}
