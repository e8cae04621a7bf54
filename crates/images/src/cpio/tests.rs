use std::io::Write;
use std::process::{Command, Stdio};

use super::*;

/// An entry as read back: path, mode, link count, device, contents.
type Entry = (String, u32, u32, (u32, u32), Vec<u8>);

/// Reads archives that follow each other, as the kernel does.
pub(crate) fn parse(mut bytes: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let total = bytes.len();
    loop {
        while bytes.first() == Some(&0) {
            bytes = &bytes[1..];
        }
        if bytes.is_empty() {
            return entries;
        }
        assert_eq!((total - bytes.len()) % 4, 0, "headers are aligned");
        assert_eq!(&bytes[..6], b"070701");
        let field = |index: usize| {
            let digits = std::str::from_utf8(&bytes[6 + 8 * index..14 + 8 * index]).expect("digits");
            u32::from_str_radix(digits, 16).expect("digits")
        };
        let (mode, links, size, name_size) = (field(1), field(4), field(6) as usize, field(11) as usize);
        let device = (field(9), field(10));
        assert_eq!([field(2), field(3), field(5), field(7), field(8), field(12)], [0; 6]);
        let path = std::str::from_utf8(&bytes[110..110 + name_size - 1]).expect("text").to_owned();
        assert_eq!(bytes[110 + name_size - 1], 0);
        let data = (110 + name_size).next_multiple_of(4);
        let contents = bytes[data..data + size].to_vec();
        bytes = &bytes[(data + size).next_multiple_of(4).min(bytes.len())..];
        if path != "TRAILER!!!" {
            entries.push((path, mode, links, device, contents));
        }
    }
}

fn sample() -> Vec<u8> {
    let mut writer = Writer::new();
    writer.folder("etc", 0o755).expect("valid");
    writer.file("/etc/ünï", 0o640, b"12345").expect("valid");
    writer.file("empty", 0o4755, b"").expect("valid");
    writer.symlink("link", "etc/ünï").expect("valid");
    writer.device("console", 0o600, DeviceKind::Character, 5, 1).expect("valid");
    writer.device("disk", 0o660, DeviceKind::Block, 254, 0x1_0000).expect("valid");
    writer.finish()
}

#[test]
fn every_kind_of_entry_reads_back() {
    let entry = |path: &str, mode, links, device, contents: &[u8]| {
        (path.to_owned(), mode, links, device, contents.to_vec())
    };
    let archive = sample();
    assert_eq!(archive.len() % 512, 0);
    assert_eq!(
        parse(&archive),
        [
            entry("etc", 0o040_755, 2, (0, 0), b""),
            entry("etc/ünï", 0o100_640, 1, (0, 0), b"12345"),
            entry("empty", 0o104_755, 1, (0, 0), b""),
            entry("link", 0o120_777, 1, (0, 0), "etc/ünï".as_bytes()),
            entry("console", 0o020_600, 1, (5, 1), b""),
            entry("disk", 0o060_660, 1, (254, 0x1_0000), b""),
        ]
    );
}

#[test]
fn same_input_gives_same_bytes() {
    assert_eq!(sample(), sample());
}

#[test]
fn archives_can_follow_each_other() {
    let both = [sample(), sample()].concat();
    assert_eq!(parse(&both).len(), 12);
}

#[test]
fn the_cpio_program_agrees_where_there_is_one() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let started = Command::new("cpio")
        .args(["-idm", "--quiet", "--no-absolute-filenames", "etc", "etc/*", "empty", "link"])
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .spawn();
    // Not every host has it; the other tests read the format by themselves.
    let Ok(mut child) = started else { return };
    child.stdin.take().expect("piped").write_all(&sample()).expect("it reads all");
    assert!(child.wait().expect("ends").success());
    assert_eq!(std::fs::read(folder.path().join("etc/ünï")).expect("unpacked"), b"12345");
    assert_eq!(std::fs::read(folder.path().join("link")).expect("unpacked"), b"12345");
}

#[test]
fn unsafe_paths_are_refused() {
    for path in ["", "/", "a//b", "a/", "../a", "a/../b", "./a", "a\0b", &"x".repeat(5000)] {
        let mut writer = Writer::new();
        assert!(matches!(writer.file(path, 0o644, b""), Err(CpioError::BadPath(_))), "{path:?}");
        assert!(parse(&writer.finish()).is_empty(), "nothing of it is written");
    }
    assert!(Writer::new().symlink("a", "").is_err());
    assert!(Writer::new().symlink("a", "b\0").is_err());
}
