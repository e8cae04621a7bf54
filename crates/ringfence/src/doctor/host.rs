//! The rest of the host: memory, virtualization, tools, folders, terminal.

use std::env;
use std::fs::{self, File};
use std::io::{IsTerminal, stdin, stdout};
use std::path::{Path, PathBuf};

use ringfence_images::Catalogue;
use ringfence_machine::{ByteSize, HostMemory};

use super::cpu::yes;
use super::{Finding, Verdict};
use crate::terminal;

pub(super) fn findings() -> Vec<Finding> {
    let mut findings = memory();
    findings.push(kvm(Path::new("/dev/kvm")));
    findings.extend(images());
    findings.push(console());
    findings
}

fn memory() -> Vec<Finding> {
    const TOPIC: &str = "memory";
    let memory = HostMemory::probe();
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = setting.split(['[', ']']).nth(1).unwrap_or("not offered").to_owned();
    let huge = matches!(chosen.as_str(), "always" | "madvise");
    vec![
        Finding::info(TOPIC, "in all", ByteSize(memory.total).to_string()),
        Finding::info(TOPIC, "available", ByteSize(memory.available).to_string()),
        Finding::check(
            TOPIC,
            "transparent huge pages",
            huge,
            chosen,
            "guests run slower; as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
    ]
}

fn kvm(device: &Path) -> Finding {
    const TOPIC: &str = "virtualization";
    let opened = File::options().read(true).write(true).open(device);
    let (verdict, value, hint) = match opened {
        Ok(_) => (
            Verdict::Info,
            "there, and may be opened",
            "no proof of speed: some hosts offer one that interprets; this version does not use it",
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            (Verdict::Lacks, "not there", "the software engine needs none")
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            (Verdict::Lacks, "there, but not for this user", "the software engine needs none")
        }
        Err(_) => (Verdict::Lacks, "there, but does not open", "the software engine needs none"),
    };
    Finding { topic: TOPIC, name: "/dev/kvm", verdict, value: value.to_owned(), hint: Some(hint) }
}

fn images() -> Vec<Finding> {
    const TOPIC: &str = "images";
    let apt = in_path("apt-get");
    let shown = apt.as_ref().map_or("not found".to_owned(), |path| path.display().to_string());
    let mut findings = vec![Finding::check(
        TOPIC,
        "apt-get",
        apt.is_some(),
        shown,
        "built-in images cannot be fetched; give --kernel FILE and --initrd FILE",
    )];
    match Catalogue::builtin() {
        Ok(catalogue) => {
            let cached: Vec<_> = catalogue.list().into_iter().filter_map(|listing| listing.cached).collect();
            let names: Vec<_> = cached
                .iter()
                .map(|image| format!("{} (Linux {})", image.name, image.kernel_release))
                .collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            findings.push(Finding::info(
                TOPIC,
                "cache folder",
                catalogue.cache().root().display().to_string(),
            ));
            findings.push(Finding::info(TOPIC, "on disk", names));
        }
        Err(error) => findings.push(Finding::check(
            TOPIC,
            "cache folder",
            false,
            error.to_string(),
            "set HOME or XDG_CACHE_HOME to keep images",
        )),
    }
    findings
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|candidate| candidate.is_file())
}

fn console() -> Finding {
    let terminal = stdin().is_terminal() && stdout().is_terminal();
    let value = match terminal::size() {
        Some((rows, columns)) => format!("{rows} rows, {columns} columns"),
        None => yes(terminal).to_owned(),
    };
    let finding = Finding::info("console", "terminal", value);
    if terminal { finding } else { finding.hint("input and output are passed as they are") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_device_is_no_error() {
        let finding = kvm(Path::new("/no/such/kvm"));
        assert_eq!((finding.verdict, finding.value.as_str()), (Verdict::Lacks, "not there"));
    }

    #[test]
    fn programs_are_found_in_the_path() {
        assert!(in_path("sh").is_some());
        assert!(in_path("no-such-program-here").is_none());
    }
}
