use super::*;
use crate::testing::{Random, elf_module, module, xz, zstd};

/// A module folder with the given files.
fn tree(files: &[(&str, &[u8])]) -> (tempfile::TempDir, ModuleTree) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for (path, contents) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().expect("has one")).expect("makes");
        fs::write(path, contents).expect("writes");
    }
    let tree = ModuleTree::open(folder.path()).expect("opens");
    (folder, tree)
}

fn names(selection: &Selection) -> Vec<&str> {
    selection.modules.iter().map(|module| module.name.as_str()).collect()
}

#[test]
fn modules_come_after_what_they_need_whatever_their_compression() {
    let (_folder, tree) = tree(&[
        (
            "kernel/drivers/virtio/virtio_pci.ko.xz",
            &xz(&module(&["name=virtio_pci", "depends=virtio,virtio-ring"])),
        ),
        ("kernel/drivers/virtio/virtio.ko.zst", &zstd(&module(&["depends=virtio_ring"]))),
        ("kernel/drivers/virtio/virtio_ring.ko", &module(&["depends=builtin_one"])),
        ("kernel/other.ko", b"never opened"),
        ("modules.builtin", b"kernel/lib/builtin-one.ko\n"),
    ]);
    let selection = tree.select(["virtio-pci", "builtin_one", "virtio"]).expect("selects");
    assert_eq!(names(&selection), ["virtio_ring", "virtio", "virtio_pci"]);
    assert_eq!(selection.modules[2].path, "kernel/drivers/virtio/virtio_pci.ko");
    assert!(selection.modules.iter().all(|module| module.contents.starts_with(b"\x7fELF")));
    assert!(selection.missing.is_empty());
    assert!(tree.is_builtin("builtin-one") && !tree.is_builtin("virtio"));
    assert_eq!(tree.names().count(), 4);
}

#[test]
fn modules_dep_lists_all_that_is_needed_nearest_first() {
    let (_folder, tree) = tree(&[
        ("a.ko", &module(&["depends=b,d"])),
        ("b.ko", &module(&["depends=c"])),
        ("c.ko", &module(&["depends="])),
        ("d.ko", &module(&["depends=c", "alias=fs-d", "alias=pci:v*", "alias=with space"])),
        ("e.ko", &module(&[])),
    ]);
    let selection = tree.select(["a", "e"]).expect("selects");
    assert_eq!(names(&selection), ["c", "b", "d", "a", "e"]);
    assert_eq!(selection.modules_dep(), "c.ko:\nb.ko: c.ko\nd.ko: c.ko\na.ko: d.ko b.ko c.ko\ne.ko:\n");
    assert_eq!(selection.modules_alias(), "alias fs-d d\nalias pci:v* d\n");
    let order: Vec<&str> =
        selection.loading_order(&["b"]).iter().map(|module| module.name.as_str()).collect();
    assert_eq!(order, ["c", "b"]);
    assert!(selection.loading_order::<&str>(&[]).is_empty());
}

#[test]
fn soft_dependencies_come_along_only_where_they_exist() {
    let (_folder, tree) = tree(&[
        ("a.ko", &module(&["softdep=pre: helper absent post: later"])),
        ("helper.ko", &module(&["softdep=pre: a"])),
        ("later.ko", &module(&[])),
    ]);
    assert_eq!(names(&tree.select(["a"]).expect("selects")), ["helper", "a"]);
}

#[test]
fn unknown_names_are_reported_not_fatal() {
    let (_folder, tree) = tree(&[("a.ko", &module(&[]))]);
    let selection = tree.select(["no-such", "a"]).expect("selects");
    assert_eq!(selection.missing, ["no_such"]);
    assert_eq!(names(&selection), ["a"]);
}

#[test]
fn broken_dependencies_are_errors_that_name_the_module() {
    let (_folder, tree) = tree(&[
        ("a.ko", &module(&["depends=b"])),
        ("b.ko", &module(&["depends=a"])),
        ("c.ko", &module(&["depends=gone"])),
        ("text.ko", b"hello"),
        ("cut.ko.xz", &xz(&module(&[]))[..40]),
    ]);
    assert!(matches!(tree.select(["a"]), Err(ModuleError::Cycle(name)) if name == "a"));
    assert!(matches!(tree.select(["c"]), Err(ModuleError::MissingDependency { name, .. }) if name == "gone"));
    assert!(matches!(tree.select(["text"]), Err(ModuleError::NotAModule(_))));
    assert!(matches!(tree.select(["cut"]), Err(ModuleError::Damaged { .. })));
}

#[test]
fn links_out_of_the_folder_are_not_followed() {
    let (folder, _) = tree(&[("kernel/a.ko", &module(&[]))]);
    std::os::unix::fs::symlink("/", folder.path().join("build")).expect("links");
    std::os::unix::fs::symlink("kernel/a.ko", folder.path().join("b.ko")).expect("links");
    let tree = ModuleTree::open(folder.path()).expect("opens");
    assert_eq!(tree.names().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn cut_or_damaged_objects_never_panic() {
    for class in [1, 2] {
        let good = elf_module(&["depends=a,b", "alias=x", "softdep=pre: y"], class);
        let info = modinfo::parse(&good).expect("is one");
        assert_eq!(
            (info.depends, info.aliases),
            (vec!["a".to_owned(), "b".to_owned()], vec!["x".to_owned()])
        );
        for length in 0..good.len() {
            let _ = modinfo::parse(&good[..length]);
        }
        let mut random = Random(0xe1f);
        for _ in 0..20_000 {
            let mut bad = good.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(bad.len());
                bad[at] = random.below(256) as u8;
            }
            let _ = modinfo::parse(&bad);
        }
    }
    assert_eq!(modinfo::parse(&elf_module(&["depends=a"], 3)), None);
}
