use std::cmp::Ordering;

use super::*;
use crate::progress::Quiet;
use crate::testing::FakeApt;

fn apt(fake: &FakeApt, state: &Path) -> Apt {
    Apt::with_search_path(state, Architecture::Amd64, Some(fake.path().into())).expect("prepares")
}

/// A stand-in for apt, and a state folder.
fn setup() -> (FakeApt, tempfile::TempDir) {
    (FakeApt::new(), tempfile::tempdir().expect("a scratch folder"))
}

#[test]
fn host_without_apt_is_told_what_to_give_instead() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let error = Apt::with_search_path(folder.path(), Architecture::Amd64, Some(folder.path().into()))
        .expect_err("is missing");
    assert!(matches!(error, AptError::Missing(_)));
    let text = error.to_string();
    assert!(text.contains("--kernel") && text.contains("--initrd"), "{text}");
}

#[test]
fn package_is_found_downloaded_and_checked() {
    let (fake, state) = setup();
    let mut apt = apt(&fake, state.path());
    let package = apt.find("busybox-static", Version::Candidate, &mut Quiet).expect("finds");
    assert_eq!(package.version, "1:1.35.0-4");
    let into = tempfile::tempdir().expect("a scratch folder");
    let file = apt.download(&package, into.path(), &mut Quiet).expect("downloads");
    assert_eq!(fs::read(file).expect("reads"), fs::read(fake.deb_of("busybox-static")).expect("reads"));
}

#[test]
fn changed_package_file_is_refused() {
    let (fake, state) = setup();
    let mut apt = apt(&fake, state.path());
    let package = apt.find("busybox-static", Version::Candidate, &mut Quiet).expect("finds");
    let mut bytes = fs::read(fake.deb_of("busybox-static")).expect("reads");
    *bytes.last_mut().expect("not empty") ^= 1;
    fs::write(fake.deb_of("busybox-static"), &bytes).expect("writes");
    let into = tempfile::tempdir().expect("a scratch folder");
    let error = apt.download(&package, into.path(), &mut Quiet).expect_err("differs");
    assert!(matches!(error, AptError::HashMismatch { .. }), "{error}");
}

#[test]
fn unrelated_broken_source_does_not_matter() {
    let (fake, state) = setup();
    let complain = "for last; do :; done\nif [ \"$last\" = update ]; then\n\
                    echo 'E: The repository https://third.example/apt does not have a Release file.' >&2\nexit 100\nfi\n";
    fake.program("apt-get", &format!("{complain}{}", fake.server()));
    let mut apt = apt(&fake, state.path());
    assert!(apt.find("busybox-static", Version::Candidate, &mut Quiet).is_ok());
    // Lists that are not complete are not taken for fresh.
    assert!(!apt.lists_fresh());
}

#[test]
fn package_that_no_source_has_is_named_with_the_versions_there_are() {
    let (fake, state) = setup();
    let mut apt = apt(&fake, state.path());
    // The release whose backports could be added is not among the sources.
    apt.sources.clear();
    let error =
        apt.find("busybox-static", Version::Series("9.9"), &mut Quiet).expect_err("has no such version");
    assert!(matches!(error, AptError::NotFound { .. }));
    let text = error.to_string();
    assert!(
        text.contains("busybox-static` of version 9.9") && text.contains("there is 1:1.35.0-4"),
        "{text}"
    );
    let error = apt.find("no-such-package", Version::Candidate, &mut Quiet).expect_err("is nowhere");
    assert!(error.to_string().contains("no-such-package"), "{error}");
}

#[test]
fn host_without_network_is_told_what_apt_said() {
    let (fake, state) = setup();
    // As apt does it: a warning for each source, and success in the end.
    let message = "W: Failed to fetch http://deb.example/debian/dists/x/InRelease  Temporary failure resolving 'deb.example'";
    fake.program("apt-get", &format!("echo \"{message}\" >&2"));
    fake.program("apt-cache", "echo 'E: No packages found' >&2; exit 100");
    let error =
        apt(&fake, state.path()).find("busybox-static", Version::Candidate, &mut Quiet).expect_err("fails");
    assert!(matches!(error, AptError::Unreachable(_)), "{error}");
    assert!(error.to_string().contains("Temporary failure resolving"), "{error}");
}

#[test]
fn full_disk_and_other_failures_are_told_apart() {
    let (fake, state) = setup();
    let mut apt = apt(&fake, state.path());
    let package = apt.find("busybox-static", Version::Candidate, &mut Quiet).expect("finds");
    let download = |script: &str| {
        fake.program("apt-get", script);
        let into = tempfile::tempdir().expect("a scratch folder");
        apt.download(&package, into.path(), &mut Quiet).expect_err("fails")
    };
    let full = download("echo 'E: Write error - write (28: No space left on device)' >&2; exit 100");
    assert!(matches!(full, AptError::DiskFull { .. }), "{full}");
    let other = download("echo 'E: Something odd' >&2; exit 100");
    assert!(matches!(&other, AptError::Failed { details, .. } if details == "E: Something odd"), "{other}");
    let nothing = download("exit 0");
    assert!(matches!(nothing, AptError::Failed { .. }), "{nothing}");
}

