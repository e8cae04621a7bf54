use std::fs;
use std::process::Command;
use std::time::{Duration, SystemTime};

use super::*;
use crate::progress::Quiet;
use crate::testing::{FakeApt, RELEASE, ar, deb, elf_module, header, tar};

/// Names the cache folder and the programs for the process started by a test below.
const CHILD_CACHE: &str = "RINGFENCE_TEST_CHILD_CACHE";
const CHILD_APT: &str = "RINGFENCE_TEST_CHILD_APT";

fn setup() -> (FakeApt, tempfile::TempDir, Catalogue) {
    let fake = FakeApt::new();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let catalogue = Catalogue::in_cache(Cache::at(folder.path().join("cache"))).with_search_path(fake.path());
    (fake, folder, catalogue)
}

/// The same cache on a host without apt.
fn without_apt(catalogue: &Catalogue) -> Catalogue {
    catalogue.clone().with_search_path("/nonexistent")
}

/// The initial RAM disk of an image in memory.
fn initrd(image: &Image) -> &std::path::Path {
    image.initrd.as_deref().expect("is one in memory")
}

/// Changes one byte, so that size and time do not tell.
fn damage(path: &std::path::Path, keep_time: bool) {
    let time = fs::metadata(path).expect("is there").modified().expect("has a time");
    let mut bytes = fs::read(path).expect("reads");
    *bytes.last_mut().expect("not empty") ^= 1;
    fs::write(path, bytes).expect("writes");
    let time = if keep_time { time } else { SystemTime::UNIX_EPOCH + Duration::from_secs(9) };
    fs::File::options().write(true).open(path).expect("opens").set_modified(time).expect("sets");
}

#[test]
fn first_use_fetches_and_later_use_needs_no_apt() {
    let (fake, _folder, catalogue) = setup();
    assert!(matches!(catalogue.find("shell"), Err(ImageError::NotCached(_))));
    let image = catalogue.ensure("shell", &mut Quiet).expect("fetches");
    assert_eq!(image.kernel_release, RELEASE);
    assert_eq!(fs::read(&image.kernel).expect("reads"), b"kernel");
    assert_eq!(image.modules, ["virtio_ring", "virtio_pci"]);
    assert_eq!(image.packages[1], ("busybox-static".to_owned(), "1:1.35.0-4".to_owned()));
    let initrd = fs::read(initrd(&image)).expect("reads");
    let entries = crate::cpio::tests::parse(&initrd);
    let has = |path: String| entries.iter().any(|entry| entry.0 == path);
    assert!(has("init".to_owned()) && has("bin/busybox".to_owned()));
    assert!(has(format!("lib/modules/{RELEASE}/kernel/drivers/virtio/virtio_ring.ko")));
    assert_eq!(fake.downloads(), [format!("linux-image-{RELEASE}"), "busybox-static".to_owned()]);

    let offline = without_apt(&catalogue);
    assert_eq!(offline.ensure("shell", &mut Quiet).expect("is cached"), image);
    assert_eq!(offline.find("shell").expect("is cached"), image);
}

#[test]
fn image_for_i386_has_package_lists_of_its_own_and_loads_the_disks_driver() {
    let (fake, _folder, catalogue) = setup();
    let base = format!("lib/modules/{RELEASE}/kernel/drivers");
    let needs = format!("linux-image-{RELEASE} (= 6.1.9-1)");
    fake.serve("linux-image-686-pae", "6.1.9-1", &needs, &deb(&[]));
    fake.serve(
        &format!("linux-image-{RELEASE}"),
        "6.1.9-1",
        "",
        &deb(&[
            (&format!("./boot/vmlinuz-{RELEASE}"), b"kernel"),
            (&format!("./{base}/nvme/nvme-core.ko"), &elf_module(&["depends="], 1)),
            (&format!("./{base}/nvme/nvme.ko"), &elf_module(&["depends=nvme-core"], 1)),
            (&format!("./{base}/virtio/virtio_blk.ko"), &elf_module(&["depends="], 1)),
        ]),
    );
    let image = catalogue.ensure("shell:i386", &mut Quiet).expect("fetches");
    assert_eq!(image.modules, ["virtio_blk", "nvme_core", "nvme"]);
    let entries = crate::cpio::tests::parse(&fs::read(initrd(&image)).expect("reads"));
    let list = entries.iter().find(|entry| entry.0 == "etc/ringfence/modules").expect("is there");
    let expected = format!("/{base}/nvme/nvme-core.ko\n/{base}/nvme/nvme.ko\n");
    assert_eq!(String::from_utf8_lossy(&list.4), expected);
    let root = catalogue.cache().root();
    assert!(root.join("apt-i386/updated").exists() && !root.join("apt").exists());
    // The other images' are neither used nor replaced.
    catalogue.ensure("shell", &mut Quiet).expect("fetches");
    assert!(root.join("apt/updated").exists());
    // An older version's is built anew with its driver.
    damage(initrd(&image), false);
    let offline = without_apt(&catalogue);
    assert_eq!(offline.ensure("shell:i386", &mut Quiet).expect("builds"), image);
    let again = crate::cpio::tests::parse(&fs::read(initrd(&image)).expect("reads"));
    assert!(again == entries);
}

