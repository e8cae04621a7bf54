//! How much memory the host can give.

use std::fs;
use std::path::Path;

/// Bytes of memory that the host has, and has to spare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it: the computer's RAM, or the limit of the container we run in if that is less.
    pub total: u64,
    /// What can be had now without swapping (`MemAvailable`, also within the container's limit).
    pub available: u64,
}

impl HostMemory {
    /// Asks the host.
    pub fn probe() -> Self {
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit).max(1);
        let ram = info.totalram.saturating_mul(unit);
        let free = meminfo_available(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
            .unwrap_or_else(|| info.freeram.saturating_mul(unit));
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let limit = cgroup_limit(&groups, Path::new("/sys/fs/cgroup"));
        let total = limit.map_or(ram, |limit| limit.min(ram));
        Self { total, available: free.min(total) }
    }
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The least memory limit that applies to this process, from cgroup v2 (every level up to the root) or v1.
fn cgroup_limit(groups: &str, mount: &Path) -> Option<u64> {
    let read = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let mut least = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (root, file) = match controllers {
            "" => (mount.to_path_buf(), "memory.max"),
            "memory" => (mount.join("memory"), "memory.limit_in_bytes"),
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        let levels = own.ancestors().take_while(|level| level.starts_with(&root));
        least = levels.filter_map(|level| read(&level.join(file))).chain(least).min();
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_memory() {
        let memory = HostMemory::probe();
        assert!(memory.available > 0 && memory.available <= memory.total, "{memory:?}");
    }

    #[test]
    fn meminfo_line_is_found() {
        assert_eq!(meminfo_available("MemTotal: 8 kB\nMemAvailable:   23793 kB\n"), Some(23793 << 10));
        assert_eq!(meminfo_available("MemTotal: 8 kB\n"), None);
    }

    #[test]
    fn smallest_limit_of_all_levels_applies() {
        let root = std::env::temp_dir().join(format!("ringfence-cgroup-{}", std::process::id()));
        fs::create_dir_all(root.join("pod/app")).unwrap();
        fs::write(root.join("pod/memory.max"), "1000\n").unwrap();
        fs::write(root.join("pod/app/memory.max"), "max\n").unwrap();
        assert_eq!(cgroup_limit("0::/pod/app\n", &root), Some(1000));
        assert_eq!(cgroup_limit("0::/\n", &root), None);
        fs::remove_dir_all(root).unwrap();
    }
}
