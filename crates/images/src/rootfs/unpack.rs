//! Lays a Debian package out in a tree.

use std::path::Path;

use super::{Meta, RootError, Tree};
use crate::deb::{self, Member, MemberKind};

/// Adds everything in the package `deb` to `tree`. `progress` hears how many bytes of the package are done.
pub(crate) fn unpack(deb: &Path, tree: &mut Tree, progress: &mut dyn FnMut(u64)) -> Result<(), RootError> {
    let mut visit = |member: Member<'_>| {
        let Member { path, kind, mode, uid, gid, changed, size, contents } = member;
        let meta = Meta { mode, uid, gid, changed };
        match kind {
            MemberKind::Folder => tree.add_folder(path, meta),
            MemberKind::File => tree.add_file(path, meta, size, contents, deb),
            MemberKind::Symlink(target) => tree.add_symlink(path, &target, meta),
            MemberKind::HardLink(target) => tree.add_hard_link(path, &target),
        }
    };
    deb::walk(deb, &mut visit, progress)
}