#[test]
fn host_without_apt_gets_the_advice_unless_the_image_is_cached() {
    let (_fake, _folder, catalogue) = setup();
    let error = without_apt(&catalogue).ensure("shell", &mut Quiet).expect_err("fails");
    assert!(matches!(error, ImageError::Apt(AptError::Missing(_))));
    assert!(error.to_string().contains("--kernel"), "{error}");
}

#[test]
fn unknown_names_are_refused_with_the_known_ones() {
    let (_fake, _folder, catalogue) = setup();
    for name in ["", "../x", "Shell", "shell:"] {
        let error = catalogue.ensure(name, &mut Quiet).expect_err("is unknown");
        assert!(error.to_string().contains("shell, shell:6.12"), "{error}");
        assert!(catalogue.find(name).is_err() && catalogue.remove(name).is_err());
    }
}

#[test]
fn damaged_files_are_fetched_again() {
    let (fake, _folder, catalogue) = setup();
    let image = catalogue.ensure("shell", &mut Quiet).expect("fetches");
    let folder = image.kernel.parent().expect("has one").to_owned();
    let good = fs::read(initrd(&image)).expect("reads");
    let breakages: [&dyn Fn(); 6] = [
        &|| damage(&image.kernel, false),
        &|| fs::write(&image.kernel, b"").expect("writes"),
        &|| fs::write(folder.join("manifest.json"), b"{").expect("writes"),
        &|| fs::remove_dir_all(&folder).expect("removes"),
        &|| {
            fs::remove_file(initrd(&image)).expect("removes");
            damage(&folder.join("busybox"), true);
        },
        &|| {
            fs::remove_dir_all(&folder).expect("removes");
            fs::write(&folder, b"a file in its place").expect("writes");
        },
    ];
    for (round, breakage) in breakages.iter().enumerate() {
        breakage();
        let fetched = fake.downloads().len();
        assert!(catalogue.find("shell").is_err(), "{round}");
        assert_eq!(catalogue.ensure("shell", &mut Quiet).expect("fetches"), image, "{round}");
        assert_eq!(fs::read(&image.kernel).expect("reads"), b"kernel", "{round}");
        assert_eq!(fs::read(initrd(&image)).expect("reads"), good, "{round}");
        assert_eq!(fake.downloads().len(), fetched + 2, "{round}");
    }
}

#[test]
fn damaged_or_outdated_initrd_is_built_again_without_apt() {
    let (_fake, _folder, catalogue) = setup();
    let image = catalogue.ensure("shell", &mut Quiet).expect("fetches");
    let good = fs::read(initrd(&image)).expect("reads");
    let folder = image.kernel.parent().expect("has one").to_owned();
    let offline = without_apt(&catalogue);
    damage(initrd(&image), false);
    assert_eq!(offline.ensure("shell", &mut Quiet).expect("builds"), image);
    assert_eq!(fs::read(initrd(&image)).expect("reads"), good);

    // As if an older version had built it.
    let mut manifest = Manifest::load(&folder).expect("is there");
    fs::write(initrd(&image), b"older").expect("writes");
    manifest.record(&folder, INITRD).expect("records");
    manifest.initrd_recipe = "older".to_owned();
    manifest.store(&folder).expect("stores");
    assert!(offline.list()[0].cached.is_some(), "it is listed all the same");
    assert_eq!(offline.ensure("shell", &mut Quiet).expect("builds"), image);
    assert_eq!(fs::read(initrd(&image)).expect("reads"), good);
}

