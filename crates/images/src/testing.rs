//! What several test files need: packages and modules made on the spot, and a stand-in for apt.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::digest::Digest;

/// An ar archive of the given members.
pub(crate) fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = b"!<arch>\n".to_vec();
    for (name, contents) in members {
        let size = contents.len();
        bytes.extend_from_slice(
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, 100_644).as_bytes(),
        );
        bytes.extend_from_slice(contents);
        if size % 2 == 1 {
            bytes.push(b'\n');
        }
    }
    bytes
}

/// A tar archive of regular files. Names are written as they are, however hostile; long ones with a GNU record.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, contents) in files {
        if name.len() > 100 {
            let mut header = header("././@LongLink", name.len() as u64 + 1, tar::EntryType::GNULongName);
            header.set_cksum();
            builder.append(&header, format!("{name}\0").as_bytes()).expect("to memory");
        }
        let header = header(name, contents.len() as u64, tar::EntryType::Regular);
        builder.append(&header, *contents).expect("to memory");
    }
    builder.into_inner().expect("to memory")
}

/// A header for [`tar`], checksum included.
pub(crate) fn header(name: &str, size: u64, kind: tar::EntryType) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    let end = name.len().min(100);
    header.as_old_mut().name[..end].copy_from_slice(&name.as_bytes()[..end]);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_entry_type(kind);
    header.set_cksum();
    header
}

/// A Debian package with the given files, not compressed.
pub(crate) fn deb(files: &[(&str, &[u8])]) -> Vec<u8> {
    ar(&[("debian-binary", b"2.0\n"), ("control.tar", &tar(&[])), ("data.tar", &tar(files))])
}

/// `bytes` as an xz file.
pub(crate) fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut writer =
        lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).expect("valid options");
    writer.write_all(bytes).expect("to memory");
    writer.finish().expect("to memory")
}

/// `bytes` as a zstd file.
pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// The least 64-bit ELF object that passes as a kernel module with the given `.modinfo` strings.
pub(crate) fn module(strings: &[&str]) -> Vec<u8> {
    elf_module(strings, 2)
}

/// The same of the ELF class `class`: 1 for 32 bits, 2 for 64.
pub(crate) fn elf_module(strings: &[&str], class: u8) -> Vec<u8> {
    let wide = class == 2;
    let header = if wide { 64 } else { 52 };
    let word = |number: usize| number.to_le_bytes()[..if wide { 8 } else { 4 }].to_vec();
    let names = b"\0.shstrtab\0.modinfo\0";
    let info: Vec<u8> = strings.iter().flat_map(|text| text.bytes().chain([0])).collect();
    let (names_at, info_at) = (header, header + names.len());
    let mut elf = b"\x7fELF\0\x01\x01".to_vec();
    elf[4] = class;
    elf.resize(if wide { 0x28 } else { 0x20 }, 0);
    elf.extend_from_slice(&word(info_at + info.len()));
    elf.resize(header - 6, 0);
    for field in [if wide { 64u16 } else { 40 }, 3, 1] {
        elf.extend_from_slice(&field.to_le_bytes());
    }
    elf.extend_from_slice(names);
    elf.extend_from_slice(&info);
    for (name, offset, size) in [(0u32, 0, 0), (1, names_at, names.len()), (11, info_at, info.len())] {
        let mut section = name.to_le_bytes().to_vec();
        section.resize(if wide { 0x18 } else { 0x10 }, 0);
        section.extend_from_slice(&word(offset));
        section.extend_from_slice(&word(size));
        section.resize(if wide { 64 } else { 40 }, 0);
        elf.extend_from_slice(&section);
    }
    elf
}

/// Small steady random numbers (xorshift64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

/// A folder with programs that stand in for apt's, serving packages from files.
pub(crate) struct FakeApt {
    folder: tempfile::TempDir,
}

pub(crate) const RELEASE: &str = "6.1.0-9-cloud-amd64";

