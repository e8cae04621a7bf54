use super::*;

fn tree() -> (tempfile::TempDir, Tree) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let root = folder.path().join("root");
    fs::create_dir(&root).expect("makes");
    let tree = Tree::new(&root);
    (folder, tree)
}

fn put(tree: &mut Tree, path: &str, text: &str) {
    tree.add_text(path, Meta::root(0o644), text.as_bytes()).expect("adds");
}

fn link(tree: &mut Tree, path: &str, target: &str) {
    tree.add_symlink(path, target, Meta::root(0o777)).expect("adds");
}

#[test]
fn files_below_links_land_where_the_links_lead() {
    let (_scratch, mut tree) = tree();
    tree.add_folder("usr/bin", Meta::root(0o755)).expect("adds");
    link(&mut tree, "bin", "usr/bin");
    link(&mut tree, "usr/local", "/opt/../usr/share");
    put(&mut tree, "bin/sh", "shell");
    put(&mut tree, "usr/local/x/y", "deep");
    tree.add_folder("bin", Meta::root(0o700)).expect("keeps the link");
    assert_eq!(tree.read("usr/bin/sh").expect("reads"), b"shell");
    assert_eq!(tree.read("/usr/share/x/y").expect("reads"), b"deep");
    tree.make_links().expect("links");
    tree.seal().expect("seals");
    assert_eq!(fs::read_link(tree.folder().join("bin")).expect("is a link"), Path::new("usr/bin"));
    let mode = fs::metadata(tree.folder().join("usr/bin")).expect("is there").mode();
    assert_eq!(mode & 0o7777, 0o700);
}

#[test]
fn links_that_lead_out_are_followed_inside_only() {
    let (scratch, mut tree) = tree();
    link(&mut tree, "etc", "/../../outside");
    link(&mut tree, "up", "../..");
    put(&mut tree, "etc/passwd", "x");
    put(&mut tree, "up/file", "y");
    assert_eq!(fs::read_dir(scratch.path()).expect("lists").count(), 1);
    assert_eq!(tree.read("outside/passwd").expect("reads"), b"x");
    assert_eq!(tree.read("file").expect("reads"), b"y");
}

#[test]
fn circles_and_files_on_the_way_are_refused() {
    let (_scratch, mut tree) = tree();
    link(&mut tree, "a", "b");
    link(&mut tree, "b", "a");
    put(&mut tree, "file", "x");
    let circle = tree.add_text("a/x", Meta::root(0o644), b"");
    assert!(matches!(circle, Err(RootError::LinkLoop(_))), "{circle:?}");
    let below = tree.add_text("file/x", Meta::root(0o644), b"");
    assert!(matches!(below, Err(RootError::NotAFolder(_))), "{below:?}");
    tree.add_folder("folder", Meta::root(0o755)).expect("adds");
    for result in [
        tree.add_text("folder", Meta::root(0o644), b""),
        tree.add_symlink("folder", "file", Meta::root(0o777)),
        tree.add_folder("file", Meta::root(0o755)),
    ] {
        assert!(matches!(result, Err(RootError::NotAFolder(_))), "{result:?}");
    }
}

#[test]
fn later_file_takes_the_place_of_an_earlier_file_or_link() {
    let (_scratch, mut tree) = tree();
    put(&mut tree, "first", "1");
    tree.add_hard_link("second", "first").expect("links");
    put(&mut tree, "first", "2");
    assert_eq!(tree.read("second").expect("reads"), b"1");
    link(&mut tree, "third", "first");
    put(&mut tree, "third", "3");
    assert_eq!(tree.read("first").expect("reads"), b"2");
    let none = tree.add_hard_link("fourth", "nothing");
    assert!(matches!(none, Err(RootError::NoTarget { .. })), "{none:?}");
}

#[test]
fn owners_that_differ_from_the_hosts_are_told() {
    let (_scratch, mut tree) = tree();
    put(&mut tree, "mine", "");
    let host = fs::metadata(tree.folder().join("mine")).expect("is there");
    let (uid, gid) = (host.uid(), host.gid());
    for (path, meta) in [
        ("same", Meta { mode: 0o644, uid, gid, changed: 5 }),
        ("other", Meta { mode: 0o4755, uid: uid + 1, gid: gid + 2, changed: 5 }),
    ] {
        tree.add_text(path, meta, b"").expect("adds");
    }
    let strangers = tree.strangers().expect("compares");
    assert!(
        strangers.contains(&("other", uid + 1, gid + 2)) && strangers.iter().all(|found| found.0 != "same")
    );
    let other = fs::metadata(tree.folder().join("other")).expect("is there");
    assert_eq!((other.mode() & 0o7777, other.mtime()), (0o4755, 5));
}
