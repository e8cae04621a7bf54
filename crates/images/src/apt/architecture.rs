//! The architectures whose packages are fetched.

/// An architecture, as Debian names it (Debian Policy 11.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// 64-bit, the host's own.
    Amd64,
    /// 32-bit.
    I386,
}

impl Architecture {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::I386 => "i386",
        }
    }

    /// The last release of Debian with kernels for it, if there is none any more.
    pub(super) fn release(self) -> Option<&'static str> {
        match self {
            Self::Amd64 => None,
            Self::I386 => Some("bookworm"),
        }
    }

    /// What an error says of it.
    pub(super) fn in_words(self) -> &'static str {
        match self {
            Self::Amd64 => "",
            Self::I386 => " for i386",
        }
    }
}
