use super::*;

#[test]
fn package_paths_are_sorted_into_kernel_busybox_and_modules() {
    let mut release = None;
    let mut place = |path: &str| place(path, &mut release);
    assert_eq!(place("boot/vmlinuz-6.1").as_deref(), Some("vmlinuz"));
    for path in ["bin/busybox", "usr/bin/busybox"] {
        assert_eq!(place(path).as_deref(), Some("busybox"), "{path}");
    }
    for path in ["lib/modules/6.1/kernel/fs/x.ko", "usr/lib/modules/6.1/kernel/fs/x.ko"] {
        assert_eq!(place(path).as_deref(), Some("modules/kernel/fs/x.ko"), "{path}");
    }
    assert_eq!(place("lib/modules/6.1/modules.builtin").as_deref(), Some("modules/modules.builtin"));
    for path in
        ["boot/System.map-6.1", "usr/share/doc/bin/busybox", "lib/modules/6.1/modules.order", "lib/modules/x"]
    {
        assert_eq!(place(path), None, "{path}");
    }
    assert_eq!(release.as_deref(), Some("6.1"));
}

#[test]
fn only_the_packages_with_the_kernel_are_followed() {
    for name in ["linux-image-6.1.0-9-cloud-amd64", "linux-modules-6.8.0-31-generic"] {
        assert!(is_kernel_part(name), "{name}");
    }
    for name in [
        "kmod",
        "linux-base",
        "linux-image-cloud-amd64",
        "linux-modules-extra-6.8.0-31-generic",
        "linux-image-",
    ] {
        assert!(!is_kernel_part(name), "{name}");
    }
}

#[test]
fn images_have_names_and_fingerprints_of_their_own() {
    let fingerprints: std::collections::BTreeSet<String> = RECIPES.iter().map(contents_fingerprint).collect();
    let names: std::collections::BTreeSet<&str> = RECIPES.iter().map(|recipe| recipe.name).collect();
    assert_eq!((fingerprints.len(), names.len()), (RECIPES.len(), RECIPES.len()));
    assert_eq!(RECIPES[0].name, crate::Catalogue::DEFAULT);
}

#[test]
fn general_kernels_modules_are_packed_and_the_disks_driver_is_loaded() {
    let names = module_names(Architecture::I386);
    for name in MODULE_NAMES.iter().chain(loaded_at_start(Architecture::I386)).chain(&["crc32c_generic"]) {
        assert!(names.contains(name), "{name}");
    }
}
