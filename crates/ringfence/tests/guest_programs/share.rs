//! A file-system exerciser: changes a tree at random, keeps a model of what must be there, compares, and lists the tree. The test
//! makes the same list on the host.
//!
//! Usage: `share FOLDER SEED STEPS`. Prints `ok N` and leaves the list in `FOLDER.list`.

mod tree;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

unsafe extern "C" {
    fn mmap(address: *mut u8, len: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
    fn munmap(address: *mut u8, len: usize) -> i32;
    fn msync(address: *mut u8, len: usize, flags: i32) -> i32;
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % below
    }
}

/// What a name stands for. Files are numbers into a table, since several names may stand for one.
#[derive(Clone, Debug, PartialEq)]
enum Thing {
    File(usize),
    Link(String),
    Folder,
}

struct World {
    root: PathBuf,
    random: Random,
    things: BTreeMap<String, Thing>,
    files: Vec<Vec<u8>>,
    done: u64,
}

impl World {
    fn at(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A name in a folder that is there; it may be in use or not.
    fn name(&mut self) -> String {
        let folders: Vec<&String> =
            self.things.iter().filter(|(_, thing)| **thing == Thing::Folder).map(|(name, _)| name).collect();
        let folder = match self.random.next(folders.len() as u64 + 1) as usize {
            0 => String::new(),
            index => format!("{}/", folders[index - 1]),
        };
        format!("{folder}n{}", self.random.next(12))
    }

    fn pick(&mut self, wanted: fn(&Thing) -> bool) -> Option<(String, Thing)> {
        let names: Vec<_> = self.things.iter().filter(|(_, thing)| wanted(thing)).collect();
        if names.is_empty() {
            return None;
        }
        let index = self.random.next(names.len() as u64) as usize;
        Some((names[index].0.clone(), names[index].1.clone()))
    }

    fn bytes(&mut self) -> Vec<u8> {
        let most = [10, 5000, 300_000][self.random.next(3) as usize];
        let len = self.random.next(most);
        (0..len).map(|_| self.random.next(256) as u8).collect()
    }

    fn step(&mut self) {
        let is_file = |thing: &Thing| matches!(thing, Thing::File(_));
        match self.random.next(14) {
            0..=2 => {
                let (name, data) = (self.name(), self.bytes());
                let made = OpenOptions::new().write(true).create_new(true).open(self.at(&name));
                assert_eq!(made.is_ok(), !self.things.contains_key(&name), "{name} {made:?}");
                if let Ok(mut file) = made {
                    file.write_all(&data).unwrap();
                    self.files.push(data);
                    self.things.insert(name, Thing::File(self.files.len() - 1));
                }
            }
            3 | 4 => {
                let Some((name, Thing::File(file))) = self.pick(is_file) else { return };
                let (data, at) = (self.bytes(), self.random.next(400_000));
                let open = OpenOptions::new().write(true).open(self.at(&name)).unwrap();
                open.write_all_at(&data, at).unwrap();
                let file = &mut self.files[file];
                let end = at as usize + data.len();
                if !data.is_empty() {
                    file.resize(file.len().max(end), 0);
                    file[at as usize..end].copy_from_slice(&data);
                }
            }
            5 => {
                let Some((name, Thing::File(file))) = self.pick(is_file) else { return };
                let data = self.bytes();
                let mut open = OpenOptions::new().append(true).open(self.at(&name)).unwrap();
                open.write_all(&data).unwrap();
                self.files[file].extend(data);
            }
            6 => {
                let Some((name, Thing::File(file))) = self.pick(is_file) else { return };
                let len = self.random.next(200_000);
                OpenOptions::new().write(true).open(self.at(&name)).unwrap().set_len(len).unwrap();
                self.files[file].resize(len as usize, 0);
            }
            7 => {
                let name = self.name();
                let made = fs::create_dir(self.at(&name));
                assert_eq!(made.is_ok(), !self.things.contains_key(&name), "{name} {made:?}");
                if made.is_ok() {
                    self.things.insert(name, Thing::Folder);
                }
            }
            8 => {
                let name = self.name();
                let target = format!("../t{}", self.random.next(100));
                if symlink(&target, self.at(&name)).is_ok() {
                    assert_eq!(self.things.insert(name, Thing::Link(target)), None);
                }
            }
            9 => {
                let Some((old, thing)) = self.pick(is_file) else { return };
                let new = self.name();
                if fs::hard_link(self.at(&old), self.at(&new)).is_ok() {
                    assert_eq!(self.things.insert(new, thing), None);
                }
            }
            10 | 11 => self.rename(),
            12 => {
                let Some((name, thing)) = self.pick(|_| true) else { return };
                if thing == Thing::Folder {
                    let full = self.things.keys().any(|other| other.starts_with(&format!("{name}/")));
                    assert_eq!(fs::remove_dir(self.at(&name)).is_ok(), !full, "{name}");
                    if full {
                        return;
                    }
                } else {
                    fs::remove_file(self.at(&name)).unwrap();
                }
                self.things.remove(&name);
            }
            _ => self.map(),
        }
        self.done += 1;
    }

    fn rename(&mut self) {
        let Some((old, thing)) = self.pick(|_| true) else { return };
        let new = self.name();
        if fs::rename(self.at(&old), self.at(&new)).is_err() {
            return;
        }
        let there = self.things.get(&new);
        if old == new || matches!((&thing, there), (Thing::File(a), Some(Thing::File(b))) if a == b) {
            // Two names of one file: nothing happens (POSIX rename).
            return;
        }
        let moved: Vec<String> = self
            .things
            .keys()
            .filter(|name| **name == old || name.starts_with(&format!("{old}/")))
            .cloned()
            .collect();
        for name in moved {
            let thing = self.things.remove(&name).unwrap();
            self.things.insert(format!("{new}{}", &name[old.len()..]), thing);
        }
    }

    /// Changes a file through a shared mapping.
    fn map(&mut self) {
        let Some((name, Thing::File(index))) = self.pick(|thing| matches!(thing, Thing::File(_))) else {
            return;
        };
        let len = self.files[index].len();
        if len == 0 {
            return;
        }
        let open = OpenOptions::new().read(true).write(true).open(self.at(&name)).unwrap();
        // SAFETY: a mapping of the whole file, used within its length, and gone before anything else changes the file.
        unsafe {
            let map = mmap(std::ptr::null_mut(), len, 3, 1, open.as_raw_fd(), 0);
            assert_ne!(map as isize, -1, "mmap");
            let bytes = std::slice::from_raw_parts_mut(map, len);
            assert!(bytes == self.files[index], "{name} as mapped");
            for _ in 0..20 {
                let at = self.random.next(len as u64) as usize;
                let value = self.random.next(256) as u8;
                bytes[at] = value;
                self.files[index][at] = value;
            }
            assert_eq!(msync(map, len, 4), 0);
            assert_eq!(munmap(map, len), 0);
        }
    }

    /// What is in files without a name is not wanted any more.
    fn forget(&mut self) {
        for (index, file) in self.files.iter_mut().enumerate() {
            if !self.things.values().any(|thing| *thing == Thing::File(index)) {
                *file = Vec::new();
            }
        }
    }

    fn check(&self) {
        for (name, thing) in &self.things {
            let path = self.at(name);
            let about = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            match thing {
                Thing::Folder => assert!(about.is_dir(), "{name}"),
                Thing::Link(target) => assert_eq!(fs::read_link(&path).unwrap(), Path::new(target)),
                Thing::File(file) => {
                    let names =
                        self.things.values().filter(|other| **other == Thing::File(*file)).count() as u64;
                    assert_eq!((about.len(), about.nlink()), (self.files[*file].len() as u64, names), "{name}");
                    assert!(fs::read(&path).unwrap() == self.files[*file], "{name} has something else in it");
                }
            }
        }
    }
}

/// A file that is open stays usable when its name is gone, and another has it.
fn removed_while_open(root: &Path) {
    let path = root.join("open");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(b"still here").unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "another").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    file.set_len(5).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 5);
    fs::remove_file(&path).unwrap();
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let root = PathBuf::from(&arguments[1]);
    fs::create_dir(&root).unwrap();
    let random = Random(arguments[2].parse::<u64>().unwrap() | 1);
    let steps: u64 = arguments[3].parse().unwrap();
    let mut world = World { root, random, things: BTreeMap::new(), files: Vec::new(), done: 0 };
    removed_while_open(&world.root);
    for step in 0..steps {
        world.step();
        if step % 500 == 499 {
            world.check();
            world.forget();
            // What the kernel has remembered is forgotten, so that it has to ask again.
            fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
            world.check();
        }
    }
    let mut lines = Vec::new();
    tree::list(&world.root, "", &mut lines);
    assert_eq!(lines.len(), world.things.len());
    lines.sort();
    File::create(world.root.with_extension("list")).unwrap().write_all(lines.join("\n").as_bytes()).unwrap();
    println!("ok {}", world.done);
}
