use super::*;
use crate::bytes::{u16_at, u32_at, u64_at};

const BASE: u64 = 0x3ff_0000;

/// Memory with the tables in it.
fn written(cpus: u32) -> (GuestMemory, AcpiTables) {
    let memory = GuestMemory::flat(64 << 20).unwrap();
    let acpi = AcpiTables::build(&PlatformDescription::default(), cpus, BASE).unwrap();
    acpi.write(&memory).unwrap();
    (memory, acpi)
}

fn bytes(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut into = vec![0; len];
    memory.read_bytes(GuestAddress(at), &mut into).unwrap();
    into
}

/// A table as an operating system would read it: length from the header, checksum right.
fn read_table(memory: &GuestMemory, at: u64) -> Vec<u8> {
    let len = u32_at(&bytes(memory, at, 8), 4).unwrap();
    assert!((36..0x1_0000).contains(&len), "length {len:#x} at {at:#x}");
    let table = bytes(memory, at, len as usize);
    assert_eq!(checksum(&table), 0, "checksum of {:?}", table[..4].escape_ascii().to_string());
    table
}

/// Every table by walking from the root pointer: signature and bytes.
fn walk(memory: &GuestMemory) -> Vec<(String, Vec<u8>)> {
    let root = bytes(memory, RSDP.0, 36);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!((checksum(&root[..20]), checksum(&root)), (0, 0));
    let rsdt = read_table(memory, u32_at(&root, 16).unwrap().into());
    let xsdt = read_table(memory, u64_at(&root, 24).unwrap());
    let short: Vec<u64> = (36..rsdt.len()).step_by(4).map(|i| u32_at(&rsdt, i).unwrap().into()).collect();
    let long: Vec<u64> = (36..xsdt.len()).step_by(8).map(|i| u64_at(&xsdt, i).unwrap()).collect();
    assert_eq!(short, long);
    let mut tables: Vec<Vec<u8>> = long.iter().map(|&at| read_table(memory, at)).collect();
    let fadt = tables.iter().find(|t| &t[..4] == b"FACP").unwrap().clone();
    let dsdt = u32_at(&fadt, 40).unwrap();
    assert_eq!(u64_at(&fadt, 140), Some(dsdt.into()));
    tables.push(read_table(memory, dsdt.into()));
    tables.into_iter().map(|t| (String::from_utf8_lossy(&t[..4]).into_owned(), t)).collect()
}

fn find(memory: &GuestMemory, signature: &str) -> Vec<u8> {
    walk(memory).into_iter().find(|(s, _)| s == signature).unwrap().1
}

#[test]
fn every_table_is_reachable_and_sums_to_zero() {
    let (memory, acpi) = written(4);
    let names: Vec<String> = walk(&memory).into_iter().map(|t| t.0).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT"]);
    assert_eq!(acpi.facs_range(), GuestRange::new(BASE, 0x1000));
    assert!(acpi.data_range().end() >= BASE + acpi.size());
}

#[test]
fn facs_is_where_the_fadt_says() {
    let (memory, _) = written(1);
    let fadt = find(&memory, "FACP");
    let facs = bytes(&memory, u32_at(&fadt, 36).unwrap().into(), 64);
    assert_eq!((&facs[..4], u32_at(&facs, 4)), (&b"FACS"[..], Some(64)));
}

#[test]
fn fadt_describes_fixed_hardware() {
    let (memory, _) = written(1);
    let fadt = find(&memory, "FACP");
    assert_eq!(u16_at(&fadt, 46), Some(9), "SCI");
    assert_eq!(
        (u32_at(&fadt, 48), fadt[52], fadt[53]),
        (Some(0xb2), 0xf1, 0xf0),
        "SMI command, ACPI on and off"
    );
    assert_eq!([56, 64, 76, 80].map(|o| u32_at(&fadt, o).unwrap()), [0x600, 0x604, 0x608, 0x620]);
    assert_eq!((fadt[88], fadt[89], fadt[91], fadt[92]), (4, 2, 4, 8), "block lengths");
    let flags = u32_at(&fadt, 112).unwrap();
    assert_eq!(flags & (1 << 20), 0, "not hardware-reduced");
    assert_ne!(flags & (1 << 10), 0, "reset register");
    assert_eq!((u64_at(&fadt, 120), fadt[128]), (Some(0xcf9), 6));
    assert_eq!(u16_at(&fadt, 109), Some(0b111), "legacy devices, i8042, no VGA");
    assert_eq!(fadt[108], 0x32, "century");
}

