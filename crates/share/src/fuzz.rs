//! A guest made of bytes: the entry for a fuzzer.
//!
//! Bytes become requests, most of them well formed, so that the depths are reached. What must hold is asserted: nothing panics, every answer
//! is whole and within its room, what is kept is bounded, and what lies beside the folder stays as it was.

use std::path::Path;

use crate::server::Server;
use crate::spec::ShareSpec;
use crate::wire::{MAX_ANSWER, op};

/// Names that mean something.
const NAMES: [&[u8]; 12] =
    [b"a", b"b", b"c", b"d", b"e", b"..", b".", b"", b"../outside", b"a/b", b"/etc/passwd", b"pipe"];
/// What is beside the folder.
const OUTSIDE: &str = "not to be changed";

struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    /// A small number mostly, else one that is no size of anything; never one that fills the host's disk.
    fn number(&mut self) -> u64 {
        match self.byte() {
            byte @ 0..200 => u64::from(byte % 32),
            200..230 => u64::from(self.byte()) << 9,
            230..240 => i64::MAX as u64 - u64::from(self.byte()),
            240..250 => 1 << 63,
            _ => u64::MAX - u64::from(self.byte()),
        }
    }

    fn name(&mut self, body: &mut Vec<u8>) {
        let kind = self.byte();
        body.extend(NAMES[usize::from(kind) % NAMES.len()]);
        if kind < 250 {
            body.push(0);
        }
    }
}

/// Lets a guest that asks for what `input` says loose on a folder in `place`, which is emptied before.
///
/// # Panics
/// If the place cannot be used, or when something that must hold does not.
pub fn run(place: &Path, input: &[u8]) {
    let (shared, outside) = (place.join("shared"), place.join("outside"));
    clear(&shared);
    std::fs::create_dir_all(&shared).expect("the place is ours");
    std::fs::write(&outside, OUTSIDE).expect("the place is ours");
    std::os::unix::fs::symlink("../outside", shared.join("e")).expect("the place is ours");
    let mut bytes = Bytes(input.iter());
    let read_only = bytes.byte() == 0;
    let spec = ShareSpec { folder: shared.clone(), tag: "fuzz".to_owned(), read_only };
    let server = Server::new(&spec).expect("the folder is there");
    let mut count = 0;
    while !bytes.0.as_slice().is_empty() {
        step(&server, &mut bytes);
        count += 1;
    }
    let (nodes, open, files) = server.kept();
    assert!(nodes <= count * 64 && open <= nodes && files <= count);
    assert_eq!(std::fs::read_to_string(&outside).expect("it is there"), OUTSIDE);
    let names = std::fs::read_dir(place).expect("it is there").count();
    assert_eq!(names, 2, "something is beside the folder");
    if read_only {
        assert_eq!(std::fs::read_dir(&shared).expect("it is there").count(), 1);
    }
}

/// Removes a folder in which the guest may have taken everybody's permissions away.
fn clear(folder: &Path) {
    let _ = std::fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o700));
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            clear(&entry.path());
        }
    }
    let _ = std::fs::remove_dir_all(folder);
}

fn step(server: &Server, bytes: &mut Bytes<'_>) {
    let opcode = match bytes.byte() {
        byte @ 0..240 => u32::from(byte % 53),
        _ => u32::from(bytes.byte()) << bytes.byte().min(24),
    };
    let mut body = Vec::new();
    let numbers = |body: &mut Vec<u8>, bytes: &mut Bytes<'_>, shape: &[usize]| {
        for len in shape {
            body.extend(&bytes.number().to_le_bytes()[..*len]);
        }
    };
    // How many arguments of which width come first, and how many names behind them.
    let (shape, names): (&[usize], usize) = match opcode {
        op::LOOKUP | op::UNLINK | op::RMDIR => (&[], 1),
        op::SYMLINK => (&[], 2),
        op::MKNOD => (&[4, 4, 4, 4], 1),
        op::CREATE => (&[4, 4, 4, 4], 1),
        op::MKDIR => (&[4, 4], 1),
        op::LINK => (&[8], 1),
        op::RENAME => (&[8], 2),
        op::RENAME2 => (&[8, 4, 4], 2),
        op::SETATTR => (&[4, 4, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4], 0),
        op::BATCH_FORGET => (&[4, 4, 8, 8, 8, 8], 0),
        op::INIT => (&[4, 4, 4, 4], 0),
        op::WRITE | op::READ | op::READDIR | op::READDIRPLUS => (&[8, 8, 4, 4, 8, 4, 4], 0),
        _ => (&[8, 8, 8, 8, 8, 8, 8], 0),
    };
    numbers(&mut body, bytes, shape);
    (0..names).for_each(|_| bytes.name(&mut body));
    if opcode == op::WRITE {
        body.extend([bytes.byte(); 31]);
    }
    if opcode == op::INIT && bytes.byte() < 128 {
        body[..8].copy_from_slice(&[7, 0, 0, 0, 31, 0, 0, 0]);
    }
    let node = bytes.number() % 64;
    let unique = 0x1122_3344_5566_7788_u64;
    let mut request = ((40 + body.len()) as u32).to_le_bytes().to_vec();
    request.extend(opcode.to_le_bytes());
    request.extend(unique.to_le_bytes());
    request.extend(node.to_le_bytes());
    request.extend([0; 16]);
    request.extend(&body);
    let cut = bytes.byte();
    if cut > 250 {
        request.truncate(usize::from(bytes.byte()));
    }
    let room = match bytes.byte() {
        byte @ 200.. => usize::from(byte - 200),
        _ => MAX_ANSWER,
    };
    let mut answer = Vec::new();
    server.answer(&request, room, &mut answer);
    assert!(answer.len() <= room);
    if let Some((len, _)) = answer.split_first_chunk::<4>() {
        assert_eq!(u32::from_le_bytes(*len) as usize, answer.len());
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn random_guests_harm_nobody() {
        let place = tempfile::tempdir().unwrap();
        ringfence_helper::fuzz::inputs(300, 2000).for_each(|input| super::run(place.path(), &input));
    }
}