impl FakeApt {
    /// Serves a kernel with two modules, and a busybox.
    pub(crate) fn new() -> Self {
        let fake = Self { folder: tempfile::tempdir().expect("a scratch folder") };
        let virtio = module(&["depends=virtio-ring", "alias=pci:v00001AF4d*"]);
        let ring = xz(&module(&["depends="]));
        let base = format!("lib/modules/{RELEASE}");
        fake.serve(
            &format!("linux-image-{RELEASE}"),
            "6.1.9-1",
            "kmod",
            &deb(&[
                (&format!("./boot/vmlinuz-{RELEASE}"), b"kernel"),
                ("./usr/share/doc/linux-image/copyright", b"text"),
                (&format!("./{base}/modules.builtin"), b"kernel/fs/ext4/ext4.ko\n"),
                (&format!("./{base}/kernel/drivers/virtio/virtio_pci.ko"), &virtio),
                (&format!("./{base}/kernel/drivers/virtio/virtio_ring.ko.xz"), &ring),
                (&format!("./{base}/kernel/drivers/unwanted.ko"), b"not even a module"),
            ]),
        );
        let needs = format!("linux-image-{RELEASE} (= 6.1.9-1)");
        fake.serve("linux-image-cloud-amd64", "6.1.9-1", &needs, &deb(&[]));
        fake.serve("busybox-static", "1:1.35.0-4", "", &deb(&[("./bin/busybox", b"busybox")]));
        fake.program("apt-config", "case $1 in dump) echo 'Dir \"/\";';; esac");
        fake.program("apt-get", &fake.server());
        fake.program(
            "apt-cache",
            &format!(
                "for name; do r={}/${{name%%=*}}.record; [ -e $r ] && /bin/cat $r; done; :",
                fake.path().display()
            ),
        );
        fake
    }

    /// The search path to give to the code under test.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Replaces a program by a shell script.
    pub(crate) fn program(&self, name: &str, script: &str) {
        let path = self.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n[ \"$PROBE\" ] && exit\n{script}\n")).expect("writes");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("sets the mode");
        // A process that another test forks just now holds the file open for writing until it becomes something
        // else, and so long the script cannot be started.
        while let Err(error) = Command::new(&path).env("PROBE", "1").status() {
            assert_eq!(error.kind(), ErrorKind::ExecutableFileBusy);
        }
    }

    /// Offers a package.
    pub(crate) fn serve(&self, name: &str, version: &str, depends: &str, contents: &[u8]) {
        fs::write(self.deb_of(name), contents).expect("writes");
        let record = format!(
            "Package: {name}\nVersion: {version}\nDepends: {depends}\nSize: {}\nSHA256: {}\n\n",
            contents.len(),
            Digest::of(contents)
        );
        fs::write(self.path().join(format!("{name}.record")), record).expect("writes");
    }

    /// The package file that is served under `name`.
    pub(crate) fn deb_of(&self, name: &str) -> PathBuf {
        self.path().join(format!("{name}.served"))
    }

    /// The name of every package downloaded so far.
    pub(crate) fn downloads(&self) -> Vec<String> {
        let log = fs::read_to_string(self.path().join("log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// Makes the host's own programs be found beside the stand-ins; gives their paths, or nothing if one is missing.
    pub(crate) fn link_tools(&self, names: &[&str]) -> Option<Vec<PathBuf>> {
        let tools = crate::rootfs::tools::Tools::new(None);
        let found: Option<Vec<PathBuf>> = names.iter().map(|name| tools.find(name)).collect();
        for (name, path) in names.iter().zip(found.as_ref()?) {
            std::os::unix::fs::symlink(path, self.path().join(name)).expect("links");
        }
        found
    }

    /// The usual `apt-get`: the last argument is `update`, or there are names to install in a simulation, or
    /// `NAME=VERSION` to download.
    pub(crate) fn server(&self) -> String {
        let folder = self.path().display();
        format!(
            "for last; do :; done\n\
             [ \"$last\" = update ] && exit 0\n\
             for name; do\n\
               [ -e {folder}/${{name%%=*}}.served ] || continue\n\
               case \" $* \" in *' --simulate '*)\n\
                 while read -r key value; do [ $key = Version: ] && echo \"Inst $name ($value x)\"; done <{folder}/$name.record\n\
                 continue;;\n\
               esac\n\
               name=${{name%%=*}}\n\
               echo $name >>{folder}/log\n\
               echo dlstatus:1:50.0:Retrieving\n\
               /bin/cp {folder}/$name.served $name.deb || exit\n\
             done"
        )
    }
}
