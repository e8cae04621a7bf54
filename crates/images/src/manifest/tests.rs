use std::fs::File;
use std::time::{Duration, SystemTime};

use super::*;

/// A folder with one recorded file of ten bytes.
fn sample() -> (tempfile::TempDir, Manifest) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    fs::write(folder.path().join("file"), b"0123456789").expect("writes");
    let mut manifest = Manifest::new("shell", "6.1");
    manifest.record(folder.path(), "file").expect("records");
    manifest.store(folder.path()).expect("stores");
    (folder, manifest)
}

fn set_time(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    File::options().write(true).open(path).expect("opens").set_modified(time).expect("sets");
}

#[test]
fn stored_manifest_is_loaded_again() {
    let (folder, manifest) = sample();
    assert_eq!(Manifest::load(folder.path()), Some(manifest.clone()));
    assert_eq!(manifest.size(), 10);
    assert!(manifest.intact(folder.path(), "file", true));
    assert!(!manifest.intact(folder.path(), "never recorded", false));
}

#[test]
fn damaged_manifests_are_as_good_as_none() {
    let (folder, _) = sample();
    let path = folder.path().join(FILE_NAME);
    let good = fs::read_to_string(&path).expect("reads");
    let bad = [
        String::new(),
        good[..good.len() / 2].to_owned(),
        good.replace("\"format\": 1", "\"format\": 2"),
        good.replace("\"file\"", "\"../file\""),
        good.replace("\"file\"", "\"/file\""),
        good.replace("\"file\"", "\"\""),
        good.replace("\"size\": 10", "\"size\": -1"),
        "[".repeat(100_000),
        " ".repeat(5 << 20) + &good,
    ];
    for text in bad {
        assert_ne!(text, good);
        fs::write(&path, &text).expect("writes");
        assert_eq!(Manifest::load(folder.path()), None, "{}", text.chars().take(80).collect::<String>());
    }
    fs::remove_file(&path).expect("removes");
    assert_eq!(Manifest::load(folder.path()), None);
}

#[test]
fn changed_size_is_noticed() {
    let (folder, manifest) = sample();
    fs::write(folder.path().join("file"), b"012345678").expect("writes");
    assert!(!manifest.intact(folder.path(), "file", false));
}

#[test]
fn changed_byte_is_noticed_through_the_time() {
    let (folder, manifest) = sample();
    let path = folder.path().join("file");
    fs::write(&path, b"0123456780").expect("writes");
    set_time(&path, 1_000_000);
    assert!(!manifest.intact(folder.path(), "file", false));
    assert!(!manifest.all_intact(folder.path(), |_| true));
}

#[test]
fn touched_file_with_the_same_bytes_is_intact() {
    let (folder, manifest) = sample();
    set_time(&folder.path().join("file"), 1_000_000);
    assert!(manifest.intact(folder.path(), "file", false));
}

#[test]
fn changed_byte_with_the_old_time_is_found_by_a_thorough_look_only() {
    let (folder, mut manifest) = sample();
    let path = folder.path().join("file");
    set_time(&path, 1_000_000);
    manifest.record(folder.path(), "file").expect("records");
    assert_eq!(manifest.files.len(), 1, "the old record is replaced");
    fs::write(&path, b"0123456780").expect("writes");
    set_time(&path, 1_000_000);
    assert!(manifest.intact(folder.path(), "file", false));
    assert!(!manifest.intact(folder.path(), "file", true));
}

#[test]
fn missing_files_and_links_in_their_place_are_noticed() {
    let (folder, manifest) = sample();
    let path = folder.path().join("file");
    fs::rename(&path, folder.path().join("other")).expect("moves");
    assert!(!manifest.intact(folder.path(), "file", false));
    std::os::unix::fs::symlink("other", &path).expect("links");
    assert!(!manifest.intact(folder.path(), "file", false));
}
