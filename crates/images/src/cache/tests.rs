use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::*;

fn cache() -> (tempfile::TempDir, Cache) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let cache = Cache::at(folder.path().join("deep/ringfence"));
    (folder, cache)
}

#[test]
fn published_folder_replaces_the_older_one_and_can_be_retired() {
    let (_folder, cache) = cache();
    let lock = cache.lock(&mut || {}).expect("locks");
    for text in ["old", "new"] {
        let scratch = cache.scratch(&lock).expect("makes");
        let ready = scratch.path().join("ready");
        fs::create_dir(&ready).expect("makes");
        fs::write(ready.join("file"), text).expect("writes");
        cache.publish(&lock, "shell:6.12", &ready).expect("publishes");
        assert_eq!(fs::read_to_string(cache.image("shell:6.12").join("file")).expect("reads"), text);
    }
    assert!(cache.retire(&lock, "shell:6.12").expect("retires"));
    assert!(!cache.retire(&lock, "shell:6.12").expect("retires"));
    assert!(!cache.image("shell:6.12").exists());
}

#[test]
fn scratch_sweeps_what_a_killed_process_left() {
    let (_folder, cache) = cache();
    let lock = cache.lock(&mut || {}).expect("locks");
    let left = cache.root().join("tmp/left-over");
    fs::create_dir_all(&left).expect("makes");
    let scratch = cache.scratch(&lock).expect("makes");
    assert!(!left.exists() && scratch.path().exists());
}

#[test]
fn second_holder_waits_and_is_told_so() {
    let (_folder, cache) = cache();
    let lock = cache.lock(&mut || {}).expect("locks");
    let released = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut waited = false;
            let _lock = cache.lock(&mut || waited = true).expect("locks");
            assert!(waited && released.load(Ordering::SeqCst));
        });
        std::thread::sleep(Duration::from_millis(50));
        released.store(true, Ordering::SeqCst);
        drop(lock);
    });
}

#[test]
fn names_stay_inside_the_image_folder() {
    let cache = Cache::at("/c");
    assert_eq!(cache.image("shell:6.12"), Path::new("/c/images/shell-6.12"));
    assert_eq!(cache.image("../x"), Path::new("/c/images/..-x"));
}

#[test]
fn no_space_has_an_error_of_its_own() {
    let error = at_path("write", Path::new("/x"))(io::ErrorKind::StorageFull.into());
    assert!(matches!(error, CacheError::DiskFull { .. }));
    assert!(error.to_string().contains(CACHE_VARIABLE));
    // A device that is always full; present on every Linux.
    let error = write_durably(Path::new("/dev/full"), b"x").expect_err("is full");
    assert!(matches!(error, CacheError::DiskFull { .. }), "{error}");
}
