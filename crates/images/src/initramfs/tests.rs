use std::io::Write;
use std::process::{Command, Stdio};

use super::*;
use crate::cpio::tests::parse;
use crate::modules::{ModInfo, Module};

fn paths(archive: &[u8]) -> Vec<String> {
    parse(archive).into_iter().map(|entry| entry.0).collect()
}

fn contents(archive: &[u8], path: &str) -> Vec<u8> {
    parse(archive).into_iter().find(|entry| entry.0 == path).unwrap_or_else(|| panic!("no {path}")).4
}

#[test]
fn folders_come_before_what_is_in_them_exactly_once() {
    let mut archive = Initramfs::shell(b"busybox".to_vec()).expect("valid");
    archive.file("/a/b/c", 0o600, "x").expect("valid").symlink("a/b/d", "c").expect("valid");
    let paths = paths(&archive.build().expect("builds"));
    for (index, path) in paths.iter().enumerate() {
        assert_eq!(paths.iter().filter(|other| *other == path).count(), 1, "{path}");
        if let Some((parent, _)) = path.rsplit_once('/') {
            assert!(paths[..index].iter().any(|earlier| earlier == parent), "{path} before {parent}");
        }
    }
    for needed in ["init", "bin/busybox", "bin/sh", "dev/console", "proc", "tmp", "a/b/c", "a/b/d"] {
        assert!(paths.iter().any(|path| path == needed), "{needed}");
    }
}

#[test]
fn order_of_adding_does_not_show() {
    let build = |names: [&str; 2]| {
        let mut archive = Initramfs::empty().expect("valid");
        for name in names {
            archive.file(name, 0o644, name).expect("valid");
        }
        archive.init("#!/bin/sh\n").expect("valid").build().expect("builds")
    };
    assert_eq!(build(["x/1", "y/2"]), build(["y/2", "x/1"]));
}

#[test]
fn callers_init_takes_the_place_of_ours() {
    let mut archive = Initramfs::shell(Vec::new()).expect("valid");
    archive.init("mine").expect("valid");
    assert_eq!(contents(&archive.build().expect("builds"), "init"), b"mine");
}

#[test]
fn unsafe_paths_are_refused() {
    let mut archive = Initramfs::empty().expect("valid");
    assert!(archive.file("../x", 0o644, "").is_err());
    assert!(archive.modules::<&str>("../../x", &Selection::default(), &[]).is_err());
}

#[test]
fn modules_are_packed_with_their_lists() {
    let module = |name: &str, depends: &[&str]| Module {
        name: name.to_owned(),
        path: format!("kernel/{name}.ko"),
        contents: name.as_bytes().to_vec(),
        info: ModInfo {
            depends: depends.iter().map(|&name| name.to_owned()).collect(),
            aliases: vec![format!("alias-of-{name}")],
            ..ModInfo::default()
        },
    };
    let selection = Selection {
        modules: vec![module("a", &[]), module("b", &["a"]), module("c", &[])],
        missing: Vec::new(),
    };
    let mut archive = Initramfs::empty().expect("valid");
    archive.modules("6.1", &selection, &["b"]).expect("valid");
    let archive = archive.build().expect("builds");
    assert_eq!(contents(&archive, "lib/modules/6.1/kernel/c.ko"), b"c");
    assert_eq!(
        contents(&archive, "lib/modules/6.1/modules.dep"),
        b"kernel/a.ko:\nkernel/b.ko: kernel/a.ko\nkernel/c.ko:\n"
    );
    assert!(contents(&archive, "lib/modules/6.1/modules.alias").starts_with(b"alias alias-of-a a\n"));
    assert_eq!(
        contents(&archive, LOAD_LIST),
        b"/lib/modules/6.1/kernel/a.ko\n/lib/modules/6.1/kernel/b.ko\n"
    );
}

#[test]
fn guest_scripts_are_valid_shell() {
    for script in [INIT, SESSION, SHELL_RC] {
        let mut shell =
            Command::new("sh").args(["-n"]).stdin(Stdio::piped()).spawn().expect("there is a shell");
        shell.stdin.take().expect("piped").write_all(script.as_bytes()).expect("it reads all");
        assert!(shell.wait().expect("ends").success());
    }
}