#[test]
fn machine_without_smi_command_is_always_in_acpi_mode() {
    let memory = GuestMemory::flat(64 << 20).unwrap();
    let platform = PlatformDescription { smi_command: None, ..PlatformDescription::default() };
    AcpiTables::build(&platform, 1, BASE).unwrap().write(&memory).unwrap();
    let fadt = find(&memory, "FACP");
    assert_eq!((u32_at(&fadt, 48), fadt[52], fadt[53]), (Some(0), 0, 0));
}

#[test]
fn mcfg_tells_of_one_segment_with_all_its_buses() {
    let (memory, _) = written(1);
    let mcfg = find(&memory, "MCFG");
    assert_eq!((mcfg.len(), u64_at(&mcfg, 44)), (60, Some(0xc000_0000)));
    assert_eq!(mcfg[52..56], [0, 0, 0, 255], "segment, first and last bus");
    let memory = GuestMemory::flat(64 << 20).unwrap();
    let platform = PlatformDescription { pci_ecam: None, ..PlatformDescription::default() };
    AcpiTables::build(&platform, 1, BASE).unwrap().write(&memory).unwrap();
    assert!(walk(&memory).iter().all(|(name, _)| name != "MCFG"));
    for (start, last) in
        [(0xc000_0000, 0xcfff_fffe), (0xc800_0000, 0xd7ff_ffff), (1 << 32, (1 << 32) + 0xfff_ffff)]
    {
        let window = Some(crate::MemoryWindow { start, last });
        let platform = PlatformDescription { pci_ecam: window, ..PlatformDescription::default() };
        assert!(AcpiTables::build(&platform, 1, BASE).is_err(), "{start:#x}");
    }
}

/// The MADT's structures: type and bytes.
fn structures(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while let [kind, len, ..] = *rest {
        let (one, tail) = rest.split_at(len.into());
        found.push((kind, one.to_vec()));
        rest = tail;
    }
    found
}

