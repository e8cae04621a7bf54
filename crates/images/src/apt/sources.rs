//! The host's package sources: copied for our own use, and sources of backports or of another release derived from them.

use std::fs;
use std::path::Path;

/// A source file: its name as apt knows it, and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceFile {
    pub(super) name: String,
    pub(super) text: String,
}

/// The host's source files. Files that apt would ignore are left out, and so are those that this user may not read:
/// apt could not use them either.
pub(super) fn of_host(list: &Path, parts: &Path) -> Vec<SourceFile> {
    let mut files = Vec::new();
    if let Ok(text) = fs::read_to_string(list) {
        files.push(SourceFile { name: "sources.list".to_owned(), text });
    }
    let mut in_parts: Vec<SourceFile> = fs::read_dir(parts)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            is_source_name(&name).then_some(())?;
            Some(SourceFile { text: fs::read_to_string(entry.path()).ok()?, name })
        })
        .collect();
    in_parts.sort_by(|a, b| a.name.cmp(&b.name));
    files.extend(in_parts);
    files
}

/// The names that sources.list(5) accepts.
fn is_source_name(name: &str) -> bool {
    (name.ends_with(".list") || name.ends_with(".sources"))
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
        && !name.starts_with('.')
}

/// A source for the backports of the release `codename`, from the same mirror and with the same key as the release
/// itself. `None` if the release is not among `files` or its backports already are.
pub(super) fn backports(files: &[SourceFile], codename: &str) -> Option<SourceFile> {
    let entries: Vec<Entry> = files.iter().flat_map(entries).collect();
    roles(codename).into_iter().find_map(|suite| {
        let wanted = format!("{suite}-backports");
        if entries.iter().any(|entry| entry.suites.contains(&wanted)) {
            return None;
        }
        Some(derive(base(&entries, suite)?, "backports", &wanted))
    })
}

/// A source for `release`, from the same mirror and with the same key as the host's own release `codename`, and for any
/// architecture. `None` if the host's release is not among `files`.
pub(super) fn release(files: &[SourceFile], codename: &str, release: &str) -> Option<SourceFile> {
    let entries: Vec<Entry> = files.iter().flat_map(entries).collect();
    let base = roles(codename).into_iter().find_map(|suite| base(&entries, suite))?;
    let mut file = derive(base, release, release);
    file.text = for_any_architecture(&file.text);
    Some(file)
}

/// What a source may call the release.
fn roles(codename: &str) -> [&str; 2] {
    [codename, "stable"]
}

/// The source of a release itself.
fn base<'a>(entries: &'a [Entry], suite: &str) -> Option<&'a Entry> {
    entries
        .iter()
        .find(|entry| entry.suites.iter().any(|s| s == suite) && entry.components.iter().any(|c| c == "main"))
}

/// Another suite from where `base` is from.
fn derive(base: &Entry, name: &str, suite: &str) -> SourceFile {
    match &base.form {
        Form::Line { options, uri } => SourceFile {
            name: format!("ringfence-{name}.list"),
            text: format!("deb {options} {uri} {suite} main\n"),
        },
        Form::Stanza { kept } => SourceFile {
            name: format!("ringfence-{name}.sources"),
            text: format!("Types: deb\nSuites: {suite}\nComponents: main\n{kept}"),
        },
    }
}

/// A line or stanza without its choice of architectures: `[arch=amd64]`, `Architectures: amd64` (sources.list(5)).
fn for_any_architecture(text: &str) -> String {
    let chooses = |option: &str| {
        let key = option.trim_start_matches('[').split(['=', ':', '+', '-']).next().unwrap_or_default();
        ["arch", "architectures", "architectures-add", "architectures-remove"]
            .contains(&key.to_ascii_lowercase().as_str())
    };
    match text.split_once(']').and_then(|(head, tail)| Some((head.strip_prefix("deb [")?, tail))) {
        Some((options, tail)) => {
            let kept: Vec<&str> = options.split_whitespace().filter(|option| !chooses(option)).collect();
            format!("deb [{}]{tail}", kept.join(" "))
        }
        None => text.lines().filter(|line| !chooses(line)).map(|line| format!("{line}\n")).collect(),
    }
}

struct Entry {
    suites: Vec<String>,
    components: Vec<String>,
    form: Form,
}

enum Form {
    /// `deb [options] uri suite component…`; the options keep their brackets.
    Line { options: String, uri: String },
    /// The other fields of the stanza, as they are: addresses, keys, trust.
    Stanza { kept: String },
}

fn entries(file: &SourceFile) -> Vec<Entry> {
    if file.name.ends_with(".sources") { stanzas(&file.text) } else { lines(&file.text) }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn lines(text: &str) -> Vec<Entry> {
    let parse = |line: &str| {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb")?;
        rest.starts_with(char::is_whitespace).then_some(())?;
        let rest = rest.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(bracketed) => {
                let (options, rest) = bracketed.split_once(']')?;
                (format!("[{options}]"), rest)
            }
            None => (String::new(), rest),
        };
        let mut rest = words(rest).into_iter();
        let uri = rest.next()?;
        let suite = rest.next()?;
        Some(Entry { suites: vec![suite], components: rest.collect(), form: Form::Line { options, uri } })
    };
    text.lines().filter_map(parse).collect()
}

fn stanzas(text: &str) -> Vec<Entry> {
    let uncommented: String =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    uncommented.split("\n\n").filter_map(stanza).collect()
}

fn stanza(text: &str) -> Option<Entry> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if line.starts_with([' ', '\t']) {
            // A continuation, such as a key inside the file.
            let (_, value) = fields.last_mut()?;
            value.push('\n');
            value.push_str(line);
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    let get = |wanted: &str| {
        fields
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(wanted))
            .map(|(_, value)| words(value))
            .unwrap_or_default()
    };
    let enabled = !get("Enabled")
        .iter()
        .any(|value| matches!(value.to_ascii_lowercase().as_str(), "no" | "false" | "0"));
    if !enabled || !get("Types").iter().any(|kind| kind == "deb") {
        return None;
    }
    let replaced =
        |key: &str| ["Types", "Suites", "Components"].iter().any(|name| name.eq_ignore_ascii_case(key));
    let kept: String = fields
        .iter()
        .filter(|(key, _)| !replaced(key))
        .map(|(key, value)| format!("{key}: {value}\n"))
        .collect();
    Some(Entry { suites: get("Suites"), components: get("Components"), form: Form::Stanza { kept } })
}