#[test]
fn lists_are_fetched_again_when_the_sources_change() {
    let (fake, state) = setup();
    let mut apt = apt(&fake, state.path());
    assert!(!apt.lists_fresh());
    apt.update(&mut Quiet).expect("updates");
    assert!(apt.lists_fresh());
    // Without the backports that were added for another image the lists are still good.
    let extra = SourceFile { name: "x.list".to_owned(), text: "deb http://x y main".to_owned() };
    apt.sources.push(extra);
    assert!(!apt.lists_fresh());
    apt.update(&mut Quiet).expect("updates");
    apt.sources.pop();
    assert!(apt.lists_fresh());
}

#[test]
fn records_give_packages_that_can_be_fetched() {
    let hash = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let text = format!(
        "Package: installed\nVersion: 1\nStatus: install ok installed\n\n\
         Package: a\nVersion: 1:2-3\nPre-Depends: libc6 (>= 2.1)\n\
         Depends: b (= 1.2-3), c:any | d, e [amd64]\nDescription: x\n Depends: not a field\nSize: 12\nSHA256: {hash}\n\n\
         Package: bad\nVersion: 1\nSize: many\nSHA256: {hash}\n\n\
         Package: bad\nVersion: 1\nSize: 1\nSHA256: 00\n"
    );
    let packages = records::parse(&text);
    assert_eq!(packages.len(), 1);
    let depends: Vec<(&str, Option<&str>)> =
        packages[0].depends.iter().map(|d| (d.name.as_str(), d.exact.as_deref())).collect();
    assert_eq!(depends, [("libc6", None), ("b", Some("1.2-3")), ("c", None), ("e", None)]);
    assert_eq!((packages[0].version.as_str(), packages[0].size), ("1:2-3", 12));
}

#[test]
fn versions_are_ordered_as_debian_policy_says() {
    // Each is older than the next.
    let ordered = [
        "0~~",
        "0~~a",
        "0~",
        "0",
        "0a",
        "0+",
        "1.2~rc1-1",
        "1.2-1",
        "1.2-1+b1",
        "1.2-2",
        "1.2-10",
        "1.2.1-1",
        "1.10-1",
        "6.1.176-1",
        "6.1.192-2",
        "6.12.95-1~bpo12+1",
        "6.12.95-1",
        "99999999999999999999999-1",
        "1:0-1",
    ];
    for (i, a) in ordered.iter().enumerate() {
        for (j, b) in ordered.iter().enumerate() {
            assert_eq!(records::compare_versions(a, b), i.cmp(&j), "{a} and {b}");
        }
    }
    assert_eq!(records::compare_versions("1.0-0", "1.0"), Ordering::Equal);
    assert_eq!(records::compare_versions("0:1.00", "1.0"), Ordering::Equal);
}

fn file(name: &str, text: &str) -> SourceFile {
    SourceFile { name: name.to_owned(), text: text.to_owned() }
}

#[test]
fn backports_come_from_the_mirror_and_with_the_key_of_a_stanza() {
    let host = [
        file(
            "third.sources",
            "Types: deb\nURIs: https://third.example\nSuites: bookworm\nComponents: other\n",
        ),
        file(
            "debian.sources",
            "# mirror\nTypes: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
             Components: main contrib\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n\n\
             Types: deb\nURIs: http://security.example\nSuites: bookworm-security\nComponents: main\n",
        ),
    ];
    let extra = sources::backports(&host, "bookworm").expect("derived");
    assert_eq!(extra.name, "ringfence-backports.sources");
    assert_eq!(
        extra.text,
        "Types: deb\nSuites: bookworm-backports\nComponents: main\nURIs: http://mirror.example/debian\n\
         Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n"
    );
}

#[test]
fn backports_come_from_a_line_with_its_options() {
    let line =
        "deb [signed-by=/k.gpg arch=amd64]  http://mirror.example/debian/ bookworm main non-free # mine\n";
    let host = [file(
        "sources.list",
        &format!("# deb http://old bookworm main\ndeb-src http://s bookworm main\n{line}"),
    )];
    let extra = sources::backports(&host, "bookworm").expect("derived");
    assert_eq!(extra.name, "ringfence-backports.list");
    assert_eq!(
        extra.text,
        "deb [signed-by=/k.gpg arch=amd64] http://mirror.example/debian/ bookworm-backports main\n"
    );
    let by_role = [file("sources.list", "deb http://m stable main")];
    let extra = sources::backports(&by_role, "bookworm").expect("derived");
    assert!(extra.text.contains("stable-backports"), "{}", extra.text);
}

