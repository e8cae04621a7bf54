use std::fs;

use super::*;
use crate::testing::{Random, ar, deb, header, tar, xz, zstd};

/// Unpacks `package` with everything selected; gives what was written, with contents.
fn unpack_all(package: &[u8]) -> Result<Vec<(String, Vec<u8>)>, DebError> {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let file = folder.path().join("x.deb");
    let into = folder.path().join("a/b/into");
    fs::write(&file, package).expect("writes");
    fs::create_dir_all(&into).expect("makes");
    let result = unpack(&file, &into, &mut |path| Some(path.to_owned()), &mut |_| {});
    // Whatever happened, nothing was written beside the folder.
    assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 2);
    assert_eq!(fs::read_dir(folder.path().join("a")).expect("lists").count(), 1);
    assert_eq!(fs::read_dir(folder.path().join("a/b")).expect("lists").count(), 1);
    let read = |name: String| (name.clone(), fs::read(into.join(&name)).expect("was written"));
    Ok(result?.into_iter().map(read).collect())
}

fn with_data(name: &str, data: &[u8]) -> Vec<u8> {
    ar(&[("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, data)])
}

#[test]
fn every_compression_gives_the_files() {
    let long = format!("./usr/{}/file", "long".repeat(40));
    let data = tar(&[("./bin/busybox", b"program"), (&long, b"text"), ("./empty", b"")]);
    for package in [
        with_data("data.tar", &data),
        with_data("data.tar/", &data),
        with_data("data.tar.xz", &xz(&data)),
        with_data("data.tar.zst", &zstd(&data)),
    ] {
        let files = unpack_all(&package).expect("unpacks");
        assert_eq!(files[0], ("bin/busybox".to_owned(), b"program".to_vec()));
        assert_eq!(files[1], (long[2..].to_owned(), b"text".to_vec()));
        assert_eq!(files[2], ("empty".to_owned(), Vec::new()));
        assert_eq!(files.len(), 3);
    }
}

#[test]
fn only_selected_files_are_written_and_progress_reaches_the_end() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let file = folder.path().join("x.deb");
    let package = deb(&[("./a", &[1; 5000]), ("./b", b"2")]);
    fs::write(&file, &package).expect("writes");
    let mut seen = Vec::new();
    let select = &mut |path: &str| (path == "b").then(|| "deep/down".to_owned());
    let written = unpack(&file, folder.path(), select, &mut |done| seen.push(done)).expect("unpacks");
    assert_eq!(written, ["deep/down"]);
    assert_eq!(fs::read(folder.path().join("deep/down")).expect("reads"), b"2");
    assert!(!folder.path().join("a").exists());
    assert!(seen.is_sorted() && *seen.last().expect("was told") <= package.len() as u64);
    assert!(*seen.last().expect("was told") > 5000);
}

#[test]
fn paths_that_lead_out_are_refused() {
    for path in ["../x", "./../x", "/etc/passwd", "a/../../x", "a//b", ".", "./", "a\nb/.."] {
        let result = unpack_all(&deb(&[(path, b"evil")]));
        assert!(matches!(result, Err(DebError::UnsafePath { .. })), "{path}: {result:?}");
    }
    let long = format!("./{}/../../../x", "a".repeat(120));
    assert!(matches!(unpack_all(&deb(&[(&long, b"evil")])), Err(DebError::UnsafePath { .. })));
}

#[test]
fn a_target_that_leads_out_is_refused() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let file = folder.path().join("x.deb");
    fs::write(&file, deb(&[("a", b"")])).expect("writes");
    let result = unpack(&file, folder.path(), &mut |_| Some("../b".to_owned()), &mut |_| {});
    assert!(matches!(result, Err(DebError::UnsafePath { .. })));
}

#[test]
fn links_and_devices_are_passed_over() {
    let mut data = Vec::new();
    for kind in
        [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Char, tar::EntryType::Directory]
    {
        let mut entry = header("./dir", 0, kind);
        entry.set_link_name("/etc").expect("fits");
        entry.set_cksum();
        data.extend_from_slice(entry.as_bytes());
    }
    data.extend_from_slice(&tar(&[("./dir/passwd", b"mine")]));
    let files = unpack_all(&with_data("data.tar", &data)).expect("unpacks");
    assert_eq!(files, [("dir/passwd".to_owned(), b"mine".to_vec())]);
}

#[test]
fn the_same_path_twice_is_refused() {
    assert!(matches!(unpack_all(&deb(&[("./a", b"1"), ("./a", b"2")])), Err(DebError::Store(_))));
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_reserved() {
    let huge = header("./a", 8 << 30, tar::EntryType::Regular);
    assert!(matches!(unpack_all(&with_data("data.tar", huge.as_bytes())), Err(DebError::Malformed { .. })));
    let mut long = header("././@LongLink", 8 << 30, tar::EntryType::GNULongName).as_bytes().to_vec();
    long.resize(1 << 20, b'x');
    assert!(matches!(unpack_all(&with_data("data.tar", &long)), Err(DebError::Data { .. })));
    let mut member = with_data("data.tar", b"");
    let at = member.len() - 12;
    member[at..at + 10].copy_from_slice(b"9999999999");
    assert!(matches!(unpack_all(&member), Err(DebError::Malformed { .. })));
}

#[test]
fn what_is_no_package_is_named_as_such() {
    for bytes in [
        &b""[..],
        b"!<arch>\n",
        b"PK\x03\x04",
        &ar(&[("debian-binary", b"2.0\n")]),
        &ar(&[("data.tar", b"")]),
        &ar(&[("debian-binary", b"2.0\n"), ("data.tar.lzma", b"x")]),
        &ar(&[("debian-binary", &b"2.0\n"[..]); 100]),
    ] {
        let error = unpack_all(bytes).expect_err("refused");
        assert!(error.to_string().contains("is not a Debian package"), "{error}");
    }
    let missing = unpack(Path::new("/nonexistent.deb"), Path::new("/"), &mut |_| None, &mut |_| {});
    assert!(missing.expect_err("refused").to_string().contains("/nonexistent.deb"));
}

#[test]
fn a_package_cut_anywhere_is_an_error_and_never_a_panic() {
    let data = tar(&[("./a", &[7; 700]), ("./b", b"x")]);
    for name in ["data.tar", "data.tar.xz", "data.tar.zst"] {
        let data = match name {
            "data.tar.xz" => xz(&data),
            "data.tar.zst" => zstd(&data),
            // The two blocks of zeros that close a tar archive may be missing; that is no loss.
            _ => data[..data.len() - 1024].to_vec(),
        };
        let package = with_data(name, &data);
        for length in (0..package.len() - 1).step_by(3) {
            assert!(unpack_all(&package[..length]).is_err(), "{name} cut at {length}");
        }
    }
}

#[test]
fn damaged_packages_never_panic() {
    let data = tar(&[("./a", &[7; 100]), (&format!("./{}", "n".repeat(150)), b"x")]);
    let samples = [
        with_data("data.tar", &data),
        with_data("data.tar.xz", &xz(&data)),
        with_data("data.tar.zst", &zstd(&data)),
    ];
    let mut random = Random(0x5eed);
    for round in 0..1500 {
        let mut package = samples[round % samples.len()].clone();
        for _ in 0..=random.below(4) {
            let at = random.below(package.len());
            package[at] = random.below(256) as u8;
        }
        // Any result will do; the helper checks that nothing was written elsewhere.
        let _ = unpack_all(&package);
    }
}
