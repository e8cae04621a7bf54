//! The guest's side: requests made, answers taken apart.

use std::path::Path;

use rustix::io::Errno;

use crate::server::Server;
use crate::spec::ShareSpec;
use crate::wire::{MAX_ANSWER, op};

/// A guest with a folder of its own on the host.
pub(super) struct Client {
    pub(super) folder: tempfile::TempDir,
    pub(super) server: Server,
}

/// What a file is like, of what an answer tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) mtime: u64,
}

impl Client {
    pub(super) fn new() -> Self {
        Self::with(false)
    }

    pub(super) fn read_only() -> Self {
        Self::with(true)
    }

    fn with(read_only: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Beside the folder that is shared, what nobody may reach.
        std::fs::create_dir(folder.path().join("shared")).unwrap();
        std::fs::write(folder.path().join("secret"), "secret").unwrap();
        let shared = folder.path().join("shared");
        let server = Server::new(&ShareSpec { folder: shared, tag: "t".into(), read_only }).unwrap();
        let client = Self { folder, server };
        client.init();
        client
    }

    pub(super) fn init(&self) {
        let mut body = Vec::new();
        for word in [7_u32, 37, 1 << 20, u32::MAX] {
            body.extend(word.to_le_bytes());
        }
        let answer = self.call(op::INIT, 0, &body).unwrap();
        assert_eq!(answer.len(), 64);
    }

    /// Where `name` is on the host.
    pub(super) fn host(&self, name: &str) -> std::path::PathBuf {
        Path::new(self.folder.path()).join("shared").join(name)
    }

    pub(super) fn call(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        self.call_with_room(opcode, node, body, MAX_ANSWER)
    }