#[test]
fn failed_fetch_leaves_nothing_behind_and_the_next_one_works() {
    let (fake, _folder, catalogue) = setup();
    fake.serve("busybox-static", "1:1.35.0-4", "", &deb(&[("./bin/other", b"")]));
    let error = catalogue.ensure("shell", &mut Quiet).expect_err("has no busybox");
    assert!(matches!(error, ImageError::MissingFile { .. }), "{error}");
    assert!(!catalogue.cache().image("shell").exists());
    assert_eq!(fs::read_dir(catalogue.cache().root().join("tmp")).expect("lists").count(), 0);
    fake.serve("busybox-static", "1:1.35.0-4", "", &deb(&[("./usr/bin/busybox", b"busybox")]));
    catalogue.ensure("shell", &mut Quiet).expect("fetches");
}

#[test]
fn failed_download_is_tried_once_more_with_new_lists() {
    let (fake, _folder, catalogue) = setup();
    // The first download fails as it does when the lists are older than the mirror.
    let once = format!(
        "case \"$*\" in *download*) if [ ! -e {0}/failed ]; then echo >{0}/failed; \
         echo 'E: Failed to fetch http://m/x.deb  404  Not Found' >&2; exit 100; fi;; esac\n",
        fake.path().display()
    );
    fake.program("apt-get", &format!("{once}{}", fake.server()));
    catalogue.ensure("shell", &mut Quiet).expect("fetches the second time");
}

#[test]
fn pull_fetches_only_what_is_new() {
    let (fake, _folder, catalogue) = setup();
    let (image, changed) = catalogue.pull("shell", &mut Quiet).expect("pulls");
    assert!(changed);
    assert_eq!(catalogue.pull("shell", &mut Quiet).expect("pulls"), (image.clone(), false));
    fake.serve("busybox-static", "1:1.36.0-1", "", &deb(&[("./bin/busybox", b"newer")]));
    assert_eq!(catalogue.ensure("shell", &mut Quiet).expect("is cached"), image);
    let (newer, changed) = catalogue.pull("shell", &mut Quiet).expect("pulls");
    assert!(changed);
    assert_eq!(newer.packages[1].1, "1:1.36.0-1");
}

#[test]
fn list_and_remove_follow_what_is_on_disk() {
    let (_fake, _folder, catalogue) = setup();
    assert!(catalogue.list().iter().all(|listing| listing.cached.is_none()));
    assert!(!catalogue.remove("shell").expect("nothing to do"));
    let image = catalogue.ensure("shell", &mut Quiet).expect("fetches");
    let listing = catalogue.list();
    assert_eq!(listing[0].cached.as_ref(), Some(&image));
    assert!(image.size > 1000 && listing[1].cached.is_none());
    assert!(catalogue.remove("shell").expect("removes"));
    assert!(catalogue.list()[0].cached.is_none() && !image.kernel.exists());
}

#[test]
fn threads_that_need_the_same_image_fetch_it_once() {
    let (fake, _folder, catalogue) = setup();
    let images: Vec<Image> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..6).map(|_| scope.spawn(|| catalogue.ensure("shell", &mut Quiet).expect("gets it"))).collect();
        threads.into_iter().map(|thread| thread.join().expect("ends")).collect()
    });
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(fake.downloads().len(), 2);
}

#[test]
fn processes_that_need_the_same_image_fetch_it_once() {
    let (fake, _folder, catalogue) = setup();
    let program = std::env::current_exe().expect("known");
    let children: Vec<_> = (0..3)
        .map(|_| {
            Command::new(&program)
                .args(["--exact", "catalogue::tests::child_of_the_process_test", "--nocapture"])
                .env(CHILD_CACHE, catalogue.cache().root())
                .env(CHILD_APT, fake.path())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect("starts")
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().expect("ends");
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains("child has 6 bytes of kernel"));
    }
    assert_eq!(fake.downloads().len(), 2);
}

/// Does nothing by itself; the test above runs it in processes of their own.
#[test]
fn child_of_the_process_test() {
    let (Some(cache), Some(apt)) = (std::env::var_os(CHILD_CACHE), std::env::var_os(CHILD_APT)) else {
        return;
    };
    let catalogue = Catalogue::in_cache(Cache::at(cache)).with_search_path(apt);
    let image = catalogue.ensure("shell", &mut Quiet).expect("gets it");
    println!("child has {} bytes of kernel", fs::metadata(&image.kernel).expect("is there").len());
}

