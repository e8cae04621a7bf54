//! Images that stand on others, and who may open what.

use super::*;
use crate::run;
use crate::testing::{pattern, read, write};

#[test]
fn overlay_shows_what_is_below_and_leaves_it_alone() {
    let folder = Folder::new();
    let base = pattern(3 << 20, 1);
    std::fs::write(folder.path("base"), &base).unwrap();
    folder.overlay("middle", "base", DiskFormat::Raw);
    let top = folder.overlay("top", "middle", DiskFormat::Qcow2);
    let allowed = format!(",backing={}", folder.0.path().display());
    let mut expected = base.clone();
    for (name, at) in [("middle", 100 << 10), ("top", 1_500 << 10)] {
        let disk = folder.open(name, &allowed);
        assert_eq!(disk.info().size, 3 * MIB);
        assert!(read(&disk, 0, 3 << 20).unwrap() == expected, "{name}");
        write(&disk, at, &[7; 1024]).unwrap();
        expected[at as usize..at as usize + 1024].fill(7);
        assert!(read(&disk, 0, 3 << 20).unwrap() == expected, "{name}: the rest of the cluster is kept");
    }
    let disk = folder.open("top", &allowed);
    let extent = Extent { offset: 0, len: MIB };
    run(&disk, Operation::WriteZeroes { extent, deallocate: true, durable: false }).unwrap();
    run(&disk, Operation::Discard(vec![Extent { offset: 2 * MIB, len: MIB }])).unwrap();
    expected[..1 << 20].fill(0);
    assert!(read(&disk, 0, 2 << 20).unwrap() == expected[..2 << 20], "zeroes hide what is below");
    expected[2 << 20..].fill(0);
    assert!(read(&disk, 2 * MIB, 1 << 20).unwrap() == expected[2 << 20..], "so does a discard");
    drop(disk);
    is_clean(&top);
    assert!(std::fs::read(folder.path("base")).unwrap() == base);
    assert!(as_raw(&folder, &top).is_none_or(|found| found == expected));
}

#[test]
fn overlay_larger_than_what_is_below_ends_in_zeroes() {
    let folder = Folder::new();
    // Not even a whole sector.
    std::fs::write(folder.path("base"), pattern(70_001, 1)).unwrap();
    let backing = Some(("base".into(), DiskFormat::Raw));
    let new = NewImage { path: folder.path("top"), format: DiskFormat::Qcow2, size: Some(MIB), backing };
    create(&new).unwrap();
    let disk = folder.open("top", &format!(",backing={}", folder.0.path().display()));
    let mut expected = pattern(70_001, 1);
    expected.resize(1 << 20, 0);
    assert!(read(&disk, 0, 1 << 20).unwrap() == expected);
    write(&disk, 69_632, &[9; 512]).unwrap();
    expected[69_632..70_144].fill(9);
    assert!(read(&disk, 0, 1 << 20).unwrap() == expected);
}

