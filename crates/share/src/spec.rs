//! What a user says of a shared folder: `--share`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Bytes of a tag (virtio 1.2 5.11.4).
const LONGEST_TAG: usize = 36;

/// A folder of the host and the name under which the guest finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareSpec {
    /// The folder.
    pub folder: PathBuf,
    /// The name: letters, digits, `_`, `-` and `.`, at most 36, not beginning with a dot or dash.
    pub tag: String,
    /// The guest cannot change anything.
    pub read_only: bool,
}

/// A `--share` that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareSpecError {
    /// No folder, or no tag.
    #[error("{0:?} is not DIR:TAG, such as /srv/data:data")]
    Form(String),
    /// A tag that cannot be a folder's name in the guest.
    #[error(
        "{0:?} is no tag; it has 1 to 36 letters, digits, `_`, `-` or `.`, and begins with none of the latter two"
    )]
    Tag(String),
    /// Not an option.
    #[error("{0:?} is no option of a shared folder; there is readonly")]
    Option(String),
}

impl FromStr for ShareSpec {
    type Err = ShareSpecError;

    fn from_str(text: &str) -> Result<Self, ShareSpecError> {
        // The folder's name may have colons and commas; what is behind it has no colon.
        let (folder, rest) = text
            .rsplit_once(':')
            .filter(|(folder, _)| !folder.is_empty())
            .ok_or_else(|| ShareSpecError::Form(text.to_owned()))?;
        let mut parts = rest.split(',');
        let tag = parts.next().unwrap_or_default();
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if !(1..=LONGEST_TAG).contains(&tag.len()) || !tag.bytes().all(good) || tag.starts_with(['.', '-']) {
            return Err(ShareSpecError::Tag(tag.to_owned()));
        }
        let mut spec = Self { folder: folder.into(), tag: tag.to_owned(), read_only: false };
        for part in parts {
            match part {
                "readonly" => spec.read_only = true,
                _ => return Err(ShareSpecError::Option(part.to_owned())),
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for ShareSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.folder.display(), self.tag)?;
        if self.read_only { f.write_str(",readonly") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for text in ["/srv:data", "a:b,c:d.e_f-1,readonly", ".:x"] {
            let spec: ShareSpec = text.parse().expect(text);
            assert_eq!(spec.to_string(), text);
        }
        let spec: ShareSpec = "/a:b,readonly:c".parse().expect("a folder with a colon");
        assert_eq!((spec.folder, spec.read_only), ("/a:b,readonly".into(), false));
    }

    #[test]
    fn nonsense_is_refused() {
        let long = format!("/a:{}", "x".repeat(37));
        for text in ["", "/a", ":a", "/a:", "/a:..", "/a:-o", "/a:b c", "/a:b,ro", "/a:b,", "/a:b/c", &long] {
            assert!(text.parse::<ShareSpec>().is_err(), "{text}");
        }
    }
}
