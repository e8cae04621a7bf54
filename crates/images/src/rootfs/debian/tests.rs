use std::io::Write;
use std::process::{Command, Stdio};

use super::*;

#[test]
fn guest_scripts_are_valid_shell() {
    for script in [INIT, POWEROFF, SESSION, SHELL_RC] {
        let mut shell =
            Command::new("sh").args(["-n"]).stdin(Stdio::piped()).spawn().expect("there is a shell");
        shell.stdin.take().expect("piped").write_all(script.as_bytes()).expect("it reads all");
        assert!(shell.wait().expect("ends").success());
    }
}

#[test]
fn links_lead_to_the_first_program_there_and_spare_what_packages_bring() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let mut tree = Tree::new(folder.path());
    prepare(&mut tree).expect("prepares");
    for path in ["bin/mawk", "usr/bin/gawk", "bin/gcc", "bin/cc", COPIES[0].0, COPIES[1].0] {
        tree.add_text(path, Meta::root(0o755), path.as_bytes()).expect("adds");
    }
    configure(&mut tree).expect("configures");
    assert_eq!(tree.read("bin/awk").expect("a link"), b"usr/bin/gawk");
    assert_eq!(tree.read("bin/cc").expect("a file"), b"bin/cc");
    assert_eq!(tree.read("sbin/reboot").expect("a link"), POWEROFF.as_bytes());
    assert!(!tree.has("usr/bin/c++") && tree.has("etc/passwd"));
}

#[test]
fn root_without_accounts_is_refused() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let mut tree = Tree::new(folder.path());
    prepare(&mut tree).expect("prepares");
    let error = configure(&mut tree).expect_err("has no passwd.master");
    assert!(error.to_string().contains("passwd.master"), "{error}");
}
