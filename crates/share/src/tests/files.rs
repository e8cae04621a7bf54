//! What a guest does with files every day, checked on the host.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::io::Errno;

use super::client::{Client, read_in, text};
use crate::nodes::ROOT;
use crate::wire::{MAX_DATA, op, set};

#[test]
fn what_the_guest_writes_the_host_reads_and_the_other_way_round() {
    let client = Client::new();
    let (node, handle) = client.create(ROOT, "a", 0o640).unwrap();
    let data: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
    for (index, part) in data.chunks(MAX_DATA).enumerate() {
        assert_eq!(client.write(handle, (index * MAX_DATA) as u64, part), Ok(part.len() as u32));
    }
    assert_eq!(std::fs::read(client.host("a")).unwrap(), data);
    let attributes = client.attributes(node).unwrap();
    assert_eq!((attributes.size, attributes.mode & 0o7777), (300_000, 0o640));
    std::fs::write(client.host("a"), "host").unwrap();
    assert_eq!(client.read(handle, 0, 100).unwrap(), b"host");
    assert_eq!(client.read(handle, 2, 1).unwrap(), b"s");
    assert_eq!(client.read(handle, 400, 1).unwrap(), b"");
    client.call(op::RELEASE, node, &read_in(handle, 0, 0)).unwrap();
    assert_eq!(client.read(handle, 0, 1), Err(Errno::BADF));
}

#[test]
fn names_are_made_moved_linked_and_removed() {
    let client = Client::new();
    let folder = client.make_folder(ROOT, "d").unwrap();
    let (file, _) = client.create(folder, "f", 0o600).unwrap();
    assert_eq!(client.link(file, ROOT, "g").unwrap().links, 2);
    assert_eq!(
        std::fs::metadata(client.host("g")).unwrap().ino(),
        std::fs::metadata(client.host("d/f")).unwrap().ino()
    );
    assert_eq!(client.look_up(ROOT, "g").unwrap().0, file, "one file, one node");
    client.rename(folder, "f", ROOT, "h", 0).unwrap();
    assert_eq!(client.rename(ROOT, "h", ROOT, "g", 1), Err(Errno::EXIST));
    client.unlink(ROOT, "g").unwrap();
    assert_eq!(client.attributes(file).unwrap().links, 1);
    let link = client.symlink(ROOT, "s", "/etc/passwd").unwrap();
    assert_eq!(client.call(op::READLINK, link, &[]).unwrap(), b"/etc/passwd");
    assert_eq!(std::fs::read_link(client.host("s")).unwrap().to_str(), Some("/etc/passwd"));
    client.rename(ROOT, "h", ROOT, "s", 2).unwrap();
    assert!(client.host("h").is_symlink() && client.host("s").is_file());
    client.call(op::RMDIR, ROOT, &text(&["d"])).unwrap();
    assert_eq!(client.look_up(ROOT, "d"), Err(Errno::NOENT));
}

#[test]
fn what_a_user_of_the_guest_makes_is_that_users_if_root_shares() {
    use super::client::words;
    let client = Client::new();
    let made = [
        (op::MKNOD, [words(&[0o100_644, 0, 0, 0]), text(&["a"])].concat(), "a"),
        (op::CREATE, [words(&[2, 0o644, 0, 0]), text(&["b"])].concat(), "b"),
        (op::MKDIR, [words(&[0o755, 0]), text(&["c"])].concat(), "c"),
        (op::SYMLINK, text(&["d", "x"]), "d"),
    ];
    let is_root = rustix::process::geteuid().is_root();
    for (opcode, body, name) in made {
        client.call_as(1234, opcode, ROOT, &body).unwrap();
        let about = std::fs::symlink_metadata(client.host(name)).unwrap();
        let own = std::fs::metadata(client.host("")).unwrap();
        let wanted = if is_root { (1234, 1234) } else { (own.uid(), own.gid()) };
        assert_eq!((about.uid(), about.gid()), wanted, "{name}");
    }
    // In a folder whose group its files have, they have it.
    if is_root {
        std::os::unix::fs::chown(client.host(""), None, Some(77)).unwrap();
        std::fs::set_permissions(client.host(""), PermissionsExt::from_mode(0o2755)).unwrap();
        client.call_as(1234, op::MKDIR, ROOT, &[words(&[0o755, 0]), text(&["e"])].concat()).unwrap();
        let about = std::fs::metadata(client.host("e")).unwrap();
        assert_eq!((about.uid(), about.gid()), (1234, 77));
    }
}

