//! Who owns what on either side.

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;

/// Nobody: whoever has no name on the other side.
const NOBODY: u32 = 65_534;

/// How owners of files are told to the guest, and taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owners {
    /// As they are: root shares.
    Same,
    /// An ordinary user shares, who is root there.
    Only(u32, u32),
}

impl Owners {
    /// By who this process is.
    pub(crate) fn of_process() -> Self {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if uid.is_root() { Self::Same } else { Self::Only(uid.as_raw(), gid.as_raw()) }
    }

    /// Owner and group as the guest sees them.
    pub(crate) fn to_guest(self, uid: u32, gid: u32) -> (u32, u32) {
        let squash = |id, ours| if id == ours { 0 } else { NOBODY };
        match self {
            Self::Same => (uid, gid),
            Self::Only(our_uid, our_gid) => (squash(uid, our_uid), squash(gid, our_gid)),
        }
    }

    /// An owner and a group that the guest sets, as the host has them.
    pub(crate) fn to_host(
        self,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<(Option<Uid>, Option<Gid>), Errno> {
        let (uid, gid) = match self {
            Self::Same => (uid, gid),
            Self::Only(our_uid, our_gid) => {
                if uid.is_some_and(|id| id != 0) || gid.is_some_and(|id| id != 0) {
                    return Err(Errno::PERM);
                }
                (uid.map(|_| our_uid), gid.map(|_| our_gid))
            }
        };
        // All ones stands for "as it is" in the system call.
        if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
            return Err(Errno::INVAL);
        }
        Ok((uid.map(Uid::from_raw), gid.map(Gid::from_raw)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_user_is_root_in_the_guest_and_others_are_nobody() {
        let owners = Owners::Only(1000, 100);
        assert_eq!(owners.to_guest(1000, 100), (0, 0));
        assert_eq!(owners.to_guest(0, 0), (NOBODY, NOBODY));
        let (uid, gid) = owners.to_host(Some(0), Some(0)).unwrap();
        assert_eq!((uid.unwrap().as_raw(), gid.unwrap().as_raw()), (1000, 100));
        assert_eq!(owners.to_host(Some(1000), None), Err(Errno::PERM));
        assert_eq!(owners.to_host(None, Some(5)), Err(Errno::PERM));
    }

    #[test]
    fn root_keeps_owners() {
        assert_eq!(Owners::Same.to_guest(3, 4), (3, 4));
        assert_eq!(Owners::Same.to_host(Some(u32::MAX), None), Err(Errno::INVAL));
    }
}