#[test]
fn another_release_comes_from_the_mirror_for_any_architecture() {
    let line = "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian trixie main\n";
    let extra = sources::release(&[file("sources.list", line)], "trixie", "bookworm").expect("derived");
    assert_eq!(
        extra,
        file(
            "ringfence-bookworm.list",
            "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main\n"
        )
    );
    let plain = sources::release(&[file("a.list", "deb http://m trixie main")], "trixie", "bookworm")
        .expect("derived");
    assert_eq!(plain.text, "deb  http://m bookworm main\n");
    let stanza = "Types: deb\nURIs: http://m\nSuites: stable\nComponents: main\nArchitectures: amd64\n\
                  Signed-By: /k.gpg\n";
    let extra = sources::release(&[file("x.sources", stanza)], "trixie", "bookworm").expect("derived");
    assert_eq!(
        extra.text,
        "Types: deb\nSuites: bookworm\nComponents: main\nURIs: http://m\nSigned-By: /k.gpg\n"
    );
    let other = [file("sources.list", "deb http://m jammy main")];
    assert_eq!(sources::release(&other, "trixie", "bookworm"), None);
}

#[test]
fn packages_for_i386_are_asked_for_as_such_and_from_the_last_release_that_has_them() {
    let (fake, state) = setup();
    let log = fake.path().join("asked");
    fake.program("apt-get", &format!("echo \"$*\" >>{}\n{}", log.display(), fake.server()));
    let search_path = Some(fake.path().into());
    let mut apt = Apt::with_search_path(state.path(), Architecture::I386, search_path).expect("prepares");
    apt.codename = Some("trixie".to_owned());
    apt.sources = vec![file("sources.list", "deb http://m trixie main\n")];
    apt.find("busybox-static", Version::Candidate, &mut Quiet).expect("finds");
    assert_eq!(apt.sources.len(), 1);
    let error = apt.find("no-such", Version::Candidate, &mut Quiet).expect_err("is nowhere");
    assert!(error.to_string().contains("`no-such` for i386"), "{error}");
    assert_eq!(apt.sources[1].text, "deb  http://m bookworm main\n");
    let asked = fs::read_to_string(log).expect("reads");
    assert!(
        asked
            .lines()
            .all(|line| line.contains("APT::Architecture=i386") && line.contains("APT::Architectures=i386")),
        "{asked}"
    );
}

#[test]
fn backports_that_are_there_or_cannot_be_derived_are_not_added() {
    let base = "deb http://m bookworm main\n";
    for text in [
        "",
        "deb http://m trixie main",
        "deb http://m bookworm contrib",
        "Types: deb",
        "deb [signed-by=/k http://m bookworm main",
        &format!("{base}deb http://m bookworm-backports main"),
    ] {
        assert_eq!(sources::backports(&[file("sources.list", text)], "bookworm"), None, "{text}");
    }
    let off = "Enabled: no\nTypes: deb\nURIs: http://m\nSuites: bookworm\nComponents: main\n";
    assert_eq!(sources::backports(&[file("x.sources", off)], "bookworm"), None);
}

#[test]
fn host_sources_are_read_as_apt_would() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for name in ["b.list", "a.sources", ".hidden.list", "c.list.save", "d e.list", "f"] {
        fs::write(folder.path().join(name), name).expect("writes");
    }
    let files = sources::of_host(Path::new("/nonexistent"), folder.path());
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["a.sources", "b.list"]);
    let files = sources::of_host(&folder.path().join("b.list"), Path::new("/nonexistent"));
    assert_eq!(files, [file("sources.list", "b.list")]);
}

#[test]
fn status_lines_give_a_percentage() {
    assert_eq!(status_percent("dlstatus:2:12.6863:Retrieving file 2 of 2"), Some(12.6863));
    assert_eq!(status_percent("dlstatus:2:400:x"), Some(100.0));
    for line in ["", "Get:1 http://x", "dlstatus:", "dlstatus:1:NaN:x", "dlstatus:1:abc:"] {
        assert_eq!(status_percent(line), None, "{line}");
    }
}

#[test]
fn other_indexes_are_recognised_in_the_hosts_configuration() {
    let dump = "Acquire::IndexTargets \"\";\nAcquire::IndexTargets::deb \"\";\n\
                Acquire::IndexTargets::deb::Packages \"\";\nAcquire::IndexTargets::deb::DEP-11 \"\";\n\
                Acquire::IndexTargets::deb::DEP-11::MetaKey \"x\";\nAcquire::IndexTargets::deb-src::Sources \"\";\n\
                Acquire::IndexTargets::deb::a=b \"\";\n";
    assert_eq!(run::index_names(dump), ["deb::DEP-11", "deb-src::Sources"]);
}
