use super::*;
use crate::error::Faults;
use crate::testing::{ENGINES, Image, pattern, read, write};
use crate::{SECTOR, run};

#[test]
fn guest_sees_its_writes_and_the_image_stays_as_it_was() {
    const SECTORS: u64 = 8192;
    for engine in ENGINES {
        let original = pattern((SECTORS * SECTOR) as usize, 7);
        let image = Image::new(&original);
        let disk = image.open(&format!(",ephemeral,io={engine}"));
        let mut model = original.clone();
        let mut random = 99_u64;
        let mut next = |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % limit
        };
        for step in 0..400 {
            let (offset, len) = (next(SECTORS - 300) * SECTOR, (next(300) + 1) * SECTOR);
            let range = offset as usize..(offset + len) as usize;
            match next(4) {
                0 => {
                    let bytes = pattern(len as usize, step as u8);
                    model[range].copy_from_slice(&bytes);
                    write(&disk, offset, &bytes).unwrap();
                }
                1 => {
                    model[range].fill(0);
                    let extent = Extent { offset, len };
                    run(&disk, Operation::WriteZeroes { extent, deallocate: false, durable: true }).unwrap();
                }
                _ => assert!(read(&disk, offset, len as usize).unwrap() == model[range], "{engine} {step}"),
            }
        }
        run(&disk, Operation::Flush).unwrap();
        assert!(read(&disk, 0, model.len()).unwrap() == model);
        drop(disk);
        assert!(image.bytes() == original, "{engine}");
    }
}

#[test]
fn discard_touches_only_what_the_layer_holds() {
    let image = Image::new(&pattern(8192, 7));
    let disk = image.open(",ephemeral");
    write(&disk, 1024, &[9; 512]).unwrap();
    let all = Extent { offset: 0, len: 8192 };
    run(&disk, Operation::Discard(vec![all, all])).unwrap();
    let mut expected = pattern(8192, 7);
    expected[1024..1536].fill(0);
    assert_eq!(read(&disk, 0, 8192).unwrap(), expected);
}

#[test]
fn two_machines_share_an_image_and_see_only_their_own_writes() {
    let image = Image::new(&[0; 4096]);
    let (a, b) = (image.open(",ephemeral"), image.open(",ephemeral"));
    write(&a, 0, &[1; 512]).unwrap();
    write(&b, 512, &[2; 512]).unwrap();
    assert_eq!(read(&a, 0, 1024).unwrap(), [[1; 512], [0; 512]].concat());
    assert_eq!(read(&b, 0, 1024).unwrap(), [[0; 512], [2; 512]].concat());
    assert!(!a.info().read_only);
    assert_eq!(write(&a, 4096, &[0; 512]).unwrap_err(), IoError::OutOfRange);
}

#[test]
fn layer_has_no_name_and_a_useless_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let (file, place) = unlinked_file(&[missing.clone(), folder.path().to_owned()], 1 << 30).unwrap();
    assert_eq!(place, folder.path());
    assert_eq!(file.metadata().unwrap().len(), 1 << 30);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let error = unlinked_file(std::slice::from_ref(&missing), 512).unwrap_err().to_string();
    assert!(error.contains(&missing.display().to_string()) && error.contains("TMPDIR"), "{error}");
}

#[test]
fn full_layer_names_its_folder_and_not_only_the_image() {
    let messages: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = Arc::clone(&messages);
    let observer: crate::FaultObserver =
        Arc::new(move |fault: &crate::Fault| sink.lock().unwrap().push(fault.to_string()));
    let faults = Faults::new(Path::new("root.img"), Some(observer)).in_layer("/var/tmp".into());
    let error = io::Error::from_raw_os_error(libc::ENOSPC);
    assert_eq!(faults.report(crate::IoKind::Write, 512, error), IoError::NoSpace);
    let text = messages.lock().unwrap().concat();
    for part in ["ephemeral disk root.img keeps in /var/tmp", "at byte 512", "TMPDIR"] {
        assert!(text.contains(part), "{text}");
    }
}
