//! Ways out of the folder, and changes where none may be. All fail.

use std::os::unix::fs::{FileTypeExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use super::client::{Client, read_in, text, words};
use crate::nodes::ROOT;
use crate::wire::{op, set};

#[test]
fn names_that_are_not_one_component_are_refused() {
    let client = Client::new();
    let folder = client.make_folder(ROOT, "d").unwrap();
    for name in ["..", ".", "", "/", "../secret", "d/../../secret", "/etc/passwd", "a/"] {
        for at in [ROOT, folder] {
            assert_eq!(client.look_up(at, name), Err(Errno::INVAL), "{name}");
            assert_eq!(client.create(at, name, 0o600), Err(Errno::INVAL), "{name}");
            assert_eq!(client.make_folder(at, name), Err(Errno::INVAL), "{name}");
            assert_eq!(client.symlink(at, name, "x"), Err(Errno::INVAL), "{name}");
            assert_eq!(client.link(folder, at, name), Err(Errno::INVAL), "{name}");
            assert_eq!(client.unlink(at, name), Err(Errno::INVAL), "{name}");
            assert_eq!(client.rename(at, name, ROOT, "n", 0), Err(Errno::INVAL), "{name}");
            assert_eq!(client.rename(ROOT, "d", at, name, 0), Err(Errno::INVAL), "{name}");
        }
    }
    assert_eq!(client.look_up(ROOT, &"n".repeat(256)), Err(Errno::NAMETOOLONG));
    assert_eq!(client.call(op::LOOKUP, ROOT, b"no end"), Err(Errno::INVAL));
}

#[test]
fn symbolic_links_are_not_followed() {
    let client = Client::new();
    let secret = client.folder.path().join("secret");
    symlink(&secret, client.host("file")).unwrap();
    symlink(client.folder.path(), client.host("folder")).unwrap();
    let (file, attributes) = client.look_up(ROOT, "file").unwrap();
    assert_eq!(attributes.mode & 0o170_000, 0o120_000);
    for flags in [0, 1, 2, 0o1000] {
        assert_eq!(client.open(file, flags), Err(Errno::PERM));
    }
    assert_eq!(client.set(file, set::SIZE, 0), Err(Errno::INVAL));
    assert_eq!(client.set(file, set::MODE, 0o777), Err(Errno::OPNOTSUPP));
    let (folder, _) = client.look_up(ROOT, "folder").unwrap();
    assert_eq!(client.look_up(folder, "secret"), Err(Errno::NOTDIR));
    assert_eq!(client.open_folder(folder), Err(Errno::NOTDIR));
    assert_eq!(client.create(folder, "new", 0o600), Err(Errno::NOTDIR));
    // CREATE of what is a link already, with and without "only if new".
    assert_eq!(client.create(ROOT, "file", 0o600), Err(Errno::PERM));
    let body = [words(&[2 | 0o200, 0o600, 0, 0]), text(&["file"])].concat();
    assert_eq!(client.call(op::CREATE, ROOT, &body), Err(Errno::EXIST));
    // A hard link to the link is one to the link.
    client.link(file, ROOT, "again").unwrap();
    assert!(client.host("again").is_symlink());
    assert_eq!(std::fs::read_to_string(secret).unwrap(), "secret");
}

#[test]
fn folder_that_becomes_a_link_under_the_guest_leads_nowhere() {
    let client = Client::new();
    let outside = client.folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("name"), "outside").unwrap();
    let real = client.host("real");
    std::fs::create_dir(&real).unwrap();
    std::fs::write(real.join("name"), "inside").unwrap();
    let stop = AtomicBool::new(false);
    let (inside, refused) = std::thread::scope(|scope| {
        // Somebody on the host, or a second guest, swaps a folder and a link to the outside all the time.
        scope.spawn(|| {
            symlink(&outside, client.host("link")).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                let (a, b) = (client.host("real"), client.host("link"));
                rustix::fs::renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, exchange).unwrap();
            }
        });
        let (mut inside, mut refused) = (0, 0);
        for _ in 0..20_000 {
            let found = client.look_up(ROOT, "real").and_then(|(folder, _)| client.look_up(folder, "name"));
            let Ok(handle) = found.and_then(|(file, _)| client.open(file, 0)) else {
                refused += 1;
                continue;
            };
            // No panic here, which would leave the other thread running.
            inside += u32::from(client.read(handle, 0, 10) == Ok(b"inside".to_vec()));
            let _ = client.call(op::RELEASE, 0, &read_in(handle, 0, 0));
        }
        stop.store(true, Ordering::Relaxed);
        (inside, refused)
    });
    assert!(inside > 0 && refused > 0, "the race was run: {inside} {refused}");
    assert_eq!(inside + refused, 20_000, "something else was read");
}

