//! The text that `apt-cache show` prints, and Debian's ordering of versions.

use std::cmp::Ordering;

use crate::digest::Digest;

/// A version of a package that can be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version, with epoch if there is one.
    pub version: String,
    /// Size of the package file in bytes.
    pub size: u64,
    /// SHA-256 of the package file, from the distribution's signed lists.
    pub sha256: Digest,
    /// What it depends on; of alternatives the first.
    pub depends: Vec<Dependency>,
}

/// One dependency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dependency {
    /// Name of the package.
    pub name: String,
    /// Set if it has to be exactly this version.
    pub exact: Option<String>,
}

/// The packages in a list of records (deb822(5)). A record without a hash (an installed package, for instance) cannot
/// be fetched and is left out.
pub(super) fn parse(text: &str) -> Vec<Package> {
    text.split("\n\n").filter_map(parse_one).collect()
}

fn parse_one(record: &str) -> Option<Package> {
    let field = |wanted: &str| {
        record.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(wanted).then(|| value.trim())
        })
    };
    Some(Package {
        name: field("Package")?.to_owned(),
        version: field("Version")?.to_owned(),
        size: field("Size")?.parse().ok()?,
        sha256: field("SHA256")?.parse().ok()?,
        depends: [field("Pre-Depends"), field("Depends")]
            .into_iter()
            .flatten()
            .flat_map(|list| list.split(','))
            .filter_map(parse_dependency)
            .collect(),
    })
}

/// `name:any (= 1.2) [amd64] | other` (Debian Policy 7.1).
fn parse_dependency(text: &str) -> Option<Dependency> {
    let first = text.split('|').next()?.trim();
    let name = first.split([' ', '(', '[', '<', ':']).next()?;
    let relation =
        first.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(inner, _)| inner.trim());
    let exact =
        relation.and_then(|relation| relation.strip_prefix('=')).map(|version| version.trim().to_owned());
    (!name.is_empty()).then(|| Dependency { name: name.to_owned(), exact })
}

/// Which of two versions is newer (Debian Policy 5.6.12).
pub(super) fn compare_versions(a: &str, b: &str) -> Ordering {
    let (epoch_a, upstream_a, revision_a) = split_version(a);
    let (epoch_b, upstream_b, revision_b) = split_version(b);
    compare_digits(epoch_a, epoch_b)
        .then_with(|| compare_part(upstream_a, upstream_b))
        .then_with(|| compare_part(revision_a, revision_b))
}

fn split_version(version: &str) -> (&str, &str, &str) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
    (epoch, upstream, revision)
}

/// Compares stretches of non-digits and of digits in turn.
fn compare_part(mut a: &str, mut b: &str) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let (text_a, rest_a) = split_at_first(a, |c| c.is_ascii_digit());
        let (text_b, rest_b) = split_at_first(b, |c| c.is_ascii_digit());
        let (number_a, next_a) = split_at_first(rest_a, |c| !c.is_ascii_digit());
        let (number_b, next_b) = split_at_first(rest_b, |c| !c.is_ascii_digit());
        let order = compare_text(text_a, text_b).then_with(|| compare_digits(number_a, number_b));
        if order.is_ne() {
            return order;
        }
        (a, b) = (next_a, next_b);
    }
    Ordering::Equal
}

fn split_at_first(text: &str, stop: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(stop).unwrap_or(text.len()))
}

/// `~` comes before the end, the end before letters, letters before everything else.
fn compare_text(a: &str, b: &str) -> Ordering {
    let weight = |c: Option<char>| match c {
        Some('~') => 0,
        None => 1,
        Some(c) if c.is_ascii_alphabetic() => c as u32 + 1,
        Some(c) => 0x100 + c as u32,
    };
    let (mut a, mut b) = (a.chars(), b.chars());
    loop {
        let (next_a, next_b) = (a.next(), b.next());
        let order = weight(next_a).cmp(&weight(next_b));
        if order.is_ne() || (next_a.is_none() && next_b.is_none()) {
            return order;
        }
    }
}

/// Numbers of any length.
fn compare_digits(a: &str, b: &str) -> Ordering {
    let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}
