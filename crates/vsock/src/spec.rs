//! What a user says of vsock: `--vsock`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The guest's number if none is given: the first that is nobody's already.
const FIRST_CID: u32 = 3;

/// A machine's vsock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// The guest's number (context identifier): at least 3, and not all ones.
    pub cid: u32,
    /// The socket to connect to for ports of the guest, and the beginning of the names of the others.
    pub socket: PathBuf,
}

/// A `--vsock` that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VsockSpecError {
    /// No socket.
    #[error("--vsock needs a socket, such as socket=/run/user/1000/vm.sock")]
    Socket,
    /// A number that is somebody else's, or none.
    #[error("{0:?} is no cid; it is a number from 3 to 4294967294")]
    Cid(String),
    /// Not an option.
    #[error("{0:?} is no option of vsock; there are cid= and socket=")]
    Option(String),
}

impl FromStr for VsockSpec {
    type Err = VsockSpecError;

    fn from_str(text: &str) -> Result<Self, VsockSpecError> {
        let (mut cid, mut socket) = (FIRST_CID, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("cid", value)) => {
                    let number = value.parse().ok().filter(|cid| (FIRST_CID..u32::MAX).contains(cid));
                    cid = number.ok_or_else(|| VsockSpecError::Cid(value.to_owned()))?;
                }
                Some(("socket", path)) if !path.is_empty() => socket = Some(PathBuf::from(path)),
                _ => return Err(VsockSpecError::Option(part.to_owned())),
            }
        }
        Ok(Self { cid, socket: socket.ok_or(VsockSpecError::Socket)? })
    }
}

impl fmt::Display for VsockSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cid={},socket={}", self.cid, self.socket.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let spec: VsockSpec = "socket=/a/b".parse().unwrap();
        assert_eq!((spec.cid, spec.to_string().parse()), (3, Ok(spec)));
        assert_eq!("cid=77,socket=x".parse::<VsockSpec>().unwrap().cid, 77);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "cid=3", "cid=2,socket=a", "cid=4294967295,socket=a", "socket=", "socket=a,x=1", "a"]
        {
            assert!(text.parse::<VsockSpec>().is_err(), "{text}");
        }
    }
}