#[test]
fn read_only_folder_does_not_change() {
    let client = Client::read_only();
    std::fs::write(client.host("a"), "stays").unwrap();
    std::fs::create_dir(client.host("d")).unwrap();
    let before = std::fs::metadata(client.host("a")).unwrap();
    let (file, _) = client.look_up(ROOT, "a").unwrap();
    let handle = client.open(file, 0).unwrap();
    assert_eq!(client.read(handle, 0, 9).unwrap(), b"stays");
    for flags in [1, 2, 0o1000, 0o1001] {
        assert_eq!(client.open(file, flags), Err(Errno::ROFS));
    }
    assert_eq!(client.write(handle, 0, b"x"), Err(Errno::ROFS));
    assert_eq!(client.create(ROOT, "b", 0o600), Err(Errno::ROFS));
    assert_eq!(client.create(ROOT, "a", 0o600), Err(Errno::ROFS));
    assert_eq!(client.make_folder(ROOT, "b"), Err(Errno::ROFS));
    assert_eq!(client.symlink(ROOT, "b", "x"), Err(Errno::ROFS));
    assert_eq!(client.link(file, ROOT, "b"), Err(Errno::ROFS));
    assert_eq!(client.rename(ROOT, "a", ROOT, "b", 0), Err(Errno::ROFS));
    assert_eq!(client.unlink(ROOT, "a"), Err(Errno::ROFS));
    assert_eq!(client.set(file, set::SIZE, 0), Err(Errno::ROFS));
    assert_eq!(client.set(file, set::MODE, 0o777), Err(Errno::ROFS));
    for opcode in [op::MKNOD, op::RMDIR, op::RENAME, op::FALLOCATE, op::COPY_FILE_RANGE] {
        assert_eq!(client.call(opcode, ROOT, &[0; 64]), Err(Errno::ROFS), "{opcode}");
    }
    assert_eq!(std::fs::read_to_string(client.host("a")).unwrap(), "stays");
    let after = std::fs::metadata(client.host("a")).unwrap();
    assert_eq!(
        (before.permissions(), before.modified().unwrap()),
        (after.permissions(), after.modified().unwrap())
    );
    assert_eq!(std::fs::read_dir(client.host("")).unwrap().count(), 2);
}

#[test]
fn devices_are_not_made_and_pipes_not_opened() {
    let client = Client::new();
    let node = |mode: u32, name| [words(&[mode, 0x103, 0, 0]), text(&[name])].concat();
    for kind in [0o020_000, 0o060_000, 0o040_000, 0o120_000] {
        assert_eq!(client.call(op::MKNOD, ROOT, &node(kind | 0o666, "dev")), Err(Errno::PERM));
    }
    client.call(op::MKNOD, ROOT, &node(0o010_644, "pipe")).unwrap();
    assert!(std::fs::metadata(client.host("pipe")).unwrap().file_type().is_fifo());
    let (pipe, _) = client.look_up(ROOT, "pipe").unwrap();
    assert_eq!(client.open(pipe, 0), Err(Errno::PERM));
    assert_eq!(client.create(ROOT, "pipe", 0o600), Err(Errno::PERM));
}