/// Offers the packages that a root cannot do without, and one with everything that a package can hold.
fn serve_root(fake: &FakeApt) {
    let masters: [(&str, &[u8]); 2] = [
        ("./usr/share/base-passwd/passwd.master", b"root:*:0:0::/root:/bin/bash\n"),
        ("./usr/share/base-passwd/group.master", b"root:*:0:\n"),
    ];
    fake.serve("base-passwd", "3.6.1", "", &deb(&masters));
    fake.serve("mawk", "1.3", "", &deb(&[("./usr/bin/mawk", b"awk")]));
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, kind: tar::EntryType, link: &str, mode: u32, gid: u64, contents: &[u8]| {
        let mut header = header(name, contents.len() as u64, kind);
        header.set_mode(mode);
        header.set_gid(gid);
        header.set_uid(0);
        if !link.is_empty() {
            header.set_link_name(link).expect("fits");
        }
        header.set_cksum();
        builder.append(&header, contents).expect("to memory");
    };
    add("./bin/", tar::EntryType::Directory, "", 0o755, 0, b"");
    add("./bin/bash", tar::EntryType::Regular, "", 0o2755, 42, b"shell");
    add("./bin/rbash", tar::EntryType::Symlink, "bash", 0o777, 0, b"");
    add("./usr/bin/again", tar::EntryType::Link, "./bin/bash", 0o755, 0, b"");
    let data = builder.into_inner().expect("to memory");
    let package = ar(&[("debian-binary", b"2.0\n"), ("control.tar", &tar(&[])), ("data.tar", &data)]);
    fake.serve("bash", "5.2", "", &package);
}

#[test]
fn image_on_disk_needs_e2fsprogs_and_says_so_before_it_fetches() {
    let (fake, _folder, catalogue) = setup();
    serve_root(&fake);
    let error = catalogue.ensure("debian", &mut Quiet).expect_err("has no mke2fs");
    assert!(error.to_string().contains("e2fsprogs"), "{error}");
    assert!(fake.downloads().is_empty());
}

#[test]
fn image_on_disk_holds_the_packages_files_with_their_owners() {
    let (fake, _folder, catalogue) = setup();
    serve_root(&fake);
    let Some(tools) = fake.link_tools(&["mke2fs", "debugfs", "e2fsck"]) else {
        println!("skipped: no e2fsprogs on this host");
        return;
    };
    let image = catalogue.ensure("debian", &mut Quiet).expect("builds");
    assert_eq!((image.initrd.as_deref(), image.kernel_release.as_str()), (None, RELEASE));
    assert!(image.append.contains("root=/dev/nvme0n1"));
    let disk = image.disk.as_ref().expect("has a disk");
    let checked = Command::new(&tools[2]).args(["-f", "-n"]).arg(disk).output().expect("runs");
    assert!(checked.status.success(), "{checked:?}");
    let ask = |request: &str| {
        let output = Command::new(&tools[1]).args(["-R", request]).arg(disk).output().expect("runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(ask("cat /etc/passwd").starts_with("root:"));
    assert_eq!(ask("cat /usr/bin/again"), "shell");
    let shell = ask("stat /usr/bin/bash");
    for part in ["Mode:  02755", "User:     0", "Group:    42", "Links: 2"] {
        assert!(shell.contains(part), "no {part:?} in {shell}");
    }
    for (link, target) in [("/bin", "usr/bin"), ("/usr/bin/rbash", "bash"), ("/usr/bin/awk", "mawk")] {
        assert!(ask(&format!("stat {link}")).contains(&format!("Fast link dest: \"{target}\"")), "{link}");
    }
    assert!(ask("stat /usr/sbin/init").contains("Mode:  0755"));
    assert!(ask(&format!("ls /usr/lib/modules/{RELEASE}")).contains("modules.dep"));

    // Found again without apt or any tool, until it is changed.
    let offline = without_apt(&catalogue);
    assert_eq!(offline.ensure("debian", &mut Quiet).expect("is cached"), image);
    damage(disk, false);
    assert!(matches!(offline.find("debian"), Err(ImageError::NotCached(_))));
    assert_eq!(catalogue.ensure("debian", &mut Quiet).expect("builds again"), image);
    assert!(catalogue.remove("debian").expect("removes") && !disk.exists());
}