#[test]
fn attributes_are_set() {
    let client = Client::new();
    let (node, handle) = client.create(ROOT, "a", 0o600).unwrap();
    client.write(handle, 0, b"123456").unwrap();
    assert_eq!(client.set(node, set::SIZE, 3).unwrap().size, 3);
    assert_eq!(client.set(node, set::MTIME, 1_000_000).unwrap().mtime, 1_000_000);
    assert_eq!(client.set(node, set::MODE, 0o444).unwrap().mode & 0o7777, 0o444);
    assert_eq!(std::fs::read(client.host("a")).unwrap(), b"123");
    let link = client.symlink(ROOT, "s", "a").unwrap();
    assert_eq!(client.set(link, set::MTIME, 77).unwrap().mtime, 77);
    assert_eq!(std::fs::symlink_metadata(client.host("s")).unwrap().mtime(), 77);
    assert_eq!(std::fs::metadata(client.host("a")).unwrap().mtime(), 1_000_000, "not followed");
}

#[test]
fn large_folders_are_listed_whole_in_small_answers() {
    let client = Client::new();
    let mut names: Vec<String> = (0..700).map(|i| format!("file-{i}{}", "x".repeat(i % 50))).collect();
    for name in &names {
        std::fs::write(client.host(name), "").unwrap();
    }
    names.extend([".".to_owned(), "..".to_owned()]);
    names.sort();
    let handle = client.open_folder(ROOT).unwrap();
    for (size, plus) in [(4096, false), (4096, true), (600, true), (MAX_DATA as u32, false)] {
        let mut found = client.list(ROOT, handle, size, plus);
        found.sort();
        assert!(found.iter().map(|(name, _)| name).eq(&names), "{size} {plus}");
        assert!(!plus || found.iter().all(|(name, node)| (*node == 0) == name.starts_with('.')));
    }
    assert_eq!(client.call(op::READDIR, ROOT, &read_in(handle, 0, 8)), Err(Errno::INVAL));
}

#[test]
fn set_user_id_never_gets_onto_a_file() {
    let client = Client::new();
    let mode = |name| std::fs::metadata(client.host(name)).unwrap().permissions().mode() & 0o7777;
    let (node, _) = client.create(ROOT, "a", 0o6755).unwrap();
    assert_eq!(mode("a"), 0o755);
    client.set(node, set::MODE, 0o6711).unwrap();
    assert_eq!(mode("a"), 0o711);
    // A program that the host has put there stays what it is only while the guest does not write to it.
    std::fs::write(client.host("b"), "program").unwrap();
    std::fs::set_permissions(client.host("b"), PermissionsExt::from_mode(0o4755)).unwrap();
    let (node, _) = client.look_up(ROOT, "b").unwrap();
    client.open(node, 0).unwrap();
    assert_eq!(mode("b"), 0o4755);
    client.open(node, 1).unwrap();
    assert_eq!(mode("b"), 0o755);
}

#[test]
fn files_are_found_again_after_their_descriptors_were_closed() {
    let mut client = Client::new();
    let root =
        rustix::fs::open(client.host(""), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    client.server.nodes = crate::nodes::Nodes::new(root, 3).unwrap();
    let mut folders = vec![ROOT];
    for depth in 0..20 {
        folders.push(client.make_folder(folders[depth], "d").unwrap());
    }
    let (deep, handle) = client.create(folders[20], "f", 0o600).unwrap();
    client.write(handle, 0, b"deep").unwrap();
    for i in 0..50 {
        client.create(ROOT, &format!("x{i}"), 0o600).unwrap();
        assert!(client.server.kept().1 <= 3);
    }
    assert_eq!(client.attributes(deep).unwrap().size, 4);
    // It is found where it was moved to, also below a folder that was.
    client.rename(ROOT, "d", ROOT, "e", 0).unwrap();
    client.rename(folders[20], "f", folders[3], "g", 0).unwrap();
    (0..50).for_each(|i| _ = client.look_up(ROOT, &format!("x{i}")).unwrap());
    assert_eq!(client.attributes(deep).unwrap().size, 4);
    assert_eq!(client.attributes(folders[20]).unwrap().mode & 0o777, 0o755);
    // Another file in its place is not taken for it.
    (0..50).for_each(|i| _ = client.look_up(ROOT, &format!("x{i}")).unwrap());
    let place = client.host("e/d/d/g");
    std::fs::rename(&place, client.host("kept")).unwrap();
    std::fs::write(&place, "other").unwrap();
    assert_eq!(client.attributes(deep), Err(Errno::STALE));
}

#[test]
fn guest_that_begins_anew_has_forgotten_all() {
    let client = Client::new();
    let (node, handle) = client.create(ROOT, "a", 0o600).unwrap();
    client.init();
    assert_eq!(client.server.kept(), (0, 0, 0));
    assert_eq!((client.attributes(node), client.read(handle, 0, 1)), (Err(Errno::STALE), Err(Errno::BADF)));
}

#[test]
fn forgotten_nodes_are_gone() {
    let client = Client::new();
    let (node, _) = client.create(ROOT, "a", 0o600).unwrap();
    client.look_up(ROOT, "a").unwrap();
    client.forget(node, 1);
    assert_eq!(client.server.kept().0, 1);
    client.forget(node, u64::MAX);
    assert_eq!(client.server.kept().0, 0);
    client.forget(ROOT, 5);
    client.attributes(ROOT).unwrap();
}