#[test]
fn madt_lists_cpus_and_wiring() {
    let (memory, _) = written(3);
    let madt = find(&memory, "APIC");
    assert_eq!(u32_at(&madt, 36), Some(0xfee0_0000));
    let all = structures(&madt);
    assert_eq!(all.iter().map(|s| s.0).collect::<Vec<_>>(), [0, 0, 0, 1, 2, 2, 4]);
    assert_eq!(all[2].1, [0, 8, 2, 2, 1, 0, 0, 0]);
    assert_eq!(all[3].1, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(all[4].1, [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(all[5].1, [2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]);
    assert_eq!(all[6].1, [4, 6, 0xff, 0, 0, 1]);
}

#[test]
fn cpus_past_254_are_x2apics() {
    let (memory, _) = written(257);
    let all = structures(&find(&memory, "APIC"));
    assert_eq!(all.iter().filter(|s| s.0 == 0).count(), 255);
    let x2: Vec<_> = all.iter().filter(|s| s.0 == 9).collect();
    assert_eq!(x2.len(), 2);
    assert_eq!((u32_at(&x2[0].1, 4), u32_at(&x2[0].1, 12)), (Some(255), Some(255)));
}

#[test]
fn unusable_descriptions_are_refused() {
    let good = PlatformDescription::default();
    for cpus in [0, MAX_CPUS + 1] {
        assert!(matches!(AcpiTables::build(&good, cpus, BASE), Err(BootError::CpuCount(_))));
    }
    assert!(matches!(AcpiTables::build(&good, 1, 1 << 32), Err(BootError::BadPlatform(_))));
    let bad = PlatformDescription { sci_irq: 16, ..good.clone() };
    assert!(matches!(AcpiTables::build(&bad, 1, BASE), Err(BootError::BadPlatform(_))));
    let window = crate::MemoryWindow { start: 5, last: 4 };
    let bad = PlatformDescription { pci_window_64: Some(window), ..good };
    assert!(matches!(AcpiTables::build(&bad, 1, BASE), Err(BootError::BadPlatform(_))));
}

/// ACPICA's own disassembler as a second opinion, where it is installed.
#[test]
fn iasl_reads_every_table() {
    if std::process::Command::new("iasl").arg("-v").output().is_err() {
        println!("skipped: iasl (package acpica-tools) is not installed");
        return;
    }
    let (memory, _) = written(2);
    let folder = tempfile::tempdir().unwrap();
    for (name, table) in walk(&memory) {
        let file = folder.path().join(format!("{name}.dat"));
        std::fs::write(&file, table).unwrap();
        let output =
            std::process::Command::new("iasl").arg("-d").arg(&file).current_dir(&folder).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{name}: {said}");
        for bad in ["Error", "Warning", "Invalid"] {
            assert!(!said.contains(bad), "{name}: {said}");
        }
    }
    let source = std::fs::read_to_string(folder.path().join("DSDT.dsl")).unwrap();
    for expected in [
        "Device (C001)",
        "Device (PCI0)",
        "Device (ECAM)",
        "Method (_OSC, 4",
        "PNP0A08",
        "Name (_PRT",
        "\"PNP0501\"",
        "\"QEMU0001\"",
        "Name (_S5",
        "QWordMemory",
    ] {
        assert!(source.contains(expected), "{expected} is missing:\n{source}");
    }
    // The compiler checks more than the disassembler: required objects, resource rules.
    let output = std::process::Command::new("iasl").arg("DSDT.dsl").current_dir(&folder).output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(said.contains(" 0 Errors, 0 Warnings"), "{said}");
}

#[test]
fn generation_id_is_where_its_device_says_and_nowhere_without_one() {
    let memory = GuestMemory::flat(64 << 20).unwrap();
    let id = *b"0123456789abcdef";
    let platform = PlatformDescription { generation_id: Some(id), ..PlatformDescription::default() };
    let acpi = AcpiTables::build(&platform, 1, BASE).unwrap();
    acpi.write(&memory).unwrap();
    let at = acpi.generation_id().0;
    assert_eq!(bytes(&memory, at, 16), id);
    assert!(acpi.facs_range().contains(GuestAddress(at), 16), "in memory that the guest keeps");
    let (name, dsdt) =
        (b"VM_Gen_Counter", walk(&memory).into_iter().find(|(name, _)| name == "DSDT").unwrap().1);
    let has = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
    assert!(has(&dsdt, name) && has(&dsdt, &(at as u32).to_le_bytes()));
    let (memory, acpi) = written(1);
    assert_eq!(bytes(&memory, acpi.generation_id().0, 16), [0; 16]);
    let dsdt = walk(&memory).into_iter().find(|(name, _)| name == "DSDT").unwrap().1;
    assert!(!has(&dsdt, name));
}

#[test]
fn watchdog_is_described_where_there_is_one() {
    let watchdog = crate::Watchdog { port: 0x660, period_ms: 100, preset: 0, left: 2, control: 4, status: 6 };
    let platform = PlatformDescription { watchdog: Some(watchdog), ..PlatformDescription::default() };
    let memory = GuestMemory::flat(64 << 20).unwrap();
    AcpiTables::build(&platform, 1, BASE).unwrap().write(&memory).unwrap();
    let wdat = find(&memory, "WDAT");
    // Header, no PCI function, period, counts, on, entries.
    assert_eq!(u32_at(&wdat, 36), Some(32));
    assert_eq!(wdat[40..45], [0xff, 0, 0xff, 0xff, 0xff]);
    let word = |at| u32_at(&wdat, at).unwrap();
    assert_eq!((word(48), word(52), word(56), wdat[60]), (100, 0xffff, 1, 1));
    let count = word(64) as usize;
    assert_eq!(wdat.len(), 68 + count * 24);
    // Every action of Linux's driver and Windows's, each one access of two bytes to one of the four registers.
    let entries: Vec<&[u8]> = wdat[68..].chunks(24).collect();
    let actions: Vec<u8> = entries.iter().map(|entry| entry[0]).collect();
    assert_eq!(actions, [1, 4, 5, 6, 8, 9, 10, 11, 32, 33]);
    for entry in entries {
        assert_eq!(entry[4..8], [1, 16, 0, 2]);
        assert!((0x660..=0x666).step_by(2).any(|port| u64_at(entry, 8) == Some(port)), "{entry:x?}");
    }
}
