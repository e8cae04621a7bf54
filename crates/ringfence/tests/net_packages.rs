//! A package repository on this host's loopback, and a guest that downloads from it through the NAT, with the host's own apt.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use support::image::{ensure, random_bytes, sha256_of};
use support::{finish, ringfence};

/// Packages of the repository, each with a file of random bytes.
const PACKAGES: usize = 12;
const LEN: usize = 700_000;

/// Makes a package, and the lines about it in the repository's list.
fn package(folder: &Path, number: usize) -> (PathBuf, String, String) {
    let (name, tree) = (format!("ringfence-test-{number}"), folder.join(format!("tree-{number}")));
    let data = random_bytes(LEN + number);
    // Every package but the first needs the one before it.
    let depends =
        if number > 0 { format!("Depends: ringfence-test-{}\n", number - 1) } else { String::new() };
    let control = format!(
        "Package: {name}\nVersion: 1.{number}\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n{depends}\
         Description: a test\n"
    );
    for (path, bytes) in
        [("DEBIAN/control", control.as_bytes()), (&format!("usr/share/{name}/data"), &data[..])]
    {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let deb = folder.join("repository").join(format!("{name}.deb"));
    let output = Command::new("dpkg-deb")
        .args(["--root-owner-group", "--build"])
        .args([&tree, &deb])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let bytes = fs::read(&deb).unwrap();
    let file = deb.file_name().unwrap().to_string_lossy().into_owned();
    let lines =
        format!("{control}Filename: ./{file}\nSize: {}\nSHA256: {}\n\n", bytes.len(), sha256_of(&bytes));
    (deb, lines, sha256_of(&data))
}

/// Makes the repository in `folder`; gives what is in each package.
fn repository(folder: &Path) -> Vec<String> {
    fs::create_dir(folder.join("repository")).unwrap();
    let (mut list, mut sums) = (String::new(), Vec::new());
    for number in 0..PACKAGES {
        let (_, lines, sum) = package(folder, number);
        list.push_str(&lines);
        sums.push(sum);
    }
    let mut release = "Origin: test\nSuite: test\nSHA256:\n".to_owned();
    writeln!(release, " {} {} Packages", sha256_of(list.as_bytes()), list.len()).unwrap();
    fs::write(folder.join("repository/Packages"), list).unwrap();
    fs::write(folder.join("repository/Release"), release).unwrap();
    sums
}

/// Serves the files of a folder over HTTP/1.1, any number of requests on a connection.
fn serve(folder: PathBuf) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let folder = Arc::new(folder);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, folder) = (stream.unwrap(), Arc::clone(&folder));
            thread::spawn(move || {
                let mut writer = stream.try_clone().unwrap();
                let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
                while let Some(request) = lines.next() {
                    while lines.next().is_some_and(|line| !line.is_empty()) {}
                    let path = request.split(' ').nth(1).unwrap_or_default().trim_start_matches('/');
                    let name = path.rsplit('/').next().unwrap_or_default();
                    let (status, body) = match fs::read(folder.join(name)) {
                        Ok(body) if !name.is_empty() => ("200 OK", body),
                        _ => ("404 Not Found", Vec::new()),
                    };
                    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
                    if writer.write_all(&[head.as_bytes(), &body].concat()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// The host's apt, in the guest: the host's files are its root, to be read only, with what apt writes to in the guest's memory.
const GUEST: &str = r#"
host=/mnt/host
for place in tmp var/lib/apt var/cache/apt etc/apt; do mount -t tmpfs none $host/$place || exit 9; done
mount --bind /dev $host/dev && mount --bind /proc $host/proc || exit 9
mkdir -p $host/etc/apt/apt.conf.d $host/etc/apt/preferences.d $host/etc/apt/trusted.gpg.d
mkdir -p $host/var/lib/apt/lists/partial $host/var/cache/apt/archives/partial
echo "deb [trusted=yes] http://10.0.2.2:$1/ ./" > $host/etc/apt/sources.list
apt="chroot $host apt-get -q -o APT::Sandbox::User=root -o Dir::State::status=/tmp/status"
: > $host/tmp/status
$apt update || exit 8
$apt -y --download-only --no-install-recommends install ringfence-test-$(($2 - 1)) || exit 7
for i in $(seq 0 $(($2 - 1))); do
  chroot $host sh -c "dpkg-deb -x /var/cache/apt/archives/ringfence-test-${i}_*.deb /tmp/root" || exit 6
  echo "@sum $(sha256sum < $host/tmp/root/usr/share/ringfence-test-$i/data | cut -c1-64)"
done
exit 5
"#;

fn guest_downloads_packages(image: &str) {
    ensure(image);
    let folder = tempfile::tempdir().unwrap();
    let sums = repository(folder.path());
    let port = serve(folder.path().join("repository"));
    let mut command = ringfence();
    command.args(["run", image, "--memory", "1G", "--timeout", "240", "--share", "/:host,readonly"]);
    command.args(["--", "sh", "-c", GUEST, "sh", &port.to_string(), &PACKAGES.to_string()]);
    let run = finish(&mut command);
    run.expect(5, &[]);
    let got: Vec<&str> =
        run.out.lines().filter_map(|line| Some(line.strip_prefix("@sum ")?.trim())).collect();
    assert_eq!(got, sums, "{run:#?}");
}

#[test]
fn guest_downloads_packages_through_the_nat() {
    guest_downloads_packages("shell");
}

#[test]
fn guest_downloads_packages_through_the_nat_with_linux_6_12() {
    guest_downloads_packages("shell:6.12");
}