#[test]
fn backing_file_is_opened_from_the_allowed_folder_only() {
    let folder = Folder::new();
    let inside = folder.path("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(inside.join("good"), pattern(MIB as usize, 1)).unwrap();
    std::fs::write(folder.path("secret"), pattern(MIB as usize, 2)).unwrap();
    std::os::unix::fs::symlink("../secret", inside.join("link")).unwrap();
    std::os::unix::fs::symlink("good", inside.join("fine")).unwrap();
    let allowed = format!(",backing={}", inside.display());
    for (name, below) in [("a", "inside/good"), ("b", "inside/fine"), ("c", "inside/../inside/good")] {
        folder.overlay(name, below, DiskFormat::Raw);
        let message = folder.refused(name, "");
        let hint = format!("add ,backing={}", folder.path(below).parent().unwrap().display());
        assert!(message.contains(&hint), "{message}");
        assert_eq!(read(&folder.open(name, &allowed), 0, 512).unwrap(), pattern(512, 1), "{name}");
    }
    let absolute = folder.path("secret");
    let outside = ["secret", "inside/link", "inside/../secret", absolute.to_str().unwrap()];
    for (i, below) in outside.iter().enumerate() {
        let name = format!("outside-{i}");
        folder.overlay(&name, below, DiskFormat::Raw);
        let message = folder.refused(&name, &allowed);
        assert!(message.contains("it is not in") && message.contains("backing="), "{below}: {message}");
    }
    // Of a name that only begins like the folder's.
    std::fs::create_dir(folder.path("inside-out")).unwrap();
    std::fs::write(folder.path("inside-out/x"), [0; 512]).unwrap();
    folder.overlay("d", "inside-out/x", DiskFormat::Raw);
    assert!(folder.refused("d", &allowed).contains("it is not in"));
    std::fs::remove_file(inside.join("good")).unwrap();
    let message = folder.refused("a", &allowed);
    assert!(message.contains("inside/good") && message.contains("No such file"), "{message}");
}

/// Puts a name and a format into an image's header, in place of those of the same lengths.
fn replace(path: &Path, old: &str, new: &str) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(old.len()).position(|window| window == old.as_bytes()).unwrap();
    bytes[at..at + old.len()].copy_from_slice(new.as_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn chain_that_leads_back_to_itself_or_has_no_end_is_refused() {
    let folder = Folder::new();
    let allowed = format!(",backing={}", folder.0.path().display());
    folder.create("one", MIB);
    folder.overlay("two", "one", DiskFormat::Qcow2);
    let three = folder.overlay("the", "two", DiskFormat::Qcow2);
    replace(&folder.path("two"), "one", "the");
    for options in ["", ",readonly", ",ephemeral"] {
        let message = folder.refused("the", &format!("{allowed}{options}"));
        assert!(message.contains("leads back to itself"), "{options}: {message}");
    }
    replace(&three, "two", "the");
    assert!(folder.refused("the", &allowed).contains("leads back to itself"));

    folder.create("0", MIB);
    for i in 1..70 {
        folder.overlay(&i.to_string(), &(i - 1).to_string(), DiskFormat::Qcow2);
    }
    assert_eq!(read(&folder.open("63", &allowed), 0, 512).unwrap(), [0; 512]);
    assert!(folder.refused("64", &allowed).contains("more than 64 images"));
}

#[test]
fn format_below_is_taken_from_the_header_and_never_guessed() {
    let folder = Folder::new();
    let allowed = format!(",backing={}", folder.0.path().display());
    let base = folder.create("base", MIB);
    let top = folder.overlay("top", "base", DiskFormat::Raw);
    let disk = folder.open("top", &allowed);
    assert_eq!(read(&disk, 0, 512).unwrap(), std::fs::read(&base).unwrap()[..512], "said to be raw");
    drop(disk);
    let mut bytes = std::fs::read(&top).unwrap();
    let kind = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes.windows(4).position(|window| window == kind).unwrap();
    bytes[at + 8..at + 11].copy_from_slice(b"tar");
    std::fs::write(&top, &bytes).unwrap();
    assert!(folder.refused("top", &allowed).contains("its format is \"tar\""));
    // The extension becomes one that nobody knows.
    bytes[at] = 1;
    std::fs::write(&top, bytes).unwrap();
    assert!(folder.refused("top", &allowed).contains("qemu-img rebase -u -F"));
}

#[test]
fn image_has_one_writer_or_many_readers_also_from_above() {
    let folder = Folder::new();
    let allowed = format!(",backing={}", folder.0.path().display());
    folder.create("base", MIB);
    folder.overlay("a", "base", DiskFormat::Qcow2);
    folder.overlay("b", "base", DiskFormat::Qcow2);
    let writer = folder.open("base", "");
    for (name, options) in [("base", ""), ("base", ",readonly"), ("a", &*allowed)] {
        let message = folder.refused(name, options);
        assert!(message.contains("in use by another machine"), "{name}{options}: {message}");
    }
    drop(writer);
    let (a, b) = (folder.open("a", &allowed), folder.open("b", &allowed));
    assert!(folder.refused("base", "").contains("in use"), "somebody stands on it");
    assert!(folder.refused("a", &allowed).contains("in use"));
    let reader = folder.open("base", ",readonly");
    write(&a, 0, &[1; 512]).unwrap();
    assert_eq!(read(&b, 0, 512).unwrap(), [0; 512]);
    drop((a, b, reader));
    folder.open("base", "");
}

#[test]
fn read_only_and_ephemeral_disks_leave_every_byte_alone() {
    let folder = Folder::new();
    let path = folder.create("disk", MIB);
    write(&folder.open("disk", ""), 4096, &pattern(8192, 1)).unwrap();
    let before = std::fs::read(&path).unwrap();
    let disk = folder.open("disk", ",readonly");
    assert!(disk.info().read_only);
    assert_eq!(write(&disk, 0, &[1; 512]).unwrap_err(), IoError::ReadOnly);
    run(&disk, Operation::Flush).unwrap();
    assert_eq!(read(&disk, 4096, 8192).unwrap(), pattern(8192, 1));
    drop(disk);
    let disk = folder.open("disk", ",ephemeral");
    write(&disk, 8192, &[9; 512]).unwrap();
    assert_eq!(read(&disk, 4096, 4608).unwrap()[4096..], [9; 512]);
    drop(disk);
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn new_image_needs_a_size_and_harms_nothing() {
    let folder = Folder::new();
    let new = |name: &str, format, size, backing: Option<(&str, DiskFormat)>| {
        let backing = backing.map(|(path, format)| (path.into(), format));
        create(&NewImage { path: folder.path(name), format, size, backing })
    };
    let (raw, qcow2) = (DiskFormat::Raw, DiskFormat::Qcow2);
    assert_eq!(new("raw", raw, Some(4096), None).unwrap(), 4096);
    assert_eq!(std::fs::read(folder.path("raw")).unwrap(), [0; 4096]);
    assert_eq!(new("top", qcow2, None, Some(("raw", raw))).unwrap(), 4096);
    for (result, message) in [
        (new("raw", qcow2, Some(MIB), None), "is there already"),
        (new("x", qcow2, None, None), "--size 10G"),
        (new("x", qcow2, Some(0), None), "cannot have 0 bytes"),
        (new("x", qcow2, Some(513), None), "multiple of 512"),
        (new("x", qcow2, Some(1 << 60), None), "2048T"),
        (new("x", raw, None, Some(("raw", raw))), "add --format qcow2"),
        (new("x", qcow2, None, Some(("gone", raw))), "as a backing file"),
        (new("x", qcow2, None, Some(("raw", qcow2))), "as a backing file"),
        (new("x/y", raw, Some(512), None), "cannot make the disk image"),
    ] {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(message), "{text}");
        assert!(!folder.path("x").exists());
    }
    assert_eq!(std::fs::read(folder.path("raw")).unwrap(), [0; 4096]);
}

#[test]
fn qcow2_image_that_is_said_to_be_raw_is_warned_of_and_used_as_asked() {
    let folder = Folder::new();
    let path = folder.create("disk", MIB);
    let told: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    let sink = Arc::clone(&told);
    let warner: crate::Warner = Arc::new(move |text| sink.lock().unwrap().push(text));
    let spec = path.to_str().unwrap().parse().unwrap();
    let options = DiskOptions { warner: Some(warner), ..DiskOptions::new(spec) };
    let disk = open(&options).unwrap();
    assert_eq!(read(&disk, 0, 4).unwrap_err(), IoError::Misaligned);
    assert_eq!(read(&disk, 0, 512).unwrap(), std::fs::read(&path).unwrap()[..512]);
    let told = told.lock().unwrap();
    assert!(told.len() == 1 && told[0].contains("add format=qcow2"), "{told:?}");
}
