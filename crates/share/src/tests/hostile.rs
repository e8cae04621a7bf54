//! Requests that make no sense, and guests that want too much.

use rustix::io::Errno;

use super::client::{Client, read_in, text, words};
use crate::files::Files;
use crate::nodes::ROOT;
use crate::wire::{MAX_ANSWER, MAX_DATA, op};

#[test]
fn requests_cut_anywhere_are_refused() {
    let client = Client::new();
    let mut whole = 40_u32.to_le_bytes().to_vec();
    whole.extend(op::GETATTR.to_le_bytes());
    whole.extend([7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    whole.extend([0; 16]);
    for len in 0..whole.len() {
        let mut answer = Vec::new();
        client.server.answer(&whole[..len], 100, &mut answer);
        assert_eq!(answer.len(), 16, "{len}");
        assert_eq!(answer[4..8], (-Errno::INVAL.raw_os_error()).to_le_bytes());
    }
    // Lengths in the header that are not the message's.
    for len in [0_u32, 39, 41, u32::MAX] {
        whole[..4].copy_from_slice(&len.to_le_bytes());
        let mut answer = Vec::new();
        client.server.answer(&whole, 100, &mut answer);
        assert_eq!(answer[4..8], (-Errno::INVAL.raw_os_error()).to_le_bytes(), "{len}");
    }
    // Arguments that are too short, of every request there may be.
    for opcode in 0..5000 {
        for len in [0, 1, 7, 15, 39] {
            let _ = if [op::FORGET, op::BATCH_FORGET, op::INTERRUPT].contains(&opcode) {
                Ok(Vec::new())
            } else {
                client.call(opcode, ROOT, &vec![0xff; len])
            };
        }
    }
}

#[test]
fn unknown_nodes_and_handles_are_refused() {
    let client = Client::new();
    for node in [0, 2, u64::MAX] {
        assert_eq!(client.attributes(node), Err(Errno::STALE));
        assert_eq!(client.look_up(node, "a"), Err(Errno::STALE));
        assert_eq!(client.link(node, ROOT, "a"), Err(Errno::STALE));
        assert_eq!(client.open(node, 0), Err(Errno::STALE));
        client.forget(node, u64::MAX);
    }
    let (_, file) = client.create(ROOT, "a", 0o600).unwrap();
    let folder = client.open_folder(ROOT).unwrap();
    assert_eq!(client.read(folder, 0, 1), Err(Errno::BADF));
    assert_eq!(client.call(op::READDIR, ROOT, &read_in(file, 0, 4096)), Err(Errno::BADF));
    assert_eq!(client.read(u64::MAX, 0, 1), Err(Errno::BADF));
}

#[test]
fn sizes_beyond_all_bounds_are_cut_or_refused() {
    let client = Client::new();
    let (_, handle) = client.create(ROOT, "a", 0o600).unwrap();
    std::fs::write(client.host("a"), vec![1; 2 * MAX_DATA]).unwrap();
    assert_eq!(client.read(handle, 0, u32::MAX).unwrap().len(), MAX_DATA);
    assert_eq!(client.call_with_room(op::READ, 0, &read_in(handle, 0, 4096), 116).unwrap().len(), 100);
    assert!(client.read(handle, u64::MAX, 1).is_err());
    // A write that says that it has more than it has.
    let body = [read_in(handle, 0, u32::MAX), vec![0; 10]].concat();
    assert_eq!(client.call(op::WRITE, 0, &body), Err(Errno::INVAL));
    assert!(client.write(handle, u64::MAX - 5, b"0123456789").is_err());
    let folder = client.open_folder(ROOT).unwrap();
    client.call(op::READDIR, ROOT, &read_in(folder, 0, u32::MAX)).unwrap();
    let _ = client.call(op::READDIR, ROOT, &read_in(folder, u64::MAX, 4096));
    // No room for the answer, or not even for its head.
    assert_eq!(client.call_with_room(op::GETATTR, ROOT, &[0; 16], 119), Err(Errno::IO));
    let mut answer = Vec::new();
    client.server.answer(&[0; 100], 15, &mut answer);
    assert!(answer.is_empty());
    assert_eq!(client.call_with_room(op::LOOKUP, ROOT, &text(&["a"]), usize::MAX).unwrap().len(), 128);
    const { assert!(MAX_ANSWER > MAX_DATA) };
}

#[test]
fn open_files_and_nodes_are_bounded() {
    let mut client = Client::new();
    client.server.files = Files::new(100);
    client.server.nodes.limit(200);
    let (node, _) = client.create(ROOT, "a", 0o600).unwrap();
    let opened = (0..1000).filter(|_| client.open(node, 0).is_ok()).count();
    assert_eq!(opened, 99);
    assert_eq!(client.open(node, 0), Err(Errno::NFILE));
    assert_eq!(client.open_folder(ROOT), Err(Errno::NFILE));
    let made = (0..300).filter(|i| client.make_folder(ROOT, &format!("d{i}")).is_ok()).count();
    assert_eq!((made, client.server.kept()), (199, (200, 200, 100)));
    assert_eq!(client.look_up(ROOT, "d299"), Err(Errno::NFILE));
    client.init();
    client.open_folder(ROOT).unwrap();
}

#[test]
fn kernels_from_before_virtio_fs_are_refused() {
    let client = Client::new();
    for (major, minor) in [(6, 99), (7, 30), (0, 0)] {
        assert_eq!(client.call(op::INIT, 0, &words(&[major, minor, 0, 0])), Err(Errno::PROTO));
    }
}