    pub(super) fn call_with_room(
        &self,
        opcode: u32,
        node: u64,
        body: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, Errno> {
        self.request(0, opcode, node, body, room)
    }

    /// A request by a user of the guest, whose group has the same number.
    pub(super) fn call_as(&self, user: u32, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        self.request(user, opcode, node, body, MAX_ANSWER)
    }

    fn request(&self, user: u32, opcode: u32, node: u64, body: &[u8], room: usize) -> Result<Vec<u8>, Errno> {
        let unique = u64::from(opcode) << 32 | 5;
        let mut request = ((40 + body.len()) as u32).to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend(words(&[user, user, 0, 0]));
        request.extend(body);
        let mut answer = Vec::new();
        self.server.answer(&request, room, &mut answer);
        assert!(answer.len() <= room, "more than there is room for");
        let word = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) as usize, answer.len());
        assert_eq!(answer[8..16], unique.to_le_bytes());
        match word(4) as i32 {
            0 => Ok(answer[16..].to_vec()),
            error => Err(Errno::from_raw_os_error(-error)),
        }
    }

    /// A request whose answer is a node: its number and what it is like.
    fn entry(&self, opcode: u32, folder: u64, body: &[u8]) -> Result<(u64, Attributes), Errno> {
        let answer = self.call(opcode, folder, body)?;
        Ok((number(&answer, 0), attributes(&answer[40..])))
    }

    pub(super) fn look_up(&self, folder: u64, name: &str) -> Result<(u64, Attributes), Errno> {
        self.entry(op::LOOKUP, folder, &text(&[name]))
    }

    pub(super) fn make_folder(&self, folder: u64, name: &str) -> Result<u64, Errno> {
        let body = [words(&[0o755, 0]), text(&[name])].concat();
        self.entry(op::MKDIR, folder, &body).map(|(node, _)| node)
    }

    /// Node and handle of a new file.
    pub(super) fn create(&self, folder: u64, name: &str, mode: u32) -> Result<(u64, u64), Errno> {
        let body = [words(&[2, mode, 0, 0]), text(&[name])].concat();
        let answer = self.call(op::CREATE, folder, &body)?;
        Ok((number(&answer, 0), number(&answer, 128)))
    }

    pub(super) fn symlink(&self, folder: u64, name: &str, target: &str) -> Result<u64, Errno> {
        self.entry(op::SYMLINK, folder, &text(&[name, target])).map(|(node, _)| node)
    }

    pub(super) fn link(&self, node: u64, folder: u64, name: &str) -> Result<Attributes, Errno> {
        let body = [&node.to_le_bytes()[..], &text(&[name])].concat();
        self.entry(op::LINK, folder, &body).map(|(_, attributes)| attributes)
    }

    pub(super) fn rename(&self, from: u64, old: &str, to: u64, new: &str, flags: u32) -> Result<(), Errno> {
        let body = [&to.to_le_bytes()[..], &words(&[flags, 0]), &text(&[old, new])].concat();
        self.call(op::RENAME2, from, &body).map(|_| ())
    }

    pub(super) fn unlink(&self, folder: u64, name: &str) -> Result<(), Errno> {
        self.call(op::UNLINK, folder, &text(&[name])).map(|_| ())
    }

    pub(super) fn open(&self, node: u64, flags: u32) -> Result<u64, Errno> {
        self.call(op::OPEN, node, &words(&[flags, 0])).map(|answer| number(&answer, 0))
    }

    pub(super) fn open_folder(&self, node: u64) -> Result<u64, Errno> {
        self.call(op::OPENDIR, node, &words(&[0, 0])).map(|answer| number(&answer, 0))
    }

    pub(super) fn read(&self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.call(op::READ, 0, &read_in(handle, offset, size))
    }

    pub(super) fn write(&self, handle: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let body = [&read_in(handle, offset, data.len() as u32)[..], data].concat();
        self.call(op::WRITE, 0, &body).map(|answer| number(&answer, 0) as u32)
    }

    pub(super) fn attributes(&self, node: u64) -> Result<Attributes, Errno> {
        self.call(op::GETATTR, node, &[0; 16]).map(|answer| attributes(&answer[16..]))
    }

    /// SETATTR of mode, size or modification time.
    pub(super) fn set(&self, node: u64, valid: u32, value: u64) -> Result<Attributes, Errno> {
        let mut body = [0; 88];
        body[..4].copy_from_slice(&valid.to_le_bytes());
        body[16..24].copy_from_slice(&value.to_le_bytes());
        body[40..48].copy_from_slice(&value.to_le_bytes());
        body[68..72].copy_from_slice(&(value as u32).to_le_bytes());
        body[76..80].copy_from_slice(&(value as u32).to_le_bytes());
        self.call(op::SETATTR, node, &body).map(|answer| attributes(&answer[16..]))
    }

    pub(super) fn forget(&self, node: u64, count: u64) {
        let mut request = 48_u32.to_le_bytes().to_vec();
        request.extend(op::FORGET.to_le_bytes());
        request.extend([0; 8]);
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(count.to_le_bytes());
        let mut answer = Vec::new();
        self.server.answer(&request, 0, &mut answer);
        assert!(answer.is_empty());
    }

    /// Names in an open folder, got in answers of at most `size` bytes; and nodes, if looked up.
    pub(super) fn list(&self, folder: u64, handle: u64, size: u32, plus: bool) -> Vec<(String, u64)> {
        let (mut found, mut offset) = (Vec::new(), 0);
        loop {
            let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
            let answer = self.call(opcode, folder, &read_in(handle, offset, size)).unwrap();
            if answer.is_empty() {
                return found;
            }
            assert!(answer.len() <= size as usize);
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let (node, entry) = if plus { (number(rest, 0), &rest[128..]) } else { (0, rest) };
                let len = u32::from_le_bytes(entry[16..20].try_into().unwrap()) as usize;
                offset = number(entry, 8);
                found.push((String::from_utf8(entry[24..24 + len].to_vec()).unwrap(), node));
                rest = &entry[24 + len.next_multiple_of(8)..];
            }
        }
    }
}

pub(super) fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn attributes(bytes: &[u8]) -> Attributes {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    Attributes { size: number(bytes, 8), mode: word(60), links: word(64), mtime: number(bytes, 32) }
}

pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(super) fn text(parts: &[&str]) -> Vec<u8> {
    parts.iter().flat_map(|part| part.bytes().chain([0])).collect()
}

pub(super) fn read_in(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(offset.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.extend([0; 20]);
    body
}
